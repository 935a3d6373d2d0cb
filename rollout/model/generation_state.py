"""The state of generate between its steps: one forward pass the way it does them, and selecting rows of all of it.

Dropping ended rows and repeating a prompt's cache for its samples are the same operation: an index over the rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from steerl.rollout.model import compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput

_CACHES = ("past_key_values", "cache_params", "past_buckets_states", "mems")


def step_forward(
    model: PreTrainedModel, ids: Tensor, kwargs: dict[str, object], first: bool
) -> tuple[CausalLMOutputWithPast | Seq2SeqLMOutput, dict[str, object]]:
    """One forward pass; the caches' names and shapes stay the model's own business."""
    columns = None if first or not kwargs.get("use_cache") else 1
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=columns, is_first_iteration=first, **kwargs)
    outputs = model(**inputs, return_dict=True)
    return outputs, compat.update_generation_kwargs(model, outputs, kwargs)


def holds_past(kwargs: dict[str, object]) -> bool:
    """Whether anything of the past travels in the arguments; some models keep it in themselves instead."""
    return any(kwargs.get(name) is not None for name in (*_CACHES, "state"))


def caches_of(kwargs: dict[str, object]) -> list[object]:
    return [kwargs[name] for name in _CACHES if kwargs.get(name) is not None]


def can_select_rows(kwargs: dict[str, object]) -> bool:
    """Whether rows can be taken out of (or repeated in) everything that generate carries from step to step."""
    caches = caches_of(kwargs)
    if not kwargs.get("use_cache"):
        return True
    return bool(caches) and all(hasattr(cache, "reorder_cache") and not _is_static(cache) for cache in caches)


def _is_static(cache: object) -> bool:
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", [])
    return any(type(layer).__name__.startswith("Static") for layer in layers)


def select_rows(kwargs: dict[str, Any], index: Tensor, rows: int) -> dict[str, Any]:
    """generate's keyword arguments for the rows of `index`: caches are reordered in place, tensors of `rows` rows indexed."""

    def select(value: object) -> object:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows:
            return value[index.to(value.device)]
        if isinstance(value, dict):  # an encoder's outputs
            for key in list(value):
                value[key] = select(value[key])
        return value

    selected: dict[str, object] = {}
    for name, value in kwargs.items():
        if name in _CACHES and value is not None:
            value.reorder_cache(index)
            selected[name] = value
        elif name == "position_ids" and isinstance(value, Tensor) and value.dim() == 3:  # several kinds of positions
            selected[name] = value[:, index]
        else:
            selected[name] = select(value)
    return selected
