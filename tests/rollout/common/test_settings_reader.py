"""The reader of settings by itself: types, ranges, names in the mapping, what is missing, and that all of it is told at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.common.settings_reader import Checked, Reader, convert, whole_numbers, within


@dataclass(frozen=True)
class Inner(Checked):
    start: float = within(0.0, key="from", low=0.0, high=1.0)
    steps: int = within(1, low=1)
    kind: str = within("a", choices=("a", "bee"))

    def problems(self) -> list[str]:
        return ["steps: odd"] if self.steps % 2 and self.start else []


@dataclass(frozen=True)
class Outer:
    inner: Inner
    others: list[Inner] = field(default_factory=list)
    spot: tuple[int, ...] = within((), read=whole_numbers("places", single=True, word="all"), missing="say where")
    mode: Literal["x", "y"] = "x"
    size: int | float | None = within(None, above=0)
    free: dict[str, Any] = field(default_factory=dict)
    hidden: str = within("", key="")


def read(mapping: Any) -> tuple[Any, list[str]]:
    reader = Reader([])
    return reader.read(Outer, mapping, ("job",)), reader.problems


def test_a_right_mapping_becomes_the_dataclass() -> None:
    job, problems = read(
        {"inner": {"from": 1, "steps": 2}, "others": [{"kind": "bee"}], "spot": 3, "size": 4, "free": {"a": [1]}}
    )
    assert problems == []
    assert job == Outer(Inner(1.0, 2), [Inner(kind="bee")], (3,), "x", 4, {"a": [1]})
    assert isinstance(job.inner.start, float) and isinstance(job.size, int)


def test_everything_that_is_wrong_is_told_with_its_path() -> None:
    job, problems = read(
        {
            "inner": {"from": 2.0, "step": 3, "kind": "be"},
            "others": [{"steps": 0}, {"steps": True}, 5, {"from": 0.5}],
            "mode": "z", "size": 0, "free": {1: 2}, "hidden": "x",
        }
    )  # fmt: skip
    assert job is None
    expected = [
        "job.inner.from: expected 0 to 1, found 2", "job.inner.step: unknown (value 3); did you mean steps?",
        "job.inner.kind: expected one of a, bee, found 'be'; did you mean bee?", "job.others[0].steps: expected at least 1, found 0",
        "job.others[1].steps: expected a whole number, found True", "job.others[2]: expected a mapping, found 5",
        "job.others[3].steps: odd", "job.mode: expected one of x, y, found 'z'; choose x or y", "job.size: expected more than 0, found 0",
        "job.free: expected a mapping, found {1: 2}", "job.hidden: unknown (value 'x')", "job.spot: missing; say where",
    ]  # fmt: skip
    assert len(problems) == len(expected)
    assert all(any(line.startswith(begin) for line in problems) for begin in expected), problems


def test_ranges_and_rules_hold_for_objects_too() -> None:
    with pytest.raises(ConfigError) as caught:
        Inner(start=0.5, steps=-1)
    assert caught.value.lines == ("steps: expected at least 1, found -1", "steps: odd")


@pytest.mark.parametrize(
    ("wanted", "value", "fits", "result"),
    [
        (float, 3, True, 3.0), (int, 3.0, False, 3.0), (int, True, False, True), (float, float("nan"), False, None),
        (float, 10**400, False, 10**400), (int | float, 3, True, 3), (float | None, None, True, None), (str, 3, False, 3),
        (list[float], (1, 2), True, [1.0, 2.0]), (tuple[int, ...], [1], True, (1,)), (dict[str, int], {"a": "b"}, False, {"a": "b"}),
        (Literal[1, "a"], True, False, True), (Literal["a"], "a", True, "a"), (Any, object, True, object),
    ],
)  # fmt: skip
def test_convert(wanted: Any, value: Any, fits: bool, result: Any) -> None:
    found = convert(wanted, value)
    assert found[0] is fits
    assert result is None or (found[1] == result and type(found[1]) is type(result))


def test_our_error_is_no_value_error() -> None:
    assert not issubclass(UserError, ValueError) and issubclass(ConfigError, UserError)
