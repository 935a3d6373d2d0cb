"""A generating model with the ids that frame its responses, without a tokenizer, and what its forward passes are given.

LanguageModel(model, ...)     the model, its start, pad and stop ids, its limits
pass_arguments · pass_logits  one plain forward pass, arguments by the names that the model takes
generate_arguments            the same for generate
unwrap · no_dropout           the transformers model inside wrappers; eval mode for a while
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import compat

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageModel:
    """A generating model with what its responses begin with, end with and are padded with."""

    model: nn.Module
    """May be wrapped by DDP, DeepSpeed, FSDP or PEFT."""
    kind: Literal["causal", "seq2seq"]
    start_ids: tuple[int, ...]
    """What every decoder row starts with (decoder start, forced bos); empty for decoder-only models."""
    pad_id: int
    eos_ids: tuple[int, ...]
    context: int | None
    """Most tokens of a sequence (of the encoder's input for encoder-decoders); None where nothing limits it."""
    decoder_context: int | None = None
    """Most tokens of an encoder-decoder's decoder sequence."""
    extra: dict[str, object] = field(default_factory=dict)
    """Arguments that every forward pass of this model gets besides ids, masks and positions."""

    @property
    def core(self) -> PreTrainedModel:
        """The transformers model itself, out of every wrapper."""
        return unwrap(self.model)

    @property
    def device(self) -> torch.device:
        return next(self.core.parameters()).device

    @property
    def is_seq2seq(self) -> bool:
        return self.kind == "seq2seq"

    def start_rows(self, rows: int) -> Tensor:
        """(rows, K): what every decoder row starts with."""
        return torch.tensor(self.start_ids, device=self.device)[None].expand(rows, -1)

    @property
    def vocab_size(self) -> int:
        """Ids that the model can draw; may be more than the tokenizer knows."""
        return vocabulary_size(self.core)


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers."""
    while True:
        model = compat.uncompiled(model)
        if hasattr(model, "peft_config") and (base := getattr(model, "get_base_model", None)):
            return base()  # its layers carry the adapter, its trunk the hooks of virtual tokens
        elif not hasattr(model, "config") or type(model).__name__ in _WRAPPERS:
            if not isinstance(inner := getattr(model, "module", None), nn.Module):
                raise UserError(f"model: {type(model).__name__} is not a transformers model; load it with the Auto classes")
            model = inner
        else:
            return model


_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")


@contextlib.contextmanager
def no_dropout(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module inside the block; each one's own mode afterwards.

    Layers under gradient checkpointing look at their `training` flag before they checkpoint, so they keep it and have
    their own dropout rates at 0 meanwhile. A backward pass that recomputes layers must run inside the block too.
    """
    before = [module for module in compat.modules(model) if module.training]
    rates: list[tuple[nn.Module, str, float]] = []
    for module in before:
        module.training = bool(getattr(module, "gradient_checkpointing", False))
        if module.training:
            rates += [(module, k, v) for k, v in vars(module).items() if "drop" in k and isinstance(v, float)]
    for module, name, _ in rates:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module in before:
            module.training = True
        for module, name, value in rates:
            setattr(module, name, value)


def vocabulary_size(core: PreTrainedModel) -> int:
    """Width of the logits: the head's rows where there is a head of its own, else the embedding's."""
    for module in (core.get_output_embeddings(), core.get_input_embeddings()):
        for name in ("out_features", "num_embeddings"):
            if isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
    return int(core.config.get_text_config(decoder=True).vocab_size)


# -- what a pass is given ----------------------------------------------------------------------------------------------


def forward_arguments(core: PreTrainedModel) -> frozenset[str]:
    """Names that the model's forward takes."""
    own = "forward" in vars(core)  # put there by a wrapper
    return frozenset(inspect.signature(core.forward).parameters) if own else _taken(type(core).forward)


@functools.cache
def _taken(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(list(inspect.signature(forward).parameters)[1:])


def positions(mask: Tensor, offset: int = 0) -> Tensor:
    """Position of every token, counting real ones only; padding on the left gets the first one's."""
    return (mask.long().cumsum(1) - 1).clamp(min=0) + offset


def named(model: LanguageModel, **arguments: object) -> dict[str, object]:
    """What the model's forward takes of `arguments`, beside what every pass of it gets; None stands for left out."""
    takes = forward_arguments(model.core)
    return {**model.extra, **{name: value for name, value in arguments.items() if value is not None and name in takes}}


def generate_arguments(model: LanguageModel, prompt_BP: Tensor, mask_BP: Tensor, offset: int) -> dict[str, object]:
    """What generate is given besides its config: ids and explicit mask and positions."""
    return named(
        model,
        input_ids=prompt_BP,
        attention_mask=mask_BP.long(),
        decoder_input_ids=model.start_rows(len(prompt_BP)) if model.is_seq2seq else None,
        position_ids=None if model.is_seq2seq else positions(mask_BP, offset),
    )


PROBE_TOKENS = 2
"""Tokens that a decoder is fed, where nothing else is said."""


def pass_arguments(
    model: LanguageModel,
    ids: Tensor,
    mask: Tensor | None = None,
    decoder: Tensor | None = None,
    offset: int | None = 0,
    position_ids: Tensor | None = None,
) -> dict[str, object]:
    """What one plain pass is given: of `ids`, or of a decoder that is fed `decoder` (or the first of `ids`) after its start.

    Without an `offset` the model counts positions itself.
    """
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    decoder_ids = None
    if model.is_seq2seq:
        decoder_ids = torch.cat([model.start_rows(len(ids)), ids[:, :PROBE_TOKENS] if decoder is None else decoder], dim=1)
    elif position_ids is None and offset is not None:
        position_ids = positions(mask, offset)
    return named(
        model,
        input_ids=ids,
        attention_mask=mask.long(),
        decoder_input_ids=decoder_ids,
        position_ids=position_ids,
        use_cache=False,
    )


def pass_logits(model: LanguageModel, ids: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    """The logits of such a pass."""
    logits: Tensor = model.core(**pass_arguments(model, ids, mask, **given)).logits
    return logits


def probe_row(model: LanguageModel, start: int, length: int) -> Tensor:
    """A row of ordinary tokens."""
    ids = [i for i in range(model.vocab_size) if i not in (model.pad_id, *model.eos_ids)] or [0]
    return torch.tensor([[ids[(7 * k + start) % len(ids)] for k in range(length)]], device=model.device)


def same(logits: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding, measured against how much the logits vary."""
    eps = torch.finfo(expected.dtype).eps
    logits, expected = logits.float(), expected.float()
    finite = expected.isfinite()
    if not torch.equal(finite, logits.isfinite()):
        return False
    if not bool(finite.any()):
        return True
    scale = expected[finite].std(correction=0) + 1e-3 * expected[finite].abs().mean() + 1e-12
    return bool((logits[finite] - expected[finite]).pow(2).mean().sqrt() <= max(10 * eps, 2e-5) * scale)
