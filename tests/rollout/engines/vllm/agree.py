"""What a server's rows are compared in, with the in-process engine's."""

from __future__ import annotations

import random
from typing import Any

import torch

from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Samples

LAWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 1.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "all three": {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "whole policy": {"top_k": 5, "replay_mask": False},
    "repetition": {"repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words": ["e", "an"], "bad_words_ids": [[7], [9, 10]], "top_p": 0.95},
    "everything": {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2,
                   "no_repeat_ngram_size": 3, "bad_words_ids": [[12]]},
    "stop strings": {"stop": ["a", "th"], "n": 2},
    "stop ids": {"stop_ids": [11, 17, 23], "n": 2},
    "greedy": {"greedy": True},
    "n": {"n": 5},
}  # fmt: skip


def prompts(policy: Policy, count: int, longest: int = 20) -> PromptBatch:
    """Random ids of many lengths; rows are not their places."""
    draw = random.Random(f"prompts {count}")
    ids = [[draw.randrange(3, policy.vocab_size) for _ in range(draw.randint(1, longest))] for _ in range(count)]
    return PromptBatch.of_ids(ids, [3 * i + 1 for i in range(count)], policy.tokenizer)


def assert_same(found: Samples, wanted: Samples, tolerance: float = 1e-5) -> None:
    """Every token and why rows ended; log-probs and entropies to float32's rounding; the texts."""
    got, own = found.rollout, wanted.rollout
    assert got.response_ids == own.response_ids
    for name in ("prompt_BP", "lengths_B", "ended_B", "stop_B", "action_mask_BR", "row_B", "sample_B", "policy_step_B"):
        assert torch.equal(getattr(got, name), getattr(own, name)), name
    for name in ("behaviour_logprobs_BR", "policy_logprobs_BR", "entropy_BR"):
        assert (getattr(got, name) - getattr(own, name)).abs().max() <= tolerance, name
    assert (got.kept is None) == (own.kept is None)
    if got.kept is not None and own.kept is not None:
        assert got.kept.lists() == own.kept.lists()
    for name in ("temperature", "steering", "steering_seed", "start_ids", "greedy"):
        assert getattr(got, name) == getattr(own, name), name
    assert torch.equal(got.strength_BK, own.strength_BK) and torch.equal(got.positions_BKN, own.positions_BKN)
    assert found.texts == wanted.texts


def shake(policy: Policy, seed: int) -> None:
    """Other weights, far from those before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
