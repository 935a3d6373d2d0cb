"""The `reward:` list: every problem of it at once, a line each with its dotted path."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from steerl.reward.build import KINDS, Common, build_reward, read_terms
from steerl.rollout.common.errors import UserError
from tests.reward.rows import made

ROOT = Path(__file__).parents[2]


def lines(parts) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        build_reward(parts)
    return caught.value.lines


def test_all_problems_of_a_list_are_told_together():
    found = lines(
        [
            {"kind": "functoin", "function": "a.py:b"},
            {"kind": "regex", "patern": "x", "weight": "heavy"},
            {"kind": "length", "max": 3, "unit": "word", "name": "mean"},
            "regex",
            {"weight": 2},
            {"kind": "regex", "pattern": "("},
            {"kind": "keywords", "words": ["a"], "weight": float("nan"), "clip": [2, 1], "normalise": "batch"},
        ]
    )
    expected = [
        "reward[0].kind: unknown value 'functoin'; did you mean function?",
        "reward[1].patern: unknown (value 'x'); did you mean pattern?",
        "reward[1].weight: expected a number, found 'heavy'",
        "reward[1].pattern: missing; give text",
        "reward[2].unit: unknown value 'word'; did you mean words?",
        "reward[3]: expected a mapping, found 'regex'",
        "reward[4].kind: missing; choose one of function, model,",
        "reward[5].pattern: '(' is no regular expression",
        "reward[6].weight: expected a number, found nan",
    ]
    for text in expected:
        assert any(line.startswith(text) for line in found), text
    assert all("\n" not in line for line in found)


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ({"kind": "length", "max": 3, "name": "total"}, "reward[0].name: 'total' cannot be a part's name"),
        ({"kind": "length", "max": 3, "name": "a/b"}, "reward[0].name: 'a/b' cannot be a part's name"),
        ({"kind": "length", "max": 3, "name": "a\x1b[2J"}, "reward[0].name: 'a\\x1b[2J' cannot be a part's name"),
        ({"kind": "length", "max": 3, "clip": [2, 1]}, "reward[0].clip: expected [low, high]"),
        ({"kind": "length", "max": 3, "normalise": "batch"}, "reward[0].normalise: unknown value 'batch'"),
        ({"kind": "length", "max": 3, "normalise": {"mean": 0, "std": 0}}, "reward[0].normalise.std: expected more than 0"),
        ({"kind": "length", "max": True}, "reward[0].max: expected a whole number or null, found True"),
        ({"kind": "length"}, "reward[0].max: missing, and min is 0"),
        ({"kind": "model", "path": []}, "reward[0].path: empty"),
        ({"kind": "model", "path": "x", "combine": "min"}, "reward[0].combine: without effect on one model"),
        ({"kind": "http", "url": "localhost:80"}, "reward[0].url: expected http://host:port"),
        ({"kind": "function", "function": "rewards.py"}, "reward[0].function: expected file.py:name"),
        ({"kind": "function", "function": "no/such.py:f"}, "reward[0] (function).function: there is no file no/such.py"),
        (
            {"kind": "function", "function": "no_such_module:f"},
            "reward[0] (function).function: there is no module 'no_such_module'",
        ),
        ({"kind": "function", "function": "math:sinn"}, "reward[0] (function).function: math has no 'sinn'; did you mean sin?"),
        ({"kind": "function", "function": "math:pi"}, "reward[0] (function).function: math:pi is a float, not a function"),
    ],
)
def test_bad_parts(part, line):
    assert any(found.startswith(line) for found in lines([part])), lines([part])


def test_an_empty_list_and_no_list():
    assert lines([])[0].startswith("reward: empty; name at least one part")
    assert lines("length")[0].startswith("reward: expected a list")


def test_names_are_the_kinds_unless_given_and_never_twice():
    parts = [{"kind": "length", "max": 3}, {"kind": "length", "max": 5}, {"kind": "length", "max": 9, "name": "length_2"}]
    reward = build_reward(parts)
    assert [term.name for term in reward.terms] == ["length", "length_3", "length_2"]
    found = lines([{"kind": "length", "max": 3, "name": "a"}, {"kind": "length", "max": 4, "name": "a"}])
    assert found == ("reward[1].name: 'a' is the name of reward[0] already; choose another",)


def test_a_function_as_it_stands_is_a_part():
    def shout(completions):
        return [float(text.isupper()) for text in completions]

    reward = build_reward(shout)
    assert [term.name for term in reward.terms] == ["shout"]
    assert reward(*made(["A", "b"])).total_B.tolist() == [1.0, 0.0]


def test_the_shipped_list_of_kinds_is_complete_and_at_the_defaults():
    shipped = yaml.safe_load((ROOT / "configs" / "rewards.yaml").read_text())["reward"]
    assert [part["kind"] for part in shipped] == list(dict.fromkeys(part["kind"] for part in shipped))
    assert {part["kind"] for part in shipped} == set(KINDS)
    common = {spot.name for spot in dataclasses.fields(Common)}
    assert common <= set(shipped[0])
    for part in shipped:
        spots = dataclasses.fields(KINDS[part["kind"]][0])
        assert set(part) - common == {spot.name for spot in spots}, part["kind"]
        for spot in spots:
            if spot.default is not dataclasses.MISSING and (part["kind"], spot.name) != ("length", "max"):
                assert part[spot.name] == spot.default, (part["kind"], spot.name)
    read_terms(shipped)
