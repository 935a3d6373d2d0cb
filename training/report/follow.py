"""Runs that go on: what is new in their folders since a reader's place in metrics.jsonl and samples.jsonl.

    runs = Runs([FOLDER, ...])              runs, or folders of runs; those that begin later join
    runs.now()[0].news(Place())             -> what a page adds to what it holds, and its next place; None: nothing is new

A place is two positions in bytes, each with a checksum of what stands before it: a run that goes on from a checkpoint cuts
its files, and who was further begins again. Nothing of the files is kept between two calls. Links inside a run's folder are
not followed.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import LOCK, holder
from steerl.training.report.page import names_of
from steerl.training.report.run_data import ReportRun, columns, parse_line, run_of, setting, view_of
from steerl.training.run.log import METRICS, SAMPLES

CHUNK = 2 << 20
"""Bytes of a file that an answer reads, more where a line is longer."""
FIRST = 1 << 18
"""Bytes of metrics after which the samples wait for the next answer: the curves come first."""
TAIL = 1 << 20
"""Bytes of samples that a page begins with: the newest ones."""
BEFORE = 256
"""Bytes that a place's checksum covers."""
TEXT = 2000
"""Characters of a prompt and of a response that a page holds, to search in; a sample that is looked at comes whole."""
MOST_RUNS, DEEP = 40, 3
"""Runs that a page shows; floors of folders in which they are looked for."""
BESIDE = ("config.yaml", "summary.json", "versions.json")


@dataclass(frozen=True)
class Place:
    """How far a reader is: (position, checksum) in metrics and in samples, and a checksum of what stands beside them."""

    metrics: tuple[int, int] = (0, 0)
    samples: tuple[int, int] = (0, 0)
    about: int = 0

    def __str__(self) -> str:
        return ".".join(map(str, (*self.metrics, *self.samples, self.about)))

    @classmethod
    def of(cls, text: str) -> Place:
        a, b, c, d, e = map(int, text.split("."))
        return cls((a, b), (c, d), e)


@dataclass
class FollowedRun:
    folder: Path
    name: str
    _about: tuple[object, ReportRun, float | None, list[str]] | None = field(default=None, init=False)

    def news(self, place: Place) -> dict[str, Any] | None:
        told = self._told()
        about = zlib.crc32(json.dumps(told).encode())
        found: dict[str, Any] = {} if about == place.about else {"about": told}
        metrics, samples = self._parts(place)
        if metrics.again or samples.again:
            found["again"] = True
            metrics, samples = self._parts(Place())
        if metrics.lines:
            lines = list(_good(metrics.lines))
            steps, values = columns([line for _, line in lines])
            age = max(0.0, time.time() - metrics.written)
            found |= {"metrics": {"step": steps, "columns": values}, "age": age}
        if samples.lines:
            found |= _shown(samples.lines)
        if samples.passed:
            found["missed"] = True
        if not found and (metrics.place, samples.place) == (place.metrics, place.samples):
            return None
        found |= {"place": str(Place(metrics.place, samples.place, about)), "more": metrics.more or samples.more}
        return found | {"bytes": sum(len(line) for part in (metrics, samples) for _, line in part.lines)}

    def row(self, position: int) -> dict[str, object] | None:
        """The sample whose line begins there, whole."""
        with contextlib.suppress(OSError, ValueError), _opened(self.folder / SAMPLES) as file:
            file.seek(position)
            shown = view_of(parse_line(file.readline().decode("utf-8", "replace")))
            return {"prompt_text": shown.prompt_text, "completion": shown.completion, **shown.tokens()}
        return None

    @property
    def kl_target(self) -> float | None:
        self._told()
        return self._about[1].kl_target if self._about else None

    def _told(self) -> dict[str, Any]:
        """What stands beside metrics and samples, and how the run is; read again where its files changed."""
        marks = [_mark(self.folder / name) for name in BESIDE]
        if self._about is None or self._about[0] != marks:
            notes: list[str] = []
            config, summary, versions = (self._beside(name, notes) for name in BESIDE)
            total = next((n for s in ("ppo", "sft", "reward_model") if (n := setting(config, s, "steps"))), None)
            self._about = marks, run_of(self.name, config, _object(summary), _object(versions)), total, notes
        _, run, total, notes = self._about
        for name in (METRICS, SAMPLES):
            if (self.folder / name).is_symlink():
                notes = [*notes, f"{name} is a link, which is not followed"]
        return {
            "name": self.name, "state": self.state(), "total": total, "config": run.config, "versions": run.versions,
            "summary": run.summary, "ends": run.ends, "notes": notes,
        }  # fmt: skip

    def _beside(self, name: str, notes: list[str]) -> str:
        try:
            with _opened(self.folder / name) as file:
                return file.read(CHUNK).decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            notes.append(f"{name} cannot be read: {error.strerror}")
            return ""

    def state(self) -> str:
        """By the lock that a job holds while it writes: gone with its holder, removed by one that ends by itself."""
        who, alive = holder(self.folder)
        if alive:
            return "running" if _mark(self.folder / METRICS)[1] else "starting"
        if who:
            return "died" if alive is False else f"running on {who.rpartition(' on ')[2]}, or died there"
        if _mark(self.folder / "summary.json")[1]:
            return "finished"
        return "stopped" if _mark(self.folder / METRICS)[1] else "not begun"

    def _parts(self, place: Place) -> tuple[Part, Part]:
        metrics = self._part(METRICS, place.metrics, 0)
        if sum(len(line) for _, line in metrics.lines) > FIRST:
            return metrics, Part(place=place.samples, more=True)
        return metrics, self._part(SAMPLES, place.samples, TAIL)

    def _part(self, name: str, at: tuple[int, int], tail: int) -> Part:
        path, (position, check) = self.folder / name, at
        if position and _mark(path)[1] == position:
            return Part(place=at)
        try:
            with _opened(path) as file:
                return _read_on(file, position, check, tail)
        except FileNotFoundError:
            return Part(again=position > 0)
        except OSError:  # a link, or not ours to read: `about` says so
            return Part(place=at)


@dataclass(frozen=True)
class Part:
    """Whole lines of a file, each with its position, and the place after them."""

    lines: tuple[tuple[int, bytes], ...] = ()
    place: tuple[int, int] = (0, 0)
    written: float = 0.0
    again: bool = False
    """The file is not the one in which the reader was: what he has of it is void."""
    more: bool = False
    passed: bool = False
    """Lines before these were passed over."""


def _read_on(file: IO[bytes], position: int, check: int, tail: int) -> Part:
    about = os.fstat(file.fileno())
    if position and (about.st_size < position or _checked(file, position) != check):
        return Part(again=True)
    start = position
    while tail and not start and tail < about.st_size and position in (0, about.st_size):
        file.seek(about.st_size - tail)
        file.readline()
        position, tail = file.tell(), 2 * tail  # a line may be longer
    position = 0 if position == about.st_size and not start else position
    file.seek(position)
    text, size = file.read(CHUNK), CHUNK
    while b"\n" not in text and len(text) == size:
        text, size = text + file.read(size), 2 * size
    lines, at = [], position
    for line in text.split(b"\n")[:-1]:  # what stands after the last end of a line is being written
        lines.append((at, line))
        at += len(line) + 1
    more = bool(lines) and position + len(text) < about.st_size
    return Part(tuple(lines), (at, _checked(file, at)), about.st_mtime, more=more, passed=position > start)


def _checked(file: IO[bytes], position: int) -> int:
    file.seek(max(0, position - BEFORE))
    return zlib.crc32(file.read(min(position, BEFORE)))


def _good(lines: Sequence[tuple[int, bytes]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """A line that no run writes is passed over: the page of the others is worth more than a word about it."""
    for at, line in lines:
        with contextlib.suppress(ValueError):
            yield at, parse_line(line.decode("utf-8", "replace"))


def _shown(lines: Sequence[tuple[int, bytes]]) -> dict[str, Any]:
    """Of each sample what it is found by, its texts, cut, and where it stands."""
    kept, rows = [], []
    for at, line in _good(lines):
        with contextlib.suppress(ValueError):
            rows.append(view_of(line))
            kept.append(at)
    texts = [[row.prompt_text[:TEXT], row.completion[:TEXT]] for row in rows]
    return {"heads": {**ReportRun(name="", rows=rows).heads(), "at": kept}, "texts": texts}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """A plain file, and no link to one."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "not a plain file")
        yield file


def _mark(path: Path) -> tuple[int, int]:
    """(when it was written, how large it is); zeros where there is no such file."""
    try:
        about = path.lstat()
    except OSError:
        return 0, 0
    return about.st_mtime_ns, about.st_size


def _object(text: str) -> dict[str, Any]:
    """A JSON object; nothing where it is being written, or is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# -- which runs ------------------------------------------------------------------------------------------------------------


class Runs:
    """The runs of the folders that were named. A run keeps its number; those that begin later come after."""

    def __init__(self, folders: Sequence[Path]):
        self._roots = [Path(os.path.abspath(folder)) for folder in folders]
        if wrong := [line for folder in self._roots if (line := _nothing(folder))]:
            raise UserError(*wrong)
        self._found: list[FollowedRun] = []
        self._looked = 0.0
        self.now()

    def now(self) -> list[FollowedRun]:
        if time.monotonic() - self._looked > 2 or not self._found:
            known = {run.folder for run in self._found}
            fresh = [path for root in self._roots for path in runs_in(root) if path not in known]
            for path in list(dict.fromkeys(fresh))[: MOST_RUNS - len(self._found)]:
                self._found.append(FollowedRun(path, ""))
            for run, name in zip(self._found, names_of([run.folder for run in self._found]), strict=True):
                run.name = name
            self._looked = time.monotonic()
        return self._found


def runs_in(folder: Path, deep: int = DEEP) -> list[Path]:
    """A run's folder itself, or those of the runs in it. A link that was not named is not followed."""
    if _mark(folder / METRICS)[0] or (_mark(folder / LOCK)[0] and not (folder / "manifest.json").exists()):
        return [folder]
    if not deep:
        return []
    with contextlib.suppress(OSError):
        inner = sorted(entry for entry in folder.iterdir() if not entry.name.startswith(".") and not entry.is_symlink())
        return [path for entry in inner if entry.is_dir() for path in runs_in(entry, deep - 1)]
    return []


def _nothing(folder: Path) -> str | None:
    """What is to be said of a folder that holds no run."""
    if not folder.is_dir():
        return f"watch: {folder} is not a folder; start the job first, or name the folder that will hold it and others"
    if runs_in(folder):
        return None
    if (folder / "manifest.json").is_file():
        return f"watch: {folder} is a dump, which is looked at when it is there: steerl report {folder}"
    return f"watch: {folder} holds no run yet: no {METRICS} in it, nor in the folders in it; start the job first"
