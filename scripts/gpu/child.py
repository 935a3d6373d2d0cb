"""The process that measures: the jobs of cases.py one after the other, a line of JSON for each as soon as it is done.

    python -m steerl.scripts.gpu.child DEVICE FOLDER NUMBER,NUMBER,...

What a job raises is its line. The process ends where the device does not work any more, or is ended: run.py starts another
one with what is left. Number -1 is the machine: its name, its peak and its bandwidth.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from steerl.rollout.decoding import compiled
from steerl.scripts.bench_cases import limit
from steerl.scripts.bench_cases.child import RUNNERS
from steerl.scripts.gpu.cases import Job, jobs
from steerl.training.model import compiled as layers

TIMES = 1
"""Measured after one that warms up."""


def machine(device: str) -> dict[str, object]:
    """The device, and what it can do in bfloat16."""
    if device == "cpu":
        return {"name": "CPU (a rehearsal)", **limit.measured("cpu", "bfloat16", rounds=1, megabytes=(1,))}
    card = torch.cuda.get_device_properties(0)
    about = {"name": card.name, "memory_gb": card.total_memory / 1e9, "multiprocessors": card.multi_processor_count}
    capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return {**about, "capability": capability, "cuda": torch.version.cuda, **limit.measured("cuda", "bfloat16")}


def measured(job: Job, folder: Path, limits: dict[str, Any]) -> dict[str, object]:
    """The median of what was timed, and its share of the limit."""
    compiled._WARNED.clear()
    found: dict[str, Any] = RUNNERS[job.case.work, job.who](job.case, TIMES, folder).to_json(job.case, job.who)
    if job.who == "compiled" and compiled._WARNED:  # the eager path's figures are there already
        raise RuntimeError("; ".join(compiled._WARNED))
    phases = {name: statistics.median(values) for name, values in found["seconds"].items()}
    whole = sum(phases.values())
    tokens = statistics.median(found["tokens"])
    if "flops" not in limits:  # the machine could not be measured
        shares = {}
    elif job.who == "grpo":
        score, learn = limit.update_seconds(job.case, found["alive"], limits)
        shares = {"whole": (limit.decode_seconds(job.case, found["alive"], limits) + score + learn) / whole}
    else:
        shares = limit.share(job.case, found["alive"], found["seconds"], limits)
    return {
        "seconds": whole, "phases": phases, "tokens": tokens, "tokens_per_second": tokens / whole,
        "peak_mb": found["peak_mb"], "share_of_limit": shares,
    }  # fmt: skip


def clean(device: str) -> None:
    """Let go of the last job's memory and graphs; raises where the device no longer works."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def main(device: str, folder: Path, numbers: list[int]) -> None:
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no result
    if device == "cpu":
        compiled.BACKEND = layers.BACKEND = "eager"  # without the compiler's minutes
    known, limits = jobs(device == "cpu"), json.loads(os.environ.get("STEERL_GPU_LIMITS", "{}"))
    for number in numbers:
        began = time.perf_counter()
        try:
            found = machine(device) if number < 0 else measured(known[number], folder, limits)
            limits = found if number < 0 else limits
        except Exception as error:  # noqa: BLE001  the other jobs' figures are not lost by it
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]}
            del error
        found["took"] = time.perf_counter() - began
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(found), file=lines, flush=True)
        clean(device)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(number) for number in sys.argv[3].split(",")])
