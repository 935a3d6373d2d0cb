"""Steer a model while it samples, write the rollouts to disk, and read them back with what the steering did to each token.

steerl tiny --out tiny --worlds suppressed
python examples/steer_and_dump.py
"""

import json

from steerl import ModelSettings, PromptSettings, Sampler, Sampling, Steering, load_policy, load_prompts, read_dump
from steerl.cli import main as steerl

MODEL, PROMPTS = "tiny/suppressed/base", "tiny/suppressed/prompts.jsonl"
SPEC = {
    "role": "behaviour",  # sampled steered; the policy that is scored beside it is the plain one
    "correction": {"type": "token_truncate"},
    "fraction": 0.5,  # of the samples of a prompt; the others stay plain
    "sites": [
        {
            "name": "glad",
            "at": {"layers": [1], "component": "block_output"},
            "op": {"type": "add"},
            "vector": {"file": "tiny/suppressed/cheer.safetensors"},
            "strength": 0.3,
            "where": {"steps": {"window": [0, 4]}},  # the first four tokens
        }
    ],
}


def main() -> None:
    # In Python: the same sampler, with a steering.
    policy = load_policy(ModelSettings(path=MODEL))
    steering = Steering(policy.model, SPEC, policy.tokenizer)
    prompts = load_prompts(PromptSettings(path=PROMPTS), policy)
    rollout, texts = Sampler(policy, Sampling(max_new_tokens=16, n=2), steering).sample(prompts.batch([0]))
    for row, completion in enumerate(texts.completions):
        print(f"strength {rollout.strength_B[row]:.1f}: {completion}")

    # By command: a dump of all prompts, resumable, on any number of processes.
    flags = {
        "model.path": MODEL,
        "prompts.path": PROMPTS,
        "sampling.n": 4,
        "sampling.max_new_tokens": 16,
        "steering": json.dumps(SPEC),
        "run.dir": "runs/steered",
        "run.overwrite": "true",
    }
    steerl(["dump", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))])

    for rollout, _ in read_dump("runs/steered"):
        off_BR = rollout.behaviour_logprobs_BR - rollout.policy_logprobs_BR  # 0 where the steering did nothing
        kl_B = off_BR.where(rollout.action_mask_BR, 0.0).sum(1)
        steered_B = (rollout.strength_BK != 0).any(1)  # by any of its sites
        print(f"{len(rollout)} rows: KL per response {kl_B[steered_B].mean():.2f} steered, {kl_B[~steered_B].mean():.2f} plain")


if __name__ == "__main__":
    main()
