"""What a run tells while it runs: metrics.jsonl, samples.jsonl, trackers and one live line.

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

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError, visible
from steerl.rollout.common.progress import duration
from steerl.training.run.trackers import Trackers

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
_logger = logging.getLogger(__name__)


class RunLog:
    """The open logs of one run. On every process but the main one all of it does nothing."""

    def __init__(self, folder: Path, *, trackers: Sequence[str] = (), config: Mapping[str, object] | None = None):
        self.folder = Path(folder)
        self.is_main = processes.start().is_main
        self._names = tuple(dict.fromkeys(trackers))
        self._config = dict(config or {})
        self._files: dict[str, IO[bytes]] = {}
        self._trackers: Trackers | None = None
        self._step = 0
        self._clock: tuple[float, int] | None = None
        self._drawn: float | None = None
        if self.is_main:
            self._files = {name: (self.folder / name).open("ab") for name in (METRICS, SAMPLES)}

    # -- writing --------------------------------------------------------------------------------------------------

    def metrics(self, step: int, values: Mapping[str, object]) -> dict[str, object]:
        """One line of metrics.jsonl, which is returned, and the same keys to every tracker."""
        if not self.is_main:
            return {}
        row = {"step": step} | {name: _plain(value) for name, value in values.items() if name != "step"}
        self._append(METRICS, step, [row])
        self._started().metrics(step, row)
        return row

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
        """Rows of samples.jsonl, which are returned; trackers show them in their way."""
        if not self.is_main or not rows:
            return []
        plain = [{"step": step} | {name: _plain(value) for name, value in row.items()} for row in rows]
        self._append(SAMPLES, step, plain)
        self._started().samples(step, plain)
        return plain

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
        if self._trackers is not None:
            self._trackers.finish()
        for file in self._files.values():
            file.close()
        self._files = {}

    # -- resume -----------------------------------------------------------------------------------------------------

    def position(self) -> dict[str, object]:
        """How far the files are, flushed to the disk, and the trackers' ids: what a checkpoint keeps of the log."""
        sizes = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            sizes[name] = file.tell()
        return {"bytes": sizes, **(self._trackers.ids() if self._trackers is not None else {}), "step": self._step}

    def rewind(self, saved: Mapping[str, Any]) -> None:
        """Cut the files to where `saved` (a `position()`; empty for the start) was taken. Before the first line is written."""
        if not self.is_main:
            return
        self._step = int(saved.get("step", 0))
        for name, file in self._files.items():
            size, wanted = file.seek(0, os.SEEK_END), int(saved.get("bytes", {}).get(name, 0))
            if size < wanted:
                told = "%s: %d bytes, %d at the checkpoint; what is missing stays missing"
                _logger.warning(told, self.folder / name, size, wanted)
                wanted = (self.folder / name).read_bytes().rfind(b"\n") + 1  # a line that was cut in two goes
            file.truncate(min(size, wanted))
            file.seek(0, os.SEEK_END)
        self._started(saved)  # now, so that a tracker that cannot start is told before the first step is paid for

    def _started(self, saved: Mapping[str, Any] | None = None) -> Trackers:
        """Trackers start late, when it is known whether the run goes on from another."""
        if self._trackers is None:
            self._trackers = Trackers(self._names, self.folder, self._config, saved or {}, self._step)
        return self._trackers

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


def log_line(line: str) -> None:
    """A line for the person at the terminal, from the main process."""
    if processes.start().is_main:
        sys.stderr.write(visible(line) + "\n")


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
