"""Definitions that know nothing of the code: one row by itself, unpadded, and the law written out in float64.

They use a model's plain forward and Python loops; nothing of `rollout` but its settings is imported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def alone_logits(model: Any, prompt: Sequence[int], response: Sequence[int], start: Sequence[int] = ()) -> list[list[float]]:
    """Raw logits that predict each response token, from one pass over one unpadded row."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        if start:
            decoder = torch.tensor([[*start, *response]])
            logits = model(input_ids=torch.tensor([list(prompt)]), decoder_input_ids=decoder, use_cache=False).logits[0]
            first = len(start) - 1
        else:
            logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
            first = len(prompt) - 1
    for module, training in modes:
        module.training = training
    return logits[first : first + len(response)].double().tolist()


def log_softmax(scores: Sequence[float]) -> list[float]:
    top = max(scores)
    total = math.log(sum(math.exp(s - top) for s in scores if s > -math.inf)) + top
    return [s - total for s in scores]


def entropy(scores: Sequence[float]) -> float:
    return -sum(math.exp(lp) * lp for lp in log_softmax(scores) if lp > -math.inf)


def law(logits: Sequence[float], seen: Sequence[int], settings: Any) -> list[float]:
    """log-probs of the behaviour's law after the tokens `seen` (real prompt tokens and response; the decoder's own)."""
    scores = list(logits)
    if settings.repetition_penalty != 1:
        for i in set(seen):
            scores[i] = scores[i] * settings.repetition_penalty if scores[i] < 0 else scores[i] / settings.repetition_penalty
    size = settings.no_repeat_ngram_size
    if size and len(seen) >= size - 1:
        tail = tuple(seen[len(seen) - size + 1 :])
        for at in range(len(seen) - size + 1):
            if tuple(seen[at : at + size - 1]) == tail:
                scores[seen[at + size - 1]] = -math.inf
    for word in settings.bad_words_ids:
        before = list(word[:-1])
        if len(seen) >= len(before) and list(seen[len(seen) - len(before) :]) == before:
            scores[word[-1]] = -math.inf
    if settings.greedy:
        return scores
    scores = [s / settings.temperature for s in scores]
    if settings.top_k and settings.top_k < len(scores):
        kth = sorted(scores, reverse=True)[settings.top_k - 1]
        scores = [s if s >= kth else -math.inf for s in scores]
    if settings.top_p < 1:
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        probabilities, mass, kept = log_softmax(scores), 0.0, set()
        for i in order:
            kept.add(i)
            mass += math.exp(probabilities[i])
            if mass >= settings.top_p * (1 - 1e-7):
                break
        scores = [s if i in kept else -math.inf for i, s in enumerate(scores)]
    if settings.min_p:
        top = max(scores)
        scores = [s if s >= top + math.log(settings.min_p) else -math.inf for s in scores]
    return log_softmax(scores)


def kept(logits: Sequence[float], seen: Sequence[int], settings: Any) -> list[int]:
    """The ids that could be drawn."""
    return [i for i, x in enumerate(law(logits, seen, settings)) if x > -math.inf]


def alone_logprobs(
    model: Any, prompt: Sequence[int], response: Sequence[int], settings: Any, start: Sequence[int] = ()
) -> dict[str, list[float]]:
    """behaviour, policy and entropy of every response token, for one row by itself."""
    found: dict[str, list[float]] = {"behaviour": [], "policy": [], "entropy": []}
    for t, logits in enumerate(alone_logits(model, prompt, response, start)):
        for name, number in numbers(logits, [*(start or prompt), *response[:t]], response[t], settings).items():
            found[name].append(number)
    return found


def numbers(logits: Sequence[float], seen: Sequence[int], token: int, settings: Any) -> dict[str, float]:
    """behaviour, policy and entropy of a token after the tokens `seen`."""
    tempered = [x / (1.0 if settings.greedy else settings.temperature) for x in logits]
    behaviour = law(logits, seen, settings)
    if truncates(settings):  # the policy is then over what could be drawn
        tempered = [x if b > -math.inf else -math.inf for x, b in zip(tempered, behaviour, strict=True)]
    policy = log_softmax(tempered)[token]
    return {"behaviour": policy if settings.greedy else behaviour[token], "policy": policy, "entropy": entropy(tempered)}


def truncates(settings: Any) -> bool:
    """Whether the mask of what could be drawn is replayed."""
    if settings.replay_mask is False or settings.greedy:
        return False
    return bool(settings.top_k or settings.top_p < 1 or settings.min_p)


def real_prompt(rollout: Any, row: int) -> list[int]:
    return [int(i) for i in rollout.prompt_BP[row][rollout.prompt_mask_BP[row]]]


def real_response(rollout: Any, row: int) -> list[int]:
    return [int(i) for i in rollout.response_BR[row, : int(rollout.lengths_B[row])]]


def worst_gap(model: Any, rollout: Any, settings: Any, numbers: Sequence[str] = ("behaviour", "policy", "entropy")) -> float:
    """The largest difference between a rollout's numbers and those of its rows by themselves."""
    worst = 0.0
    recorded = {
        "behaviour": rollout.behaviour_logprobs_BR,
        "policy": rollout.policy_logprobs_BR,
        "entropy": rollout.entropy_BR,
    }
    for row in range(len(rollout)):
        response = real_response(rollout, row)
        expected = alone_logprobs(model, real_prompt(rollout, row), response, settings, rollout.start_ids)
        for name in numbers:
            own = recorded[name][row, : len(response)].tolist()
            worst = max([worst, *(abs(a - b) for a, b in zip(own, expected[name], strict=True))])
    return worst
