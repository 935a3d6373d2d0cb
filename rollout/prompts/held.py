"""A table of prompts that is held whole, and what every table of prompts answers.

Held      rows of one source, all of them shuffled every epoch
Mixed     those of several, drawn by weight (sources.py)
Stream    those of a source too large to be held, shuffled a block at a time (stream.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from steerl.rollout.common.fingerprint import values_fingerprint
from steerl.rollout.prompts.tables import columns_of


class Held(Sequence[dict[str, Any]]):
    """The first `limit` rows of a sequence, or all."""

    def __init__(self, rows: Sequence[dict[str, Any]], called: str = "", limit: int = 0):
        self.rows, self.called, self.limit = rows, called, limit
        self.columns = columns_of(rows)

    def __len__(self) -> int:
        return min(len(self.rows), self.limit or len(self.rows))

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def has(self, row: int) -> bool:
        return 0 <= row < len(self)

    def first(self, count: int) -> list[int]:
        """`count` rows to measure by, or all."""
        return list(range(min(count, len(self))))

    def checked(self, most: int) -> int:
        """How many rows are read before any work begins; a stream's are `most`."""
        return len(self)

    def take(self, seed: int, position: int, count: int) -> list[int]:
        """The rows at positions [position, position + count) of the endless order of `seed`."""
        rows = len(self)
        return [epoch_order(seed, at // rows, rows)[at % rows] for at in range(position, position + count)]

    def fingerprints(self, setting: str) -> dict[str, str]:
        """What the rows are, as a hash; of several sources one each."""
        return {setting: values_fingerprint(self[row] for row in range(len(self)))}

    def where(self, row: int) -> str:
        """A row as its file counts it."""
        return f"prompts.path: row {row} of {self.called or 'the prompts'}"


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, rows: int) -> list[int]:
    import torch

    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % (1 << 63))
    order: list[int] = torch.randperm(rows, generator=generator).tolist()
    return order
