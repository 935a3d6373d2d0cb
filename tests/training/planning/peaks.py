"""A real PPO run of two steps, and the peak of this process's memory in each phase, beside what stood after the imports.

    accelerate launch --config_file ENGINE.yaml tests/training/planning/peaks.py WORLD OUT '{"ppo.gather": "layers"}' [fully_shard]

WORLD/{tiny, large, prompts.jsonl}    made by `world`
OUT/peaks.RANK.json                   bytes by phase; a tiny run goes first, for much is imported only when it is needed
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from steerl.configs.reader import read

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steerl.reward.types import Scores
from steerl.rollout.common import processes
from steerl.rollout.types import Rollout, Texts
from steerl.scripts import train_ppo
from steerl.training import ppo
from steerl.training.engine import engine
from steerl.training.run import checkpoint
from tests import memory
from tests.models import tiny_tokenizer
from tests.training.engine.engines import by_fully_shard
from tests.training.planning.plan_step import SHAPE

JOB = {
    "sampling.max_new_tokens": 6,
    "reward": [{"kind": "function", "name": "fours", "function": f"{Path(__file__).resolve()}:fours"}],
    "ppo.steps": 2,
    "ppo.rollouts_per_step": 4,
    "ppo.epochs": 1,
    "ppo.minibatches": 1,
    "ppo.micro_batch_size": 2,
    "ppo.learning_rate": 1e-6,
    "ppo.eval_prompts": 0,
    "ppo.gap_tolerance": 1.0,
    "ppo.samples": 0,
}
PROMPT = 16
PHASES = {"sample": (ppo, "sample"), "score": (ppo, "score"), "learn": (ppo, "learn")}
PHASES |= {"save": (checkpoint, "save"), "export": (ppo, "save_model")}


def fours(rollout: Rollout, texts: Texts) -> Scores:
    return Scores((rollout.response_BR % 4).float().mean(1))


def world(folder: Path, **shape: Any) -> Path:
    """A tiny and a large random model in bfloat16, as most are published, and prompts of one length."""
    for name, fields in (("tiny", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}), ("large", shape)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE | fields))
        model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size="200MB")
        tiny_tokenizer().save_pretrained(folder / name)
    lines = [json.dumps({"prompt": "abcdefgh"[i % 8] * PROMPT}) for i in range(64)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    return folder


def arguments(folder: Path, model: str, out: Path, changed: dict[str, Any]) -> list[str]:
    """The command line of the job."""
    given = JOB | {"model.path": folder / model, "prompts.path": folder / "prompts.jsonl", "run.dir": out / model} | changed
    words = [
        (f"--{name}", json.dumps(value) if isinstance(value, list | dict) else str(value)) for name, value in given.items()
    ]
    return [word for pair in words for word in pair]


class Peaks:
    """The highest that this process stood in each phase."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.before = 0

    def of(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*given: Any, **named: Any) -> Any:
            memory.begin()
            out = call(*given, **named)
            self.end(name)
            return out

        return measured

    def end(self, name: str) -> None:
        self.seen[name] = max(self.seen.get(name, 0), memory.highest() - self.before)


def main(folder: Path, out: Path, changed: dict[str, Any]) -> None:
    ctypes.CDLL(None).mallopt(-3, 65536)  # M_MMAP_THRESHOLD: every tensor in its own pages, so that the heap has no holes
    rank = processes.start().rank
    train_ppo.main(read(train_ppo.PPOJob, arguments(folder, "tiny", out, changed)))
    peaks = Peaks()
    for name, (module, function) in PHASES.items():
        setattr(module, function, peaks.of(name, getattr(module, function)))
    place, prepare = engine.place, ppo.prepare

    def placed(*given: Any) -> None:
        place(*given)
        peaks.end("load")
        peaks.begin()

    def prepared(*given: Any, **named: Any) -> Any:
        parts = prepare(*given, **named)
        peaks.end("wrap")
        return parts

    engine.place, ppo.prepare = placed, prepared
    peaks.begin()
    peaks.before = memory.standing()
    train_ppo.main(read(train_ppo.PPOJob, arguments(folder, "large", out, changed)))
    (out / f"peaks.{rank}.json").write_text(json.dumps({"before": peaks.before, **peaks.seen}))
    if processes.close():
        processes.end()


if __name__ == "__main__":
    if sys.argv[4:] == ["fully_shard"]:
        by_fully_shard()
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
