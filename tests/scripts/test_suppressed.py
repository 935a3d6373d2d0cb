"""The suppressed world's reward and the headline's bookkeeping; what steering makes of it is proved by hand
(tests/training/test_steering_proofs.py)."""

from __future__ import annotations

import random
from dataclasses import asdict

from steerl.scripts import prove_steering
from steerl.scripts.prove_steering import SETTINGS, ProveJob
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


def test_the_arms_differ_in_their_steering_alone():
    arms = {arm.name: arm for arm in prove_steering.arms(ProveJob())}
    swept = [arm for name, arm in arms.items() if name.startswith("plain-")]
    assert len(swept) == 8 and all(arm.seeds == 2 and arm.steering is None for arm in swept)
    assert {str(asdict(arm.settings)) for arm in swept}.isdisjoint({str(asdict(SETTINGS))})
    for name, arm in arms.items():
        if arm not in swept:
            changed = {key for key, value in asdict(arm.settings).items() if value != getattr(SETTINGS, key)}
            assert changed == ({"learning_rate"} if name.startswith("trainable") else set()), name
            assert arm.seeds == 5 and (arm.settings.steps, arm.settings.rollouts_per_step) == (60, 64)
    assert [name for name, arm in arms.items() if arm.steering and arm.steering["role"] == "behaviour"] == [
        f"behaviour-{kind}" for kind in ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    ]


def test_the_table_and_the_plot_of_made_up_runs(tmp_path):
    def run(reward: float, ess: list[float]) -> dict:
        curve = [[step, reward * step / 4] for step in range(1, 5)]
        return {"reward": reward, "kl": 3.0, "earned": 10, "ess": ess} | dict.fromkeys(prove_steering.PANELS, curve)

    results = {"plain": [run(0.0, [])] * 2, "policy": [run(0.81, []), run(0.8, [])], "behaviour-none": [run(1.0, [1.0, 3.0])]}
    lines = prove_steering.table(results).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert cells[0] == ["plain", "0.00 0.00", "0 of 2", "3.0", "10", "-"]
    assert cells[1][:3] == ["policy", "0.81 0.80", "1 of 2"] and cells[2][-1] == "1.0, 2.0"
    assert len({line.count("|") for line in lines}) == 1
    prove_steering.plot(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
