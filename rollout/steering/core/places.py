"""Where a site acts: a place in the model, and a factor over the steps of the response."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class At:
    """Where in the model: blocks and a component found by structure, or a module path."""

    layers: tuple[int, ...] | str = ()
    """Block numbers, negative from the end, or `all`."""
    component: str = "block_output"
    stack: str = "decoder"
    head: tuple[int, ...] = ()
    """Attention heads: the edit is made where their outputs enter the output projection."""
    module: str = ""
    """A module path of the model, instead of layers and component."""
    io: str = "output"


@dataclass(frozen=True)
class Ramp:
    """A factor over response steps, from `start` to `end` in `over` steps, then `end`."""

    type: str = "linear"
    over: int = 1
    start: float = 1.0
    end: float = 0.0
