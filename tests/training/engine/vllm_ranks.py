"""Run by test_vllm_ranks.py on two processes: tiny PPO runs in process and, in the same process group, by a vLLM server.

... tests/training/engine/vllm_ranks.py OUT URL JOB,JOB,... STEPS [fully_shard]      leaves OUT/JOB/{in, out}/
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
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.steering import load_spec
from steerl.training import ppo
from steerl.training.setup import with_peft
from tests.models import tiny_policy
from tests.ppo_runs import prompts_of, share_of_threes
from tests.training.engine.engines import by_fully_shard
from tests.vllm_server import LORA, STEERED, WIDE, gentle

SMALL = {"rollouts_per_step": 12, "minibatches": 2, "epochs": 2, "micro_batch_size": 4, "learning_rate": 2e-3,
         "eval_prompts": 3}  # fmt: skip
JOBS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"peft": LORA, "ppo": {"learning_rate": 1e-2}},
    "steered": {"steering": STEERED},
    # one prompt: the second rank asks for nothing, and is in step all the same
    "one_prompt": {
        "sampling": {"n": 3, "top_p": 0.9},
        "ppo": {"rollouts_per_step": 3, "minibatches": 1, "eval_prompts": 1, "learning_rate": 2e-4},
    },
}


def run(job: dict[str, Any], folder: Path, steps: int, settings: EngineSettings | None) -> None:
    torch.manual_seed(0)  # fresh adapters
    policy = with_peft(gentle(tiny_policy("llama", **WIDE)), job.get("peft"))
    ppo.train(
        policy,
        prompts_of(policy),
        share_of_threes,
        Sampling(**{"max_new_tokens": 8, "stop_ids": [11, 17, 23], **job.get("sampling", {})}),
        ppo.PPOSettings(**{**SMALL, **job.get("ppo", {}), "steps": steps}),
        RunSettings(dir=str(folder)),
        steering=load_spec(job["steering"]) if "steering" in job else None,
        engine=settings,
    )


def main(out: Path, url: str, names: list[str], steps: int) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    processes.start()
    for name in names:
        run(JOBS[name], out / name / "in", steps, None)
        run(JOBS[name], out / name / "out", steps, EngineSettings(kind="vllm", url=url))
    if processes.close():
        processes.end()


if __name__ == "__main__":
    if sys.argv[5:] == ["fully_shard"]:
        by_fully_shard()
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), int(sys.argv[4]))
