"""What a policy says to given texts: log-likelihoods of responses, and generations, steered or not.

    pairs ── responses that differ in their last token: one row ┐
          └─ others, rows of like length ── teacher_forced ──┴─ (log-likelihood, whether each token is the likeliest)
    prompts ── rows of like length ── a sampler ── ids

Batches change nothing: rows are scored without padding or behind their mask, and what is random in a row (the noise of a
steering, the draws) is keyed by its prompt, not by its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.alignment import encoder_input
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.scoring.steered import Steers
from steerl.rollout.types import Rollout

Answer = tuple[float, bool]
SHARED = 8
"""Longest response that is scored together with others which differ in their last token: all log-probs of its row are held."""


@dataclass(frozen=True)
class Pair:
    """A response that is to be scored after a prompt."""

    prompt: list[int]
    response: list[int]
    scored: int
    """How many of the response's tokens, counted from its end."""
    row: int
    """What the row's random numbers are keyed by."""


def row_key(ids: Sequence[int], occurrence: int = 0) -> int:
    """A number of a prompt by its ids alone, so that order, batches and processes change nothing."""
    digest = hashlib.blake2b(repr(([int(i) for i in ids], occurrence)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def batches(lengths: Sequence[int], rows: int, tokens: int) -> Iterator[list[int]]:
    """Places in `lengths`, the longest first: at most so many rows, and so many tokens where that is not 0."""
    order, start = sorted(range(len(lengths)), key=lambda at: -lengths[at]), 0
    while start < len(order):
        size = min(rows, max(1, tokens // lengths[order[start]])) if tokens else rows
        yield order[start : start + size]
        start += size


def likelihoods(
    policy: Policy, pairs: Sequence[Pair], steering: Steers | None, rows: int, tokens: int
) -> Iterator[list[tuple[int, Answer]]]:
    """(place in `pairs`, its answer) of all of them, a pass after the other."""
    alike: dict[tuple[Any, ...], list[int]] = {}
    for at, pair in enumerate(pairs):
        if not pair.response:
            yield [(at, (0.0, True))]
            continue
        # Choices of one letter have all but their last token in common: one row for all of them.
        shared = ("but the last", pair.row, *pair.prompt, -1, *pair.response[:-1])
        alike.setdefault(shared if len(pair.response) <= SHARED else (at,), []).append(at)
    for several in (False, True):
        groups = [places for places in alike.values() if (len(places) > 1) == several]
        lengths = [len(pairs[places[0]].prompt) + len(pairs[places[0]].response) for places in groups]
        for batch in batches(lengths, rows, tokens):
            yield list((_choices if several else _responses)(policy, pairs, [groups[i] for i in batch], steering))


def _responses(
    policy: Policy, pairs: Sequence[Pair], part: list[list[int]], steering: Steers | None
) -> Iterator[tuple[int, Answer]]:
    """One pair a row."""
    own = [pairs[at] for (at,) in part]
    wanted: dict[str, Any] = {"temperature": 1.0, "want_entropy": False, "want_likeliest": True, "steering": steering}
    with torch.no_grad():
        forced = teacher_forced(policy, _given(policy, own, steering), **wanted)
    assert forced.likeliest_BR is not None
    for (at,), pair, logprobs_R, likeliest_R in zip(part, own, forced.logprobs_BR, forced.likeliest_BR, strict=True):
        yield at, _answer(pair, logprobs_R, likeliest_R)


def _choices(
    policy: Policy, pairs: Sequence[Pair], part: list[list[int]], steering: Steers | None
) -> Iterator[tuple[int, Answer]]:
    """Several pairs a row, which differ in their last token."""
    rollout = _given(policy, [pairs[places[0]] for places in part], steering)
    with torch.no_grad():
        forced = teacher_forced(policy, rollout, temperature=1.0, want_entropy=False, want_all=True, steering=steering)
    assert forced.all_logprobs_BRV is not None
    for places, logprobs_RV in zip(part, forced.all_logprobs_BRV, strict=True):
        for at in places:
            ids_R = torch.tensor(pairs[at].response, device=logprobs_RV.device)
            own_RV = logprobs_RV[: len(ids_R)]
            yield at, _answer(pairs[at], own_RV.gather(1, ids_R[:, None])[:, 0], own_RV.argmax(-1) == ids_R)


def _answer(pair: Pair, logprobs_R: torch.Tensor, likeliest_R: torch.Tensor) -> Answer:
    scored = slice(len(pair.response) - pair.scored, len(pair.response))
    return float(logprobs_R[scored].double().sum()), bool(likeliest_R[scored].all())


def _given(policy: Policy, pairs: Sequence[Pair], steering: Steers | None) -> Rollout:
    """The pairs as rows that a pass can be over, with the record of how they are to be steered."""
    rollout = Rollout.of_ids(
        [pair.prompt for pair in pairs],
        [pair.response for pair in pairs],
        pad_id=policy.pad_id,
        device=policy.device,
        start_ids=policy.start_ids,
        row_B=[pair.row for pair in pairs],
    )
    if steering is None:
        return rollout
    mask_BP = rollout.prompt_mask_BP
    if policy.is_seq2seq:
        mask_BP = encoder_input(rollout.prompt_BP, mask_BP)[1]
    start_width = max(len(policy.start_ids), 1)
    applied = steering.applied(mask_BP, rollout.row_B, rollout.sample_B, start_width=start_width)
    return dataclasses.replace(rollout, steering=steering.label, **applied._asdict())


def generations(
    policy: Policy,
    prompts: Sequence[tuple[list[int], int]],
    sampling: Sampling,
    steering: Any,
    draws: Callable[[Sampling, Any], Any],
    tokens: int,
) -> Iterator[list[tuple[int, list[int]]]]:
    """(place in `prompts`, the ids of its response) of prompts with what their rows are keyed by, a batch after the other."""
    sampler = draws(sampling, steering)
    lengths = [len(ids) + sampling.max_new_tokens for ids, _ in prompts]
    for part in batches(lengths, sampling.batch_size, tokens):
        ids, rows = zip(*(prompts[at] for at in part), strict=True)
        rollout, _ = sampler.sample(PromptBatch.of_ids(ids, rows, policy.tokenizer))
        yield list(zip(part, rollout.response_ids, strict=True))
