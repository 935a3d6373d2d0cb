"""Contexts: rows whose next turn is drawn, each from all that it holds so far. What engines draw from.

prompt ──────────────────────────────────── first = 0        a batch of prompts: n contexts of each
prompt  turn  answer  turn  answer ──────── first = 9        episodes under way: the rest of the row is yet to come
        └ turns ┘     └    ┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.ragged import table

Run = tuple[int, int]
"""From one place up to another."""


@dataclass(frozen=True)
class Contexts:
    """A list with an entry for each row; what is drawn is keyed by (row, sample, place in the response)."""

    ids: list[list[int]]
    rows: list[int]
    samples: list[int]
    limits: list[int]
    """Most tokens to draw."""
    columns: dict[str, list[object]] = field(default_factory=dict)
    """The dataset's, for steering that reads some."""
    first: list[int] | None = None
    """The place in the response of the first token that is drawn; None: all begin."""
    turns: list[list[Run]] | None = None
    """Which of `ids` the policy drew in earlier turns."""
    applied: Applied | None = None
    """How the rows are steered, where an earlier turn's record says it."""
    prompts: list[int] | None = None
    """Rows of one number have the same ids, and can share what is made of them; None: none have."""
    steps: int = 0
    """So many at least are run, whatever the limits: where every step is a collective call, those of the rank that has most."""

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def of(batch: PromptBatch, sampling: Sampling) -> Contexts:
        """n of each prompt, in (prompt, sample) order."""
        n = sampling.n
        order = [(i, j) for i in range(len(batch)) for j in range(n)]
        return Contexts(
            ids=[batch.ids[i] for i, _ in order],
            rows=[batch.rows[i] for i, _ in order],
            samples=[batch.sample(i, j, n) for i, j in order],
            limits=[sampling.max_new_tokens] * len(order),
            columns={name: [column[i] for i, _ in order] for name, column in batch.columns.items()},
            prompts=[i for i, _ in order],
        )

    @staticmethod
    def join(parts: Sequence[Contexts]) -> Contexts:
        """The rows of all, and what is told of them all."""

        def all_of(name: str) -> Any:
            lists = [getattr(part, name) for part in parts]
            return None if any(values is None for values in lists) else [value for values in lists for value in values]

        names = list(parts[0].columns)
        columns = {name: [value for part in parts for value in part.columns[name]] for name in names}
        listed = {name: all_of(name) for name in ("ids", "rows", "samples", "limits", "first", "turns")}
        some = [part.applied for part in parts if part.applied is not None]
        return Contexts(**listed, columns=columns, applied=Applied.join(some) if len(some) == len(parts) else None)

    def select(self, index: Sequence[int]) -> Contexts:
        def pick(values: list[Any] | None) -> list[Any] | None:
            return None if values is None else [values[i] for i in index]

        return Contexts(
            [self.ids[i] for i in index],
            [self.rows[i] for i in index],
            [self.samples[i] for i in index],
            [self.limits[i] for i in index],
            {name: [column[i] for i in index] for name, column in self.columns.items()},
            pick(self.first),
            pick(self.turns),
            None if self.applied is None else self.applied.select(torch.tensor(index, dtype=torch.int64)),
            pick(self.prompts),
            self.steps,
        )

    @property
    def width(self) -> int:
        """Steps that may be run: most tokens that any row draws."""
        return max(*self.limits, self.steps)

    def places(self, device: torch.device) -> Tensor:
        """(B, R) or (R,): the place in the response of every token that may be drawn."""
        token_R = torch.arange(self.width, device=device)
        return token_R if self.first is None else token_R + torch.tensor(self.first, device=device)[:, None]

    def drawn(self, device: torch.device) -> Tensor | None:
        """(B, P), of the left-padded ids: those that the policy drew."""
        if self.turns is None:
            return None
        marks = []
        for ids, runs in zip(self.ids, self.turns, strict=True):
            mark = [False] * len(ids)
            for start, end in runs:
                mark[start:end] = [True] * (end - start)
            marks.append(mark)
        return table(marks, torch.bool, "left").to(device)
