"""PPO from objects in hand: a model, a tokenizer, rows, and a reward that is a Python function over records.

steerl tiny --out runs/tiny --worlds reviews
python examples/ppo_from_objects.py
"""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from steerl import Policy, PPOSettings, Prompts, PromptSettings, Rollout, RunSettings, Sampling, Scores, Texts, train

PATH = "runs/tiny/reviews/sft"


def shorter(rollout: Rollout, texts: Texts) -> Scores:
    """1 for an answer of one token, 0 for one as long as it may be; rows that were cut get 0."""
    share_B = 1 - (rollout.actions_B - 1) / 31
    return Scores(share_B.where(rollout.ended_B, 0.0))


def main() -> None:
    policy = Policy.of(AutoModelForCausalLM.from_pretrained(PATH), AutoTokenizer.from_pretrained(PATH))
    subjects = ("a sailor", "a painter", "a robot", "a queen", "a long war", "a lost dog", "a train", "an old house")
    rows = [{"prompt": f"review of a comedy about {subject} :"} for subject in subjects]
    prompts = Prompts(rows, "prompt", policy, PromptSettings())
    summary = train(
        policy,
        prompts,
        shorter,
        Sampling(max_new_tokens=32, n=4),
        PPOSettings(
            steps=4,
            rollouts_per_step=32,
            epochs=2,
            minibatches=2,
            learning_rate=1e-3,
            kl_coef=0.01,
            credit="rloo",
            eval_prompts=8,
        ),
        RunSettings(dir="runs/shorter", overwrite=True),
    )
    for line in Path("runs/shorter/metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        print(
            f"step {step['step']}: reward {step['reward/mean']:.3f}, length {step['rollout/length_mean']:.1f}, "
            f"KL {step['kl/ref']:.2f}, first ratio {step['ppo/ratio_first']:.6f}, gap {step['gap/max']:.0e}"
        )
    print(f"held-out reward {summary['reward_before']:.3f} before, {summary['reward_after']:.3f} after")
    AutoModelForCausalLM.from_pretrained("runs/shorter/model")  # what the run leaves is a plain model


if __name__ == "__main__":
    main()
