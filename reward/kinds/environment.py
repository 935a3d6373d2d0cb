"""`kind: environment`: what the environment gave, each turn's reward on the turn's last action, the whole's on the last turn's.

turns          first         second            third      Episode.rewards   0.5, None, 1.0; 2.0 for the whole
response_BR    a a a  o o    a a  o o o o      a a
tokens_BR      . . .5 . .    . .  . . . .      . 3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerl.reward.types import Failure, Scores, TurnRewards, settle_turns, turns_of
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.settings_reader import Checked
from steerl.rollout.episodes import Episode
from steerl.rollout.types import Rollout, Texts


@dataclass(frozen=True, kw_only=True)
class EnvironmentReward(Checked):
    """What the environment gave; it does not apply to an episode that was given nothing."""

    fallback: float | None = None
    """The score of an episode whose environment was lost; without it, what was given until then."""

    def build(self, where: str, around: object) -> RewardTerm:
        return RewardTerm("", where, 1.0, lambda rollout, texts, vocabulary: self.score(rollout, texts, where))

    def score(self, rollout: Rollout, texts: Texts, where: str) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0, device=rollout.device))
        if texts.episodes is None:
            told = "no environment took part in these rows, so none gave a reward"
            raise UserError(f"{where}: {told}; name one (environment.factory), or leave this part out")
        given = TurnRewards([self._given(episode) for episode in texts.episodes])
        return settle_turns(given, rollout, where, self.fallback, turns_of(rollout, texts))

    def _given(self, episode: Episode) -> list[float] | Failure | None:
        if not episode.failure:
            return episode.rewards
        return (episode.rewards or [0.0] * len(episode.turns)) if self.fallback is None else Failure(episode.failure)
