"""A dump or a run's samples in other projects' formats: TRL's parquet, verifiers' traces, the hub's, an Inspect log, messages.

steerl export runs/dump rows.parquet --to trl --scores runs/scores
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steerl.configs.reader import run_command

from steerl.rollout.common.errors import DataError, UserError
from steerl.rollout.common.progress import Progress
from steerl.rollout.common.run_folder import written_aside

if TYPE_CHECKING:
    from steerl.training.formats.records import Record, Source

ENDS = {"trl": (".parquet",), "verifiers": (".jsonl", ""), "sts": ("",), "inspect": (".eval",), "openai": (".jsonl",)}
"""What a format's file ends in; "": a folder."""
OURS = re.compile(r"(traces|\d+-\d+|step\d+-\d+)\.jsonl")
"""Names in the folders that an export is."""
NEXT = {
    "sts": "hf upload REPO {0} --repo-type dataset",
    "inspect": "inspect view --log-dir {1}",
}
REWARDED = ("trl", "verifiers", "inspect")


@dataclass(frozen=True)
class ExportJob:
    """Reads a finished dump, or a run's recorded samples; writes a file or, where the format has a file per row, a folder."""

    dir: str = field(metadata={"positional": True})
    """The dump or the run."""
    out: str = field(default="", metadata={"positional": True})
    """What is written: trl FILE.parquet; verifiers FILE.jsonl, or a folder as its own tools write one; sts a folder; inspect
    FILE.eval; openai FILE.jsonl."""
    to: Literal["trl", "verifiers", "sts", "inspect", "openai"] = field(kw_only=True)
    """The format."""
    scores: str | None = None
    """Of a dump: the folder of its scores; left out: the dump's own, or its environment's rewards; `none`: go without."""
    overwrite: bool = False
    """Replace the file, or the folder of an export, where it is there already."""


def out_of(job: ExportJob) -> Path:
    path, ends = Path(job.out), ENDS[job.to]
    if not path.name or path.name == ".." or path.suffix not in ends and "" not in ends:
        names = " or ".join(f"FILE{end}" if end else "a folder" for end in ends)
        raise UserError(f"out: {job.out or 'missing'}; {job.to} is {names}, steerl export SOURCE OUT --to {job.to}")
    if path.exists() and not job.overwrite:
        raise UserError(f"out: {path} is there already; add --overwrite true or name another")
    if path.exists() and path.resolve().parent == Path(job.dir).resolve():
        raise UserError(f"out: {path} lies in {job.dir}, where nothing is replaced; name another place")
    if path.is_dir() and (other := next((entry for entry in path.iterdir() if not OURS.fullmatch(entry.name)), None)):
        raise UserError(f"out: {path} is a folder that holds more than an export ({other.name}); name another")
    if path.is_dir() and path.suffix in ends and path.suffix:
        raise UserError(f"out: {path} is a folder, and {job.to} is FILE{path.suffix} there; name another")
    if not path.parent.is_dir():
        raise UserError(f"out: the folder {path.parent} does not exist; make it or name another")
    return path


def checked(source: Source, job: ExportJob) -> Source:
    """With records that are counted as they are read, and refused where they should have a reward and none has."""
    from steerl.training.formats.records import NO_SCORES

    first = next(source.read(), None)
    if first is None:
        raise DataError(f"{source.folder}: no row in it; name another")
    if job.to in REWARDED and job.scores != NO_SCORES and first.reward is None and _unscored(source, first):
        raise DataError(
            f"scores: {source.folder} holds none; score it with steerl score and name them with --scores DIR, "
            f"or go without, --scores {NO_SCORES}"
        )
    passes = 2 if job.to == "trl" else 1
    progress = Progress("rows read", source.rows * passes, sys.stderr)

    def read() -> Iterator[Record]:
        for record in source.read():
            yield record
            progress.add(1)

    return replace(source, read=read)


def _unscored(source: Source, first: Record) -> bool:
    """Of episodes some may have no reward, whose environment is gone."""
    return first.episode is None or all(record.reward is None for record in source.read())


def write_lines(path: Path, values: Iterable[dict[str, Any]]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    return count


def write(path: Path, source: Source, job: ExportJob) -> int:
    """Under a temporary name; how many there were."""
    from steerl.training.formats import inspect, openai, sts, trl, verifiers

    if job.to == "trl":
        return trl.write(path, source)
    if job.to == "inspect":
        return inspect.write(path, source, source.read())
    if job.to == "openai":
        return write_lines(path, map(openai.line, source.read()))
    if job.to == "verifiers" and job.out.endswith(".jsonl"):
        return write_lines(path, (verifiers.trace(source, record) for record in source.read()))
    path.mkdir()
    if job.to == "verifiers":
        return write_lines(path / "traces.jsonl", (verifiers.episode(source, record) for record in source.read()))
    count = 0
    for count, record in enumerate(source.read(), 1):  # noqa: B007
        write_lines(path / f"{record.id}.jsonl", sts.lines(source, record))
    return count


def main(job: ExportJob) -> None:
    from steerl.training.formats.records import source_of

    path = out_of(job)
    source = checked(source_of(Path(job.dir), job.scores), job)
    with written_aside(path) as aside:
        count = write(aside, source, job)
    print(f"{path}: {count:,} rows")
    if job.to in NEXT:
        print("next: " + NEXT[job.to].format(shlex.quote(str(path)), shlex.quote(str(path.parent))))


def cli() -> None:
    run_command(main, ExportJob)


if __name__ == "__main__":
    cli()
