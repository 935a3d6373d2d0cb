"""Who draws faster on this machine: the decode loop in this process or a vLLM server, by weights and by rows.

    steerl bench --engines [--out runs/bench]

Both draw the same rows in turn, one thread each. Seconds are CPU seconds: of this process, and for the server of its processes
too, until the rows are there. (A worker in a process of its own goes on for a second, waiting busily: that is not in them.)
Start-up and sync are measured by the way.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerl.rollout.common.run_folder import versions, write_json
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.engine import LOG, VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.scripts.bench_cases.cases import Case, policy_of, prompt_batch

_SHAPE = Case("sampling", 128, 3, 1024, rows=128, response=32, prompt=32)
SIZES = (
    _SHAPE,
    replace(_SHAPE, hidden=256, layers=8, vocabulary=4096),
    replace(_SHAPE, hidden=512, layers=5, vocabulary=8192),
    replace(_SHAPE, hidden=768, layers=8, vocabulary=16_384),
)
"""1, 10, 30 and 100 million weights."""
ROWS = (8, 32, 128)
REPEATS = 3
QUIET = 1.2
"""Seconds until a worker has stopped waiting busily."""


def measure(
    out: Path, sizes: tuple[Case, ...] = SIZES, rows: tuple[int, ...] = ROWS, repeats: int = REPEATS
) -> list[dict[str, Any]]:
    out.mkdir(parents=True, exist_ok=True)
    one_thread()
    found = [entry for case in sizes for entry in of_size(case, rows, repeats, out.absolute() / LOG)]
    write_json(out / "engines.json", {"versions": versions(), "repeats": repeats, "found": found})
    for line in table(found):
        print(line)
    return found


def one_thread() -> None:
    """Here and in the servers that are started from here."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def of_size(case: Case, rows: tuple[int, ...], repeats: int, log: Path) -> list[dict[str, Any]]:
    """One server for all numbers of rows."""
    policy = policy_of(case)
    engine = VllmEngine(policy, EngineSettings(kind="vllm"), log, alone=True)
    try:
        began = time.perf_counter()
        engine.ready(0)
        start = time.perf_counter() - began
        syncs = []
        for step in range(1, repeats + 1):
            engine.sync(step)
            syncs.append(engine.metrics()["engine/sync_s"])
        about = {
            "weights": sum(p.numel() for p in policy.core.parameters()),
            "start_s": start,
            "sync_s": statistics.median(syncs),
        }
        return [about | compared(policy, engine, replace(case, rows=count), repeats) for count in rows]
    finally:
        engine.close()


def compared(policy: Policy, engine: VllmEngine, case: Case, repeats: int) -> dict[str, Any]:
    """Both in turn, after one draw each that warms up. Ratios are of the same repeat."""
    batch, sampling = prompt_batch(case), Sampling(max_new_tokens=case.response, batch_size=case.rows)
    arms: dict[str, Callable[[PromptBatch], Any]] = {
        "stream": Sampler(policy, sampling).sample,
        "vllm": ServerSampler(engine, sampling).sample,
    }
    first = {name: draw(batch).rollout for name, draw in arms.items()}
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, draw in arms.items():
            time.sleep(QUIET)
            spent, began = cpu_seconds(name == "vllm"), time.perf_counter()
            draw(batch)
            cpu[name].append(cpu_seconds(name == "vllm") - spent)
            wall[name].append(time.perf_counter() - began)
    tokens = int(first["stream"].lengths_B.sum())
    same = sum(a == b for a, b in zip(first["stream"].response_ids, first["vllm"].response_ids, strict=True))
    return {
        "case": case.name,
        "rows": case.rows,
        "same_rows": same,
        **{f"{name}_tokens_per_cpu_second": tokens / statistics.median(seconds) for name, seconds in cpu.items()},
        **{f"{name}_tokens_per_second": tokens / statistics.median(seconds) for name, seconds in wall.items()},
        "stream_over_vllm": statistics.median(b / a for a, b in zip(cpu["stream"], cpu["vllm"], strict=True)),
    }


def cpu_seconds(server: bool) -> float:
    """Of this process, and of all that it has started and that still run: a server's are children of a guard."""
    import psutil

    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *(me.children(recursive=True) if server else ())))


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = [
        "| weights | rows | in process, tokens per CPU second | vLLM | ratio | same rows | start, s | sync, s |",
        "|" + "---|" * 8,
    ]
    for row in found:
        stream, vllm = row["stream_tokens_per_cpu_second"], row["vllm_tokens_per_cpu_second"]
        cells = [
            f"{row['weights'] / 1e6:.1f} M", row["rows"], f"{stream:,.0f}", f"{vllm:,.0f}", f"{row['stream_over_vllm']:.2f}",
            row["same_rows"], f"{row['start_s']:.0f}", f"{row['sync_s']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines
