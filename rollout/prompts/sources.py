"""Prompts of several data sets: one table of all of their rows, and the order in which weights draw from them.

    [a.jsonl, {path: b.jsonl, weight: 2}] ── rows of a, rows of b ── columns united, `source` says whose ── one table
                                         └── a b b | a b b | ...  each source's rows shuffled on their own

Without weights every row comes once an epoch. With weights the sources take turns: over every stretch of one period (the sum
of the weights as whole numbers) each has exactly its share, and at no place is any of them more than about a row off.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import DataError
from steerl.rollout.common.fingerprint import values_fingerprint
from steerl.rollout.common.settings_reader import Checked, within
from steerl.rollout.prompts.held import Held, epoch_order
from steerl.rollout.prompts.tables import columns_of, read_table

LONGEST = 10_000
"""Rows of the longest period that is made: weights whose ratio needs more are hardly meant."""
USUAL = ("prompt", "messages", "conversations", "question", "query", "instruction", "text")
_KINDS: dict[type, str] = {str: "text", bool: "true or false", int: "a number", float: "a number", dict: "a mapping"}
_LOOKED_AT = 1000


@dataclass(frozen=True, kw_only=True)
class Source(Checked):
    """One of several data sets."""

    path: str
    """jsonl, json, parquet or csv file, a saved dataset's folder, or a hub name."""
    weight: float | None = within(None, above=0)
    """Its share of the draws, beside the others' weights; where any source has a weight, those without have 1."""
    split: str = ""
    """Split of a dataset with several."""
    name: str = ""
    """Configuration of a hub dataset that has several."""
    column: str = ""
    """Its column with the prompt, where that is not the usual one."""
    source: str = ""
    """What the column `source` and the metrics call it; the file's name without its ending unless given."""

    def problems(self) -> list[str]:
        return [] if self.path else ["path: missing; name a file, a dataset folder or a hub name"]


@dataclass(frozen=True)
class Part:
    """The rows of one source within the table."""

    name: str
    weight: float
    """As it was given; where none was, the rows."""
    begins: int
    rows: int


class Mixed(Held):
    """The rows of all sources, one source after the other, under the same columns."""

    def __init__(self, tables: Sequence[Sequence[dict[str, Any]]], names: Sequence[str], weights: Sequence[float | None]):
        begins = [0, *itertools.accumulate(map(len, tables))]
        self.tables, self.begins, self.called = tables, begins, ", ".join(names)
        self.is_weighted = any(weight is not None for weight in weights)
        self.parts = [
            Part(name, (weight or 1.0) if self.is_weighted else len(table), begin, len(table))
            for name, weight, begin, table in zip(names, weights, begins[:-1], tables, strict=True)
        ]
        self.columns = list(dict.fromkeys(["source", *(column for table in tables for column in columns_of(table))]))

    def __len__(self) -> int:
        return self.begins[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        part = self.part_of(range(len(self))[index])
        row = self.tables[part][range(len(self))[index] - self.begins[part]]
        return {**dict.fromkeys(self.columns), "source": self.parts[part].name, **row}

    def part_of(self, row: int) -> int:
        """The place of the source that a row is of."""
        return bisect.bisect_right(self.begins, row) - 1

    @cached_property
    def period(self) -> list[int]:
        """Whose turn it is, over and over, by weight. Each source's k-th turn lies in the middle of
        the k-th part of as many equal ones, which is exact over the whole, and close everywhere."""
        weights = [Fraction(str(part.weight)) for part in self.parts]
        whole = [int(weight * math.lcm(*(each.denominator for each in weights))) for weight in weights]
        counts = [count // math.gcd(*whole) for count in whole]
        if sum(counts) > LONGEST:
            told = ":".join(f"{float(weight):g}" for weight in weights)
            raise DataError(f"prompts.path: the weights {told} are exact over {sum(counts):,} draws; choose rounder ones")
        return [place for _, place in sorted((Fraction(2 * k + 1, 2 * n), i) for i, n in enumerate(counts) for k in range(n))]

    def first(self, count: int) -> list[int]:
        """`count` rows to measure by: each source's first ones, by weight or else by size, none twice."""
        turns = ([((2 * k + 1) / part.weight, part.begins + k) for k in range(min(part.rows, count))] for part in self.parts)
        return [row for _, row in itertools.islice(heapq.merge(*turns), count)]

    def fingerprints(self, setting: str) -> dict[str, str]:
        named = enumerate(zip(self.parts, self.tables, strict=True))  # another order is another table
        return {f"{setting} {part.name}": values_fingerprint(itertools.chain([place], rows)) for place, (part, rows) in named}

    def where(self, row: int) -> str:
        part = self.parts[self.part_of(row)]
        return f"prompts.path: row {row - part.begins} of {part.name}"

    def take(self, seed: int, position: int, count: int) -> list[int]:
        if not self.is_weighted:
            return super().take(seed, position, count)
        drawn = [self._drawn(at) for at in range(position, position + count)]
        rows = dict.fromkeys(range(count), 0)
        for at in sorted(rows, key=lambda at: drawn[at]):  # source by source, so that each order is made once
            part, before = drawn[at]
            begins, length = self.parts[part].begins, self.parts[part].rows
            rows[at] = begins + epoch_order(seed * 1009 + part + 1, before // length, length)[before % length]
        return list(rows.values())

    def _drawn(self, position: int) -> tuple[int, int]:
        """(the source that position `position` of the order is of, how many of its rows were drawn before)."""
        rounds, at = divmod(position, len(self.period))
        part, before = self.period[at], self._before[at]
        return part, rounds * self._counts[part] + before

    @cached_property
    def _before(self) -> list[int]:
        seen: Counter[int] = Counter()
        before = []
        for part in self.period:
            before.append(seen[part])
            seen[part] += 1
        return before

    @cached_property
    def _counts(self) -> Counter[int]:
        return Counter(self.period)


def prompt_column(table: Sequence[dict[str, object]], path: str, column: str) -> str:
    """The column with the prompt: the one that is asked for, or the first usual one."""
    names = columns_of(table)
    chosen = column or next((name for name in USUAL if name in names), "")
    if chosen not in names:
        what = f"{column!r} is not a column" if column else "none of the usual columns is there"
        raise DataError(f"prompts.column: {what}; {path} has: {', '.join(names)}")
    return chosen


def read_prompts(paths: Sequence[str | Source], split: str, name: str, column: str, limit: int) -> tuple[Mixed, str]:
    """The rows of all sources, of each the first `limit`, and the column that their prompts stand in."""
    sources, tables = read_sources(paths, split, name, limit)
    columns = [prompt_column(table, each.path, each.column or column) for each, table in zip(sources, tables, strict=True)]
    common = columns[0] if len(set(columns)) == 1 else "prompt"
    renamed = [_renamed(*each, common) for each in zip(sources, tables, columns, strict=True)]
    _check_columns(sources, renamed, common)
    return mixed(sources, renamed), common


def read_sources(
    paths: Sequence[str | Source], split: str, name: str, limit: int = 0
) -> tuple[list[Source], list[Sequence[dict[str, Any]]]]:
    """Every source, complete (what it leaves out the section says), and its rows."""
    given = [Source(path=path) if isinstance(path, str) else path for path in paths]
    sources = [
        replace(source, split=source.split or split, name=source.name or name, source=label)
        for source, label in zip(given, _labels(given), strict=True)
    ]
    tables = [read_table(source.path, source.split, source.name) for source in sources]
    if empty := [source.path for source, table in zip(sources, tables, strict=True) if not len(table)]:
        raise DataError(f"prompts.path: {empty[0]} has no rows")
    return sources, [table[:limit] if limit else table for table in tables]


def mixed(sources: Sequence[Source], tables: Sequence[Sequence[dict[str, Any]]]) -> Mixed:
    return Mixed(tables, [source.source for source in sources], [source.weight for source in sources])


def _labels(sources: Sequence[Source]) -> list[str]:
    """What each is called: as it says, else by its file; by its whole path where another's file has the same name."""
    short = [source.source or Path(source.path).stem for source in sources]
    named = zip(sources, short, strict=True)
    labels = [source.source or (name if short.count(name) == 1 else source.path) for source, name in named]
    if doubled := [label for label in labels if labels.count(label) > 1]:
        raise DataError(
            f"prompts.path: two sources are called {doubled[0]!r}; give each a name of its own, {{path: ..., source: NAME}}"
        )
    return labels


def _renamed(source: Source, table: Sequence[dict[str, Any]], column: str, common: str) -> Sequence[dict[str, Any]]:
    """The rows with their prompt in the column that all sources share."""
    if column == common:
        return table
    if common in columns_of(table):
        raise DataError(
            f"prompts.path: {source.path} has its prompts in {column!r} and a column {common!r} beside, where other sources "
            "have their prompts; call it otherwise"
        )
    return [{(common if name == column else name): value for name, value in row.items()} for row in table]


def _check_columns(sources: Sequence[Source], tables: Sequence[Sequence[dict[str, Any]]], prompt: str) -> None:
    """A column that holds text here and numbers there is refused; prompts may be texts here and conversations there."""
    found: dict[str, tuple[str, str]] = {}
    for source, table in zip(sources, tables, strict=True):
        for row in table[:_LOOKED_AT]:
            for column, value in row.items():
                if value is None or column == prompt:
                    continue
                kind = _KINDS.get(type(value), "a list")
                first, whose = found.setdefault(column, (kind, source.source))
                if first != kind and whose != source.source:
                    raise DataError(
                        f"prompts.path: the column {column!r} is {first} in {whose} and {kind} in {source.source}; make them "
                        "alike, or call one of them otherwise"
                    )


def refuse_weights(paths: str | Sequence[str | Source], once: str) -> None:
    if weighted := [each.path for each in paths if isinstance(each, Source) and each.weight is not None]:
        raise DataError(f"prompts.path: the weight of {weighted[0]} has no effect, for {once} has every row once; leave it out")


def source_metrics(table: object, rows: Sequence[int], rewards: Sequence[float]) -> dict[str, float]:
    """Mean reward and share of a step's rows by their source; nothing where there is one alone."""
    if not isinstance(table, Mixed):
        return {}
    by_part: dict[int, list[float]] = {}
    for row, reward in zip(rows, rewards, strict=True):
        by_part.setdefault(table.part_of(row), []).append(reward)
    told: dict[str, float] = {}
    for part, found in sorted(by_part.items()):
        name = table.parts[part].name
        told |= {f"reward/source/{name}": math.fsum(found) / len(found), f"rollout/source/{name}": len(found) / len(rows)}
    return told
