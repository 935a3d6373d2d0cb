"""Caches of keys and values that grow in place, where transformers copies the whole layer at every step.

    prefill ── DynamicLayer, DynamicSlidingWindowLayer ──grow()──> the same columns in a buffer with room for more
    step       the new column is written behind them; what attention reads is a view of what is there
    rows leave, or the room is used up ── a new buffer, a quarter longer than what is there

Only layers of exactly these two classes are changed, those of a hybrid cache one by one; every other keeps its own way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from steerl.rollout.model.generation_state import caches_of

_LEAST = 32
"""Columns of room in a new buffer; more where a quarter of what is there is more."""


def grow(kwargs: dict[str, Any], columns: int) -> None:
    """Let the caches in generate's arguments grow in place, by at most so many columns."""
    for cache in caches_of(kwargs):
        layers: Any = getattr(getattr(cache, "self_attention_cache", cache), "layers", ())
        for k, layer in enumerate(layers):
            if (kind := _GROWING.get(type(layer))) is not None and layer.is_initialized:
                layers[k] = kind(layer, columns)


class _Columns:
    """A tensor's columns (its last dimension but one) in a buffer that has room behind them."""

    def __init__(self, most: int):
        self.left = most
        self.buffer: Tensor | None = None
        self.view: Tensor | None = None
        self.end = 0

    def append(self, held: Tensor, states: Tensor) -> Tensor:
        """`held`, what was handed out last or some last columns of it or another tensor by now, with `states` behind it."""
        seen, added = held.shape[-2], states.shape[-2]
        if self.buffer is None or held is not self.view or self.end + added > self.buffer.shape[-2]:
            columns = seen + max(added, min(self.left, max(_LEAST, seen // 4)))
            self.buffer = held.new_empty((*held.shape[:-2], columns, held.shape[-1]))
            self.buffer[..., :seen, :].copy_(held)
            self.end = seen
        self.buffer[..., self.end : self.end + added, :].copy_(states)
        self.end, self.left = self.end + added, self.left - added
        return self.buffer[..., self.end - added - seen : self.end, :]

    def hold(self, view: Tensor) -> Tensor:
        """What is to be handed in next, unless rows are selected in between."""
        self.view = view
        return view


class _InPlace:
    """A layer in the place of one that is at work."""

    keys: Any
    values: Any

    def __init__(self, layer: Any, columns: int):
        self.__dict__.update(layer.__dict__)
        self.columns = (_Columns(columns), _Columns(columns))


class _Growing(_InPlace, DynamicLayer):
    """A layer that keeps all columns."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.columns
        self.keys = keys.hold(keys.append(self.keys, key_states))
        self.values = values.hold(values.append(self.values, value_states))
        return self.keys, self.values


class _GrowingWindow(_InPlace, DynamicSlidingWindowLayer):
    """A layer that keeps the columns of its window."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.columns
        self.cumulative_length += key_states.shape[-2]
        all_keys, all_values = keys.append(self.keys, key_states), values.append(self.values, value_states)
        self.keys = keys.hold(all_keys[..., 1 - self.sliding_window :, :])
        self.values = values.hold(all_values[..., 1 - self.sliding_window :, :])
        return all_keys, all_values


_GROWING: dict[type, Any] = {DynamicLayer: _Growing, DynamicSlidingWindowLayer: _GrowingWindow}
