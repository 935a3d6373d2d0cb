"""How a model takes padding and caching: seen on the model itself with a few short forward passes, not read off its name.

alone       a b c d e            what every other way is compared with; explicit positions begin where the model's own do
padded      . . . a b c d e      in a batch with a longer row: the same, or this model must not be padded (states that
                                 run through padding, positions it counts itself): rows of one length go together then
shorter     a b c d              the same, or the model looks ahead and has no distribution of the next token
cached      a b c | d | e        the same, or its cache is not used; with rows selected after the prefill, or not
company     a b c d e            beside a row at the end of the context: the same, or rows of more tokens than some number have
            . . . . . . . y z    a distribution of their own (longrope), and only rows of one side go together
packed      a a a b c c c c     rows one after another, positions anew in each: the same, or they are not packed (asked where
                                they are to be: packing_problem)
crowded     a a a | a | a        where the config names a capacity: the same, or the cache is used up to that many tokens only

Rows are some tokens long, and longer than a window of attention where that is short: what a model does beyond it is seen too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import compat, virtual_tokens
from steerl.rollout.model.generation_config import ClosedGenerationConfig
from steerl.rollout.model.generation_state import can_select_rows, holds_past, select_rows, step_forward
from steerl.rollout.model.language_model import (
    PROBE_TOKENS,
    LanguageModel,
    forward_arguments,
    generate_arguments,
    named,
    pass_logits,
    positions,
    probe_row,
    same,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PretrainedConfig, PreTrainedModel, StoppingCriteriaList


@dataclass(frozen=True)
class Capabilities:
    """What holds for this model."""

    padding: bool
    """Padded rows (left for decoder-only models, right for encoders) equal lone ones."""
    caching: bool
    """Decoding with the cache equals one pass over the whole sequence."""
    row_selection: bool
    """Rows can be taken out of the cache, or repeated in it."""
    pads_in_text: bool
    """A pad token that was drawn is a token like any other; False where the model counts positions by comparing with it."""
    position_offset: int = 0
    """Number of a row's first position: 0, but for models like RoBERTa, which count from behind their pad id."""
    boundary: int | None = None
    """Rows of more tokens than this have another distribution than shorter ones, and so has whatever shares their pass."""
    max_cached_tokens: int | None = None
    """Most tokens of a row for which the cache may be used; None = any. Experts of a bounded capacity drop what is more."""

    def caches(self, tokens: int) -> bool:
        """Whether rows of so many tokens (the decoder's, on encoder-decoders) are decoded with the cache."""
        return self.caching and (self.max_cached_tokens is None or tokens <= self.max_cached_tokens)

    def is_long(self, tokens: int) -> bool:
        """Whether a row of so many tokens is on the far side of the boundary."""
        return self.boundary is not None and tokens > self.boundary


def observe(model: LanguageModel, offset: int) -> Capabilities:
    """Run the passes of this file's head on `model`, whose first position is `offset`. Call without dropout and without
    gradients."""
    short, long = probe_lengths(model)
    rows = [probe_row(model, 3, short), probe_row(model, 5, long)]
    alone = [pass_logits(model, row, offset=offset) for row in rows]
    padding = long == short or _takes_padding(model, rows, alone, offset)
    if short > 1:
        _check_causal(model, rows[0], alone[0], offset)
    max_cached_tokens = boundary_at = None
    caching = row_selection = pads_in_text = True
    if model.is_seq2seq or short >= 4:
        caching, row_selection, pads_in_text = _decoding(model, torch.cat([row[:, :short] for row in rows]), offset)
    if caching and (max_cached_tokens := _crowded(model, offset)) is not None:
        padding = padding and model.is_seq2seq  # padding may take up what rows beside it have room for
    if not model.is_seq2seq and "position_ids" in forward_arguments(model.core):
        pair = probe_row(model, 3, SPREAD).expand(2, -1)
        config = model.core.config.get_text_config(decoder=True)
        boundary_at = boundary(
            lambda positions: pass_logits(model, pair, position_ids=positions)[0], config, model.context, offset, model.device
        )
    return Capabilities(padding, caching, row_selection, pads_in_text, offset, boundary_at, max_cached_tokens)


def _takes_padding(model: LanguageModel, rows: list[Tensor], alone: list[Tensor], offset: int) -> bool:
    """Whether the shorter row is padded in a batch with the longer one as it is alone."""
    fill = torch.full((1, rows[1].shape[1] - rows[0].shape[1]), model.pad_id, device=model.device)
    sides = [rows[0], fill] if model.is_seq2seq else [fill, rows[0]]
    real = torch.cat([torch.full_like(side, side is rows[0], dtype=torch.bool) for side in sides], dim=1)
    ids, mask = torch.cat([torch.cat(sides, dim=1), rows[1]]), torch.cat([real, torch.ones_like(real)])
    both = pass_logits(model, ids, mask, offset=offset)
    return all(same(both[k : k + 1, -2:], alone[k][:, -2:]) for k in range(2))


def _check_causal(model: LanguageModel, row: Tensor, alone: Tensor, offset: int) -> None:
    shorter = row if model.is_seq2seq else row[:, :-1]
    if not same(pass_logits(model, shorter, decoder=row[:, :1], offset=offset), alone[:, :-1]):
        raise UserError(
            f"model: {type(model.core).__name__} looks ahead: its logits change with the tokens after them, so they are no "
            "distribution of the next token; load a causal decoder (for BERT-like models, a checkpoint with is_decoder: true)"
        )


def _decoding(model: LanguageModel, rows: Tensor, offset: int) -> tuple[bool, bool, bool]:
    """(caching, row_selection, pads_in_text)."""
    short = rows.shape[1]
    # A prompt of one token is decoded too: what a model keeps in itself from the last batch shows there.
    prompts = [rows] if model.is_seq2seq else [rows[:, : short - PROBE_TOKENS], rows[:, :1]]
    if not model.is_seq2seq and 1 < (window := _window(model)) < short:
        prompts.append(rows[:, : window - 1])  # which is passed while decoding
    text = rows[:, -PROBE_TOKENS:]
    padded = torch.cat([torch.full_like(text[:, :1], model.pad_id), text[:, 1:]], dim=1)
    for select in (True, False):
        if all(_decodes(model, prompt, text, offset, select) for prompt in prompts):
            return True, select, _decodes(model, prompts[0], padded, offset, select)
    if not all(_decodes(model, prompt, text, offset, select=True, cache=False) for prompt in prompts):
        raise UserError(
            f"model: {type(model.core).__name__} gives other logits when it decodes token by token than in one pass over the "
            "whole row, with its cache and without; it cannot be sampled exactly, use another implementation of the model"
        )
    return False, True, True


def packing_problem(model: LanguageModel, offset: int) -> str | None:
    """Why rows that are laid one after another in one row are not what they are alone; None where they are. `offset` is
    what was observed; call as `observe`."""
    name, config = type(model.core).__name__, model.core.config.get_text_config(decoder=True)
    if model.is_seq2seq:
        return f"{name} has an encoder, whose rows are not packed"
    if virtual_tokens.count(model.model):
        return "the adapter puts virtual tokens before each row"
    if "position_ids" not in forward_arguments(model.core):
        return f"{name} takes no positions, which tell it where a row begins"
    absolute = [n for n in _numbers(config.to_dict(), "attention_chunk_size", "index_topk") if n > _SHORT_WINDOW]
    if absolute or _numbers(config.to_dict(), "expert_capacity"):
        return f"{name} bounds what is computed in one row (chunks, chosen tokens, the capacity of experts)"
    short, long = probe_lengths(model)
    rows = [probe_row(model, start, n) for start, n in ((3, short), (9, 1), (5, long))]
    positions_1N = torch.cat([positions(torch.ones_like(row), offset) for row in rows], dim=1)
    given = named(model, input_ids=torch.cat(rows, dim=1), position_ids=positions_1N, use_cache=False)
    try:
        with compat.without_message("recommend passing in an `attention_mask`"):
            together: Tensor = model.core(**given).logits
    except (UserError, RuntimeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        return f"{name} does not take them ({type(error).__name__}: {error})"
    # Compared all at once: the numbers of a row of one token have no spread to measure by.
    if same(together, torch.cat([pass_logits(model, row, offset=offset) for row in rows], dim=1)):
        return None
    return f"{name} does not keep them apart (a state, a convolution, or attention that does not look at positions)"


SPREAD = 8
"""Tokens of a row whose positions are spread over many."""
_NEAR = 32


def boundary(
    company: Callable[[Tensor], Tensor], config: PretrainedConfig, context: int | None, offset: int, device: torch.device
) -> int | None:
    """Most tokens of a row that has the distribution of short rows; None where rows of every length have the same one.

    `company(positions)` gives the logits of the first of two rows. Its positions are spread over a length, the other row ends
    there too, or at the end of the context: what changes the first row then is the longest position of the pass.
    """
    if context is None or context - offset < 2 * SPREAD:
        return None
    end = context - offset

    def changes(tokens: int, other: int) -> bool:
        spread = torch.linspace(0, tokens - 1, SPREAD, device=device).long() + offset
        near, far = torch.stack([spread, spread]), torch.stack([spread, spread + (other - tokens)])
        return not same(company(far), company(near))

    named = _numbers(config.to_dict(), "original_max_position")
    tries = dict.fromkeys(n for n in (*named, min(_NEAR, end // 2), SPREAD) if SPREAD <= n < end)
    low = max((n for n in tries if changes(n, end)), default=None)
    if low is None:
        return None
    high = low + 1 if low + 1 == end or not changes(low + 1, end) else end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if changes(middle, end) else (low, middle)
    if low >= 2 * SPREAD and changes(low // 2, low):
        raise UserError(
            "model: its distribution changes with every longer row of a pass (dynamic scaling of positions), so that no row "
            "would be what it is alone; set max_position_embeddings in its config.json to the "
            f"{low} tokens it was trained with, or less"
        )
    return low


def _numbers(config: Mapping[str, object], *words: str) -> list[int]:
    """The whole numbers of a config, at any depth, whose names hold one of these words."""
    numbers: list[int] = []
    for name, value in config.items():
        if isinstance(value, dict):
            numbers += _numbers(value, *words)
        elif isinstance(value, int) and not isinstance(value, bool) and any(word in str(name) for word in words):
            numbers.append(value)
    return numbers


def _crowded(model: LanguageModel, offset: int) -> int | None:
    """The capacity that the config names, where the cache does not keep it; tokens that are all alike want the same expert."""
    config = model.core.config.get_text_config(decoder=True).to_dict()
    capacity = max(_numbers(config, "expert_capacity"), default=None)
    limit = model.decoder_context if model.is_seq2seq else model.context
    if capacity is None or (limit is not None and capacity + PROBE_TOKENS + len(model.start_ids) > limit):
        return None
    row = probe_row(model, 3, 1)
    prompt = torch.cat([row, probe_row(model, 5, 1)])
    tail = prompt.expand(-1, capacity + PROBE_TOKENS)
    return None if _decodes(model, prompt, tail, offset, select=False) else capacity


_SHORT_WINDOW = 64


def probe_lengths(model: LanguageModel) -> tuple[int, int]:
    """Tokens of the short and the long row, within the model's context."""
    limits = [limit for limit in (model.context, model.decoder_context) if limit is not None]
    short = max(5, _window(model) + PROBE_TOKENS + 1)
    most = min(limits) - len(model.start_ids) - PROBE_TOKENS if limits else short + 3
    return max(min(short, most), 1), max(min(short + 3, most), 1)


def _window(model: LanguageModel) -> int:
    """The widest of the windows, chunks and choices of tokens that attention is said to have, of those that are short; or 0."""
    config = model.core.config.get_text_config(decoder=True).to_dict()
    named = _numbers(config, "window", "chunk", "topk", "floor_scale")
    return max((value for value in named if value <= _SHORT_WINDOW), default=0)


def position_offset(model: LanguageModel) -> int:
    """The number that explicit position ids begin with, so that they are what the model counts by itself: two passes."""
    if model.is_seq2seq or "position_ids" not in forward_arguments(model.core):
        return 0
    row = probe_row(model, 3, probe_lengths(model)[0])
    own = pass_logits(model, row, offset=None)
    pad = getattr(model.core.config, "pad_token_id", None)
    guesses = [0, *([pad + 1] if isinstance(pad, int) else []), 1, 2]
    offset = next((guess for guess in dict.fromkeys(guesses) if same(pass_logits(model, row, offset=guess), own)), None)
    if offset is None:
        raise UserError(
            f"model: {type(model.core).__name__} counts positions in a way that explicit position ids do not give; padded "
            "rows would not be what they are alone, use another implementation of the model"
        )
    return offset


def _decodes(model: LanguageModel, prompt: Tensor, tail: Tensor, offset: int, select: bool, cache: bool = True) -> bool:
    """Whether feeding `tail` token by token gives the logits of one pass over each row by itself."""
    whole = prompt if model.is_seq2seq else torch.cat([prompt, tail], dim=1)
    alone = [pass_logits(model, whole[k : k + 1], decoder=tail[k : k + 1], offset=offset) for k in range(len(whole))]
    expected = torch.cat(alone)[:, -tail.shape[1] - 1 :]
    config = ClosedGenerationConfig.of(model.pad_id, model.start_ids, max_new_tokens=tail.shape[1] + 1, use_cache=cache)
    for _ in range(2):  # the second finds what the first may have left in the model itself
        follow = _Follow(tail, select)
        inputs = generate_arguments(model, prompt, torch.ones_like(prompt, dtype=torch.bool), offset)
        try:
            model.core.generate(**inputs, generation_config=config, custom_generate=follow)
        except (UserError, RuntimeError, ValueError, IndexError, AttributeError, NotImplementedError):
            if not cache:
                raise
            return False  # a cache that cannot do this (its rows selected, say) shows it by an error
    return bool(follow.seen) and same(torch.cat(follow.seen, dim=1), expected[follow.order])


class _Follow:
    """A decoding loop that feeds given tokens and keeps the logits; with `select` the rows change places after the prefill."""

    def __init__(self, tail: Tensor, select: bool):
        self.tail, self.select = tail, select
        self.order = [1, 0, 1] if select else [0, 1]
        self.seen: list[Tensor] = []

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **kwargs: object,
    ) -> Tensor:
        del logits_processor, stopping_criteria, generation_config
        ids, seen = input_ids, []
        for step in range(self.tail.shape[1] + 1):
            outputs, kwargs = step_forward(model, ids, kwargs, first=step == 0)
            logits = outputs.logits[:, -1:]
            if kwargs.get("use_cache") and (not holds_past(kwargs) or (self.select and not can_select_rows(kwargs))):
                return ids  # nothing seen: this way of decoding is not there
            if step == 0 and self.select:
                index = torch.tensor(self.order, device=ids.device)
                kwargs, ids, logits = select_rows(kwargs, index, len(ids)), ids[index], logits[index]
            seen.append(logits)
            ids = torch.cat([ids, self.tail[self.order, step : step + 1]], dim=1)
        self.seen = seen
        return ids
