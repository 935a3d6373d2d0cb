"""The streaming decode loop that generate is handed: draws every token itself and keeps four numbers of each.

    generate ── closed config, encoder, cache ──> DecodeLoop(model, input_ids, ...)
        prefill ─┬─ copies: one prompt's cache becomes its n samples'
                 └─> logits of the last column ─ law ─ token, log-probs, entropy ─ stops ─┬─ all ended: out
                       ^                                                                  ├─ few left: drop ended rows
                       └────────────────── one more column <──────────────────────────────┘

Memory is O(rows x tokens): no logits outlive their step. Tokens are keyed by (row, sample, t), so neither dropping rows
nor sharing a prefill changes any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.distribution import Distribution, Drawn, History
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.decoding.weights import Space
from steerl.rollout.model.generation_state import can_select_rows, select_rows, step_forward
from steerl.rollout.types import STOP_LENGTH, STOP_USER
from torch import Tensor

if TYPE_CHECKING:
    from steerl.rollout.decoding.compiled import Run

_KEEP_ABOVE = 0.9
"""Ended rows are dropped when less than this share is alive; each drop copies the cache once."""


class DecodeLoop:
    """One batch's decoding. Call it through `generate(custom_generate=...)`; the results are its fields afterwards."""

    def __init__(
        self,
        law: Distribution,
        stops: Stops,
        *,
        uniforms_BR: Tensor,
        mask_BP: Tensor,
        copies_B: Tensor | None = None,
        before: list[list[int]] | None = None,
        names: list[str] | None = None,
        live: Any = None,
        synced: bool = False,
        compact: bool = True,
        on_token: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
        compiled: Run | None = None,
    ):
        """`mask_BP` marks the real tokens of generate's input_ids (the decoder's on encoder-decoders), one row per draw.

        `before`: what `stops` needs of each row's prompt.
        `copies_B` says from which of generate's rows each of ours is copied after the prefill. `names` tells rows apart in
        error messages. `live` follows dropped rows through its `select(index)`. `synced`: every rank runs as many steps.
        `compiled` takes every step but the first, where it is given, and says when rows leave.
        `on_token(t, rows, tokens, raw logits)` is told of every step, of the rows that had not ended before it.
        """
        self.law, self.stops, self.uniforms_BR, self.mask_BP = law, stops, uniforms_BR, mask_BP
        self.before = before or [[]] * len(uniforms_BR)
        self.copies_B, self.names, self.live, self.synced, self.compact = copies_B, names, live, synced, compact
        self.on_token, self.compiled = on_token, compiled
        self.rows = Rows.start(uniforms_BR)
        """The record of every row, complete after the call."""

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
        if len(logits_processor):  # what was declared: none, the law is applied here
            names = [type(processor).__name__ for processor in logits_processor]
            raise RuntimeError(f"generate was given logits processors that nobody declared: {names}")
        ids, alive, space, width = input_ids, self.rows, Space(), self.uniforms_BR.shape[1]
        history: History | None = None
        for t in range(width):
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
                history = History(ids, self.mask_BP, self.law)
            drawn = self.law.draw(logits_AV, history, alive.uniforms[:, t], space)
            if self.on_token is not None:
                going = ~alive.ended
                self.on_token(t, alive.place[going], drawn.tokens_B[going], logits_AV[going])
            history.append(drawn.tokens_B)
            ids = torch.cat([ids, drawn.tokens_B[:, None]], dim=1)
            left = self._take(alive, t, drawn)
            if self._all_ended(left, ids.device) or t + 1 == width:
                break
            index = self._going_on(alive, left, kwargs)
            if index is not None:
                if self.compiled is None:
                    kwargs = select_rows(kwargs, index, len(ids))
                ids = ids[index]
                self.rows.write(alive)
                alive = alive.select(index)
                history.select(index)
                if self.live is not None:
                    self.live.select(index)
        self.rows.write(alive)
        self.rows.finish(self.stops)
        return input_ids

    def _going_on(self, alive: Rows, left: int, kwargs: dict[str, Any]) -> Tensor | None:
        """Which rows are decoded further; None = all of them."""
        if not (self.compact and 0 < left < _KEEP_ABOVE * len(alive.ended) and self._can_pick(kwargs)):
            return None
        if self.compiled is not None:
            return self.compiled.fewer(alive.ended, left)
        return (~alive.ended).nonzero()[:, 0]

    def _take(self, alive: Rows, t: int, drawn: Drawn) -> int:
        """Write step t down, and see which rows it ends; the number of rows that go on."""
        alive.tokens[:, t], alive.entropy[:, t] = drawn.tokens_B, drawn.entropy_B
        alive.behaviour[:, t], alive.policy[:, t] = drawn.behaviour_B, drawn.policy_B
        alive.length += ~alive.ended
        bad_A = drawn.bad_B & ~alive.ended
        ended_A = alive.ended | self.stops.is_stop(drawn.tokens_B)
        if self.stops.has_strings:
            going = (~ended_A).nonzero()[:, 0]
            rows = zip(alive.tokens[going, : t + 1].tolist(), alive.place[going].tolist(), strict=True)
            hit = [self.stops.completes(ids, self.before[place]) for ids, place in rows]
            by_string = going[torch.tensor(hit, dtype=torch.bool, device=going.device)]
            alive.by_string[by_string] = True
            ended_A[by_string] = True
        alive.ended = ended_A
        left, bad = torch.stack([(~ended_A).sum(), bad_A.sum()]).tolist()  # the step's one wait for the device
        if bad:
            place = int(alive.place[bad_A.nonzero()[0, 0]])
            who = self.names[place] if self.names else f"row {place}"
            raise UserError(
                f"sampling: the logits of {who} at token {t} hold no law (NaN, infinite, or every token banned); "
                "check the model's weights and dtype, and the bans in the sampling settings"
            )
        return int(left)

    def _all_ended(self, left: int, device: torch.device) -> bool:
        """Under ZeRO-3 and FSDP every rank runs the forward passes of the longest one: each of them gathers weights."""
        if not self.synced:
            return left == 0
        anywhere = torch.tensor(left, device=device)
        torch.distributed.all_reduce(anywhere)
        return int(anywhere) == 0

    def _can_pick(self, kwargs: dict[str, Any]) -> bool:
        return (self.live is None or hasattr(self.live, "select")) and can_select_rows(kwargs)


@dataclass
class Rows:
    """What is written down of each row: (rows, steps) tensors and one entry per row."""

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
    stop: Tensor
    """Why each row ended; known when all is done."""

    @staticmethod
    def start(uniforms_BR: Tensor) -> Rows:
        rows, device = len(uniforms_BR), uniforms_BR.device
        wide = {name: torch.zeros(uniforms_BR.shape, device=device) for name in ("behaviour", "policy", "entropy")}
        return Rows(
            place=torch.arange(rows, device=device),
            uniforms=uniforms_BR,
            tokens=torch.zeros(uniforms_BR.shape, dtype=torch.int64, device=device),
            length=torch.zeros(rows, dtype=torch.int64, device=device),
            stop=torch.full((rows,), STOP_LENGTH, device=device),
            **{name: torch.zeros(rows, dtype=torch.bool, device=device) for name in ("ended", "by_string")},
            **wide,
        )

    def select(self, index: Tensor) -> Rows:
        return Rows(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def write(self, part: Rows) -> None:
        """Put a part's rows back in their places."""
        for field in fields(self):
            if part is not self and field.name not in ("place", "uniforms"):
                getattr(self, field.name)[part.place] = getattr(part, field.name)

    def finish(self, stops: Stops) -> None:
        """Nothing but zeros beyond each row's end, and the reason why it is there."""
        beyond = torch.arange(self.tokens.shape[1], device=self.place.device)[None] >= self.length[:, None]
        for name in ("tokens", "behaviour", "policy", "entropy"):
            getattr(self, name).masked_fill_(beyond, 0)
        last = self.tokens.gather(1, (self.length - 1)[:, None])[:, 0]
        self.stop = torch.where(self.by_string, STOP_USER, torch.where(self.ended, stops.by_id(last), STOP_LENGTH))
