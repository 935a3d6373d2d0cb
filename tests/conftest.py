"""What every test stands on: one thread, no network, the tiny worlds made once a session; browser tests need a browser."""

from __future__ import annotations

import os

# Before torch is imported, and for the processes that tests start.
for _name, _value in {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "DS_ACCELERATOR": "cpu",
}.items():
    os.environ.setdefault(_name, _value)

import shutil  # noqa: E402
import signal  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402
from steerl.scripts import make_tiny  # noqa: E402

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--few", type=int, metavar="N", help="of every parametrized test the first N cases only, for a quick look")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if few := config.getoption("--few"):
        seen: Counter[str] = Counter()
        left_out = []
        for item in list(items):
            name = item.nodeid.split("[")[0]
            seen[name] += 1
            if seen[name] > few:
                items.remove(item)
                left_out.append(item)
        config.hook.pytest_deselected(items=left_out)
    if not any(shutil.which(name) for name in BROWSERS):
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason="no chromium on the path"))

    if os.environ.get("PYTEST_XDIST_WORKER"):
        items[:] = in_two_halves(items)


def in_two_halves(items: list[pytest.Item]) -> list[pytest.Item]:
    """Two workers begin with a half each and steal from the other's end: in both, files with slow tests come first, so that
    what is shared at the end is quick."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.split("::")[0], []).append(item)
    slow = {name: sum(item.get_closest_marker("slow") is not None for item in found) for name, found in files.items()}
    halves: tuple[list[pytest.Item], list[pytest.Item]] = ([], [])
    shares = [0, 0]
    for name in sorted((name for name in files if slow[name]), key=lambda name: (-slow[name], name)):
        least = shares.index(min(shares))
        halves[least].extend(files[name])
        shares[least] += slow[name]
    for name in sorted((name for name in files if not slow[name]), key=lambda name: (-len(files[name]), name)):
        min(halves, key=len).extend(files[name])
    return [*halves[0], *halves[1]]


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_world("reviews")`: the folder of that world, made once for all test workers. Read it, never write to it."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "tiny"

    def world(name: str) -> Path:
        shared.mkdir(exist_ok=True)
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                make_tiny.make(name, shared, 0)
        return shared / name

    return world
