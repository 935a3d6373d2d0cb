"""Parameters of operations: read from a file, or fresh and trainable. A fresh one starts where it changes nothing.

    PARAMETERS[op]     the tensors an operation takes after base and source, in order
    Parameters         one site's tensors, per layer, as an nn.Module: optimizers, DDP and checkpoints see them

LoReFT starts at W = R^T, b = 0 (its edit is then zero), DiReFT and the adapter at a zero output. Rotations stay
orthonormal by torch's parametrization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.steering.spec.spec import LEARNED, Op
from torch import Tensor, nn

PARAMETERS: dict[str, tuple[str, ...]] = {
    "rotated": ("rotation",),
    "low_rank_rotated": ("weight",),
    "pca": ("components", "mean", "std"),
    "boundless": ("rotation",),
    "sigmoid_mask": ("mask",),
    "sigmoid_mask_rotated": ("rotation", "mask"),
    "autoencoder": ("encoder", "encoder_bias", "decoder", "decoder_bias"),
    "jumprelu": ("encoder", "encoder_bias", "threshold", "decoder", "decoder_bias"),
    "loreft": ("weight", "bias", "rotation"),
    "noreft": ("weight", "bias", "projection"),
    "consreft": ("value", "rotation"),
    "lobireft": ("value", "rotation"),
    "direft": ("weight", "bias", "rotation"),
    "nodireft": ("weight", "bias", "projection"),
    "adapter": ("down", "down_bias", "up", "up_bias"),
}
_OTHER_NAMES = {"W_enc": "encoder", "b_enc": "encoder_bias", "W_dec": "decoder", "b_dec": "decoder_bias", "masks": "mask"}


def _shapes(op: Op, width: int) -> dict[str, tuple[int, ...]]:
    """What is known of the shapes before a file is read; 0 = any size."""
    rank = op.rank if op.type in LEARNED else 0
    known = {
        "rotation": (width, width) if op.type in ("rotated", "boundless", "sigmoid_mask_rotated") else (width, rank),
        "weight": (rank, width) if op.type in LEARNED else (width, 0),
        "projection": (rank, width), "bias": (rank,), "value": (rank,), "down": (rank, width), "down_bias": (rank,),
        "up": (width, rank), "up_bias": (width,), "mask": (width,), "components": (0, width), "mean": (width,), "std": (width,),
        "threshold": (0,), "encoder_bias": (0,), "decoder_bias": (width,),
        "encoder": (width, 0) if op.type == "jumprelu" else (0, width),
        "decoder": (0, width) if op.type == "jumprelu" else (width, 0),
    }  # fmt: skip
    return {name: known[name] for name in PARAMETERS[op.type]}


def read_parameters(
    op: Op, tensors: Mapping[str, Tensor], layers: Sequence[int | None], widths: Sequence[int], who: str, path: str
) -> list[dict[str, Tensor]]:
    """Per layer, the operation's tensors out of a file: named `8.rotation`, or `rotation` for every layer."""
    named = {
        ".".join([*name.split(".")[:-1], _OTHER_NAMES.get(name.split(".")[-1], name.split(".")[-1])]): t
        for name, t in tensors.items()
    }
    found: list[dict[str, Tensor]] = []
    for layer, width in zip(layers, widths, strict=True):
        mine: dict[str, Tensor] = {}
        sized = op
        for name in PARAMETERS[op.type]:
            tensor = named.get(f"{layer}.{name}", named.get(name))
            if tensor is None:
                raise UserError(
                    f"{who}: {path} has no tensor {name!r} for layer {layer}; "
                    f"op {op.type} needs {', '.join(PARAMETERS[op.type])}"
                )
            if not mine and op.type in LEARNED:  # the file says the rank
                sized = dataclasses.replace(op, rank=int(tensor.shape[0]))
            shape = _shapes(sized, width)[name]
            tensor = tensor.detach().float()
            if tensor.dim() != len(shape) or any(want and want != have for want, have in zip(shape, tensor.shape, strict=True)):
                want = " x ".join(str(size) if size else "any" for size in shape)
                raise UserError(f"{who}: {path} tensor {name!r} has shape {tuple(tensor.shape)}; layer {layer} needs {want}")
            mine[name] = tensor
        found.append(mine)
    return found


def fresh_parameters(op: Op, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Values from which a learned operation starts: its edit is then zero (ConsReFT's cannot be)."""
    basis = torch.linalg.qr(torch.randn(width, op.rank, generator=generator, dtype=torch.float64))[0].float()
    into = torch.randn(op.rank, width, generator=generator) / width**0.5
    zeros = torch.zeros(op.rank)
    start = {
        "loreft": {"weight": basis.T.clone(), "bias": zeros, "rotation": basis},
        "noreft": {"weight": into, "bias": zeros, "projection": into.clone()},
        "consreft": {"value": zeros, "rotation": basis},
        "lobireft": {"value": zeros, "rotation": basis},
        "direft": {"weight": torch.zeros(op.rank, width), "bias": zeros, "rotation": basis},
        "nodireft": {"weight": torch.zeros(op.rank, width), "bias": zeros, "projection": into},
        "adapter": {"down": into, "down_bias": zeros, "up": torch.zeros(width, op.rank), "up_bias": torch.zeros(width)},
    }
    return {name: tensor.clone() for name, tensor in start[op.type].items()}


class Layer(nn.Module):
    """The trainable tensors of one site at one layer."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone().float()))
        if "rotation" in tensors:
            torch.nn.utils.parametrizations.orthogonal(self, "rotation")

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        return [getattr(self, name) for name in names]


class Parameters(nn.Module):
    """The trainable tensors of one site: `layers[i]` belongs to the site's i-th point."""

    def __init__(self, per_layer: Sequence[Mapping[str, Tensor]]):
        super().__init__()
        self.layers = nn.ModuleList([Layer(tensors) for tensors in per_layer])
