"""The first second: what a command has imported by the time that it answers. Modules are counted, never seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from steerl.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
LIGHT = {"steerl", "yaml", "_yaml", "docstring_parser", "jinja2", "markupsafe", "regex"}
"""Packages that reading settings may import: all of them together in some hundredths of a second."""
OWN_READER = {"summarize"}
"""Commands whose flags are transformers' own, which are read by it."""
UNUSED = {
    "trl", "datasets", "peft", "wandb", "deepspeed", "matplotlib", "pandas", "sklearn", "pyarrow", "lm_eval", "tensorboard",
    "trackio", "bitsandbytes", "httpx", "uvicorn", "starlette", "rouge_score", "docstring_parser", "gguf",
}  # fmt: skip
"""Packages that a PPO job on a plain model, a jsonl file and a rule has no use for."""
PROGRAM = """
import contextlib, io, json, sys
from steerl.cli import main

def heavy():
    found = {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
    return {name for name in found if "cython" not in name and name != "__mp_main__"}  # of yaml's reader in C, of processes

before = heavy()
for words in json.loads(sys.argv[1]):
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as left:
            status = left.code
    print(json.dumps([words, status, out.getvalue() + err.getvalue(), sorted(heavy() - before)]))
"""


def answers(commands: list[list[str]]) -> list[tuple[list[str], int, str, set[str]]]:
    """(words, status, what is said, the packages that are there by then) of each, one after the other in one new process."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    return [(words, status, said, set(packages)) for words, status, said, packages in told]


def test_help_and_wrong_settings_come_before_torch():
    ours = [name for name in COMMANDS if name not in OWN_READER]
    asked = [["--help"], *([name, flag] for name in ours for flag in ("--help", "--no.such=1"))]
    told = answers(asked)
    assert [words for words, *_ in told] == asked
    for words, status, said, packages in told:
        assert status in (0, None) if "--help" in words else status == 2 and said.startswith("no.such: unknown"), said
        assert packages <= LIGHT, (words, packages - LIGHT)


@pytest.mark.parametrize("name", sorted(OWN_READER))
def test_the_command_with_transformers_own_flags_imports_no_trainer_of_others(name):
    ((_, status, _, packages),) = answers([[name, "--help"]])
    assert status == 0 and not packages & UNUSED - {"peft"}, packages & UNUSED  # peft: of transformers' Trainer


WRONG = {
    "ppo": [
        ("--ppo.steps many", "ppo.steps: expected a whole number, found 'many'"),
        ("--model.path x --run.dir x --reward '[{kind: json}]' --ppo.credit group", "ppo.credit group compares samples"),
        (
            "--model.path x --run.dir x --reward '[{kind: json}]' --sampling.greedy true",
            "sampling.greedy: greedy rollouts have",
        ),
        ("--run.dir x --reward '[{kind: json}]'", "model.path: missing"),
        ("--config nowhere.yaml", "--config: nowhere.yaml does not exist"),
        ("--sampling.temperature 0", "sampling.temperature"),
        ("--model.peft nonsense", "model.peft: expected a mapping"),
        ("--model.peft.peft_type SUCH", "model.peft.peft_type: unknown value 'SUCH'"),
        ("--engine.check_rows 3", "engine.check_rows: has no effect"),
        ("--environment.max_turns 2", "environment.max_turns: has no effect"),
        ("--steering nowhere.yaml", "steering: nowhere.yaml cannot be read"),
        ("--steering '{sites: [{at: {layers: [0]}, op: {type: ad}, vector: v.pt}]}'", "did you mean add?"),
        ("--steering '{sites: [{at: {layers: [0]}, op: {type: add, rank: 2}, vector: v.pt}]}'", "rank"),
        ("--reward '[{kind: modle, path: x}]'", "reward[0].kind: unknown value 'modle'; did you mean model?"),
        ("--reward '[{kind: regex, pattern: (}]'", "is no regular expression"),
        ("--reward '[{kind: model, path: x, output: logits}]'", "did you mean logit?"),
        ("--reward '[{kind: probe}, {kind: novelty, dimensions: 0}, {kind: process}]'", "reward[1].dimensions"),
        ("--reward '[{kind: http, url: x}, {kind: function, function: x}]'", "reward[0].url: expected http://host:port"),
        ("--reward '[{kind: environment, fallback: low}]'", "reward[0].fallback"),
        ("--reward '[{kind: length, normalise: walking}]'", "normalise: unknown value 'walking'"),
        ("--model.path x --reward '[{kind: regex, pattern: a}]'", "run.dir: missing"),
        ("--model.path x --reward '[{kind: regex, pattern: a}]' --run.dir tests", "run.dir: tests is not empty"),
    ],
    "dump": [("--prompts.limit -1", "prompts.limit"), ("--prompts.path '[{weight: 1}]'", "prompts.path[0].path")],
    "score": [("--texts.limit x", "texts.limit"), ("--reward '[{kind: exact}]'", "dump.dir and texts.path: name one of them")],
    "select": [("d o --select.mode reject", "threshold: missing")],
    "sft": [("--sft.epochs x", "sft.epochs")],
    "reward": [("--reward_model.epochs x", "reward_model.epochs")],
    "eval": [("--steering '{role: trainable, sites: []}'", "steering")],
    "plan": [("--shares.decode x", "shares.decode")],
    "complete": [("hi --prompts.path x", "prompt: given, and prompts.path too")],
    "study": [("--study.seeds x --study.arms '{plain: null}'", "study.seeds")],
}
"""What is wrong with a command's settings and needs no model to be seen; and what is said of it."""


def test_what_needs_no_model_is_told_before_torch():
    import shlex

    cases = [(name, words, line) for name, wrong in WRONG.items() for words, line in wrong]
    told = answers([[name, *shlex.split(words)] for name, words, _ in cases])
    for (words, status, said, packages), (_, _, line) in zip(told, cases, strict=True):
        assert status == 2 and line in said, (words, said)
        assert packages <= LIGHT, (words, packages - LIGHT)


JOB = """
import sys
from steerl.cli import main
from steerl.training.types import TrainState

advance = TrainState.advance

def after_first(self, *given):
    print(*sorted({name.partition(".")[0] for name in sys.modules}))
    advance(self, *given)

TrainState.advance = after_first
main(sys.argv[1:])
"""


SMALLEST = {"steps": 1, "rollouts_per_step": 4, "minibatches": 1, "epochs": 1, "eval_prompts": 0}


def test_a_plain_job_imports_what_it_uses(tiny_world, tmp_path):
    world = tiny_world("reviews")
    words = ["ppo", "--reward", "[{kind: regex, pattern: a}]", "--run.dir", str(tmp_path / "run")]
    words += [
        "--model.path",
        str(world / "sft"),
        "--prompts.path",
        str(world / "prompts.jsonl"),
        "--sampling.max_new_tokens",
        "2",
    ]
    words += [f"--ppo.{name}={n}" for name, n in SMALLEST.items()]
    ran = subprocess.run([sys.executable, "-c", JOB, *words], capture_output=True, text=True, cwd=ROOT, env=dict(os.environ))
    assert ran.returncode == 0, ran.stderr
    packages = set(ran.stdout.splitlines()[0].split())
    assert {"torch", "transformers", "steerl"} <= packages
    assert not packages & UNUSED, packages & UNUSED


@pytest.mark.parametrize("module", ["steerl.reward.kinds.worker", "steerl.rollout.environments.host.zygote"])
def test_processes_for_a_users_code_start_without_torch(module):
    program = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}} - set(sys.stdlib_module_names))"
    said = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert set(said.split()) - {"__main__", "__mp_main__"} == {"steerl"}, said
