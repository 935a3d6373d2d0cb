"""Weights of linear layers in the layout that products of a few rows want, while a batch is decoded on a CPU.

    (outputs, inputs), as it is kept    the library repacks all of it at every product
    (inputs, outputs), a copy           read as it lies: 1.1 to 1.9 times as fast at 8 to 64 rows

The parameter stays what it is; a layer's `forward` takes the copy meanwhile. It does so for shapes alone at which the product
came out bit for bit the same, which is seen on it and remembered: no number depends on whether this was at work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_MOST = 64 * 2**20
"""Bytes of all copies: beyond that the memory counts for more than the time."""
_LARGEST = 16 * 2**20
"""Bytes of one weight: a larger one (a head of 32,000 tokens and 256 wide) is no faster from a copy."""
_SAME: dict[tuple[object, ...], bool] = {}
"""Whether a product is the same from both layouts, by its shape."""


@contextlib.contextmanager
def for_few_rows(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers multiply by copies of their weights, which must not change meanwhile."""
    layers: list[Any] = [module for module in model.modules() if _fits(module)]
    if sum(layer.weight.nbytes for layer in layers) > _MOST:
        layers = []
    for layer in layers:
        layer.forward = _Product(layer)  # the instance's own, as accelerate's hooks do it: hooks around it still run
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _fits(module: nn.Module) -> bool:
    """Whether it is a plain layer whose forward nobody has taken over (another batch of this model, for one)."""
    if type(module) is not nn.Linear or "forward" in vars(module) or type(module.weight) is not nn.Parameter:
        return False
    weight = module.weight
    is_plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.is_contiguous()
    return is_plain and weight.nbytes <= _LARGEST


class _Product:
    """A linear layer's forward."""

    def __init__(self, layer: nn.Linear):
        self.weight, self.bias = layer.weight, layer.bias
        self.copy = layer.weight.detach().t().contiguous().t()

    def __call__(self, input: Tensor) -> Tensor:
        key = (input.shape, self.copy.shape, self.bias is None, torch.get_num_threads())
        if (same := _SAME.get(key)) is None:
            drawn = torch.empty_like(input).normal_(generator=torch.Generator().manual_seed(0))
            same = _SAME[key] = torch.equal(linear(drawn, self.copy, self.bias), linear(drawn, self.weight, self.bias))
        return linear(input, self.copy if same else self.weight, self.bias)
