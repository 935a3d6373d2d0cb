"""Weights without a file: the trainer's main process and the server's workers in a group of their own.

    main   Sender   ── buckets of bytes, one broadcast each ──>   workers   received(...)   (name, tensor), one after the other

Both sides cut the announced tensors into the same buckets. Whatever goes wrong on one side, the other one waits no longer than
the group's timeout; a group that failed is thrown away, and the next sync makes a new one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.weights.files import Announced, as_bytes

BUCKET = 64 << 20
"""Bytes of one broadcast, but for a tensor that is larger."""
_ALIGNED = 16


def _size(entry: Announced) -> int:
    """Bytes in a bucket, where every tensor begins at an aligned place."""
    return -(-entry.bytes // _ALIGNED) * _ALIGNED


def buckets(announced: Sequence[Announced], most: int) -> Iterator[list[Announced]]:
    bucket: list[Announced] = []
    for entry in announced:
        if bucket and sum(_size(one) for one in bucket) + _size(entry) > most:
            yield bucket
            bucket = []
        bucket.append(entry)
    if bucket:
        yield bucket


class Group:
    """Process 0 is the trainer's main one, the workers follow. `kind` nccl differs in its class alone; it needs a GPU on both
    sides, and no test here has run it."""

    def __init__(self, kind: str, store: torch.distributed.Store, rank: int, size: int, timeout: float):
        self.device = torch.device("cuda", torch.cuda.current_device()) if kind == "nccl" else torch.device("cpu")
        made: Any = torch.distributed.ProcessGroupNCCL if kind == "nccl" else torch.distributed.ProcessGroupGloo
        self._group = made(store, rank, size, timedelta(seconds=timeout))

    def broadcast(self, flat: Tensor) -> None:
        """From process 0, in place."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([flat], options).wait()

    def close(self) -> None:
        """Its connections, too: who waits for this process sees it gone."""
        self._group = None


def store(port: int, size: int, timeout: float, *, main: bool) -> torch.distributed.TCPStore:
    """Where the group's members find each other: on this machine alone. The main process opens it, with port 0 anywhere."""
    wait = timedelta(seconds=timeout)
    return torch.distributed.TCPStore("127.0.0.1", port, size, main, wait, wait_for_workers=False)


class Sender:
    """Fills the buckets in the order in which the tensors were announced."""

    def __init__(self, group: Group, announced: Sequence[Announced], most: int):
        self._group, self._buckets = group, buckets(announced, most)
        self._ahead: list[Announced] = []

    def take(self, name: str, tensor: Tensor) -> None:
        if not self._ahead:
            self._ahead = next(self._buckets)
            self._at = 0
            self._flat = torch.zeros(sum(_size(entry) for entry in self._ahead), dtype=torch.uint8, device=self._group.device)
        entry = self._ahead.pop(0)
        assert entry == Announced.of(name, tensor), f"{entry} was announced, {name} came"
        data = as_bytes(tensor)
        self._flat[self._at : self._at + len(data)] = data
        self._at += _size(entry)
        if not self._ahead:
            self._group.broadcast(self._flat)


def received(group: Group, announced: Sequence[Announced], most: int) -> Iterator[tuple[str, Tensor]]:
    for bucket in buckets(announced, most):
        flat = torch.empty(sum(_size(entry) for entry in bucket), dtype=torch.uint8, device=group.device)
        group.broadcast(flat)
        at = 0
        for entry in bucket:
            yield entry.name, flat[at : at + entry.bytes].view(entry.torch_dtype).view(entry.shape)
            at += _size(entry)
