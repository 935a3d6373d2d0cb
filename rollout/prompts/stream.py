"""Rows of a data set that is too large to be held: read from its beginning on, a block at a time.

    file, folder, hub ── reader from row k on ── block 0 | block 1 | ...  each shuffled on its own ── order
                                                 at most KEPT blocks are held

Epoch e is the blocks in their file order, each shuffled by (seed, e, block), so the order is a function of seed and position
alone: it resumes, and is the same on any number of processes, each of which reads for itself. How many rows there are is known
when the end has been met. Of a data set that fits into one block the order is the one that it has when it is held whole.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import DataError
from steerl.rollout.common.fingerprint import values_fingerprint
from steerl.rollout.prompts.held import Held, epoch_order
from steerl.rollout.prompts.tables import Row, line_of

KEPT = 3
"""Blocks that are held: a step's rows may lie in two, an evaluation's in another."""
BLOCK = 1000
"""Rows of a block, unless a setting says otherwise."""


class Stream(Held):
    """The rows of a stream, found by their number in the file's order."""

    def __init__(self, read_from: Callable[[int], Iterator[Row]], called: str, buffer: int | None = None, limit: int = 0):
        """`read_from(k)` gives the rows from number k on; `buffer` of them are shuffled at a time, 0 = none."""
        self.called, self.shuffles, self.held, self.limit = called, buffer != 0, buffer or BLOCK, limit
        self._read_from = read_from
        self._rows: int | None = None
        self._blocks: dict[int, list[Row]] = {}
        self._begun: dict[int, Iterator[Row]] = {}
        """Readers by the row that each gives next."""
        self._lock = threading.RLock()
        self._looked = self.held * -(-BLOCK // self.held)
        """Rows of the first blocks, which say what the columns are."""
        self.columns = list(dict.fromkeys(name for row in self._head(self._looked) for name in row))

    def _head(self, count: int) -> list[Row]:
        blocks = itertools.takewhile(bool, map(self._block, range(-(-count // self.held))))
        return list(itertools.islice(itertools.chain.from_iterable(blocks), count))

    def first(self, count: int) -> list[int]:
        return list(range(self.checked(count)))

    def checked(self, most: int) -> int:
        return len(self._head(most))

    def fingerprints(self, setting: str) -> dict[str, str]:
        """Of the first rows, and of the bytes of a file: the whole would have to be read."""
        file = Path(self.called).expanduser()
        return {setting: values_fingerprint([file.stat().st_size if file.is_file() else 0, *self._head(BLOCK)])}

    def __len__(self) -> int:
        """Where the end was not met yet, all rows are read once to find it."""
        if self._rows is None:
            self._rows = sum(1 for _ in itertools.islice(self._from(0), self.limit or None))
        return self._rows

    def __bool__(self) -> bool:
        """Whether there is a row; no more than the first block is read for it."""
        return bool(self._block(0))

    def __getitem__(self, index: Any) -> Any:
        if not self.has(index):
            raise IndexError(index)
        number, place = divmod(index, self.held)
        return self._block(number)[place]

    def has(self, row: int) -> bool:
        number, place = divmod(row, self.held)
        return row >= 0 and place < len(self._block(number))

    def take(self, seed: int, position: int, count: int) -> list[int]:
        return [self.at(seed, at) for at in range(position, position + count)]

    def at(self, seed: int, position: int) -> int:
        """The row at a position of the endless order of `seed`."""
        number, place = divmod(position, self.held)
        epoch = 0
        if self._rows is None and place < len(block := self._block(number)):
            length = len(block)
        else:
            epoch, position = divmod(position, len(self))
            number, place = divmod(position, self.held)
            length = min(self.held, len(self) - number * self.held)
        order = epoch_order(seed + 7919 * number, epoch, length) if self.shuffles else range(length)
        return number * self.held + order[place]

    def _block(self, number: int) -> list[Row]:
        with self._lock:
            block = self._blocks.pop(number, None)
            if block is None:
                block = self._read(number)
            self._blocks[number] = block  # the last one used stands last
            for old in list(self._blocks)[:-KEPT]:
                del self._blocks[old]
            return block

    def _read(self, number: int) -> list[Row]:
        begins = number * self.held
        wanted = max(min(self.held, self.limit - begins), 0) if self.limit else self.held
        rows = self._begun.pop(begins, None) or self._from(begins)
        block = list(itertools.islice(rows, wanted))
        if len(block) == self.held:
            self._begun[begins + self.held] = rows
            for old in list(self._begun)[:-2]:
                del self._begun[old]
        elif block or not begins or len(self._blocks.get(number - 1, [])) == self.held:  # else the end lies further up
            self._rows = begins + len(block)
        for at, row in enumerate(block, begins):
            if at >= self._looked and (new := next((name for name in row if name not in self.columns), None)):
                raise DataError(
                    f"prompts.path: row {at} of {self.called} has a column {new!r}, which its first {self._looked:,} rows "
                    "lack; name it there (null where there is none)"
                )
        return block

    def _from(self, row: int) -> Iterator[Row]:
        """The rows from `row` on; what ends the reading is one line."""
        at = row
        try:
            for each in self._read_from(row):
                yield each
                at += 1
        except DataError:
            raise
        except Exception as error:  # of a file, of Arrow, of the network
            raise DataError(f"prompts.path: {self.called} cannot be read from row {at} on: {line_of(error)}") from error
