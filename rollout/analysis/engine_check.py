"""What `steerl engine check` compares: rows of a vLLM server with those of the engine in this process, and after changes.

settings of sampling ── the same prompts ──┬─ Sampler (in process)  ──┬─ the same tokens? largest difference of a log-prob
                                           └─ ServerSampler           │
steering, weights, an adapter changed ── the same again ──────────────┘  and what it would be without the change
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from steerl.rollout.analysis.verify import TOLERANCE
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering, SteeringSpec, load_spec
from steerl.rollout.types import Rollout

SAME = 0.9
"""Share of rows that must have the very tokens in float32: rounding may decide a draw that falls between two tokens."""
CHANGE = 0.05
"""Of a weight's own spread: by how much the weights are changed before they are sent again."""


@dataclass(frozen=True)
class Line:
    """What one comparison found."""

    what: str
    rows: int
    same: int
    """Rows that have the very tokens of the engine in process."""
    error: float | None
    """Largest difference of a log-prob, in nats; of rows that part, up to where they do."""
    seconds: float
    passed: bool
    note: str = ""

    def text(self) -> str:
        parts = [f"{self.same} of {self.rows} rows the same tokens"] if self.rows else []
        parts += [f"log-probs at most {self.error:.1e} off"] if self.error is not None else []
        parts += [self.note] if self.note else []
        return f"{self.what:<40}" + "; ".join([*parts, f"{self.seconds:.1f} s"]) + ("" if self.passed else ": FAILED")


def checks(engine: VllmEngine, steering: Steering | None, rows: int, tokens: int, seed: int) -> Iterator[Line]:
    """All of them, as they are done. The policy's weights are changed at the end, and stay so."""
    policy, base = engine.policy, Sampling(max_new_tokens=tokens, n=2, seed=seed)
    began = time.perf_counter()
    engine.ready(0)
    sent = f"weights sent in {engine.metrics()['engine/sync_s']:.2f} s"
    yield Line("start", 0, 0, None, time.perf_counter() - began, True, sent)
    prompts = some_prompts(policy, rows, tokens, seed)
    first = Sampler(policy, base).sample(prompts).rollout
    for name, changed in settings_of(policy, first).items():
        yield compared(engine, f"draws: {name}", replace(base, **changed), prompts)
    if steering is not None:
        steered = compared(engine, "steering: " + "; ".join(site.name for site in steering.sites), base, prompts, steering)
        yield replace(steered, note=f"without it up to {_effect(policy, base, prompts, steering):.1e}")
    before = ServerSampler(engine, base).sample(prompts).rollout
    adapter = engine.weights.kind == "adapter"
    change(policy, seed)
    began = time.perf_counter()
    engine.sync(1)
    seconds = time.perf_counter() - began
    name = "sync: the adapter alone, changed" if adapter else f"sync: all weights, changed, by {engine.weights.kind}"
    after = compared(engine, name, base, prompts, step=1)
    stale = _largest(before, _scored(policy, before))
    yield replace(after, seconds=after.seconds + seconds, note=f"sent in {seconds:.2f} s; had it not arrived up to {stale:.1e}")


def some_prompts(policy: Policy, rows: int, tokens: int, seed: int) -> PromptBatch:
    """A few random ids each, with which the model goes on by itself: text of its own, of different lengths."""
    draw = torch.Generator().manual_seed(seed)
    special = set(policy.tokenizer.all_special_ids)
    ids = [i for i in torch.randperm(policy.vocab_size, generator=draw)[: 4 * rows + len(special)].tolist() if i not in special]
    ids = ids or [0]
    starts = [[ids[(4 * b + k) % len(ids)] for k in range(4)] for b in range(rows)]
    room = 2 * tokens + 4 if policy.token_budget is None else policy.token_budget - tokens - 4
    longest = max(1, min(tokens, room))
    rollout = Sampler(policy, Sampling(max_new_tokens=longest, seed=seed + 1)).sample(PromptBatch.of_ids(starts)).rollout
    kept = [
        start + response[: longest * (b + 1) // rows]
        for b, (start, response) in enumerate(zip(starts, rollout.response_ids, strict=True))
    ]
    return PromptBatch.of_ids([[i for i in prompt if i not in policy.eos_ids] for prompt in kept], tokenizer=policy.tokenizer)


def settings_of(policy: Policy, drawn: Rollout) -> dict[str, dict[str, Any]]:
    """By name; bans and stops are of what the model says here."""
    often = [i for i, _ in Counter(i for ids in drawn.response_ids for i in ids).most_common() if i not in policy.eos_ids]
    pieces = [text for i in often if (text := policy.tokenizer.decode([i]).strip())]
    found: dict[str, dict[str, Any]] = {
        "temperature 1": {},
        "temperature 0.7": {"temperature": 0.7},
        "top-k 20": {"top_k": 20},
        "top-p 0.9": {"top_p": 0.9},
        "min-p 0.05, temperature 1.3": {"min_p": 0.05, "temperature": 1.3},
        "top-k, top-p, min-p together": {"top_k": 40, "top_p": 0.95, "min_p": 0.02, "temperature": 0.8},
        "repetition penalty, n-gram ban": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        "banned ids": {"bad_words_ids": [[i] for i in often[:2]] + [often[2:4]] * (len(often) > 3)},
        "stop strings": {"stop": pieces[:2]},
        "greedy": {"greedy": True, "n": 1},
        "4 rows of a prompt": {"n": 4},
    }
    return {name: changed for name, changed in found.items() if all(value not in ([], [[]]) for value in changed.values())}


def compared(
    engine: VllmEngine, what: str, sampling: Sampling, prompts: PromptBatch, steering: Steering | None = None, step: int = 0
) -> Line:
    """The same rows by both."""
    policy = engine.policy
    own = Sampler(policy, sampling, steering).sample(prompts, step=step).rollout
    began = time.perf_counter()
    served = ServerSampler(engine, sampling, steering).sample(prompts, step=step).rollout
    seconds = time.perf_counter() - began
    pairs = list(zip(own.response_ids, served.response_ids, strict=True))
    same = sum(mine == theirs for mine, theirs in pairs)
    common = [next((t for t, (i, j) in enumerate(zip(a, b, strict=False)) if i != j), min(len(a), len(b))) for a, b in pairs]
    error = max(_apart(own, served, common, name) for name in ("behaviour_logprobs_BR", "policy_logprobs_BR"))
    enough = SAME if policy.core.dtype == torch.float32 else 0.0
    passed = error <= TOLERANCE.get(policy.core.dtype, 1e-4) and same >= enough * len(pairs)
    return Line(what, len(pairs), same, error, seconds, passed)


def _apart(own: Rollout, served: Rollout, common: list[int], name: str) -> float:
    mine, theirs = getattr(own, name), getattr(served, name)
    return max((float((mine[b, :t] - theirs[b, :t]).abs().amax()) for b, t in enumerate(common) if t), default=0.0)


def _scored(policy: Policy, rollout: Rollout) -> Rollout:
    with no_dropout(policy.core), torch.no_grad():
        return replace(rollout, policy_logprobs_BR=teacher_forced(policy, rollout).logprobs_BR)


def _largest(one: Rollout, other: Rollout) -> float:
    return float((one.policy_logprobs_BR - other.policy_logprobs_BR).abs().amax())


def _effect(policy: Policy, sampling: Sampling, prompts: PromptBatch, steering: Steering) -> float:
    """How far the plain model's log-probs of steered rows are from those of the steered one."""
    rollout = Sampler(policy, sampling, steering).sample(prompts).rollout
    plain = _scored(policy, rollout).policy_logprobs_BR
    return float((rollout.behaviour_logprobs_BR - plain).abs().amax())


def an_add(policy: Policy, seed: int) -> SteeringSpec:
    """A random direction, as long as activations are there, added to the middle block's output."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(policy.vocab_size, (1, 8), generator=draw).to(policy.device)
    with no_dropout(policy.core), torch.no_grad():
        hidden = policy.core(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
    layer = (len(hidden) - 2) // 2
    direction = torch.randn(hidden[0].shape[-1], generator=draw)
    size = float(hidden[layer + 1].float().norm(dim=-1).median())
    vector = (direction / direction.norm() * size).tolist()
    at = {"layers": [layer], "component": "block_output"}
    return load_spec(
        {"sites": [{"name": f"add at block {layer}", "at": at, "op": {"type": "add"}, "vector": vector, "strength": 0.5}]}
    )


def change(policy: Policy, seed: int) -> None:
    """Every weight that learns by noise of its own size; a fresh adapter's zeros, which do nothing, too."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                spread = float(parameter.float().std(correction=0)) or 0.5
                noise = torch.randn(parameter.shape, generator=draw) * (
                    spread * CHANGE if float(parameter.abs().sum()) else 0.05
                )
                parameter.add_(noise.to(parameter))
