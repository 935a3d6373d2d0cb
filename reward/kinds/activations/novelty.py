"""`kind: novelty`: a bonus for responses whose hidden states are unlike those of others (elliptical bonus).

    hidden states of a frozen model -> their mean (or the last) over the actions -> projected, to length 1: h
    bonus = sqrt(h' (ridge I + sum of g g')^-1 h)        g: the step's rows on all ranks, h among them; or all of the run so far

Evaluation adds nothing to what the run has seen. The projection is a fixed matrix of normal numbers, drawn with `seed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from steerl.reward.kinds.activations.frozen import check_ids, check_vocabulary, frozen, read_places
from steerl.reward.kinds.model_inputs import vocabulary_of
from steerl.reward.types import Scores
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common import processes
from steerl.rollout.common.fingerprint import model_fingerprint
from steerl.rollout.common.settings_reader import Checked, within
from steerl.rollout.model.policy import Policy
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.vectors.probes import hidden_states, place_of
from steerl.rollout.types import Rollout, Texts


@dataclass(frozen=True, kw_only=True)
class NoveltySettings(Checked):
    """An elliptical bonus on the hidden states of a frozen model."""

    model: str | None = None
    """A folder or hub name of the policy's vocabulary; null = a copy of the policy as it starts."""
    layer: int | None = None
    """The block whose output is read, negative from the end; null = the last."""
    position: Literal["mean", "last"] = "mean"
    """Over a row's actions, its stop token left out."""
    dimensions: int = within(32, low=1)
    """Of the projection."""
    ridge: float = within(1.0, above=0.0)
    history: Literal["step", "run"] = "step"
    """What a row is compared with: the step's rows, or all that the run has drawn to learn from."""
    seed: int = 0
    """Of the projection's numbers."""
    batch_size: int = within(64, low=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    revision: str = ""
    """Branch, tag or commit of the hub; empty = the newest."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model, with all your rights; read it first."""

    def problems(self) -> list[str]:
        unused = [name for name in ("revision", "trust_remote_code") if getattr(self, name) and self.model is None]
        return [f"{name}: without effect where model is not given; leave it out" for name in unused]

    def build(self, where: str, around: Any) -> RewardTerm:
        policy = frozen(self, where, around)
        reward = NoveltyReward(self, policy, self.place(policy, where), vocabulary_of(policy.tokenizer), where)
        content = lambda: str(model_fingerprint(policy.model))  # noqa: E731
        return RewardTerm("", where, 1.0, reward.score, content=content, memory=reward.memory)

    def place(self, policy: Policy, where: str) -> Point:
        """Where a model is read."""
        at = At(layers=(-1 if self.layer is None else self.layer,))
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
    policy: Policy
    point: Point
    vocabulary: str
    where: str
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
        features_BD = torch.zeros(len(rollout), self.settings.dimensions, dtype=torch.float64)
        if not len(rollout):
            return features_BD
        check_ids(rollout, self.where)
        check_vocabulary(self.vocabulary, vocabulary, self.where)
        read_BR = read_places(rollout, self.policy.eos_ids)
        for rows, hidden_BRD in hidden_states(self.policy, rollout, self.point, self.settings.batch_size, self.where):
            mask_BR = read_BR[rows, : hidden_BRD.shape[1]].to(hidden_BRD.device)
            if self.settings.position == "last":
                mask_BR = mask_BR & (mask_BR.flip(1).cumsum(1).flip(1) == 1)
            mean_BD = torch.where(mask_BR[..., None], hidden_BRD, 0.0).sum(1) / mask_BR.sum(1, keepdim=True).clamp(min=1)
            projected_BD = mean_BD.cpu().double() @ projection(mean_BD.shape[1], self.settings.dimensions, self.settings.seed)
            features_BD[rows.cpu()] = torch.nn.functional.normalize(projected_BD, dim=1)
        return features_BD


def projection(width: int, dimensions: int, seed: int) -> Tensor:
    """(width, dimensions): the same numbers in every run and on every rank."""
    return torch.randn(width, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def elliptical(features_BD: Tensor, sum_DD: Tensor, ridge: float) -> Tensor:
    """(B,): sqrt(h' (ridge I + sum)^-1 h)."""
    whole_DD = sum_DD + ridge * torch.eye(len(sum_DD), dtype=sum_DD.dtype)
    return (features_BD * torch.linalg.solve(whole_DD, features_BD.T).T).sum(1).clamp(min=0).sqrt()
