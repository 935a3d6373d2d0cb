"""The tensors of operations: read from a file, or fresh and trainable. A fresh one starts where it changes nothing.

`Parameters` holds one site's tensors, per layer, as an nn.Module: optimizers, DDP and checkpoints see them. Rotations stay
orthonormal by torch's parametrization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.steering.core.table import TABLE
from steerl.rollout.steering.spec.spec import Op

_OTHER_NAMES = {"W_enc": "encoder", "b_enc": "encoder_bias", "W_dec": "decoder", "b_dec": "decoder_bias", "masks": "mask"}


def read_parameters(
    op: Op, tensors: Mapping[str, Tensor], layers: Sequence[int | None], widths: Sequence[int], who: str, path: str
) -> list[dict[str, Tensor]]:
    """Per layer, the operation's tensors out of a file: named `8.rotation`, or `rotation` for every layer."""
    named = {
        ".".join([*name.split(".")[:-1], _OTHER_NAMES.get(name.split(".")[-1], name.split(".")[-1])]): t
        for name, t in tensors.items()
    }
    operation = TABLE[op.type]
    per_layer: list[dict[str, Tensor]] = []
    for layer, width in zip(layers, widths, strict=True):
        tensors_here: dict[str, Tensor] = {}
        known = {"D": width}
        for name, letters in operation.tensors.items():
            tensor = named.get(f"{layer}.{name}", named.get(name))
            if tensor is None:
                raise ConfigError(
                    f"{who}: {path} has no tensor {name!r} for layer {layer}; op {op.type} needs {', '.join(operation.tensors)}"
                )
            if operation.family == "learned" and "K" in letters and tensor.dim() == len(letters):  # the file says the rank
                known.setdefault("K", int(tensor.shape[letters.index("K")]))
            shape = [known.get(letter, 0) for letter in letters]
            tensor = tensor.detach().float()
            if tensor.dim() != len(shape) or any(want and want != have for want, have in zip(shape, tensor.shape, strict=True)):
                want = " x ".join(str(size) if size else "any" for size in shape)
                raise ConfigError(f"{who}: {path} tensor {name!r} has shape {tuple(tensor.shape)}; layer {layer} needs {want}")
            tensors_here[name] = tensor
        per_layer.append(tensors_here)
    return per_layer


def fresh_parameters(op: Op, width: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Values from which a learned operation starts: its edit is then zero (ConsReFT's cannot be)."""
    operation = TABLE[op.type]
    basis_DK = torch.linalg.qr(torch.randn(width, op.rank, generator=generator, dtype=torch.float64))[0].float()
    random_KD = torch.randn(op.rank, width, generator=generator) / width**0.5
    sizes = {"D": width, "K": op.rank}
    start = {name: torch.zeros([sizes[letter] for letter in letters]) for name, letters in operation.tensors.items()}
    if operation.starts is not None:
        start |= operation.starts(basis_DK, random_KD)
    return {name: tensor.clone() for name, tensor in start.items()}


class Layer(nn.Module):
    """The trainable tensors of one site at one layer."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.detach().clone().float()))
        if "rotation" in tensors:
            torch.nn.utils.parametrizations.orthogonal(self, "rotation")

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.names}


class Parameters(nn.Module):
    """The trainable tensors of one site: `layers[i]` belongs to the site's i-th point."""

    def __init__(self, per_layer: Sequence[Mapping[str, Tensor]]):
        super().__init__()
        self.layers = nn.ModuleList([Layer(tensors) for tensors in per_layer])
