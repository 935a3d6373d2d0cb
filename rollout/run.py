"""What a job leaves behind: its folder (fresh, resumed or overwritten), files written aside and renamed, versions.

Every door that writes uses these few functions, so a full disk or a kill never leaves half a file under a final name.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rollout.errors import Problem


@dataclass(frozen=True)
class RunSettings:
    """Where a job writes, and what to do with what is there already."""

    dir: str = ""
    """The run's folder."""
    resume: bool = False
    """Go on from what the folder holds; starts afresh when it is empty."""
    overwrite: bool = False
    """Empty the folder first."""
    save_every: int = 0
    """Steps between checkpoints (training) or rows per shard (dumps); 0 = the job's own default."""
    keep: int = 2
    """Checkpoints kept, the newest first."""
    trackers: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""
    seed: int = 0
    """Seed of initialisation, order and minibatches. Sampling has its own: sampling.seed."""

    def __post_init__(self) -> None:
        ranges = {"seed": (0, 2**32 - 1), "save_every": (0, None), "keep": (1, None)}  # a seed is numpy's, too
        problems = [
            f"run.{name}: {getattr(self, name)}, but it must be {f'{low} to {high}' if high else f'{low} or more'}"
            for name, (low, high) in ranges.items()
            if not low <= getattr(self, name) <= (high or math.inf)
        ]
        if problems:
            raise Problem(*problems)


def check_folder(run: RunSettings) -> Path:
    """The run's folder, which `open_folder` would open; nothing is made or emptied."""
    if not run.dir:
        raise Problem("run.dir: missing; say where the run is to be written, --run.dir DIR")
    if run.resume and run.overwrite:
        raise Problem("run.resume and run.overwrite: both true; choose one")
    folder = Path(run.dir)
    if folder.exists() and not folder.is_dir():
        raise Problem(f"run.dir: {folder} is a file; name a folder")
    if not (run.overwrite or run.resume) and folder.exists() and any(folder.iterdir()):
        raise Problem(f"run.dir: {folder} is not empty; add --run.resume true or --run.overwrite true, or name another")
    return folder


def open_folder(run: RunSettings) -> Path:
    """The run's folder, made if missing. Call on the main process only, before anything is written: `overwrite` empties it."""
    folder = check_folder(run)
    if run.overwrite and folder.exists():
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"run.dir: cannot make {folder}: {error.strerror}") from error
    return folder


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is flushed and renamed onto it, else removed.

    A folder that stands there is moved away first: a kill just then leaves none, and never half a one."""
    remove_left_behind(path.parent, f".{path.name}.*.tmp")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        yield aside
        sync(aside)
        if path.is_dir() and aside.is_dir():
            os.replace(path, old)
        os.replace(aside, path)
        flush(path.parent)
        _remove(old)
    except BaseException as error:
        _remove(aside)
        if (reason := disk_trouble(error)) is not None:
            raise Problem(f"{path}: cannot be written: {reason}; free some space or name another folder") from error
        raise


def remove_left_behind(folder: Path, pattern: str = ".*.tmp") -> None:
    """What killed jobs left under temporary names. Those of a process that is alive are its own to rename or remove."""
    for left in folder.glob(pattern):
        number = re.search(r"\.(\d+)(\.old)?\.tmp$", left.name)
        if number is None or int(number.group(1)) == os.getpid() or not _is_alive(int(number.group(1))):
            _remove(left)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def disk_trouble(error: BaseException) -> str | None:
    """What the system says, if it was the system that refused. tokenizers and safetensors raise errors of their own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    number = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(number.group(1))) if number else None


def sync(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to the disk."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
    flush(path)


def flush(path: Path) -> None:
    """One file's content, or which names a folder has: what other processes write into it meanwhile is theirs to flush."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """The installed versions that a result depends on, and the state of the git checkout the code runs from."""
    names = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "tokenizers", "deepspeed")
    found: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["git"] = git_state()
    return found


def git_state() -> str:
    """The commit of this code's checkout, with `-dirty` when it was changed; `unknown` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
