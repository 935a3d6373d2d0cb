"""Row-keyed random numbers: a function of (seed, step, row, sample, position) and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor


def uniforms(seed: int, step: int | Tensor, row_B: Tensor, sample_B: Tensor, t: int | Tensor) -> Tensor:
    """A float64 in [0, 1) for token t of each (row, sample): a function of its arguments and of nothing else.

    (B,) for one position, (B, T) for a row of T positions. A counter-based hash (rounds of the splitmix64 finaliser): no
    state, so batch size, order, processes, compaction and resume change nothing.
    """
    key = torch.full_like(row_B, _signed(seed))
    for part in (step, row_B, sample_B):
        key = _mix(key + _GOLDEN) ^ (part if isinstance(part, Tensor) else torch.full_like(row_B, int(part)))
    if isinstance(t, Tensor):
        key = key[:, None]
    bits = _mix(_mix(key + _GOLDEN) ^ t)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 arithmetic wraps, and its right shifts are made logical by masks."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))
