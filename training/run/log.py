"""What a run tells while it runs: metrics.jsonl, samples.jsonl, trackers (wandb, tensorboard) and one live line.

    log = RunLog(folder, trackers=["tensorboard"], config=resolved)     every rank; only the main process writes
    log.rewind(saved)                       first: the files end where the checkpoint was taken ({}: a fresh start)
    log.metrics(step, {"reward/mean": 0.4}) an object per step; NaN and infinities are null, JSON has none
    log.samples(step, [{...}, ...])         rows of samples.jsonl, and a table in each tracker
    log.progress(step, steps, reward=, kl=, tokens=)
    checkpoint.save(..., log=log.position())
    log.close()

The jsonl files are append-only and their sizes go into the checkpoint, so that a resumed run's files are byte for byte
those of an undisturbed run, but for the seconds in them.
"""

from __future__ import annotations

import html
import json
import logging
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError, visible
from steerl.rollout.common.progress import duration

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
PROJECT = "steerl"
_TABLE_ROWS = 32
_logger = logging.getLogger(__name__)


class RunLog:
    """The open logs of one run. On every process but the main one all of it does nothing."""

    def __init__(self, folder: Path, *, trackers: Sequence[str] = (), config: Mapping[str, object] | None = None):
        self.folder = Path(folder)
        self.is_main = processes.start().is_main
        self._names = tuple(dict.fromkeys(trackers))
        self._config = dict(config or {})
        self._files: dict[str, IO[bytes]] = {}
        self._trackers: dict[str, GeneralTracker] | None = None
        self._wandb_id: str | None = None
        self._step = 0
        self._clock: tuple[float, int] | None = None
        self._drawn: float | None = None
        if self.is_main:
            self._files = {name: (self.folder / name).open("ab") for name in (METRICS, SAMPLES)}

    # -- writing --------------------------------------------------------------------------------------------------

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """One line of metrics.jsonl, and the same keys to every tracker."""
        if not self.is_main:
            return
        row = {"step": step} | {name: _plain(value) for name, value in values.items() if name != "step"}
        self._append(METRICS, step, [row])
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float)}
        for tracker in self._started().values():
            tracker.log(scalars, step=step)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Rows of samples.jsonl; in the trackers a table of what fits into cells (no lists)."""
        if not self.is_main or not rows:
            return
        plain = [{"step": step} | {name: _plain(value) for name, value in row.items()} for row in rows]
        self._append(SAMPLES, step, plain)
        shown = plain[:_TABLE_ROWS]
        names = dict.fromkeys(name for row in shown for name in row)
        columns = [name for name in names if not any(isinstance(row.get(name), list | dict) for row in shown)]
        cells = [[row.get(name) for name in columns] for row in shown]
        for name, tracker in self._started().items():
            if name == "wandb":
                tracker.log_table("samples", columns=columns, data=cells, step=step)  # type: ignore[attr-defined]
            else:
                tracker.log({"samples": _markdown(columns, cells)}, step=step)

    def progress(self, step: int, steps: int, *, reward: float, kl: float, tokens: int) -> None:
        """The live line: rewritten in place on a terminal, elsewhere a line at most every ten seconds (and the last)."""
        if not self.is_main:
            return
        now = time.monotonic()
        before = self._clock or (now, step)
        self._clock = before
        seconds = now - before[0]
        pace = seconds / (step - before[1]) if step > before[1] else math.nan
        rate = f"{tokens / pace:,.0f} tokens/s" if pace > 0 else "- tokens/s"
        left = duration((steps - step) * pace) if pace > 0 else "-"
        line = f"step {step}/{steps}  reward {reward:.3f}  kl {kl:.3f}  {rate}  {left} left"
        if sys.stderr.isatty():
            sys.stderr.write("\r" + line.ljust(79) + ("\n" if step >= steps else ""))
        elif step >= steps or self._drawn is None or now - self._drawn >= 10:
            sys.stderr.write(line + "\n")
            self._drawn = now
        sys.stderr.flush()

    def close(self) -> None:
        for tracker in (self._trackers or {}).values():
            tracker.finish()
        for file in self._files.values():
            file.close()
        self._files, self._trackers = {}, {}

    # -- resume -----------------------------------------------------------------------------------------------------

    def position(self) -> dict[str, object]:
        """How far the files are, flushed to the disk, and the trackers' ids: what a checkpoint keeps of the log."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        return {"bytes": sizes, "wandb_id": self._wandb_id, "step": self._step}

    def rewind(self, saved: Mapping[str, Any]) -> None:
        """Cut the files to where `saved` (a `position()`; empty for the start) was taken. Before the first line is written."""
        if not self.is_main:
            return
        self._wandb_id, self._step = saved.get("wandb_id"), int(saved.get("step", 0))
        for name, file in self._files.items():
            size, wanted = file.seek(0, os.SEEK_END), int(saved.get("bytes", {}).get(name, 0))
            if size < wanted:
                told = "%s: %d bytes, %d at the checkpoint; what is missing stays missing"
                _logger.warning(told, self.folder / name, size, wanted)
                wanted = (self.folder / name).read_bytes().rfind(b"\n") + 1  # a line that was cut in two goes
            file.truncate(min(size, wanted))
            file.seek(0, os.SEEK_END)
        self._started()  # now, so that a tracker that cannot start is told before the first step is paid for

    # -- inside -------------------------------------------------------------------------------------------------------

    def _append(self, name: str, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        self._step = max(self._step, step)
        text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        try:
            self._files[name].write(text.encode("utf-8", "backslashreplace"))
            self._files[name].flush()
        except OSError as error:
            told = f"{self.folder / name}: cannot be written: {error.strerror}"
            raise UserError(f"{told}; free some space, then --run.resume true") from error

    def _started(self) -> dict[str, GeneralTracker]:
        """Trackers start late, when it is known whether the run goes on from another."""
        if self._trackers is None:
            self._trackers = {}
            for name in self._names:
                self._trackers[name] = self._wandb() if name == "wandb" else self._tensorboard()
        return self._trackers

    def _tensorboard(self) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

        _need("tensorboard")
        # Steps after the checkpoint, written by the run that was killed, are hidden by purge_step.
        tracker = TensorBoardTracker("tensorboard", self.folder, purge_step=self._step + 1)
        tracker.start()
        if not self._step:
            tracker.log({"config": "```\n" + json.dumps(self._config, indent=2, default=str) + "\n```"}, step=0)
        return tracker

    def _wandb(self) -> GeneralTracker:
        from accelerate.tracking import WandBTracker

        _need("wandb")
        import wandb

        self._wandb_id = self._wandb_id or uuid.uuid4().hex[:8]
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            id=self._wandb_id,
            resume="allow",
            dir=str(self.folder),
            name=self.folder.name,
            config=self._config,
        )
        try:
            tracker.start()
        except wandb.errors.Error as error:
            first = str(error).splitlines()[0]
            raise UserError(f"run.trackers: wandb does not start: {first}; WANDB_MODE=offline needs no account") from error
        return tracker


def log_line(line: str) -> None:
    """A line for the person at the terminal, from the main process."""
    if processes.start().is_main:
        sys.stderr.write(visible(line) + "\n")


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise UserError(f"run.trackers: {package} is not installed; pip install {package}, or leave it out of the list")


def _plain(value: object) -> object:
    """A JSON value: numbers out of tensors and numpy, None for NaN and infinities, inside lists and mappings too."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    """A table for tensorboard, which renders markdown and HTML: what a model wrote is escaped."""

    def cell(value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")

    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
