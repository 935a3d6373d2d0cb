"""Sampler: prompts -> generate -> Rollout. The one entry to sampling.

PromptBatch ── rows x samples ── parts of like length ── generate(custom_generate=DecodeLoop) ──┬─ Rollout  ids, log-probs
                                                                                            └─ Texts    what they say
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding import compiled
from steerl.rollout.decoding.distribution import Distribution
from steerl.rollout.decoding.loop import DecodeLoop
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.model.capabilities import Capabilities
from steerl.rollout.model.generation_config import ClosedGenerationConfig
from steerl.rollout.model.language_model import generate_arguments, no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync, root_gathered
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import encoder_input, teacher_forced
from steerl.rollout.types import Rollout, Texts, left_pad
from torch import Tensor

OnToken = Callable[[int, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class _Call:
    """What one call of `sample` asked for."""

    step: int
    progress: float | None
    synced: bool
    on_token: OnToken | None


class Sampler:
    """Samples from one policy with one set of settings; `steering` acts while it does."""

    def __init__(self, policy: Policy, sampling: Sampling, steering: Any = None):
        self.policy, self.sampling, self.steering = policy, sampling, steering
        self.law = Distribution(sampling, policy)
        self.stops = Stops(sampling, policy)

    def sample(
        self, batch: PromptBatch, *, step: int = 0, progress: float | None = None, on_token: OnToken | None = None
    ) -> tuple[Rollout, Texts]:
        """`sampling.n` responses to every prompt, in (prompt, sample) order. `step` keys the draws and names the weights.

        `on_token(t, row_B, tokens_B, raw logits_BV)` is told of every token as it is drawn, for streams of text.
        `progress` (0 to 1 over a run) is what a steering schedule reads, the steering's own where it is not given. Every rank
        calls this equally often.
        """
        rollouts: list[Rollout] = []
        with no_dropout(self.policy.core), torch.no_grad(), root_gathered(self.policy.model):
            self.check(batch)
            capabilities = self.policy.capabilities  # here, where every rank comes: seeing them takes forward passes
            order = [(i, j) for i in range(len(batch)) for j in range(self.sampling.n)]
            parts = list(self._parts(batch, order, capabilities))
            call = _Call(step, progress, needs_sync(self.policy.model), on_token)
            for k in range(processes.most(len(parts)) if call.synced else len(parts)):
                if k < len(parts):
                    rollouts.append(self._part(batch, [order[at] for at in parts[k]], call))
                else:  # a rank that is done takes part in the others' collective calls
                    self._part(_dummy(self.policy), [(0, 0)], dataclasses.replace(call, on_token=None))
        if not rollouts:
            nothing = Rollout.of_ids([], [], device=self.policy.device, entropy_BR=[], **self._record(step))
            return nothing, Texts(prompts=[], prompt_texts=[], completions=[])
        at = torch.tensor([at for part in parts for at in part], device=self.policy.device)
        rollout = Rollout.join(rollouts).select(at.argsort())
        return rollout, self.texts(batch, rollout)

    def texts(self, batch: PromptBatch, rollout: Rollout) -> Texts:
        """What the rows say: n rows of each prompt of the batch, as `sample` orders them."""
        many = batch.select([i for i in range(len(batch)) for _ in range(self.sampling.n)])
        rows = zip(rollout.response_BR.tolist(), rollout.lengths_B.tolist(), many.ids, strict=True)
        completions = [self.stops.text(ids[:length], prompt) for ids, length, prompt in rows]
        return Texts(prompts=many.prompts, prompt_texts=many.prompt_texts, completions=completions, columns=many.columns)

    def check(self, batch: PromptBatch) -> None:
        """Ids in range, and room for prompt and response; one line for the first row that does not fit."""
        policy, new = self.policy, self.sampling.max_new_tokens
        if policy.decoder_context is not None and len(policy.start_ids) + new > policy.decoder_context:
            raise UserError(
                f"sampling.max_new_tokens: {new} does not fit the decoder's context of {policy.decoder_context}; set less"
            )
        size, context = policy.vocab_size, policy.token_budget
        room = context if policy.is_seq2seq or context is None else context - new
        for row, ids in zip(batch.rows, batch.ids, strict=True):
            if min(ids) < 0 or max(ids) >= size:
                worst = next(i for i in ids if not 0 <= i < size)
                raise UserError(f"prompts: row {row} holds the id {worst}, but ids go from 0 to {size - 1}")
            if room is not None and len(ids) > room:
                beside = "" if policy.is_seq2seq else f" with {new} new tokens"
                or_less = "" if policy.is_seq2seq else " or sampling.max_new_tokens lower"
                raise UserError(
                    f"prompts: row {row} has {len(ids)} tokens, which{beside} do not fit the model's context of {context}; "
                    f"set prompts.max_tokens to {max(room, 0)}{or_less}"
                )
            if policy.capabilities.is_long(len(ids) + new) and not policy.capabilities.is_long(len(ids)):
                switch = policy.capabilities.boundary or 0
                prompt, left = max(switch - new, 0), max(switch - len(ids), 0)
                raise UserError(
                    f"prompts: row {row} has {len(ids)} tokens, and {new} new ones take it past the {switch} where "
                    f"{type(policy.core).__name__} changes its law for the whole row, with what was drawn before; "
                    f"set prompts.max_tokens to {prompt} or sampling.max_new_tokens to {left}"
                )

    def _parts(self, batch: PromptBatch, order: list[tuple[int, int]], capabilities: Capabilities) -> Iterator[list[int]]:
        """Places in `order` that are decoded together: like lengths, or one length where the model takes no padding."""
        by_length = sorted(range(len(order)), key=lambda at: -len(batch.ids[order[at][0]]))
        kinds: dict[int, list[int]] = {}
        for at in by_length:
            length = len(batch.ids[order[at][0]])
            kinds.setdefault(int(capabilities.is_long(length)) if capabilities.padding else length, []).append(at)
        most, budget, new = self.sampling.batch_size, self.sampling.batch_tokens, self.sampling.max_new_tokens
        for group in kinds.values():
            start = 0
            while start < len(group):
                # Longest first, so the first row of a part says what every row of it takes up.
                widest = len(batch.ids[order[group[start]][0]]) + new
                size = min(most, max(1, budget // widest)) if budget else most
                yield group[start : start + size]
                start += size

    def _part(self, batch: PromptBatch, pairs: Sequence[tuple[int, int]], call: _Call) -> Rollout:
        """One batch through generate."""
        capabilities = self.policy.capabilities
        # A stream is not told twice: it has the safe way from the start.
        own = len(self.policy.start_ids) or max(len(batch.ids[i]) for i, _ in pairs)
        caches = capabilities.caches(own + self.sampling.max_new_tokens)
        rollout = self._generate(batch, pairs, call, caches and (capabilities.pads_in_text or call.on_token is None))
        if capabilities.pads_in_text or call.on_token is not None:
            return rollout
        # A model that counts positions by comparing with pad decodes on from a drawn pad as no whole pass would: such
        # rows are drawn again without the cache, where each step is a whole pass. Rare, and the same up to the pad.
        drawn_BR = (rollout.response_BR[:, :-1] == self.policy.pad_id) & rollout.mask_BR[:, 1:]
        rows = drawn_BR.any(1).nonzero()[:, 0]
        again = len(rows) > 0
        if not (processes.most(int(again)) if call.synced else again):
            return rollout
        redo, redo_pairs = (batch, [pairs[int(b)] for b in rows]) if again else (_dummy(self.policy), [(0, 0)])
        other = self._generate(redo, redo_pairs, call, caching=False)
        if not again:
            return rollout
        place = torch.arange(len(rollout), device=rollout.device)
        place[rows] = len(rollout) + torch.arange(len(rows), device=rollout.device)
        return Rollout.join([rollout, other]).select(place).trim()

    def _generate(self, batch: PromptBatch, pairs: Sequence[tuple[int, int]], call: _Call, caching: bool) -> Rollout:
        policy, sampling, device = self.policy, self.sampling, self.policy.device
        row_B = torch.tensor([batch.rows[i] for i, _ in pairs], device=device)
        sample_B = torch.tensor([batch.sample(i, j, sampling.n) for i, j in pairs], device=device)
        prompt_BP, mask_BP = left_pad([batch.ids[i] for i, _ in pairs], policy.pad_id, device)
        columns = {name: [column[i] for i, _ in pairs] for name, column in batch.columns.items()}
        # One prefill for all samples of a prompt; with steering each row has its own.
        unique = list(dict.fromkeys(i for i, _ in pairs))
        fixed = sampling.compile and caching and compiled.fits(policy, call.synced, self.steering)
        shared = self.steering is None and len(unique) < len(pairs) and policy.capabilities.row_selection
        place = {i: k for k, i in enumerate(unique)}
        first = [next(b for b, pair in enumerate(pairs) if pair[0] == i) for i in unique] if shared else list(range(len(pairs)))
        copies_B = torch.tensor([place[i] for i, _ in pairs], device=device) if shared else None
        ids_UP, mask_UP = prompt_BP[first], mask_BP[first]
        if policy.is_seq2seq:
            ids_UP, mask_UP = encoder_input(ids_UP, mask_UP)
        stack, live, strength_B = self._steered(mask_UP, row_B, sample_B, columns, call)
        stream = DecodeLoop(
            self.law,
            self.stops,
            uniforms_BR=uniforms(
                sampling.seed, call.step, row_B, sample_B, torch.arange(sampling.max_new_tokens, device=device)
            ),
            mask_BP=torch.ones(len(pairs), len(policy.start_ids), dtype=torch.bool, device=device)
            if policy.is_seq2seq
            else mask_BP,
            copies_B=copies_B,
            before=[self.stops.before(batch.ids[i]) for i, _ in pairs],
            names=[f"row {batch.rows[i]} (sample {j})" for i, j in pairs],
            live=live,
            synced=call.synced,
            compact=policy.capabilities.row_selection,
            on_token=_by_row(call.on_token, row_B),
        )
        self.stops.to(device)
        config = ClosedGenerationConfig.of(
            policy.pad_id, policy.start_ids, max_new_tokens=sampling.max_new_tokens, use_cache=caching
        )
        with stack:
            if fixed:
                columns_of_all = prompt_BP.shape[1] + sampling.max_new_tokens
                run = compiled.running(policy, len(pairs), columns_of_all, self.steering, live)
                stream.compiled = stack.enter_context(run)
            policy.core.generate(
                **generate_arguments(policy, ids_UP, mask_UP, policy.capabilities.position_offset),
                generation_config=config,
                custom_generate=stream,
            )
        rows, width = stream.rows, int(stream.rows.length.max())
        rollout = Rollout(
            prompt_BP=prompt_BP,
            prompt_mask_BP=mask_BP,
            response_BR=rows.tokens[:, :width],
            lengths_B=rows.length,
            ended_B=rows.ended,
            behaviour_logprobs_BR=rows.behaviour[:, :width],
            policy_logprobs_BR=rows.policy[:, :width],
            entropy_BR=rows.entropy[:, :width],
            row_B=row_B,
            sample_B=sample_B,
            stop_B=rows.stop,
            strength_B=strength_B,
            **self._record(call.step),
        )
        if self.steering is not None and self.steering.role in ("behaviour", "data"):
            # What was drawn is the steered law's; the policy that is trained is the plain model.
            plain = teacher_forced(policy, rollout)
            rollout = dataclasses.replace(rollout, policy_logprobs_BR=plain.logprobs_BR, entropy_BR=plain.entropy_BR)
        return rollout

    def _record(self, step: int) -> dict[str, Any]:
        """The fields of a rollout that are the same for all of its rows."""
        return {
            "temperature": self.sampling.policy_temperature,
            "policy_step": step,
            "steering": self.steering.label if self.steering is not None else "",
            "start_ids": self.policy.start_ids,
            "greedy": self.sampling.greedy,
        }

    def _steered(
        self, mask_BP: Tensor, row_B: Tensor, sample_B: Tensor, columns: dict[str, list[Any]], call: _Call
    ) -> tuple[contextlib.ExitStack, Any, Tensor]:
        """The block in which generation is steered, what follows dropped rows, and each row's strength."""
        stack = contextlib.ExitStack()
        if self.steering is None:
            return stack, None, torch.zeros(len(row_B), device=row_B.device)
        found = self.steering.strengths(row_B, sample_B, columns, progress=call.progress, policy_step=call.step)
        strength_B = found.to(row_B.device, torch.float32)
        active = self.steering.active(
            prompt_mask_BP=mask_BP,
            row_B=row_B,
            sample_B=sample_B,
            columns=columns,
            strength_B=strength_B,
            policy_step=call.step,
            progress=call.progress,
            start_width=max(len(self.policy.start_ids), 1),
        )
        live = stack.enter_context(active)
        return stack, live if live is not None else object(), strength_B


def _by_row(on_token: OnToken | None, row_B: Tensor) -> OnToken | None:
    """A stream is told dataset rows, the decode loop knows places in its batch."""
    return None if on_token is None else lambda t, places, tokens, logits: on_token(t, row_B[places], tokens, logits)


def _dummy(policy: Policy) -> PromptBatch:
    return PromptBatch.of_ids([[policy.pad_id]], rows=[-1])
