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

import gc  # noqa: E402
import hashlib  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import time  # noqa: E402
from collections import Counter  # noqa: E402
from collections.abc import Callable  # noqa: E402
from importlib.metadata import version  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from filelock import FileLock  # noqa: E402

from steerl.scripts import make_tiny  # noqa: E402
from tests.vllm_server import vllm_python, vllm_server  # noqa: E402, F401  one for all that is marked vllm

# A shell's background jobs ignore Ctrl-C, and so would the processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

WEEK = 7 * 86400
VLLM = Path(__file__).resolve().parent.parent / ".venv-vllm/bin/python"
TOOLS = VLLM.parents[2] / ".venv-tools/bin/python"
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
    lacking = {
        "browser": None if any(shutil.which(name) for name in BROWSERS) else "no chromium on the path",
        "tools": None if TOOLS.exists() else "no .venv-tools: make tools",
        "vllm": None if VLLM.exists() else "no .venv-vllm: make vllm",
    }
    for item in items:
        for marker, reason in lacking.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))

    if os.environ.get("PYTEST_XDIST_WORKER"):
        items[:] = in_two_halves(items)
    gc.freeze()  # the imported and the collected, half a million objects, are looked through no more


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
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test workers of this session see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture(scope="session")
def made_once(shared: Path) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once("name", make)`: the folder that `make(folder)` fills, once for all test workers. Read it, never write to it."""

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder = shared / name
        with FileLock(shared / f"{name}.lock"):
            if not folder.exists():
                aside = shared / f"{name}.unfinished"
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                make(aside)
                aside.rename(folder)
        return folder

    return once


@pytest.fixture(scope="session")
def tiny_world(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """`tiny_world("reviews")`: the folder of that world, made once for the code that makes it. Read it, never write to it."""
    cache = pytestconfig.rootpath / ".pytest_cache" / "toy_tasks"

    def world(name: str) -> Path:
        folder = cache / f"{name}-{code_of(name, pytestconfig.rootpath)}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / name).exists():
                make_tiny.make(name, folder, 0)
                for old in cache.glob(f"{name}-*"):
                    if time.time() - old.stat().st_mtime > WEEK:
                        shutil.rmtree(old, ignore_errors=True)
        return folder / name

    return world


@pytest.fixture
def episode_tasks(tiny_world: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands who has made the two tasks of several turns."""
    (tmp_path / "tiny").mkdir()
    for world in ("calculator", "maze"):
        (tmp_path / "tiny" / world).symlink_to(tiny_world(world))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(world: str, root: Path) -> str:
    """A hash of what decides a world's bytes: the code that makes it, and the libraries."""
    files = [root / "scripts/make_tiny.py", *(root / "scripts/toy_tasks").glob("*.py")]
    if "steerl.rollout" in (root / f"scripts/toy_tasks/{world}.py").read_text(encoding="utf-8"):
        files += (root / "rollout").rglob("*.py")
    digest = hashlib.sha256(repr([(name, version(name)) for name in ("torch", "transformers", "tokenizers")]).encode())
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
