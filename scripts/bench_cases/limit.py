"""What this machine can do, measured, and the shortest time that a case's work can take on it.

    matrix products ──> operations per second ─┐
    reading tensors ──> bytes per second, by ──┴─> max(bytes / bandwidth, operations / peak), step by step
    of 1 to 512 MB      how much is read

Decoding: a step reads the weights and the keys and values of the live tokens and writes the logits; two operations per
weight and live row, and those of attention. Learning: forward passes of policy, reference and value, then epochs times
three forward passes of policy and value; the head where a response token is predicted, and nowhere else.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from steerl.scripts.bench_cases.cases import Case
from steerl.training.planning.hardware import measure_device

_MEGABYTES = (1, 4, 16, 64, 256, 512)
_BYTES = {"float32": 4, "bfloat16": 2}


def measured(
    device: str = "cpu", dtype: str = "float32", rounds: int = 7, megabytes: Sequence[int] = _MEGABYTES
) -> dict[str, object]:
    """{"flops": operations per second, "bandwidth": {megabytes: bytes per second}}: the best of some rounds."""
    kind = getattr(torch, dtype)
    if device == "cuda":  # no model's weights fit its caches: one size says all
        tried = [measure_device(torch.device(device), kind) for _ in range(3)]
        flops, rate = (max(values) for values in zip(*tried, strict=True))
        return {"flops": flops, "bandwidth": {"1": rate}}
    size = 1024
    a, b = (torch.randn(size, size).to(kind) for _ in range(2))
    found: dict[str, Any] = {"flops": 2 * size**3 / _fastest(lambda: a @ b, rounds), "bandwidth": {}}
    for at in megabytes:
        x = torch.ones(at * 2**20 // _BYTES[dtype], dtype=kind)
        y = torch.empty_like(x)
        times = max(1, 64 // at)

        def read(x: torch.Tensor = x, times: int = times) -> None:
            for _ in range(times):
                x.amax()

        def copy(x: torch.Tensor = x, y: torch.Tensor = y, times: int = times) -> None:
            for _ in range(times):
                y.copy_(x)

        moved = at * 2**20 * times
        found["bandwidth"][str(at)] = max(moved / _fastest(read, rounds), 2 * moved / _fastest(copy, rounds))
    return found


def best(several: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Of several measurements: other jobs only ever make them lower."""
    sizes = several[0]["bandwidth"]
    return {
        "flops": max(one["flops"] for one in several),
        "bandwidth": {size: max(one["bandwidth"][size] for one in several) for size in sizes},
    }


def _fastest(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the processor."""
    work()
    found = []
    for _ in range(rounds):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


# -- what the work is -------------------------------------------------------------------------------------------------


def weights(case: Case) -> tuple[float, float]:
    """Weights of the layers, and of the head. The embedding is looked up, not multiplied."""
    layer = 2 * case.hidden**2 + 2 * case.hidden * case.key_width + 3 * case.hidden * case.inner
    return case.layers * layer, float(case.hidden * case.vocabulary)


def decode_seconds(case: Case, alive: Sequence[int], machine: dict[str, Any]) -> float:
    """The prefill (once for a prompt's samples), and a step for every further token; `alive`: rows at each step."""
    layers, head = weights(case)
    size, total = _BYTES[case.dtype], 0.0
    for t, rows in enumerate(alive):
        read = case.prompt + t
        if t == 0:
            prompts = rows / case.n
            operations = 2 * prompts * (case.prompt * layers + head) + _attention(case, prompts, case.prompt)
            cache = 2 * case.layers * case.key_width * prompts * case.prompt
        else:
            operations = 2 * rows * (layers + head) + 4 * case.layers * case.hidden * rows * read
            cache = 2 * case.layers * case.key_width * rows * read
        moved = size * (layers + head + cache) + 4 * rows * case.vocabulary
        total += max(moved / bandwidth(machine, moved), operations / machine["flops"])
    return total


def update_seconds(case: Case, alive: Sequence[int], machine: dict[str, Any]) -> tuple[float, float]:
    """Of scoring and of learning; `alive` as above, so padding is no work."""
    layers, head = weights(case)
    rows, tokens = alive[0], float(sum(alive))
    positions = rows * case.prompt + tokens
    lengths = positions / rows
    trunk = 2 * positions * layers + _attention(case, rows, lengths)
    policy, value = trunk + 2 * tokens * head, trunk
    if case.credit != "gae":  # no value, and a reference where there is a KL
        return (1 + case.kl) * policy / machine["flops"], 3 * case.epochs * policy / machine["flops"]
    return (2 * policy + value) / machine["flops"], 3 * case.epochs * (policy + value) / machine["flops"]


def _attention(case: Case, rows: float, length: float) -> float:
    return 2 * case.layers * case.hidden * rows * length**2  # half of the square is masked


def bandwidth(machine: dict[str, Any], moved: float) -> float:
    """Of the measured sizes the largest that is no more than what is moved: smaller sets fit caches that this one may not."""
    sizes = sorted(machine["bandwidth"], key=int)
    fitting = [size for size in sizes if int(size) * 2**20 <= moved] or sizes[:1]
    return float(machine["bandwidth"][fitting[-1]])


def share(
    case: Case, alive: Sequence[int], seconds: Mapping[str, Sequence[float]], machine: dict[str, Any]
) -> dict[str, float]:
    """The limit over the median of what was measured, phase by phase."""
    limits = {"sample": decode_seconds(case, alive, machine)}
    if case.work == "update":
        limits["score"], limits["learn"] = update_seconds(case, alive, machine)
    return {name: limit / statistics.median(seconds[name]) for name, limit in limits.items() if seconds.get(name)}
