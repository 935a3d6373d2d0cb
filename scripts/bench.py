"""Measurements against what users know, all in one run:  python scripts/bench.py --learning true [--out runs/bench]

--learning true    randomwalks beside TRL 1.12's PPOTrainer: reward by samples and by seconds, five seeds each
                   (about an hour on one core); leaves learning.json, learning.png and prints a table
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from configs.reader import door
from rollout.errors import Problem
from scripts.benching import learning


@dataclass(frozen=True)
class Job:
    """Measurements against what users know."""

    out: str = "runs/bench"
    """Where results are written. What is there already is not measured again."""
    learning: bool = False
    """The learning comparison on randomwalks."""
    learn: learning.LearningSettings = field(default_factory=learning.LearningSettings)


def main(job: Job) -> None:
    if not job.learning:
        raise Problem("bench: nothing to measure; --learning true")
    learning.measure(Path(job.out), job.learn)


if __name__ == "__main__":
    door(main, Job)
