"""Fields: one mapping of a spec, read field by field; what is wrong goes to a shared list, a line per problem.

Every line says where (dotted path), what was found and what to write instead. Unknown keys are reported by `done`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

MOST = 3e38
VECTOR_KEYS = ("file", "folder", "mean_diff", "init", "values", "std", "key", "normalise")
VECTOR_SOURCES = ("file", "folder", "mean_diff", "init", "values")


class Fields:
    """Reads one mapping. `problems` is shared by all mappings of one spec and raised once by the reader."""

    def __init__(self, raw: Any, path: str, problems: list[str]):
        self.path, self.problems, self.seen = path, problems, set[str]()
        if not isinstance(raw, Mapping):
            problems.append(f"{path}: expected a mapping, found {raw!r}")
            raw = {}
        # YAML 1.1 reads the bare key `on` as True.
        self.values: dict[str, Any] = {"on" if k is True else str(k): v for k, v in raw.items()}

    def problem(self, name: str, text: str) -> None:
        path = ".".join(part for part in (self.path.removeprefix("steering"), name) if part)
        self.problems.append(f"{path or 'steering'}: {text}")

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def drop(self, name: str) -> None:
        self.seen.add(name)

    def raw(self, name: str) -> Any:
        self.seen.add(name)
        return self.values.get(name)

    def done(self) -> None:
        """Report the keys that nobody asked for."""
        for name in self.values:
            if name not in self.seen:
                close = difflib.get_close_matches(name, sorted(self.seen), n=1)
                remedy = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(self.seen))}"
                self.problem(name, f"unknown key; {remedy}")

    # -- kinds of fields ---------------------------------------------------------------------------------------------

    def section(self, name: str, required: str = "") -> Fields | None:
        value = self.raw(name)
        if value is None:
            if required:
                self.problem(name, f"missing; {required}")
            return None
        inner = ".".join(part for part in (self.path.removeprefix("steering"), name) if part)
        return Fields(value, inner, self.problems)

    def list(self, name: str, required: str) -> list[Any]:
        value = self.raw(name)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            self.problem(name, f"expected a list with {required}, found {value!r}")
            return []
        return list(value)

    def text(self, name: str, default: str) -> str:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, str):
            self.problem(name, f"expected text, found {value!r}")
            return default
        return value

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        value = self.raw(name)
        if value is None:
            return default
        if value not in choices:
            close = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            self.problem(name, f"expected one of {', '.join(choices)}, found {value!r}{hint}")
            return default or choices[0]
        return str(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.problem(name, f"expected true or false, found {value!r}")
            return default
        return value

    def check_number(self, name: str, value: Any, low: float | None = None, high: float | None = None) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MOST:
            large = f" that float32 holds (at most {MOST:g} in size)" if isinstance(value, int | float) else ""
            self.problem(name, f"expected a number{large}, found {value!r:.80}")
            return 1.0
        if (low is not None and value < low) or (high is not None and value > high):
            span = f"{low:g} to {high:g}" if low is not None and high is not None else f"at least {low:g}"
            self.problem(name, f"expected {span}, found {value:g}")
        return float(value)

    def number(self, name: str, default: float | None, low: float | None = None, high: float | None = None) -> float:
        value = self.raw(name)
        if value is None:
            if default is None:
                self.problem(name, "missing; give a number")
            return 0.0 if default is None else default
        return self.check_number(name, value, low, high)

    def integer(self, name: str, default: int | None, low: int | None = None) -> int:
        value = self.raw(name)
        if value is None:
            if default is None:
                self.problem(name, "missing; give a whole number")
            return 0 if default is None else default
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(name, f"expected a whole number, found {value!r}")
            return default or 0
        if low is not None and value < low:
            self.problem(name, f"expected at least {low}, found {value}")
        return value

    def integers(self, name: str, value: Any, required: str, low: int | None = None) -> tuple[int, ...]:
        good = isinstance(value, Sequence) and not isinstance(value, str)
        if not good or not value or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            self.problem(name, f"expected a list of whole numbers{f' ({required})' if required else ''}, found {value!r}")
            return ()
        if low is not None and min(value) < low:
            self.problem(name, f"expected numbers from {low} on, found {min(value)}")
        return tuple(value)

    def tokens(self, name: str) -> tuple[int | str, ...]:
        value = self.raw(name)
        if value is None:
            return ()
        value = [value] if isinstance(value, int | str) else value
        if not isinstance(value, Sequence) or any(isinstance(v, bool) or not isinstance(v, int | str) for v in value):
            self.problem(name, f"expected token ids or names (eos, bos, pad, a token), found {value!r}")
            return ()
        return tuple(value)

    def positions(self, name: str, default: str, words: Sequence[str], *, negative: bool) -> Any:
        """A word, a list of ints (always positions), or a mapping: window, every (steps), column (prompt)."""
        value = self.raw(name)
        if value is None:
            return default
        if isinstance(value, str):
            return self.choice(name, words, default)
        if isinstance(value, Mapping):
            return self._rule(name, value, negative)
        if isinstance(value, int) and not isinstance(value, bool):
            value = [value]
        if not isinstance(value, Sequence) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
            self.problem(name, f"expected {', '.join(words)}, a list of positions or a mapping, found {value!r}")
            return default
        if not value:
            self.problem(name, f"selects nothing (an empty list); write none, or positions; choices: {', '.join(words)}")
            return "all"
        elif not negative and min(value) < 0:
            self.problem(name, f"steps count from 0 on, found {min(value)}; positions from the prompt's end go under prompt")
        return tuple(value)

    def _rule(self, name: str, value: Mapping[str, Any], negative: bool) -> Any:
        kinds = ("window", "column") if negative else ("window", "every")
        if len(value) != 1 or next(iter(value)) not in kinds:
            self.problem(name, f"expected one of {{{kinds[0]}: ...}} and {{{kinds[1]}: ...}}, found {dict(value)!r}")
            return "none"
        kind, inner = next(iter(value.items()))
        path = f"{name}.{kind}"
        if kind == "column":
            if not isinstance(inner, str) or not inner:
                self.problem(path, f"expected a column's name, found {inner!r}")
            return {"column": inner}
        if kind == "every":
            if isinstance(inner, bool) or not isinstance(inner, int) or inner < 1:
                self.problem(path, f"expected a whole number from 1 on, found {inner!r}")
                return {"every": 1}
            return {"every": inner}
        good = isinstance(inner, Sequence) and not isinstance(inner, str) and len(inner) == 2
        if not good or any(isinstance(v, bool) or not isinstance(v, int) for v in inner):
            self.problem(path, f"expected two whole numbers [a, b), found {inner!r}")
            return {"window": (0, 1)}
        start, end = inner
        if not negative and start < 0:
            self.problem(path, f"steps count from 0 on, found {start}")
        elif (start >= 0) == (end >= 0) and start >= end:
            self.problem(path, f"selects nothing: the window [{start}, {end}) is empty (its end is left out)")
        return {"window": (start, end)}

    def vector(self, name: str) -> Any:
        """{file: ...}, {folder: ...}, {mean_diff: ...}, {init: ...}, {values: [...]}, or the list itself."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, str):
            return {"file": value}
        if isinstance(value, Sequence):
            value = {"values": list(value)}
        if not isinstance(value, Mapping):
            self.problem(name, f"expected {{file: PATH}}, {{mean_diff: PAIRS}}, {{init: zeros}} or numbers, found {value!r}")
            return None
        inner = Fields(value, ".".join(p for p in (self.path.removeprefix("steering"), name) if p), self.problems)
        sources = [k for k in VECTOR_SOURCES if inner.has(k)]
        if len(sources) != 1 and not set(inner.values) - set(VECTOR_KEYS):
            inner.problem("", f"expected one of {', '.join(VECTOR_SOURCES)}, found {sorted(value)!r}")
        if inner.has("init"):
            inner.choice("init", ("zeros", "normal"), "zeros")
        elif inner.has("std"):
            inner.problem("std", "goes with init: normal")
        inner.number("std", 0.02, low=0.0)
        for key in VECTOR_KEYS:
            inner.drop(key)
        inner.done()
        return dict(value)
