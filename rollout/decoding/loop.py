"""The decode loop that generate is handed: draws every token itself and keeps four numbers of each.

    generate ── closed config, encoder, cache ──> DecodeLoop(model, input_ids, ...)
        prefill ─┬─ copies: one prompt's cache becomes its n samples'
                 └─> logits of the last column ── Distribution.draw ── token, log-probs, entropy ── stops ─┬─ all ended: out
                       ^                                                                                   ├─ drop ended rows
                       └─────────────────────────── one more column <──────────────────────────────────────┘

Memory is O(rows x tokens), with the ids that could be drawn where the mask is replayed: no logits outlive their step. Tokens
are keyed by (row, sample, t), so neither dropping rows nor sharing a prefill changes any of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding import cache, layout
from steerl.rollout.decoding.compiled import CompiledSteps
from steerl.rollout.decoding.distribution import Distribution, Drawn, History
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.decoding.weights import Space
from steerl.rollout.model.generation_state import can_select_rows, select_rows, step_forward
from steerl.rollout.ragged import Kept, listed
from steerl.rollout.types import STOP_LENGTH, STOP_USER

OnToken = Callable[[int, Tensor, Tensor, Tensor], None]
_KEEP_ABOVE = 0.9
"""Ended rows are dropped when less than this share is alive; each drop copies the cache once."""

_SETTLED, _FEW = 8, 128
"""From this step on, and where as few rows are left, weights are copied into another layout: it pays after some five steps."""


@dataclass(frozen=True)
class DecodeInputs:
    """What a batch is decoded from beside its prompts: an entry per row that is drawn."""

    row_B: Tensor
    """The row of the data set, for `on_token`."""
    uniforms_BR: Tensor
    """A number for every token, which decides it."""
    real_BL: Tensor
    """The real tokens of the columns that decoding starts with: the prompt's, on encoder-decoders the decoder's start."""
    before: list[list[int]]
    """The ids before the response that `Stops` needs."""
    names: list[str]
    """Who a row is, in error messages."""
    limits_B: Tensor | None = None
    """Most tokens of each row, where they differ."""


@dataclass(frozen=True)
class Responses:
    """What was drawn, by the names of a Rollout's fields."""

    response_BR: Tensor
    lengths_B: Tensor
    ended_B: Tensor
    stop_B: Tensor
    behaviour_logprobs_BR: Tensor
    policy_logprobs_BR: Tensor
    entropy_BR: Tensor
    kept: Kept | None


def no_distribution(name: str, t: int) -> UserError:
    return UserError(
        f"sampling: the logits of {name} at token {t} hold no distribution (NaN, infinite, or every token banned); "
        "check the model's weights and dtype, and the bans in the sampling settings"
    )


class DecodeLoop:
    """One batch's decoding. Call it through `generate(custom_generate=...)`, then ask for its `responses`."""

    def __init__(
        self,
        distribution: Distribution,
        stops: Stops,
        inputs: DecodeInputs,
        *,
        copies_B: Tensor | None = None,
        steering: Any = None,
        synced: bool = False,
        compact: bool = True,
        on_token: OnToken | None = None,
        compiled: CompiledSteps | None = None,
    ):
        """`copies_B` says from which of generate's rows each of ours is copied after the prefill.

        `steering`, at work around the call, follows dropped rows through its `select(index)`; without one no row is dropped.
        `synced`: every rank runs as many steps. `compact`: rows can be dropped at all.
        `compiled` takes every step but the first, where it is given, and says when rows leave.
        `on_token(t, row_B, tokens, raw logits)` is told of every step, of the rows that had not ended before it.
        """
        self.distribution, self.stops, self.inputs, self.copies_B = distribution, stops, inputs, copies_B
        self.steering, self.synced, self.compact, self.on_token, self.compiled = steering, synced, compact, on_token, compiled
        self.rows = DecodedRows.start(inputs.uniforms_BR)
        """The record of every row, complete after the call."""
        self.kept: list[tuple[Tensor, Tensor]] = []
        """Where the mask is replayed: of each step what could be drawn, and how much of it in which row."""

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        del stopping_criteria, generation_config
        if len(logits_processor):  # what was declared: none, the distribution is applied here
            names = [type(processor).__name__ for processor in logits_processor]
            raise RuntimeError(f"generate was given logits processors that nobody declared: {names}")
        with contextlib.ExitStack() as stack:
            self._decode(model, input_ids, kwargs, stack)
        return input_ids

    def _decode(self, model: Any, input_ids: Tensor, kwargs: dict[str, Any], stack: contextlib.ExitStack) -> None:
        ids, alive, space, width = input_ids, self.rows, Space(), self.rows.tokens.shape[1]
        history: History | None = None
        last_B1: Tensor | None = None
        settled = False
        for t in range(width):
            if last_B1 is not None:
                kwargs["position_ids"] = kwargs["position_ids"].minimum(last_B1[alive.place])
            if t >= _SETTLED and not settled and self.compiled is None and not self.synced and len(ids) <= _FEW:
                settled = True
                if width - t >= 2 * _SETTLED:
                    stack.enter_context(layout.for_few_rows(model))
            if t and self.compiled is not None:
                logits_AV = self.compiled(ids, kwargs)
            else:
                outputs, kwargs = step_forward(model, ids, kwargs, first=t == 0)
                logits_AV = outputs.logits[:, -1].to(ids.device)
                del outputs  # the prefill's logits may be wide
            if history is None:
                if self.copies_B is not None:
                    ids, logits_AV = ids[self.copies_B], logits_AV[self.copies_B]
                    kwargs = select_rows(kwargs, self.copies_B, len(input_ids))
                history = History(ids, self.inputs.real_BL, self.distribution)
                last_B1 = self._last_positions(kwargs)
                if self.compiled is None:
                    cache.grow(kwargs, width)
            drawn = self.distribution.draw(logits_AV, history, alive.uniforms[:, t], space)
            if self.on_token is not None:
                going = ~alive.ended
                self.on_token(t, self.inputs.row_B[alive.place[going]], drawn.tokens_B[going], logits_AV[going])
            history.append(drawn.tokens_B)
            ids = torch.cat([ids, drawn.tokens_B[:, None]], dim=1)
            left = self._write_down(alive, t, drawn)
            if self._all_ended(left, ids.device) or t + 1 == width:
                break
            index = self._rows_to_keep(alive, left, kwargs)
            if index is not None:
                if self.compiled is None:
                    kwargs = select_rows(kwargs, index, len(ids))
                ids = ids[index]
                self.rows.write(alive)
                alive = alive.select(index)
                history.select(index)
                if self.steering is not None:
                    self.steering.select(index)
        self.rows.write(alive)

    def _last_positions(self, kwargs: dict[str, Any]) -> Tensor | None:
        """Where rows have limits of their own and every rank runs as many steps: the last position that each is fed. One that
        has ended stays there, for the context may end, too."""
        if not self.synced or self.inputs.limits_B is None or not isinstance(kwargs.get("position_ids"), Tensor):
            return None
        return kwargs["position_ids"][..., -1:] + (self.inputs.limits_B[:, None] - 2)  # type: ignore[no-any-return]

    def responses(self) -> Responses:
        return self.rows.finish(self.stops, self.kept)

    def _rows_to_keep(self, alive: DecodedRows, left: int, kwargs: dict[str, Any]) -> Tensor | None:
        """Which rows are decoded further; None = all of them."""
        if not (self.compact and 0 < left < _KEEP_ABOVE * len(alive.ended) and can_select_rows(kwargs)):
            return None
        if self.steering is not None and not hasattr(self.steering, "select"):
            return None
        if self.compiled is not None:
            return self.compiled.shrink(alive.ended, left)
        return (~alive.ended).nonzero()[:, 0]

    def _write_down(self, alive: DecodedRows, t: int, drawn: Drawn) -> int:
        """Write step t down, and see which rows it ends; the number of rows that go on."""
        alive.tokens[:, t], alive.entropy[:, t] = drawn.tokens_B, drawn.entropy_B
        alive.behaviour[:, t], alive.policy[:, t] = drawn.behaviour_B, drawn.policy_B
        if drawn.kept_BV is not None:
            drawn.kept_BV[alive.ended] = False
            ids, counts_A = listed(drawn.kept_BV)
            counts_B = torch.zeros(len(self.rows.place), dtype=torch.int64, device=ids.device)
            self.kept.append((ids, counts_B.index_copy(0, alive.place, counts_A)))
        going_A = ~alive.ended
        alive.length += going_A
        bad_A = drawn.bad_B & going_A
        ended_A = alive.ended | self.stops.is_stop(drawn.tokens_B)
        if self.stops.has_strings:
            going = (~ended_A).nonzero()[:, 0]
            rows = zip(alive.tokens[going, : t + 1].tolist(), alive.place[going].tolist(), strict=True)
            hit = [self.stops.completes(ids, self.inputs.before[place]) for ids, place in rows]
            by_string = going[torch.tensor(hit, dtype=torch.bool, device=going.device)]
            alive.by_string[by_string] = True
            ended_A[by_string] = True
        if self.inputs.limits_B is not None:
            ended_A = ended_A | (alive.length >= self.inputs.limits_B[alive.place])
        alive.ended = ended_A
        left, bad = torch.stack([(~ended_A).sum(), bad_A.sum()]).tolist()  # waits for the device, as `listed` does
        if bad:
            raise no_distribution(self.inputs.names[int(alive.place[bad_A.nonzero()[0, 0]])], t)
        return int(left)

    def _all_ended(self, left: int, device: torch.device) -> bool:
        """Under ZeRO-3 and FSDP every rank runs the forward passes of the longest one: each of them gathers weights."""
        if not self.synced:
            return left == 0
        anywhere = torch.tensor(left, device=device)
        torch.distributed.all_reduce(anywhere)
        return int(anywhere) == 0


@dataclass
class DecodedRows:
    """What is written down of each row while it is decoded: (rows, steps) tensors and one entry per row."""

    place: Tensor
    """Where in the whole batch each of these rows is."""
    uniforms: Tensor
    tokens: Tensor
    behaviour: Tensor
    policy: Tensor
    entropy: Tensor
    length: Tensor
    ended: Tensor
    by_string: Tensor

    @staticmethod
    def start(uniforms_BR: Tensor) -> DecodedRows:
        rows, device = len(uniforms_BR), uniforms_BR.device
        wide = {name: torch.zeros(uniforms_BR.shape, device=device) for name in ("behaviour", "policy", "entropy")}
        return DecodedRows(
            place=torch.arange(rows, device=device),
            uniforms=uniforms_BR,
            tokens=torch.zeros(uniforms_BR.shape, dtype=torch.int64, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            **{name: torch.zeros(rows, dtype=torch.bool, device=device) for name in ("ended", "by_string")},
            **wide,
        )

    def select(self, index: Tensor) -> DecodedRows:
        return DecodedRows(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def write(self, part: DecodedRows) -> None:
        """Put a part's rows back in their places."""
        for field in fields(self):
            if part is not self and field.name not in ("place", "uniforms"):
                getattr(self, field.name)[part.place] = getattr(part, field.name)

    def finish(self, stops: Stops, kept: list[tuple[Tensor, Tensor]]) -> Responses:
        """As wide as the longest row, zeros beyond each row's end, and the reason why it is there."""
        width = int(self.length.max())
        beyond_BR = torch.arange(width, device=self.length.device)[None] >= self.length[:, None]
        last = self.tokens.gather(1, (self.length - 1)[:, None])[:, 0]
        tokens, behaviour, policy, entropy = (
            table[:, :width].masked_fill(beyond_BR, 0) for table in (self.tokens, self.behaviour, self.policy, self.entropy)
        )
        stop_B = torch.where(self.by_string, STOP_USER, torch.where(self.ended, stops.by_id(last), STOP_LENGTH))
        return Responses(
            response_BR=tokens,
            lengths_B=self.length,
            ended_B=stop_B != STOP_LENGTH,
            stop_B=stop_B,
            behaviour_logprobs_BR=behaviour,
            policy_logprobs_BR=policy,
            entropy_BR=entropy,
            kept=Kept.of_steps(kept, width) if kept else None,
        )
