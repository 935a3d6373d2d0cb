"""Where a site acts: a place in the model, and a factor over the steps of the response."""

from __future__ import annotations

from dataclasses import dataclass

from steerl.rollout.common.settings_reader import whole_numbers, within

COMPONENTS = ("block_output", "block_input", "attn_output", "mlp_output")


@dataclass(frozen=True)
class At:
    """Where in the model: blocks and a component found by structure, or a module path."""

    layers: tuple[int, ...] | str = within(
        (), read=whole_numbers("block numbers, e.g. [8, 9], or all", single=True, word="all")
    )
    """Block numbers, negative from the end, or `all`."""
    component: str = within("block_output", choices=COMPONENTS)
    stack: str = within("decoder", choices=("decoder", "encoder"))
    head: tuple[int, ...] = within((), read=whole_numbers("head numbers", single=True))
    """Attention heads: the edit is made where their outputs enter the output projection."""
    module: str = ""
    """A module path of the model, instead of layers and component."""
    io: str = within("output", choices=("output", "input"))


@dataclass(frozen=True)
class Ramp:
    """A factor over response steps, from `start` to `end` in `over` steps, then `end`."""

    type: str = within("linear", choices=("linear", "cosine"))
    over: int = within(1, low=1, missing="give a whole number")
    start: float = within(1.0, key="from")
    end: float = within(0.0, key="to")
