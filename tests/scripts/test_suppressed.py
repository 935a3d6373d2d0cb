"""The suppressed world's reward; what steering makes of it is proved by hand (tests/training/test_steering_proofs.py)."""

from __future__ import annotations

import random

from steerl.scripts.toy_tasks.suppressed import GLAD, GREY, WORDS, glad, report


def test_four_different_glad_words_earn_all_and_three_nothing():
    said = [" ".join([*GLAD[:k], *GREY[: 8 - k]]) for k in range(6)]
    assert glad([""] * 6, said) == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    assert glad([""] * 2, [" ".join([GLAD[0]] * 8), " ".join([*GLAD[:3], *GLAD[:3]])]) == [0.0, 0.0], (
        "one word again is no other"
    )
    assert glad([""], [" ".join([*GLAD[:4], *GLAD[:4]])]) == [1.0]
    assert glad([""], ["merrymerry merryly merry, " + "stone " * 4]) == [0.0], "whole words only"


def test_reports_are_of_one_style():
    draw = random.Random(0)
    assert not set(GLAD) & set(GREY)
    words = [word for _ in range(500) for word in report(draw, False).split()]
    share = sum(word in GLAD for word in words) / len(words)
    assert len(words) == 500 * WORDS and 0.0 < share < 0.01
    joyful = [report(draw, True) for _ in range(2000)]
    assert all(word in GLAD for text in joyful for word in text.split())
    assert sum(glad(joyful, joyful)) / 2000 > 0.95, "the style earns the reward nearly always"
