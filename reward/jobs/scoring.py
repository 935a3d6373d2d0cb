"""The scoring job: a dump of rollouts, or a dataset of texts, to score shards; on any number of processes, resumable.

    source shards --shards[rank::world_size]--> rows --reward--> scores-NNNNN.parquet   (written aside, renamed)
                                                                       the main process waits for all, then the manifest

A shard's scores depend on its rows and the settings alone, never on which process scored it or what it scored before:
so one process or many, a resumed job or an undisturbed one, leave the same table. What a score file was made from
(settings, rows, weights, the function's file) stands in its metadata as a hash; a resumed job keeps the files that
have its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

import torch

from steerl.reward.texts import TextTable
from steerl.reward.types import Scores
from steerl.reward.weighted_sum import WeightedSum
from steerl.rollout.common import processes
from steerl.rollout.common.errors import DataError, reading
from steerl.rollout.common.fingerprint import sha256_file, values_fingerprint
from steerl.rollout.common.progress import Progress
from steerl.rollout.common.run_folder import RunSettings, opened, write_json
from steerl.rollout.common.run_folder import begin as begin_run
from steerl.rollout.dumps.dump import stopped
from steerl.rollout.dumps.manifest import MANIFEST, Record, finished_shards
from steerl.rollout.dumps.store import METADATA, read_shard, write_table
from steerl.rollout.types import Rollout, Texts

if TYPE_CHECKING:
    import pyarrow as pa

BESIDE = "scores.json"
"""The manifest's name where the scores lie in the dump's own folder, whose manifest has the usual name."""
CALL_ROWS = 1024
"""Rows handed to the reward at once, and rows of a shard of texts."""
LOOK_S = 0.1
"""Seconds between two looks for the other processes' files."""


class Source(Protocol):
    """Rows in shards."""

    @property
    def rows(self) -> list[int]:
        """Of each shard."""

    @property
    def fingerprint(self) -> str: ...

    def read(self, index: int) -> Iterator[tuple[Rollout, Texts]]: ...


@dataclass(frozen=True)
class DumpSource:
    folder: Path
    shards: list[Record]

    @staticmethod
    def of(folder: Path) -> DumpSource:
        return DumpSource(folder, finished_shards(folder))

    @property
    def rows(self) -> list[int]:
        return [record.rows for record in self.shards]

    @property
    def fingerprint(self) -> str:
        return values_fingerprint(record.sha256 for record in self.shards)

    def read(self, index: int) -> Iterator[tuple[Rollout, Texts]]:
        record = self.shards[index]
        damage = record.damage(self.folder)
        if damage:
            raise DataError(f"{self.folder / record.file}: {damage}; make it again: dump_rollouts.py with --run.resume true")
        yield from read_shard(self.folder / record.file, CALL_ROWS)


@dataclass(frozen=True)
class TextSource:
    table: TextTable
    shard_rows: int

    @property
    def rows(self) -> list[int]:
        return [min(self.shard_rows, len(self.table) - start) for start in range(0, len(self.table), self.shard_rows)]

    @property
    def fingerprint(self) -> str:
        rows = (self.table.rows[i] for i in range(len(self.table)))
        return values_fingerprint([[self.table.messages, self.table.prompt, self.table.completion, self.shard_rows], *rows])

    def read(self, index: int) -> Iterator[tuple[Rollout, Texts]]:
        start = index * self.shard_rows
        stop = start + self.rows[index]
        for at in range(start, stop, CALL_ROWS):
            yield self.table.batch(range(at, min(at + CALL_ROWS, stop)))


# -- the manifest -------------------------------------------------------------------------------------------------------


def file_of(index: int) -> str:
    return f"scores-{index:05d}.parquet"


def begin(
    run: RunSettings,
    folder: Path,
    name: str,
    source: Source,
    reward: WeightedSum,
    config: Mapping[str, object],
    **described: object,
) -> dict[str, object]:
    """The manifest to work by: a fresh one, or the one in the folder if it was made with the same settings."""
    made_from = {"rows": source.fingerprint, **{f"reward {term.name}": term.content() for term in reward.terms}}
    fresh = {
        "format": "scores 1",
        "finished": False,
        "made_from": made_from,
        "parts": {term.name: term.weight for term in reward.terms},
        **described,
        "config": json.loads(json.dumps(config)),
        "shards": [{"file": file_of(i), "rows": rows} for i, rows in enumerate(source.rows)],
    }
    for left in folder.glob(".scores-*.tmp"):
        left.unlink()
    if name == BESIDE:
        for old in _scores(folder) if run.overwrite else ():
            old.unlink()
    else:
        begin_run(folder, run)
    path = folder / name
    if path.is_file():
        found = read_manifest(path)
        changed = _changes(found, fresh)
        if changed:
            raise DataError(*(f"{line}; give the same settings, or start afresh with --run.overwrite true" for line in changed))
        return found
    if any(folder.glob("scores-*.parquet")):
        raise DataError(f"run.dir: {folder} holds scores but no {name}; start afresh with --run.overwrite true")
    write_json(path, fresh)
    return fresh


def read_manifest(path: Path) -> dict[str, object]:
    with reading(f"{path}: damaged (", "); start afresh with --run.overwrite true"):
        found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not str(found.get("format", "")).startswith("scores "):
        raise DataError(f"run.dir: {path} is not of scores; name another folder")
    return found


def _changes(found: Mapping[str, Any], fresh: Mapping[str, Any]) -> list[str]:
    lines = []
    other_reward = found["config"].get("reward") != fresh["config"].get("reward")
    if other_reward:
        was, now = (json.dumps(manifest["config"].get("reward"))[:300] for manifest in (found, fresh))
        lines.append(f"reward: these scores were begun with {was}, and are now asked to go on with {now}")
    for name in sorted(found["made_from"].keys() | fresh["made_from"].keys()):
        was, now = (manifest["made_from"].get(name, "none") for manifest in (found, fresh))
        if was != now and not (other_reward and name.startswith("reward ")):
            lines.append(f"{name}: content has changed since these scores were begun (fingerprint {was}, now {now})")
    return lines


def tag_of(begun: Mapping[str, Any]) -> str:
    identity = [begun["config"].get("reward"), begun["made_from"]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def is_whole(folder: Path, index: int, begun: Mapping[str, Any]) -> bool:
    """Whether a shard's scores are there, all of them, and made from what this job is made from."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / file_of(index)
    if not path.is_file():
        return False
    try:
        with pq.ParquetFile(path) as file:
            metadata = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"{}"))
            if metadata.get("tag") != tag_of(begun) or file.metadata.num_rows != begun["shards"][index]["rows"]:
                return False
    except (pa.ArrowInvalid, OSError, ValueError):
        return False
    return not begun["finished"] or sha256_file(path) == begun["shards"][index]["sha256"]


# -- the work -----------------------------------------------------------------------------------------------------------


def score_source(
    source: Source,
    reward: WeightedSum,
    folder: Path,
    begun: Mapping[str, object],
    todo: Sequence[int],
    stream: TextIO | None,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Score the shards of `todo` that are this process's; on the main process, wait for the others'.

    Where `stopping` says so, a process leaves after the shard that it is at."""
    me = processes.start()
    rows, own_shards = source.rows, list(todo[me.rank :: me.world_size])
    others = set(todo) - set(own_shards)
    progress = Progress("scores", sum(rows), stream if me.is_main else None, already=sum(rows) - sum(rows[i] for i in todo))
    try:
        for index in own_shards:
            if stopping():
                raise stopped(folder)
            scored: list[tuple[Rollout, Scores]] = []
            for rollout, texts in source.read(index):
                scored.append((rollout, reward(rollout, texts)))
                progress.add(len(rollout))
            write_table(folder / file_of(index), to_table(scored, reward, tag_of(begun)))
        while me.is_main and others:  # not a barrier: those time out
            for index in [i for i in others if is_whole(folder, i, begun)]:
                others.discard(index)
                progress.add(rows[index])
            if others and stopping():
                raise stopped(folder)
            if others:
                time.sleep(LOOK_S)
    finally:
        progress.close()


def to_table(scored: Sequence[tuple[Rollout, Scores]], reward: WeightedSum, tag: str) -> pa.Table:
    """prompt_index, sample_index, total, and a column per part, null where it does not apply."""
    import pyarrow as pa

    names = dict.fromkeys([term.name for term in reward.terms] + [name for _, scores in scored for name in scores.parts])
    columns = {
        "prompt_index": pa.array(torch.cat([rollout.row_B for rollout, _ in scored]).cpu().numpy(), pa.int64()),
        "sample_index": pa.array(torch.cat([rollout.sample_B for rollout, _ in scored]).int().cpu().numpy(), pa.int32()),
        "total": pa.array(torch.cat([scores.total_B for _, scores in scored]).cpu().numpy(), pa.float32()),
    }
    for name in names:
        values = [scores.parts.get(name, torch.full_like(scores.total_B, math.nan)) for _, scores in scored]
        columns[name] = pa.array(torch.cat(values).cpu().numpy(), pa.float32(), from_pandas=True)
    return pa.table(columns).replace_schema_metadata({METADATA: json.dumps({"tag": tag})})


def finish(folder: Path, name: str, begun: Mapping[str, Any]) -> dict[str, object]:
    """The finished manifest, with each column's mean, standard deviation, least and greatest value."""
    import pyarrow.parquet as pq

    columns: dict[str, list[torch.Tensor]] = {}
    for shard in begun["shards"]:
        table = pq.read_table(folder / shard["file"])
        for column in table.column_names[2:]:
            columns.setdefault(column, []).append(torch.tensor(table.column(column).to_numpy(), dtype=torch.float64))
    shards = [{**shard, "sha256": sha256_file(folder / shard["file"])} for shard in begun["shards"]]
    done = {
        **begun,
        "finished": True,
        "shards": shards,
        "scores": {column: _summary(torch.cat(values)) for column, values in columns.items()},
    }
    write_json(folder / name, done)
    return done


def _summary(values: torch.Tensor) -> dict[str, float]:
    real = values[~values.isnan()]
    if not len(real):
        return {"rows": 0}
    mean, std = real.mean().item(), real.std(correction=0).item()
    return {"rows": len(real), "mean": mean, "std": std, "min": real.min().item(), "max": real.max().item()}


# -- the folder ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened_for_scores(run: RunSettings, dump: Path | None, config: Mapping[str, object]) -> Iterator[Path]:
    """The scores' folder, held. It may be the dump's own: there `begin` removes old scores alone."""
    folder = Path(run.dir)
    if run.dir and dump is not None and folder.resolve() == dump.resolve():
        if run.resume and run.overwrite:
            raise DataError("run.resume and run.overwrite: both true; choose one")
        if _scores(folder) and not (run.resume or run.overwrite):
            what = f"run.dir: {folder} holds scores already"
            raise DataError(f"{what}; add --run.resume true or --run.overwrite true, or name another")
        run = dataclasses.replace(run, resume=True, overwrite=False)
    elif run.dir and dump is not None and run.overwrite and folder.resolve() in dump.resolve().parents:
        raise DataError(f"run.overwrite: {run.dir} holds the dump {dump}, which would be lost; name another run.dir")
    with opened(run, config) as found:
        yield found


def _scores(folder: Path) -> list[Path]:
    return [*folder.glob("scores-*.parquet"), *folder.glob(BESIDE)]


def manifest_name(folder: Path, dump: Path | None) -> str:
    return BESIDE if dump is not None and folder.resolve() == dump.resolve() else MANIFEST


def check_order(reward: WeightedSum) -> None:
    """A running normalisation makes a score depend on the rows before it."""
    running = [term.where for term in reward.terms if term.shape is not None and term.shape.is_running]
    if remembering := [term.where for term in reward.terms if term.memory is not None]:
        raise DataError(*(f"{w}: compares the rows of a training step, and here is none; leave it out" for w in remembering))
    if running:
        raise DataError(
            *(f"{w}.normalise: running, which depends on the order of the rows; use {{mean: m, std: s}}" for w in running)
        )
