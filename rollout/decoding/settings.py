"""Sampling: the user's settings, checked when built."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Protocol

from steerl.rollout.common.errors import ConfigError

logger = logging.getLogger(__name__)

MOST_ROWS = 1 << 24
"""Rows of a step or a prompt: beyond that no machine holds them at once, and a number was mistyped."""


class Vocabulary(Protocol):
    """What drawing needs to know of a policy: its ids, and what they spell."""

    @property
    def vocab_size(self) -> int:
        """Ids go from 0 to one below it."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a response by itself."""

    @property
    def is_seq2seq(self) -> bool:
        """Whether a response begins a text of its own."""

    @property
    def tokenizer(self) -> Any:
        """Asked for where there is something to spell."""


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
    replay_mask: bool | None = None
    """Where top_k, top_p or min_p leave tokens out, the record says which could be drawn, and the policy is the distribution
    over these, now and in every later pass; null = wherever they do. False: the policy is that over the whole vocabulary."""
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
            problems.append(
                "sampling.temperature: 0 has no distribution to draw from; set sampling.greedy true for the likeliest token"
            )
        if self.replay_mask and not self.truncates:
            why = "greedy rows are not drawn" if self.greedy else "top_k, top_p and min_p leave no token out"
            problems.append(f"sampling.replay_mask: true, but {why}, so it has no effect; leave it out")
        if problems:
            raise ConfigError(*problems)
        if self.greedy and (ignored := [name for name in ("temperature", "top_k", "top_p", "min_p") if self._changed(name)]):
            logger.warning(
                "sampling.greedy: the likeliest token is the same under %s, which have no effect", ", ".join(ignored)
            )

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)

    @property
    def policy_temperature(self) -> float:
        """The policy's temperature: 1 for greedy rows, which are not drawn at all."""
        return 1.0 if self.greedy else self.temperature

    @property
    def truncates(self) -> bool:
        """Some tokens that the policy may say can never be drawn, so importance weights lack support."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def replays_mask(self) -> bool:
        """The policy's distribution is the one over the ids that could be drawn, which the record holds."""
        return self.truncates and self.replay_mask is not False

    @property
    def is_policy(self) -> bool:
        """What is drawn from is the policy: at a temperature alone, or over the same ids."""
        changed = self.repetition_penalty != 1 or self.no_repeat_ngram_size or self.bad_words or self.bad_words_ids
        return not (changed or self.greedy or (self.truncates and not self.replays_mask))
