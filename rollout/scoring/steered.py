"""A second pass over recorded rows, steered exactly as they were drawn: from their record alone."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import DataError
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.alignment import Packing, encoder_input
from steerl.rollout.types import Rollout


class Steers(Protocol):
    """What sampling and scoring ask of a steering (Steering, in rollout/steering)."""

    @property
    def label(self) -> str: ...

    @property
    def role(self) -> str: ...

    @property
    def sites(self) -> Sequence[object]: ...

    def applied(
        self,
        prompt_mask_BP: Tensor,
        row_B: Tensor,
        sample_B: Tensor,
        columns: Mapping[str, Sequence[object]] | None = None,
        *,
        progress: float = 0.0,
        policy_step: int = 0,
        start_width: int = 1,
    ) -> Applied:
        """How rows that are about to be drawn are steered, as their record will say it."""
        ...

    def active(
        self,
        *,
        prompt_mask_BP: Tensor,
        row_B: Tensor,
        sample_B: Tensor,
        applied: Applied,
        start_width: int = 1,
        drawn_BP: Tensor | None = None,
        packing: Packing | None = None,
    ) -> contextlib.AbstractContextManager[object]:
        """The block inside which the model is steered so. `drawn_BP`: of the prompt's columns the policy's actions of earlier
        turns. `packing`: how the model's calls have the rows in one."""
        ...


def given_columns(rollout: Rollout) -> tuple[Tensor, Tensor | None]:
    """(prompt_mask_BP, drawn_BP) of a pass over rows: of several turns all of their columns are given."""
    if not bool((rollout.action_mask_BR != rollout.extent_BR).any()):
        return rollout.prompt_mask_BP, None
    prompt_BP = torch.zeros_like(rollout.prompt_mask_BP)
    return rollout.sequences_mask_BS, torch.cat([prompt_BP, rollout.action_mask_BR], dim=1)


def steered(
    steering: Steers | None, policy: Policy, rollout: Rollout, packing: Packing | None = None
) -> contextlib.AbstractContextManager[object]:
    """The block in which a pass over these rows is steered; an empty one without a steering."""
    if steering is None:
        return contextlib.nullcontext()
    if not rollout.steering:
        raise DataError(
            f"steering: {steering.label} cannot be put on rows that were drawn without one; leave it out, or record in the "
            "Rollout what Steering.applied gives, and its label"
        )
    mask_BP, drawn_BP = given_columns(rollout)
    if policy.is_seq2seq:
        assert drawn_BP is None, "rows of an encoder-decoder have one turn"
        mask_BP = encoder_input(rollout.prompt_BP, mask_BP)[1]
    return steering.active(
        prompt_mask_BP=mask_BP,
        row_B=rollout.row_B,
        sample_B=rollout.sample_B,
        applied=rollout.applied,
        start_width=max(len(policy.start_ids), 1),
        drawn_BP=drawn_BP,
        packing=packing,
    )
