"""Run by test_ranks.py in one process and, by accelerate launch, in two: several tiny PPO runs, one after the other.

python tests/training/engine/ranks.py FOLDER          leaves FOLDER/NAME/{metrics.jsonl, summary.json, model/}
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from steerl.reward.build import build_reward
from steerl.reward.types import Scores
from steerl.reward.weighted_sum import WeightedSum
from steerl.rollout.common import processes
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model.policy import Policy
from steerl.rollout.steering import load_spec
from steerl.rollout.steering.vectors.files import save_vector
from steerl.rollout.types import Rollout, Samples, Texts
from steerl.training.algorithm.importance import Correction
from steerl.training.model import compiled
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft
from tests.models import tiny_policy
from tests.ppo_runs import LORA, prompts_of, share_of_threes, two_parts, with_gaps

TABLE = runpy.run_path(str(Path(__file__).resolve().parents[3] / "examples" / "toy_engine.py"))["Table"]
OWN = str(Path(__file__).resolve().parents[1] / "algorithm" / "users_own.py")
JOBS = {
    # 21 rows on 2 ranks, 3 minibatches of 7, micro-batches of 2: nothing divides evenly
    "ragged": ("gpt2", None, {}, {"rollouts_per_step": 21, "minibatches": 3, "micro_batch_size": 2}),
    # the mask is replayed: adapter, encoder-decoder and shared value over what could be drawn
    "lora_shared": (
        "t5",
        LORA,
        {"top_p": 0.8, "top_k": 20},
        # Adam's eps above roundings: else it makes whole steps of them, and another processor's are others.
        {"value": "shared", "kl_target": 0.5, "kl_horizon": 100.0, "bootstrap_cut": True, "optimizer_arguments": {"eps": 1e-4}},
    ),
    "group": ("llama", None, {"n": 4}, {"credit": "group", "loss_reduction": "sequence", "loss": "gspo", "clip": 0.005}),
    # three prompts on two ranks, several parts, tokens of all ranks whitened together
    "parts": (
        "gpt2",
        None,
        {"n": 4},
        {
            "credit": "reinforce_baseline",
            "group_parts": True,
            "rollouts_per_step": 12,
            "kl_as": "loss",
            "overlong_buffer": 4,
            "missing_stop_penalty": 0.5,
            "correction": Correction("geometric_truncate"),
        },
    ),
    "corrected": (
        "bloom",
        None,
        {"top_p": 0.8, "replay_mask": False},
        {"correction": Correction("sequence_truncate"), "value_warmup_steps": 1, "loss": "dppo", "dppo_threshold": 0.001},
    ),
    # everything of the user's own; what the loss tells hangs on the rows that a rank has
    "own": (
        "gpt2",
        None,
        {"n": 2},
        {
            "loss": f"{OWN}:told_by_rows",
            "credit": f"{OWN}:centred",
            "optimizer": f"{OWN}:Signs",
            "schedule": f"{OWN}:steps_down",
            "learning_rate": 1e-4,
        },
    ),
    # the main process alone decides to end it
    "hooked": ("gpt2", None, {}, {}),
    # groups that score alike are drawn again, one prompt or two at a time
    "dropped": (
        "gpt2",
        None,
        {"n": 2, "max_new_tokens": 2},
        {"credit": "group", "rollouts_per_step": 10, "drop_equal_groups": True, "resample_tries": 2},
    ),
    # one prompt: the second rank samples nothing, and learns from a row or none of each minibatch
    "one_prompt": ("gpt2", None, {"n": 3}, {"rollouts_per_step": 3, "minibatches": 3, "eval_prompts": 1}),
    # the same with a source of its own, which knows no ranks, and a reward that counts over all of them
    "table": (
        "gpt2",
        None,
        {"n": 3, "stop_ids": []},
        {"rollouts_per_step": 3, "minibatches": 3, "eval_prompts": 1, "correction": Correction("token_truncate")},
    ),
    "compiled": ("llama", None, {}, {"compile": "on"}),
    "steered": ("llama", None, {"n": 2}, {"value": "shared"}),
    # a probe and a bonus, of the policy as it started; some rows are screened out
    "screened": ("llama", LORA, {"n": 2}, {"value": "shared"}),
    "vectors": ("gpt2", None, {}, {}),
    "explored": ("llama", None, {"n": 2}, {}),
    "prevented": ("gpt2", None, {"n": 2}, {"value": "shared", "kl_target": 0.5, "kl_horizon": 100.0}),
    # as if some of the tokens had been fed: a rank's rows may have no action at all
    "gaps": (
        "gpt2",
        None,
        {},
        {"rollouts_per_step": 15, "minibatches": 5, "bootstrap_cut": True, "loss_reduction": "constant", "loss": "cispo"},
    ),
    # episodes of two to four turns; the second rank has rows of its own
    "episodes": ("gpt2", None, {"n": 3, "batch_size": 4}, {"rollouts_per_step": 15, "minibatches": 5, "bootstrap_cut": True}),
}
GAMES = str(Path(__file__).resolve().parents[2] / "games.py")
ENVIRONMENT = {"episodes": EnvironmentSettings(factory=f"{GAMES}:chatter", max_turns=3, max_tokens=30, workers=2)}
SITE = {"at": {"layers": [1]}, "vector": [0.5 - i % 3 for i in range(32)], "strength": 2.0}
STEERING = {
    "steered": {"fraction": 0.5, "kl_budget": {"nats_per_sequence": 0.5}, "sites": [{**SITE, "schedule": {"until": 0.9}}]},
    "vectors": {"role": "trainable", "sites": [{"at": {"layers": [0, 1]}, "op": {"type": "loreft", "rank": 2}}]},
    "explored": {
        "role": "behaviour",
        "correction": {"type": "token_mask"},
        "fraction": 0.5,
        "sites": [{**SITE, "strength": {"samples": [2.0, 1.0]}, "schedule": {}}],
    },
    "prevented": {
        "role": "preventative",
        "correction": {"type": "sequence_truncate"},
        "kl_budget": {"nats_per_sequence": 0.05},
        "sites": [{**SITE, "strength": {"samples": [2.0, 1.0]}}],
    },
}
SETTINGS = {
    "steps": 3,
    "rollouts_per_step": 16,
    "minibatches": 2,
    "epochs": 2,
    "micro_batch_size": 3,
    "learning_rate": 1e-3,
    "eval_prompts": 5,
}


def logging_reward(rollout: Rollout, texts: Texts) -> Scores:
    """A number and a value per row, as TRL's log_metric and log_extra give them."""
    lengths = [float(length) for length in rollout.lengths_B.tolist()]
    return replace(
        share_of_threes(rollout, texts), metrics={"toy/length": lengths}, extra={"toy/place": texts.columns["place"]}
    )


class Counted:
    """Each row's score times the rows of all ranks: every rank has to call."""

    is_collective = True

    def __call__(self, rollout: Rollout, texts: Texts) -> Scores:
        count = processes.sum_(torch.tensor(float(len(rollout))))
        return Scores(share_of_threes(rollout, texts).total_B.cpu() * count)


def screened_reward(folder: Path, policy: Policy) -> WeightedSum:
    reading = {"1": {"slope": 1.0, "bias": 0.0, "threshold": 1.0}}
    notes = {"probe": reading, "component": "block_output", "stack": "decoder", "position": "mean"}
    vector = torch.tensor([0.5 - i % 3 for i in range(32)])
    file = save_vector(folder / f"probe-{processes.start().rank}.safetensors", {1: vector}, notes)
    length = {"kind": "length", "min": 2, "max": 5, "unit": "tokens"}
    novel = {"kind": "novelty", "history": "run", "dimensions": 4, "weight": 0.3}
    return build_reward([length, novel, {"kind": "probe", "probe": str(file), "screen": True}], policy)


_sample = Sampler.sample


def sample_with_gaps(*arguments: Any, **settings: Any) -> Samples:
    rollout, texts = _sample(*arguments, **settings)
    return Samples(with_gaps(rollout), texts)


def main(folder: Path) -> None:
    processes.start()
    compiled.BACKEND = "eager"
    for name, (family, peft, sampling, settings) in JOBS.items():
        policy = with_peft(tiny_policy(family), peft)
        drawn = Sampling(**{"max_new_tokens": 8, "stop_ids": [11, 17, 23], **sampling})
        table = TABLE(torch.linspace(1, 3, policy.vocab_size), policy, drawn) if name == "table" else None
        with patch.object(Sampler, "sample", sample_with_gaps if name == "gaps" else _sample):
            train(
                policy,
                prompts_of(policy, most=3 if name == "ragged" else 0),
                build_reward([{"kind": "environment"}])
                if name in ENVIRONMENT
                else two_parts()
                if name == "parts"
                else screened_reward(folder, policy)
                if name == "screened"
                else logging_reward
                if table is None
                else Counted(),
                drawn,
                PPOSettings(**{**SETTINGS, **settings}),
                RunSettings(dir=str(folder / name)),
                steering=load_spec(STEERING[name]) if name in STEERING else None,
                source=table,
                environment=ENVIRONMENT.get(name),
                on_step=(lambda step, metrics, samples: step == 2 and len(samples) > 0) if name == "hooked" else None,
            )
    if processes.close():
        processes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
