"""Virtual tokens (prompt, prefix and p-tuning) placed where they belong in padded batches.

peft puts them at the left edge, before the padding, and counts positions from there; a padded row then differs from the
same row alone (0.3 nat on GPT-2). Here they go between the padding and the first real token, with positions counted
from the first virtual one, so that every row is as if it were by itself:

    caller        . . p p p r r          the columns that everybody else sees, before and after
    the trunk     . . v v p p p r r      prompt and p-tuning: embeddings put in by a pre-hook, their outputs cut off again
    the cache     v v . . p p p r r      prefix tuning: keys and values put into the empty cache; nothing to cut

The hooks sit on the transformer below the head (the encoder and the decoder of encoder-decoders), and the model is a plain
`PeftModel`, whose forward and generate call the base: generation, a teacher-forced pass and training all take the same way.
An encoder's extra outputs stay, for the decoder to attend to, as in peft.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PretrainedConfig, PreTrainedModel

from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.model import compat

if TYPE_CHECKING:
    from peft import PeftModel


def install(model: PeftModel, field: str) -> PeftModel:
    """Hook the placing into `model`, a plain PeftModel around a transformers model."""
    base = model.get_base_model()
    placing = _Placing(model)
    trunk = base.get_decoder() if base.config.is_encoder_decoder else _trunk(base)
    if trunk is None or trunk is base:
        raise CheckpointError(
            f"{field}: {type(base).__name__} has no trunk below its head to put virtual tokens into; use LORA"
        )
    if placing.in_cache:
        if "past_key_values" not in inspect.signature(trunk.forward).parameters:
            raise CheckpointError(
                f"{field}: PREFIX_TUNING needs a cache, which {type(trunk).__name__} has not; use PROMPT_TUNING"
            )
        trunk.register_forward_pre_hook(placing.fill_cache, with_kwargs=True)
    elif base.config.is_encoder_decoder:
        base.get_encoder().register_forward_pre_hook(placing.insert, with_kwargs=True)
        trunk.register_forward_pre_hook(placing.widen_encoder_mask, with_kwargs=True)
    else:
        trunk.register_forward_pre_hook(placing.insert, with_kwargs=True)
        trunk.register_forward_hook(placing.cut, with_kwargs=True)
    base.register_forward_pre_hook(placing.expect, with_kwargs=True)
    base.register_forward_hook(placing.check)
    return model


def _trunk(base: PreTrainedModel) -> nn.Module:
    """The transformer below the head. OPT's head, and Bart's for causal models, call the decoder inside the trunk."""
    inner = getattr(base.base_model, "decoder", None)
    return inner if isinstance(inner, nn.Module) else base.base_model


def count(model: nn.Module) -> int:
    """Virtual tokens that the active adapter puts before every row; 0 for models without any."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict) or compat.adapters_are_off(model):
        return 0
    config = configs[model.active_adapter]
    return config.num_virtual_tokens if config.is_prompt_learning else 0


class _Placing:
    """The hooks. Bound methods, because a deep copy of the model then has hooks of its own with the copied weights."""

    def __init__(self, model: PeftModel):
        self.model = model
        self.in_cache = model.peft_config[model.active_adapter].peft_type.value == "PREFIX_TUNING"
        self.placed = True

    def expect(self, module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        self.placed = False

    def check(self, module: nn.Module, args: tuple, output: object) -> None:
        """An architecture that goes round the hooked trunk would silently be its base."""
        if count(self.model) and not self.placed:
            raise CheckpointError(
                f"virtual tokens: {type(module).__name__} did not pass through its trunk; use LORA for this model"
            )

    def insert(self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, object]] | None:
        """Virtual embeddings between the padding and the first real token; later steps find them in the cache."""
        if not (width := count(self.model)):
            return None
        self.placed = True
        kwargs = _by_name(module, args, kwargs)
        cached = _cached(kwargs)
        mask = _mask(kwargs)
        if cached:
            if mask is not None:
                kwargs["attention_mask"] = _place(torch.ones_like(mask[:, :1]).expand(-1, width), mask, _first(mask))
            _shift(kwargs, width)
            return (), kwargs
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:
            embeds = module.get_input_embeddings()(kwargs["input_ids"])
        rows = embeds.shape[0]
        first = torch.zeros(rows, dtype=torch.long, device=embeds.device) if mask is None else _first(mask)
        virtual = self.model.get_prompt(rows)[:, :width].to(embeds.dtype)
        kwargs["inputs_embeds"], kwargs["input_ids"] = _place(virtual, embeds, first), None
        if mask is not None:
            if not bool(mask.any(dim=1).all()):
                raise CheckpointError(
                    "virtual tokens: a row without real tokens; give each row one, and prefill it in one piece"
                )
            kwargs["attention_mask"] = _place(torch.ones_like(mask[:, :1]).expand(-1, width), mask, first)
        positions = kwargs.get("position_ids")
        if positions is not None:
            own = torch.arange(width, device=positions.device).expand(rows, -1)
            kwargs["position_ids"] = _place(own, positions.expand(rows, -1) + width, first)
        kinds = kwargs.get("token_type_ids")
        if kinds is not None:
            kwargs["token_type_ids"] = _place(kinds.new_zeros(rows, width), kinds, first)
        if kwargs.get("cache_position") is not None:
            kwargs["cache_position"] = torch.arange(width + embeds.shape[1], device=embeds.device)
        return (), kwargs

    def cut(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> object:
        """Drop as many columns on the left as were put in: real tokens are then back in the caller's columns."""
        width = count(self.model)
        embeds = kwargs.get("inputs_embeds")
        if not width or embeds is None or _cached(kwargs) not in (0, embeds.shape[1]):
            return output
        if isinstance(output, tuple):
            return (output[0][:, width:], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, width:]
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(state[:, width:] for state in output["hidden_states"])
        return output

    def widen_encoder_mask(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, object]] | None:
        """The decoder attends to the virtual tokens that the encoder has read."""
        self.placed = True
        kwargs = _by_name(module, args, kwargs)
        mask, states = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if mask is None or states is None or mask.shape[1] == states.shape[1]:
            return None
        width = states.shape[1] - mask.shape[1]
        kwargs["encoder_attention_mask"] = _place(torch.ones_like(mask[:, :1]).expand(-1, width), mask, _first(mask))
        return (), kwargs

    def fill_cache(
        self, module: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, object]] | None:
        """The prefix as the first entries of an empty cache; afterwards only masks and positions have to know of it."""
        if not (width := count(self.model)):
            return None
        self.placed = True
        kwargs = _by_name(module, args, kwargs)
        mask = _mask(kwargs)
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        if mask is not None:
            if _windowed(module.config) and bool((_first(mask) > 0).any()):
                raise CheckpointError(
                    f"PREFIX_TUNING with left padding: {module.config.model_type} counts its window over the padding between "
                    "prefix and text; use batches of equal length, or PROMPT_TUNING"
                )
            kwargs["attention_mask"] = torch.cat([torch.ones_like(mask[:, :1]).expand(-1, width), mask], dim=1)
        _shift(kwargs, width)
        if _cached(kwargs):
            return (), kwargs
        prompt = self.model.get_prompt(tokens.shape[0])
        given = kwargs.get("past_key_values")
        if given is None:
            # Cross-attention caches nothing here: without a cache of the caller's this pass is the only one.
            own = DynamicCache(config=module.config)
            given = EncoderDecoderCache(own, DynamicCache()) if isinstance(prompt, EncoderDecoderCache) else own
            kwargs["past_key_values"] = given
        target = given.self_attention_cache if isinstance(given, EncoderDecoderCache) else given
        source = prompt.self_attention_cache if isinstance(prompt, EncoderDecoderCache) else prompt
        for index, layer in enumerate(source.layers):
            target.update(layer.keys, layer.values, index)
        return (), kwargs


def _place(virtual: Tensor, own: Tensor, first_B: Tensor) -> Tensor:
    """[own before first, virtual, own from first on] for each row, along the second dimension."""
    width, total = virtual.shape[1], virtual.shape[1] + own.shape[1]
    column = torch.arange(total, device=own.device)[None]
    first = first_B[:, None].to(own.device)
    # Columns of [virtual | own]: what was before stays before, the virtual ones follow, the rest stays where it is.
    index = torch.where(column < first, column + width, torch.where(column < first + width, column - first, column))
    joined = torch.cat([virtual.to(own.dtype), own], dim=1)
    for _ in range(joined.dim() - 2):
        index = index[..., None]
    return joined.gather(1, index.expand_as(joined))


def _first(mask: Tensor) -> Tensor:
    """The column of each row's first real token."""
    return mask.to(torch.int8).argmax(dim=1)


def _mask(kwargs: dict[str, object]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise CheckpointError("virtual tokens: the attention mask must be a tensor of rows by columns")
    return mask


def _cached(kwargs: dict[str, Any]) -> int:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def _shift(kwargs: dict[str, Any], width: int) -> None:
    for name in ("position_ids", "cache_position"):
        if kwargs.get(name) is not None:
            kwargs[name] = kwargs[name] + width


def _windowed(config: PretrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return any(kind != "full_attention" for kind in kinds)
    return getattr(config, "sliding_window", None) is not None


def _by_name(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> dict[str, Any]:
    """Every argument by its name: callers pass the ids by position or by name."""
    names = list(inspect.signature(module.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}
