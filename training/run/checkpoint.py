"""Exact save and resume: safetensors and JSON, written aside, flushed, renamed; nothing is ever unpickled.

    RUN/checkpoints/step-000010/      whole as soon as it has this name
        tensors.safetensors           every tensor of the state (weights, optimizer moments, random states of all ranks); or,
        tensors-00000-of-00002...     where an engine has spread it, what each rank holds, in a file that it writes itself
        state.json                    everything else, and where in it the tensors belong; config, log position, step
        manifest.json                 size and sha256 of the others, so that a damaged checkpoint is found before it is used

    save(folder, step, state, ...)    on every rank; the newest `keep` stay
    latest(folder)                    the newest whole one; damaged ones are named and passed over; None on a fresh folder
    load(path, state, ...)            on every rank, in place: each reads what it holds; returns the rest of what was saved

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import CheckpointError, UserError, reading
from steerl.rollout.common.fingerprint import sha256_file
from steerl.rollout.common.run_folder import check_shared, flush, folder_aside, told_of_disk
from steerl.rollout.ragged import Kept
from steerl.rollout.types import Rollout
from steerl.rollout.weights import parts
from steerl.rollout.weights.files import TensorFile
from steerl.rollout.weights.parts import Part, Stored
from steerl.training.engine import state_parts
from steerl.training.types import TrainState

FORMAT = 2
"""What is written. Format 1 had every tensor whole in one file, and is read."""
SAVE_EVERY = 10
"""Steps between checkpoints where run.save_every is 0."""
FOLDER = "checkpoints"
_STATE, _MANIFEST = "state.json", "manifest.json"
_TENSORS = re.compile(r"tensors(-\d{5,}-of-\d{5,})?\.safetensors")
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
        "weights": state_parts.weights(state),
        "optimizer": state_parts.optimizer(state),
        "numbers": state.numbers(),
        "random": processes.gather_objects([random_states()]),
    }
    if drawn := processes.gather_objects([] if state.drawn is None else [_packed(state.drawn.to("cpu"))]):
        tree["drawn"] = drawn
    head = {
        "format": FORMAT,
        "step": step,
        "engine": state_parts.kind(state),
        "config": dict(config or {}),
        "log": dict(log or {}),
        "made_from": dict(made_from or {}),
    }
    held: dict[str, Part] = {}
    head["tree"] = _flatten(tree, "", held)
    processes.on_main(lambda: _clear(path.parent))
    with folder_aside(path) as aside:
        written = _write_tensors(path, aside, held)
        processes.on_main(lambda: _write_head(path, aside, head, written))
    processes.on_main(lambda: _keep(path, keep))
    return path


def _clear(folder: Path) -> None:
    for left in folder.glob(".step-*.tmp"):  # by a killed run
        shutil.rmtree(left, ignore_errors=True)


def _write_tensors(path: Path, aside: Path, held: Mapping[str, Part]) -> dict[str, object]:
    """Each rank's parts in a file of its own; what the manifest is to say of them. Collective."""
    process = processes.start()
    own = {name: part for name, part in held.items() if part.count or process.is_main}
    spread = processes.most(0 if process.is_main else len(own))
    file = aside / (f"tensors-{process.rank:05d}-of-{process.world_size:05d}.safetensors" if spread else "tensors.safetensors")

    def write() -> dict[str, object]:
        if not own:
            return {}
        check_shared(aside)
        with told_of_disk(path):
            parts.write(file, own)
            flush(file)
        return {file.name: _seal(file)}

    return {name: sealed for written in processes.on_all(write) for name, sealed in written.items()}


def _seal(file: Path) -> dict[str, object]:
    return {"bytes": file.stat().st_size, "sha256": sha256_file(file)}


def _write_head(path: Path, aside: Path, head: Mapping[str, object], written: Mapping[str, object]) -> None:
    with told_of_disk(path):
        (aside / _STATE).write_text(json.dumps(head, ensure_ascii=False), encoding="utf-8")
        manifest = {"format": FORMAT, "step": head["step"], "files": {**written, _STATE: _seal(aside / _STATE)}}
        (aside / _MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def _keep(path: Path, keep: int) -> None:
    steps = _steps(path.parent)
    at = steps.index(path)
    # Newer ones are damaged, else the run had gone on from there: they must not count among those that are kept.
    for old in [*steps[:at], *steps[at + max(keep, 1) :]]:
        _remove(old)


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint; those that are damaged are named and passed over. None where none was written. Collective:
    each rank looks at its share of the files."""
    process = processes.start()
    steps = processes.on_main(lambda: _steps(Path(folder) / FOLDER))
    for index, path in enumerate(steps):

        def damage(path: Path = path) -> str | None:
            check_shared(path)
            return damaged(path, process.rank, process.world_size)

        damages = [found for found in processes.on_all(damage) if found is not None]
        if not damages:
            return path
        before = f"going on from {steps[index + 1].name}" if index + 1 < len(steps) else "there is none before it"
        if process.is_main:
            _logger.warning("%s: damaged (%s); %s", path, damages[0], before)
    if steps:
        names = ", ".join(path.name for path in steps)
        raise CheckpointError(
            f"{Path(folder) / FOLDER}: every checkpoint is damaged ({names}); --run.overwrite true starts again"
        )
    return None


def newest(folder: Path) -> Path | None:
    """The newest checkpoint, if it is whole. Other than `latest` it looks at no other."""
    steps = _steps(folder / FOLDER)
    return steps[0] if steps and damaged(steps[0]) is None else None


def damaged(path: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None where it is whole; of its files every `ranks`-th is read."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        version = int(manifest["format"])
    except OSError as error:
        return f"{_MANIFEST}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{_MANIFEST} is not what was written"
    if not 1 <= version <= FORMAT:
        told = f"format {version}, this version reads 1 to {FORMAT}"
        raise CheckpointError(f"{path}: {told}; resume with the version that wrote it")
    if not any(map(_TENSORS.fullmatch, files)) or [name for name in files if not _TENSORS.fullmatch(name)] != [_STATE]:
        return f"{_MANIFEST} lists {sorted(files)}"
    for name, (size, sha256) in list(files.items())[rank::ranks]:
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
    head = read_head(path)
    with _written_by_us(path):
        stored = _stored(path)
        return head | {"tree": _unflatten(head["tree"], lambda name: stored[name].whole())}


def _stored(path: Path) -> dict[str, Stored]:
    return parts.stored(TensorFile(file) for file in sorted(Path(path).glob("tensors*.safetensors")))


def load(path: Path, state: TrainState) -> dict[str, Any]:
    """Put a checkpoint into `state` and this process's random generators; returns `step`, `config` and `log` as saved."""
    head = read_head(path)
    with _written_by_us(path):
        stored, tree = _stored(path), dict(head.pop("tree")["@dict"])
        spread = {name: _unflatten(tree.pop(name), stored.__getitem__) for name in ("weights", "optimizer")}
        whole = {name: _unflatten(value, lambda name: stored[name].whole()) for name, value in tree.items()}
        states = whole["random"]
        state.load_numbers(whole["numbers"])
        state_parts.load_weights(state, spread["weights"])
        state_parts.load_optimizer(state, spread["optimizer"])
        if drawn := whole.get("drawn"):  # of all processes: each takes its own
            state.drawn = Rollout.join([_unpacked(part) for part in drawn])
    process, written, engine = processes.start(), len(states), state_parts.kind(state)
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


def _flatten(tree: object, name: str, tensors: dict[str, Part]) -> object:
    """The tree as JSON; tensors go into `tensors`. What JSON cannot say (tuples, keys that are no strings) is tagged."""
    if isinstance(tree, Tensor):
        tree = Part.of(tree.detach(), here=processes.start().is_main)
    if isinstance(tree, Part):
        tensors[name] = tree
        return {"@tensor": name}
    if isinstance(tree, Mapping):
        return {"@dict": [[key, _flatten(value, f"{name}/{key}".lstrip("/"), tensors)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        values = [_flatten(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]
        return {"@tuple": values} if isinstance(tree, tuple) else values
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise TypeError(f"checkpoint: {name} is a {type(tree).__name__}, which safetensors and JSON cannot hold")


def _unflatten(tree: object, tensor: Callable[[str], Tensor | Stored]) -> Any:
    if isinstance(tree, list):
        return [_unflatten(value, tensor) for value in tree]
    if not isinstance(tree, dict):
        return tree
    ((tag, value),) = tree.items()
    if tag == "@tensor":
        return tensor(value)
    if tag == "@tuple":
        return tuple(_unflatten(part, tensor) for part in value)
    return {key: _unflatten(part, tensor) for key, part in value}


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
