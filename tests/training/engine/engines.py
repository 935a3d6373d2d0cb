"""Run by test_engines.py under each engine: tiny PPO runs in one process group, one after the other.

accelerate launch --config_file ENGINE.yaml tests/training/engine/engines.py OUT WALKS JOB,JOB,... [fully_shard]

With fully_shard the models are wrapped by torch itself, as accelerate's FSDP2 does it on GPUs: on a CPU it would be DDP.

OUT/JOB/{metrics.jsonl, summary.json, model/, ...}      as every run leaves it
OUT/JOB.rollouts.RANK.jsonl                             every row that was sampled, as the reward saw it
OUT/JOB.engine.json                                     what wrapped the model, and how the weights lay
OUT/JOB.again/                                          of jobs in RESUMED: the run from its checkpoint after step 1
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import fully_shard

from steerl.reward.build import build_reward
from steerl.reward.types import Scores
from steerl.rollout.common import processes
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts
from steerl.rollout.steering import load_spec
from steerl.rollout.types import Rollout, Texts
from steerl.training import ppo
from steerl.training.engine import engine
from steerl.training.setup import Components, with_peft
from tests.models import tiny_policy
from tests.ppo_runs import LORA, prompts_of, share_of_threes

SITE = {"at": {"layers": [1]}, "vector": [0.5 - i % 3 for i in range(32)], "strength": 2.0}
PUSHED = {"role": "policy", "sites": [SITE], "kl_budget": {"nats_per_sequence": 0.5, "action": "rescale"}}
LEARNED = {"role": "trainable", "sites": [{"at": {"layers": [0, 1]}, "op": {"type": "loreft", "rank": 2}}]}
SMALL = {
    "rollouts_per_step": 12,
    "minibatches": 2,
    "epochs": 2,
    "micro_batch_size": 4,
    "learning_rate": 1e-3,
    "eval_prompts": 3,
    "samples": 1,
}
JOBS: dict[str, dict[str, Any]] = {
    "walks": {"family": "randomwalks", "ppo": {"steps": 10, "rollouts_per_step": 32, "micro_batch_size": 3, "kl_coef": 0.03}},
    # one prompt of three samples: the second rank samples nothing, and learns from a row or none of each minibatch
    "one_prompt": {
        "family": "gpt2",
        "sampling": {"n": 3},
        "ppo": {"steps": 2, "rollouts_per_step": 3, "minibatches": 3, "eval_prompts": 1, "gather": "layers"},
    },
    # a model that takes no padding: rows go by prompt length, and ranks have as many passes as the other only by waiting
    "unpadded": {"family": "recurrent_gemma", "ppo": {"steps": 2, "gather": "layers", "micro_batch_size": 3}},
    "lora_shared": {"family": "t5", "peft": LORA, "ppo": {"steps": 2, "value": "shared", "kl_target": 0.5, "kl_horizon": 50.0}},
    # gradients of several micro-batches of one or two rows each
    "full": {"family": "gpt2", "ppo": {"steps": 2, "schedule": "linear", "whiten_rewards": True, "micro_batch_size": 1}},
    "pushed": {"family": "llama", "peft": LORA, "steering": PUSHED, "ppo": {"steps": 2, "packing": True}},
    "learned": {"family": "llama", "peft": LORA, "steering": LEARNED, "ppo": {"steps": 2, "gather": "layers", "packing": True}},
}
RESUMED = ("lora_shared", "full")


class Seen:
    """A reward that writes down what it is given."""

    def __init__(self, reward: Any, path: Path):
        self.reward, self.path = reward, path

    def __call__(self, rollout: Rollout, texts: Texts) -> Scores:
        with self.path.open("a") as file:
            for i in range(len(rollout)):
                ids = rollout.response_BR[i, : rollout.lengths_B[i]].tolist()
                found = [int(rollout.policy_step_B[i]), int(rollout.row_B[i]), int(rollout.sample_B[i]), ids]
                file.write(json.dumps(found) + "\n")
        scores: Scores = self.reward(rollout, texts)
        return scores


def run(job: dict[str, Any], out: Path, name: str, walks: Path, **run_settings: Any) -> None:
    torch.manual_seed(0)  # fresh adapters
    if job["family"] == "randomwalks":
        policy = load_policy(ModelSettings(path=str(walks / "base")), read=False)
        prompts = load_prompts(PromptSettings(path=str(walks / "prompts.jsonl")), policy, 10)
        function = f"{Path(__file__).parents[3] / 'scripts/toy_tasks/randomwalks.py'}:optimality"
        reward: Any = build_reward([{"name": "optimality", "kind": "function", "function": function}], policy=policy)
    else:
        policy = with_peft(tiny_policy(job["family"]), job.get("peft"))
        prompts, reward = prompts_of(policy), share_of_threes
    sampling = {"max_new_tokens": 10} if job["family"] == "randomwalks" else {"max_new_tokens": 8, "stop_ids": [11, 17, 23]}
    ppo.train(
        policy,
        prompts,
        Seen(reward, out / f"{name}.rollouts.{processes.start().rank}.jsonl"),
        Sampling(**{**sampling, **job.get("sampling", {})}),
        ppo.PPOSettings(**{**SMALL, **job["ppo"]}),
        RunSettings(dir=str(out / name), save_every=1 if name.partition(".")[0] in RESUMED else 2, keep=9, **run_settings),
        steering=load_spec(job["steering"]) if "steering" in job else None,
    )


def share_of(weight: Any) -> float:
    """How much of a weight lies on this rank."""
    if hasattr(weight, "ds_tensor"):
        return float(weight.ds_tensor.numel() / weight.ds_numel)
    return float(weight.to_local().numel() / weight.numel()) if hasattr(weight, "to_local") else 1.0


def noted(out: Path, name: str) -> None:
    """Have `train` write down what wraps the model and how its weights lie, as soon as it is prepared."""
    prepare = ppo.prepare

    def noting(*arguments: Any) -> Components:
        parts: Components = prepare(*arguments)
        weights = list(parts.actor_critic.parameters())
        held = [share_of(p) for p in weights]
        found = {
            "wrapper": type(parts.state.model).__name__,
            "optimizer": type(getattr(parts.state.optimizer, "optimizer", None)).__name__,
            "weights": len(weights),
            "empty": sum(p.numel() == 0 for p in weights),
            "shares": sorted(held),
        }
        processes.on_main(lambda: (out / f"{name}.engine.json").write_text(json.dumps(found)))
        ppo.prepare = prepare
        return parts

    ppo.prepare = noting


def main(out: Path, walks: Path, names: list[str]) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    processes.start()
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        noted(out, name)
        run(JOBS[name], out, name, walks)
        if name in RESUMED:
            processes.on_main(lambda name=name: cut(out / name, out / f"{name}.again"))
            run(JOBS[name], out, f"{name}.again", walks, resume=True)
    if processes.close():
        processes.end()


def fully_sharded(_: Any, module: Any) -> None:
    """What accelerate makes of configs/accelerate/fsdp2.yaml: blocks by themselves, the rest in the root."""
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for block in [m for m in module.modules() if type(m).__name__ in module._no_split_modules]:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def by_fully_shard() -> None:
    """Have `train` take FSDP2 on a CPU, where accelerate would take DDP."""
    engine.is_fsdp2, engine.fully_shard = (lambda _: True), fully_sharded


def cut(whole: Path, again: Path) -> None:
    """A run as a kill after its first step's checkpoint leaves it: logs go on beyond the checkpoint, and nothing else does."""
    shutil.copytree(whole, again)
    shutil.rmtree(again / "model")
    shutil.rmtree(again / "checkpoints" / "step-000002")
    (again / "summary.json").unlink()


if __name__ == "__main__":
    if sys.argv[4:] == ["fully_shard"]:
        by_fully_shard()
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
