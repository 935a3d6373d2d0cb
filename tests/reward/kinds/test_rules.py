"""The rules, held against tables written by hand."""

from __future__ import annotations

import logging
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerl.reward.build import build_reward
from steerl.reward.kinds.numbers import numbers_in
from steerl.rollout.common.errors import UserError
from steerl.rollout.types import Rollout
from tests.episodes import ids_of, samples_of, talk
from tests.reward.rows import episodes, made


def score(part: dict, completions: list[str], **columns) -> list[float]:
    return build_reward([part])(*made(completions, **columns)).total_B.tolist()


def test_exact_answers():
    part = {"kind": "exact", "column": "reply"}
    assert score(part, [" yes\n", "Yes", "no"], reply=["yes", "yes", "yes"]) == [1.0, 0.0, 0.0]
    assert score({**part, "ignore_case": True, "right": 2.0, "wrong": -1.0}, ["YES", "no"], reply=["yes", "yes"]) == [2.0, -1.0]
    assert score({**part, "strip": False}, [" yes", "yes"], reply=["yes", "yes"]) == [0.0, 1.0]
    assert score(part, ["b", "c"], reply=[["a", "b"], ["a", "b"]]) == [1.0, 0.0]
    assert score(part, ["4", "5"], reply=[4, 4]) == [1.0, 0.0]
    assert score({**part, "pattern": r"<a>(.*?)</a>"}, ["<a>x</a> <a>y</a>", "<a>x</a>", "y"], reply=["y"] * 3) == [
        1.0,
        0.0,
        0.0,
    ]


def test_a_row_without_an_answer_is_not_judged():
    zero = {"kind": "regex", "pattern": "z"}
    scores = build_reward([{"kind": "exact"}, zero])(*made(["a", "b"], answer=["a", None]))
    assert scores.parts["exact"][0] == 1.0 and scores.parts["exact"][1].isnan()


@pytest.mark.parametrize("kind", ["exact", "numeric"])
def test_a_column_that_is_not_there(kind):
    with pytest.raises(UserError, match=r"reward\[0\].column: 'answer' is no column of the data \(columns: reply\)"):
        score({"kind": kind}, ["a"], reply=["a"])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("1,234.50 and -3", ["1234.5", "-3"]),
        ("x=-3, 5-3", ["-3", "5", "3"]),
        ("2024-05-06", ["2024", "5", "6"]),
        (r"3/4 or \frac{3}{4} or -\dfrac{1}{2}", ["3/4", "3/4", "-1/2"]),
        (".5 2e-3 1.5.", ["1/2", "1/500", "3/2"]),
        ("$1,000,000 12,34 10%", ["1000000", "12", "34", "10"]),
        ("\u22127 +8", ["-7", "8"]),
        ("1/0 " + "9" * 500, []),
        ("none at all", []),
        ("x2 a1.5", ["2", "3/2"]),
        # fractions as they are typeset
        (r"\frac12 \frac 3 4 \frac1{20} \tfrac{10}7 \cfrac{1}{2}", ["1/2", "3/4", "1/20", "10/7", "1/2"]),
        (r"\frac{-1}{2} -\frac{1}{2} -\frac{-1}{2} \frac{1}{-2}", ["-1/2", "-1/2", "1/2", "-1/2"]),
        (r"\frac{1,000}{3} \frac{2.5}{0.5} \frac{ 7 }{ 8 }", ["1000/3", "5", "7/8"]),
        (r"\frac{2x}{3} \frac{x}{5} \frac{1}{0} x\frac12", ["2", "3", "5", "1/2"]),
        (r"5-\frac{1}{2} and 2\cdot\frac12", ["5", "1/2", "2", "1/2"]),
        # mixed numbers
        ("1\\frac{1}{2} -1\\frac12 2 \\frac{3}{4} \u22122\\dfrac{1}{3}", ["3/2", "-3/2", "11/4", "-7/3"]),
        (r"10\frac{3}{2} 1.5\frac12 3\frac{-1}{2} 2\frac{1}{0}", ["10", "3/2", "3/2", "1/2", "3", "-1/2", "2"]),
        ("1 1/2 cups, -2 3/4, 12 5/4, 5 1/2/2024", ["3/2", "-11/4", "12", "5/4", "5", "1/2", "2024"]),
        # thousands
        ("10 000, 10\u00a0000; 10\u2009000: 10\u202f000!", ["10000"] * 4),
        ("-1 234 567.5 and \u22123 400 (12 345)", ["-2469135/2", "-3400", "12345"]),
        (r"10{,}000; 10\,000; 1,\!234,\!567", ["10000", "10000", "1234567"]),
        ("1 000/3; 3 400/500", ["1000/3", "34/5"]),
        (
            "in 2024 100 people, 5 100 4, 0 500, 10 0000, 1 234,56",
            ["2024", "100", "5", "100", "4", "0", "500", "10", "0", "1", "234", "56"],
        ),
        ("10  000 and 10\n000", ["10", "0", "10", "0"]),
    ],
)
def test_numbers_of_a_text(text, numbers):
    assert numbers_in(text) == [Fraction(n) for n in numbers]


@given(st.integers(-(10**12), 10**12), st.decimals(-(10**6), 10**6, places=4))
def test_numbers_are_read_as_they_are_written(whole, decimal):
    assert numbers_in(f"first {whole:,} then {decimal} !") == [Fraction(whole), Fraction(str(decimal))]


def test_numeric_answers():
    part = {"kind": "numeric"}
    answers = ["#### 1,200", 1200, 1200.0]
    assert score(part, ["so 3 x 400 = 1200.", "1,200", "it is 1.2e3"], answer=answers) == [1.0, 1.0, 1.0]
    assert score(part, ["1200 or 7", "none", ""], answer=answers) == [0.0, 0.0, 0.0]
    assert score({**part, "which": "first"}, ["1200 or 7"], answer=[1200]) == [1.0]
    assert score(part, ["0.1"], answer=[0.1]) == [1.0]  # exactly, not 0.1000000000000000055
    assert score({**part, "tolerance": 0.1}, ["2.9", "3.1", "3.11"], answer=[3, 3, 3]) == [1.0, 1.0, 0.0]
    assert score({**part, "relative": 0.01}, ["101", "101.1", "-101"], answer=[100, 100, -100]) == [1.0, 0.0, 1.0]
    assert score({**part, "pattern": r"\\boxed\{(.*?)\}"}, [r"2 \boxed{5} 7", "5"], answer=[5, 5]) == [1.0, 0.0]


@pytest.mark.parametrize("answer", ["1.5", "3/2", "1 1/2", r"1\frac{1}{2}", r"\frac32"])
@pytest.mark.parametrize("said", ["1.50", "3/2", "1 1/2", r"$1\frac12$.", r"\boxed{\dfrac{3}{2}}", r"\frac{1,500}{1 000}"])
def test_a_number_is_right_however_it_is_written(said, answer):
    assert score({"kind": "numeric"}, [said, said], answer=[answer, "-" + answer]) == [1.0, 0.0]


def test_an_answer_without_a_number_gets_the_fallback(caplog):
    with caplog.at_level(logging.WARNING):
        assert score({"kind": "numeric", "fallback": 0.5}, ["3", "3"], answer=["three", 3]) == [0.5, 1.0]
    assert "row 10 sample 0: ValueError: the answer 'three' holds no number" in caplog.text


def test_patterns():
    part = {"kind": "regex", "pattern": r"go+d"}
    assert score(part, ["so good!", "bad", "GOD"]) == [1.0, 0.0, 0.0]
    assert score({**part, "ignore_case": True}, ["GOD"]) == [1.0]
    assert score({**part, "mode": "match"}, ["good!", "so good"]) == [1.0, 0.0]
    assert score({**part, "mode": "fullmatch", "right": -1.0, "wrong": 1.0}, ["good", "good!"]) == [-1.0, 1.0]


def test_a_pattern_that_runs_away_is_stopped_and_told(caplog):
    part = {"kind": "regex", "pattern": r"(a|aa)+$", "timeout": 0.2, "fallback": -2.0}
    with caplog.at_level(logging.WARNING):
        assert score(part, ["aaa", "a" * 60 + "b", "a"]) == [1.0, -2.0, 1.0]
    assert "1 of 3 rows got the fallback -2.0: row 11 sample 0: the pattern ran over its time" in caplog.text


def test_json():
    texts = ['{"a": 1}', "[1, 2", "NaN", "7" * 6000, '"x" y', "", "null", '```json\n{"a": 1}\n```']
    assert score({"kind": "json"}, texts) == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert score({"kind": "json", "fence": True}, texts[-1:]) == [1.0]
    assert score({"kind": "json", "keys": ["a", "b"]}, ['{"a": 1, "b": 2}', '{"a": 1}', '["a", "b"]']) == [1.0, 0.0, 0.0]


def test_json_too_deep_for_the_reader_gets_the_fallback(caplog):
    with caplog.at_level(logging.WARNING):
        assert score({"kind": "json", "fallback": -1.0}, ["[" * 200_000, "[]"]) == [-1.0, 1.0]
    assert "RecursionError" in caplog.text


def test_lengths():
    part = {"kind": "length", "min": 2, "max": 3, "unit": "words"}
    assert score(part, ["a", "a b", "a b c", "a b c d", ""]) == [0.0, 1.0, 1.0, 0.0, 0.0]
    assert score({**part, "soft": 4}, ["a", "a b c d", "a b c d e f g", "a b c d e f g h"]) == [0.75, 0.75, 0.0, 0.0]
    assert score({"kind": "length", "max": 3, "unit": "characters"}, ["abc", "abcd"]) == [1.0, 0.0]
    assert score({"kind": "length", "min": 3}, ["abc", "ab"]) == [1.0, 0.0]  # tokens: an id per character here


def test_tokens_cannot_be_counted_where_there_are_none():
    _, texts = made(["abc"])
    with pytest.raises(UserError, match=r"reward\[0\].unit: tokens, but these texts come without ids"):
        build_reward([{"kind": "length", "max": 3}])(Rollout.of_ids([[]], [[]]), texts)


def test_only_what_the_policy_drew_is_counted():
    """Against the rows with what they were fed cut out. A text's words cannot be told apart so."""
    rollout, texts = episodes(["ababXYZab", "abc"], ["111100011", "111"])
    cut, cut_texts = made(["ababab", "abc"])
    for rule in ({"kind": "length", "max": 4, "soft": 10}, {"kind": "repetition", "n": 2, "unit": "tokens"}):
        found, expected = build_reward([rule])(rollout, texts).total_B, build_reward([rule])(cut, cut_texts).total_B
        assert found.tolist() == expected.tolist() and len(set(found.tolist())) == 2
    with pytest.raises(UserError, match=r"reward\[0\].unit: words, but the row's text also holds what it was fed"):
        build_reward([{"kind": "repetition"}])(rollout, texts)


def test_repetition():
    part = {"kind": "repetition", "n": 2}
    assert score(part, ["a b c d", "a b a b a", "a", ""]) == [1.0, 0.5, 1.0, 1.0]
    assert score({"kind": "repetition", "n": 1, "unit": "characters"}, ["aaab"]) == [0.5]


def test_keywords():
    part = {"kind": "keywords", "words": ["good", "very good", "C++"]}
    assert score(part, ["a very good film, good!", "goods", "Good C++ code", "bad"]) == [2.0, 0.0, 2.0, 0.0]
    assert score({**part, "count": "all"}, ["good good very good"]) == [4.0]
    assert score({**part, "count": "all", "cap": 2}, ["good good very good"]) == [2.0]
    assert score({**part, "ignore_case": False}, ["Good"]) == [0.0]
    assert score({**part, "whole_words": False}, ["goods"]) == [1.0]


# -- episodes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize(
    ("part", "last", "every"),
    [
        ({"kind": "exact", "column": "reply"}, 0.0, 0.0),
        ({"kind": "exact", "column": "said"}, 1.0, 0.0),
        ({"kind": "exact", "column": "whole"}, 0.0, 1.0),
        ({"kind": "numeric"}, 0.0, 0.0),
        ({"kind": "numeric", "column": "six"}, 1.0, 1.0),
        ({"kind": "numeric", "column": "two", "which": "first"}, 0.0, 1.0),
        ({"kind": "regex", "pattern": "good|yes|5"}, 0.0, 0.0),
        ({"kind": "regex", "pattern": "add(.|\n)*then"}, 0.0, 1.0),
        ({"kind": "json", "right": 1.0}, 0.0, 0.0),
        ({"kind": "keywords", "words": ["good", "yes", "no", "then"]}, 1.0, 2.0),
        ({"kind": "length", "min": 6, "max": 6}, 1.0, 0.0),
        ({"kind": "length", "min": 19, "max": 19}, 0.0, 1.0),
        ({"kind": "length", "min": 7, "max": 7, "unit": "words"}, 0.0, 1.0),
        ({"kind": "length", "min": 6, "max": 6, "unit": "characters"}, 1.0, 0.0),
        (
            {"kind": "repetition", "n": 1, "unit": "tokens"},
            len(set(ids_of("then 6"))) / 6,
            len(set(ids_of("<add 2 3>no 7then 6"))) / 19,
        ),
    ],
)
def test_rules_read_what_the_policy_said_and_never_what_it_was_told(part, last, every, chat):
    """Counted by hand on `then 6`, and on `<add 2 3>`, `no 7`, `then 6`."""
    columns = {"reply": ["5 good {} yes"], "said": ["then 6"], "whole": ["<add 2 3>\nno 7\nthen 6"]}
    numbers = {"answer": [5], "six": [6], "two": [2]}
    one = talk("2+3?", ("<add 2 3>", "5 good {} yes"), ("no 7", "5 good {} yes"), ("then 6", ""), chat=chat)
    samples = samples_of([one], **columns, **numbers)
    for turns, expected in (("last", last), ("all", every)):
        assert build_reward([{**part, "turns": turns}])(*samples).total_B.tolist() == pytest.approx([expected])
    default = every if part["kind"] in ("length", "repetition") else last
    assert build_reward([part])(*samples).total_B.tolist() == pytest.approx([default])


def test_an_episode_that_was_cut_or_never_began_is_judged_by_what_there_is():
    cut = talk("2+3?", ("<add 2 3>", "5 good {} yes"), ended_by="tokens")
    never = talk("2+3?", ended_by="failure", failure="OSError")
    samples = samples_of([cut, never], answer=[3, 3])
    assert build_reward([{"kind": "numeric"}])(*samples).total_B.tolist() == [1.0, 0.0]
    assert build_reward([{"kind": "length", "max": 9, "min": 9}])(*samples).total_B.tolist() == [1.0, 0.0]
