"""The policy: a model that generates, its tokenizer, and the few ids that frame a response.

    load_policy(settings)      a folder or hub name (an adapter's folder too) -> Policy
    Policy.of(model, tok)      objects in hand -> Policy

What a checkpoint's generation config says beyond bos, pad, decoder start, forced bos and eos is never read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.common.progress import doing
from steerl.rollout.model import adapters, compat, unread, virtual_tokens
from steerl.rollout.model.auto_classes import is_quantized, load_head, load_tokenizer
from steerl.rollout.model.capabilities import Capabilities, observe, packing_problem, position_offset
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.model.language_model import LanguageModel, no_dropout, unwrap, vocabulary_size
from steerl.rollout.model.settings import Hub, ModelSettings

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Seen = TypeVar("Seen")


@dataclass(frozen=True, eq=False, kw_only=True)
class Policy(LanguageModel):
    """A generating model and its tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    like: Policy | None = None
    """Of a copy: whose capabilities are its own."""
    hub: Hub = Hub()
    """How its files were taken."""

    @staticmethod
    def of(model: nn.Module, tokenizer: PreTrainedTokenizerBase, kind: Literal["auto", "causal", "seq2seq"] = "auto") -> Policy:
        """A Policy of a model and a tokenizer in hand, after the checks that every policy passes."""
        core = unwrap(model)
        config, generation = core.config, getattr(core, "generation_config", None)
        is_seq2seq = bool(getattr(config, "is_encoder_decoder", False))
        if kind != "auto" and (kind == "seq2seq") != is_seq2seq:
            is_a = "an encoder-decoder" if is_seq2seq else "a decoder-only model"
            raise CheckpointError(f"model.kind: {kind}, but {type(core).__name__} is {is_a}; leave model.kind at auto")
        if not core.can_generate():
            raise CheckpointError(
                f"model: {type(core).__name__} has no generation head; name a causal or encoder-decoder language model"
            )
        size = vocabulary_size(core)
        check_vocabulary(tokenizer, size)
        eos = tuple(i for i in ids_of(_first(generation, config, tokenizer, name="eos_token_id")) if 0 <= i < size)
        pads = [
            *ids_of(getattr(tokenizer, "pad_token_id", None)),
            *ids_of(_first(generation, config, name="pad_token_id")),
            *eos,
            0,
        ]
        # Virtual tokens of an adapter take up part of the context.
        taken = virtual_tokens.count(getattr(model, "module", model))
        contexts = [limit - taken if limit else None for limit in _contexts(config, is_seq2seq)]
        return Policy(
            model=model,
            tokenizer=tokenizer,
            kind="seq2seq" if is_seq2seq else "causal",
            start_ids=_start_ids(core, generation, config, size) if is_seq2seq else (),
            pad_id=next(i for i in pads if 0 <= i < size),
            eos_ids=eos,
            context=contexts[0],
            decoder_context=contexts[1],
        )

    @cached_property
    def capabilities(self) -> Capabilities:
        """How the model takes padding and caching, observed on it once (every rank of a run asks at the same place)."""
        if self.like is not None:
            return self.like.capabilities
        with doing("looking at how the model takes padding and caching"):
            return self._plain(lambda: observe(self, self.position_offset))

    @cached_property
    def position_offset(self) -> int:
        """Number of a row's first position. Of the capabilities it is what is asked for before weights are read."""
        seen = vars(self).get("capabilities")
        return seen.position_offset if seen is not None else self._plain(lambda: position_offset(self))

    def _plain(self, look: Callable[[], Seen]) -> Seen:
        """Whoever asks first may be inside a steered pass; what is observed is the plain model."""
        layers = unread.layers_read(self.core, compat.unsplit_layers([self.core]))
        with unsteered(), no_dropout(self.core), torch.no_grad(), layers:
            return look()

    def packing_problem(self) -> str | None:
        """Why rows of a pass cannot be laid one after another without padding; None where they can."""
        return self._plain(lambda: packing_problem(self, self.position_offset))

    @property
    def token_budget(self) -> int | None:
        """Tokens that a row may have: the context, but for models that begin to count positions later."""
        return None if self.context is None else self.context - self.position_offset

    def with_model(self, model: nn.Module, capabilities: Capabilities | None = None, like: Policy | None = None) -> Policy:
        """The same policy around another wrapper of its model; or around a copy, whose `capabilities` need not be observed, or
        are those of `like`."""
        other = dataclasses.replace(self, model=model, like=like)
        if capabilities is not None:
            vars(other)["capabilities"] = capabilities
        return other


def load_policy(settings: ModelSettings, device: torch.device | str | None = None, *, read: bool = True) -> Policy:
    """The model of `settings` with its adapter and tokenizer, in eval mode on `device`. Without `read` its weights stay in
    their files (unread.py) until an engine takes them."""
    with doing(f"loading {settings.path}"):
        return _load_policy(settings, device, read)


def _load_policy(settings: ModelSettings, device: torch.device | str | None, read: bool) -> Policy:
    path, adapter, hub = settings.base()
    attn = None if settings.attn in ("", "auto") else settings.attn
    loading: dict[str, Any] = {"dtype": settings.dtype, "attn": attn, "read": read, "hub": hub}
    model: PreTrainedModel = load_head(path, "policy", settings.kind, quantization=settings.quantization, **loading)
    tokenizer = tokenizer_of(settings, [path, adapter])
    if adapter:
        model = adapters.load(model, adapter, trainable=True, field="model.adapter" if settings.adapter else "model.path")
    if device is not None and not is_quantized(unwrap(model)):  # which lies on its GPU already, and is not moved
        unread.to_device(model, device)
    return dataclasses.replace(Policy.of(model, tokenizer, settings.kind), hub=hub)


def tokenizer_of(settings: ModelSettings, beside: list[str]) -> PreTrainedTokenizerBase:
    """The one that is named, or that of the first folder of `beside` which has one: the base model's, an adapter's."""
    hub = settings.base()[2]
    if settings.tokenizer:
        field, path = "model.tokenizer", settings.tokenizer
    else:
        named = [folder for folder in beside if any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES)]
        field, path = "model.path", named[0] if named else beside[0]
        if Path(path).is_dir() and not named:
            raise CheckpointError(
                f"model.path: no tokenizer in {path}; save it there, or name another folder with model.tokenizer"
            )
    return load_tokenizer(path, field, hub if path == beside[0] else hub.code)


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")


# -- checks and look-ups --------------------------------------------------------------------------------------------


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Every id that the tokenizer can give must have a row in the embedding."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= size:
        raise CheckpointError(
            f"model: the tokenizer's highest id is {highest}, but the model's embedding has {size} rows; "
            "use the model's own tokenizer, or resize the model's embedding and save it"
        )


def ids_of(value: Any) -> list[int]:
    if value is None:
        return []
    several = isinstance(value, list | tuple) or (hasattr(value, "tolist") and value.dim())
    return [int(i) for i in value] if several else [int(value)]


def _first(*sources: object, name: str) -> object:
    return next((value for source in sources if (value := getattr(source, name, None)) is not None), None)


def _start_ids(
    core: PreTrainedModel, generation: GenerationConfig | None, config: PretrainedConfig, size: int
) -> tuple[int, ...]:
    text = config.get_text_config(decoder=True)
    start = _first(generation, config, text, name="decoder_start_token_id")
    start = start if start is not None else _first(generation, config, text, name="bos_token_id")
    if start is None:
        raise CheckpointError(
            f"model: {type(core).__name__} has no decoder_start_token_id; set it in the checkpoint's generation config"
        )
    ids = (*ids_of(start)[:1], *ids_of(_first(generation, name="forced_bos_token_id"))[:1])
    if not all(0 <= i < size for i in ids):
        raise CheckpointError(
            f"model: the decoder's start ids {list(ids)} do not fit the model's {size} rows; fix the generation config"
        )
    return ids


def _contexts(config: PretrainedConfig, is_seq2seq: bool) -> tuple[int | None, int | None]:
    """Limits of the encoder (or the one stack) and of the decoder. Relative positions and states have none."""

    config = config if is_seq2seq else config.get_text_config(decoder=True)

    def limit(*names: str) -> int | None:
        names = (*names, "max_position_embeddings")
        return next((value for name in names if isinstance(value := getattr(config, name, None), int) and value > 0), None)

    return limit("max_encoder_position_embeddings") if is_seq2seq else limit(), (
        limit("max_decoder_position_embeddings") if is_seq2seq else None
    )
