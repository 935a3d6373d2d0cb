"""`kind: environment`: what the environment gave, each turn's reward on the turn's last action, the whole's on the last turn's.

turns          first         second            third      Episode.rewards   0.5, None, 1.0; 2.0 for the whole
response_BR    a a a  o o    a a  o o o o      a a
tokens_BR      . . .5 . .    . .  . . . .      . 3
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steerl.reward.settings import EnvironmentTermSettings
from steerl.reward.types import Failure, Scores, TurnRewards, settle_turns, turns_of
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common.errors import UserError
from steerl.rollout.episodes import Episode
from steerl.rollout.types import Rollout, Texts


def build(settings: EnvironmentTermSettings, where: str, around: object) -> RewardTerm:
    return RewardTerm("", where, 1.0, EnvironmentReward(settings, where).score)


@dataclass(frozen=True)
class EnvironmentReward:
    settings: EnvironmentTermSettings
    where: str

    def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0, device=rollout.device))
        if texts.episodes is None:
            told = "no environment took part in these rows, so none gave a reward; name one (environment.factory), leave this"
            raise UserError(f"{self.where}: {told} part out, or set ppo.eval_prompts 0 where stored episodes are learned from")
        given = TurnRewards([self._given(episode) for episode in texts.episodes])
        return settle_turns(given, rollout, self.where, self.settings.fallback, turns_of(rollout, texts))

    def _given(self, episode: Episode) -> list[float] | Failure | None:
        if episode.failure and self.settings.fallback is not None:
            return Failure(episode.failure)
        cut = episode.failure or episode.ended_by not in ("policy", "environment")
        return [0.0] * len(episode.turns) if episode.rewards is None and cut else episode.rewards
