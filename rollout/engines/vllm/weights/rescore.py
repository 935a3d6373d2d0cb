"""Rows scored twice after a sync, by the server and by the trainer's own pass: what proves that the weights are there.

    rows(recent, ...)   some of the last batch, cut short; before there is one, random ids ── the same on every rank
    check_rows(...)     forced through the server by the main process ── teacher_forced ── the largest difference, or a stop

A checksum would not do: a server computes with packed copies of its weights.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.vllm.weights import export
from steerl.rollout.engines.vllm.wire import Answer, Ask, Law
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.types import Rollout

TOKENS = 32
"""Of a row's prompt, its last ones, and of its response, its first."""
Rows = list[tuple[list[int], list[int]]]
"""(prompt, response) of each."""
Scorer = Callable[[Law, list[list[int]], list[Ask]], Sequence[Answer]]
"""The server, asked by the main process: VllmEngine.ask."""


def rows(policy: Policy, recent: Rollout | None, count: int, step: int) -> Rows:
    """Of `recent`, spread over it; where there is none, random ones, by the step."""
    if recent is None or not len(recent):
        return _random(policy, count, step)
    places = sorted({int(at) for at in torch.linspace(0, len(recent) - 1, count).round().tolist()})
    prompts, responses = recent.prompt_ids, recent.response_ids
    return [(prompts[b][-TOKENS:], _until_end(policy, responses[b][:TOKENS])) for b in places]


def _random(policy: Policy, count: int, step: int) -> Rows:
    room = min(TOKENS, (policy.token_budget or 2 * TOKENS) // 2)
    ids = [i for i in range(policy.vocab_size) if i not in policy.eos_ids] or [0]
    row_B = torch.arange(count)
    number_BT = uniforms(0, step, row_B, torch.zeros_like(row_B), torch.arange(2 * room).expand(count, -1))
    chosen = (number_BT * len(ids)).long().tolist()
    return [([ids[i] for i in row[:room]], [ids[i] for i in row[room:]]) for row in chosen]


def _until_end(policy: Policy, ids: list[int]) -> list[int]:
    """A server ends a row at the first id that ends rows."""
    first = next((at for at, token in enumerate(ids) if token in policy.eos_ids), len(ids))
    return ids[: first + 1]


def check_rows(
    ask: Scorer,
    policy: Policy,
    recent: Rollout | None,
    count: int,
    *,
    step: int,
    tolerance: float,
    inside: Callable[[Callable[[], Tensor]], Tensor] = lambda call: call(),
    alone: bool = False,
) -> float:
    """The largest difference of a log-prob between the server and this policy, in nats. Collective, but `alone`: what stops the
    run is raised on all ranks; so is Gone. `recent` is the main process's; `inside` calls where a pass may be run."""
    chosen = export.on_main(lambda: rows(policy, recent, count, step), alone=alone)
    if not chosen:
        return 0.0
    main = alone or processes.start().is_main
    own: list[list[float]] = []
    if main or needs_sync(policy.model):
        own = _own(policy, chosen, inside)

    def compared() -> float:
        law = Law(Sampling(max_new_tokens=TOKENS), policy.vocab_size, tuple(policy.eos_ids))
        asks = [Ask(uuid.uuid4().hex, 0, b, 0, forced=tuple(ids)) for b, (_, ids) in enumerate(chosen)]
        answers = ask(law, [prompt for prompt, _ in chosen], asks)
        return _largest(chosen, answers, own, step, tolerance)

    return export.on_main(compared, alone=alone)


def _own(policy: Policy, chosen: Rows, inside: Callable[[Callable[[], Tensor]], Tensor]) -> list[list[float]]:
    prompts, responses = [prompt for prompt, _ in chosen], [ids for _, ids in chosen]
    given = Rollout.of_ids(prompts, responses, pad_id=policy.pad_id, device=policy.device)
    with torch.no_grad(), unsteered():
        logprobs_BR = inside(lambda: teacher_forced(policy, given, want_entropy=False).logprobs_BR)
    return [row[: len(ids)] for row, (_, ids) in zip(logprobs_BR.tolist(), chosen, strict=True)]


def _largest(chosen: Rows, answers: Sequence[Answer], own: list[list[float]], step: int, tolerance: float) -> float:
    largest, told = 0.0, ""
    for b, (answer, mine) in enumerate(zip(answers, own, strict=True)):
        if set(answer.versions) != {step}:
            had = "no whole weights" if answer.versions[0] < 0 else f"the weights of step {answer.versions[0]}"
            raise UserError(f"engine: rows were scored again by {had}, where those of step {step} were sent; the sync was lost")
        if answer.ids != chosen[b][1]:
            raise UserError(f"engine: row {b} was to be scored again, and the server answered {len(answer.ids)} other tokens")
        for t, (theirs, ours) in enumerate(zip(answer.policy, mine, strict=True)):
            gap = abs(theirs - ours)
            gap = math.inf if math.isnan(gap) else gap
            if gap > largest:
                largest, told = gap, f"token {t} of row {b} has log-prob {theirs:.6g} there, {ours:.6g} here"
    if largest <= tolerance:
        return largest
    raise UserError(
        f"engine: after the sync of step {step} the server computes something else than the policy: {told}, {largest:.3g} "
        f"apart, where {tolerance:.3g} is allowed; usual causes: another model or dtype in the server (--dtype), its modules "
        "(engine.model_impl transformers), an adapter that it did not take (engine.sync file), or a tolerance too narrow for "
        "the dtype (ppo.gap_tolerance)"
    )
