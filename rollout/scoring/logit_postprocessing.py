"""What a model does to its logits after the output embedding: seen once on the model itself, then done to any rows of logits.

    hidden ── head ──> logits ── / 30 ── tanh ── * 30 ──> what tokens are drawn from      (Gemma 2)
                             └── operations, one by one, noted in a short pass ┘

A soft cap, a scale, a bias, a change of dtype work on every row alike, so that rows can go through the head in chunks.
Whatever else is seen (rows cut out, two tensors of logits in one operation, a learned scale) is not repeated elsewhere:
the model then keeps its own way, with all logits at once. So it does where the repetition gives other numbers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.model import compat
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.model.language_model import LanguageModel, no_dropout, pass_arguments, probe_row, same

_ROWWISE = frozenset(
    ("add", "sub", "mul", "div", "true_divide", "tanh", "float", "to", "contiguous", "__rmul__", "__radd__", "__truediv__")
)
"""Operations that treat every row of logits by itself, whatever their other operand."""


@dataclass(frozen=True)
class LogitPostprocessing:
    """The operations between the head's output and the model's logits, in order; none for most models."""

    operations: tuple[tuple[Callable[..., Tensor], tuple[Any, ...], dict[str, Any]], ...]
    """(function, arguments, keywords); `_LOGITS` stands for the logits, a `_Named` for a tensor of the model."""

    def __call__(self, core: nn.Module, logits_NV: Tensor) -> Tensor:
        for function, args, kwargs in self.operations:
            logits_NV = function(*[_filled(core, logits_NV, value) for value in args], **kwargs)
        return logits_NV


@dataclass(frozen=True)
class _Named:
    """A buffer of the model, looked up when it is used: it may have been moved since."""

    name: str


_LOGITS = object()


def _filled(core: nn.Module, logits: Tensor, value: Any) -> Any:
    if value is _LOGITS:
        return logits
    return core.get_buffer(value.name) if isinstance(value, _Named) else value


_OBSERVED: weakref.WeakKeyDictionary[nn.Module, tuple[Any, LogitPostprocessing | None]] = weakref.WeakKeyDictionary()
"""model -> (a reference to the head it had, what was observed)."""


def logit_postprocessing(model: LanguageModel) -> LogitPostprocessing | None:
    """What `model` does after its head; None where it cannot be repeated on rows. Observed once per model and head."""
    core = model.core
    if (head := core.get_output_embeddings()) is None:
        return None
    if core not in _OBSERVED or _OBSERVED[core][0]() is not head:
        with unsteered(), no_dropout(core), torch.no_grad():
            _OBSERVED[core] = weakref.ref(head), _observe(model, core, head)
    return _OBSERVED[core][1]


def _observe(model: LanguageModel, core: Any, head: nn.Module) -> LogitPostprocessing | None:
    head_inputs: list[Tensor] = []

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if len(args) != 1 or not isinstance(output, Tensor):
            head_inputs.clear()
            return None
        head_inputs.append(args[0])
        watched = output.as_subclass(_Watched)
        watched.done = ()
        return watched

    hook = head.register_forward_hook(watch)
    try:
        row = probe_row(model, 0, 2)
        logits = core(**pass_arguments(model, row, decoder=row[:, :0], offset=None)).logits
    finally:
        hook.remove()
    done = getattr(logits, "done", None)
    if len(head_inputs) != 1 or done is None or head_inputs[0].dim() != 3:
        return None
    buffers = {id(value): name for name, value in core.named_buffers()}
    operations = []
    for function, args, kwargs in done:
        filled = [
            value if value is _LOGITS or not isinstance(value, Tensor) else _named(value, buffers, logits.shape[-1])
            for value in args
        ]
        if function.__name__ not in _ROWWISE or None in filled or any(isinstance(v, Tensor) for v in kwargs.values()):
            return None
        operations.append((function, tuple(filled), dict(kwargs)))
    observed = LogitPostprocessing(tuple(operations))
    again = observed(core, head(head_inputs[0][:, -1:].flatten(0, 1)))
    return observed if same(again, logits.as_subclass(Tensor)[:, -1:].flatten(0, 1)) else None


def _named(value: Tensor, buffers: dict[int, str], vocabulary: int) -> _Named | None:
    """A tensor that an operation takes beside the logits: a buffer that is one row or one number, or nothing we know."""
    name = buffers.get(id(value))
    return _Named(name) if name is not None and value.numel() in (1, vocabulary) and value.dim() <= 2 else None


class _Watched(Tensor):
    """Logits that note what is done to them."""

    done: tuple[Any, ...] | None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with compat.without_torch_function():
            output = function(*args, **kwargs)
        if not isinstance(output, Tensor):
            return output
        sources = [value for value in args if isinstance(value, _Watched)]
        watched = output.as_subclass(_Watched)
        watched.done = None
        if len(sources) == 1 and sources[0].done is not None:
            noted = tuple(_LOGITS if value is sources[0] else value for value in args)
            watched.done = (*sources[0].done, (function, noted, kwargs))
        return watched
