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
    """The command of a job of 40 steps, but for where it is written and what draws."""
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
             "sampling.max_new_tokens": 24, "sampling.seed": 3, "ppo.steps": 40, "ppo.rollouts_per_step": 16, "ppo.minibatches": 2,
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
        assert [step["step"] for step in steps] == list(range(1, 41))
        restarts += max(step["engine/restarts"] for step in steps)
        assert left_behind(folder) == []
    print(f"\nahead {ahead}: {kills} in {runs} runs, {restarts:.0f} restarts seen, {time.monotonic() - began:.0f} s")
    assert len(kills) > 1


def killed_run(command: list[str], folder: Path, draw: random.Random, cwd: Path) -> list[str]:
    """A run in which somebody is killed once, some seconds after the first step; who it was."""
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=(cwd / "err").open("ab"))
    before = lines(folder)
    killed: list[str] = []
    try:
        while process.poll() is None and lines(folder) <= before:
            if draw.random() < 0.002:  # while it starts, too
                break
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 3))
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        servers = [p for p in family if "api_server" in " ".join(p.cmdline()) or "EngineCore" in p.name()]
        who = draw.choice(["job", "server", "engine", "guard"])
        victims: dict[str, Any] = {
            "job": [psutil.Process(process.pid)] if process.poll() is None else [],
            "server": [p for p in servers if "guard.py" not in " ".join(p.cmdline())][:1],
            "engine": servers[-1:],
            "guard": [p for p in family if "guard.py" in " ".join(p.cmdline())][:1],
        }
        for victim in victims[who]:
            victim.send_signal(signal.SIGKILL)
            killed.append(who)
        assert process.wait(timeout=400) == (-signal.SIGKILL if killed == ["job"] else 0), (cwd / "err").read_text()[-2000:]
    finally:
        process.kill()
    return killed


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
