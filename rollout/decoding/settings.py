"""Sampling: the user's settings, the closed generation config that they become, and the row-keyed random numbers.

settings ── checked when built ──┬─ law.py      what each token is drawn from
                                 ├─ stops.py    where a response ends
                                 └─ ClosedGenerationConfig   for generate: nothing of the checkpoint's own gets in
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import transformers
from steerl.rollout.common.errors import UserError
from torch import Tensor

if TYPE_CHECKING:
    from steerl.rollout.model.policy import Policy

logger = logging.getLogger(__name__)

MOST_ROWS = 1 << 24
"""Rows of a step or a prompt: beyond that no machine holds them at once, and a number was mistyped."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and where responses end.

    Order: repetition penalty, n-gram ban, bad words, temperature, top-k, top-p, min-p. Penalties and bans see the real
    tokens of prompt and response, on encoder-decoders those of the decoder.
    """

    max_new_tokens: int = 64
    """Most tokens of a response."""
    temperature: float = 1.0
    """Divides the logits; above 0."""
    top_k: int = 0
    """Only the k likeliest tokens (and those tied with the last of them); 0 = all."""
    top_p: float = 1.0
    """Only the smallest set of tokens whose probabilities reach p; 1 = all."""
    min_p: float = 0.0
    """Only tokens at least min_p times as likely as the likeliest; 0 = all."""
    repetition_penalty: float = 1.0
    """Above 1 makes tokens that were there already less likely."""
    no_repeat_ngram_size: int = 0
    """No n tokens twice in a row's text; 0 = allowed."""
    bad_words: list[str] = field(default_factory=list)
    """Strings whose last token is never drawn after the others."""
    bad_words_ids: list[list[int]] = field(default_factory=list)
    """The same as token ids."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response; its text ends before them."""
    stop_ids: list[int] = field(default_factory=list)
    """Token ids that end a response, besides the checkpoint's own."""
    n: int = 1
    """Samples per prompt."""
    batch_size: int = 64
    """Most rows decoded together."""
    batch_tokens: int = 0
    """Most tokens (rows x the longest prompt with its response) decoded together, so that rows of short prompts go in larger
    batches and the cache stays within bounds; 0 = batch_size alone."""
    seed: int = 0
    """Seed of the draws; with the step, the row, the sample and the position it decides every token."""
    compile: bool = False
    """Decode through a compiled step over a static cache, steered or not (rollout/decoding/compiled.py); each shape (rows,
    64 columns) is compiled once, and the cache stays allocated. For many batches of like shapes, on GPUs above all."""
    greedy: bool = False
    """Always the likeliest token. Both log-probs are then the policy's at temperature 1."""

    def __post_init__(self) -> None:
        problems = [
            f"sampling.{name}: {getattr(self, name)!r}, but {rule}"
            for name, good, rule in (
                ("max_new_tokens", self.max_new_tokens >= 1, "a response has at least one token; set 1 or more"),
                ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "it must be a positive number"),
                ("top_k", self.top_k >= 0, "it must be 0 (all tokens) or more"),
                ("top_p", 0 < self.top_p <= 1, "it must be above 0 and at most 1 (1 = all tokens)"),
                ("min_p", 0 <= self.min_p <= 1, "it must lie between 0 (all tokens) and 1"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "it must be a positive number (1 = none)"),
                ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "it must be 0 (allowed) or more"),
                ("bad_words", all(self.bad_words), "an empty string would ban nothing; leave it out"),
                ("bad_words_ids", all(self.bad_words_ids), "an empty list would ban nothing; leave it out"),
                ("stop", all(self.stop), "an empty string is everywhere; leave it out"),
                ("stop_ids", all(i >= 0 for i in self.stop_ids), "token ids are 0 or more"),
                ("n", 1 <= self.n <= MOST_ROWS, f"it must be 1 to {MOST_ROWS:,} samples per prompt"),
                ("seed", 0 <= self.seed < 1 << 63, "it must be 0 or more"),
                ("batch_tokens", self.batch_tokens >= 0, "it must be 0 (no bound) or more"),
                ("batch_size", 1 <= self.batch_size <= MOST_ROWS, f"it must be 1 to {MOST_ROWS:,} rows"),
            )
            if not good
        ]
        if self.temperature == 0:
            problems.append("sampling.temperature: 0 has no law to draw from; set sampling.greedy true for the likeliest token")
        if problems:
            raise UserError(*problems)
        if self.greedy and (ignored := [name for name in ("temperature", "top_k", "top_p", "min_p") if self._changed(name)]):
            logger.warning(
                "sampling.greedy: the likeliest token is the same under %s, which have no effect", ", ".join(ignored)
            )

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)

    @property
    def policy_temperature(self) -> float:
        """The temperature of the policy's law: 1 for greedy rows, which have no law of their own."""
        return 1.0 if self.greedy else self.temperature

    @property
    def truncates(self) -> bool:
        """Some tokens of the policy's law can never be drawn, so weights between the two laws lack support."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def is_plain(self) -> bool:
        """Temperature alone: behaviour and policy are one law."""
        changed = self.repetition_penalty != 1 or self.no_repeat_ngram_size or self.bad_words or self.bad_words_ids
        return not (self.truncates or changed or self.greedy)


class ClosedGenerationConfig(transformers.GenerationConfig):
    """A generation config that takes nothing from the checkpoint's own.

    generate fills every field that is None from the model's config (`update(defaults_only=True)`), whole configs that the
    user passes included. This one refuses that, and sets what generate's preparation reads.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> dict[str, Any]:
        if defaults_only:
            return {}
        unused: dict[str, Any] = super().update(allow_custom_entries=allow_custom_entries, **kwargs)
        return unused

    @staticmethod
    def of(policy: Policy, **fields: Any) -> ClosedGenerationConfig:
        """Plain sampling with the policy's pad and start; `fields` say the rest (max_new_tokens, outputs, eos)."""
        plain = {
            "do_sample": True, "num_beams": 1, "num_return_sequences": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
            "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "use_cache": True,
            "output_scores": False, "output_logits": False, "output_attentions": False, "output_hidden_states": False,
            "return_dict_in_generate": False, "is_assistant": False, "disable_compile": True, "pad_token_id": policy.pad_id,
        }  # fmt: skip
        if policy.start_ids:
            plain["decoder_start_token_id"] = policy.start_ids[0]
        return ClosedGenerationConfig(**{**plain, **fields})


def uniforms(seed: int, step: int | Tensor, row_B: Tensor, sample_B: Tensor, t: int | Tensor) -> Tensor:
    """A float64 in [0, 1) for token t of each (row, sample): a function of its arguments and of nothing else.

    (B,) for one position, (B, T) for a row of T positions. A counter-based hash (rounds of the splitmix64 finaliser): no
    state, so batch size, order, processes, compaction and resume change nothing.
    """
    key = torch.full_like(row_B, _signed(seed))
    for part in (step, row_B, sample_B):
        key = _mix(key + _GOLDEN) ^ (part if isinstance(part, Tensor) else torch.full_like(row_B, int(part)))
    if isinstance(t, Tensor):
        key = key[:, None]
    bits = _mix(_mix(key + _GOLDEN) ^ t)
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value


_GOLDEN, _FIRST, _SECOND = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64; int64 arithmetic wraps, and its right shifts are made logical by masks."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _FIRST
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _SECOND
    return x ^ ((x >> 31) & ((1 << 33) - 1))
