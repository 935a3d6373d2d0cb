"""Run by test_engine_commands.py under an engine: every command that accelerate starts, one after the other, in one process group.

accelerate launch --config_file ENGINE.yaml tests/scripts/commands.py FOLDER      FOLDER: model/ and the data, made by the test
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

from steerl.configs.reader import read

from steerl.rollout.common import processes
from steerl.scripts import dump_rollouts, score_rollouts, train_ppo, train_reward, train_sft
from steerl.training.engine.zero import models_stay_whole

LENGTH = json.dumps([{"name": "length", "kind": "length", "unit": "characters", "max": 8}])


def flags(folder: Path) -> list[tuple[ModuleType, type, list[str]]]:
    model = ["--model.path", str(folder / "model")]
    prompts = ["--prompts.path", str(folder / "prompts.jsonl"), "--sampling.max_new_tokens", "6", "--sampling.batch_size", "4"]
    few = ["--sft.steps", "2", "--sft.batch_size", "4", "--prompts.heldout", "0.2"]
    pairs = ["--reward_model.steps", "2", "--reward_model.batch_size", "4", "--prompts.heldout", "0.2"]
    lora = ["--model.peft", json.dumps({"peft_type": "LORA", "r": 2})]
    learned = json.dumps([{"name": "kind", "kind": "model", "path": str(folder / "reward" / "model")}])
    small = ["--ppo.steps", "2", "--ppo.rollouts_per_step", "8", "--ppo.micro_batch_size", "2", "--ppo.minibatches", "2"]
    return [
        (dump_rollouts, dump_rollouts.DumpJob, [*model, *prompts, "--run.save_every", "4"]),
        (score_rollouts, score_rollouts.ScoreJob, ["--dump.dir", str(folder / "dump"), "--reward", LENGTH]),
        (train_sft, train_sft.SFTJob, [*model, "--prompts.path", str(folder / "sft.jsonl"), *few]),
        (train_reward, train_reward.RewardJob, [*model, "--prompts.path", str(folder / "pairs.jsonl"), *pairs]),
        (train_ppo, train_ppo.PPOJob, [*model, *prompts, *small, *lora, "--ppo.eval_prompts", "3", "--reward", learned]),
    ]


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    processes.start()
    for module, job, argv in flags(folder):
        first, second = module.__name__.rpartition(".")[2].split("_")
        name = second if first == "train" else first
        module.main(read(job, [*argv, "--run.dir", str(folder / name)]))
        models_stay_whole()  # each command has a process to itself; here the trainers' engine would cut the next command's model
        processes.barrier()
    assert (type_of_engine() == "DEEPSPEED") == (os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
    if processes.close():
        processes.end()


def type_of_engine() -> str:
    from accelerate.state import AcceleratorState

    return str(AcceleratorState().distributed_type.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
