"""What every command makes of what users get wrong: one clear line each, status 2, nothing half-written left behind."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

from steerl.configs.reader import run_command

import pytest

from steerl.rollout.common.run_folder import MARKER, RunSettings, begin
from steerl.scripts import dump_rollouts, train_ppo

SAMPLERS = {"dump_rollouts": (dump_rollouts, "DumpJob"), "train_ppo": (train_ppo, "PPOJob")}


@pytest.fixture
def flags(tiny_world, tmp_path):
    """Settings with which the sampling commands work."""
    world = tiny_world("reviews")
    (tmp_path / "reward.py").write_text("def zero(prompts, completions, **columns):\n    return [0.0] * len(completions)\n")
    common = {
        "model.path": world / "sft",
        "prompts.path": world / "prompts.jsonl",
        "prompts.limit": 8,
        "sampling.max_new_tokens": 4,
        "run.dir": tmp_path / "run",
    }
    reward = json.dumps([{"name": "zero", "kind": "function", "function": f"{tmp_path / 'reward.py'}:zero"}])
    return {"dump_rollouts": common, "train_ppo": common | {"reward": reward, "ppo.steps": 1, "ppo.rollouts_per_step": 8}}


def leave(name: str, settings: dict) -> int:
    module, job = SAMPLERS[name]
    argv = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    try:
        run_command(module.main, getattr(module, job), argv)
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def whole(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("setting", "content", "parts"),
    [
        ("model.path", None, ["model.path", "nowhere"]),
        ("model.path", b"", ["model.path", "nowhere"]),
        ("prompts.path", None, ["prompts.path", "nowhere"]),
        ("prompts.path", b"", ["prompts.path", "nowhere"]),
        ("prompts.path", b"\xff\xfe\x00\x01", ["prompts.path", "nowhere"]),
        ("prompts.path", b'{"prompt": "a"}\n{"prompt": \n', ["prompts.path", "nowhere", "2"]),
        ("prompts.column", None, ["prompts.column", "nowhere", "prompt"]),
    ],
)
def test_what_cannot_be_read_is_one_line(name, setting, content, parts, flags, tmp_path, capfd):
    if setting == "prompts.column":
        value = "nowhere"
    else:
        value = tmp_path / "nowhere.jsonl"
        if content is not None:
            value.write_bytes(content)
    assert leave(name, flags[name] | {setting: value}) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert all(part in said[0] for part in parts), said[0]
    assert whole(tmp_path / "run") == [], "nothing was begun, nothing is left"


def test_training_says_what_it_leaves_and_what_comes_next(flags, tmp_path, capfd):
    assert leave("train_ppo", flags["train_ppo"]) == 0
    model, page, following = capfd.readouterr().out.splitlines()[-3:]
    for line, name in ((model, "model"), (page, "report.html")):
        path, _, told = line.partition(": ")
        assert path == str(tmp_path / "run" / name) and Path(path).exists() and told
    assert following == f"next: steerl complete --model.path {tmp_path / 'run' / 'model'} PROMPT"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_run_folder_in_use_is_left_alone(name, flags, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert leave(name, flags[name]) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1, said
    assert "is not empty; add --run.resume true or --run.overwrite true" in said[0]
    assert whole(tmp_path / "run") == ["mine.txt"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_overwrite_empties_nothing_before_the_model_is_there(name, flags, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    begin(tmp_path / "run", RunSettings())
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert leave(name, flags[name] | {"run.overwrite": "true", "model.path": tmp_path / "nowhere"}) == 2
    assert "nowhere" in capfd.readouterr().err
    assert whole(tmp_path / "run") == [MARKER, "mine.txt"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_overwrite_empties_no_folder_that_a_job_did_not_write(name, flags, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert leave(name, flags[name] | {"run.overwrite": "true"}) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("run.overwrite: ") and "mine.txt" in said
    assert whole(tmp_path / "run") == ["mine.txt"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_everything_wrong_with_one_command_is_told_at_once(name, flags, tmp_path, capfd):
    config = tmp_path / "mine.yaml"
    config.write_text(
        "model: {kind: casual}\nsampling: {top_k: few, temprature: 2, stop: x, temperature: -1}\nprompts: {limit: [1]}\n"
        "steering: {role: polcy, sites: [{at: {layers: [0], componnt: block_output}, op: {type: add}}]}\n"
        "run: {trackers: [wandbb]}\nrewards: []\n"
    )
    assert leave(name, {"config": config} | flags[name] | {"sampling.tpo_p": 0.5, "run.resume": "perhaps"}) == 2
    said = capfd.readouterr().err.splitlines()
    wanted = [
        "model.kind: ", "sampling.top_k: ", "sampling.temprature: ", "sampling.stop: ", "sampling.temperature: ",
        "prompts.limit: ", "run.trackers[0]: ", "rewards: ", "sampling.tpo_p: ", "run.resume: ",
    ]  # fmt: skip
    assert [begin for begin in wanted if sum(line.startswith(begin) for line in said) != 1] == [], said
    assert any("role" in line and "polcy" in line for line in said), said
    assert any("componnt" in line for line in said), said
    assert whole(tmp_path / "run") == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 96 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_full_disk_is_one_line_and_no_file_is_half_written(name, flags, small_disk, capfd):
    """The dump fills the disk with a shard, training with its model."""
    (small_disk / "ballast").write_bytes(bytes(80 * 1024 if name == "dump_rollouts" else 1024))
    assert leave(name, flags[name] | {"run.dir": small_disk / "run"}) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if "No space left" in line]
    assert len(said) == 1, said
    left = [path for path in small_disk.rglob("*") if path.is_file() and (path.suffix == ".tmp" or ".tmp" in path.name)]
    assert left == []
    for path in small_disk.rglob("*.json"):
        json.loads(path.read_text())


def test_a_real_process_says_the_same():
    command = [
        sys.executable,
        "scripts/dump_rollouts.py",
        "--config",
        "configs/dump.yaml",
        "--model.pth",
        "x",
        "--sampling.n",
        "many",
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert [line.split(":")[0] for line in ran.stderr.splitlines()] == ["model.pth", "sampling.n"]


@pytest.mark.parametrize(
    "script", ["score_rollouts", "train_sft", "train_reward", "report", "inspect_rollouts", "select_rollouts"]
)
def test_other_doors_name_what_is_missing(script, capfd, monkeypatch, tmp_path):
    """A path that is nowhere: a line or two that name it, and status 2."""
    module = importlib.import_module(f"scripts.{script}")
    nowhere, run = str(tmp_path / "nowhere"), ["--run.dir", str(tmp_path / "run")]
    argv = {
        "score_rollouts": ["--dump.dir", nowhere, "--reward", "[{kind: repetition}]", *run],
        "train_sft": ["--model.path", nowhere, "--prompts.path", nowhere, *run],
        "train_reward": ["--model.path", nowhere, "--prompts.path", nowhere, *run],
        "select_rollouts": [nowhere, "--out", str(tmp_path / "out.jsonl")],
    }.get(script, [nowhere])
    source = Path(module.__file__ or "").read_text(encoding="utf-8")
    job = source.split("run_command(main, ")[1].split(")")[0]
    with pytest.raises(SystemExit) as left:
        run_command(module.main, getattr(module, job), argv)
    said = capfd.readouterr().err.splitlines()
    assert left.value.code == 2
    assert 1 <= len(said) <= 2, said
    assert nowhere in said[0], said
    assert whole(tmp_path / "run") == []
