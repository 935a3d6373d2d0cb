"""Sampler: prompts -> generate -> Rollout. The one entry to sampling.

PromptBatch ── rows x samples ── parts of like length ── generate ──┬─ Rollout  ids, log-probs, entropies, why rows ended
                                 │                                  └─ Texts    what they say
                                 └─ engine stream:   custom_generate=DecodeLoop    (decoding/loop.py)
                                    engine generate: its own scores and logits     (decoding/generate.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding import compiled
from steerl.rollout.decoding.distribution import Distribution
from steerl.rollout.decoding.generate import plain_generate
from steerl.rollout.decoding.loop import DecodeInputs, DecodeLoop, OnToken, Responses
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.engines.contexts import Contexts
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.model.capabilities import Capabilities
from steerl.rollout.model.generation_config import ClosedGenerationConfig
from steerl.rollout.model.language_model import generate_arguments, no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync, root_gathered
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.ragged import left_pad
from steerl.rollout.scoring.alignment import encoder_input
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.scoring.steered import Steers
from steerl.rollout.steering.spec.spec import ROLES
from steerl.rollout.types import Rollout, Samples, Texts

Acts = TypeVar("Acts", bound=Steers)


@dataclass(frozen=True)
class _Call:
    """What one call of `sample` asked for."""

    step: int
    progress: float
    synced: bool
    on_token: OnToken | None
    idle: bool = False
    """The row only keeps this rank in step with the others: it comes from no data, so that nothing is asked of its columns."""


class Sampler:
    """Samples from one policy with one set of settings; `steering` acts while it does."""

    def __init__(
        self, policy: Policy, sampling: Sampling, steering: Steers | None = None, engine: EngineSettings | None = None
    ):
        self.policy, self.sampling, self.steering = policy, sampling, steering
        self.drawing = drawing(steering)
        self.engine = engine or EngineSettings()
        self.distribution = Distribution(sampling, policy)
        self.stops = Stops(sampling, policy)
        assert self.engine.kind != "vllm", "a server's rows are drawn by vllm/sampler.py"
        if self.engine.kind == "generate" and sampling.compile:
            raise UserError("engine.kind: generate compiles no steps; leave sampling.compile out, or use the engine stream")

    def sample(self, batch: PromptBatch, *, step: int = 0, progress: float = 0.0, on_token: OnToken | None = None) -> Samples:
        """`sampling.n` responses to every prompt, in (prompt, sample) order. `step` keys the draws and names the weights.

        `on_token(t, row_B, tokens_B, raw logits_BV)` is told of every token as it is drawn, for streams of text.
        `progress` (0 to 1 over a run) is what a steering schedule reads. Every rank calls this equally often.
        """
        with self.ready():
            self.check(batch)
            rollout = self.turns(Contexts.of(batch, self.sampling), step=step, progress=progress, on_token=on_token)
        return Samples(rollout, self.texts(batch, rollout))

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, `turns` may be called."""
        with no_dropout(self.policy.core), torch.no_grad(), root_gathered(self.policy.model):
            yield

    def turns(self, contexts: Contexts, *, step: int = 0, progress: float = 0.0, on_token: OnToken | None = None) -> Rollout:
        """The next turn of each context, whose ids are the rollout's prompts. Every rank calls this equally often."""
        rollouts: list[Rollout] = []
        capabilities = self.policy.capabilities  # here, where every rank comes: seeing them takes forward passes
        parts = list(self._parts(contexts, capabilities))
        call = _Call(step, progress, needs_sync(self.policy.model), on_token)
        if self.engine.kind == "generate" and call.synced:
            raise UserError("engine.kind: generate does not decode with weights that are spread over ranks; use stream")
        if self.engine.kind == "generate" and on_token is not None:
            raise UserError("engine.kind: generate shows no token before all are drawn; use stream")
        for k in range(processes.most(len(parts)) if call.synced else len(parts)):
            part = contexts.select(parts[k]) if k < len(parts) else self._dummy()
            if call.synced:
                part = dataclasses.replace(part, steps=processes.most(part.width))
            if k < len(parts):
                rollouts.append(self._part(part, call))
            else:  # a rank that is done takes part in the others' collective calls
                self._part(part, dataclasses.replace(call, on_token=None, idle=True))
        if not rollouts:
            return self.nothing(call.step)
        at = torch.tensor([at for part in parts for at in part], device=self.policy.device)
        return Rollout.join(rollouts).select(at.argsort())

    draw = sample
    """As a source of rollouts (source.py)."""

    def weights_changed(self, step: int) -> None:
        """Nothing is behind: the policy itself draws."""

    def close(self) -> None:
        """Nothing is held."""

    def texts(self, batch: PromptBatch, rollout: Rollout) -> Texts:
        """What the rows say: n rows of each prompt of the batch, as `sample` orders them."""
        many = batch.select([i for i in range(len(batch)) for _ in range(self.sampling.n)])
        completions = [self.stops.text(ids, prompt) for ids, prompt in zip(rollout.response_ids, many.ids, strict=True)]
        return Texts(prompts=many.prompts, prompt_texts=many.prompt_texts, completions=completions, columns=many.columns)

    def check(self, batch: PromptBatch, new: int | None = None) -> None:
        """Ids in range, and room for prompt and response (`new` tokens); one line for the first row that does not fit."""
        policy, new = self.policy, self.sampling.max_new_tokens if new is None else new
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
                    f"{type(policy.core).__name__} changes its distribution for the whole row, with what was drawn before; "
                    f"set prompts.max_tokens to {prompt} or sampling.max_new_tokens to {left}"
                )

    def room(self, length: int) -> int | None:
        """Tokens that may follow a prompt of this length; None: any number."""
        context, switch = self.policy.token_budget, self.policy.capabilities.boundary
        ends = [end for end in (context, switch if switch is not None and length <= switch else None) if end is not None]
        return min(ends) - length if ends else None

    def _parts(self, contexts: Contexts, capabilities: Capabilities) -> Iterator[list[int]]:
        """Places in `contexts` that are decoded together: like lengths, or one length where the model takes no padding."""
        lengths = [len(ids) for ids in contexts.ids]
        kinds: dict[tuple[int, int], list[int]] = {}
        width = contexts.width if len(contexts) else 0
        for at in sorted(range(len(contexts)), key=lambda at: -lengths[at]):
            same = int(capabilities.is_long(lengths[at])) if capabilities.padding else lengths[at]
            # Plain generate has one limit for all rows of a call; and a row that has ended goes on with the others, for which
            # the context may have no room.
            near = contexts.turns is not None and (room := self.room(lengths[at])) is not None and room < width
            alike = near or self.engine.kind == "generate"
            kinds.setdefault((same, contexts.limits[at] if alike else 0), []).append(at)
        most, budget = self.sampling.batch_size, self.sampling.batch_tokens
        for group in kinds.values():
            start, new = 0, max(contexts.limits[at] for at in group)
            while start < len(group):
                # Longest first, so the first row of a part says what every row of it takes up.
                widest = lengths[group[start]] + new
                size = min(most, max(1, budget // widest)) if budget else most
                yield group[start : start + size]
                start += size

    def _part(self, contexts: Contexts, call: _Call) -> Rollout:
        """One batch through generate."""
        capabilities = self.policy.capabilities
        # A stream is not told twice: it has the safe way from the start.
        own = len(self.policy.start_ids) or max(map(len, contexts.ids))
        caches = capabilities.caches(own + contexts.width)
        # A model that counts positions by comparing with pad decodes on from a pad as no whole pass would.
        padded = contexts.turns is not None and any(self.policy.pad_id in ids for ids in contexts.ids)
        if call.synced:
            padded = bool(processes.most(int(padded)))
        safe = capabilities.pads_in_text or not (padded or call.on_token is not None)
        rollout = self._decode(contexts, call, caches and safe)
        if capabilities.pads_in_text or padded or call.on_token is not None:
            return rollout
        # From a drawn pad, too: such rows are drawn again without the cache, where each step is a whole pass. Rare, and the
        # same up to the pad.
        drawn_BR = (rollout.response_BR[:, :-1] == self.policy.pad_id) & rollout.extent_BR[:, 1:]
        rows = drawn_BR.any(1).nonzero()[:, 0]
        again = len(rows) > 0
        if not (processes.most(int(again)) if call.synced else again):
            return rollout
        redo = contexts.select(rows.tolist()) if again else self._dummy(contexts.steps)
        other = self._decode(redo, call if again else dataclasses.replace(call, idle=True), caching=False)
        if not again:
            return rollout
        place = torch.arange(len(rollout), device=rollout.device)
        place[rows] = len(rollout) + torch.arange(len(rows), device=rollout.device)
        return Rollout.join([rollout, other]).select(place).trim()

    def _dummy(self, steps: int = 0) -> Contexts:
        return Contexts([[self.policy.pad_id]], [-1], [0], [1], prompts=[0], steps=steps)

    def _decode(self, contexts: Contexts, call: _Call, caching: bool) -> Rollout:
        policy, sampling, device = self.policy, self.sampling, self.policy.device
        row_B = torch.tensor(contexts.rows, device=device)
        sample_B = torch.tensor(contexts.samples, device=device)
        prompt_BP, mask_BP = left_pad(contexts.ids, policy.pad_id, device)
        start_BK = torch.ones(len(contexts), len(policy.start_ids), dtype=torch.bool, device=device)
        limits = contexts.limits
        inputs = DecodeInputs(
            row_B=row_B,
            uniforms_BR=uniforms(sampling.seed, call.step, row_B, sample_B, contexts.places(device)),
            real_BL=start_BK if policy.is_seq2seq else mask_BP,
            before=[self.stops.before(ids) for ids in contexts.ids],
            names=[f"row {row} (sample {j})" for row, j in zip(contexts.rows, contexts.samples, strict=True)],
            limits_B=torch.tensor(limits, device=device) if min(limits) < contexts.width else None,
        )
        given_BP = encoder_input(prompt_BP, mask_BP) if policy.is_seq2seq else (prompt_BP, mask_BP)
        self.stops.to(device)
        applied, at_work = self._steering(given_BP[1], row_B, sample_B, contexts, call)
        steered = at_work if self.drawing is not None else contextlib.nullcontext()
        if self.engine.kind == "generate":
            with steered:
                responses = plain_generate(policy, self.distribution, self.stops, inputs, *given_BP, caching=caching)
        else:
            responses = self._stream(inputs, *given_BP, contexts, steered, call, caching)
        rollout = Rollout(
            prompt_BP=prompt_BP,
            prompt_mask_BP=mask_BP,
            row_B=row_B,
            sample_B=sample_B,
            **vars(responses),
            **self.record(),
            **applied._asdict(),
        )
        if not self.two_laws:
            return rollout
        with contextlib.nullcontext() if self.drawing is not None else at_work:
            return self._of_policy(rollout)

    @property
    def two_laws(self) -> bool:
        """Whether another model draws than the policy that learns: one of the two is steered, the other plain."""
        return self.steering is not None and not ROLES[self.steering.role].one_law

    def of_policy(self, rollout: Rollout) -> Rollout:
        """With the policy's numbers, where another model drew: the plain one's, or the one's that learns steered."""
        return self._of_policy(rollout, self.steering if self.drawing is None else None)

    def _of_policy(self, rollout: Rollout, steering: Steers | None = None) -> Rollout:
        found = teacher_forced(self.policy, rollout, steering=steering)
        return dataclasses.replace(rollout, policy_logprobs_BR=found.logprobs_BR, entropy_BR=found.entropy_BR)

    def _stream(
        self,
        inputs: DecodeInputs,
        prompt_BP: Tensor,
        mask_BP: Tensor,
        contexts: Contexts,
        steered: contextlib.AbstractContextManager[Any],
        call: _Call,
        caching: bool,
    ) -> Responses:
        """Through the decode loop. One prefill is for all rows of one prompt; with steering each row has its own."""
        policy, rows = self.policy, len(contexts)
        prompts = list(range(rows)) if contexts.prompts is None else contexts.prompts
        unique = list(dict.fromkeys(prompts))
        shared = self.drawing is None and len(unique) < rows and policy.capabilities.row_selection
        first = [prompts.index(prompt) for prompt in unique] if shared else list(range(rows))
        place = {prompt: k for k, prompt in enumerate(unique)}
        copies_B = torch.tensor([place[prompt] for prompt in prompts], device=policy.device) if shared else None
        config = ClosedGenerationConfig.of(policy.pad_id, policy.start_ids, max_new_tokens=contexts.width, use_cache=caching)
        compiles = self.sampling.compile and caching and compiled.fits(policy, call.synced, self.drawing)
        with steered as active, contextlib.ExitStack() as stack:
            steps = None
            if compiles:
                columns = prompt_BP.shape[1] + contexts.width
                steps = stack.enter_context(compiled.compiled_steps(policy, rows, columns, self.drawing, active))
            loop = DecodeLoop(
                self.distribution,
                self.stops,
                inputs,
                copies_B=copies_B,
                steering=object() if active is None and self.drawing is not None else active,
                synced=call.synced,
                compact=policy.capabilities.row_selection,
                on_token=call.on_token,
                compiled=steps,
            )
            arguments = generate_arguments(policy, prompt_BP[first], mask_BP[first], policy.capabilities.position_offset)
            policy.core.generate(**arguments, generation_config=config, custom_generate=loop)
        return loop.responses()

    def record(self) -> dict[str, Any]:
        """The fields of a rollout that are the same for all of its rows."""
        return {
            "temperature": self.sampling.policy_temperature,
            "steering": self.steering.label if self.steering is not None else "",
            "start_ids": self.policy.start_ids,
            "greedy": self.sampling.greedy,
        }

    def _steering(
        self, mask_BP: Tensor, row_B: Tensor, sample_B: Tensor, contexts: Contexts, call: _Call
    ) -> tuple[Applied, contextlib.AbstractContextManager[Any]]:
        """How each row is steered, as the record says it, and the block in which a model is that is steered so."""
        if self.steering is None:
            return Applied.nothing(row_B, call.step), contextlib.nullcontext()
        start_width = max(len(self.policy.start_ids), 1)
        if contexts.applied is not None:
            applied = contexts.applied
        elif call.idle:
            applied = Applied.nothing(row_B, call.step, len(self.steering.sites))
        else:
            how: dict[str, Any] = {"progress": call.progress, "policy_step": call.step, "start_width": start_width}
            applied = self.steering.applied(mask_BP, row_B, sample_B, contexts.columns, **how)
        drawn_BP = contexts.drawn(mask_BP.device)
        drawn: dict[str, Any] = {} if drawn_BP is None else {"drawn_BP": drawn_BP}
        steered = self.steering.active(
            prompt_mask_BP=mask_BP,
            row_B=row_B,
            sample_B=sample_B,
            applied=applied,
            start_width=start_width,
            **drawn,
        )
        return applied, steered

    def applied(self, contexts: Contexts, *, step: int, progress: float) -> Applied:
        """How rows of a decoder that begin are to be steered."""
        row_B, sample_B = (torch.tensor(ids, device=self.policy.device) for ids in (contexts.rows, contexts.samples))
        if self.steering is None or not len(contexts):
            return Applied.nothing(row_B.long(), step, 0 if self.steering is None else len(self.steering.sites))
        _, mask_BP = left_pad(contexts.ids, self.policy.pad_id, self.policy.device)
        return self.steering.applied(mask_BP, row_B, sample_B, contexts.columns, progress=progress, policy_step=step)

    def nothing(self, step: int) -> Rollout:
        """A rollout of no rows."""
        none_B = torch.zeros(0, dtype=torch.int64, device=self.policy.device)
        applied = Applied.nothing(none_B, step, 0 if self.steering is None else len(self.steering.sites))
        entropy_BR = torch.zeros(0, 0, device=self.policy.device)
        record = self.record() | applied._asdict()
        return Rollout.of_ids([], [], device=self.policy.device, entropy_BR=entropy_BR, **record)


def drawing(steering: Acts | None) -> Acts | None:
    """What acts while rows are drawn: a steering whose role steers the learning alone does not."""
    return steering if steering is not None and ROLES[steering.role].draws else None
