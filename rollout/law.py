"""The law of the next token: processors in their one order, and the draw from it.

    raw logits ─┬─ / temperature ───────────────────────────────────── policy's law ──────── log-prob, entropy
                └─ penalty ─ bans ─ / temperature ─ top-k ─ top-p ─ min-p ─ behaviour's law ─ draw, log-prob

All in float32, sums that matter in float64. Penalties and bans see real tokens only, never padding. The draw is an
exact inverse CDF from one uniform per row, so a row's token depends on its own number alone; the normaliser that the
draw needs is the one that the log-probs need.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rollout.errors import Problem
from rollout.policy import Policy
from rollout.sampling import Sampling

_BLOCK = 256
_NEGATIVE = float("-inf")


@dataclass(frozen=True)
class Drawn:
    """One step: a token per row with both log-probs. `bad_B` marks rows whose logits hold no law (NaN, +inf, all banned)."""

    tokens_B: Tensor
    behaviour_B: Tensor
    policy_B: Tensor
    entropy_B: Tensor
    bad_B: Tensor


class History:
    """What penalties and bans look back on: the row's real tokens so far. Rows can be picked; columns grow by one."""

    def __init__(self, tokens_BL: Tensor, real_BL: Tensor, law: Law):
        self.law = law
        self.tokens_BL, self.real_BL = tokens_BL, real_BL
        self.seen_BV: Tensor | None = None
        if law.sampling.repetition_penalty != 1:
            seen = torch.zeros(len(tokens_BL), law.vocab_size, dtype=torch.int32, device=tokens_BL.device)
            self.seen_BV = seen.scatter_add_(1, tokens_BL, real_BL.int()) > 0

    def append(self, tokens_B: Tensor) -> None:
        if self.law.looks_back:
            self.tokens_BL = torch.cat([self.tokens_BL, tokens_B[:, None]], dim=1)
            self.real_BL = torch.cat([self.real_BL, torch.ones_like(self.real_BL[:, :1])], dim=1)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, tokens_B[:, None], True)

    def select(self, index: Tensor) -> None:
        self.tokens_BL, self.real_BL = self.tokens_BL[index], self.real_BL[index]
        if self.seen_BV is not None:
            self.seen_BV = self.seen_BV[index]


class Law:
    """The settings, applied to logits. Built once per sampler."""

    def __init__(self, sampling: Sampling, policy: Policy):
        self.sampling = sampling
        self.vocab_size = policy.vocab_size
        banned = _banned_sequences(sampling, policy)
        self.banned_always = [ids[0] for ids in banned if len(ids) == 1]
        self.banned_after = [ids for ids in banned if len(ids) > 1]
        self.looks_back = sampling.no_repeat_ngram_size > 0 or bool(self.banned_after)

    def policy_scores(self, logits_BV: Tensor) -> Tensor:
        """What the policy's law is the softmax of."""
        logits = logits_BV.float()
        return logits if self.sampling.policy_temperature == 1 else logits / self.sampling.policy_temperature

    def behaviour_scores(self, logits_BV: Tensor, history: History) -> Tensor:
        """What the behaviour's law is the softmax of, -inf for what cannot be drawn. The order of the processors is here."""
        settings = self.sampling
        scores = logits_BV.float()
        if history.seen_BV is not None:
            penalty = settings.repetition_penalty
            scores = torch.where(history.seen_BV, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        if settings.no_repeat_ngram_size:
            scores = _ban_repeats(scores, history.tokens_BL, history.real_BL, settings.no_repeat_ngram_size)
        if self.banned_always:
            scores = scores.index_fill(1, torch.tensor(self.banned_always, device=scores.device), _NEGATIVE)
        for ids in self.banned_after:
            scores = _ban_sequence(scores, history.tokens_BL, history.real_BL, ids)
        if settings.greedy:
            return scores
        if settings.temperature != 1:
            scores = scores / settings.temperature
        if 0 < settings.top_k < scores.shape[1]:
            kth = scores.topk(settings.top_k, dim=1).values[:, -1:]
            scores = scores.masked_fill(scores < kth, _NEGATIVE)
        if settings.top_p < 1:
            scores = _nucleus(scores, settings.top_p)
        if settings.min_p > 0:
            floor = scores.amax(dim=1, keepdim=True) + torch.tensor(settings.min_p, dtype=torch.float64).log().float().to(
                scores
            )
            scores = scores.masked_fill(scores < floor, _NEGATIVE)
        return scores

    def draw(self, logits_BV: Tensor, history: History, uniform_B: Tensor) -> Drawn:
        """A token per row from the behaviour's law, with both log-probs and the entropy of the policy's."""
        policy_BV = self.policy_scores(logits_BV)
        policy = Weights(policy_BV)
        entropy_B = policy.entropy()
        if self.sampling.is_plain:
            tokens_B = policy.draw(uniform_B)
            logprobs_B = policy.logprobs(policy_BV, tokens_B)
            return Drawn(tokens_B, logprobs_B, logprobs_B, entropy_B, policy.bad_B)
        scores_BV = self.behaviour_scores(logits_BV, history)
        if self.sampling.greedy:
            best = scores_BV.max(dim=1)
            logprobs_B = policy.logprobs(policy_BV, best.indices)
            return Drawn(best.indices, logprobs_B, logprobs_B, entropy_B, policy.bad_B | ~best.values.isfinite())
        behaviour = Weights(scores_BV)
        tokens_B = behaviour.draw(uniform_B)
        return Drawn(
            tokens_B,
            behaviour.logprobs(scores_BV, tokens_B),
            policy.logprobs(policy_BV, tokens_B),
            entropy_B,
            policy.bad_B | behaviour.bad_B,
        )


class Weights:
    """exp(scores - max) in blocks of 256 with their sums: everything that draws and normalises."""

    def __init__(self, scores_BV: Tensor):
        self.top_B1 = scores_BV.amax(dim=1, keepdim=True)
        rows, size = scores_BV.shape
        blocks = -(-size // _BLOCK)
        self.shifted_BV = scores_BV - self.top_B1
        if size % _BLOCK:
            weights = self.shifted_BV.new_zeros(rows, blocks * _BLOCK)
            torch.exp(self.shifted_BV, out=weights[:, :size])
        else:
            weights = self.shifted_BV.exp()
        self.weights_BV = weights[:, :size]
        self.blocks_BNK = weights.view(rows, blocks, _BLOCK)
        self.cumulative_BN = self.blocks_BNK.sum(dim=2).double().cumsum(dim=1)
        self.total_B = self.cumulative_BN[:, -1]
        self.bad_B = ~self.total_B.isfinite()  # NaN where a score is NaN or +inf, or where all are -inf

    def draw(self, uniform_B: Tensor) -> Tensor:
        """The first token at which the cumulative weight exceeds uniform x total; one of weight 0 is never it."""
        block_B1 = _exceed(self.cumulative_BN, uniform_B * self.total_B)
        before_B = self.cumulative_BN.gather(1, (block_B1 - 1).clamp(min=0))[:, 0].masked_fill(block_B1[:, 0] == 0, 0.0)
        inside_B = self.cumulative_BN.gather(1, block_B1)[:, 0] - before_B
        chosen_BK = self.blocks_BNK.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(dim=1)
        # The share of the block that is left, not the weight: the block's own sum was taken in float32.
        share_B = (uniform_B * self.total_B - before_B) / inside_B
        token_B1 = block_B1 * _BLOCK + _exceed(chosen_BK, share_B.clamp(0, 1) * chosen_BK[:, -1])
        return token_B1[:, 0].clamp(max=self.shifted_BV.shape[1] - 1)  # a row without a law (NaN) must still name a token

    def logprobs(self, scores_BV: Tensor, tokens_B: Tensor) -> Tensor:
        chosen_B = scores_BV.gather(1, tokens_B[:, None])[:, 0].double() - self.top_B1[:, 0].double()
        return (chosen_B - self.total_B.log()).float()

    def entropy(self) -> Tensor:
        """log Z - E[score]; scores of -inf have weight 0 and add nothing."""
        products_B = torch.einsum("bv,bv->b", self.weights_BV, self.shifted_BV.clamp(min=-1e4))
        return (self.total_B.log() - products_B.double() / self.total_B).float()


def _exceed(cumulative_BN: Tensor, target_B: Tensor) -> Tensor:
    """Index of the first entry above the target, which is kept below the last: rounding never leads past the end."""
    last_B = cumulative_BN[:, -1]
    target_B = torch.minimum(target_B, torch.nextafter(last_B, torch.zeros_like(last_B)))
    return torch.searchsorted(cumulative_BN, target_B[:, None], right=True).clamp(max=cumulative_BN.shape[1] - 1)


def _nucleus(scores_BV: Tensor, top_p: float) -> Tensor:
    """-inf outside the smallest set whose mass reaches p. Likeliest first, the lower id first among equals.

    The likeliest few are looked at first, and more of them only while some row's do not reach p: a full sort of a large
    vocabulary is by far the dearest step of the draw.
    """
    size = scores_BV.shape[1]
    weights = Weights(scores_BV)
    # A mass that equals p up to rounding reaches it (0.5 + 0.3 + 0.1 of p = 0.9).
    goal_B1 = (top_p * (1 - 1e-7) * weights.total_B)[:, None]
    count = min(256, size)
    while True:
        values_BK = scores_BV.topk(count, dim=1).values
        mass_BK = (values_BK - weights.top_B1).double().exp().cumsum(dim=1)
        if count == size or bool((mass_BK[:, -1:] >= goal_B1).all()):
            break
        count = min(count * 8, size)
    needed_B1 = (mass_BK < goal_B1).sum(dim=1, keepdim=True).clamp(max=count - 1)
    edge_B1 = values_BK.gather(1, needed_B1)
    above_BV = scores_BV > edge_B1
    tied_BV = scores_BV == edge_B1
    room_B1 = needed_B1 + 1 - above_BV.sum(dim=1, keepdim=True)
    if bool((tied_BV.sum(dim=1, keepdim=True) > room_B1).any()):
        tied_BV &= tied_BV.cumsum(dim=1) <= room_B1
    return scores_BV.masked_fill(~(above_BV | tied_BV), _NEGATIVE)


def _ban_repeats(scores_BV: Tensor, tokens_BL: Tensor, real_BL: Tensor, size: int) -> Tensor:
    """-inf for tokens that would complete an n-gram which the row's real tokens hold already."""
    length = tokens_BL.shape[1]
    if length < size:
        return scores_BV
    windows = tokens_BL.unfold(1, size, 1)
    tail = tokens_BL[:, length - size + 1 :]
    hit = real_BL[:, : length - size + 1] & (windows[:, :, :-1] == tail[:, None]).all(dim=2)
    hit &= real_BL[:, length - size + 1 :].all(dim=1)[:, None]
    counts = torch.zeros(scores_BV.shape, dtype=torch.int32, device=scores_BV.device)
    return scores_BV.masked_fill(counts.scatter_add_(1, windows[:, :, -1], hit.int()) > 0, _NEGATIVE)


def _ban_sequence(scores_BV: Tensor, tokens_BL: Tensor, real_BL: Tensor, ids: tuple[int, ...]) -> Tensor:
    """-inf for the last id where the row's real tokens end in the ids before it."""
    before = ids[:-1]
    if tokens_BL.shape[1] < len(before):
        return scores_BV
    tail = tokens_BL[:, -len(before) :] == torch.tensor(before, device=tokens_BL.device)
    hit_B = (tail & real_BL[:, -len(before) :]).all(dim=1)
    scores_BV = scores_BV.clone()
    scores_BV[:, ids[-1]] = scores_BV[:, ids[-1]].masked_fill(hit_B, _NEGATIVE)
    return scores_BV


def _banned_sequences(sampling: Sampling, policy: Policy) -> list[tuple[int, ...]]:
    """Bad words as ids: as written, and as they stand after a blank (most tokenizers spell the two differently)."""
    banned = {tuple(ids): "sampling.bad_words_ids" for ids in sampling.bad_words_ids}
    for word in sampling.bad_words:
        for text in (word, " " + word.lstrip()):
            ids = policy.tokenizer.encode(text, add_special_tokens=False)
            if ids and policy.tokenizer.unk_token_id not in ids:
                banned[tuple(ids)] = "sampling.bad_words"
        if "sampling.bad_words" not in banned.values():
            raise Problem(f"sampling.bad_words: the tokenizer cannot spell {word!r}; leave it out")
    for ids, name in banned.items():
        if not all(0 <= i < policy.vocab_size for i in ids):
            raise Problem(f"{name}: {list(ids)} is out of range; ids go from 0 to {policy.vocab_size - 1}")
    return list(banned)
