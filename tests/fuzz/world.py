"""What hostile cases begin from: one folder with everything that the commands read, tiny, and the clean job of every command.

make(folder)                 model/, a reward model, prompts, pairs, a dump with scores, a run with a checkpoint, vectors
CLEAN[command]               the flags with which `command` works in a copy of that folder
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from steerl.configs.reader import run_command

import torch
from transformers import AutoModelForSequenceClassification

from steerl.rollout.steering.vectors.files import save_vector
from steerl.scripts import (
    complete,
    dump_rollouts,
    extract_steering,
    inspect_rollouts,
    plan,
    report,
    score_rollouts,
    select_rollouts,
    train_ppo,
    train_reward,
    train_sft,
)
from tests.models import tiny, tiny_tokenizer

LENGTH = "[{kind: length, unit: characters, max: 8}]"
SAMPLE = ["--model.path", "model", "--sampling.max_new_tokens", "4"]
PROMPTS = ["--prompts.path", "prompts.jsonl"]
OUT = ["--run.dir", "out"]
SPEC = "{sites: [{at: {layers: [0]}, op: {type: add}, vector: {file: vector.safetensors}}]}"
PPO = [
    "--ppo.steps",
    "1",
    "--ppo.rollouts_per_step",
    "4",
    "--ppo.minibatches",
    "1",
    "--ppo.epochs",
    "1",
    "--ppo.eval_prompts",
    "0",
]

COMMANDS: dict[str, tuple[Any, type]] = {
    "train_ppo": (train_ppo.main, train_ppo.PPOJob),
    "dump_rollouts": (dump_rollouts.main, dump_rollouts.DumpJob),
    "score_rollouts": (score_rollouts.main, score_rollouts.ScoreJob),
    "complete": (complete.main, complete.CompleteJob),
    "select_rollouts": (select_rollouts.main, select_rollouts.SelectJob),
    "inspect_rollouts": (inspect_rollouts.main, inspect_rollouts.InspectJob),
    "report": (report.main, report.ReportJob),
    "train_sft": (train_sft.main, train_sft.SFTJob),
    "train_reward": (train_reward.main, train_reward.RewardJob),
    "extract_steering": (extract_steering.main, extract_steering.ExtractJob),
    "plan": (plan.main, plan.PlanJob),
}
CLEAN: dict[str, list[str]] = {
    "train_ppo": [*SAMPLE, *PROMPTS, *PPO, "--reward", LENGTH, *OUT],
    "dump_rollouts": [*SAMPLE, *PROMPTS, *OUT],
    "score_rollouts": ["--dump.dir", "dump", "--reward", LENGTH, *OUT],
    "complete": [*SAMPLE, "abc"],
    "select_rollouts": ["dump", "--out", "out.jsonl", "--scores", "scores"],
    "inspect_rollouts": ["dump", "--scores", "scores"],
    "report": ["run", "--out", "out.html"],
    "train_sft": ["--model.path", "model", "--prompts.path", "sft.jsonl", "--sft.steps", "1", "--sft.batch_size", "2", *OUT],
    "train_reward": [
        *["--model.path", "model", "--prompts.path", "pairs.jsonl"],
        *["--reward_model.steps", "1", "--reward_model.batch_size", "2", *OUT],
    ],
    "extract_steering": ["--model.path", "model", "--extract.pairs", "steer.jsonl", "--extract.out", "out.safetensors"],
    "plan": ["--model.path", "model", "--gpus", "8"],
}


def run(command: str, argv: list[str]) -> None:
    main, job = COMMANDS[command]
    run_command(main, job, argv)


def make(folder: Path) -> None:
    """Everything, in this process, which stands in `folder` from then on."""
    folder.mkdir()
    os.chdir(folder)
    model, tokenizer = tiny("llama"), tiny_tokenizer(chat=True)
    for name, held in {"model": model, "judge": AutoModelForSequenceClassification.from_config(_judge(model))}.items():
        held.save_pretrained(name)
        tokenizer.save_pretrained(name)
    lines("prompts.jsonl", [{"prompt": text, "answer": text} for text in ("ab", "c d", "efg", "h", "ij", "k")])
    lines("sft.jsonl", [{"prompt": "ab", "completion": "cd"}, {"prompt": "e", "completion": "fgh"}] * 4)
    lines(
        "pairs.jsonl", [{"prompt": "ab", "chosen": "cd", "rejected": "ef"}, {"prompt": "g", "chosen": "h", "rejected": "i"}] * 4
    )
    lines("steer.jsonl", [{"positive": f"a{c}", "negative": f"{c}b"} for c in "cdefghij"])
    vectors = {layer: torch.randn(32, generator=torch.Generator().manual_seed(layer)) for layer in (0, 1)}
    save_vector("vector.safetensors", vectors, {}, model)
    save_vector("vector.gguf", vectors, {}, model)
    Path("pyvene").mkdir()
    Path("pyvene/config.json").write_text("{}")
    torch.save({"source_representation": vectors[0]}, "pyvene/intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
    Path("spec.yaml").write_text(f"steering: {SPEC}\n")
    run("dump_rollouts", [*CLEAN["dump_rollouts"][:-2], "--run.dir", "dump", "--sampling.n", "2"])
    run("score_rollouts", [*CLEAN["score_rollouts"][:-2], "--run.dir", "scores"])
    run("train_ppo", [*CLEAN["train_ppo"][:-2], "--run.dir", "run"])
    Path("empty").mkdir()


def _judge(model: Any) -> Any:
    config = type(model.config)(**model.config.to_dict())
    config.num_labels = 1
    return config


def lines(path: str, rows: list[dict[str, Any]]) -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
