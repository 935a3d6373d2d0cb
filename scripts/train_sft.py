"""Train a causal or encoder-decoder model on texts, prompts with completions, or conversations.

steerl sft --config steerl:sft --model.path DIR --prompts.path FILE --run.dir RUN
"""

from __future__ import annotations

import shlex

from steerl.configs.reader import run_command, to_yaml

from steerl.rollout.common import processes
from steerl.training.stages.settings import SFTJob


def main(job: SFTJob) -> None:
    from steerl.training.stages.sft import run_sft

    model = run_sft(job, to_yaml(job)).model
    if processes.start().is_main:
        print(f"{model}: the model, which from_pretrained loads; {model.parent / 'summary.json'}: what was measured")
        print(f"next: steerl complete --model.path {shlex.quote(str(model))} PROMPT")


def cli() -> None:
    run_command(main, SFTJob)


if __name__ == "__main__":
    cli()
