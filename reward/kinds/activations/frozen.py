"""A frozen model that reads the rows' own ids: the policy as it started, or another one of its vocabulary."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerl.reward.kinds.model import usable_device
from steerl.reward.kinds.model_inputs import vocabulary_of
from steerl.reward.settings import FrozenSettings
from steerl.reward.types import has_ids, last_of
from steerl.rollout.common.errors import DataError, UserError
from steerl.rollout.common.fingerprint import model_fingerprint
from steerl.rollout.model import unread
from steerl.rollout.model.policy import Policy, load_policy
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.vectors.probes import hidden_states
from steerl.rollout.types import Rollout


@dataclass(frozen=True)
class FrozenReader:
    """What such a model gives at one of its places."""

    settings: FrozenSettings
    policy: Policy
    point: Point
    vocabulary: str
    where: str

    @staticmethod
    def of(settings: FrozenSettings, policy: Policy, point: Point, where: str) -> FrozenReader:
        return FrozenReader(settings, policy, point, vocabulary_of(policy.tokenizer), where)

    def content(self) -> str:
        """A hash of the weights. Those of the policy as it starts are the run's own to tell."""
        return "" if self.settings.model is None else model_fingerprint(self.policy.model)

    def read(self, rollout: Rollout, vocabulary: str | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(rows, hidden_BRD, which of it counts) of some rows at a time."""
        if not has_ids(rollout):
            told = "reads ids as they were sampled, and these texts have none; score a dump, or train with it"
            raise DataError(f"{self.where}: {told}")
        check_vocabulary(self.vocabulary, vocabulary, self.where)
        read_BR = read_places(rollout, self.policy.eos_ids)
        for rows, hidden_BRD in hidden_states(self.policy, rollout, self.point, self.settings.batch_size, self.where):
            yield rows.cpu(), hidden_BRD, read_BR[rows, : hidden_BRD.shape[1]].to(hidden_BRD.device)


def frozen(settings: FrozenSettings, where: str, around: Any) -> Policy:
    """`settings.model`, or a copy of the policy as it is now, which is before it learns; nothing trains or steers it."""
    field = where.split(" ")[0]
    device = usable_device(settings.device or around.device or ("cuda" if torch.cuda.is_available() else "cpu"), field)
    if settings.model is not None:
        policy = load_policy(named(settings), device)
        check_vocabulary(vocabulary_of(policy.tokenizer), around.vocabulary, where)
    elif around.policy is None:
        raise UserError(f"{field}.model: missing, and there is no policy here to read; name a folder or hub name")
    else:
        model = copy.deepcopy(around.policy.model)
        unread.to_device(model, device)
        unread.read_in(model)
        policy = around.policy.with_model(model if settings.dtype == "auto" else model.to(getattr(torch, settings.dtype)))
    policy.model.requires_grad_(False).eval()
    return policy


def named(settings: FrozenSettings) -> ModelSettings:
    return ModelSettings(
        path=str(settings.model),
        dtype=settings.dtype,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def check_vocabulary(own: str, other: str | None, where: str) -> None:
    if other not in (None, own):
        raise UserError(
            f"{where}.model: its vocabulary is not the policy's, so it cannot read sampled ids; use one of the same tokenizer"
        )


def read_places(rollout: Rollout, eos_ids: tuple[int, ...]) -> Tensor:
    """(B, R): the actions, but for the stop token of a row that has others: texts that a probe is made from have none."""
    mask_BR = rollout.action_mask_BR
    is_eos_BR = torch.isin(rollout.response_BR, torch.tensor(eos_ids, device=rollout.device))
    stops_BR = last_of(mask_BR) & is_eos_BR & rollout.ended_B[:, None]
    return mask_BR & ~(stops_BR & (mask_BR.sum(1, keepdim=True) > 1))
