"""`kind: novelty`: a bonus for responses whose hidden states are unlike those of others (elliptical bonus).

    hidden states of a frozen model -> their mean (or the last) over the actions -> projected, to length 1: h
    bonus = sqrt(h' (ridge I + sum of g g')^-1 h)        g: the step's rows on all ranks, h among them; or all of the run so far

Evaluation adds nothing to what the run has seen. The projection is a fixed matrix of normal numbers, drawn with `seed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerl.reward.kinds.activations.frozen import FrozenReader, frozen
from steerl.reward.settings import NoveltySettings
from steerl.reward.types import Scores, last_of
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common import processes
from steerl.rollout.model.policy import Policy
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.vectors.probes import place_of
from steerl.rollout.types import Rollout, Texts


def build(settings: NoveltySettings, where: str, around: Any) -> RewardTerm:
    policy = frozen(settings, where, around)
    reward = NoveltyReward(settings, FrozenReader.of(settings, policy, place(settings, policy, where), where))
    return RewardTerm("", where, 1.0, reward.score, content=reward.model.content, memory=reward.memory)


def place(settings: NoveltySettings, policy: Policy, where: str) -> Point:
    """Where a model is read."""
    at = At(layers=(-1 if settings.layer is None else settings.layer,))
    return place_of(policy, at, None, where.split(" ")[0])


@dataclass
class Memory:
    """The sum of g g' over all rows so far; nothing before the first."""

    sum_DD: Tensor | None = field(default=None)

    def state_dict(self) -> dict[str, Any]:
        return {"sum": None if self.sum_DD is None else self.sum_DD.tolist()}

    def load_state_dict(self, state: Any) -> None:
        self.sum_DD = None if state["sum"] is None else torch.tensor(state["sum"], dtype=torch.float64)


@dataclass(frozen=True)
class NoveltyReward:
    settings: NoveltySettings
    model: FrozenReader
    memory: Memory = field(default_factory=Memory)

    def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None, still: bool = False) -> Scores:
        """Every rank calls, with or without rows. `still`: for looking at the policy; nothing is remembered."""
        features_BD = self.features(rollout, vocabulary)
        here_DD = processes.sum_((features_BD.T @ features_BD).to(processes.start().device)).cpu()
        if self.settings.history == "run":
            before_DD = torch.zeros_like(here_DD) if self.memory.sum_DD is None else self.memory.sum_DD
            here_DD = before_DD if still else before_DD + here_DD
            self.memory.sum_DD = here_DD
        bonus_B = elliptical(features_BD, here_DD, self.settings.ridge)
        return Scores(bonus_B.float().masked_fill(rollout.actions_B.cpu() == 0, torch.nan))

    def features(self, rollout: Rollout, vocabulary: str | None) -> Tensor:
        """(B, dimensions) float64 of length 1; zeros for a row without actions."""
        order, means = [], []
        for rows, hidden_BRD, mask_BR in self.model.read(rollout, vocabulary) if len(rollout) else ():
            mask_BR = last_of(mask_BR) if self.settings.position == "last" else mask_BR
            mean_BD = torch.where(mask_BR[..., None], hidden_BRD, 0.0).sum(1) / mask_BR.sum(1, keepdim=True).clamp(min=1)
            order.append(rows)
            means.append(mean_BD.cpu())
        if not means:
            return torch.zeros(0, self.settings.dimensions, dtype=torch.float64)
        mean_BD = torch.cat(means)[torch.cat(order).argsort()].double()
        projected_BD = mean_BD @ projection(mean_BD.shape[1], self.settings.dimensions, self.settings.seed)
        return torch.nn.functional.normalize(projected_BD, dim=1)


def projection(width: int, dimensions: int, seed: int) -> Tensor:
    """(width, dimensions): the same numbers in every run and on every rank."""
    return torch.randn(width, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def elliptical(features_BD: Tensor, sum_DD: Tensor, ridge: float) -> Tensor:
    """(B,): sqrt(h' (ridge I + sum)^-1 h)."""
    whole_DD = sum_DD + ridge * torch.eye(len(sum_DD), dtype=sum_DD.dtype)
    return (features_BD * torch.linalg.solve(whole_DD, features_BD.T).T).sum(1).clamp(min=0).sqrt()
