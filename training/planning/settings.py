"""Shares: how much of a machine's limit a plan counts on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shares:
    """How much of the limit is reached."""

    decode: float = 0.5
    """Of the memory's bandwidth while tokens are drawn."""
    train: float = 0.4
    """Of the peak of matrix products in whole passes."""
    network: float = 0.7
    """Of the links' bandwidth."""
    launch_us: float = 5.0
    """Microseconds to start a kernel: what small models decode at."""
