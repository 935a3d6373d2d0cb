"""Run by test_state_peaks.py under each engine: a state is loaded, saved and exported, and what that takes of memory is told.

accelerate launch --config_file ENGINE.yaml tests/training/engine/peaks.py FROM OUT [fully_shard]

FROM/checkpoints/step-000002   made by `saved`          OUT/RANK.json   MB at most above what stood when a phase began
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from steerl.rollout.common import processes
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.training.run import checkpoint, export
from steerl.training.settings import PPOSettings
from steerl.training.setup import Components, prepare
from tests import memory
from tests.models import tiny_policy
from tests.ppo_runs import share_of_threes
from tests.training.engine.engines import by_fully_shard

WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 16_000}
"""42 million weights; the largest are the embedding's and the head's, 33 MB each in float32."""
STEP = Path("checkpoints", "step-000002")


def built() -> Components:
    settings = PPOSettings(value="shared", reference="none", kl_coef=0.0)
    return prepare(tiny_policy("llama", **WIDE), share_of_threes, Sampling(max_new_tokens=4), settings, RunSettings())


def saved(folder: Path) -> int:
    """A state whose moments are there; its bytes."""
    parts = built()
    for parameter in parts.actor_critic.parameters():
        parameter.grad = torch.ones_like(parameter)
    parts.state.optimizer.step()
    file = checkpoint.save(folder, 2, parts.state) / "tensors.safetensors"
    return file.stat().st_size


def peak(call: Callable[[], object]) -> float:
    gc.collect()
    memory.begin()
    before = memory.standing()
    call()
    return (memory.highest() - before) / 1e6


def main(source: Path, out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    rank, mmap_threshold = processes.start().rank, -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 18)  # what is let go of goes back to the system at once
    export.SHARD = 50_000_000
    parts = built()
    checkpoint.load(source / STEP, parts.state)  # once before, for what libraries set up
    found = {"load": peak(lambda: checkpoint.load(source / STEP, parts.state))}
    found["save"] = peak(lambda: checkpoint.save(out, 2, parts.state))
    found["export"] = peak(lambda: export.save_model(out, parts.actor_critic, PPOSettings()))
    (out / f"{rank}.json").write_text(json.dumps({name: round(value, 1) for name, value in found.items()}))
    if processes.close():
        processes.end()


if __name__ == "__main__":
    if sys.argv[3:] == ["fully_shard"]:
        by_fully_shard()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
