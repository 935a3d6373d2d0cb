"""A frozen model that reads the rows' own ids: the policy as it started, or another one of its vocabulary."""

from __future__ import annotations

import copy
from typing import Any

import torch

from steerl.reward.kinds.model import usable_device
from steerl.reward.kinds.model_inputs import vocabulary_of
from steerl.reward.types import has_ids
from steerl.rollout.common.errors import DataError, UserError
from steerl.rollout.model import unread
from steerl.rollout.model.policy import ModelSettings, Policy, load_policy
from steerl.rollout.types import Rollout


def frozen(settings: Any, where: str, around: Any) -> Policy:
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


def named(settings: Any) -> ModelSettings:
    return ModelSettings(
        path=settings.model,
        dtype=settings.dtype,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def check_vocabulary(own: str, other: str | None, where: str) -> None:
    if other not in (None, own):
        raise UserError(
            f"{where}.model: its vocabulary is not the policy's, so it cannot read sampled ids; use one of the same tokenizer"
        )


def check_ids(rollout: Rollout, where: str) -> None:
    if not has_ids(rollout):
        raise DataError(f"{where}: reads ids as they were sampled, and these texts have none; score a dump, or train with it")


def read_places(rollout: Rollout, eos_ids: tuple[int, ...]) -> torch.Tensor:
    """(B, R): the actions, but for the stop token of a row that has others: texts that a probe is made from have none."""
    mask_BR = rollout.action_mask_BR
    last_BR = mask_BR & (mask_BR.flip(1).cumsum(1).flip(1) == 1)
    stops_BR = (
        last_BR & torch.isin(rollout.response_BR, torch.tensor(eos_ids, device=rollout.device)) & rollout.ended_B[:, None]
    )
    return mask_BR & ~(stops_BR & (mask_BR.sum(1, keepdim=True) > 1))
