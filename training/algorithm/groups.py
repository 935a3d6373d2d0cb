"""The step's groups: the samples of `count` prompts, with their scores. Those that say nothing may be drawn again.

    take ──> sample ──> score ──> add: the groups whose samples differ in score are kept
     ^                                        │ some are missing, and tries are left
     '──── as many further prompts ───────────'

Where the samples of a prompt all score alike, comparing them gives no advantage. With `ppo.drop_equal_groups` (dynamic sampling
of DAPO, arXiv:2503.14476) such a group makes room for one of a further prompt, `ppo.resample_tries` times at most; then the
first of them fill the step up, so that it always has as many rows. What is drawn hangs on seed, step, prompt and sample alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerl.reward.types import Scores
from steerl.rollout.types import Rollout, Samples
from steerl.training.algorithm.experience import task_rewards, weighed_parts
from steerl.training.settings import PPOSettings


class Groups:
    """Groups of one step, of all ranks, as they come in."""

    def __init__(self, settings: PPOSettings, samples: int, count: int):
        self.settings, self.samples, self.count = settings, samples, count
        self.draws: list[list[int]] = []
        """The prompts of each draw, in the order of the data."""
        self._kept: list[tuple[Samples, Scores]] = []
        self._equal: list[tuple[Samples, Scores]] = []
        """Of each draw."""
        self._found = self._dropped = 0
        self._rewards: list[Tensor] = []

    @property
    def prompts(self) -> list[int]:
        """All that were taken so far."""
        return [row for rows in self.draws for row in rows]

    @property
    def missing(self) -> int:
        """Prompts to draw now; 0 where the step has its groups, or no try is left."""
        tries = self.settings.resample_tries if self.settings.drop_equal_groups else 0
        return self.count - self._found if len(self.draws) <= tries else 0

    def add(self, rows: list[int], samples: Samples, scores: Scores) -> None:
        """A draw: n rows of each prompt, one prompt after another."""
        self.draws.append(rows)
        self._rewards.append(scores.total_B)
        equal_G = torch.zeros(len(rows), dtype=torch.bool)
        if self.settings.drop_equal_groups:
            equal_G = equal_groups(self._compared(samples.rollout, scores), self.samples, scores.screened_B)
        self._found, self._dropped = self._found + int((~equal_G).sum()), self._dropped + int(equal_G.sum())
        equal_B = equal_G.repeat_interleave(self.samples)
        for rows_B, among in ((~equal_B, self._kept), (equal_B, self._equal)):
            if bool(rows_B.any()):
                among.append(
                    (samples, scores) if bool(rows_B.all()) else _select(samples, scores, rows_B.nonzero()[:, 0].tolist())
                )

    def _compared(self, rollout: Rollout, scores: Scores) -> Tensor:
        """(B, K): the numbers that are compared in a group, each by itself."""
        if self.settings.group_parts:
            return torch.stack([part_B for _, part_B in weighed_parts(rollout, scores, self.settings)], dim=1)
        return task_rewards(rollout, scores, self.settings).sum(1, keepdim=True)

    def joined(self) -> tuple[Samples, Scores]:
        """Exactly `count` groups: those that differ, in the order they were drawn; then equal ones."""
        parts = [*self._kept, *self._equal]
        if len(parts) == 1:
            return parts[0]
        samples, scores = Samples.join([samples for samples, _ in parts]), Scores.join([scores for _, scores in parts])
        samples, scores = _select(samples, scores, list(range(self.count * self.samples)))
        return samples._replace(rollout=samples.rollout.trim()), scores

    def metrics(self) -> dict[str, float]:
        if not self.settings.drop_equal_groups:
            return {}
        return {
            "groups/drawn": float(len(self.prompts)),
            "groups/draws": float(len(self.draws)),
            "groups/equal": float(self._dropped),
            "groups/filled": float(self.count - self._found),
            "groups/reward_drawn": float(torch.cat(self._rewards).double().mean()),
        }


def _select(samples: Samples, scores: Scores, rows: list[int]) -> tuple[Samples, Scores]:
    """Texts are the main process's alone."""
    texts = samples.texts.select(rows) if len(samples.texts) else samples.texts
    return Samples(samples.rollout.select(rows), texts), scores.select(rows)


def equal_groups(score_BK: Tensor, samples: int, screened_B: Tensor | None = None) -> Tensor:
    """Which groups of `samples` rows, one after another, have the same scores in every column. Rows that are screened out, and
    parts that do not apply (NaN), are as if they were not there."""
    counts_BK = ~score_BK.isnan() if screened_B is None else ~score_BK.isnan() & ~screened_B[:, None]
    most_GNK = torch.where(counts_BK, score_BK, -torch.inf).reshape(-1, samples, score_BK.shape[1])
    least_GNK = torch.where(counts_BK, score_BK, torch.inf).reshape(most_GNK.shape)
    return (most_GNK.amax(1) <= least_GNK.amin(1)).all(1)
