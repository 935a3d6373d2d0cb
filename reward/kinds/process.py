"""`kind: process`: a process reward model, a token classifier that judges every step of a response.

    step     tokens up to one that holds `separator`, or up to a turn's end; without a separator every token is a step
    value    the chosen label's output at the step's last token; there it is earned, so the reward is dense
    reduce   sum (dense), or one number per response: mean, min, last, product

The model reads the sampled ids, so its vocabulary must be the policy's. It reads what a row was fed in between, too (a tool's
result), and judges only what the policy drew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerl.reward.kinds.model import Member, chosen, content_of, load_member
from steerl.reward.settings import ProcessSettings
from steerl.reward.types import Scores, turns_of
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common.errors import UserError
from steerl.rollout.prompts.chat import Speller
from steerl.rollout.types import Rollout, Texts, row_name


def build(settings: ProcessSettings, where: str, around: Any) -> RewardTerm:
    member = load_member(settings, settings.path, "token_classification", where, around.device)
    if settings.separator is not None and member.reader.tokenizer is None:
        raise UserError(f"{where}.tokenizer: missing; the model's folder has none, and steps are found by their text")
    return RewardTerm("", where, 1.0, ProcessReward(settings, member, where).score, content=lambda: content_of([member]))


@dataclass(frozen=True)
class ProcessReward:
    settings: ProcessSettings
    member: Member
    where: str

    def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0))
        if not rollout.actions_B.all():
            empty = int((rollout.actions_B == 0).nonzero()[0])
            raise UserError(
                f"{self.where}: {row_name(rollout, empty)} has no sampled ids, and a process reward is given by token"
            )
        if self.settings.tokens == "auto" and vocabulary != self.member.reader.vocabulary:
            raise UserError(
                f"{self.where}.tokens: the model's vocabulary is not the policy's, so it cannot read the sampled ids; "
                "use a process reward model of the policy's family"
            )
        rows = self.member.reader(rollout, texts, self.member.reader.vocabulary)
        assert rows.responses is not None
        tokens_BR = torch.zeros(rollout.response_BR.shape)
        total_B = torch.zeros(len(rollout))
        logits = self.member.classifier.per_token(rows)
        for i, (logits_SL, turns) in enumerate(zip(logits, turns_of(rollout, texts), strict=True)):
            values_R = chosen(logits_SL[rows.responses[i] :], self.member.label, self.settings.output)
            if not values_R.isfinite().all():
                raise UserError(f"{self.where}: {row_name(rollout, i)} has a value that is not finite; try dtype: float32")
            steps = self._steps(rows.ids[i][rows.responses[i] :], rows.ids[i][: rows.responses[i]], turns)
            tokens_BR[i, steps] = values_R[steps]
            total_B[i] = self._reduced(values_R[steps])
        return Scores(total_B, tokens_BR=tokens_BR if self.settings.reduce == "sum" else None)

    def _steps(self, ids: list[int], prompt_ids: list[int], turns: list[tuple[int, int]]) -> list[int]:
        """Where steps end: the tokens that complete a separator, and the last one of each of the policy's turns."""
        if self.settings.separator is None:
            return [position for first, end in turns for position in range(first, end)]
        ends, speller = [], Speller(self.member.reader.tokenizer)
        for first, end in turns:
            start, before = first, speller.tail([*prompt_ids, *ids[:first]])
            for position in range(first, end):
                if self.settings.separator in speller.after(before, ids[start : position + 1], skip=False):
                    ends.append(position)
                    start, before = position + 1, speller.tail([*prompt_ids, *ids[: position + 1]])
            if start < end:
                ends.append(end - 1)
        return ends

    def _reduced(self, values_N: Tensor) -> Tensor:
        if self.settings.reduce == "last":
            return values_N[-1]
        folds: dict[str, Callable[[Tensor], Tensor]] = {
            "sum": torch.sum,
            "mean": torch.mean,
            "min": torch.min,
            "product": torch.prod,
        }
        return folds[self.settings.reduce](values_N)
