"""Rollouts on disk: rows of Samples <-> parquet shards that are whole or not there.

    Samples --to_table--> rows --make_shard--> .rollouts-00003.parquet.tmp --flushed, renamed--> rollouts-00003.parquet
                                                              sha256 and counts of it kept in records/ and manifest.json
    read_dump(DIR) <--from_table-- rows <--checksum first-- rollouts-*.parquet

What other rooms use:

    read_dump(folder, rows=256)          -> yields Samples (rollout, texts), at most `rows` rows each, in (prompt, sample) order
    read_shard(path, rows=256)           -> the same for one shard's file; the caller has checked it
    finished_shards(folder)              -> [Record]: file, rows, tokens, sha256 of each shard of a finished dump (manifest.py)
    write_table(path, table)             -> sha256: one parquet file, written aside and renamed (scores use it too)
    record.damage(folder)                -> None, or what is wrong with that shard's file; read_dump asks it first

The files are plain parquet: `datasets.load_dataset("parquet", data_files=...)` and pandas read them as they are. What is
the same for every row and is no column (temperature, the decoder's start ids, the steering's seed) travels in the file's own
metadata, and so does `schema`: 2, or absent in files from before, which lack the columns of `ADDED`.
"""

from __future__ import annotations

import collections
import datetime
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from steerl.rollout.common.errors import DataError
from steerl.rollout.common.fingerprint import sha256_file
from steerl.rollout.common.run_folder import written_aside
from steerl.rollout.dumps.manifest import Plan, Record, finished_shards, write_record
from steerl.rollout.episodes import Episode
from steerl.rollout.ragged import Kept
from steerl.rollout.ragged import table as table_of
from steerl.rollout.types import STOP_REASONS, Rollout, Samples, Texts

if TYPE_CHECKING:
    import pyarrow as pa

METADATA = b"steerl"
"""Key of the parquet metadata that holds what is no column."""
SCHEMA = 2
ADDED = ("action_mask", "steering_strengths", "turns")
"""Columns that a file of schema 1 lacks: all of its tokens were drawn, and it knows its first steering site alone."""
OPTIONAL = ("kept", "steering_positions", "episode")
"""Columns that are there where a row has something to say in them."""


def schema() -> pa.Schema:
    """The columns of a dump, in their order."""
    import pyarrow as pa

    ids, numbers = pa.list_(pa.int32()), pa.list_(pa.float32())
    return pa.schema(
        [
            ("prompt_index", pa.int64()),
            ("sample_index", pa.int32()),
            ("prompt_ids", ids),
            ("response_ids", ids),
            ("prompt_text", pa.string()),
            ("response_text", pa.string()),
            ("behaviour_logprobs", numbers),
            ("policy_logprobs", numbers),
            ("ended", pa.bool_()),
            ("stop_reason", pa.string()),
            ("greedy", pa.bool_()),
            ("policy_step", pa.int64()),
            ("steering", pa.string()),
            ("steering_strength", pa.float32()),
            ("prompt", pa.string()),
            ("columns", pa.string()),
            ("action_mask", pa.list_(pa.bool_())),
            ("turns", pa.string()),
            ("steering_strengths", numbers),
            ("steering_positions", pa.list_(pa.list_(pa.int64()))),
            ("kept", pa.list_(ids)),
            ("episode", pa.string()),
        ]
    )


# -- rows -----------------------------------------------------------------------------------------------------------


def to_table(rollout: Rollout, texts: Texts) -> pa.Table:
    """A row per rollout row; lists are as long as the row's own tokens."""
    import pyarrow as pa

    if len(rollout) != len(texts):
        raise DataError(f"dump: {len(rollout)} rollouts and {len(texts)} texts; expected as many of one as of the other")
    rollout = rollout.to("cpu")
    rows, extent_BR = len(rollout), rollout.extent_BR

    def cut(values: Tensor | pa.Array, lengths: Tensor) -> pa.Array:
        """Lists of these lengths, of values that lie one after another."""
        offsets = pa.array(np.concatenate([[0], lengths.flatten().numpy().cumsum()]), pa.int32())
        return pa.ListArray.from_arrays(offsets, pa.array(values.numpy()) if isinstance(values, Tensor) else values)

    def of_response(values_BR: Tensor) -> pa.Array:
        return cut(values_BR[extent_BR], rollout.lengths_B)

    names = list(texts.columns)
    columns = {
        "prompt_index": pa.array(rollout.row_B.numpy()),
        "sample_index": pa.array(rollout.sample_B.int().numpy()),
        "prompt_ids": cut(rollout.prompt_BP[rollout.prompt_mask_BP].int(), rollout.prompt_mask_BP.sum(1)),
        "response_ids": of_response(rollout.response_BR.int()),
        "prompt_text": pa.array(texts.prompt_texts, pa.string()),
        "response_text": pa.array(texts.completions, pa.string()),
        "behaviour_logprobs": of_response(rollout.behaviour_logprobs_BR),
        "policy_logprobs": of_response(rollout.policy_logprobs_BR),
        "ended": pa.array(rollout.ended_B.numpy()),
        "stop_reason": pa.array([STOP_REASONS[stop] for stop in rollout.stop_B.tolist()], pa.string()),
        "greedy": pa.array([rollout.greedy] * rows, pa.bool_()),
        "policy_step": pa.array(rollout.policy_step_B.numpy()),
        "steering": pa.array([rollout.steering] * rows, pa.string()),
        "steering_strength": pa.array(rollout.strength_B.numpy()),
        "prompt": pa.array([_json("prompt", prompt) for prompt in texts.prompts], pa.string()),
        "columns": pa.array(
            [_json("columns", {name: texts.columns[name][i] for name in names}) for i in range(rows)], pa.string()
        ),
        "action_mask": of_response(rollout.action_mask_BR),
        "turns": pa.array([json.dumps(turns) for turns in rollout.turns], pa.string()),
        "steering_strengths": cut(rollout.strength_BK.flatten(), torch.full((rows,), rollout.strength_BK.shape[1])),
    }
    if rollout.positions_BKN.numel():
        there_BKN = rollout.positions_BKN >= 0
        sites = cut(rollout.positions_BKN[there_BKN], there_BKN.sum(2))
        columns["steering_positions"] = cut(sites, torch.full((rows,), there_BKN.shape[1]))
    if rollout.kept is not None:
        assert not rollout.kept.counts_BR[~extent_BR].any()  # its ids lie one after another
        columns["kept"] = cut(cut(rollout.kept.ids, rollout.kept.counts_BR[extent_BR]), rollout.lengths_B)
    if texts.episodes is not None:
        # ASCII: what a policy writes into a call may hold half of a surrogate pair, which UTF-8 cannot.
        columns["episode"] = pa.array([json.dumps(episode.as_json()) for episode in texts.episodes], pa.string())
    shared = {
        "schema": SCHEMA,
        "temperature": rollout.temperature,
        "start_ids": list(rollout.start_ids),
        "steering_seed": rollout.steering_seed,
    }
    layout = pa.schema([field for field in schema() if field.name in columns], {METADATA: json.dumps(shared).encode()})
    return pa.Table.from_arrays([columns[name] for name in layout.names], schema=layout)


def from_table(table: pa.Table) -> Iterator[Samples]:
    """The rows as they were: in one piece, or in more where greedy, steering or what is recorded change between the rows."""
    shared = json.loads((table.schema.metadata or {}).get(METADATA, b"{}"))
    known = shared.get("schema", 1)
    if known not in (1, SCHEMA):
        raise DataError(
            f"dump: schema {known!r:.40}, this version reads 1 and {SCHEMA}; read it with the version that wrote it"
        )
    needed = [name for name in schema().names if name not in OPTIONAL and (known == SCHEMA or name not in ADDED)]
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise DataError(f"dump: column(s) {', '.join(missing)} are missing; these are not the rollouts of dump_rollouts.py")
    if "temperature" not in shared:
        raise DataError("dump: the file's metadata does not say the temperature; it was not written by dump_rollouts.py")
    same = [table.column(name).to_pylist() for name in ("greedy", "steering")]
    same += [table.column(name).is_valid().to_pylist() for name in OPTIONAL if name in table.column_names]
    start = 0
    for (greedy, steering, *_), run in itertools.groupby(zip(*same, strict=True)):
        count = len(list(run))
        yield _from_rows(table.slice(start, count), shared, greedy, steering)
        start += count


def _from_rows(table: pa.Table, shared: dict[str, Any], greedy: bool, steering: str) -> Samples:
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    there = {name: column for name, column in columns.items() if name not in OPTIONAL or not column.null_count}

    def numbers(name: str) -> Tensor:
        return _numbers(there[name])

    def lists(name: str, lengths: list[int] | None = None) -> Sequence[Tensor]:
        """Of each row; of as many tokens as `lengths` says."""
        found, values = _lengths(there[name]), _numbers(there[name].flatten())
        if lengths is not None and found.tolist() != lengths:
            raise DataError(f"dump: {name} holds {len(values)} numbers for {sum(lengths)} tokens")
        return values.split(found.tolist())

    rows, response_lengths = table.num_rows, _lengths(there["response_ids"]).tolist()
    fields: dict[str, Any] = {}
    if "action_mask" in there:
        strengths = lists("steering_strengths")
        if len(sites := {len(row) for row in strengths}) > 1:
            raise DataError(
                f"dump: rows of the steering {steering} have {sorted(sites)} strengths; expected as many in all of them"
            )
        fields |= {"action_mask_BR": lists("action_mask", response_lengths), "strength_BK": torch.stack([*strengths])}
    elif steering:
        fields |= {"strength_BK": numbers("steering_strength")[:, None]}
    if "steering_positions" in there:
        sites_of = there["steering_positions"].flatten()
        listed = [*_numbers(sites_of.flatten()).split(_lengths(sites_of).tolist()), torch.tensor([-1])]  # one wide at least
        fields |= {"positions_BKN": table_of(listed, torch.int64, fill=-1)[:-1].unflatten(0, (rows, -1))}
    if "kept" in there:
        places = there["kept"].flatten()
        counts = _lengths(places).split(_lengths(there["kept"]).tolist())
        fields |= {"kept": Kept(_numbers(places.flatten()), table_of(counts, torch.int64))}
    rollout = Rollout.of_ids(
        lists("prompt_ids"),
        lists("response_ids"),
        ended_B=numbers("ended"),
        behaviour_logprobs_BR=lists("behaviour_logprobs", response_lengths),
        policy_logprobs_BR=lists("policy_logprobs", response_lengths),
        row_B=numbers("prompt_index"),
        sample_B=numbers("sample_index"),
        temperature=float(shared["temperature"]),
        policy_step_B=numbers("policy_step"),
        steering=steering,
        steering_seed=shared.get("steering_seed", None if steering else 0),
        start_ids=tuple(shared["start_ids"]),
        greedy=greedy,
        stop_B=[STOP_REASONS.index(reason) for reason in table.column("stop_reason").to_pylist()],
        **fields,
    )
    others = [json.loads(text) for text in table.column("columns").to_pylist()]
    names = dict.fromkeys(name for other in others for name in other)
    told = there["episode"].to_pylist() if "episode" in there else None
    texts = Texts(
        prompts=[json.loads(text) for text in table.column("prompt").to_pylist()],
        prompt_texts=table.column("prompt_text").to_pylist(),
        completions=table.column("response_text").to_pylist(),
        columns={name: [other.get(name) for other in others] for name in names},
        episodes=None if told is None else [Episode.of_json(json.loads(text)) for text in told],
    )
    assert len(texts) == rows
    return Samples(rollout, texts)


def _numbers(values: pa.Array) -> Tensor:
    return torch.from_numpy(values.to_numpy(zero_copy_only=False).copy())


def _lengths(lists: pa.Array) -> Tensor:
    import pyarrow.compute as pc

    return torch.from_numpy(pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64))


def _json(name: str, value: object) -> str:
    def plain(inner: Any) -> Any:
        if isinstance(inner, np.ndarray | np.generic):
            return inner.tolist()
        if isinstance(inner, datetime.date | datetime.time):
            return inner.isoformat()
        kind = type(inner).__name__
        raise DataError(f"prompts: a value kept with a row ({name}) is of type {kind}, which JSON cannot hold; drop its column")

    return json.dumps(value, ensure_ascii=False, default=plain)


# -- files ----------------------------------------------------------------------------------------------------------


def write_table(path: Path, table: pa.Table) -> str:
    """One parquet file, written aside, flushed and renamed. Its sha256."""
    import pyarrow.parquet as pq

    leaves = {field.name: _leaf(field) for field in table.schema}
    # Ids are ascending: their differences take half of the bytes that a dictionary does, and a fifth where thousands are kept.
    packed = {leaves.pop("kept"): "DELTA_BINARY_PACKED"} if "kept" in leaves else None
    with written_aside(path) as aside:
        pq.write_table(table, aside, compression="zstd", use_dictionary=[*leaves.values()], column_encoding=packed)
        digest = sha256_file(aside)
    return digest


def _leaf(field: pa.Field) -> str:
    """What parquet calls the values of a column."""
    name, kind = field.name, field.type
    while hasattr(kind, "value_type"):
        name, kind = f"{name}.list.element", kind.value_type
    return str(name)


def make_shard(folder: Path, plan: Plan, index: int, sample: Callable[[range], Samples], cut: Collection[int] = ()) -> Record:
    """Sample a shard's calls, write its file, then its record: a kill at any instant leaves both, or a shard to be made.

    `sample` gives all samples of a range of prompts, in (prompt, sample) order; `cut` then holds those prompts that it cut.
    A shard's rows are held until they are written (memory is that of one shard), so that a failure while sampling is never
    taken for one while writing.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = [to_table(*sample(prompts)) for prompts in plan.calls(index)]
    table = pa.concat_tables(tables, promote_options="default")  # null where a call has nothing to say in an optional column
    path = folder / plan.file(index)
    digest = write_table(path, table)
    reasons = collections.Counter(table.column("stop_reason").to_pylist())
    record = Record(
        file=path.name,
        rows=table.num_rows,
        tokens=pc.sum(pc.list_flatten(table.column("action_mask"))).as_py() or 0,
        stops=dict(sorted(reasons.items())),
        cut_prompts=sum(prompt in cut for prompt in plan.shard(index)),
        bytes=path.stat().st_size,
        sha256=digest,
    )
    write_record(folder, index, record)
    return record


def read_shard(path: Path, rows: int = 256) -> Iterator[Samples]:
    """The rows of one file, at most `rows` at a time. Does not check the file: read_dump does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=rows):
                yield from from_table(pa.Table.from_batches([batch], schema=file.schema_arrow))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a readable parquet file: {error}") from error


def read_dump(folder: Path | str, rows: int = 256, shards: Sequence[int] | None = None) -> Iterator[Samples]:
    """A finished dump's rows, in (prompt, sample) order; only the named shards where given.

    Every shard's checksum is compared before its first row is read: a damaged one is a UserError that names it.
    """
    folder = Path(folder)
    records = finished_shards(folder)
    for index in range(len(records)) if shards is None else shards:
        record = records[index]
        damage = record.damage(folder)
        if damage:
            raise DataError(f"{folder / record.file}: {damage}; make it again: dump_rollouts.py with --run.resume true")
        yield from read_shard(folder / record.file, rows)
