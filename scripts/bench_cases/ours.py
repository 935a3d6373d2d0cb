"""Child of the learning comparison: this project on randomwalks.

    python -m steerl.scripts.bench_cases.ours WORLD RUN SEED STEPS [FLAG ...]

Prints one JSON line: rewards and seconds by step, and the evaluation at temperature 1 after the steps of task.SEEN.
"""

from __future__ import annotations

import sys
from pathlib import Path

from steerl.configs.reader import read

import torch

from steerl.reward.build import build_reward
from steerl.reward.types import Scores
from steerl.rollout.model.policy import load_policy
from steerl.rollout.prompts.prompts import load_prompts
from steerl.rollout.types import Rollout, Texts
from steerl.scripts.bench_cases.task import ROLLOUTS, SEEN, Ledger, evaluate
from steerl.scripts.train_ppo import PPOJob
from steerl.training.ppo import train
from steerl.training.run import checkpoint


def main(world: Path, run: Path, seed: int, steps: int, flags: list[str]) -> None:
    from transformers import AutoModelForCausalLM

    argv = ["--config", "configs/randomwalks.yaml", "--model.path", str(world / "base")]
    argv += ["--prompts.path", str(world / "prompts.jsonl"), "--run.dir", str(run), "--run.overwrite", "true"]
    argv += ["--run.seed", str(seed), "--sampling.seed", str(seed), "--ppo.steps", str(steps)]
    argv += ["--run.save_every", str(min(SEEN)), "--run.keep", "99", "--ppo.eval_prompts", "0", "--ppo.samples", "0"]
    job = read(PPOJob, [*argv, *flags])
    assert job.ppo.rollouts_per_step == ROLLOUTS
    torch.manual_seed(seed)
    policy = load_policy(job.model, torch.device("cpu"))
    reward = build_reward(job.reward, policy=policy, device=policy.device)
    ledger = Ledger()

    def timed(rollout: Rollout, texts: Texts) -> Scores:
        scores = reward(rollout, texts)
        ledger.add(scores.total_B.tolist())
        return scores

    train(policy, load_prompts(job.prompts, policy, job.sampling.max_new_tokens), timed, job.sampling, job.ppo, job.run)
    evaluated = {}
    for step in sorted({*(step for step in SEEN if step <= steps), steps}):
        model = AutoModelForCausalLM.from_pretrained(world / "base")
        saved = checkpoint.read(run / checkpoint.FOLDER / f"step-{step:06d}")["tree"]["weights"]
        own = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in own.items():
                value.copy_(saved[f"actor.{name}"])
        evaluated[step] = evaluate(world, policy.tokenizer, model, seed)
    print(ledger.to_json(evaluated))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])
