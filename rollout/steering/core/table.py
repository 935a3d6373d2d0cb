"""The table of steering operations: all that the project knows of an operation, in one entry.

    TABLE["add"] = Operation(add, "write", ...)     read by specs, sites, compiled steps, folding and interventions

A new operation is one pure function `f(base, source, ...)` and one entry, here or in a program of one's own:

    def fade(base, source, weight_KD, strength=1.0): ...
    TABLE["fade"] = Operation(fade, "learned", strength="strength")

The function's own arguments say the rest. One with a size suffix is a tensor of the operation, of that shape (D the
activation's width, K the rank, L the latents): `weight_KD` is read from a file as `weight`, or trained. One named like a
field of `Op` (coordinates, factor, act, ...) is a setting.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from steerl.rollout.steering.core import operations

if TYPE_CHECKING:
    from torch import Tensor


def _of_torch(name: str) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        from torch.nn import functional

        return getattr(functional, name)(x)  # type: ignore[no-any-return]

    return function


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "relu": operations.relu, "gelu": _of_torch("gelu"), "silu": _of_torch("silu"),
    "tanh": lambda x: x.tanh(),
}  # fmt: skip
SETTINGS = ("coordinates", "factor", "value", "rank", "act", "temperature", "boundary", "residual", "params", "function")
"""The fields of a spec's `op`, beside its type."""


@dataclass(frozen=True)
class Operation:
    """One operation on an activation."""

    function: Callable[..., Tensor] | None
    """Base first, source second; None = the user's own, named by the spec."""
    family: Literal["write", "direction", "space", "learned", "function"]
    """space reads its tensors from `op.params`; learned from `vector`, or they are trained from a start of their own."""
    source: Literal["vector", "noise", ""] = "vector"
    """What the function's source is: the site's vector, noise drawn for each token, or none."""
    strength: str = ""
    """The argument that takes the strength. Without one the result is mixed in: h + a (op(h) - h)."""
    adds: int = 0
    """1 and -1: base plus or minus strength times source. It is made once for many steps, and folds into a bias."""
    starts: Callable[[Tensor, Tensor], Mapping[str, Tensor]] | None = None
    """Of (orthonormal columns DK, small random numbers KD): the tensors of a fresh operation that are not zeros. With them
    the edit should change nothing."""
    collects: bool = False
    """It reads and changes nothing: what it gives is kept instead of put in the activation's place."""

    @cached_property
    def arguments(self) -> dict[str, inspect.Parameter]:
        """The function's own arguments, after base and source, by the name a user gives: tensors without their size."""
        given = [] if self.function is None else list(inspect.signature(self.function).parameters.values())[2:]
        return {p.name.rpartition("_")[0] if p.name.rpartition("_")[2].isupper() else p.name: p for p in given}

    @cached_property
    def tensors(self) -> dict[str, str]:
        """The tensors it takes, in order, each with its shape as letters: D the activation's width, K the rank, L latents."""
        return {
            name: p.name.rpartition("_")[2]
            for name, p in self.arguments.items()
            if p.name.rpartition("_")[2].isupper() and p.default is p.empty
        }

    @cached_property
    def settings(self) -> tuple[str, ...]:
        """The fields of a spec's `op` that have an effect on it."""
        by_family = {"space": {"params"}, "learned": {"rank"}, "function": {"function"}}.get(self.family, set())
        return tuple(name for name in SETTINGS if name in (self.arguments.keys() - self.tensors.keys()) | by_family)

    @property
    def needs_vector(self) -> bool:
        """Whether a site must name a vector. A learned operation may, for its tensors, and a function of the user's."""
        return self.source == "vector" and self.family != "function"

    @property
    def latent(self) -> tuple[str, int] | None:
        """Where coordinates are those of a space: the tensor and dimension that say how many there are."""
        if self.family != "space":
            return None
        name, sizes = next(iter(self.tensors.items()))
        return name, next((i for i, letter in enumerate(sizes) if letter != "D"), len(sizes) - 1)


TABLE: dict[str, Operation] = {
    # write: whole, or on chosen coordinates
    "set": Operation(operations.vanilla, "write"),
    "vanilla": Operation(operations.vanilla, "write"),
    "add": Operation(operations.add, "write", strength="strength", adds=1),
    "subtract": Operation(operations.subtract, "write", strength="strength", adds=-1),
    "zero": Operation(operations.zero, "write", source=""),
    "scale": Operation(operations.scale, "write", source=""),
    "noise": Operation(operations.noise, "write", source="noise", strength="level"),
    "collect": Operation(operations.collect, "write", source="", collects=True),
    # along a direction
    "ablate": Operation(operations.ablate, "direction", strength="strength"),
    "project": Operation(operations.project, "direction"),
    "clamp": Operation(operations.clamp, "direction"),
    "rotate": Operation(operations.rotate, "direction", strength="angle"),
    "renormalise": Operation(operations.renormalise, "direction", strength="strength"),
    # into a space, mix, back
    "rotated": Operation(operations.rotated, "space"),
    "low_rank_rotated": Operation(operations.low_rank_rotated, "space"),
    "pca": Operation(operations.pca, "space"),
    "boundless": Operation(operations.boundless, "space"),
    "sigmoid_mask": Operation(operations.sigmoid_mask, "space"),
    "sigmoid_mask_rotated": Operation(operations.sigmoid_mask_rotated, "space"),
    "autoencoder": Operation(operations.autoencoder, "space"),
    "jumprelu": Operation(operations.jumprelu, "space"),
    # learned: LoReFT's edit is zero at W = R^T, b = 0, DiReFT's and the adapter's at a zero output; ConsReFT's never is
    "loreft": Operation(operations.loreft, "learned", "", starts=lambda basis, _: {"weight": basis.T, "rotation": basis}),
    "noreft": Operation(operations.noreft, "learned", "", starts=lambda _, random: {"weight": random, "projection": random}),
    "consreft": Operation(operations.consreft, "learned", "", starts=lambda basis, _: {"rotation": basis}),
    "lobireft": Operation(operations.lobireft, "learned", "", starts=lambda basis, _: {"rotation": basis}),
    "direft": Operation(operations.direft, "learned", "", starts=lambda basis, _: {"rotation": basis}),
    "nodireft": Operation(operations.nodireft, "learned", "", starts=lambda _, random: {"projection": random}),
    "adapter": Operation(operations.adapter, "learned", "", starts=lambda _, random: {"down": random}),
    # the user's own
    "function": Operation(None, "function", strength="strength"),
}


def names(*families: str) -> tuple[str, ...]:
    """The operations of these families, in the table's order."""
    return tuple(name for name, operation in TABLE.items() if operation.family in families)
