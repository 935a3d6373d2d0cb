"""Train a reward model on preference pairs, and measure it on held-out ones.

steerl reward --config steerl:reward --model.path DIR --prompts.path FILE --run.dir RUN
"""

from __future__ import annotations

import json
import shlex

from steerl.configs.reader import run_command, to_yaml

from steerl.rollout.common import processes
from steerl.training.stages.settings import RewardJob


def main(job: RewardJob) -> None:
    from steerl.training.stages.reward_model import run_reward

    model = run_reward(job, to_yaml(job)).model
    if processes.start().is_main:
        print(f"{model}: the model, which from_pretrained loads; {model.parent / 'summary.json'}: what was measured")
        term = shlex.quote(json.dumps([{"name": "preference", "kind": "model", "path": str(model)}]))
        print(f"next: steerl ppo --config steerl:ppo --model.path MODEL --prompts.path FILE --run.dir RUN --reward {term}")


def cli() -> None:
    run_command(main, RewardJob)


if __name__ == "__main__":
    cli()
