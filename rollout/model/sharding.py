"""Weights that are sharded over ranks, by DeepSpeed's ZeRO-3 or by FSDP.

layer by layer   every forward pass brings a layer's weights together and lets them go: a collective call, so every rank
                 makes as many passes as the others (`needs_sync`); a layer's worth of memory
whole            `with gathered(model, ...)`: all weights on every rank for a while; ranks make as many passes as they like
some             `with whole(tensors)`: to be read, outside of any pass
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from steerl.rollout.common import processes
from steerl.rollout.model import compat

_held: ContextVar[bool] = ContextVar("held", default=False)
"""Whether this is inside `gathered`."""


def needs_sync(model: nn.Module) -> bool:
    """Whether each forward pass is a collective call, so that all ranks must make as many."""
    return not _held.get() and is_sharded(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of `model` lie in parts, as an engine keeps them: with one rank too, all parts on that one."""
    if not processes.is_distributed():
        return False
    return by_zero3(model) or any(
        "FSDP" in kind.__name__ or "FullySharded" in kind.__name__ for m in model.modules() for kind in type(m).__mro__
    )


def by_zero3(model: nn.Module) -> bool:
    """Whether its weights carry the marks of DeepSpeed's ZeRO-3."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextlib.contextmanager
def gathered(*models: nn.Module) -> Iterator[None]:
    """All weights of `models` on every rank inside the block: read them, run them, do not change them. Every rank comes here.

    Under FSDP call it inside the root's forward pass, which alone brings the root's own weights together."""
    sharded = [model for model in models if is_sharded(model)]
    if not sharded or _held.get():
        yield
        return
    with contextlib.ExitStack() as stack:
        zero = [parameter for model in sharded for parameter in model.parameters() if hasattr(parameter, "ds_id")]
        if zero:
            stack.enter_context(_whole_zero3(zero))
        for module in (module for model in sharded for module in model.modules()):
            if hasattr(module, "unshard") and hasattr(module, "set_reshard_after_forward"):
                stack.enter_context(_whole_fsdp2(module))
        stack.callback(_held.reset, _held.set(True))
        yield


@contextlib.contextmanager
def _whole_zero3(parameters: list[nn.Parameter]) -> Iterator[None]:
    """DeepSpeed's hooks would let go of a layer's weights behind it, and note its calls, which then differ between ranks.

    They are taken off the modules and put back, each in its old place. To have DeepSpeed register them anew is not the same:
    after that an encoder-decoder with LoRA got gradients that were a tenth too small."""
    import deepspeed

    handles = compat.zero3_hooks(parameters[0])
    with deepspeed.zero.GatheredParameters(parameters), contextlib.ExitStack() as stack:
        for hooks in {id(held): held for handle in handles if (held := handle.hooks_dict_ref()) is not None}.values():
            stack.callback(_put_back, hooks, dict(hooks))
        for handle in handles:
            handle.remove()
        yield


def _put_back(hooks: dict[int, object], before: dict[int, object]) -> None:
    added = {key: hook for key, hook in hooks.items() if key not in before}
    hooks.clear()
    hooks.update(before | added)


@contextlib.contextmanager
def _whole_fsdp2(module: Any) -> Iterator[None]:
    module.unshard()
    module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        module.set_reshard_after_forward(True, recurse=False)
        module.reshard()


@contextlib.contextmanager
def whole(tensors: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """These tensors, each whole, on the main process at least. Collective."""
    zero = [tensor for tensor in tensors.values() if hasattr(tensor, "ds_id")]
    if zero:
        import deepspeed

        with deepspeed.zero.GatheredParameters(zero):
            values = {name: tensor.detach() for name, tensor in tensors.items()}
            yield values
            values.clear()  # they would keep what is let go of
        return
    values = {name: t.detach().full_tensor() if hasattr(t, "full_tensor") else t.detach() for name, t in tensors.items()}
    yield values
    values.clear()


@contextlib.contextmanager
def root_gathered(model: Any) -> Iterator[None]:
    """FSDP's first form keeps the root's own weights (embedding, head) flat outside its forward: whole meanwhile."""
    if type(model).__name__ != "FullyShardedDataParallel":
        yield
        return
    with type(model).summon_full_params(model, writeback=False, recurse=False):
        yield
