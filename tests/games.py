"""Environments that tests play, by name: loaded in processes of their own, so they import nothing of the project."""

from __future__ import annotations

import os
import random
import sys
import time
from typing import Any


class Chatter:
    """Pays for letters of the alphabet's first half, a little in every turn; how long it talks is a matter of chance."""

    def reset(self, row: dict[str, Any]) -> str:
        self.turns, self.most = 0, random.randint(1, 3)
        return row["prompt"]

    def step(self, completion: str) -> tuple[str | None, float, bool]:
        self.turns += 1
        good = sum("a" <= letter <= "m" for letter in completion) / 10
        if self.turns > self.most:
            return None, good + 0.5, True
        return random.choice([" no", " go on", " and"]), good, False


def chatter() -> Chatter:
    return Chatter()


class Counter:
    """TRL's form: its methods are tools, and it knows what it was told."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self, start: int = 0, **columns: Any) -> str:
        self.count = start
        return f" It stands at {start}."

    def add(self, number: int) -> str:
        """Add to the counter.

        Args:
            number: What is added.
        """
        self.count += number
        return f"now {self.count}"

    def get_reward(self) -> float:
        return float(self.count)


class Rude:
    """Goes wrong in the way that the row's place says."""

    def reset(self, row: dict[str, Any]) -> str:
        self.way = ("raise", "hang", "print", "bytes", "exit", "none", "endless", "long", "nan", "kill")[row["place"] % 10]
        return row["prompt"]

    def step(self, completion: str) -> Any:
        if self.way == "hang":
            time.sleep(1000)
        if self.way == "print":
            print("x" * 5_000_000, flush=True)
            print("y" * 5_000_000, file=sys.stderr, flush=True)
        if self.way == "exit":
            sys.exit(3)
        if self.way == "kill":
            os._exit(1)
        if self.way == "raise":
            raise ValueError("no such move")
        answers: dict[str, Any] = {
            "bytes": b"\xff",
            "none": None,
            "long": ("x" * 3_000_000, 0.0, False),
            "nan": ("", float("nan"), False),
        }
        return answers.get(self.way, ("go on", 0.5, False))
