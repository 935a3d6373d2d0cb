"""The trackers of a run: wandb, tensorboard, trackio. On the main process; they are told what metrics.jsonl and
samples.jsonl hold.

started before the first step: what cannot start is told then
breaks later? a warning, and the run goes on without it: its files have all that was told
resumed? the same run of wandb and trackio goes on; no step stands twice
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import json
import logging
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError, said
from steerl.rollout.episodes import Episode

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

PROJECT = "steerl"
_TABLE_ROWS = 32
_logger = logging.getLogger(__name__)
Row = Mapping[str, Any]


class Trackers:
    """Those of one run, started. `saved` is an earlier `ids()`; `step` the last one of the run so far."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, object], saved: Mapping[str, Any], step: int):
        self._folder, self._config, self._step = folder, dict(config), step
        self._wandb_id: str | None = saved.get("wandb_id")
        self._trackio_name: str | None = saved.get("trackio_name")
        self._known = step
        """The last step that trackio has: those of a run that was killed after its checkpoint come again."""
        starts = {"wandb": self._wandb, "tensorboard": self._tensorboard, "trackio": self._trackio}
        self._running: dict[str, GeneralTracker] = {}
        if names:
            processes.join()  # accelerate's trackers log, which needs its state
        for name in dict.fromkeys(names):
            if importlib.util.find_spec(name) is None:
                told = f"{name} is not installed; pip install {name}, or leave it out of the list"
                raise UserError(f"run.trackers: {told}")
            with contextlib.redirect_stdout(sys.stderr):  # a command's output is its own
                self._running[name] = starts[name]()

    def ids(self) -> dict[str, str | None]:
        """What a resumed run finds its trackers' runs by."""
        return {"wandb_id": self._wandb_id, "trackio_name": self._trackio_name}

    def metrics(self, step: int, row: Row) -> None:
        scalars = {name: value for name, value in row.items() if isinstance(value, int | float)}
        for name, tracker in self._told(step):
            self._tell(name, partial(tracker.log, scalars, step=step))

    def samples(self, step: int, rows: Sequence[Row]) -> None:
        """A table of what fits into cells (no lists); in trackio the conversations."""
        shown = rows[:_TABLE_ROWS]
        names = dict.fromkeys(name for row in shown for name in row)
        columns = [name for name in names if not any(isinstance(row.get(name), list | dict) for row in shown)]
        cells = [[row.get(name) for name in columns] for row in shown]
        tells: dict[str, Callable[[Any], None]] = {
            "wandb": lambda tracker: tracker.log_table("samples", columns=columns, data=cells, step=step),
            "tensorboard": lambda tracker: tracker.log({"samples": _markdown(columns, cells)}, step=step),
            "trackio": lambda tracker: tracker.log({"samples": [_trace(row) for row in shown]}, step=step),
        }
        for name, tracker in self._told(step):
            self._tell(name, partial(tells[name], tracker))

    def finish(self) -> None:
        for name, tracker in [*self._running.items()]:
            with contextlib.redirect_stdout(sys.stderr):
                self._tell(name, self._finish_trackio if name == "trackio" else tracker.finish)
        self._running = {}

    # -- inside --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _finish_trackio() -> None:
        import trackio

        trackio.finish()  # accelerate's leaves it the current run, which is finished once more, on stdout, at the end

    def _told(self, step: int) -> list[tuple[str, GeneralTracker]]:
        return [(name, tracker) for name, tracker in self._running.items() if name != "trackio" or step > self._known]

    def _tell(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - anybody's package, disk and network; the run is worth more
            self._running.pop(name, None)
            _logger.warning("run.trackers: %s failed (%s); the run goes on without it", name, said(error))

    def _tensorboard(self) -> GeneralTracker:
        from accelerate.tracking import TensorBoardTracker

        # Steps after the checkpoint, written by the run that was killed, are hidden by purge_step.
        tracker = TensorBoardTracker("tensorboard", self._folder, purge_step=self._step + 1)
        tracker.start()
        if not self._step:
            tracker.log({"config": "```\n" + json.dumps(self._config, indent=2, default=str) + "\n```"}, step=0)
        return tracker

    def _wandb(self) -> GeneralTracker:
        import wandb
        from accelerate.tracking import WandBTracker

        self._wandb_id = self._wandb_id or uuid.uuid4().hex[:8]
        tracker = WandBTracker(
            os.environ.get("WANDB_PROJECT", PROJECT),
            id=self._wandb_id,
            resume="allow",
            dir=str(self._folder),
            name=self._folder.name,
            config=self._config,
        )
        try:
            tracker.start()
        except wandb.errors.Error as error:
            first = str(error).splitlines()[0]
            raise UserError(f"run.trackers: wandb does not start: {first}; WANDB_MODE=offline needs no account") from error
        return tracker

    def _trackio(self) -> GeneralTracker:
        """Its data lie where trackio puts them (TRACKIO_DIR), so that `trackio show` finds them, or on its Space
        (TRACKIO_SPACE_ID)."""
        from accelerate.tracking import TrackioTracker

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        resumed, self._trackio_name = self._trackio_name is not None, self._trackio_name or _run_name(self._folder)
        plain = json.loads(json.dumps(self._config, default=str))
        tracker = TrackioTracker(
            project, name=self._trackio_name, resume="allow", config=plain, embed=False, auto_log_cpu=False, auto_log_gpu=False
        )
        try:
            tracker.start()
        except Exception as error:
            raise UserError(f"run.trackers: trackio does not start: {said(error)}") from error
        if resumed:
            from trackio.sqlite_storage import SQLiteStorage

            last = SQLiteStorage.get_last_step(project, self._trackio_name)
            self._known = self._step if last is None else last
            for row in _lines_after(self._folder / "metrics.jsonl", self._known, self._step):  # it was killed with them
                tracker.log({name: value for name, value in row.items() if isinstance(value, int | float)}, step=row["step"])
        else:
            self._known = -1
        return tracker


def _run_name(folder: Path) -> str:
    """Runs of one folder's name in several places are apart."""
    return f"{folder.resolve().name}-{uuid.uuid4().hex[:6]}"


def _lines_after(path: Path, after: int, last: int) -> Iterable[dict[str, Any]]:
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()) if after < last else ()
    return [row for row in rows if after < row["step"] <= last]


def _trace(row: Row) -> Any:
    """A sample as a conversation, with what is one value for the row beside it."""
    import trackio

    prompt = row.get("prompt")
    messages = list(prompt) if isinstance(prompt, list) else [{"role": "user", "content": str(row.get("prompt_text", prompt))}]
    episode = row.get("episode")
    if episode:
        said_then = Episode.of_json(episode).messages
    else:
        said_then = [{"role": "assistant", "content": str(row.get("completion", ""))}]
    facts = {name: value for name, value in row.items() if isinstance(value, int | float | bool)}
    texts = {name: row[name] for name in ("kind", "stop_reason", "steering") if row.get(name)}
    found = {"messages": [*messages, *said_then], "metadata": {**facts, **texts, "parts": row.get("parts") or {}}}
    # Half of a surrogate pair, which a byte tokenizer may write, is no UTF-8.
    whole: dict[str, Any] = json.loads(json.dumps(found, ensure_ascii=False).encode("utf-8", "replace"))
    return trackio.Trace(**whole)


def _markdown(columns: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    """A table for tensorboard, which renders markdown and HTML: what a model wrote is escaped."""

    def cell(value: object) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return html.escape(text).replace("|", "&#124;").replace("\n", "<br>")

    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)
