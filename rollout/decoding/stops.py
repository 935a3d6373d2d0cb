"""Where a response ends: the checkpoint's stop ids, the user's stop ids, and stop strings.

A stop string may span tokens, begin inside one, or be split inside a character. A row ends at the token that completes
it; its text ends before it. A few tokens are decoded per step: the tail in which a new match must lie.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError
from steerl.rollout.decoding.settings import Sampling, Vocabulary
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import UNKNOWN, Speller
from steerl.rollout.types import STOP_EOS, STOP_LENGTH, STOP_USER

logger = logging.getLogger(__name__)


class Stops:
    """All that ends a row. Built once per sampler; a stop string that the tokenizer cannot spell is refused here."""

    def __init__(self, sampling: Sampling, policy: Vocabulary):
        self.policy = policy
        self.goes_on = not policy.is_seq2seq
        """Whether a response's text goes on with its prompt's; an encoder-decoder begins a text of its own."""
        for stop_id in sampling.stop_ids:
            if stop_id >= policy.vocab_size:
                raise ConfigError(f"sampling.stop_ids: {stop_id} is out of range; ids go from 0 to {policy.vocab_size - 1}")
        special: dict[str, int] = {}
        if sampling.stop:
            ids = self.tokenizer.all_special_ids
            special = dict(zip(self.tokenizer.convert_ids_to_tokens(ids), ids, strict=True))
        self.eos_ids = tuple(policy.eos_ids)
        user = [*sampling.stop_ids, *(special[text] for text in sampling.stop if text in special)]
        self.user_ids = tuple(i for i in dict.fromkeys(user) if i not in policy.eos_ids)
        strings = [text for text in sampling.stop if text not in special]
        # Special tokens are left out of a response's text; only strings that hold one are looked for with them in.
        self.marked = [text for text in strings if any(token in text for token in special)]
        self.plain = [text for text in strings if text not in self.marked]
        for text in strings:
            if not can_spell(self.tokenizer, text):
                raise ConfigError(
                    f"sampling.stop: the tokenizer cannot spell {text!r}, so it would never end a row; use what it can"
                )
        self.ids = torch.tensor([*self.eos_ids, *self.user_ids], dtype=torch.int64)
        self.codes = torch.tensor([STOP_EOS] * len(self.eos_ids) + [STOP_USER] * len(self.user_ids), dtype=torch.int64)

    @property
    def tokenizer(self) -> Any:
        return self.policy.tokenizer

    @cached_property
    def speller(self) -> Speller:
        return Speller(self.tokenizer)

    @property
    def has_strings(self) -> bool:
        return bool(self.plain or self.marked)

    @property
    def all_ids(self) -> list[int]:
        return [*self.eos_ids, *self.user_ids]

    def to(self, device: torch.device) -> None:
        self.ids, self.codes = self.ids.to(device), self.codes.to(device)

    def is_stop(self, tokens_B: Tensor) -> Tensor:
        return (tokens_B[:, None] == self.ids).any(dim=1)

    def by_id(self, tokens_B: Tensor) -> Tensor:
        """STOP_EOS or STOP_USER for rows whose token is a stop id, else STOP_LENGTH (going on)."""
        if not len(self.ids):
            return torch.full_like(tokens_B, STOP_LENGTH)
        hit = tokens_B[..., None] == self.ids
        return torch.where(hit.any(-1), self.codes[hit.int().argmax(-1)], STOP_LENGTH)

    def before(self, prompt_ids: Sequence[int]) -> list[int]:
        """What `completes` and `first` need of a row's prompt: the last few ids, after which a response's are spelled."""
        return self.speller.tail(prompt_ids) if self.goes_on and self.has_strings else []

    def completes(self, ids: list[int], before: Sequence[int] = ()) -> bool:
        """Whether the last of a response's `ids` completes a stop string."""
        return any(
            self._in_tail(ids, texts, skip, before) for texts, skip in ((self.plain, True), (self.marked, False)) if texts
        )

    def first(self, ids: list[int], before: Sequence[int] = ()) -> int | None:
        """How many of `ids` a row has when a stop string first ends it; None when none does."""
        if not self.has_strings:
            return None
        return next((n for n in range(1, len(ids) + 1) if self.completes(ids[:n], before)), None)

    def text(self, ids: list[int], prompt_ids: Sequence[int] = ()) -> str:
        """A response's text as it goes on with its prompt's: no special tokens, and nothing from a stop string on."""
        before = self.speller.tail(prompt_ids) if self.goes_on else ()
        text = self.speller.after(before, ids)
        cuts = [at for stop in self.plain if (at := text.find(stop)) >= 0]
        if self.marked:
            full = self.speller.after(before, ids, skip=False)
            for at in (at for stop in self.marked if (at := full.find(stop)) >= 0):
                # The ids whose text lies before the match; the token in which it begins gives what it has before it.
                kept = next(n for n in range(len(ids) + 1) if len(self.speller.after(before, ids[: n + 1], skip=False)) > at)
                length = len(self.speller.after(before, ids[:kept], skip=False))
                cuts.append(len(self.speller.after(before, ids[:kept])) + at - length)
        return text[: min(cuts)] if cuts else text

    def _in_tail(self, ids: list[int], stops: list[str], skip: bool, before: Sequence[int]) -> bool:
        """Look in the text of the last tokens, of so many that enough of it lies before the last one, and is cleanly cut."""
        longest = max(map(len, stops))
        width = longest + 8
        while width < len(ids):
            earlier, text = (self.speller.after((), part, skip) for part in (ids[-width:-1], ids[-width:]))
            # The first token's text may lack its blank, or half a character: at the start of a window that proves nothing.
            # A trailing half character is the row's own; any other sign of one means the window may have cut it.
            clean = UNKNOWN not in text[: -1 if text.endswith(UNKNOWN) else None]
            if clean and len(earlier) >= 2 * longest + 16:
                if not any(stop in text for stop in stops):
                    return False
                break
            width *= 4
        text = self.speller.after(before, ids, skip)
        return any(stop in text for stop in stops)


def turn_end(tokenizer: Any, messages: list[Any], **template: Any) -> int | None:
    """The token that the chat template puts after an assistant's turn in a conversation like this; None where it is none.

    Found by rendering: what follows two answers that have nothing in common."""
    spoken = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    before = messages[: spoken[-1]] if spoken else messages
    texts = [
        tokenizer.apply_chat_template([*before, {"role": "assistant", "content": said}], tokenize=False, **template)
        for said in ("a", "b")
    ]
    after = os.path.commonprefix([text[::-1] for text in texts])[::-1]
    marks = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((int(i) for i in tokenizer.encode(after, add_special_tokens=False) if i in marks), None)


def warn_endless(policy: Policy, sampling: Sampling, prompt: Any = None) -> None:
    """Say so where nothing ends a response, or not what the chat template puts at the end of one. `prompt`: any of them."""
    if sampling.stop or not processes.start().is_main:
        return
    ends = [*policy.eos_ids, *sampling.stop_ids]
    remedy = "set sampling.stop_ids or sampling.stop, or eos_token_id in the checkpoint's generation config"
    if not ends:
        logger.warning("model: no eos token, so every response runs to sampling.max_new_tokens; %s", remedy)
    elif isinstance(prompt, list) and (end := turn_end(policy.tokenizer, prompt)) is not None and end not in ends:
        logger.warning(
            "model: its chat template ends a turn with %s (id %d), which does not end a response; %s",
            *(policy.tokenizer.convert_ids_to_tokens(end), end, remedy),
        )


def can_spell(tokenizer: Any, text: str) -> bool:
    """Whether some sequence of tokens decodes to something that contains `text`."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if text in tokenizer.decode(ids):
        return True
    # Its own spelling lost something (an unknown word, say). It may still begin or end inside tokens: cover it with
    # the end of one token, whole ones, and the beginning of one.
    anchor = next((i for i in range(len(tokenizer)) if tokenizer.decode([i], skip_special_tokens=True).strip()), None)
    if anchor is None:
        return False
    head = tokenizer.decode([anchor])
    ids = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    inside = _whole({tokenizer.decode([anchor, i])[len(head) :] for i in ids})
    first = _whole({tokenizer.decode([i]) for i in ids})  # at a response's beginning, where many lose their blank
    if any(text in piece for piece in inside | first):
        return True
    reached = {n for n in range(1, len(text)) if any(piece.endswith(text[:n]) for piece in inside | first)}
    for at in range(1, len(text)):
        if at in reached:
            if any(piece.startswith(text[at:]) for piece in inside):
                return True
            reached |= {at + len(piece) for piece in inside if text.startswith(piece, at)}
    return False


def _whole(pieces: set[str]) -> set[str]:
    return {piece for piece in pieces if piece and UNKNOWN not in piece}
