"""What a job runs on: GPUs by name with their makers' figures, figures given by hand, or measured here."""

from __future__ import annotations

import difflib
import time
from dataclasses import dataclass
from typing import Literal

import torch

from steerl.rollout.common.errors import ConfigError

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True)
class GPU:
    """A GPU as its data sheet has it: dense products without sparsity, one direction of its links."""

    memory: float
    """GB."""
    half: float
    """TFLOP/s of bfloat16 products."""
    single: float
    """TFLOP/s of float32 products as torch does them: without TF32."""
    bandwidth: float
    """GB/s between memory and cores."""
    link: float
    """GB/s to the other GPUs of the node, one way."""


GPUS = {
    "a100": GPU(memory=80, half=312, single=19.5, bandwidth=2039, link=300),
    "a100-40": GPU(memory=40, half=312, single=19.5, bandwidth=1555, link=300),
    "h100": GPU(memory=80, half=989, single=67, bandwidth=3350, link=450),
    "h200": GPU(memory=141, half=989, single=67, bandwidth=4800, link=450),
    "b200": GPU(memory=180, half=2250, single=75, bandwidth=7700, link=900),
    "l4": GPU(memory=24, half=121, single=30, bandwidth=300, link=32),
    "l40s": GPU(memory=48, half=362, single=91, bandwidth=864, link=32),
    "mi300x": GPU(memory=192, half=1307, single=163, bandwidth=5300, link=448),
}


@dataclass(frozen=True)
class Machines:
    """All GPUs of a job."""

    gpus: int
    """Per node."""
    nodes: int
    memory: float
    """Bytes of one GPU."""
    operations: float
    """Products per second in the precision of the job, at best."""
    bandwidth: float
    """Bytes per second between memory and cores, at best."""
    link: float
    """Bytes per second from one GPU to the others of its node."""
    network: float
    """Bytes per second from one GPU to other nodes."""
    device: Literal["cuda", "cpu"] = "cuda"

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    @property
    def between(self) -> float:
        """What a collective call over all GPUs goes through: its slowest link."""
        return self.link if self.nodes == 1 else min(self.link, self.network)


def named(name: str) -> GPU:
    if name not in GPUS:
        near = difflib.get_close_matches(name.lower(), GPUS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"gpu: unknown GPU {name!r}; {hint}known are {', '.join(GPUS)}; for another one give --memory, --tflops and "
            "--bandwidth, or --measure true on it"
        )
    return GPUS[name]


def measure_device(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(products per second of a large square matrix product, bytes per second of a copy), the best of a few."""
    large = device.type == "cuda"
    size = 8192 if large else 1024
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.zeros(2**29 if large else 2**26, device=device)
    target = torch.empty_like(source)
    product = _best(lambda: torch.mm(left, right), device)
    copy = _best(lambda: target.copy_(source), device)
    return 2 * size**3 / product, 2 * source.nbytes / copy


def _best(work: object, device: torch.device, times: int = 5) -> float:
    """Seconds of the quickest of some calls, after one that is not counted."""
    assert callable(work)
    seconds = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])
