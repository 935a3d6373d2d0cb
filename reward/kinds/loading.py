"""Finding a user's reward function, and keeping what a call of it gave. Light on purpose: worker processes import it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerl.rollout.common import loading
from steerl.rollout.common.errors import visible

LOGS = ("log_metric", "log_extra")
"""What TRL hands to functions that want to log."""
MOVED = {"reward.rouge": "steerl.reward.kinds.rouge"}
"""Names of before, in configs of users."""


def load_function(spec: str, where: str) -> Any:
    return loading.load_function(spec, f"{where}.function", MOVED)


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
