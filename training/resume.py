"""Going on with a run: is it finished, which checkpoint, may the config differ, and how a SIGTERM ends it.

run.resume true ──> finished?  yes: leave with status 0
                        │ no
                    newest whole checkpoint? ── none ──> start (the logs of a run killed before its first are cut to 0)
                        │
                    config as saved? ── no ──> a line per field
                        │ yes
                    load, cut the logs to it, go on
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rollout import processes
from rollout.errors import Problem
from training import checkpoint

FREE = (
    *("run.dir", "run.resume", "run.overwrite", "run.save_every", "run.keep", "run.trackers"),
    *("ppo.gap_tolerance", "ppo.samples", "ppo.export_merged", "ppo.gather"),
)
"""What may differ on a resume, because nothing that is learned or measured depends on it. The number of steps may, too,
where no learning rate falls towards the last one."""

_logger = logging.getLogger(__name__)


def finished(folder: Path, steps: int, config: Mapping[str, Any], *, schedule: str = "constant") -> bool:
    """Did the run in `folder` come to its end, with at least `steps` steps and this config? summary.json is the last thing
    that a run writes."""
    folder = Path(folder)
    try:
        if int(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"]) < steps:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if (path := checkpoint.newest(folder)) is not None:
        _compare(path, config, schedule)
    return True


def find(folder: Path, config: Mapping[str, Any], *, schedule: str = "constant") -> Path | None:
    """The checkpoint to go on from, after its config was compared with the present one; None: start from the beginning."""
    path = checkpoint.latest(folder)
    if path is not None:
        changed = _compare(path, config, schedule)
        if changed and processes.start().is_main:
            _logger.warning("resume: changed since %s, as is allowed: %s", path.name, ", ".join(changed))
    return path


def _compare(path: Path, config: Mapping[str, Any], schedule: str) -> list[str]:
    free = (*FREE, "ppo.steps") if schedule == "constant" else FREE
    return check_config(checkpoint.read_head(path)["config"], config, free)


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any], free: Sequence[str] = FREE) -> list[str]:
    """Refuse another config, a line per field. Changed fields that are `free` are returned by their dotted names."""
    was, now = _dotted(json.loads(json.dumps(saved))), _dotted(json.loads(json.dumps(current)))
    changed = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    fatal = [name for name in changed if not any(name == field or name.startswith(field + ".") for field in free)]
    if fatal:
        remedy = "give it back, or start another run with --run.dir"
        raise Problem(*(f"{name}: {now.get(name)!r}, but the run to resume has {was.get(name)!r}; {remedy}" for name in fatal))
    return [name for name in changed if name not in ("run.resume", "run.overwrite")]


def _dotted(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, part in config.items():
        flat |= _dotted(part, f"{prefix}.{key}" if prefix else str(key))
    return flat


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGTERM only sets a flag. The loop asks for it once a step, on every rank (it is one answer:
    any rank's signal stops all), saves and leaves."""
    import torch

    received: list[int] = []
    ours = threading.current_thread() is threading.main_thread()  # Python lets no other thread handle signals
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number)) if ours else None

    def stop() -> bool:
        flag = torch.tensor([len(received)], device=processes.start().device)
        return bool(processes.sum_(flag).item())

    try:
        yield stop
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
