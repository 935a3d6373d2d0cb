"""Rewards that can be verified: exact answer, number, pattern, JSON, length, repetition, keywords.

Every rule looks at one row: completion (and a column of the data) -> a number, usually 1 for right and 0 for wrong; None
where the row's column is empty, so the rule does not apply. A row that a rule cannot judge (a pattern that runs over its
time, an answer that holds no number) gets `fallback` and is told by name.

Of an episode a rule reads what the policy said, never what it was told: its last turn, or all of them (`turns`).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import regex

from steerl.reward.kinds.numbers import numbers_in
from steerl.reward.settings import SECONDS
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.settings_reader import Checked, within

if TYPE_CHECKING:
    from steerl.reward.types import Scores
    from steerl.reward.weighted_sum import RewardTerm
    from steerl.rollout.types import Rollout, Texts

_FAILURES = (ValueError, TypeError, ArithmeticError, RecursionError, TimeoutError)


@dataclass(frozen=True)
class Row:
    """What a rule may look at."""

    completion: str
    """What the policy said; of rows with gaps but without episodes the whole text, what they were fed (a tool's result) too."""
    columns: dict[str, object]
    ids: list[int] | None
    """Those that the policy drew, the stop token included; None where the texts came without."""
    was_fed: bool
    """The completion holds what the policy did not say."""
    where: str

    def column(self, name: str) -> object:
        if name not in self.columns:
            known = ", ".join(self.columns) or "none"
            raise UserError(f"{self.where}.column: {name!r} is no column of the data (columns: {known})")
        return self.columns[name]


@dataclass(frozen=True)
class RuleReward:
    judge: Callable[[Row], float | None]
    fallback: float
    where: str
    turns: Literal["last", "all"]

    def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        from steerl.reward.types import Failure, has_ids, settle

        have_ids = has_ids(rollout)
        drawn = [ids[mask].tolist() for ids, mask in zip(rollout.response_BR, rollout.action_mask_BR, strict=True)]
        fed = (rollout.actions_B < rollout.lengths_B).tolist()
        completions = texts.completions
        if texts.episodes is not None:
            said = [episode.turns[-1:] if self.turns == "last" else episode.turns for episode in texts.episodes]
            completions = ["\n".join(turn.text for turn in turns) for turns in said]
            drawn = [
                [token for turn in turns for token in ids[turn.first : turn.end]]
                for ids, turns in zip(rollout.response_BR.tolist(), said, strict=True)
            ]
            fed = [False] * len(said)
        values: list[object] = []
        for i, completion in enumerate(completions):
            columns = {name: column[i] for name, column in texts.columns.items()}
            row = Row(completion, columns, drawn[i] if have_ids else None, fed[i], self.where.split(" ")[0])
            try:
                values.append(self.judge(row))
            except _FAILURES as error:
                late = isinstance(error, TimeoutError)
                values.append(Failure("the pattern ran over its time" if late else f"{type(error).__name__}: {error!s:.100}"))
        return settle(values, rollout, self.where, self.fallback)


@dataclass(frozen=True, kw_only=True)
class Rule(Checked):
    """What every rule has."""

    fallback: float = 0.0
    """The score of a row that the rule cannot judge."""
    turns: Literal["last", "all"] = "last"
    """Of an episode the policy's last turn, or all of its turns, a line each."""

    def judge(self, row: Row) -> float | None:
        raise NotImplementedError


def build(rule: Rule, where: str, around: object) -> RewardTerm:
    from steerl.reward.weighted_sum import RewardTerm

    return RewardTerm("", where, 1.0, RuleReward(rule.judge, rule.fallback, where, rule.turns).score)


def _compiled(pattern: str, ignore_case: bool = False) -> regex.Pattern[str]:
    # The regex package, which reads the same patterns as re: its searches can be given a time limit.
    return regex.compile(pattern, regex.IGNORECASE if ignore_case else 0)


def _faults(pattern: str | None) -> list[str]:
    try:
        _compiled(pattern or "")
    except regex.error as error:
        return [f"pattern: {pattern!r} is no regular expression: {error}"]
    return []


def _extracted(text: str, pattern: str | None, timeout: float) -> str | None:
    """What the pattern's first group holds (the whole match without groups) at its last match; None without a match."""
    if pattern is None:
        return text
    matches = list(_compiled(pattern).finditer(text, timeout=timeout))
    if not matches:
        return None
    return matches[-1].group(1) if matches[-1].re.groups else matches[-1].group()


@dataclass(frozen=True, kw_only=True)
class Exact(Rule):
    """The completion is the row's answer, or one of its answers where the column holds a list."""

    column: str = "answer"
    pattern: str | None = None
    """Where the answer stands in the completion: the first group of the last match."""
    ignore_case: bool = False
    strip: bool = True
    """Blanks at both ends do not count."""
    right: float = 1.0
    wrong: float = 0.0
    timeout: float = within(1.0, **SECONDS)
    """Seconds that the pattern may take in a row."""

    def problems(self) -> list[str]:
        return _faults(self.pattern)

    def judge(self, row: Row) -> float | None:
        answer = row.column(self.column)
        if answer is None:
            return None
        accepted = [self._plain(str(a)) for a in (answer if isinstance(answer, list | tuple) else [answer])]
        given = _extracted(row.completion, self.pattern, self.timeout)
        return self.right if given is not None and self._plain(given) in accepted else self.wrong

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True, kw_only=True)
class Numeric(Rule):
    """A number of the completion equals the row's, which is a number or a text whose last number counts."""

    column: str = "answer"
    pattern: str | None = None
    """Where to look: the first group of the last match."""
    which: Literal["last", "first"] = "last"
    """Which number of the completion counts."""
    tolerance: float = within(0.0, low=0)
    relative: float = within(0.0, low=0)
    """Allowed distance, absolute and as a share of the answer; the larger counts."""
    right: float = 1.0
    wrong: float = 0.0
    timeout: float = within(1.0, **SECONDS)

    def problems(self) -> list[str]:
        return _faults(self.pattern)

    def judge(self, row: Row) -> float | None:
        answer = row.column(self.column)
        if answer is None:
            return None
        wanted = numbers_in(str(answer))
        if not wanted or isinstance(answer, bool):
            raise ValueError(f"the answer {answer!r:.60} holds no number")
        found = numbers_in(_extracted(row.completion, self.pattern, self.timeout) or "")
        if not found:
            return self.wrong
        given = found[-1 if self.which == "last" else 0]
        allowed = max(Fraction(str(self.tolerance)), Fraction(str(self.relative)) * abs(wanted[-1]))
        return self.right if abs(given - wanted[-1]) <= allowed else self.wrong


@dataclass(frozen=True, kw_only=True)
class Regex(Rule):
    """The completion matches a regular expression."""

    pattern: str
    mode: Literal["search", "match", "fullmatch"] = "search"
    """Anywhere, from the beginning, or the whole completion."""
    ignore_case: bool = False
    right: float = 1.0
    wrong: float = 0.0
    timeout: float = within(1.0, **SECONDS)
    """Seconds that the pattern may take in a row."""

    def problems(self) -> list[str]:
        return _faults(self.pattern)

    def judge(self, row: Row) -> float | None:
        pattern = _compiled(self.pattern, self.ignore_case)
        return self.right if getattr(pattern, self.mode)(row.completion, timeout=self.timeout) else self.wrong


_FENCE = re.compile(r"\A\s*```(?:json)?[ \t]*\n(.*?)\n?```\s*\Z", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Json(Rule):
    """The completion is one JSON value, by the standard (NaN and Infinity are none)."""

    keys: list[str] | None = None
    """The value must be an object with these keys."""
    fence: bool = False
    """A code fence around the value is allowed."""
    right: float = 1.0
    wrong: float = 0.0

    def judge(self, row: Row) -> float | None:
        fenced = _FENCE.match(row.completion) if self.fence else None
        try:
            # Numbers stay text: a whole number of 5,000 digits is JSON, though Python would not read it.
            value = json.loads(fenced[1] if fenced else row.completion, parse_constant=_refuse, parse_int=str)
        except json.JSONDecodeError:
            return self.wrong
        except ValueError:  # _refuse
            return self.wrong
        if self.keys is not None and not (isinstance(value, dict) and all(key in value for key in self.keys)):
            return self.wrong
        return self.right


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


Unit = Literal["tokens", "words", "characters"]


def _pieces(row: Row, unit: Unit) -> list[Any]:
    if row.was_fed and unit != "tokens":
        told = "but the row's text also holds what it was fed (a tool's result, a later user turn)"
        raise UserError(f"{row.where}.unit: {unit}, {told}; use tokens, of which the policy's own are counted")
    if unit == "words":
        return row.completion.split()
    if unit == "characters":
        return list(row.completion)
    if row.ids is None:
        raise UserError(f"{row.where}.unit: tokens, but these texts come without ids; use words or characters")
    return row.ids


@dataclass(frozen=True, kw_only=True)
class Length(Rule):
    """1 inside the window; outside 0, or falling to 0 over `soft` units."""

    min: int = within(0, low=0)
    max: int | None = None
    unit: Unit = "tokens"
    """tokens: those that the policy drew, the stop token included."""
    soft: int = within(0, low=0)
    turns: Literal["last", "all"] = "all"

    def problems(self) -> list[str]:
        if self.max is None and self.min == 0:
            return ["max: missing, and min is 0: every length would be right; set one of them"]
        too_low = self.max is not None and self.max < self.min
        return [f"max: expected at least min = {self.min}, found {self.max}"] if too_low else []

    def judge(self, row: Row) -> float | None:
        length = len(_pieces(row, self.unit))
        outside = max(self.min - length, 0 if self.max is None else length - self.max, 0)
        return 1.0 if outside == 0 else max(0.0, 1.0 - outside / self.soft) if self.soft else 0.0


@dataclass(frozen=True, kw_only=True)
class Repetition(Rule):
    """The share of n-grams that are new where they stand: 1 without repetition, near 0 for a loop."""

    n: int = within(3, low=1)
    unit: Unit = "words"
    turns: Literal["last", "all"] = "all"

    def judge(self, row: Row) -> float | None:
        pieces = _pieces(row, self.unit)
        grams = [tuple(pieces[i : i + self.n]) for i in range(len(pieces) - self.n + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0


@dataclass(frozen=True, kw_only=True)
class Keywords(Rule):
    """How many of the words the completion has."""

    words: list[str]
    count: Literal["distinct", "all"] = "distinct"
    """distinct: each word once. all: every time it stands there."""
    cap: int | None = within(None, low=1)
    """The most that is counted."""
    ignore_case: bool = True
    whole_words: bool = True

    def problems(self) -> list[str]:
        right = bool(self.words) and all(word.strip() for word in self.words)
        return [] if right else [f"words: expected words, found {list(self.words)}"]

    def judge(self, row: Row) -> float | None:
        found: Counter[str] = Counter()
        for word in dict.fromkeys(w.casefold() if self.ignore_case else w for w in self.words):
            text = row.completion.casefold() if self.ignore_case else row.completion
            edges = (r"(?<!\w)", r"(?!\w)") if self.whole_words else ("", "")
            found[word] = len(re.findall(edges[0] + re.escape(word) + edges[1], text))
        total = sum(found.values()) if self.count == "all" else sum(1 for times in found.values() if times)
        return float(total if self.cap is None else min(total, self.cap))
