"""In the place of vLLM's sampler: rows of the trainer's are drawn by its own law from its own numbers, and written down.

    logits ── rows of one law ── Distribution.draw(uniforms of seed, step, row, sample, t) ── token, both log-probs, entropy
                                                                     │
    a row that has ended gives vLLM an id that ends any row of this law (Law.end_id), whatever it drew: nobody reads it

The order of the processors, the bans, what ends a row: all of it is the code that draws in process.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding.distribution import Drawn, History
from steerl.rollout.engines.vllm.plugin import batch
from steerl.rollout.engines.vllm.plugin.rows import Row, Rows, Rules
from steerl.rollout.ragged import left_pad, listed
from steerl.rollout.types import STOP_LENGTH, STOP_USER


class Draws(nn.Module):
    """vLLM's sampler for requests of others, ours for the trainer's."""

    def __init__(self, base: nn.Module, rows: Rows):
        super().__init__()
        self.base, self.rows = base, rows

    def __getattr__(self, name: str) -> Any:  # what else the runner asks of its sampler
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        found = [(part, self.rows.of(part.request)) for part in batch.parts(self.rows.runner)]
        if all(row is None for _, row in found):
            return self.base(logits, sampling_metadata, *args, **kwargs)
        groups: dict[tuple[Rules, int], list[tuple[int, Row, int]]] = defaultdict(list)
        for at, (part, row) in enumerate(found):
            if row is not None and not part.unfinished and not row.ended:  # an ended one goes on where the law has no end_id
                groups[row.rules, row.rules.law.sampling.seed].append((at, row, part.last - len(row.prompt) + 1))
        tokens_B1 = torch.zeros(len(found), 1, dtype=torch.int32, device=logits.device)
        output = None
        if any(row is None for _, row in found):
            output = self.base(logits.clone(), sampling_metadata, *args, **kwargs)
            tokens_B1 = output.sampled_token_ids
        for (rules, seed), members in groups.items():
            at_G = torch.tensor([place for place, _, _ in members], device=logits.device)
            scores_GV = logits if len(members) == len(found) else logits[at_G]
            emitted_G = self._draw(rules, seed, scores_GV[:, : rules.law.vocab_size], members)
            tokens_B1[at_G, 0] = emitted_G.to(tokens_B1.dtype)
        if output is not None:
            return output
        from vllm.v1.outputs import SamplerOutput

        return SamplerOutput(sampled_token_ids=tokens_B1, logprobs_tensors=None)

    def _draw(self, rules: Rules, seed: int, logits_BV: Tensor, members: list[tuple[int, Row, int]]) -> Tensor:
        rows, device = [row for _, row, _ in members], logits_BV.device
        for _, row, t in members:
            if t > len(row.answer.ids):
                raise RuntimeError(f"steerl: token {t} of a row whose record ends at {len(row.answer.ids)}")
            _cut(row, t)
        uniform_B = _uniforms(seed, members, device)
        history = _history(rules, rows, device)
        drawn = rules.distribution.draw(logits_BV, history, uniform_B, rules.space)
        forced = [t for _, row, t in members if t < len(row.ask.forced)]
        if forced:
            drawn = _forced(rules, logits_BV, drawn, members)
        return _written(rules, drawn, members, self.rows.version)


def _cut(row: Row, t: int) -> None:
    """What is drawn again after a preemption is what was drawn."""
    answer = row.answer
    if t < len(answer.ids):
        for numbers in (answer.ids, answer.behaviour, answer.policy, answer.entropy, answer.kept):
            if numbers is not None:
                del numbers[t:]


def _uniforms(seed: int, members: list[tuple[int, Row, int]], device: torch.device) -> Tensor:
    step_B, row_B, sample_B, t_B = torch.tensor(
        [[row.ask.step, row.ask.row, row.ask.sample, row.ask.first + t] for _, row, t in members], device=device
    ).T
    return uniforms(seed, step_B, row_B, sample_B, t_B[:, None])[:, 0]


def _history(rules: Rules, rows: list[Row], device: torch.device) -> History:
    if not rules.distribution.looks_back:
        none_BL = torch.zeros(len(rows), 0, dtype=torch.int64, device=device)
        return History(none_BL, none_BL.bool(), rules.distribution)
    tokens_BL, real_BL = left_pad([row.prompt + row.answer.ids for row in rows], device=device)
    return History(tokens_BL, real_BL, rules.distribution)


def _forced(rules: Rules, logits_BV: Tensor, drawn: Drawn, members: list[tuple[int, Row, int]]) -> Drawn:
    """Given tokens in the place of drawn ones: the policy's numbers of these."""
    token_B = drawn.tokens_B.clone()
    for at, (_, row, t) in enumerate(members):
        if t < len(row.ask.forced):
            token_B[at] = row.ask.forced[t]
    policy_BV = (logits_BV.float() / rules.law.sampling.policy_temperature).log_softmax(-1)
    policy_B = policy_BV.gather(1, token_B[:, None])[:, 0]
    return dataclasses.replace(drawn, tokens_B=token_B, policy_B=policy_B, behaviour_B=policy_B)


def _written(rules: Rules, drawn: Drawn, members: list[tuple[int, Row, int]], version: int) -> Tensor:
    """Each row's token in its record; what vLLM is told of it."""
    tokens, stop = drawn.tokens_B.tolist(), rules.stops.by_id(drawn.tokens_B.cpu()).tolist()
    numbers = torch.stack([drawn.behaviour_B.double(), drawn.policy_B.double(), drawn.entropy_B.double()]).tolist()
    kept: list[list[int]] = []
    if drawn.kept_BV is not None:
        ids, counts_B = listed(drawn.kept_BV)
        kept = [part.tolist() for part in ids.split(counts_B.tolist())]
    bad = drawn.bad_B.tolist()
    end_id = rules.law.end_id
    emitted = []
    for at, (_, row, t) in enumerate(members):
        answer, forced = row.answer, row.ask.forced
        answer.ids.append(tokens[at])
        answer.behaviour.append(numbers[0][at])
        answer.policy.append(numbers[1][at])
        answer.entropy.append(numbers[2][at])
        if answer.kept is not None:
            answer.kept.append(kept[at] if kept else [])
        answer.versions = (version if t == 0 else answer.versions[0], version)
        if forced:
            answer.stop, row.ended = STOP_LENGTH, t + 1 >= len(forced)
        else:
            answer.stop = stop[at]
            if answer.stop == STOP_LENGTH and rules.stops.has_strings and rules.stops.completes(answer.ids, row.before):
                answer.stop = STOP_USER
            row.ended = answer.stop != STOP_LENGTH or t + 1 >= row.ask.most(rules.law)
        if bad[at]:
            answer.bad, row.ended = t, True
        emitted.append(end_id if row.ended and end_id is not None else tokens[at])
    return torch.tensor(emitted, device=drawn.tokens_B.device)
