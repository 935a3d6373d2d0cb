"""What both learners of the learning comparison share: the randomwalks task, a clock at the reward, one evaluation for both."""

from __future__ import annotations

import json
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from steerl.scripts.toy_tasks.randomwalks import optimality

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLLOUTS, RESPONSE, SEEN = 128, 10, (20, 100)
"""Rollouts of a step, tokens of a response, the steps after which the policy is evaluated."""


@dataclass
class Ledger:
    """The mean reward of every step's rollouts, and when it was known, counted from the first step's."""

    began: tuple[float, float] | None = None
    held: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of this process on its one thread: what else the machine does is not in it."""
    wall: list[float] = field(default_factory=list)

    def add(self, scores: list[float]) -> None:
        """Scores of some rows; a step is known when ROLLOUTS are in."""
        self.held += scores
        while len(self.held) >= ROLLOUTS:
            now = (time.process_time(), time.perf_counter())
            self.began = self.began or now
            self.rewards.append(sum(self.held[:ROLLOUTS]) / ROLLOUTS)
            self.seconds.append(now[0] - self.began[0])
            self.wall.append(now[1] - self.began[1])
            self.held = self.held[ROLLOUTS:]

    def to_json(self, evaluated: dict[int, float]) -> str:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        times = {"rewards": self.rewards, "seconds": self.seconds, "wall": self.wall}
        return json.dumps({**times, "evaluated": evaluated, "memory": peak})


def starts(world: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (world / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]


def rewards_of(world: Path, tokenizer: PreTrainedTokenizerBase, sequences: torch.Tensor) -> list[float]:
    """The reward of whole sequences of ids, the start first."""
    rows = {row["prompt"]: row for row in starts(world)}
    texts = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    found = [rows[text[:1]] for text in texts]
    columns = {name: [row[name] for row in found] for name in ("edges", "shortest")}
    return optimality([text[:1] for text in texts], [text[1:] for text in texts], **columns)


def evaluate(world: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, seed: int, samples: int = 100) -> float:
    """The mean reward at temperature 1, `samples` walks from every start. Greedy walks would flatter a collapsed policy."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in starts(world) for _ in range(samples)])
    was_training = model.training
    model.eval()
    with torch.no_grad():
        sequences = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=RESPONSE, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    model.train(was_training)
    torch.random.set_rng_state(state)
    scores = rewards_of(world, tokenizer, sequences)
    return sum(scores) / len(scores)


def evaluate_kept(
    world: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, kept: dict[int, dict[str, torch.Tensor]], seed: int
) -> dict[int, float]:
    """The same of the weights that were kept after some steps."""
    evaluated = {}
    for step, weights in kept.items():
        model.load_state_dict(weights)
        evaluated[step] = evaluate(world, tokenizer, model, seed)
    return evaluated
