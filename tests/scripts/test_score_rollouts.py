"""The scoring command, with real files and real processes: tables against rewards called by hand, kills, damage, bad input."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from steerl.configs.reader import run_command

import datasets
import pandas
import pytest
import torch

from steerl.reward.build import build_reward
from steerl.rollout.common.run_folder import MARKER
from steerl.rollout.dumps.manifest import load_manifest
from steerl.rollout.dumps.store import read_dump
from steerl.scripts.score_rollouts import ScoreJob, main
from tests import warm
from tests.dumps import flip_bit, made_dump, truncate
from tests.models import tiny_tokenizer
from tests.reward.classifiers import saved, tiny_classifier

ROOT = Path(__file__).parents[2]

REWARDS = '''
import os, signal
from pathlib import Path

def number(completions, answer):
    """None for some rows; and the process dies once, in the midst of it, where a file asks for that."""
    if (ask := Path(__file__).with_name("ask")).exists():
        ask.unlink()
        signal.raise_signal(signal.SIGINT)
    trap = Path(__file__).with_name("trap")
    if trap.exists() and any(text.startswith("answer 7.") for text in completions):
        trap.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return [None if value == 4 else value / 3 for value in answer]
'''


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dump of 10 prompts x 2 samples in 3 shards, two reward models, a reward function."""
    folder = tmp_path_factory.mktemp("given")
    made_dump(folder / "dump")
    saved(tiny_classifier("llama", vocab_size=264), folder / "rm", tiny_tokenizer(264, kind="bytes"))
    saved(
        tiny_classifier("bert", vocab_size=264, max_position_embeddings=128),
        folder / "encoder",
        tiny_tokenizer(264, kind="bytes"),
    )
    (folder / "rewards.py").write_text(REWARDS)
    return folder


def parts(given: Path) -> list[dict[str, Any]]:
    return [
        {"kind": "model", "path": str(given / "rm"), "name": "rm", "weight": 0.5},
        {"kind": "model", "path": str(given / "encoder"), "name": "encoder"},
        {"kind": "function", "function": f"{given}/rewards.py:number", "name": "number", "weight": 2.0},
        {"kind": "length", "max": 5},
    ]


def flags(given: Path, run: Path, *more: str) -> list[str]:
    return ["--dump.dir", str(given / "dump"), "--run.dir", str(run), "--reward", json.dumps(parts(given)), *more]


def score(argv: list[str]) -> int:
    try:
        run_command(main, ScoreJob, argv)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def table(run: Path) -> pandas.DataFrame:
    return pandas.concat([pandas.read_parquet(path) for path in sorted(run.glob("scores-*.parquet"))], ignore_index=True)


def files(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(run.glob("scores-*.parquet"))}


@pytest.fixture(scope="module")
def whole(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scored by one undisturbed process."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert score(flags(given, run)) == 0
    return run


def test_the_table_is_what_the_reward_says_row_by_row(given, whole):
    found = table(whole)
    assert list(found.columns) == ["prompt_index", "sample_index", "total", "rm", "encoder", "number", "length"]
    assert [str(kind) for kind in found.dtypes] == ["int64", "int32", *["float32"] * 5]
    assert list(zip(found.prompt_index, found.sample_index, strict=True)) == [(p, s) for p in range(10) for s in range(2)]
    reward = build_reward(parts(given))
    rows = [
        (rollout.select([i]), texts.select([i])) for rollout, texts in read_dump(given / "dump") for i in range(len(rollout))
    ]
    for i, (rollout, texts) in enumerate(rows):
        alone = reward(rollout, texts)
        for name in ("rm", "encoder", "number", "length"):
            expected = alone.parts[name].item()
            assert found[name][i] == pytest.approx(expected, abs=1e-5, nan_ok=True), (i, name)
        number = 0.0 if rollout.row_B.item() == 2 else rollout.row_B.item() * 2 / 3
        by_hand = (
            0.5 * alone.parts["rm"].item() + alone.parts["encoder"].item() + 2 * number + float(rollout.lengths_B.item() <= 5)
        )
        assert found.total[i] == pytest.approx(by_hand, abs=1e-5)


def test_rows_that_a_part_does_not_apply_to_are_null(whole):
    loaded = datasets.load_dataset("parquet", data_files=str(whole / "scores-*.parquet"), cache_dir=str(whole / "cache"))[
        "train"
    ]
    assert [row["prompt_index"] for row in loaded if row["number"] is None] == [2, 2]


def test_the_manifest(given, whole):
    kept = json.loads((whole / "manifest.json").read_text())
    assert (
        kept["finished"]
        and kept["world_size"] == 1
        and kept["parts"] == {"rm": 0.5, "encoder": 1.0, "number": 2.0, "length": 1.0}
    )
    assert [shard["rows"] for shard in kept["shards"]] == [8, 8, 4]
    found = table(whole)
    assert kept["scores"]["rm"]["mean"] == pytest.approx(found.rm.astype("float64").mean())
    assert kept["scores"]["number"]["rows"] == 18
    assert {"torch", "transformers", "git"} <= set(kept["versions"])


def test_beside_the_dump(given, whole, tmp_path, capsys):
    made_dump(tmp_path / "dump")
    argv = ["--dump.dir", str(tmp_path / "dump"), "--run.dir", str(tmp_path / "dump"), "--reward", json.dumps(parts(given))]
    assert score(argv) == 0
    assert table(tmp_path / "dump").equals(table(whole))
    load_manifest(tmp_path / "dump")  # the dump's own is still there
    assert score(argv) == 2
    assert "holds scores already; add --run.resume true or --run.overwrite true" in capsys.readouterr().err
    assert score([*argv, "--run.overwrite", "true"]) == 0
    assert sum(len(rollout) for rollout, _ in read_dump(tmp_path / "dump")) == 20


@pytest.mark.slow
def test_two_processes_killed_half_way_and_resumed_leave_the_same_table(given, whole, tmp_path):
    """The process that comes to a row kills itself with it unscored; resumed by two, then compared with one undisturbed."""
    argv = flags(given, tmp_path / "run", "--run.resume", "true")
    (given / "trap").touch()
    first = warm.run(warm.accelerate_launch("ddp", "scripts/score_rollouts.py", *argv))
    assert first.returncode != 0 and f"exitcode: -{signal.SIGKILL:d}" in "".join(first.stderr.split("  ")).replace(" :", ":")
    assert not (given / "trap").exists()
    assert not json.loads((tmp_path / "run" / "manifest.json").read_text())["finished"]
    second = warm.run_ranks("scripts/score_rollouts.py", *argv)
    assert second.returncode == 0, second.stderr
    kept = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert kept["finished"] and kept["world_size"] == 2
    assert files(tmp_path / "run") == files(whole)
    assert [path.name for path in (tmp_path / "run").glob(".*")] == [MARKER]


def test_ctrl_c_finishes_the_shard_and_leaves_with_75(given, whole, tmp_path, capsys):
    (given / "ask").touch()
    run = tmp_path / "run"
    assert score(flags(given, run)) == 75
    told, following = capsys.readouterr().err.splitlines()[-2:]
    assert told.endswith("--run.resume true goes on")
    assert following.startswith("next: ") and following.endswith("--run.resume true")
    assert len(files(run)) == 1
    assert score(flags(given, run, "--run.resume", "true")) == 0
    assert files(run) == files(whole)


def test_overwrite_removes_nothing_before_the_reward_is_there(given, whole, tmp_path, capsys):
    run = tmp_path / "run"
    assert score(flags(given, run)) == 0
    bad = ["--dump.dir", str(given / "dump"), "--run.dir", str(run), "--run.overwrite", "true"]
    assert score([*bad, "--reward", json.dumps([{"kind": "model", "path": str(tmp_path / "nowhere")}])]) == 2
    assert files(run) == files(whole)


def test_what_is_damaged_or_missing_is_scored_again(given, whole, tmp_path, capsys):
    run = tmp_path / "run"
    argv = flags(given, run)
    assert score(argv) == 0
    flip_bit(run / "scores-00000.parquet", 0.1)
    truncate(run / "scores-00001.parquet")
    (run / "scores-00002.parquet").unlink()
    assert score([*argv, "--run.resume", "true"]) == 0
    assert files(run) == files(whole)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert score([*argv, "--run.resume", "true"]) == 0
    assert "finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_what_has_changed_since_is_refused_by_name(given, tmp_path, capsys):
    run = tmp_path / "run"
    saved(tiny_classifier("llama", vocab_size=264), tmp_path / "rm", tiny_tokenizer(264, kind="bytes"))
    (tmp_path / "own.py").write_text("def f(completions):\n    return [1.0 for _ in completions]\n")
    made_dump(tmp_path / "dump")
    reward = [{"kind": "model", "path": str(tmp_path / "rm")}, {"kind": "function", "function": f"{tmp_path}/own.py:f"}]

    def resumed(parts: list[dict[str, Any]]) -> list[str]:
        for name in [name for name in sys.modules if name.startswith("user_own")]:
            del sys.modules[name]
        capsys.readouterr()
        code = score(
            ["--dump.dir", str(tmp_path / "dump"), "--run.dir", str(run), "--run.resume", "true", "--reward", json.dumps(parts)]
        )
        lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith("--run.overwrite true")]
        assert code == (2 if lines else 0)
        return [line.split(":")[0] for line in lines]

    assert resumed(reward) == []
    assert resumed([{**reward[0], "weight": 2.0}, reward[1]]) == ["reward"]
    (tmp_path / "own.py").write_text("def f(completions):\n    return [2.0 for _ in completions]\n")
    assert resumed(reward) == ["reward function"]
    saved(tiny_classifier("llama", vocab_size=264, seed=1), tmp_path / "rm", tiny_tokenizer(264, kind="bytes"))
    assert resumed(reward) == ["reward function", "reward model"]


def test_texts_and_conversations(given, tmp_path):
    user = {"role": "user", "content": "a film?"}
    rows = [{"messages": [user, {"role": "assistant", "content": f"good {i}"}], "answer": i} for i in range(7)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chat = tiny_tokenizer(264, kind="bytes", chat=True)
    model = tiny_classifier("llama", vocab_size=264)
    reward = [{"kind": "model", "path": saved(model, tmp_path / "rm", chat)}, {"kind": "numeric"}]
    argv = ["--texts.path", str(tmp_path / "chat.jsonl"), "--reward", json.dumps(reward), "--run.save_every", "3"]
    assert score([*argv, "--run.dir", str(tmp_path / "run")]) == 0
    found = table(tmp_path / "run")
    assert (
        len(files(tmp_path / "run")) == 3
        and found.prompt_index.tolist() == list(range(7))
        and found.numeric.tolist() == [1.0] * 7
    )
    for i, row in enumerate(rows):
        ids = chat.apply_chat_template(row["messages"], return_dict=False)
        with torch.no_grad():
            expected = model.score(model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]).item()
        assert found.model[i] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["--dump.dir", ""], "dump.dir and texts.path: name one of them"),
        (["--texts.path", "x.jsonl"], "dump.dir and texts.path: name one of them"),
        (["--dump.dir", "/nowhere"], "/nowhere: no manifest.json, so not a dump of rollouts"),
        (["--run.dir", ""], "run.dir: missing"),
        (["--run.save_every", "5"], "run.save_every: has no effect on the scores of a dump"),
        (["--reward", "[]"], "reward: empty; name at least one part"),
        (
            ["--reward", "[{kind: length, max: 3, normalise: running}]"],
            "reward[0] (length).normalise: running, which depends on the order",
        ),
        (
            ["--reward", "[{kind: exact, column: reply}]"],
            "reward[0].column: 'reply' is no column of the data (columns: answer, tags)",
        ),
        (["--rewards", "[]"], "rewards: unknown"),
    ],
)
def test_bad_input_is_one_line_and_status_2(given, tmp_path, capsys, changes, line):
    argv = flags(given, tmp_path / "run")
    if changes[0] in argv:
        argv[argv.index(changes[0]) + 1] = changes[1]
    else:
        argv += changes
    assert score(argv) == 2
    err = capsys.readouterr().err
    assert any(found.startswith(line) for found in err.splitlines()), err
    assert "Traceback" not in err


def test_a_damaged_dump_is_named(given, tmp_path, capsys):
    made_dump(tmp_path / "dump")
    flip_bit(tmp_path / "dump" / "rollouts-00001.parquet")
    argv = ["--dump.dir", str(tmp_path / "dump"), "--run.dir", str(tmp_path / "run"), "--reward", "[{kind: length, max: 3}]"]
    assert score(argv) == 2
    assert "rollouts-00001.parquet: is damaged" in capsys.readouterr().err


def test_a_dump_inside_the_run_folder_is_not_overwritten(given, tmp_path, capsys):
    made_dump(tmp_path / "run" / "dump")
    argv = [
        "--dump.dir",
        str(tmp_path / "run" / "dump"),
        "--run.dir",
        str(tmp_path / "run"),
        "--reward",
        "[{kind: length, max: 3}]",
    ]
    assert score([*argv, "--run.overwrite", "true"]) == 2
    assert "which would be lost" in capsys.readouterr().err
    assert sum(len(rollout) for rollout, _ in read_dump(tmp_path / "run" / "dump")) == 20


@pytest.mark.parametrize("place", ["when imported", "when called"])
def test_a_reward_file_that_calls_sys_exit_leaves_with_two_and_its_name(place, tmp_path, capsys):
    leave = "sys.exit(0)\n"
    body = f"import sys\n{leave if place == 'when imported' else ''}def f(completions):\n    {leave}"
    (tmp_path / "leaves.py").write_text(body)
    (tmp_path / "texts.jsonl").write_text('{"completion": "a"}\n')
    reward = json.dumps([{"kind": "function", "function": f"{tmp_path}/leaves.py:f"}])
    with pytest.raises(SystemExit) as left:
        run_command(
            main,
            ScoreJob,
            ["--texts.path", str(tmp_path / "texts.jsonl"), "--reward", reward, "--run.dir", str(tmp_path / "run")],
        )
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert line.startswith("reward[0] (function)") and "SystemExit: 0" in line and "leaves.py" in line
