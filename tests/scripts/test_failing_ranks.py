"""A rank that fails or is killed: the job ends, its reason stands there once, nobody is left, the last checkpoint is whole."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from steerl.training.run import checkpoint
from tests import warm
from tests.models import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
REWARD = """
import os, signal

calls = 0

def fail(prompts, completions, **columns):
    global calls
    calls += 1
    if calls >= 4 and os.environ["RANK"] == "1":  # the evaluation, two steps, and this
        if os.environ["HOW"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ["HOW"] == "defect":
            from steerl.training.algorithm import experience
            experience.check_scores = lambda scores, rollout: [][0]
            return [0.0] * len(completions)
        raise KeyError("no such word")
    return [len(text) / 10 for text in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "how"),
    [
        ("ddp", "user's fault"),
        ("zero3", "killed"),
        pytest.param("zero3", "defect", marks=pytest.mark.proofs),
        pytest.param("ddp", "killed", marks=pytest.mark.proofs),
    ],
)
def test_a_failing_rank_ends_the_job_and_says_why_once(engine: str, how: str, tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in "abcdefg"))
    (tmp_path / "reward.py").write_text(REWARD)
    reward = [{"name": "length", "kind": "function", "function": f"{tmp_path / 'reward.py'}:fail"}]
    command = warm.accelerate_launch(engine, str(ROOT / "scripts/train_ppo.py"))
    command += ["--model.path", str(tmp_path / "model"), "--prompts.path", str(tmp_path / "prompts.jsonl")]
    command += ["--reward", json.dumps(reward), "--sampling.max_new_tokens", "5", "--ppo.steps", "9"]
    command += ["--ppo.rollouts_per_step", "8", "--ppo.minibatches", "2", "--ppo.eval_prompts", "2"]
    command += ["--run.save_every", "1", "--run.dir", str(tmp_path / "run")]
    command += ["--ppo.compile", "auto"] if engine == "zero3" else []
    here = tmp_path / "here"  # where all the job's processes stand
    here.mkdir()
    environment = {**os.environ, "HOW": how}
    with (tmp_path / "said").open("w") as said:  # no pipe: one who is left behind would hold it, and be waited for
        status = subprocess.run(command, env=environment, cwd=here, stdout=said, stderr=said, timeout=300).returncode
    told = (tmp_path / "said").read_text()
    assert status != 0
    assert told.count("ppo.compile: DeepSpeed holds the weights") == (engine == "zero3")
    left = [path for path in Path("/proc").glob("[0-9]*/cwd") if _stands_in(path) == str(here)]
    assert not left
    # What comes after it is the launcher's: accelerate shows how its own call failed, and a table of ranks and exit codes.
    ours = told.split("torch/distributed/elastic")[0]
    assert ours.count("process 0: ends, because another process") <= 1  # the launcher may be quicker to end it
    reasons = {"user's fault": "process 1: reward[0] (length)", "defect": "IndexError: list index out of range"}
    if how == "killed":
        assert "Traceback" not in ours and told.count("(SIGKILL) received") == 1
    else:
        assert told.count(reasons[how]) == 1
        assert ours.count("Traceback (most recent call last)") == (how == "defect")
    last = checkpoint.newest(tmp_path / "run")
    done = 3 if how == "defect" else 2  # its third scores had been checked before they broke the check
    assert last is not None and last.name == f"step-{done:06d}" and checkpoint.damaged(last) is None


def _stands_in(path: Path) -> str:
    try:
        return os.readlink(path)
    except OSError:  # it ended just now
        return ""
