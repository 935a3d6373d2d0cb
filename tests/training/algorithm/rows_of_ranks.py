"""Run by test_rows.py in two ranks: rows of ranks that differ in all that they may, gathered.

python tests/training/algorithm/rows_of_ranks.py OUT        leaves OUT/RANK.pt: what each rank holds of every case
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from steerl.reward.types import Scores
from steerl.rollout.common import processes
from steerl.rollout.ragged import Kept
from steerl.rollout.types import Rollout, Samples, Texts
from steerl.training.algorithm.experience import gather_scored


def rows(seed: int, count: int, prompt: int, response: int, positions: int = 2, kept: bool = True, **fields: Any) -> Samples:
    """Made-up rows: whatever the record has, each of another value."""
    draw = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    lengths = [1 + (seed + i) % response for i in range(count)]
    extent_BR = torch.arange(response)[None] < torch.tensor(lengths, dtype=torch.int64)[:, None]
    counts_BR = torch.randint(0, 4, (count, response), generator=draw) * extent_BR
    rollout = Rollout(
        prompt_BP=torch.randint(3, 90, (count, prompt), generator=draw),
        prompt_mask_BP=torch.rand(count, prompt, generator=draw).sort(dim=1).values > 0.5,
        response_BR=torch.randint(3, 90, (count, response), generator=draw) * extent_BR,
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        ended_B=torch.rand(count, generator=draw) > 0.5,
        behaviour_logprobs_BR=numbers(count, response),
        policy_logprobs_BR=-0.0 * numbers(count, response),
        row_B=torch.arange(count) + 100 * seed,
        sample_B=torch.arange(count) % 2,
        stop_B=torch.arange(count) % 3,
        action_mask_BR=extent_BR & (torch.rand(count, response, generator=draw) > 0.3),
        strength_BK=numbers(count, 3),
        positions_BKN=torch.randint(0, prompt, (count, 3, positions), generator=draw),
        policy_step_B=torch.arange(count) - seed,
        kept=Kept(torch.randint(0, 90, (int(counts_BR.sum()),), generator=draw).int(), counts_BR) if kept else None,
        **{"entropy_BR": numbers(count, response), "temperature": 0.7, "steering": "glad#1", **fields},
    )
    texts = [f"{seed}.{i}" for i in range(count)]
    return Samples(rollout, Texts(prompts=texts, prompt_texts=texts, completions=texts, columns={"place": list(range(count))}))


CASES: dict[str, Callable[[], list[Samples]]] = {
    "alike": lambda: [rows(1, 3, 4, 5), rows(2, 3, 4, 5)],
    "uneven": lambda: [rows(1, 2, 3, 7), rows(2, 5, 6, 4, positions=4)],
    "only the second": lambda: [rows(1, 0, 1, 1, kept=False), rows(2, 3, 4, 5)],
    "only the first": lambda: [rows(3, 4, 2, 6), rows(1, 0, 9, 9, positions=0)],
    "kept by one": lambda: [rows(1, 2, 3, 4, kept=False), rows(2, 1, 3, 6)],
    "kept by none, no entropy of one": lambda: [
        rows(1, 2, 3, 4, kept=False, entropy_BR=None),
        rows(2, 1, 3, 4, kept=False),
    ],
    "no sites, no positions": lambda: [
        Samples(Rollout.of_ids([[5], [4, 5]], [[7, 2], [8]]), rows(1, 2, 1, 1).texts),
        Samples(Rollout.of_ids([[9]], [[3, 3, 3]]), rows(2, 1, 1, 1).texts),
    ],
}


def scores_of(samples: Samples, dense: bool) -> Scores:
    """Another part in every rank; what is said of a row in one only."""
    rollout = samples.rollout
    count, seed = len(rollout), int(rollout.row_B[0]) if len(rollout) else 0
    tokens_BR = torch.where(rollout.action_mask_BR, rollout.behaviour_logprobs_BR, 0.0) if dense else None
    return Scores(
        torch.arange(count) + 0.1 * seed if tokens_BR is None else tokens_BR.sum(1),
        {"both": torch.full((count,), float(seed)), f"part{seed}": torch.ones(count)},
        tokens_BR,
        {"both": 1.0 + seed},
        {"both": 1},
        {"both/words": [float(seed)]},
        {"both/note": [f"{seed} {i}" for i in range(count)]} if seed else {},
    )


def main(out: str) -> None:
    rank = processes.start().rank
    found = {}
    for name, made in CASES.items():
        for dense in (False, True):
            found[name, dense] = gather_scored(made()[rank], lambda *samples, d=dense: scores_of(Samples(*samples), d))
    torch.save(found, f"{out}/{rank}.pt")
    if processes.close():
        processes.end()


if __name__ == "__main__":
    main(sys.argv[1])
