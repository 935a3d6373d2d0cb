"""What the next token is drawn from: processors in their one order, and the draw.

    raw logits ─┬─ / temperature ───────────────────────────────────── policy ──────── log-prob, entropy
                │                                                        ^ over these alone, with sampling.replay_mask
                └─ penalty ─ bans ─ / temperature ─ top-k ─ top-p ─ min-p ─ behaviour ─ draw, log-prob

All in float32, sums that matter in float64. Penalties and bans see real tokens only, never padding. The draw is an
exact inverse CDF from one uniform per row, so a row's token depends on its own number alone; the normaliser that the
draw needs is the one that the log-probs need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.decoding.settings import Sampling, Vocabulary
from steerl.rollout.decoding.weights import Space, Weights, kth_largest, nucleus

_NEGATIVE = float("-inf")


@dataclass(frozen=True)
class Drawn:
    """One step: a token per row with both log-probs. `bad_B`: rows whose logits are no distribution (NaN, +inf, all banned)."""

    tokens_B: Tensor
    behaviour_B: Tensor
    policy_B: Tensor
    entropy_B: Tensor
    bad_B: Tensor
    kept_BV: Tensor | None = None
    """What could be drawn, where the mask is replayed; overwritten by the next step."""


class History:
    """What penalties and bans look back on: the row's real tokens so far. Rows can be picked; columns grow by one."""

    def __init__(self, tokens_BL: Tensor, real_BL: Tensor, distribution: Distribution):
        self.distribution = distribution
        self.tokens_BL, self.real_BL = tokens_BL, real_BL

    def append(self, tokens_B: Tensor) -> None:
        if self.distribution.looks_back:
            self.tokens_BL = torch.cat([self.tokens_BL, tokens_B[:, None]], dim=1)
            self.real_BL = torch.cat([self.real_BL, torch.ones_like(self.real_BL[:, :1])], dim=1)

    def select(self, index: Tensor) -> None:
        self.tokens_BL, self.real_BL = self.tokens_BL[index], self.real_BL[index]


class Distribution:
    """The settings, applied to logits. Built once per sampler."""

    def __init__(self, sampling: Sampling, policy: Vocabulary):
        self.sampling = sampling
        self.vocab_size = policy.vocab_size
        banned = _banned_sequences(sampling, policy)
        self.banned_always = [ids[0] for ids in banned if len(ids) == 1]
        self.banned_after = [ids for ids in banned if len(ids) > 1]
        self.looks_back = sampling.repetition_penalty != 1 or sampling.no_repeat_ngram_size > 0 or bool(self.banned_after)
        self.penalises = self.looks_back or bool(self.banned_always)

    def penalized(self, logits_BV: Tensor, history: History, space: Space) -> Tensor:
        """Penalties, then bans: what depends on the tokens so far. -inf for what is banned."""
        settings, tokens_BL, real_BL = self.sampling, history.tokens_BL, history.real_BL
        scores = space.like("penalized", logits_BV).copy_(logits_BV)
        if settings.repetition_penalty != 1:
            _penalize(scores, tokens_BL, real_BL, settings.repetition_penalty)
        if settings.no_repeat_ngram_size:
            _ban_repeats(scores, tokens_BL, real_BL, settings.no_repeat_ngram_size)
        if self.banned_always:
            scores[:, self.banned_always] = _NEGATIVE
        for ids in self.banned_after:
            _ban_sequence(scores, tokens_BL, real_BL, ids)
        return scores

    def truncate(self, weights: Weights) -> None:
        """Top-k, then top-p of what is left, then min-p."""
        settings = self.sampling
        if 0 < settings.top_k < weights.shifted_BV.shape[1]:
            weights.keep(weights.at_least(kth_largest(weights.shifted_BV, settings.top_k)))
        if settings.top_p < 1:
            weights.keep(nucleus(weights, settings.top_p))
        if settings.min_p > 0:
            weights.keep(weights.at_least(torch.full_like(weights.top_B1, math.log(settings.min_p))))

    def behaviour_scores(self, logits_BV: Tensor, history: History) -> Tensor:
        """Scores whose softmax tokens are drawn from: -inf for what cannot be drawn."""
        scores = self.penalized(logits_BV, history, Space())
        if self.sampling.greedy:
            return scores
        scores = scores / self.sampling.temperature
        if not self.sampling.truncates:
            return scores
        weights = Weights(scores, Space())
        self.truncate(weights)
        return scores.masked_fill(weights.weights_BV == 0, _NEGATIVE)

    def draw(self, logits_BV: Tensor, history: History, uniform_B: Tensor, space: Space) -> Drawn:
        """A token per row as the behaviour draws it, with both log-probs and the policy's entropy."""
        settings, replays = self.sampling, self.sampling.replays_mask
        scores_BV = _tempered(logits_BV, settings.policy_temperature, space)
        policy = Weights(scores_BV, space, "policy", entropy=not replays, truncated=settings.truncates)
        behaviour, bad_B = policy, policy.bad_B
        if not replays:  # of all that the policy may say, before anything is taken out
            entropy_B, total_B = policy.entropy(), policy.total_B
        if settings.greedy:
            best = self.penalized(logits_BV, history, space).max(dim=1)
            logprobs_B = policy.logprobs(best.indices, total_B)
            return Drawn(best.indices, logprobs_B, logprobs_B, entropy_B, bad_B | ~best.values.isfinite())
        if self.penalises:
            scores = self.penalized(logits_BV, history, space).div_(settings.temperature)
            behaviour = Weights(scores, space, "behaviour", truncated=settings.truncates)
        if settings.truncates:
            self.truncate(behaviour)
        tokens_B, kept_BV = behaviour.draw(uniform_B), None
        if replays:
            kept_BV = torch.gt(behaviour.weights_BV, 0, out=space.like("drawable", scores_BV, torch.bool))
            if self.penalises:  # what is left may be so unlikely that its weights beside the likeliest's are 0
                policy = Weights.of_some(scores_BV, kept_BV, space, "policy")
            entropy_B, total_B = policy.entropy(), policy.total_B
        policy_B = policy.logprobs(tokens_B, total_B)
        behaviour_B = policy_B if settings.is_policy else behaviour.logprobs(tokens_B, behaviour.total_B)
        bad_B = bad_B if behaviour.bad_B is bad_B else bad_B | behaviour.bad_B
        return Drawn(tokens_B, behaviour_B, policy_B, entropy_B, bad_B, kept_BV)


def _tempered(logits_BV: Tensor, temperature: float, space: Space) -> Tensor:
    """Float32 logits divided by the temperature."""
    if temperature == 1 and logits_BV.dtype == torch.float32:
        return logits_BV
    scores_BV = space.like("tempered", logits_BV)
    if logits_BV.dtype == torch.float32:
        return torch.div(logits_BV, temperature, out=scores_BV)
    return scores_BV.copy_(logits_BV) if temperature == 1 else scores_BV.copy_(logits_BV).div_(temperature)


def _penalize(scores_BV: Tensor, tokens_BL: Tensor, real_BL: Tensor, penalty: float) -> None:
    """Scores of the row's real tokens times the penalty where negative, divided by it elsewhere: each once, in place."""
    last_B1 = tokens_BL[:, -1:]  # padding is on the left: it gives way to a token that is penalized anyway
    seen_BL = torch.where(real_BL, tokens_BL, last_B1)
    scores_BL = scores_BV.gather(1, seen_BL)
    scores_BV.scatter_(1, seen_BL, torch.where(scores_BL < 0, scores_BL * penalty, scores_BL / penalty))


def _ban_repeats(scores_BV: Tensor, tokens_BL: Tensor, real_BL: Tensor, size: int) -> None:
    """-inf for tokens that would complete an n-gram which the row's real tokens hold already, in place."""
    length = tokens_BL.shape[1]
    if length < size:
        return
    windows = tokens_BL.unfold(1, size, 1)
    tail = tokens_BL[:, length - size + 1 :]
    hit = real_BL[:, : length - size + 1] & (windows[:, :, :-1] == tail[:, None]).all(dim=2)
    hit &= real_BL[:, length - size + 1 :].all(dim=1)[:, None]
    row, place = hit.nonzero(as_tuple=True)
    scores_BV[row, windows[row, place, size - 1]] = _NEGATIVE


def _ban_sequence(scores_BV: Tensor, tokens_BL: Tensor, real_BL: Tensor, ids: tuple[int, ...]) -> None:
    """-inf for the last id where the row's real tokens end in the ids before it, in place."""
    before = ids[:-1]
    if tokens_BL.shape[1] < len(before):
        return
    tail = tokens_BL[:, -len(before) :] == torch.tensor(before, device=tokens_BL.device)
    hit_B = (tail & real_BL[:, -len(before) :]).all(dim=1)
    scores_BV[:, ids[-1]].masked_fill_(hit_B, _NEGATIVE)


def _banned_sequences(sampling: Sampling, policy: Vocabulary) -> list[tuple[int, ...]]:
    """Bad words as ids: as written, and as they stand after a blank (most tokenizers spell the two differently)."""
    banned = {tuple(ids): "sampling.bad_words_ids" for ids in sampling.bad_words_ids}
    for word in sampling.bad_words:
        spelt = [policy.tokenizer.encode(text, add_special_tokens=False) for text in (word, " " + word.lstrip())]
        spelt = [ids for ids in spelt if ids and policy.tokenizer.unk_token_id not in ids]
        banned |= {tuple(ids): "sampling.bad_words" for ids in spelt}
        if not spelt:
            raise ConfigError(f"sampling.bad_words: the tokenizer cannot spell {word!r}; leave it out")
    for ids, name in banned.items():
        if not all(0 <= i < policy.vocab_size for i in ids):
            raise ConfigError(f"{name}: {list(ids)} is out of range; ids go from 0 to {policy.vocab_size - 1}")
    return list(banned)
