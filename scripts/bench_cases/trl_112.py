"""Child of the learning comparison: TRL 1.12's PPOTrainer on randomwalks, found on the path before the installed TRL.

    PYTHONPATH=DIR_OF_TRL_1.12 python -m steerl.scripts.bench_cases.trl_112 WORLD RUN SEED STEPS defaults|tuned [STOP]

Prints the same JSON line as ours.py. Both settings are given what the task fixes (rollouts, response length, the stop token
of the walks in the tuned one); `tuned` is the best that was found for it: see docs/log. STOP ends the run after that step, with
the schedule of all STEPS.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from steerl.scripts.bench_cases.task import RESPONSE, ROLLOUTS, SEEN, Ledger, evaluate_kept, rewards_of, starts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

SETTINGS: dict[str, dict[str, object]] = {
    "defaults": {},
    "tuned": {
        "learning_rate": 1e-4, "lr_scheduler_type": "linear", "kl_coef": 0.05, "num_ppo_epochs": 8, "num_mini_batches": 4,
        "temperature": 1.0, "stop_token": "eos", "gradient_checkpointing": False, "local_rollout_forward_batch_size": ROLLOUTS,
    },
}  # fmt: skip


class Enough(Exception):
    """Raised after the last step that is wanted: the trainer asks nobody whether to go on."""


class Ids(nn.Module):
    """A backbone whose last hidden state is the ids themselves."""

    def forward(self, input_ids: Tensor, **_: object) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[input_ids.unsqueeze(-1)])


class Score(nn.Module):
    """The reward of each row at every position: the trainer reads the one it wants."""

    def __init__(self, world: Path, tokenizer: PreTrainedTokenizerBase, ledger: Ledger):
        super().__init__()
        self.world, self.tokenizer, self.ledger = world, tokenizer, ledger

    def forward(self, ids_BS1: Tensor) -> Tensor:
        scores = rewards_of(self.world, self.tokenizer, ids_BS1[..., 0])
        self.ledger.add(scores)
        return torch.tensor(scores)[:, None, None].expand(ids_BS1.shape)


class WalkReward(nn.Module):
    """A function as the reward model that the trainer asks for."""

    base_model_prefix = "backbone"

    def __init__(self, world: Path, tokenizer: PreTrainedTokenizerBase, ledger: Ledger):
        super().__init__()
        self.backbone, self.score = Ids(), Score(world, tokenizer, ledger)


def main(world: Path, run: Path, seed: int, steps: int, setting: str, stop: int = 0) -> None:
    import trl
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
        set_seed,
    )
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    assert trl.__version__.startswith("1.12."), trl.__file__
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(world / "base", padding_side="left")
    policy, reference = (AutoModelForCausalLM.from_pretrained(world / "base") for _ in range(2))
    value = AutoModelForSequenceClassification.from_pretrained(world / "base", num_labels=1)
    rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in starts(world)]
    dataset = Dataset.from_list(rows * (ROLLOUTS * 2))  # its loader drops what does not fill a batch
    ledger, kept = Ledger(), {}

    class Keep(TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
            if state.global_step in SEEN:
                kept[state.global_step] = {name: v.detach().clone() for name, v in policy.state_dict().items()}
            if state.global_step == stop:
                raise Enough

    config = PPOConfig(
        output_dir=str(run), seed=seed, bf16=False, use_cpu=True, report_to=[], save_strategy="no", num_sample_generations=0,
        response_length=RESPONSE, per_device_train_batch_size=ROLLOUTS, gradient_accumulation_steps=1,
        total_episodes=ROLLOUTS * steps, **SETTINGS[setting],
    )  # fmt: skip
    trainer = PPOTrainer(
        args=config, processing_class=tokenizer, model=policy, ref_model=reference, train_dataset=dataset, value_model=value,
        reward_model=WalkReward(world, tokenizer, ledger), callbacks=[Keep()],
    )  # fmt: skip
    with contextlib.suppress(Enough):
        trainer.train()
    print(ledger.to_json(evaluate_kept(world, tokenizer, policy, kept, seed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], *map(int, sys.argv[6:]))
