"""Twenty kills at random moments, of the server and of the job: every run ends with the undisturbed run's weights, and nothing
of a server is left behind."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.models import tiny_policy
from tests.vllm_server import WIDE, gentle

pytestmark = [pytest.mark.vllm, pytest.mark.proofs]
ROOT = Path(__file__).parents[2]
KILLS = 20


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of a job of 60 steps, but for where it is written and what draws."""
    folder = tmp_path_factory.mktemp("job")
    policy = gentle(tiny_policy("llama", **WIDE))
    policy.model.save_pretrained(folder / "model")
    policy.tokenizer.save_pretrained(folder / "model")
    draw = random.Random(0)
    lines = ["".join(draw.choice("abcdefgh ") for _ in range(draw.randint(3, 12))) for _ in range(30)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": line}) + "\n" for line in lines))
    (folder / "count.py").write_text(
        "def a(prompts, completions, **more):\n    return [float(c.count('a')) for c in completions]\n"
    )
    reward = f"[{{name: a, kind: function, function: '{folder}/count.py:a'}}]"
    given = {"model.path": folder / "model", "prompts.path": folder / "prompts.jsonl", "reward": reward,
             "sampling.max_new_tokens": 24, "sampling.seed": 3, "ppo.steps": 60, "ppo.rollouts_per_step": 16, "ppo.minibatches": 2,
             "ppo.learning_rate": 5e-4, "run.save_every": 5}  # fmt: skip
    return [str(ROOT / "scripts/train_ppo.py"), *(word for name, value in given.items() for word in (f"--{name}", str(value)))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("ahead", [0, 1])
def test_twenty_kills(job: list[str], vllm_python: str, tmp_path: Path, ahead: int):
    engine = ["--engine.kind", "vllm", "--engine.python", vllm_python, "--engine.ahead", str(ahead)]
    draw = random.Random(ahead)
    began = time.monotonic()
    # By a server, too: of the 15,000 tokens of this run rounding decides one between the two engines, 9e-8 from a border.
    whole = [sys.executable, *job, *engine, "--run.dir", str(tmp_path / "whole")]
    subprocess.run(whole, check=True, capture_output=True, cwd=tmp_path)
    undisturbed = weights(tmp_path / "whole")
    kills: dict[str, int] = {}
    restarts, runs = 0.0, 0
    while sum(kills.values()) < KILLS // 2:
        runs += 1
        folder = tmp_path / f"run{runs}"
        command = [sys.executable, *job, *engine, "--run.dir", str(folder)]
        for _ in range(2 + KILLS):
            killed = killed_run([*command, "--run.resume", "true"], folder, draw, tmp_path)
            print(folder.name, killed, lines(folder), flush=True)
            for name in killed:
                kills[name] = kills.get(name, 0) + 1
            if (folder / "summary.json").exists():
                break
        found = weights(folder)
        assert max(float((found[name] - undisturbed[name]).abs().max()) for name in undisturbed) <= 1e-5
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [step["step"] for step in steps] == list(range(1, 61))
        restarts += max(step["engine/restarts"] for step in steps)
        assert left_behind(folder) == []
    print(f"\nahead {ahead}: {kills} in {runs} runs, {restarts:.0f} restarts seen, {time.monotonic() - began:.0f} s")
    assert len(kills) > 1


def killed_run(command: list[str], folder: Path, draw: random.Random, cwd: Path) -> list[str]:
    """A run in which somebody is killed again and again, some moments after the last time; who it was."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=(cwd / "err").open("ab"))
    killed: list[str] = []
    try:
        while process.poll() is None and len(killed) < 5 and "job" not in killed:
            if draw.random() < 0.8:  # else while it starts, too
                wait_for_step(process, folder)
            time.sleep(draw.uniform(0, 2))
            killed += kill(process, draw.choice(["job", "server", "engine", "guard"]))
        status = process.wait(timeout=400)
        assert status == (-signal.SIGKILL if "job" in killed else 0), (cwd / "err").read_text()[-2000:]
    finally:
        process.kill()
    return killed


def wait_for_step(process: subprocess.Popen[bytes], folder: Path) -> None:
    before = lines(folder)
    while process.poll() is None and lines(folder) <= before:
        time.sleep(0.02)


def kill(process: subprocess.Popen[bytes], who: str) -> list[str]:
    if process.poll() is not None:
        return []
    family = [(p, words(p)) for p in psutil.Process(process.pid).children(recursive=True)]
    victims: dict[str, list[Any]] = {
        "job": [process],
        "server": [p for p, said in family if "api_server" in said and "guard.py" not in said],
        "engine": [p for p, said in family if "EngineCore" in said],
        "guard": [p for p, said in family if "guard.py" in said],
    }
    try:
        for victim in victims[who][:1]:
            victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:  # it went by itself
        return []
    return [who] if victims[who] else []


def words(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.NoSuchProcess:
        return ""


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def left_behind(folder: Path) -> list[str]:
    """Processes of a server of this run, a little after it."""
    time.sleep(8)
    logs = str(folder / "engine.log")
    left = []
    for process in psutil.process_iter():
        try:
            if any(file.path == logs for file in process.open_files()) or "steerl-" in " ".join(process.cmdline()):
                left.append(" ".join(process.cmdline())[:200])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return left
