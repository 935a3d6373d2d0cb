"""The device under test, and a line of JSON for each test as soon as it has run: what `steerl bench --gpu` reads.

python -m pytest -m gpu tests/gpu                   on a GPU
STEERL_GPU=cpu python -m pytest -m gpu tests/gpu    the rehearsal: the same code on a CPU, what is CUDA's own skipped
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
import torch

from steerl.rollout.decoding import compiled

DEVICE = os.environ.get("STEERL_GPU", "cuda")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """What a test records by `record_property` goes with its line."""
    report = (yield).get_result()  # type: ignore[misc]
    if report.when != "call" and report.outcome == "passed":
        return
    if not (path := os.environ.get("STEERL_GPU_LINES")):
        return
    said = (
        "" if report.outcome == "passed" else str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    )
    told = " ".join(said.strip().splitlines()[-1:] if report.outcome == "skipped" else _reason(said))
    line = {"test": item.nodeid.rpartition("/")[2], "outcome": report.outcome, "seconds": report.duration, "said": told}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "found": dict(item.user_properties)}) + "\n")


def _reason(said: str) -> list[str]:
    """The lines of a failure that say what was wrong."""
    return [line.removeprefix("E").strip() for line in said.splitlines() if line.startswith("E")][:3]


@pytest.fixture(scope="session")
def device() -> torch.device:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    return torch.device(DEVICE)


@pytest.fixture(autouse=True)
def fresh(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing of the test before; on a CPU graphs without the compiler's minute."""
    if device.type == "cpu":
        monkeypatch.setattr(compiled, "BACKEND", "eager")
    compiled._MODELS.clear()
    compiled._WARNED.clear()
    yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def only_cuda(device: torch.device, what: str) -> None:
    if device.type != "cuda":
        pytest.skip(f"a rehearsal: {what} needs a GPU")
