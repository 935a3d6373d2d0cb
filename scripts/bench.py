"""Measurements against what users know, all in one run:  python scripts/bench.py --learning [--out runs/bench]

--learning    randomwalks beside TRL 1.12's PPOTrainer: reward by samples and by seconds, five seeds each (about an
              hour on one core); leaves learning.json and learning.png, and prints a table
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from configs.reader import door
from rollout.errors import Problem
from scripts.benching.learning import LearningSettings, measure

PARTS = ("--learning",)
"""Flags that choose what is measured; they may stand without a value."""


@dataclass(frozen=True)
class Job:
    """Measurements against what users know."""

    out: str = "runs/bench"
    """Where results are written. What is there already is not measured again."""
    learning: bool = False
    """The learning comparison on randomwalks."""
    learn: LearningSettings = field(default_factory=LearningSettings)
    """How it is done."""


def main(job: Job) -> None:
    if not job.learning:
        raise Problem(f"bench: nothing to measure; {', '.join(PARTS)}")
    measure(Path(job.out), job.learn)


def spelled_out(argv: list[str]) -> list[str]:
    """`--learning` alone means `--learning=true`."""
    alone = [token in PARTS and after not in ("true", "false") for token, after in zip(argv, [*argv, ""][1:], strict=True)]
    return [f"{token}=true" if bare else token for token, bare in zip(argv, alone, strict=True)]


if __name__ == "__main__":
    door(main, Job, spelled_out(sys.argv[1:]))
