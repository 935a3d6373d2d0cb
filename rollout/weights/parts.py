"""Tensors that several files hold between them: what each writer has is a range of the numbers, row after row.

    Part            a writer's range                   write(path, parts)     a file of its own
    Stored          the whole, in whichever files      stored(files)          of any number of writers, by any number of readers

A range lies flat in its file, whose metadata say where it begins and the shape of the whole; a tensor that one file has whole
lies there as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerl.rollout.weights import files
from steerl.rollout.weights.files import Announced, TensorFile


@dataclass(frozen=True)
class Part:
    """What this process has of a tensor."""

    shape: tuple[int, ...]
    """Of the whole."""
    dtype: torch.dtype
    at: int
    count: int
    values: Callable[[], Tensor]
    """Asked for when they are written."""

    @staticmethod
    def of(tensor: Tensor, *, here: bool = True) -> Part:
        """A tensor that every process has whole; `here` says whether this one writes it."""
        return Part(tuple(tensor.shape), tensor.dtype, 0, tensor.numel() if here else 0, lambda: tensor)

    @property
    def is_whole(self) -> bool:
        return self.count == math.prod(self.shape)


def write(path: Path, parts: Mapping[str, Part]) -> None:
    announced = [
        Announced.of(name, torch.empty(part.shape if part.is_whole else part.count, dtype=part.dtype, device="meta"))
        for name, part in parts.items()
    ]
    values = (
        (name, part.values().reshape(part.shape) if part.is_whole else part.values().flatten()[: part.count])
        for name, part in parts.items()
    )
    files.write(path, announced, values, {n: json.dumps([p.at, *p.shape]) for n, p in parts.items() if not p.is_whole})


@dataclass(frozen=True)
class Stored:
    """A tensor in files; what is read of it is asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ranges: tuple[tuple[int, int, TensorFile], ...]
    """(where it begins, how many numbers, file)"""

    def read(self, at: int, count: int) -> Tensor:
        """Its numbers from the at-th on, flat."""
        values, read = torch.empty(count, dtype=self.dtype), 0
        for begin, size, file in self.ranges:
            low, high = max(at, begin), min(at + count, begin + size)
            if low < high:
                file.read_into(values[low - at : high - at], self.name, low - begin)
                read += high - low
        if read != count:
            raise ValueError(f"{count - read} numbers of {self.name} are in no file")
        return values

    def whole(self) -> Tensor:
        return self.read(0, math.prod(self.shape)).view(self.shape)


def stored(of: Iterable[TensorFile]) -> dict[str, Stored]:
    """All tensors of the files, by name."""
    found: dict[str, Stored] = {}
    for file in of:
        for name, entry in file.tensors.items():
            at, *shape = json.loads(file.metadata[name]) if name in file.metadata else (0, *entry.shape)
            before = found[name].ranges if name in found else ()
            found[name] = Stored(name, tuple(shape), entry.torch_dtype, (*before, (at, entry.count, file)))
    return found
