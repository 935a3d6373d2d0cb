"""What steering costs while sampling: one block site and four beside none, batch 16, taken in turn in one process.

    steerl bench --overhead [--out runs/bench]

Seconds are CPU seconds of this process; a figure is the median over the repeats of steered / plain of the same repeat. A
second plain model is measured beside them: how far its ratio is from 1 is what this machine, at this hour, cannot tell apart.
"""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerl.rollout.common.run_folder import versions, write_json
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.steering import Steering, load_spec
from steerl.scripts.bench_cases.cases import SHAPES, Case, policy_of, prompt_batch

REPEATS = 48
GOALS = {1: 1.03, 4: 1.08}
"""Sites -> the ratio that is not to be passed."""
_AGAIN = 0
"""In the place of sites: the second plain model."""
FOUR_DEEP = tuple(replace(shape, work="sampling", rows=16, layers=4) for shape in (SHAPES[0], SHAPES[1], SHAPES[3]))


def measure(out: Path, cases: tuple[Case, ...] = FOUR_DEEP, repeats: int = REPEATS) -> list[dict[str, object]]:
    out.mkdir(parents=True, exist_ok=True)
    found = [entry for case in cases for entry in overhead(case, repeats)]
    write_json(out / "overhead.json", {"versions": versions(), "repeats": repeats, "found": found})
    for line in table(found):
        print(line)
    return found


def overhead(case: Case, repeats: int) -> list[dict[str, object]]:
    """A row per number of sites. Plain is a model of its own, on which steering never put a hook."""
    policy, batch = policy_of(case), prompt_batch(case)
    settings = Sampling(max_new_tokens=case.response, batch_size=case.rows)
    samplers: dict[int | None, Sampler] = {None: Sampler(policy_of(case), settings), _AGAIN: Sampler(policy_of(case), settings)}
    for sites in GOALS:
        samplers[sites] = Sampler(policy, settings, Steering(policy.core, load_spec(spec(case, sites)), policy.tokenizer))
    for sampler in samplers.values():
        sampler.sample(batch)
    seconds: dict[int | None, list[float]] = {sites: [] for sites in samplers}
    order = random.Random(0)
    for _ in range(repeats):
        for arm in order.sample(list(samplers), len(samplers)):
            began = time.process_time()
            samplers[arm].sample(batch)
            seconds[arm].append(time.process_time() - began)
    rows = []
    for sites in (_AGAIN, *GOALS):
        ratios = sorted(steered / plain for steered, plain in zip(seconds[sites], seconds[None], strict=True))
        quarter = len(ratios) // 4
        rows.append(
            {
                "case": case.name,
                "sites": sites,
                "plain_seconds": statistics.median(seconds[None]),
                "ratio": statistics.median(ratios),
                "quartiles": [ratios[quarter], ratios[-1 - quarter]],
            }
        )
    return rows


def spec(case: Case, sites: int) -> dict[str, object]:
    """An add at as many blocks, on every step."""
    draw = torch.Generator().manual_seed(0)
    return {
        "sites": [
            {
                "name": f"block{layer}",
                "at": {"layers": [layer]},
                "vector": torch.randn(case.hidden, generator=draw).tolist(),
                "strength": 0.1,
            }
            for layer in range(sites)
        ]
    }


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["| sampling | plain, s | sites | steered / plain, median | quartiles | goal |", "|---|---|---|---|---|---|"]
    return lines + [
        f"| {row['case'].removeprefix('sampling ')} | {row['plain_seconds']:.3f} | {row['sites'] or 'plain again'} | "
        f"{row['ratio']:.3f} | {row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f} | {GOALS.get(row['sites'], '')} |"
        for row in found
    ]
