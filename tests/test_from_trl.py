"""docs/from-trl.md as a reader would follow it: TRL's script, ours in Python and as a command, on the page's own toy task."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from steerl.cli import main as steerl_main
from steerl.rollout.common.errors import UserError
from steerl.training.ppo import train

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "from-trl.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tiny_world, tmp_path, monkeypatch) -> Path:
    """Where a reader stands who has made the toy task, with the page's files; a step instead of fifteen."""
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "reviews").symlink_to(tiny_world("reviews"))
    for name, text in re.findall(r"^```\w+\n# (\w+\.\w+)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(text.replace("steps=15", "steps=1").replace("bf16=False", "bf16=False, use_cpu=True"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", sys.argv)
    sys.modules.pop("my_rewards", None)
    return tmp_path


def metrics(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def test_the_page_s_scripts_run(folder, monkeypatch):
    trainer = runpy.run_path("grpo_trl.py")["trainer"]
    theirs = next(line for line in trainer.state.log_history if "reward" in line)
    runpy.run_path("grpo_here.py")
    here = metrics(folder / "runs/here")
    steerl_main(["ppo", "--config", "grpo.yaml", "--run.dir", "runs/command", "--ppo.steps", "1"])
    as_command = metrics(folder / "runs/command")
    names = {"praise": "praise", "names_genre": "names_genre", "soft_overlong_punishment_reward": "overlong"}
    for name, ours in names.items():
        assert f"rewards/{name}/mean" in theirs and f"reward/{ours}" in here and f"reward/{ours}" in as_command
    assert {"reward/praise/words", "kl/ref_k3_token", "rollout/length_mean"} <= set(here) and "words" in theirs
    # what is drawn before anything is learned is the same, whichever way the job is told
    drawn = ["reward/mean", "reward/praise", "rollout/tokens", "reward/praise/words", "policy/entropy"]
    assert {name: here[name] for name in drawn} == {name: as_command[name] for name in drawn}
    for run in ("runs/trl", "runs/here", "runs/command"):
        assert (folder / run / "model" / "adapter_model.safetensors").is_file()


def test_trls_own_objects_handed_to_train_are_told_how_to_be_made(folder):
    praise = importlib.import_module("my_rewards").praise
    rows = [{"prompt": "a"}]
    for reward in ([praise], praise):
        with pytest.raises(UserError) as told:
            train("runs/tiny/reviews/sft", rows, reward, None, None, None)  # type: ignore[arg-type]
        policy, prompts, last = told.value.lines
        assert policy.startswith("policy: expected a Policy, found str; Policy.of(model, tokenizer)")
        assert prompts.startswith('prompts: expected Prompts, found list; Prompts(rows, "prompt", policy, PromptSettings())')
        assert last.startswith("reward: expected reward(rollout, texts), found a ") and "build_reward([...])" in last
