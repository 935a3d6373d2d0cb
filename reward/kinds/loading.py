"""Finding a user's reward function, and keeping what a call of it gave. Light on purpose: worker processes import it."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerl.rollout.common import loading
from steerl.rollout.common.errors import UserError, said, visible

LOGS = ("log_metric", "log_extra")
"""What TRL hands to functions that want to log."""
MOVED = {"reward.rouge": "steerl.reward.kinds.rouge"}
"""Names of before, in configs of users."""


def load_function(spec: str, where: str) -> Any:
    return loading.load_function(spec, f"{where}.function", MOVED)


def with_arguments(function: Callable[..., Any], arguments: Mapping[str, object], where: str) -> functools.partial[Any]:
    """The reward function with its further arguments. What makes one, a class or, as TRL's get_soft_overlong_punishment, a
    function that says `-> Callable`, is called with them here."""
    try:
        makes = inspect.isclass(function) or "Callable" in str(inspect.signature(function).return_annotation)
    except (TypeError, ValueError):
        makes = False
    if not makes:
        return functools.partial(function, **arguments)
    try:
        made = function(**arguments)
    except Exception as error:  # the user's own code may raise anything; told with the term
        raise UserError(f"{where}.arguments: {function.__name__} makes no reward function of them: {said(error)}") from error
    if not callable(made):
        raise UserError(
            f"{where}.function: {function.__name__} makes a {type(made).__name__}, which cannot be called with rows"
        )
    return functools.partial(made)


@dataclass
class CallResult:
    """What a function gave for some rows, and what it logged meanwhile."""

    rows: int
    result: object = None
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[object]] = field(default_factory=dict)

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.setdefault(visible(str(name)), []).append(float(value))

    def log_extra(self, column: str, values: Iterable[object]) -> None:
        plain = (value if isinstance(value, str | int | float | None) else str(value) for value in values)
        self.extra.setdefault(visible(str(column)), []).extend(itertools.islice(plain, self.rows + 1))

    def log(self, names: Sequence[str]) -> dict[str, object]:
        return {name: getattr(self, name) for name in names}

    def take(self, result: object) -> CallResult:
        """Keep a result; of a list, a tensor or what may never end (a generator) no more than shows that it is too much."""
        if not isinstance(result, str | bytes | dict) and hasattr(result, "__iter__") and getattr(result, "ndim", 1) != 0:
            result = list(itertools.islice(result, self.rows + 1))
        self.result = result
        return self
