"""From a scored dump to a dataset: best-of-n, worst, rejection-sampled, or best/worst pairs.

steerl select DUMP --out best.jsonl --select.mode best
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from steerl.configs.reader import run_command

from steerl.reward.settings import SelectionSettings
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import written_aside

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 1024
"""Records per row group."""


@dataclass(frozen=True)
class SelectJob:
    """Reads a finished, scored dump; writes {prompt, completion} or, for pairs, {prompt, chosen, rejected}."""

    dir: str = field(metadata={"positional": True})
    """The dump."""
    out: str = field(default="", metadata={"positional": True})
    """The dataset's file, .jsonl or .parquet."""
    scores: str | None = None
    """The folder of its scores; none: the dump's own."""
    select: SelectionSettings = field(default_factory=SelectionSettings)
    overwrite: bool = False
    """Replace the file where it is there already."""


def write(path: Path, records: Iterator[dict[str, object]]) -> int:
    """Written aside and renamed; how many there were."""
    count = 0
    with written_aside(path) as aside:
        if path.suffix == ".jsonl":
            with aside.open("w", encoding="utf-8") as file:
                for record in records:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    count += 1
            return count
        import pyarrow.parquet as pq

        chunk = list(itertools.islice(records, CHUNK))
        schema = _table(chunk, None, path).schema
        with pq.ParquetWriter(aside, schema) as writer:
            while chunk:
                writer.write_table(_table(chunk, schema, path))
                count += len(chunk)
                chunk = list(itertools.islice(records, CHUNK))
    return count


def _table(records: list[dict[str, object]], schema: pa.Schema | None, path: Path) -> pa.Table:
    """The records as Arrow holds them; of the first ones' kind, which a parquet file keeps to its end."""
    import pyarrow as pa

    names = dict.fromkeys(name for record in records for name in record)
    try:
        table = pa.table({name: [record.get(name) for record in records] for name in names})
        if schema is None:
            return table
        if pa.unify_schemas([schema, table.schema], promote_options="permissive").equals(schema):
            return pa.Table.from_pylist(records, schema=schema)
    except pa.ArrowException as error:
        told = str(error).splitlines()[0]
        raise UserError(
            f"out: these rows are not of one kind ({told}), which parquet needs; write {path.stem}.jsonl"
        ) from error
    raise UserError(f"out: later rows hold what the first {CHUNK} do not, which parquet needs; write {path.stem}.jsonl")


def main(job: SelectJob) -> None:
    from steerl.reward.jobs.selection import selected

    path = Path(job.out)
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"out: {job.out or 'missing'}; name the dataset's file, --out FILE.jsonl or FILE.parquet")
    if path.exists() and not job.overwrite:
        raise UserError(f"out: {path} is there already; add --overwrite true or name another file")
    if not path.parent.is_dir():
        raise UserError(f"out: the folder {path.parent} does not exist; make it or name another")
    records = selected(Path(job.dir), Path(job.scores or job.dir), job.select)
    first = next(records, None)
    if first is None:
        raise UserError(f"select: no row of {job.dir} is kept by mode {job.select.mode}; loosen threshold, min_gap or ended")
    count = write(path, itertools.chain([first], records))
    pairs = job.select.mode == "pairs"
    print(f"{path}: {count:,} {'pairs' if pairs else 'rows'}")
    stage = "reward" if pairs else "sft"
    print(f"next: steerl {stage} --model.path MODEL --prompts.path {shlex.quote(str(path))} --run.dir RUN")


def cli() -> None:
    run_command(main, SelectJob)


if __name__ == "__main__":
    cli()
