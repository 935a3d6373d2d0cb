"""What a job leaves behind: its folder (fresh, resumed or overwritten), files written aside and renamed, versions.

Every command that writes uses these few functions, so a full disk or a kill never leaves half a file under a final name.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError

_logger = logging.getLogger(__name__)


class Held(ConfigError):
    """Another process holds the folder."""


@dataclass(frozen=True)
class RunSettings:
    """Where a job writes, and what to do with what is there already."""

    dir: str = ""
    """The run's folder."""
    resume: bool = False
    """Go on from what the folder holds; starts afresh when it is empty."""
    overwrite: bool = False
    """Empty the folder first, if a job wrote it: right before the first write, when all is loaded and checked."""
    allow_changes: bool = False
    """With resume: go on although settings, data or weights differ from those that the run was begun with; each is told."""
    save_every: int = 0
    """Steps between checkpoints (training) or rows per shard (dumps); 0 = the job's own default."""
    keep: int = 2
    """Checkpoints kept, the newest first."""
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = field(default_factory=list)
    """Where metrics go besides metrics.jsonl."""
    push_to_hub: str = ""
    """OWNER/NAME on the hub, where a training run's model goes when all is written; unset = nowhere."""
    hub_private: bool = True
    """Whether push_to_hub makes a new repository private."""
    seed: int = 0
    """Seed of initialization, order and minibatches. Sampling has its own: sampling.seed."""

    def __post_init__(self) -> None:
        ranges = {"seed": (0, 2**32 - 1), "save_every": (0, None), "keep": (1, None)}  # a seed is numpy's, too
        problems = [
            f"run.{name}: {getattr(self, name)}, but it must be {f'{low} to {high}' if high else f'{low} or more'}"
            for name, (low, high) in ranges.items()
            if not low <= getattr(self, name) <= (high or math.inf)
        ]
        if not self.hub_private and not self.push_to_hub:
            problems.append("run.hub_private: false has no effect without run.push_to_hub; leave it out")
        if problems:
            raise ConfigError(*problems)


MARKER, LOCK = ".steerl-run", ".steerl-lock"
"""In a run's folder: what says that all in it is a job's own, and what the job that is writing holds."""
_OWN = (
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "calibration.json", "report.html", "curves.png"),
    *("checkpoints", "model", "adapter", "wandb", "tensorboard", "tokenizer", "records", "manifest.json", "scores.json"),
    *("rollouts-*.parquet", "scores-*.parquet", ".*.tmp"),
)
"""What jobs wrote into their folders before there was a marker."""


def check_folder(run: RunSettings, config: Mapping[str, object] | None = None) -> Path:
    """The run's folder, which `opened` would open; nothing is made or emptied. `config` names what the job reads."""
    if not run.dir:
        raise ConfigError("run.dir: missing; say where the run is to be written, --run.dir DIR")
    if run.resume and run.overwrite:
        raise ConfigError("run.resume and run.overwrite: both true; choose one")
    if run.allow_changes and not run.resume:
        raise ConfigError("run.allow_changes: true, but nothing is resumed; add --run.resume true or leave it out")
    folder = Path(run.dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.dir: {folder} is a file; name a folder")
    with contextlib.suppress(FileNotFoundError):
        os.close(_lock(folder))
    if not (entries := _content(folder)) or run.resume:
        return folder
    if not run.overwrite:
        raise ConfigError(f"run.dir: {folder} is not empty; add --run.resume true or --run.overwrite true, or name another")
    if not is_run(folder):
        shown = ", ".join(sorted(entry.name for entry in entries)[:3])
        raise ConfigError(
            f"run.overwrite: {folder} holds what no job of ours wrote ({shown}); empty it yourself or name another folder"
        )
    if inner := next((marker.parent for marker in folder.rglob(MARKER) if marker.parent != folder), None):
        raise ConfigError(
            f"run.overwrite: {folder} holds another run, {inner}; move or remove that one first, or name another folder"
        )
    if lost := list(_inputs(config or {}, folder.resolve())):
        raise ConfigError(
            *(f"{name}: {value} lies in run.dir, which --run.overwrite true would empty; move it" for name, value in lost)
        )
    return folder


@contextlib.contextmanager
def opened(run: RunSettings, config: Mapping[str, object] | None = None) -> Iterator[Path]:
    """The run's folder, held until the block ends or the process dies: another job that wants it is told so. Collective.

    Nothing in it changes before `begin`; a job that fails until then leaves the folder as it was."""
    with contextlib.ExitStack() as held:

        def hold() -> None:
            held.enter_context(holding(check_folder(run, config)))

        processes.on_main(hold)
        yield Path(run.dir)


def begin(folder: Path, run: RunSettings) -> None:
    """Right before the first write, when all is loaded and checked: `overwrite` empties the folder. Main process only."""
    try:
        for entry in _content(folder) if run.overwrite else ():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    except OSError as error:
        raise ConfigError(f"run.overwrite: {error.filename} cannot be removed: {error.strerror}") from error
    if not _content(folder):  # what was there before the first job is not a job's own
        write_text(folder / MARKER, "a job's folder: --run.overwrite true empties it\n")


def _content(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.name not in (MARKER, LOCK)] if folder.is_dir() else []


def is_run(folder: Path) -> bool:
    """Whether it may be emptied. Folders without a marker may where all that they hold has a name that jobs gave."""
    entries = _content(folder)
    if (folder / MARKER).is_file() or not entries:
        return True
    links = {entry for entry in entries if entry.is_symlink() and os.readlink(entry).startswith("model/")}
    known = all(entry in links or any(fnmatch.fnmatchcase(entry.name, own) for own in _OWN) for entry in entries)
    return known and any((folder / name).is_file() for name in ("config.yaml", "manifest.json"))


def _inputs(value: object, folder: Path, name: str = "") -> Iterator[tuple[str, str]]:
    """The settings that name something in `folder`: paths, and functions as file.py:name."""
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _inputs(part, folder, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _inputs(part, folder, f"{name}[{index}]")
    elif isinstance(value, str) and name != "run.dir":
        path = value if os.path.exists(value) else value.rpartition(":")[0]
        if os.path.exists(path) and Path(path).resolve().is_relative_to(folder):
            yield name, value


# -- the lock ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if missing. It goes with the block, or with the process that dies."""
    fresh = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir: cannot make {folder}: {error.strerror}") from error
    path = folder / LOCK
    handle = _lock(folder, os.O_CREAT)
    while not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):  # its holder has just removed it
        os.close(handle)
        handle = _lock(folder, os.O_CREAT)
    try:
        left = os.pread(handle, 300, 0).decode("utf-8", "replace")
        if left and left.rpartition(" on ")[2] != socket.gethostname():
            _logger.warning("%s: %s did not end well; if it still runs, stop it: locks may not reach its host", folder, left)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)
        if fresh:
            with contextlib.suppress(OSError):  # it holds something, as it should
                folder.rmdir()


def _lock(folder: Path, flags: int = 0) -> int:
    """The open lock file of a folder, locked until it is closed; a UserError where another process holds it.

    A record lock: it dies with this process even where forked children live on, and reaches other hosts over NFS."""
    import fcntl

    try:
        handle = os.open(folder / LOCK, os.O_RDWR | flags, 0o644)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"run.dir: {folder} cannot be written: {error.strerror}") from error
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(handle, 300, 0).decode("utf-8", "replace")
        number = re.fullmatch(r"process (\d+) on (.*)", holder)
        alive = number is not None and number[2] == socket.gethostname() and _is_alive(int(number[1]))
        if error.errno in (errno.EACCES, errno.EAGAIN) or alive:
            os.close(handle)
            raise Held(
                f"run.dir: another job is writing {folder} ({holder or 'just begun'}); "
                "wait for it, stop it, or name another folder"
            ) from error
        # A file system without locks: who is alive on this host is all that can be told.
    return handle


def holder(folder: Path) -> tuple[str, bool | None]:
    """(who holds the folder, whether he is alive; None: not known, he is on another host). ("", False): nobody does.

    Nothing is locked meanwhile, so that a job that begins now is not told that another is writing."""
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return "", False
    try:
        told = os.pread(handle, 300, 0).decode("utf-8", "replace")
    finally:
        os.close(handle)
    number = re.fullmatch(r"process (\d{1,9}) on (.*)", told)
    if number is None:
        return told, None
    return told, _is_alive(int(number[1])) if number[2] == socket.gethostname() else None


# -- writing -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well it is flushed and renamed onto it, else removed.

    A folder that stands there is moved away first: a kill just then leaves none, and never half a one."""
    remove_left_behind(path.parent, f".{path.name}.*.tmp")
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    try:
        with told_of_disk(path):
            yield aside
            sync(aside)
            if path.is_dir() and aside.is_dir():
                os.replace(path, old)
            os.replace(aside, path)
            flush(path.parent)
            _remove(old)
    except BaseException:
        _remove(aside)
        raise


@contextlib.contextmanager
def told_of_disk(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written is one line of the user's."""
    try:
        yield
    except BaseException as error:
        if (reason := disk_trouble(error)) is not None:
            raise ConfigError(f"{path}: cannot be written: {reason}; free some space or name another folder") from error
        raise


@contextlib.contextmanager
def folder_aside(path: Path) -> Iterator[Path]:
    """As written_aside, of a folder into which all ranks write. Collective; so must be what fails inside (on_main, on_all)."""
    with contextlib.ExitStack() as written:

        def make() -> Path:
            aside = written.enter_context(written_aside(path))
            with told_of_disk(path):
                aside.mkdir(parents=True)
            return aside

        yield processes.on_main(make)
        processes.on_main(written.close)


def check_shared(folder: Path) -> None:
    """On every rank: it sees what the main process has made."""
    if not folder.is_dir():
        who = f"process {processes.start().rank} on {socket.gethostname()}"
        raise ConfigError(
            f"run.dir: {who} does not see {folder}, which is there for the main process; name a folder that all share"
        )


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


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def versions() -> dict[str, str]:
    """The installed versions that a result depends on, and the state of the git checkout the code runs from."""
    import importlib.metadata

    names = ("torch", "transformers", "accelerate", "trl", "peft", "datasets", "tokenizers", "deepspeed")
    installed: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return {**installed, "git": git_state()}


def git_state() -> str:
    """The commit of this code's checkout, with `-dirty` when it was changed; `unknown` outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
