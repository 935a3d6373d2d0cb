"""The streaming decode loop that generate is handed: draws every token itself and keeps four numbers of each.

    generate ── closed config, encoder, cache ──> Stream(model, input_ids, ...)
        prefill ─┬─ copies: one prompt's cache becomes its n samples'
                 └─> logits of the last column ─ law ─ token, log-probs, entropy ─ stops ─┬─ all ended: out
                       ^                                                                  ├─ few left: drop ended rows
                       └────────────────── one more column <──────────────────────────────┘

Memory is O(rows x tokens): no logits outlive their step. Tokens are keyed by (row, sample, t), so neither dropping rows
nor sharing a prefill changes any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rollout.batch import STOP_LENGTH, STOP_USER
from rollout.carried import can_pick, pick_rows, step_forward
from rollout.errors import Problem
from rollout.law import History, Law
from rollout.stops import Stops

_KEEP_ABOVE = 0.9
"""Ended rows are dropped when less than this share is alive; each drop copies the cache once."""


class Stream:
    """One batch's decoding. Call it through `generate(custom_generate=...)`; the results are its fields afterwards."""

    def __init__(
        self,
        law: Law,
        stops: Stops,
        *,
        uniforms_BR: Tensor,
        mask_BP: Tensor,
        copies_B: Tensor | None = None,
        names: list[str] | None = None,
        live: Any = None,
        synced: bool = False,
        compact: bool = True,
        on_token: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    ):
        """`mask_BP` marks the real tokens of generate's input_ids (the decoder's on encoder-decoders), one row per draw.

        `copies_B` says from which of generate's rows each of ours is copied after the prefill. `names` tells rows apart in
        error messages. `live` follows dropped rows through its `select(index)`. `synced`: every rank runs as many steps.
        `on_token(t, rows, tokens, raw logits)` is told of every step, of the rows that had not ended before it.
        """
        rows, width = uniforms_BR.shape
        self.law, self.stops, self.uniforms_BR, self.mask_BP = law, stops, uniforms_BR, mask_BP
        self.copies_B, self.names, self.live, self.synced, self.compact = copies_B, names, live, synced, compact
        self.on_token = on_token
        device = uniforms_BR.device
        self.tokens_BR = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self.behaviour_BR, self.policy_BR, self.entropy_BR = (torch.zeros(rows, width, device=device) for _ in range(3))
        self.lengths_B = torch.full((rows,), width, dtype=torch.int64, device=device)
        self.stop_B = torch.full((rows,), STOP_LENGTH, dtype=torch.int64, device=device)
        self.steps = 0

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
        rows, width = self.tokens_BR.shape
        ids, history, alive_A = input_ids, None, torch.arange(rows, device=input_ids.device)
        ended_A = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        logits_AV: Tensor
        for t in range(width):
            outputs, kwargs = step_forward(model, ids, kwargs, first=t == 0)
            self.steps += 1
            logits_AV = outputs.logits[:, -1].to(ids.device)
            del outputs  # the prefill's logits may be wide
            if t == 0 and self.copies_B is not None:
                ids, logits_AV = ids[self.copies_B], logits_AV[self.copies_B]
                kwargs = pick_rows(kwargs, self.copies_B, len(input_ids))
            if history is None:
                history = History(ids, self.mask_BP, self.law)
            drawn = self.law.draw(logits_AV, history, self.uniforms_BR[alive_A, t])
            self._record(t, alive_A, ended_A, drawn)
            if self.on_token is not None:
                self.on_token(t, alive_A[~ended_A], drawn.tokens_B[~ended_A], logits_AV[~ended_A])
            history.append(drawn.tokens_B)
            ids = torch.cat([ids, drawn.tokens_B[:, None]], dim=1)
            stop_A = self._stopped(t, alive_A, ended_A, drawn.tokens_B)
            now_A = ~ended_A & (stop_A != STOP_LENGTH)
            self.lengths_B[alive_A[now_A]], self.stop_B[alive_A[now_A]] = t + 1, stop_A[now_A]
            ended_A = ended_A | now_A
            left = int((~ended_A).sum())
            if self._all_ended(left, ids.device) or t + 1 == width:
                break
            if self.compact and 0 < left < _KEEP_ABOVE * len(alive_A) and self._can_pick(kwargs):
                index = (~ended_A).nonzero()[:, 0]
                kwargs = pick_rows(kwargs, index, len(ids))
                ids, alive_A, ended_A = ids[index], alive_A[index], ended_A[index]
                history.select(index)
                if self.live is not None:
                    self.live.select(index)
        mask_BR = torch.arange(width, device=ids.device)[None] < self.lengths_B[:, None]
        for name in ("tokens_BR", "behaviour_BR", "policy_BR", "entropy_BR"):
            setattr(self, name, getattr(self, name).masked_fill(~mask_BR, 0))
        return input_ids

    def _record(self, t: int, alive_A: Tensor, ended_A: Tensor, drawn: Any) -> None:
        bad_A = drawn.bad_B & ~ended_A
        if bool(bad_A.any()):
            row = int(alive_A[bad_A.nonzero()[0, 0]])
            who = self.names[row] if self.names else f"row {row}"
            raise Problem(
                f"sampling: the logits of {who} at token {t} hold no law (NaN, infinite, or every token banned); "
                "check the model's weights and dtype, and the bans in the sampling settings"
            )
        self.tokens_BR[alive_A, t] = drawn.tokens_B
        self.behaviour_BR[alive_A, t] = drawn.behaviour_B
        self.policy_BR[alive_A, t] = drawn.policy_B
        self.entropy_BR[alive_A, t] = drawn.entropy_B

    def _stopped(self, t: int, alive_A: Tensor, ended_A: Tensor, tokens_A: Tensor) -> Tensor:
        stop_A = self.stops.by_id(tokens_A)
        if self.stops.has_strings:
            going = ((stop_A == STOP_LENGTH) & ~ended_A).nonzero()[:, 0]
            texts = self.tokens_BR[alive_A[going], : t + 1].tolist()
            hit = [self.stops.completes(ids) for ids in texts]
            stop_A[going[torch.tensor(hit, dtype=torch.bool, device=going.device)]] = STOP_USER
        return stop_A

    def _all_ended(self, left: int, device: torch.device) -> bool:
        """Under ZeRO-3 and FSDP every rank runs the forward passes of the longest one: each of them gathers weights."""
        if not self.synced:
            return left == 0
        anywhere = torch.tensor(left, device=device)
        torch.distributed.all_reduce(anywhere)
        return int(anywhere) == 0

    def _can_pick(self, kwargs: dict[str, Any]) -> bool:
        return (self.live is None or hasattr(self.live, "select")) and can_pick(kwargs)
