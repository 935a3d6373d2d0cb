"""Seconds and memory of a step, as metrics."""

from __future__ import annotations

import resource
import time

import torch


class Timer:
    """Seconds of each part of a step."""

    def __init__(self) -> None:
        self.began = self.last = time.perf_counter()
        self.cpu = time.process_time()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """What was since the last one counts as `name`."""
        now = time.perf_counter()
        self.laps[f"time/{name}_s"] = self.laps.get(f"time/{name}_s", 0.0) + now - self.last
        self.last = now

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def metrics(self, tokens: float) -> dict[str, float]:
        """The laps, seconds of the processor, tokens per second, and the peaks of this process's memory so far, in MiB."""
        metrics = {**self.laps, "time/cpu_s": time.process_time() - self.cpu, "time/tokens_per_s": tokens / self.seconds()}
        metrics["memory/peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if torch.cuda.is_available():
            metrics["memory/gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        return metrics
