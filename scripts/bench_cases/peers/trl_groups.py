"""Child of the comparison of group credit: the installed TRL's GRPOTrainer or RLOOTrainer on randomwalks.

    python -m steerl.scripts.bench_cases.peers.trl_groups WORLD RUN SEED STEPS grpo|rloo SETTINGS

Prints the same JSON line as ours.py. A step is ROLLOUTS samples of ROLLOUTS / n prompts; SETTINGS are TRL's own, as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from steerl.scripts.bench_cases.task import RESPONSE, ROLLOUTS, SEEN, Ledger, evaluate_kept, starts
from steerl.scripts.toy_tasks.randomwalks import optimality


def main(world: Path, run: Path, seed: int, steps: int, method: str, settings: dict[str, Any]) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(world / "base", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(world / "base")
    ledger, kept = Ledger(), {}

    def reward(prompts: list[str], completions: list[str], edges: Any, shortest: Any, **_: object) -> list[float]:
        scores = optimality(prompts, completions, edges=edges, shortest=shortest)
        ledger.add(scores)
        return scores

    minibatches, epochs = settings.pop("minibatches", 1), settings.get("num_iterations", 1)

    class Keep(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: object) -> None:
            done, left = divmod(state.global_step, minibatches * epochs)
            if not left and done in (*SEEN, steps):
                kept[done] = {name: value.detach().clone() for name, value in policy.state_dict().items()}

    config = (GRPOConfig if method == "grpo" else RLOOConfig)(
        output_dir=str(run), seed=seed, bf16=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        max_completion_length=RESPONSE, per_device_train_batch_size=ROLLOUTS // minibatches, steps_per_generation=minibatches,
        max_steps=steps * minibatches * epochs, **settings,
    )  # fmt: skip
    trainer = (GRPOTrainer if method == "grpo" else RLOOTrainer)(
        args=config, processing_class=tokenizer, model=policy, train_dataset=Dataset.from_list(starts(world) * 32),
        reward_funcs=reward, callbacks=[Keep()],
    )  # fmt: skip
    trainer.train()
    print(ledger.to_json(evaluate_kept(world, tokenizer, policy, kept, seed)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5], json.loads(sys.argv[6]))
