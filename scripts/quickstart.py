"""The first thing to run: make the embedded default and let its policy say a few reviews.

make_tiny  ->  runs/quickstart/tiny/  ->  completions of held-out prompts
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from configs.reader import door
from scripts import make_tiny


@dataclass(frozen=True)
class QuickstartJob:
    """Make the embedded default and complete a few of its prompts."""

    out: str = "runs/quickstart"
    """Where everything is written."""
    seed: int = 0
    prompts: int = 4
    """How many prompts to complete."""


def main(job: QuickstartJob) -> None:
    tiny = Path(job.out) / "tiny"
    make_tiny.main(make_tiny.TinyJob(out=str(tiny), seed=job.seed, worlds="reviews"))
    complete(tiny / "reviews", job.prompts, job.seed)


def complete(world: Path, count: int, seed: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "base")
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    lines = (world / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    torch.manual_seed(seed)
    for prompt in (json.loads(line)["prompt"] for line in lines):
        ids_1P = tokenizer(prompt, return_tensors="pt").input_ids
        made_1S = model.generate(ids_1P, attention_mask=torch.ones_like(ids_1P), do_sample=True, max_new_tokens=48)
        print(f"{prompt} |{tokenizer.decode(made_1S[0, ids_1P.shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    door(main, QuickstartJob)
