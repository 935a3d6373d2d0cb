"""As an outsider has it: a wheel without the checkout, and a folder whose own files bear the rooms' names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from steerl.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("rollout", "reward", "training", "configs", "scripts")


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every room's name is taken, by files that end whoever imports them."""
    folder = tmp_path_factory.mktemp("strangers")
    for room in ROOMS:
        (folder / f"{room}.py").write_text("raise SystemExit('a stranger was imported')\n")
        if room in ("training", "scripts", "configs"):
            (folder / f"{room}.py").unlink()
            (folder / room).mkdir()
            (folder / room / "__init__.py").write_text("raise SystemExit('a stranger was imported')\n")
    return folder


def steerl(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m steerl`, which has the folder it is started in first on its path."""
    command = [sys.executable, "-m", "steerl", *words]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_program_in_a_strangers_folder_gets_ours(strangers):
    program = "import steerl; steerl.Sampler, steerl.train, steerl.build_reward; print(steerl.Rollout.__module__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=strangers, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "steerl.rollout.types\n"), done.stderr


@pytest.mark.slow
def test_every_command_helps_in_a_strangers_folder(strangers):
    program = f"""
import contextlib, io, sys
from steerl.cli import main
for name in {sorted(COMMANDS)}:
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            main([name, "--help"])
    except SystemExit as left:
        assert not left.code, (name, left.code)
    assert f"usage: steerl {{name}}" in said.getvalue(), name
assert not [m for m in {ROOMS} if m in sys.modules]
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=strangers, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that finds an unpacked wheel before the checkout that it has installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in tracked:
        if name and not name.startswith((".types", "tests")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (file,) = folder.glob("*.whl")
    zipfile.ZipFile(file).extractall(folder / "site")
    assert {path.name for path in (folder / "site").iterdir() if path.suffix != ".dist-info"} == {"steerl"}
    environment = {"PYTHONPATH": str(folder / "site")}
    program = "import steerl.training, steerl.scripts; print(steerl.training.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(folder / "site")), done.stderr
    return environment


@pytest.mark.slow
def test_a_wheel_trains_in_a_strangers_folder_with_his_reward(strangers, wheel, tiny_world):
    (strangers / "mine.py").write_text(
        "def score(prompts, completions, **columns):\n    return [len(c) / 9 for c in completions]\n"
    )
    world = tiny_world("randomwalks")
    words = [
        "ppo",
        "--config",
        "steerl:randomwalks",
        "--model.path",
        str(world / "base"),
        "--prompts.path",
        str(world / "prompts.jsonl"),
    ]
    few = ["--ppo.steps", "1", "--ppo.rollouts_per_step", "8", "--ppo.minibatches", "1", "--ppo.eval_prompts", "4"]
    reward = ["--reward", "[{kind: function, function: mine.py:score}]", "--run.dir", "run"]
    done = steerl([*words, *few, *reward], strangers, **wheel)
    assert done.returncode == 0 and (strangers / "run" / "summary.json").exists(), done.stderr
    assert (strangers / "run" / "report.html").exists()  # its page's files are in the wheel, too
    assert str(ROOT) not in done.stdout + done.stderr


@pytest.mark.proofs
def test_a_wheel_does_the_quickstarts_stages(tmp_path, wheel):
    done = steerl(["quickstart", "--out", "quick", "--steps", "2"], tmp_path, **wheel)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "quick" / "ppo" / "curves.png").exists() and "mean reward" in done.stdout
    assert str(ROOT) not in done.stdout
