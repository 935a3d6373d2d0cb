"""Run by test_state_parts.py under each engine: a checkpoint is loaded and saved again, and the policy is exported.

accelerate launch --config_file ENGINE.yaml tests/training/engine/resaved.py FROM OUT [fully_shard]

FROM/JOB/checkpoints/step-000002     of any engine, on any number of ranks
OUT/JOB/checkpoints/step-000002      the same, by this one
OUT/JOB/model, OUT/JOB/merged/model  what a run would leave, in files of at most 20,000 bytes
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from steerl.rollout.common import processes
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.training.run import checkpoint, export
from steerl.training.settings import PPOSettings
from steerl.training.setup import Components, prepare, with_peft
from tests.models import tiny_policy
from tests.ppo_runs import share_of_threes
from tests.training.engine.engines import by_fully_shard

STEP = Path("checkpoints", "step-000002")
# The biases of the base learn, too, and peft keeps the embedding for an adapter that sits in it.
ODD = {"peft_type": "LORA", "r": 2, "bias": "all", "target_modules": ["q_proj", "embed_tokens", "up_proj"]}
JOBS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "tied": ("gpt2", None, {}),
    "experts": ("mixtral", None, {"value": "shared"}),
    "adapted": ("qwen2", ODD, {"value": "shared", "reference": "copy"}),
}


def built(name: str) -> Components:
    family, peft, settings = JOBS[name]
    torch.manual_seed(0)  # fresh adapters
    policy = with_peft(tiny_policy(family), peft)
    return prepare(policy, share_of_threes, Sampling(max_new_tokens=4), PPOSettings(**settings), RunSettings())


def exported(folder: Path, parts: Components) -> None:
    export.SHARD = 20_000
    export.save_model(folder, parts.actor_critic, PPOSettings())
    if hasattr(parts.actor_critic.actor, "peft_config"):
        export.save_model(folder / "merged", parts.actor_critic, PPOSettings(export_merged=True))


def main(source: Path, out: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    processes.start()
    for name in JOBS:
        parts = built(name)
        checkpoint.load(source / name / STEP, parts.state)
        assert checkpoint.save(out / name, 2, parts.state) == out / name / STEP
        exported(out / name, parts)
    if processes.close():
        processes.end()


if __name__ == "__main__":
    if sys.argv[3:] == ["fully_shard"]:
        by_fully_shard()
    main(Path(sys.argv[1]), Path(sys.argv[2]))
