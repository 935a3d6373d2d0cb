"""Activations in host memory: out as the forward pass keeps them, back as the backward pass asks for them.

Weights stay where they are, and so does what is small. Copies are put on the stream that computes, so that nothing is used
before it is there, and pinned, so that the processor waits for none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import compat

LEAST = 2**18
"""Bytes of what is worth a copy."""


def check(device: torch.device) -> None:
    if device.type == "cpu":
        raise UserError(
            "ppo.offload_activations: true, but the run is on a CPU, whose memory is the host's already; leave it out"
        )


@contextlib.contextmanager
def offloaded(kind: str = "cuda", least: int = LEAST) -> Iterator[None]:
    """Around a forward pass: what it keeps on devices of this kind lies in host memory until it is needed."""

    def out(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        spread_out = tensor.nbytes > tensor.untyped_storage().nbytes()  # expanded: there is less of it than it shows
        if tensor.device.type != kind or tensor.nbytes < least or spread_out or is_weight(tensor):
            # An output that its own node held would never go; a leaf is no output, and engines change what it holds.
            return tensor if tensor.is_leaf else tensor.detach()
        host = torch.empty_like(tensor, device="cpu", pin_memory=kind != "cpu")  # strides and all: kernels go by them
        return tensor.device, host.copy_(tensor, non_blocking=True)

    def back(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        device, host = packed
        return host.to(device, non_blocking=True)

    with torch.autograd.graph.saved_tensors_hooks(out, back):
        yield


_RENAMINGS = ("TBackward0", "TransposeBackward0", "ToCopyBackward0")


def is_weight(tensor: Tensor) -> bool:
    """A weight, a view of one, or what a weight that learns was cast to."""
    if isinstance(tensor, nn.Parameter) or isinstance(compat.viewed(tensor), nn.Parameter):
        return True
    node = tensor.grad_fn
    while node is not None and node.name() in _RENAMINGS:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)
