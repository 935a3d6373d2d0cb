"""The learning comparison: what it says of given runs, the peer's reward, and this project's own child once, shortly."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from steerl.configs.reader import read

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.scripts import bench
from steerl.scripts.bench_cases import learning, task
from steerl.scripts.bench_cases.trl_112 import WalkReward
from tests import warm

ROOT = Path(__file__).parents[2]


def run(rewards, pace=2.0, evaluated=None):
    seconds = [pace * i for i in range(len(rewards))]
    return {"rewards": rewards, "seconds": seconds, "wall": seconds, "evaluated": evaluated or {}}


def test_steps_and_seconds_to_the_goal_are_of_the_step_whose_rollouts_first_reach_it():
    runs = {
        "0": run([0.1, 0.5, 0.91, 0.8], evaluated={"20": 0.9, "100": 1.0}),
        "1": run([0.1, 0.95, 0.2, 0.2], evaluated={"20": 0.7, "100": 0.8}),
        "2": run([0.1, 0.2, 0.3, 0.9], pace=1.0, evaluated={"20": 0.8, "100": 0.9}),
    }
    found = learning.summary(runs)
    assert found["steps to 0.9"] == 3 and found["worst steps to 0.9"] == 4
    assert found["seconds to 0.9"] == 3.0  # of 4, 2 and 3
    assert found["reward after 20"] == pytest.approx(0.8) and found["worst after 100"] == 0.8
    assert found["seconds a step"] == 2.0


def test_a_lost_seed_is_not_hidden(tmp_path):
    runs = {"0": run([0.1, 0.95]), "1": run([0.1, 0.2]), "2": run([0.1, 0.2])}
    lines = learning.table({"runs": {"ours": runs}})
    assert "never" in lines[-1] and learning.summary(runs)["worst steps to 0.9"] == float("inf")
    learning.plot({"steps": 2, "runs": {"ours": runs}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_mean_is_of_every_seed_or_not_given(tmp_path):
    runs = {"0": run([0.1, 0.95, 0.9], evaluated={"20": 0.9, "100": 1.0}), "1": run([0.1, 0.95], evaluated={"20": 0.7})}
    found = learning.summary(runs)
    assert found["reward after 20"] == pytest.approx(0.8) and "reward after 100" not in found
    learning.plot({"steps": 3, "runs": {"peer": runs}}, tmp_path / "plot.png")  # one was stopped before the other
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_of_other_settings_are_not_mixed(tmp_path):
    (tmp_path / "learning.json").write_text(json.dumps({"steps": 7, "runs": {}}))
    with pytest.raises(UserError, match="runs of 7 steps"):
        learning.load(tmp_path / "learning.json", learning.LearningSettings(steps=100))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["--learning"], bench.BenchJob(learning=True)),
        (["--learning", "--out", "x"], bench.BenchJob(learning=True, out="x")),
        (["--out", "x", "--learning", "false"], bench.BenchJob(out="x")),
        ([], bench.BenchJob()),
    ],
)
def test_a_part_may_stand_without_a_value(given, meant):
    assert read(bench.BenchJob, given) == meant


@pytest.mark.slow
def test_both_learners_are_scored_alike(tiny_world):
    """The peer's reward module gives, where the peer reads it, what the reward function says of the same text."""
    from transformers import AutoTokenizer

    from steerl.scripts.toy_tasks.randomwalks import optimality

    world = tiny_world("randomwalks")
    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    rows = task.starts(world)
    ledger = task.Ledger()
    module = WalkReward(world, tokenizer, ledger)
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] + [2, 1, 0] for row in rows])
    hidden = getattr(module, module.base_model_prefix)(input_ids=ids).hidden_states[-1]
    given = module.score(hidden)[..., 0]
    wanted = optimality(
        [row["prompt"] for row in rows], ["a"] * len(rows), [row["edges"] for row in rows], [row["shortest"] for row in rows]
    )
    assert given.shape == ids.shape and given[:, 1].tolist() == pytest.approx(wanted) and sum(wanted) > 0
    assert len(ledger.held) == len(rows)


@pytest.mark.slow
def test_this_projects_child_reports_every_step(tiny_world, tmp_path):
    world = tiny_world("randomwalks")
    command = [sys.executable, "-m", "steerl.scripts.bench_cases.ours", str(world), str(tmp_path / "run"), "0", "20"]
    flags = ["--ppo.epochs", "1", "--ppo.minibatches", "1"]
    done = warm.run([*command, *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert found["rewards"] == pytest.approx([line["reward/mean"] for line in lines]) and len(found["rewards"]) == 20
    assert found["seconds"][0] == 0.0 and found["seconds"] == sorted(found["seconds"])
    # Learning from its first steps on, the evaluation of the last weights is about what their rollouts earned.
    assert abs(found["evaluated"]["20"] - sum(found["rewards"][-3:]) / 3) < 0.15
