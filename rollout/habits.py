"""How a model takes padding and caching: seen on the model itself with a few short forward passes, not read off its name.

alone       a b c d e            what every other way is compared with; explicit positions begin where the model's own do
padded      . . . a b c d e      in a batch with a longer row: the same, or this model must not be padded (states that
                                 run through padding, positions it counts itself): rows of one length go together then
shorter     a b c d              the same, or the model looks ahead and has no law of the next token
cached      a b c | d | e        the same, or its cache is not used; with the rows picked after the prefill, or not picked

Rows are some tokens long, and longer than a window of attention where that is short: what a model does beyond it is seen too.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.carried import can_pick, carries, pick_rows, step_forward
from rollout.errors import Problem
from rollout.sampling import ClosedGenerationConfig

if TYPE_CHECKING:
    from rollout.policy import Policy


@dataclass(frozen=True)
class Habits:
    """What holds for this model."""

    padding: bool
    """Padded rows (left for decoder-only models, right for encoders) equal lone ones."""
    caching: bool
    """Decoding with the cache equals one pass over the whole sequence."""
    picking: bool
    """Rows can be taken out of the cache, or repeated in it."""
    pads_in_text: bool
    """A pad token that was drawn is a token like any other; False where the model counts positions by comparing with it."""
    first: int = 0
    """Number of a row's first position: 0, but for models like RoBERTa, which count from behind their pad id."""


def forward_arguments(core: Any) -> frozenset[str]:
    """Names that the model's forward takes."""
    return frozenset(inspect.signature(core.forward).parameters)


def positions(mask: Tensor, first: int = 0) -> Tensor:
    """Position of every token, counting real ones only; padding on the left gets the first one's."""
    return (mask.long().cumsum(1) - 1).clamp(min=0) + first


def observe(policy: Policy) -> Habits:
    """Run the passes of this file's head on `policy`'s model. Call without dropout and without gradients."""
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
            raise Problem(
                f"model: {type(policy.core).__name__} looks ahead: its logits change with the tokens after them, so they are "
                "no law of the next token; load a causal decoder (for BERT-like models, a checkpoint with is_decoder: true)"
            )
    if not policy.is_seq2seq and short < 4:
        return Habits(padding=padding, caching=True, picking=True, pads_in_text=True, first=first)
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
            return Habits(padding=padding, caching=True, picking=pick, pads_in_text=plain, first=first)
    if not all(_decodes(policy, prompt, text, first, pick=True, cache=False) for prompt in prompts):
        raise Problem(
            f"model: {type(policy.core).__name__} gives other logits when it decodes token by token than in one pass over the "
            "whole row, with its cache and without; it cannot be sampled exactly, use another implementation of the model"
        )
    return Habits(padding=padding, caching=False, picking=True, pads_in_text=True, first=first)


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
    named = [value for name, value in said.items() if any(word in name for word in ("window", "chunk", "topk"))]
    short = [value for value in named if isinstance(value, int) and value <= _SHORT_WINDOW]
    return max(short, default=0)


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
        raise Problem(
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
    config = ClosedGenerationConfig.of(policy, max_new_tokens=tail.shape[1] + 1, use_cache=cache)
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
            if kwargs.get("use_cache") and (not carries(kwargs) or (self.pick and not can_pick(kwargs))):
                return ids  # nothing seen: this way of decoding is not there
            if step == 0 and self.pick:
                index = torch.tensor(self.order, device=ids.device)
                kwargs, ids, logits = pick_rows(kwargs, index, len(ids)), ids[index], logits[index]
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
    policy: Policy, ids: Tensor, mask: Tensor | None = None, decoder: Tensor | None = None, first: int | None = 0
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
        given["position_ids"] = positions(mask, first)
    if "use_cache" in takes:
        given["use_cache"] = False
    return given


def pass_logits(policy: Policy, ids: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    """The logits of such a pass."""
    logits: Tensor = policy.core(**pass_arguments(policy, ids, mask, **given)).logits
    return logits
