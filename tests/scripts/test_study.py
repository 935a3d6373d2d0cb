"""Studies: arms x seeds end to end, stopped and shared, what is wrong told by arm, intervals and tables by hand."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import threading
from pathlib import Path

from steerl.configs.reader import read, to_mapping

import pytest
import yaml
from scipy import stats

from steerl.rollout.common import processes
from steerl.rollout.common.errors import Stopped, UserError
from steerl.rollout.common.run_folder import holding
from steerl.rollout.common.settings_reader import every_path
from steerl.scripts import study, train_ppo
from steerl.scripts.studying import runs
from steerl.scripts.studying.outcome import interval, number, search_table, student, table, wilson
from steerl.scripts.studying.plan import Plan, StudySettings
from tests import warm
from tests.models import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
REWARD = '''
import os, signal
from pathlib import Path

LEFT = Path(__file__).with_name("left")

def vowels(prompts, completions, **columns):
    """Asks its own process to stop when it was called as often as a file says."""
    if LEFT.exists():
        left = int(LEFT.read_text()) - 1
        LEFT.write_text(str(left)) if left else LEFT.unlink()
        if not left:
            os.kill(os.getpid(), signal.SIGTERM)
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
'''


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with a model, prompts, a reward; the test stands in it."""
    tiny("gpt2", 0).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer(64).save_pretrained(tmp_path / "gpt2")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in "abcdefg"))
    (tmp_path / "reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


VOWELS = [{"name": "vowels", "kind": "function", "function": "reward.py:vowels"}]


def settings(**more) -> dict:
    base = {
        "model": {"path": "gpt2"},
        "prompts": {"path": "prompts.jsonl"},
        "sampling": {"max_new_tokens": 4, "batch_size": 8},
        "reward": VOWELS,
        "ppo": {"steps": 2, "rollouts_per_step": 8, "minibatches": 2, "micro_batch_size": 4, "learning_rate": 1e-3,
                "eval_every": 1, "eval_prompts": 2, "samples": 0},
        "run": {"save_every": 1},
    }  # fmt: skip
    final = {"samples": 16, "measures": {"again": VOWELS}}
    arms = {"plain": None, "fast": {"ppo": {"learning_rate": 1e-2}}}
    return {"base": base, "arms": arms, "seeds": 2, "reach": 0.0, "above": 0.1, "final": final} | more


def given(folder: str, **more) -> None:
    """The command, in process."""
    Path("study.yaml").write_text(yaml.safe_dump({"study": settings(**more)}, sort_keys=False))
    study.main(read(study.StudyJob, ["--config", "study.yaml", "--run.dir", folder]))


def told(folder: str, **more) -> list[str]:
    with pytest.raises(UserError) as caught:
        given(folder, **more)
    return list(caught.value.lines)


def results(folder: str | Path) -> dict:
    """results.json without what takes time."""
    found = json.loads((Path(folder) / "results.json").read_text())["results"]
    for run in (run for of_arm in found.values() for run in of_arm):
        assert set(run.pop("cost")) == {"cpu_s", "wall_s", "peak_mb"}
    return found


def lines(run: str | Path) -> list[dict]:
    text = (Path(run) / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(row).items() if not k.startswith(("time/", "memory/"))} for row in text.splitlines()]


# -- end to end ----------------------------------------------------------------------------------------------------------


def test_a_study_is_whole_jobs_their_models_and_a_table(world, capsys):
    given("one")
    found = results("one")
    assert list(found) == ["plain", "fast"] and [run["seed"] for run in found["fast"]] == [0, 1]
    for arm, of_arm in found.items():
        for run in of_arm:
            folder = Path("one") / f"{arm}-{run['seed']}"
            assert {"config.yaml", "metrics.jsonl", "model", "summary.json", "final.json"} <= set(os.listdir(folder))
            config = yaml.safe_load((folder / "config.yaml").read_text())
            assert config["run"]["seed"] == config["sampling"]["seed"] == run["seed"]
            assert config["ppo"]["learning_rate"] == (1e-2 if arm == "fast" else 1e-3)
            assert run["samples"] == 21 and run["measures"]["again"] == run["reward"] == run["parts"]["vowels"]
            assert [step for step, _ in run["curves"]["eval/reward"]] == [0, 1, 2] and run["reached"] == 1
            assert len(run["curves"]["reward/mean"]) == run["steps"] == 2 and run["rollouts"] == 16 and 0 < run["length"] <= 4
    kl = {arm: [run["kl"] for run in of_arm] for arm, of_arm in found.items()}
    assert min(kl["fast"]) > max(kl["plain"]) > 0.0, "of the model that learned, to the one that it began as"
    text = Path("one/table.md").read_text()
    assert text in capsys.readouterr().out and text.count("\n| ") == 2 and "Seeds 0 to 1" in text
    assert 1000 < Path("one/curves.png").stat().st_size < 100_000

    # the same job by itself
    job = read(train_ppo.PPOJob, ["--config", "one/fast-1/config.yaml", "--run.dir", "alone", "--run.resume", "false"])
    config = to_mapping(job)
    del config["dry_run"]
    train_ppo.run(job, config)
    assert lines("alone") == lines("one/fast-1")
    assert Path("alone/model/model.safetensors").read_bytes() == Path("one/fast-1/model/model.safetensors").read_bytes()

    # given again with one arm and one seed more: what is there is left alone, the study of both seeds is in the new one
    before = {path: path.stat().st_mtime_ns for path in Path("one").glob("*/final.json")}
    given("one", seeds=3, arms=settings()["arms"] | {"slow": {"ppo": {"learning_rate": 1e-6}}})
    assert {path: path.stat().st_mtime_ns for path in before} == before
    more = results("one")
    assert {arm: of_arm[:2] for arm, of_arm in more.items() if arm in found} == found and len(more["slow"]) == 3
    assert max(run["kl"] for run in more["slow"]) < 1e-3

    # other final settings: measured again, not run again
    models = {path: path.stat().st_mtime_ns for path in Path("one").glob("*/model/model.safetensors")}
    given("one", final={"samples": 7})
    assert {run["samples"] for of_arm in results("one").values() for run in of_arm} == {7}
    assert {path: path.stat().st_mtime_ns for path in models} == models


def test_a_study_that_was_stopped_goes_on_to_the_same(world):
    """Two runs of two steps and three evaluations: asked to stop in the first step, and in the last evaluation or the
    measurement, which are finished first."""
    given("whole", seeds=1)
    for calls, begun in ((2, "plain-0: stopped after step 1 of 2 and saved"), (6, "stopped with 2 runs to go")):
        folder = Path(f"stopped-{calls}")
        (world / "left").write_text(str(calls))
        with pytest.raises(Stopped, match="the same command goes on") as stopped:
            given(str(folder), seeds=1)
        assert str(stopped.value).startswith(begun)
        assert not (folder / "table.md").exists()
        given(str(folder), seeds=1)
        assert results(folder) == results("whole")
        for run in Path("whole").glob("*-?"):
            model = "model/model.safetensors"
            assert lines(run) == lines(folder / run.name)
            assert (run / model).read_bytes() == (folder / run.name / model).read_bytes()
        assert not (folder / ".held").exists()


def test_a_search_freezes_the_best_of_each_arms_grid(world):
    rates = [1e-3, 3e-2, 1.0]
    arms = {"sought": {"search": {"ppo.learning_rate": rates, "ppo.epochs": [1]}}, "plain": {"search": None}}
    given("one", arms=arms, search={"ppo.epochs": [1, 2]}, search_seeds=1, seeds=1)
    found = json.loads(Path("one/search.json").read_text())
    assert list(found) == ["sought"] and [choice["setting"]["ppo.learning_rate"] for choice in found["sought"]] == rates
    assert found["sought"][2]["mean"] is None, "a rate of 1 breaks the run, which is an outcome"
    best = max(found["sought"][:2], key=lambda choice: choice["mean"])
    assert [choice["chosen"] for choice in found["sought"]] == [choice is best for choice in found["sought"]]
    config = yaml.safe_load(Path("one/sought-0/config.yaml").read_text())
    assert config["ppo"]["learning_rate"] == best["setting"]["ppo.learning_rate"]
    assert yaml.safe_load(Path("one/search/sought-0-100/config.yaml").read_text())["run"]["seed"] == 100
    assert Path("one/search.md").read_text().count("broke") == 1
    assert told("other", arms={"sought": {"search": {"ppo.learning_rate": [1.0]}}}, search_seeds=1)[0].startswith(
        "sought: with every setting of its search a run broke; the first: step 1: one optimizer step moved the policy by"
    )


def test_a_run_that_breaks_is_an_outcome_and_one_that_fails_ends_the_study(world):
    given("one", arms={"wild": {"ppo": {"learning_rate": 1.0}}, "plain": None}, seeds=1)
    found = json.loads(Path("one/results.json").read_text())["results"]
    assert found["wild"][0]["broken"].startswith("step 1: one optimizer step moved") and found["plain"][0]["reward"] >= 0.0
    assert "| wild | - (1 broke) | broke | 0 of 1" in Path("one/table.md").read_text()
    (world / "short.py").write_text("def vowels(prompts, completions, **columns):\n    return [0.0]\n")
    short = settings()["base"] | {"reward": [VOWELS[0] | {"function": "short.py:vowels"}]}
    assert told("two", base=short)[0].startswith("plain-0: reward[0]")


# -- two at once, and killed ---------------------------------------------------------------------------------------------


def start(folder: Path) -> warm.Warm:
    command = [sys.executable, ROOT / "scripts/study.py", "--config", "study.yaml", "--run.dir", folder]
    return warm.start(command, cwd=Path.cwd())


def test_two_processes_share_the_runs(world):
    given("whole", seeds=2)
    both = [start(Path("shared")) for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    took = [[line.split(":")[0] for line in out.splitlines() if ": reward " in line] for out, _ in said]
    assert sorted(took[0] + took[1]) == sorted(f"{arm}-{seed}" for arm in ("plain", "fast") for seed in range(2))
    assert results("shared") == results("whole")


def test_a_run_that_is_held_is_waited_for(world, monkeypatch):
    """Whoever holds it may end before it is done: it is taken then."""
    monkeypatch.setattr(runs, "PAUSE", 0.01)
    monkeypatch.setattr(runs.time, "sleep", lambda _: held.__exit__(None, None, None) if alive.pop("it", 0) else None)
    alive = {"it": 1}
    calls = []
    real = runs.holding

    def refused_once(place):
        calls.append(place.name)
        if place.name == "plain-0" and "it" in alive:
            raise runs.Held("held")
        return real(place)

    monkeypatch.setattr(runs, "holding", refused_once)
    held = holding(world / "anything")
    held.__enter__()
    given("one", seeds=1)
    assert calls == ["plain-0", "fast-0", "plain-0"] and set(results("one")) == {"plain", "fast"}


@pytest.mark.proofs
def test_a_study_that_is_killed_goes_on_to_the_same(world):
    """SIGKILL, SIGTERM and Ctrl-C at events: whatever a run's files have come to when a random number of them is there."""
    given("whole", seeds=3)
    draw = random.Random(0)
    for number_of in range(12):
        folder = Path(f"killed-{number_of}")
        for _ in range(2):
            process, wanted = start(folder), draw.randint(1, 110)
            waiting = threading.Event()
            while process.poll() is None and sum(len(files) for *_, files in os.walk(folder)) < wanted:
                waiting.wait(0.001)
            process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][number_of % 3])
            process.communicate()
        process = start(folder)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert results(folder) == results("whole"), number_of


# -- what is wrong -------------------------------------------------------------------------------------------------------


def test_everything_that_is_wrong_is_told_at_once_by_arm(world):
    arms = {
        "plain": None,
        "typo": {"ppo": {"learing_rate": 1e-2}},
        "steered": {"steering": {"role": "policy", "sites": [{"name": "s", "at": {"layers": [9]}, "op": {"type": "zero"}}]}},
        "sought": {"search": {"ppo.clip": [0.2, -1.0]}},
    }
    said = told("one", arms=arms, final={"prompts": "nowhere.jsonl"})
    assert any(line.startswith("typo: ") and "learing_rate" in line and "did you mean" in line for line in said)
    assert any(line.startswith("steered: sites[0].at.layers: 9") for line in said), said
    assert any(line.startswith("sought: ppo.clip") for line in said), said
    assert any(line.startswith("study.final.prompts: nowhere.jsonl does not exist") for line in said), said
    assert len(said) == 4 and not Path("one").exists()
    broken = settings()["base"] | {"prompts": {"path": "nowhere.jsonl"}}
    assert told("one", base=broken) == ["prompts.path: nowhere.jsonl does not exist; check the path"], "of all arms: once"


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"arms": {}}, "study.arms: none"),
        ({"arms": {"a/b": None}}, "study.arms.a/b: no name of a folder"),
        ({"only": ["plian"]}, "study.only: 'plian' is no arm; choose from plain, fast"),
        ({"changes": {"run": {"seed": 3}}}, "study.changes.run.seed: is the study's own to set"),
        ({"arms": {"a": {"sampling": {"seed": 3}}}}, "study.arms.a.sampling.seed: is the study's own to set"),
        ({"search": {"ppo.clip": 0.2}}, "study.search"),
        ({"arms": {"a": {"search": {"ppo.clip": 0.2}}}}, "study.arms.a.search: expected lists of values by setting"),
        ({"arms": {"a": {"search": {"run.seed": [1]}}}}, "study.arms.a.search.run.seed: is the study's own to set"),
        ({"search": {"ppo.clip": [0.1]}, "first_search_seed": 1}, "study.first_search_seed: 1, among the seeds"),
        ({"final": {"measures": {"true": [{"kind": "nothing"}]}}}, "study.final.measures.true: reward[0]"),
        ({"base": "nowhere.yaml"}, "study.base: nowhere.yaml does not exist"),
        ({"base": "steerl:randomwalk"}, "study.base: steerl:randomwalk does not exist; did you mean steerl:randomwalks?"),
        ({"seeds": 0}, "study.seeds: "),
        ({"final": {"samples": 0}}, "study.final.samples: "),
    ],
)  # fmt: skip
def test_settings_of_a_study_that_are_wrong(more, line, world):
    assert any(said.startswith(line) for said in told("one", **more)), told("one", **more)
    assert not Path("one").exists()


def test_runs_of_other_settings_are_never_mixed_in(world):
    given("one", seeds=1)
    said = told("one", seeds=1, arms={"plain": None, "fast": {"ppo": {"learning_rate": 2e-2}}})
    assert len(said) == 1 and said[0].startswith("fast: ppo.learning_rate: 0.02, but one/fast-0 has 0.01; move its folder away")
    steps = settings()["base"]["ppo"] | {"steps": 1}  # a run of two steps would do for resume
    said = told("one", seeds=1, base=settings()["base"] | {"ppo": steps})
    assert said == ["ppo.steps: 1, but one/plain-0 has 2; move its folder away, or give the study another --run.dir"] or all(
        "ppo.steps: 1, but one/" in line for line in said
    )


def test_two_ranks_are_refused_and_a_folder_is_needed(world, monkeypatch):
    assert told("") == ["run.dir: missing; name a folder for the study, --run.dir DIR"]
    assert told("study.yaml") == ["run.dir: study.yaml; name a folder for the study, --run.dir DIR"]
    monkeypatch.setattr(study.processes, "start", lambda: processes.Processes(0, 2, None))  # type: ignore[arg-type]
    assert told("one") == ["study: runs have one process each; start `steerl study` itself, several times for several at once"]


@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.name)
def test_every_arm_of_the_shipped_studies_is_read(config):
    job = read(study.StudyJob, ["--config", str(config), "--run.dir", "somewhere"])
    plan = Plan(job.study, Path("somewhere"))
    for arm in plan.arms:
        for setting in plan.grid(arm) or [{}]:
            assert plan.reported(arm, setting)[0].job.ppo.steps > 1


def test_every_setting_of_a_study_is_explained():
    page = (ROOT / "docs" / "studies.md").read_text()
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", page, flags=re.MULTILINE)
    there = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    wanted = {".".join(path) for path in every_path(study.StudyJob)} - {"study", "run", "study.final"}
    assert wanted <= there


# -- numbers by hand -----------------------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_books():
    for freedom in range(1, 200):
        assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9), freedom
    low, high = interval([1.0, 2.0, 3.0, 4.0])  # mean 2.5, deviation 1.29099, t(3) 3.18245: half = 3.18245 * 1.29099 / 2
    assert (low, high) == pytest.approx((2.5 - 2.05426, 2.5 + 2.05426), abs=1e-5)
    assert interval([0.3]) is None
    # Wilson for 0 of 10 and 8 of 10, z = 1.96: the share's roots of (p - k/n)^2 = z^2 p (1 - p) / n
    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson(8, 10) == pytest.approx((0.49016, 0.94331), abs=1e-5)
    assert wilson(5, 5) == pytest.approx((0.56552, 1.0), abs=1e-5)
    for hits, count in ((0, 3), (3, 7), (9, 10)):
        for end in wilson(hits, count):
            distance = (end - hits / count) ** 2 - 1.959964**2 * end * (1 - end) / count
            assert abs(distance) < 1e-6


def test_the_table_of_made_up_runs():
    def run(seed: int, reward: float, reached: int | None) -> dict:
        cost = {"cpu_s": 12.0, "wall_s": 15.0, "peak_mb": 512.0}
        return {"seed": seed, "reward": reward, "measures": {"true": 1 - reward}, "kl": 43.21, "length": 8.0, "samples": 512,
                "rollouts": 3840, "reached": reached, "cost": cost, "curves": {}}  # fmt: skip

    asked = StudySettings(base={}, arms={}, seeds=3, first_seed=7, reach=0.9, above=0.8)
    asked.final.measures["true"] = []
    found = {
        "good": [run(7, 0.9, 4), run(8, 0.8, 9), run(9, 1.0, None)],
        "wild": [run(7, 0.9, 4), {"seed": 8, "broken": "step 3", "curves": {}}, run(9, 0.7, None)],
    }
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table(found, asked).splitlines()[:4]]
    assert rows[0] == ["arm", "final reward", "by seed", "above 0.8", "true", "KL per response, nats", "length",
                       "steps to 0.9: median", "rollouts", "CPU s / wall s", "peak MiB"]  # fmt: skip
    # t(2) = 4.30265: 0.1 * 4.30265 / sqrt(3) = 0.24841; t(1) = 12.7062: 0.1 * sqrt(2) * 12.7062 / sqrt(2) = 1.27062
    assert rows[2] == ["good", "0.90 [0.65, 1.15]", "0.90 0.80 1.00", "2 of 3 [0.21, 0.94]", "0.10 [-0.15, 0.35]",
                       "43.2 [43.2, 43.2]", "8.00", "9 (2 of 3 got there)", "3,840", "12.0 / 15.0", "512"]  # fmt: skip
    assert rows[3][:4] == ["wild", "0.80 [-0.47, 2.07] (1 broke)", "0.90 broke 0.70", "1 of 3 [0.06, 0.79]"]
    assert rows[3][7] == "never (1 of 3 got there)"
    assert "Seeds 7 to 9; the final reward is of 512 answers" in table(found, asked)
    assert [number(value) for value in (0.1234, -9.876, 12.34, 1234.5)] == ["0.12", "-9.88", "12.3", "1,234"]
    choices = [
        {"setting": {"ppo.clip": 0.1, "ppo.value": "shared"}, "rewards": [0.5, 1.0], "mean": 0.75, "chosen": True},
        {"setting": {"ppo.clip": 0.2}, "rewards": [0.5, None], "mean": None, "chosen": False},
    ]
    lines_of = search_table({"plain": choices}).splitlines()
    assert lines_of[2] == "| plain | ppo.clip 0.1, ppo.value shared | 0.75 | 0.50 1.00 | yes |"
    assert lines_of[3] == "| plain | ppo.clip 0.2 | - | 0.50 broke |  |"
