"""Exact save and resume: safetensors and JSON, written aside, flushed, renamed; nothing is ever unpickled.

    RUN/checkpoints/step-000010/      whole as soon as it has this name
        tensors.safetensors           every tensor of the state (weights, optimizer moments, random states of all ranks)
        state.json                    everything else, and where in it the tensors belong; config, log position, step
        manifest.json                 size and sha256 of the two, so that a damaged checkpoint is found before it is used

    save(folder, step, state, ...)    on every rank; the main process writes; the newest `keep` stay
    latest(folder)                    the newest whole one; damaged ones are named and passed over; None on a fresh folder
    load(path, state, ...)            on every rank, in place; returns the rest of what was saved

`state` is training/types.py's TrainState: `trained()` tensors, the optimizer, `numbers()`. Floats go through JSON by their
shortest exact form, tensors bit by bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import CheckpointError, UserError, reading
from steerl.rollout.common.fingerprint import sha256_file
from steerl.rollout.common.run_folder import flush, written_aside
from steerl.rollout.ragged import Kept
from steerl.rollout.types import Rollout
from steerl.training.engine import full_state
from steerl.training.types import TrainState

FORMAT = 1
SAVE_EVERY = 10
"""Steps between checkpoints where run.save_every is 0."""
FOLDER = "checkpoints"
_TENSORS, _STATE, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{6,})")
_logger = logging.getLogger(__name__)


# -- save, find, load ----------------------------------------------------------------------------------------------


def save(
    folder: Path,
    step: int,
    state: TrainState,
    *,
    keep: int = 2,
    config: Mapping[str, object] | None = None,
    log: Mapping[str, object] | None = None,
    made_from: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder/checkpoints/step-NNNNNN`; `step` counts the finished steps. A full disk leaves the older ones whole."""
    path = Path(folder) / FOLDER / f"step-{step:06d}"
    tree = {
        "weights": full_state.weights(state),
        "optimizer": full_state.optimizer(state),
        "numbers": state.numbers(),
        "random": processes.gather_objects([random_states()]),
    }
    if drawn := processes.gather_objects([] if state.drawn is None else [_packed(state.drawn.to("cpu"))]):
        tree["drawn"] = drawn
    head = {
        "format": FORMAT,
        "step": step,
        "engine": full_state.kind(state),
        "config": dict(config or {}),
        "log": dict(log or {}),
        "made_from": dict(made_from or {}),
    }
    processes.on_main(lambda: _write(path, head, tree, keep))
    return path


def _write(path: Path, head: Mapping[str, object], tree: Mapping[str, object], keep: int) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    skeleton = _flatten(tree, "", tensors)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".step-*.tmp"):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    with written_aside(path) as aside:
        aside.mkdir()
        save_file(tensors, aside / _TENSORS)
        (aside / _STATE).write_text(json.dumps({**head, "tree": skeleton}, ensure_ascii=False), encoding="utf-8")
        files = {
            name: {"bytes": (aside / name).stat().st_size, "sha256": sha256_file(aside / name)} for name in (_TENSORS, _STATE)
        }
        (aside / _MANIFEST).write_text(json.dumps({"format": FORMAT, "step": head["step"], "files": files}), encoding="utf-8")
    steps = _steps(path.parent)
    at = steps.index(path)
    # Newer ones are damaged, else the run had gone on from there: they must not count among those that are kept.
    for old in [*steps[:at], *steps[at + max(keep, 1) :]]:
        _remove(old)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint; those that are damaged are named and passed over. None where none was written."""
    return processes.on_main(lambda: _latest(Path(folder)))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, if it is whole. Other than `latest` it looks at no other."""
    steps = _steps(folder / FOLDER)
    return steps[0] if steps and damaged(steps[0]) is None else None


def _latest(folder: Path) -> Path | None:
    steps = _steps(folder / FOLDER)
    for index, path in enumerate(steps):
        damage = damaged(path)
        if damage is None:
            return path
        before = f"going on from {steps[index + 1].name}" if index + 1 < len(steps) else "there is none before it"
        _logger.warning("%s: damaged (%s); %s", path, damage, before)
    if steps:
        names = ", ".join(path.name for path in steps)
        raise CheckpointError(f"{folder / FOLDER}: every checkpoint is damaged ({names}); --run.overwrite true starts again")
    return None


def damaged(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None where it is whole."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        version = int(manifest["format"])
    except OSError as error:
        return f"{_MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is not what was written"
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}, this version reads {FORMAT}; resume with the version that wrote it")
    if set(files) != {_TENSORS, _STATE}:
        return f"{_MANIFEST} lists {sorted(files)}"
    for name, (size, sha256) in files.items():
        try:
            bytes_there = (path / name).stat().st_size
            if bytes_there != size:
                return f"{name} has {bytes_there} bytes, {size} were written"
            if sha256_file(path / name) != sha256:
                return f"the checksum of {name} differs"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def read_head(path: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself: step, config, log, and the tree without its tensors."""
    with _written_by_us(path):
        head: dict[str, object] = json.loads((Path(path) / _STATE).read_text(encoding="utf-8"))
        kinds = {"step": int, "config": dict, "log": dict, "tree": dict}
        if wrong := [name for name, kind in kinds.items() if not isinstance(head[name], kind)]:
            raise TypeError(f"{wrong[0]} is {head[wrong[0]]!r:.60}")
        return head


@contextlib.contextmanager
def _written_by_us(path: Path) -> Iterator[None]:
    """Checksums say that nothing was damaged since it was written; who wrote it is another question."""
    try:
        with reading(f"{path}: not what a run writes (", "); --run.overwrite true starts again, another checkpoint goes on"):
            yield
    except UserError as problem:
        if isinstance(problem.__cause__, RuntimeError) and processes.lost_peer(problem.__cause__):
            raise problem.__cause__ from None
        raise


def read(path: Path) -> dict[str, Any]:
    """A whole checkpoint as written: step, config, log and the tree with its tensors (on the CPU)."""
    from safetensors.torch import load_file

    head = read_head(path)
    with _written_by_us(path):
        return head | {"tree": _unflatten(head["tree"], load_file(Path(path) / _TENSORS))}


def load(path: Path, state: TrainState) -> dict[str, Any]:
    """Put a checkpoint into `state` and this process's random generators; returns `step`, `config` and `log` as saved."""
    head = read(path)
    tree = head.pop("tree")
    with _written_by_us(path):
        states = tree["random"]
        state.load_numbers(tree["numbers"])
        full_state.load_weights(state, tree["weights"])
        full_state.load_optimizer(state, tree["optimizer"])
        if parts := tree.get("drawn"):  # of all processes: each takes its own
            state.drawn = Rollout.join([_unpacked(part) for part in parts])
    process, written, engine = processes.start(), len(states), full_state.kind(state)
    was = (written, head.get("engine", engine))
    if was != (process.world_size, engine) and process.is_main:
        told = "%s was written by %d process(es) (%s), this run has %d (%s): it goes on equal up to float noise, not bitwise"
        _logger.warning(told, path, *was, process.world_size, engine)
    with _written_by_us(path):
        set_random_states(states[process.rank % written])
    return head


def _packed(rollout: Rollout) -> dict[str, object]:
    """A rollout as a tree."""
    kept = None if rollout.kept is None else {"ids": rollout.kept.ids, "counts_BR": rollout.kept.counts_BR}
    return {**vars(rollout), "kept": kept}


def _unpacked(tree: dict[str, Any]) -> Rollout:
    return Rollout(**{**tree, "kept": None if tree["kept"] is None else Kept(**tree["kept"])})


# -- random generators ---------------------------------------------------------------------------------------------


def random_states() -> dict[str, object]:
    """Every random generator of this process."""
    import numpy

    # A tuple, whatever its annotation says.
    generator: tuple[Any, ...] = numpy.random.get_state()  # type: ignore[assignment]
    name, keys, position, has_gauss, gauss = generator
    version, internal, normal = random.getstate()
    states: dict[str, object] = {
        "python": (version, torch.tensor(internal), normal),
        "numpy": (name, torch.tensor(keys.tolist()), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    import numpy

    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
    name, keys, position, has_gauss, numpy_gauss = states["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, numpy_gauss))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# -- trees, files --------------------------------------------------------------------------------------------------


def _flatten(tree: object, name: str, tensors: dict[str, Tensor]) -> object:
    """The tree as JSON; tensors go into `tensors`. What JSON cannot say (tuples, keys that are no strings) is tagged."""
    if isinstance(tree, Tensor):
        plain = tree.detach().cpu().contiguous()
        # A view, or two names for one tensor (rotary buffers): safetensors wants each on its own.
        shared = plain.untyped_storage().nbytes() != plain.nbytes or plain.data_ptr() == tree.data_ptr()
        tensors[name] = plain.clone() if shared else plain
        return {"@tensor": name}
    if isinstance(tree, Mapping):
        return {"@dict": [[key, _flatten(value, f"{name}/{key}".lstrip("/"), tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        values = [_flatten(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]
        return {"@tuple": values} if isinstance(tree, tuple) else values
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise TypeError(f"checkpoint: {name} is a {type(tree).__name__}, which safetensors and JSON cannot hold")


def _unflatten(tree: object, tensors: Mapping[str, Tensor]) -> object:
    if isinstance(tree, list):
        return [_unflatten(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, value),) = tree.items()
    if tag == "@tensor":
        return tensors[value]
    if tag == "@tuple":
        return tuple(_unflatten(part, tensors) for part in value)
    return {key: _unflatten(part, tensors) for key, part in value}


def _steps(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the newest first."""
    if not folder.is_dir():
        return []
    checkpoints = [(int(match[1]), entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
    return [entry for _, entry in sorted(checkpoints, reverse=True)]


def _remove(path: Path) -> None:
    """Rename first: a kill half-way through leaves no half checkpoint under a final name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    os.replace(path, aside)
    flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)
