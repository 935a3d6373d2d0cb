"""Safetensors files, a tensor at a time: written as the tensors come, read range by range. Never a whole file in memory.

write(path, announced, tensors)      what is to come is known before, so the header is; then each is written and dropped
TensorFile(path).read_into(values)   some numbers of a tensor, row after row
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_PIECE = 16 << 20
"""Bytes that are copied and written at a time."""


@dataclass(frozen=True)
class Announced:
    """A tensor that is to come."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @staticmethod
    def of(name: str, tensor: Tensor) -> Announced:
        return Announced(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @staticmethod
    def read(given: Sequence[Any]) -> Announced:
        name, dtype, shape = given
        return Announced(name, dtype, tuple(shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.count * self.torch_dtype.itemsize


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def write(
    path: Path,
    announced: Sequence[Announced],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The tensors come in the order in which they were announced."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for entry in announced:
        offsets = [at, at := at + entry.bytes]
        header[entry.name] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": offsets}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    left = iter(tensors)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for entry in announced:
            _append(file, entry, *next(left))
    assert next(left, None) is None, "more came than was announced"


def _append(file: BinaryIO, entry: Announced, name: str, value: Tensor) -> None:
    assert Announced.of(name, value) == entry, f"{entry} was announced, {name} came"
    for piece in as_bytes(value.detach()).split(_PIECE):
        file.write(piece.to("cpu", copy=True).numpy().data)  # a copy: what numpy has seen FSDP cannot let go of any more


class TensorFile:
    """What a file has, by name; nothing of it is held."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(size))
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        names = {stored: name for name, stored in _DTYPES.items()}
        self.tensors = {name: Announced.read((name, names[entry["dtype"]], entry["shape"])) for name, entry in header.items()}
        self._at = {name: 8 + size + int(entry["data_offsets"][0]) for name, entry in header.items()}

    def read_into(self, values: Tensor, name: str, at: int) -> None:
        """Numbers of a tensor from the at-th on, row after row; as many as there are in `values`, which is flat."""
        with self.path.open("rb") as file:
            file.seek(self._at[name] + at * values.itemsize)
            if file.readinto(as_bytes(values).numpy().data) != values.nbytes:
                raise ValueError(f"{self.path.name} ends within {name}")


_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""As a safetensors file calls them."""
