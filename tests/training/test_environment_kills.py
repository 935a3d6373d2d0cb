"""Ten kills of a run whose episodes have several turns: it ends with the undisturbed run's bytes, and no process is left."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.models import tiny_policy
from tests.training.test_vllm_kills import lines, wait_for_step

pytestmark = pytest.mark.proofs
ROOT = Path(__file__).parents[2]


def test_ten_kills(tmp_path: Path):
    policy = tiny_policy("llama")
    policy.model.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "games.py").write_text((ROOT / "tests" / "games.py").read_text())
    draw = random.Random(0)
    texts = ["".join(draw.choice("abcdefgh ") for _ in range(draw.randint(3, 12))) for _ in range(30)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    given = {"model.path": "model", "prompts.path": "prompts.jsonl", "reward": "[{kind: environment}]",
             "environment.factory": "games.py:chatter", "environment.max_turns": 3, "environment.max_tokens": 60,
             "sampling.max_new_tokens": 12, "sampling.n": 2, "ppo.steps": 40, "ppo.rollouts_per_step": 16,
             "ppo.minibatches": 2, "ppo.learning_rate": 5e-4, "run.save_every": 4}  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "scripts/train_ppo.py"), *words, "--run.dir"]
    subprocess.run([*command, "whole"], check=True, capture_output=True, cwd=tmp_path)
    kills, runs = 0, 0
    while kills < 10:
        runs += 1
        folder = tmp_path / f"run{runs}"
        while not (folder / "summary.json").exists():
            process = subprocess.Popen(
                [*command, folder.name, "--run.resume", "true"], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            if kills < 10 * runs and draw.random() < 0.8:
                wait_for_step(process, folder)
                time.sleep(draw.uniform(0, 1.5))
                family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
                process.kill()
                kills += process.wait() == -signal.SIGKILL
                psutil.wait_procs(family, timeout=5)
                assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
            told = process.communicate()[1].decode()
            assert process.returncode in (0, -signal.SIGKILL), told[-2000:]
        for name in ("model/model.safetensors", "samples.jsonl"):
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        assert lines(folder) == lines(tmp_path / "whole") == 40
    print(f"\n{kills} kills in {runs} runs")
