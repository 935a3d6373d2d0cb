"""Run by test_export.py in two ranks: a policy that an engine has wrapped is sent to a file.

accelerate launch --config_file ENGINE.yaml tests/rollout/engines/vllm/shards.py OUT [fully_shard]

OUT/NAME.safetensors     what the main process wrote        OUT/failed.RANK     how a sync ended that failed on it half-way
OUT/adapter/             the same of the adapter alone      OUT/gaps.RANK       what rows scored again said of a server that
                                                            has the weights, and of one that has others
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.fsdp import fully_shard

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.weights import export
from steerl.rollout.engines.vllm.weights.rescore import check_rows
from steerl.rollout.engines.vllm.weights.sync import Sync
from steerl.rollout.model import adapters, sharding
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.logit_postprocessing import logit_postprocessing
from tests import warm
from tests.models import tiny_policy
from tests.rollout.engines.vllm.scored import Scorer

CONFIGS = Path(__file__).parents[4] / "configs" / "accelerate"


def policies() -> dict[str, Policy]:
    """Experts, whose layout a checkpoint has otherwise; a tied head; an adapter to be merged."""
    torch.manual_seed(0)
    base = tiny_policy("llama")
    model = adapters.add(base.model, {"peft_type": "LORA", "r": 2, "init_lora_weights": False})
    return {
        "mixtral": tiny_policy("mixtral"),
        "tied": tiny_policy("qwen3", tie_word_embeddings=True),
        "adapted": Policy.of(model, base.tokenizer),
    }


def command(engine: str, out: Path) -> list[str]:
    config = CONFIGS / ("ddp.yaml" if engine == "fsdp2" else f"{engine}.yaml")
    if engine == "zero3":  # every weight is cut, the tiniest too
        stage = {"stage": 3, "stage3_param_persistence_threshold": 0}
        (out / "stage.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": stage}))
        given = yaml.safe_load(config.read_text())
        given.pop("mixed_precision")
        given["deepspeed_config"] = {"deepspeed_config_file": str(out / "stage.json"), "zero3_init_flag": False}
        config = out / "zero3.yaml"
        config.write_text(yaml.safe_dump(given))
    return warm.accelerate_launch(config, __file__, str(out), engine)


class Nobody:
    """A server that takes everything."""

    def rpc(self, method: str, *args: str) -> list[Any]:
        return [{"problem": ""}]

    def post(self, path: str, body: object) -> Any:
        return {"success": True}


def wrapped(policy: Policy, engine: str, accelerator: Any) -> Policy:
    core, seen, _ = policy.core, policy.capabilities, logit_postprocessing(policy)  # observed on the whole model
    if engine == "fsdp2":
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        for layer in core.model.layers:
            fully_shard(layer, mesh=mesh)
        return policy.with_model(fully_shard(policy.model, mesh=mesh), seen)
    if not hasattr(policy.model, "peft_config"):
        policy.model.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in policy.model.parameters() if p.requires_grad])
    model, _ = accelerator.prepare(policy.model, optimizer)
    return policy.with_model(model, seen)


def scored(served: Policy, policy: Policy) -> str:
    try:
        gap = check_rows(Scorer(served), policy, None, 3, step=4, tolerance=1e-3)
    except UserError as error:
        return str(error)[:77]
    return "equal" if gap < 1e-4 else f"{gap}"


def main(out: Path, engine: str) -> None:
    from steerl.training.engine.engine import start

    process = processes.start()
    assert process.world_size == 2
    accelerator = start()
    for name, whole in policies().items():
        policy = wrapped(whole, engine, accelerator)
        assert sharding.is_sharded(policy.model) == (engine != "ddp")
        sync = Sync(Nobody(), policy, EngineSettings(kind="vllm", sync="file"), out / f"scratch.{process.rank}")
        sync.send(0)
        if process.is_main:
            shutil.move(out / "scratch.0" / "weights.safetensors", out / f"{name}.safetensors")
    alone = Sync(Nobody(), policy, EngineSettings(kind="vllm", sync="adapter"), out / f"scratch.{process.rank}")
    alone.send(1)
    if process.is_main:
        shutil.move(out / "scratch.0" / "adapter-1", out / "adapter")
        shutil.move(out / "scratch.0" / "weights.safetensors", out / "base.safetensors")
    told = [scored(policies()["adapted"], policy), scored(tiny_policy("llama"), policy)]
    (out / f"gaps.{process.rank}").write_text("\n".join(told))
    begun = time.monotonic()

    def fails(weights: Any) -> None:
        next(weights)
        next(weights)
        raise UserError("engine.sync: no room")

    try:
        export.send(export.blocks(policy), fails)
    except UserError as error:
        (out / f"failed.{process.rank}").write_text(f"{(time.monotonic() - begun) // 10:.0f} {error}\n")
    if processes.close():
        processes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
