"""What is measured on a GPU, in the order in which it goes without when time is short: the last cases first.

sampling   ours (eager) | compiled (sampling.compile) | plain (model.generate)
update     ours: PPO, one epoch, a value model and a reference | compiled (ppo.compile); group: group credit beside TRL's GRPO
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from steerl.scripts.bench_cases.cases import CUDA, Case


@dataclass(frozen=True)
class Job:
    """One case for one implementation."""

    size: str
    who: str
    """ours, compiled, plain, or grpo (TRL's)."""
    case: Case

    @property
    def work(self) -> str:
        return self.case.work + ("" if self.case.credit == "gae" else f" ({self.case.credit})")

    @property
    def name(self) -> str:
        return f"{self.work} {self.size} {self.case.rows} rows: {self.who}"


SIZES = {name: next(case for case in CUDA if case.hidden == hidden) for name, hidden in (("0.5B", 896), ("1.5B", 1536))}
"""The shapes of Qwen2.5, random weights, bfloat16."""
ROWS = (64, 256)
LENGTHS = {"prompt": 128, "response": 128, "mean": 0, "epochs": 1}
_TINY = Case(
    family="qwen2", hidden=32, layers=2, heads=4, key_heads=2, intermediate=64, vocabulary=300, tied=True, micro=2,
    dtype="bfloat16", device="cpu",
)  # fmt: skip
REHEARSAL = {"tiny": _TINY}
"""The same jobs in less than a second each, on a CPU."""


def jobs(rehearsal: bool) -> list[Job]:
    sizes, rows, lengths = SIZES, ROWS, LENGTHS
    if rehearsal:
        sizes, rows, lengths = REHEARSAL, (2, 4), {**LENGTHS, "prompt": 5, "response": 6}
    shapes = {name: replace(shape, **lengths) for name, shape in sizes.items()}  # type: ignore[arg-type]
    return list(_ordered(shapes, rows))


def _ordered(shapes: dict[str, Case], rows: tuple[int, ...]) -> Iterator[Job]:
    for size, shape in shapes.items():
        for count in rows:
            for who in ("ours", "plain", "compiled"):
                yield Job(size, who, replace(shape, work="sampling", rows=count))
        yield Job(size, "ours", replace(shape, work="update", rows=rows[0]))
    updates = [(count, who) for count in rows for who in ("ours", "compiled")]
    for count, who in updates[1:]:  # the first is there
        for size, shape in shapes.items():
            yield Job(size, who, replace(shape, work="update", rows=count))
    for size, shape in shapes.items():
        for who in ("ours", "grpo"):
            yield Job(size, who, replace(shape, work="update", rows=rows[0], n=min(8, rows[0]), credit="group"))
