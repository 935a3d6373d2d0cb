"""A real PPO step of a random model of 200 million weights: this process's peak beside the plan's, both in bytes.

    python tests/training/planning/plan_step.py '{"peft": {"peft_type": "LORA", "r": 8}, "ppo": {"value": "shared"}}'

What stands after the imports is not counted. A tiny step goes first: much is imported only when it is needed.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steerl.reward.types import Scores
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import Prompts, PromptSettings
from steerl.rollout.types import Rollout, Texts
from steerl.training.algorithm.experience import credit, gather_scored, sample, score
from steerl.training.algorithm.update import learn
from steerl.training.planning.memory import PlannedStep, memory
from steerl.training.planning.passes import Blueprint
from steerl.training.settings import PPOSettings
from steerl.training.setup import prepare, with_peft
from tests.memory import highest, standing
from tests.models import tiny_policy, tiny_tokenizer

SHAPE = {
    "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 8, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def reward(rollout: Rollout, texts: Texts) -> Scores:
    return Scores((rollout.response_BR % 4).float().mean(1))


def take(policy: Policy, sampling: Sampling, ppo: PPOSettings, prompt: int) -> dict[str, int]:
    """One step, without its files; the peak after each of its parts."""
    parts = prepare(policy, reward, sampling, ppo, RunSettings())
    seen = {"load": highest()}
    texts = ["a" * (prompt - i % 3) for i in range(ppo.rollouts_per_step)]
    prompts = Prompts([{"prompt": text} for text in texts], "prompt", policy, PromptSettings())
    rows = prompts.take(0, 0, ppo.rollouts_per_step)
    samples = sample(prompts, parts.sampler, rows, step=0, progress=0.0)
    seen["sample"] = highest()
    scored = score(parts.actor_critic, parts.reference, *gather_scored(samples, reward), ppo)
    seen["score"] = highest()
    learn(parts.state, credit(scored, ppo, 0.05)[0], ppo, seed=0)
    return seen | {"learn": highest(), "width": samples.rollout.response_width}


def main(asked: dict[str, Any]) -> dict[str, Any]:
    rows, prompt, response = (asked.get(name, default) for name, default in (("rows", 4), ("prompt", 16), ("response", 16)))
    small = {"rollouts_per_step": rows, "epochs": 1, "minibatches": 1, "micro_batch_size": rows, "learning_rate": 1e-5}
    ppo = PPOSettings(**{**small, **asked.get("ppo", {})})
    sampling = Sampling(max_new_tokens=response)
    config = AutoConfig.for_model("llama", **SHAPE | {"num_hidden_layers": asked.get("layers", SHAPE["num_hidden_layers"])})
    blueprint = Blueprint(config, "causal", torch.float32).with_peft(asked.get("peft"))
    own_value = blueprint if ppo.credit == "gae" and ppo.value == "separate" else None
    plan = memory(PlannedStep(blueprint, own_value, ppo, sampling, prompt, "no"), "ddp", 1, device="cpu")

    take(with_peft(tiny_policy("llama"), asked.get("peft")), sampling, ppo, prompt)
    before = standing()
    policy = with_peft(Policy.of(AutoModelForCausalLM.from_config(config).eval(), tiny_tokenizer()), asked.get("peft"))
    weights = sum(p.numel() for p in policy.core.parameters())
    seen = take(policy, sampling, ppo, prompt)
    assert seen.pop("width") == response
    return {
        "weights": weights,
        "measured": highest() - before,
        "planned": plan.total,
        "highest": plan.highest,
        "phases": plan.phases,
        "parts": plan.parts,
        "seen": {name: value - before for name, value in seen.items()},
    }


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
