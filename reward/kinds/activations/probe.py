"""`kind: probe`: a linear probe on activations, of a frozen model that reads the rows' own ids.

    ids as sampled -> frozen model, as far as the layer -> h at each action -> slope x (h . direction) + bias -> a number a row

The number is a penalty (a negative weight), or with `screen` the mark of rows that nothing is to be learned from. The model
that is read is not the one that learns: a policy that is trained against a probe of itself can learn to hide from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerl.reward.kinds.activations.frozen import FrozenReader, frozen
from steerl.reward.settings import ProbeSettings
from steerl.reward.types import Scores, last_of
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.fingerprint import sha256_file, values_fingerprint
from steerl.rollout.model.policy import Policy
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.vectors.probes import Probe, place_of, read_probe
from steerl.rollout.types import Rollout, Texts, row_name


def build(settings: ProbeSettings, where: str, around: Any) -> RewardTerm:
    probe = read_probe(Path(settings.probe), settings.layer, where.split(" ")[0])
    policy = frozen(settings, where, around)
    reward = ProbeReward(settings, probe, FrozenReader.of(settings, policy, place(settings, policy, probe, where), where))
    return RewardTerm("", where, 0.0 if settings.screen else 1.0, reward.score, content=reward.content)


def place(settings: ProbeSettings, policy: Policy, probe: Probe, where: str) -> Point:
    """The probe's point in a model."""
    return place_of(policy, probe.at, len(probe.direction_D), f"{where.split(' ')[0]}.probe: {settings.probe}")


@dataclass(frozen=True)
class ProbeReward:
    settings: ProbeSettings
    probe: Probe
    model: FrozenReader

    def content(self) -> str:
        return values_fingerprint([[self.model.content(), sha256_file(Path(self.settings.probe))]])

    @property
    def threshold(self) -> float | None:
        """In the unit of the output; None where there is none."""
        given = "file" if self.settings.screen and self.settings.above is None else self.settings.above
        return self.output(torch.tensor(self.probe.reading.threshold)).item() if given == "file" else given

    def output(self, logits: Tensor) -> Tensor:
        return logits if self.settings.output == "logit" else logits.sigmoid()

    def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0))
        logits_B = torch.full((len(rollout),), torch.nan)
        for rows, hidden_BRD, mask_BR in self.model.read(rollout, vocabulary):
            logits_B[rows] = self.pooled(self.probe.logits(hidden_BRD), mask_BR).cpu()
        values_B, acts_B = self.output(logits_B), rollout.actions_B.cpu() > 0
        bad = (~values_B.isfinite() & acts_B).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"{self.model.where}: {row_name(rollout, bad[0])} has a value that is not finite; try dtype: float32"
            )
        return self.scores(values_B)

    def pooled(self, logits_BR: Tensor, mask_BR: Tensor) -> Tensor:
        """(B,): one logit of each row; NaN where it has no action."""
        position = self.settings.position or self.probe.position
        if position == "max":
            highest_B = logits_BR.masked_fill(~mask_BR, -torch.inf).amax(1)
            return highest_B.masked_fill(~mask_BR.any(1), torch.nan)
        if position == "last":
            mask_BR = last_of(mask_BR)
        return torch.where(mask_BR, logits_BR, 0.0).sum(1) / mask_BR.sum(1)

    def scores(self, values_B: Tensor) -> Scores:
        """A row without actions has no value. `above`: whether a value is above the threshold."""
        if self.threshold is None:
            return Scores(values_B)
        above_B = values_B > self.threshold
        parts = {"above": above_B.float().masked_fill(values_B.isnan(), torch.nan)}
        if self.settings.screen:
            return Scores(values_B, parts, screened_B=above_B)
        return Scores(values_B.where(above_B | values_B.isnan(), 0.0), parts)
