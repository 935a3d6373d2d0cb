"""What it costs a rank to gather a step's rows and what was measured on them, as pickled objects and as tensors.

python tests/training/algorithm/rows_cost.py objects|tensors [main|other] [--ranks 64] [--rows 128] [--tokens 4096]

By itself it is one rank of many: whatever it would get from the others is a copy of its own. Under torchrun the ranks are real.
A JSON object: seconds, bytes that come in over the network, the largest buffer of a collective call, peak memory over the start.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from steerl.reward.types import Scores
from steerl.rollout.common import processes
from steerl.rollout.types import Rollout, Samples, Texts
from steerl.training.algorithm.experience import gather_scored, score
from steerl.training.settings import PPOSettings
from steerl.training.types import PolicyOutput

PROMPT, LETTERS = 512, 4
"""Tokens of a prompt; letters of a token."""


def rows(count: int, tokens: int) -> Samples:
    numbers_BR = -torch.rand(count, tokens)
    rollout = Rollout.of_ids(
        [[7] * PROMPT] * count,
        [[7] * tokens] * count,
        behaviour_logprobs_BR=numbers_BR,
        policy_logprobs_BR=numbers_BR.clone(),
        entropy_BR=-numbers_BR,
    )
    said = ["".join(chr(97 + (i + k) % 26) for k in range(tokens * LETTERS)) for i in range(count)]
    asked = [text[: PROMPT * LETTERS] + "." for text in said]
    return Samples(rollout, Texts(prompts=asked, prompt_texts=asked, completions=said))


class Lone:
    """torch.distributed's calls for one rank of many: what comes from the others is a copy of its own, written as it comes."""

    def __init__(self, ranks: int):
        self.ranks, self.received, self.largest = ranks, 0, 0

    def count(self, size: int, ways: int = 1) -> None:
        self.received += ways * size * (self.ranks - 1) // self.ranks
        self.largest = max(self.largest, size)

    def gathered(self, sent: Tensor) -> Tensor:
        self.count(sent.nbytes * self.ranks)
        return sent.repeat(self.ranks)

    def all_gather_single(self, received: Tensor, sent: Tensor) -> None:
        self.count(received.nbytes)
        received.view(self.ranks, -1).copy_(sent)

    def all_gather_object(self, parts: list[Any], items: Any) -> None:
        file = io.BytesIO()
        pickle.Pickler(file).dump(items)
        for rank, part in enumerate(self.gathered(torch.frombuffer(file.getbuffer(), dtype=torch.uint8)).chunk(self.ranks)):
            parts[rank] = pickle.Unpickler(io.BytesIO(part.numpy().tobytes())).load()

    def gather_object(self, items: Any, parts: list[Any] | None) -> None:
        if parts is None:
            pickle.dumps(items)
        else:
            self.all_gather_object(parts, items)

    def all_reduce(self, tensor: Tensor) -> None:
        self.count(tensor.nbytes, ways=2)  # a ring: every part goes around to be summed, and around again

    def broadcast_object_list(self, outcome: list[Any]) -> None:
        pass


def as_objects(samples: Samples, scores: Scores, measured: Tensor, mine: list[int]) -> None:
    """As it was: everything pickled, for all; sums of what is 0 where another rank has the row."""
    whole = Samples.join(processes.gather_objects([samples]))
    Scores.join(processes.gather_objects([scores]))
    shape = whole.rollout.response_BR.shape
    held = [torch.zeros(shape) for _ in range(4)]
    for value in held:
        value[mine] = measured
    summed = [processes.sum_(value) for value in held]
    assert len(whole.texts) == len(summed[0])


def as_tensors(samples: Samples, scores: Scores, measured: Tensor, settings: PPOSettings) -> None:
    """The code itself, with a model that knows its answers."""
    samples, scores = gather_scored(samples, lambda *_: scores)

    def model(part: Rollout, **_: Any) -> PolicyOutput:
        return PolicyOutput(*[measured[: len(part)]] * 3)

    answers: Any = model
    answers.actor, answers.device = torch.nn.Linear(1, 1), torch.device("cpu")
    score(answers, SimpleNamespace(logprobs=lambda part: measured[: len(part)]), samples, scores, settings)  # type: ignore[arg-type]


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["objects", "tensors"])
    parser.add_argument("rank", choices=["main", "other"], nargs="?", default="other")
    for name, default in {"ranks": 64, "rows": 128, "tokens": 4096}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    process, lone = processes.start(), Lone(given.ranks)
    if process.world_size == 1:
        process = processes.Processes(int(given.rank == "other"), given.ranks, torch.device("cpu"))
        processes.start = lambda: process  # type: ignore[assignment]
        processes.is_distributed = lambda: True  # type: ignore[assignment]
        torch.distributed.get_world_size = lambda: given.ranks  # type: ignore[assignment]
        for name in ("all_gather_single", "all_gather_object", "gather_object", "all_reduce", "broadcast_object_list"):
            setattr(torch.distributed, name, getattr(lone, name))
    samples, settings = rows(given.rows, given.tokens), PPOSettings(micro_batch_size=given.rows)
    scores, measured = Scores(torch.ones(given.rows), {"part": torch.ones(given.rows)}), torch.rand(given.rows, given.tokens)
    if is_real := torch.distributed.is_initialized():
        processes.barrier()
    before, began = peak(), time.perf_counter()
    if given.way == "objects":
        as_objects(samples, scores, measured, list(range(given.rows)))
    else:
        as_tensors(samples, scores, measured, settings)
    seconds = time.perf_counter() - began
    counted = {} if is_real else {"received": lone.received, "largest": lone.largest}
    print(json.dumps({"way": given.way, "rank": process.rank, "seconds": seconds, "memory": peak() - before, **counted}))
    if is_real:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
