"""How a model takes padding and caching: seen on the model itself with a few short forward passes, not read off its name.

alone       a b c d e            what every other way is compared with; explicit positions begin where the model's own do
padded      . . . a b c d e      in a batch with a longer row: the same, or this model must not be padded (states that
                                 run through padding, positions it counts itself): rows of one length go together then
shorter     a b c d              the same, or the model looks ahead and has no law of the next token
cached      a b c | d | e        the same, or its cache is not used; with the rows picked after the prefill, or not picked
company     a b c d e            beside a row at the end of the context: the same, or rows of more tokens than some number have
            . . . . . . . y z    a law of their own (longrope), and only rows of one side go together
crowded     a a a | a | a        where the config names a capacity: the same, or the cache is used up to that many tokens only

Rows are some tokens long, and longer than a window of attention where that is short: what a model does beyond it is seen too.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.model.generation_config import ClosedGenerationConfig
from steerl.rollout.model.generation_state import can_select_rows, holds_past, select_rows, step_forward
from torch import Tensor

if TYPE_CHECKING:
    from steerl.rollout.model.policy import Policy


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
    """Rows of more tokens than this have another law than shorter ones, and so has whatever shares their pass."""
    max_cached_tokens: int | None = None
    """Most tokens of a row for which the cache may be used; None = any. Experts of a bounded capacity drop what is more."""

    def caches(self, tokens: int) -> bool:
        """Whether rows of so many tokens (the decoder's, on encoder-decoders) are decoded with the cache."""
        return self.caching and (self.max_cached_tokens is None or tokens <= self.max_cached_tokens)

    def is_long(self, tokens: int) -> bool:
        """Whether a row of so many tokens is on the far side of the boundary."""
        return self.boundary is not None and tokens > self.boundary


def forward_arguments(core: Any) -> frozenset[str]:
    """Names that the model's forward takes."""
    return frozenset(inspect.signature(core.forward).parameters)


def positions(mask: Tensor, first: int = 0) -> Tensor:
    """Position of every token, counting real ones only; padding on the left gets the first one's."""
    return (mask.long().cumsum(1) - 1).clamp(min=0) + first


def observe(policy: Policy) -> Capabilities:
    """Run the passes of this file's head on `policy`'s model. Call without dropout and without gradients."""
    seen = _observe(policy)
    crowded = _crowded(policy, seen.position_offset) if seen.caching else None
    if crowded is not None:  # padding may take up what rows beside it have room for
        seen = dataclasses.replace(seen, max_cached_tokens=crowded, padding=seen.padding and policy.is_seq2seq)
    if policy.is_seq2seq or "position_ids" not in forward_arguments(policy.core):
        return seen
    row = probe_row(policy, 3, SPREAD).expand(2, -1)

    def company(position_2T: Tensor) -> Tensor:
        return pass_logits(policy, row, position_ids=position_2T)[0]

    config = policy.core.config.get_text_config(decoder=True)
    return dataclasses.replace(seen, boundary=boundary(company, config, policy.context, seen.position_offset, policy.device))


def _observe(policy: Policy) -> Capabilities:
    short, long = probe_lengths(policy)
    rows = [probe_row(policy, 3, short), probe_row(policy, 5, long)]
    first = _first_position(policy, rows[0])
    alone = [pass_logits(policy, row, first=first) for row in rows]
    padding = True
    if long > short:
        fill = torch.full((1, long - short), policy.pad_id, device=policy.device)
        sides = [rows[0], fill] if policy.is_seq2seq else [fill, rows[0]]
        real = torch.cat([torch.full_like(side, side is rows[0], dtype=torch.bool) for side in sides], dim=1)
        ids, mask = torch.cat([torch.cat(sides, dim=1), rows[1]]), torch.cat([real, torch.ones_like(real)])
        both = pass_logits(policy, ids, mask, first=first)
        padding = all(same(both[k : k + 1, -2:], alone[k][:, -2:]) for k in range(2))
    if short > 1:
        cut = rows[0] if policy.is_seq2seq else rows[0][:, :-1]
        before = pass_logits(policy, cut, decoder=rows[0][:, :1], first=first)
        if not same(before, alone[0][:, :-1]):
            raise UserError(
                f"model: {type(policy.core).__name__} looks ahead: its logits change with the tokens after them, so they are "
                "no law of the next token; load a causal decoder (for BERT-like models, a checkpoint with is_decoder: true)"
            )
    if not policy.is_seq2seq and short < 4:
        return Capabilities(padding=padding, caching=True, row_selection=True, pads_in_text=True, position_offset=first)
    both = torch.cat([row[:, :short] for row in rows])
    # A prompt of one token is decoded too: what a model keeps in itself from the last batch shows there.
    prompts = [both] if policy.is_seq2seq else [both[:, : short - _STEPS], both[:, :1]]
    if not policy.is_seq2seq and 1 < (window := _window(policy)) < short:
        prompts.append(both[:, : window - 1])  # which is passed while decoding
    text = both[:, -_STEPS:]
    padded = torch.cat([torch.full_like(text[:, :1], policy.pad_id), text[:, 1:]], dim=1)
    for pick in (True, False):
        if all(_decodes(policy, prompt, text, first, pick) for prompt in prompts):
            plain = _decodes(policy, prompts[0], padded, first, pick)
            return Capabilities(padding=padding, caching=True, row_selection=pick, pads_in_text=plain, position_offset=first)
    if not all(_decodes(policy, prompt, text, first, pick=True, cache=False) for prompt in prompts):
        raise UserError(
            f"model: {type(policy.core).__name__} gives other logits when it decodes token by token than in one pass over the "
            "whole row, with its cache and without; it cannot be sampled exactly, use another implementation of the model"
        )
    return Capabilities(padding=padding, caching=False, row_selection=True, pads_in_text=True, position_offset=first)


SPREAD = 8
"""Tokens of a row whose positions are spread over many."""
_NEAR = 32


def boundary(
    company: Callable[[Tensor], Tensor], config: Any, context: int | None, first: int, device: torch.device
) -> int | None:
    """Most tokens of a row that has the law of short rows; None where rows of every length have the same one.

    `company(positions)` gives the logits of the first of two rows. Its positions are spread over a length, the other row ends
    there too, or at the end of the context: what changes the first row then is the longest position of the pass.
    """
    if context is None or context - first < 2 * SPREAD:
        return None
    end = context - first

    def changes(tokens: int, other: int) -> bool:
        spread = torch.linspace(0, tokens - 1, SPREAD, device=device).long() + first
        near, far = torch.stack([spread, spread]), torch.stack([spread, spread + (other - tokens)])
        return not same(company(far), company(near))

    said = _numbers(config.to_dict(), "original_max_position")
    tries = dict.fromkeys(n for n in (*said, min(_NEAR, end // 2), SPREAD) if SPREAD <= n < end)
    low = max((n for n in tries if changes(n, end)), default=None)
    if low is None:
        return None
    high = low + 1 if low + 1 == end or not changes(low + 1, end) else end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if changes(middle, end) else (low, middle)
    if low >= 2 * SPREAD and changes(low // 2, low):
        raise UserError(
            "model: its law changes with every longer row of a pass (dynamic scaling of positions), so that no row would be "
            f"what it is alone; set max_position_embeddings in its config.json to the {low} tokens it was trained with, or less"
        )
    return low


def _numbers(config: Any, *words: str) -> list[int]:
    """The whole numbers of a config, at any depth, whose names hold one of these words."""
    found: list[int] = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += _numbers(value, *words)
        elif isinstance(value, int) and not isinstance(value, bool) and any(word in str(name) for word in words):
            found.append(value)
    return found


def _crowded(policy: Policy, first: int) -> int | None:
    """The capacity that the config names, where the cache does not keep it; tokens that are all alike want the same expert."""
    config = policy.core.config.get_text_config(decoder=True).to_dict()
    capacity = max(_numbers(config, "expert_capacity"), default=None)
    limit = policy.decoder_context if policy.is_seq2seq else policy.context
    if capacity is None or (limit is not None and capacity + _STEPS + len(policy.start_ids) > limit):
        return None
    row = probe_row(policy, 3, 1)
    prompt = torch.cat([row, probe_row(policy, 5, 1)])
    tail = prompt.expand(-1, capacity + _STEPS)
    return None if _decodes(policy, prompt, tail, first, pick=False) else capacity


_STEPS = 2
"""Tokens that are fed one by one."""
_SHORT_WINDOW = 64


def probe_lengths(policy: Policy) -> tuple[int, int]:
    """Tokens of the short and the long row, within the model's context."""
    limits = [limit for limit in (policy.context, policy.decoder_context) if limit is not None]
    short = max(5, _window(policy) + _STEPS + 1)
    room = min(limits) - len(policy.start_ids) - _STEPS if limits else short + 3
    return max(min(short, room), 1), max(min(short + 3, room), 1)


def _window(policy: Policy) -> int:
    """The widest of the windows, chunks and choices of tokens that attention is said to have, of those that are short; or 0."""
    said = policy.core.config.get_text_config(decoder=True).to_dict()
    named = _numbers(said, "window", "chunk", "topk", "floor_scale")
    return max((value for value in named if value <= _SHORT_WINDOW), default=0)


def probe_row(policy: Policy, start: int, length: int) -> Tensor:
    """A row of ordinary tokens."""
    ids = [i for i in range(policy.vocab_size) if i not in (policy.pad_id, *policy.eos_ids)] or [0]
    return torch.tensor([[ids[(7 * k + start) % len(ids)] for k in range(length)]], device=policy.device)


def _first_position(policy: Policy, row: Tensor) -> int:
    """The number that explicit position ids begin with, so that they are what the model counts by itself."""
    if policy.is_seq2seq or "position_ids" not in forward_arguments(policy.core):
        return 0
    own = pass_logits(policy, row, first=None)
    pad = getattr(policy.core.config, "pad_token_id", None)
    guesses = [0, *([pad + 1] if isinstance(pad, int) else []), 1, 2]
    found = next((first for first in dict.fromkeys(guesses) if same(pass_logits(policy, row, first=first), own)), None)
    if found is None:
        raise UserError(
            f"model: {type(policy.core).__name__} counts positions in a way that explicit position ids do not give; padded "
            "rows would not be what they are alone, use another implementation of the model"
        )
    return found


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


def _decodes(policy: Policy, prompt: Tensor, tail: Tensor, first: int, pick: bool, cache: bool = True) -> bool:
    """Whether feeding `tail` token by token gives the logits of one pass over each row by itself."""
    whole = prompt if policy.is_seq2seq else torch.cat([prompt, tail], dim=1)
    alone = [pass_logits(policy, whole[k : k + 1], decoder=tail[k : k + 1], first=first) for k in range(len(whole))]
    expected = torch.cat(alone)[:, -tail.shape[1] - 1 :]
    config = ClosedGenerationConfig.of(policy.pad_id, policy.start_ids, max_new_tokens=tail.shape[1] + 1, use_cache=cache)
    for _ in range(2):  # the second finds what the first may have left in the model itself
        follow = _Follow(tail, pick)
        inputs = generate_arguments(policy, prompt, torch.ones_like(prompt, dtype=torch.bool), first)
        try:
            policy.core.generate(**inputs, generation_config=config, custom_generate=follow)
        except (RuntimeError, ValueError, IndexError, AttributeError, NotImplementedError):
            if not cache:
                raise
            return False  # a cache that cannot do this (its rows picked, say) shows it by an error
    return bool(follow.seen) and same(torch.cat(follow.seen, dim=1), expected[follow.order])


class _Follow:
    """A decoding loop that feeds given tokens and keeps the logits; with `pick` the rows change places after the prefill."""

    def __init__(self, tail: Tensor, pick: bool):
        self.tail, self.pick = tail, pick
        self.order = [1, 0, 1] if pick else [0, 1]
        self.seen: list[Tensor] = []

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Tensor:
        del logits_processor, stopping_criteria, generation_config
        ids, seen = input_ids, []
        for step in range(self.tail.shape[1] + 1):
            outputs, kwargs = step_forward(model, ids, kwargs, first=step == 0)
            logits = outputs.logits[:, -1:]
            if kwargs.get("use_cache") and (not holds_past(kwargs) or (self.pick and not can_select_rows(kwargs))):
                return ids  # nothing seen: this way of decoding is not there
            if step == 0 and self.pick:
                index = torch.tensor(self.order, device=ids.device)
                kwargs, ids, logits = select_rows(kwargs, index, len(ids)), ids[index], logits[index]
            seen.append(logits)
            ids = torch.cat([ids, self.tail[self.order, step : step + 1]], dim=1)
        self.seen = seen
        return ids


def generate_arguments(policy: Policy, prompt_BP: Tensor, mask_BP: Tensor, first: int) -> dict[str, Any]:
    """What generate is given besides its config: ids and explicit mask and positions, by the names that the model takes."""
    takes = forward_arguments(policy.core)
    given: dict[str, Any] = {"input_ids": prompt_BP, **policy.extra}
    if "attention_mask" in takes:
        given["attention_mask"] = mask_BP.long()
    if policy.is_seq2seq:
        start = torch.tensor(policy.start_ids, device=prompt_BP.device)
        given["decoder_input_ids"] = start[None].expand(len(prompt_BP), -1)
    elif "position_ids" in takes:
        given["position_ids"] = positions(mask_BP, first)
    return given


def pass_arguments(
    policy: Policy,
    ids: Tensor,
    mask: Tensor | None = None,
    decoder: Tensor | None = None,
    first: int | None = 0,
    position_ids: Tensor | None = None,
) -> dict[str, Any]:
    """What one plain pass is given: of `ids`, or of a decoder that is fed `decoder` (or the first of `ids`) after its start.

    Without a `first` position the model counts positions itself.
    """
    takes = forward_arguments(policy.core)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    given: dict[str, Any] = {"input_ids": ids, **policy.extra}
    if "attention_mask" in takes:
        given["attention_mask"] = mask.long()
    if policy.is_seq2seq:
        start = torch.tensor(policy.start_ids, device=ids.device)[None].expand(len(ids), -1)
        given["decoder_input_ids"] = torch.cat([start, ids[:, :_STEPS] if decoder is None else decoder], dim=1)
    elif "position_ids" in takes and first is not None:
        given["position_ids"] = positions(mask, first) if position_ids is None else position_ids
    if "use_cache" in takes:
        given["use_cache"] = False
    return given


def pass_logits(policy: Policy, ids: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    """The logits of such a pass."""
    logits: Tensor = policy.core(**pass_arguments(policy, ids, mask, **given)).logits
    return logits
