"""manifest.json of a dump: what it was made from, how it is cut into shards, and which shards are whole.

Plan       prompts x samples, cut into shards of whole prompts: from data and settings alone, so any number of
           processes, and a resumed job, cut alike
Record     one finished shard: rows, tokens, bytes, sha256. Written to records/NNNNN.json by the process that made
           the shard, just after it; gathered into manifest.json at the end, when the folder `records` goes
start      a fresh manifest, or the one that is there compared field by field with what is asked for now
standing   which shards are whole, which are damaged and why
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from steerl.rollout.common.errors import DataError, reading
from steerl.rollout.common.fingerprint import sha256_file
from steerl.rollout.common.run_folder import remove_left_behind, write_json
from steerl.rollout.environments.settings import BEFORE
from steerl.rollout.model.settings import BEFORE as MODEL_BEFORE
from steerl.rollout.prompts.prompts import BEFORE as PROMPTS_BEFORE

MANIFEST, RECORDS, FORMAT = "manifest.json", "records", 2
READS = (1, FORMAT)
"""Formats that are read. A dump of format 1 holds shards of schema 1 (store.py), and gets no others."""
CALL_BATCHES = 4
"""Batches that the sampler is handed at once: it puts prompts of like length together, and a last small one is rare."""
SHARD_ROWS, SHARDS = 1024, 16
"""Default size of a shard: about SHARD_ROWS rows, fewer where the dump would then have under SHARDS of them."""
FREE = ("run.", "verify", "engine.", "environment.workers", "model.path", "prompts.path")
"""Settings that may differ on resume (prefixes): they do not change a row, or a fingerprint speaks for them."""
BOUND = ("run.save_every",)
"""Exceptions to FREE."""


class Manifest(TypedDict):
    """manifest.json as it is read; beside these it holds what a job wants to say of itself (`described`)."""

    format: int
    finished: bool
    plan: dict[str, int]
    fingerprints: dict[str, str]
    """Setting -> hash of what it stands for."""
    config: dict[str, object]
    counts: dict[str, int | dict[str, int]]
    shards: list[dict[str, Any]]
    """Fields of Records."""
    versions: NotRequired[dict[str, str]]
    world_size: NotRequired[int]
    tools: NotRequired[list[dict[str, Any]]]
    """Schemas of the environment's tools."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the rows are cut: shard k holds all samples of a fixed range of prompts, sampled in fixed calls."""

    prompts: int
    samples: int
    shard_prompts: int
    call_prompts: int
    """Prompts handed to the sampler at once."""

    @staticmethod
    def of(prompts: int, samples: int, batch_size: int, shard_rows: int = 0) -> Plan:
        """shard_rows 0: about SHARD_ROWS rows, whole calls, at least SHARDS shards where the rows are enough."""
        call = max(1, CALL_BATCHES * batch_size // samples)
        if shard_rows:
            shard = max(1, shard_rows // samples)
        else:
            rows = min(SHARD_ROWS, -(-prompts * samples // SHARDS))
            batch = max(1, batch_size // samples)
            shard = batch * max(1, -(-rows // (batch * samples)))
        return Plan(prompts=prompts, samples=samples, shard_prompts=shard, call_prompts=min(call, shard))

    def check(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if type(value) is not int or not 1 <= value < 1 << 53:
                raise ValueError(f"plan.{name} is {value!r:.60}")

    def __len__(self) -> int:
        return -(-self.prompts // self.shard_prompts)

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    def shard(self, index: int) -> range:
        """The prompts of a shard."""
        return range(index * self.shard_prompts, min((index + 1) * self.shard_prompts, self.prompts))

    def calls(self, index: int) -> list[range]:
        """A shard's prompts, cut into what the sampler is handed at once."""
        prompts = self.shard(index)
        return [prompts[i : i + self.call_prompts] for i in range(0, len(prompts), self.call_prompts)]

    def file(self, index: int) -> str:
        return f"rollouts-{index:05d}.parquet"


@dataclass(frozen=True, kw_only=True)
class Record:
    """One finished shard."""

    file: str
    rows: int
    tokens: int
    """What the policy drew; of the rows that were fed something in between, that is not all of the response."""
    stops: dict[str, int] = field(default_factory=dict)
    """Rows by stop reason."""
    cut_prompts: int = 0
    """Prompts that were longer than they may be."""
    bytes: int
    sha256: str

    def check(self) -> None:
        kinds = {"file": str, "rows": int, "tokens": int, "stops": dict, "bytes": int, "sha256": str}
        wrong = [name for name, kind in kinds.items() if type(getattr(self, name)) is not kind]
        if wrong or Path(self.file).name != self.file or any(type(count) is not int for count in self.stops.values()):
            raise TypeError(f"{', '.join(wrong) or 'file or stops'} of a shard is not what was written")

    def damage(self, folder: Path) -> str | None:
        """What is wrong with the file, in words; None when it is whole."""
        path = folder / self.file
        if not path.is_file():
            return "is missing"
        size = path.stat().st_size
        if size != self.bytes:
            return f"is damaged: {size} bytes, expected {self.bytes}"
        if sha256_file(path) != self.sha256:
            return "is damaged: its checksum is not the recorded one"
        return None


def write_record(folder: Path, index: int, record: Record) -> None:
    try:
        (folder / RECORDS).mkdir(exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder / RECORDS}: cannot be made: {error.strerror}; free some space") from error
    write_json(folder / RECORDS / f"{index:05d}.json", dataclasses.asdict(record))


def read_record(folder: Path, index: int) -> Record | None:
    """None where there is none, or a damaged one: its shard counts as not made."""
    try:
        return Record(**json.loads((folder / RECORDS / f"{index:05d}.json").read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError, TypeError):
        return None


def drop_record(folder: Path, index: int) -> None:
    (folder / RECORDS / f"{index:05d}.json").unlink(missing_ok=True)


# -- reading ----------------------------------------------------------------------------------------------------------


def load_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{folder}: no {MANIFEST}, so not a dump of rollouts; name the folder that dump_rollouts.py wrote")
    with reading(f"{path}: damaged (", "); make the dump again with --run.overwrite true"):
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] not in READS:
            raise DataError(
                f"{path}: format {manifest['format']!r:.40}, expected {FORMAT}; make the dump again with this version"
            )
        kinds = {"finished": bool, "fingerprints": dict, "config": dict, "counts": dict, "shards": list, "plan": dict}
        if wrong := [name for name, kind in kinds.items() if not isinstance(manifest[name], kind)]:
            raise TypeError(f"{wrong[0]} is {manifest[wrong[0]]!r:.60}")
        Plan(**manifest["plan"]).check()
        for record in manifest["shards"]:
            Record(**record).check()
        return cast(Manifest, manifest)


def plan_of(manifest: Manifest) -> Plan:
    return Plan(**manifest["plan"])


def records_of(folder: Path, manifest: Manifest) -> dict[int, Record]:
    """Every recorded shard by its number; a record written since the manifest was goes before the manifest's."""
    known = {index: Record(**record) for index, record in enumerate(manifest["shards"])}
    for path in (folder / RECORDS).glob("[0-9]*.json"):
        if (record := read_record(folder, int(path.stem))) is not None:
            known[int(path.stem)] = record
    return known


def finished_shards(folder: Path) -> list[Record]:
    """The shards of a finished dump, in order; a UserError while some are still to be made."""
    manifest = load_manifest(folder)
    if not manifest["finished"]:
        made, total = len(records_of(folder, manifest)), len(plan_of(manifest))
        raise DataError(f"{folder}: unfinished, {made} of {total} shards; finish it with dump_rollouts.py --run.resume true")
    return [Record(**record) for record in manifest["shards"]]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a dump stands: shards that are whole, shards with something wrong, shards not made yet."""

    whole: dict[int, Record]
    damaged: dict[int, str]
    absent: list[int]


def standing(folder: Path, manifest: Manifest, shards: Sequence[int] | None = None) -> Standing:
    """Reads every file of `shards` (default: all) and compares checksums."""
    records = records_of(folder, manifest)
    whole: dict[int, Record] = {}
    damaged: dict[int, str] = {}
    absent: list[int] = []
    for index in range(len(plan_of(manifest))) if shards is None else shards:
        if index not in records:
            absent.append(index)
        elif damage := records[index].damage(folder):
            damaged[index] = damage
        else:
            whole[index] = records[index]
    return Standing(whole=whole, damaged=damaged, absent=absent)


# -- writing ----------------------------------------------------------------------------------------------------------


def start(
    folder: Path, plan: Plan, config: Mapping[str, object], fingerprints: Mapping[str, str], **described: object
) -> Manifest:
    """The manifest to work by: a fresh one, written, or the one in the folder if it was made with the same settings.

    `fingerprints` maps a setting's name to the hash of what it stands for; `described` is kept and never compared.
    """
    written = {
        "format": FORMAT,
        "finished": False,
        "plan": dataclasses.asdict(plan),
        "fingerprints": dict(fingerprints),
        **described,
        "config": json.loads(json.dumps(config)),
        "counts": {},
        "shards": [],
    }
    fresh = cast(Manifest, written)
    remove_left_behind(folder)
    if (folder / MANIFEST).exists():
        begun = load_manifest(folder)
        if not begun["finished"]:
            refuse_earlier(folder, begun)
        changed = list(_changes(begun, fresh))
        if not changed and begun["plan"] != fresh["plan"]:
            changed = [
                f"run.save_every: this dump was begun with the shards {begun['plan']}, and is now asked for {fresh['plan']}"
            ]
        if changed:
            remedy = "give the same settings, or start afresh with --run.overwrite true"
            raise DataError(*(f"{line}; {remedy}" for line in changed))
        return begun
    if any(folder.glob("rollouts-*.parquet")):
        raise DataError(f"run.dir: {folder} holds shards but no {MANIFEST}; start afresh with --run.overwrite true")
    shutil.rmtree(folder / RECORDS, ignore_errors=True)
    write_json(folder / MANIFEST, fresh)
    return fresh


def refuse_earlier(folder: Path, begun: Manifest) -> None:
    """No dump holds shards of two schemas: what an earlier version has begun is not gone on with."""
    if begun["format"] != FORMAT:
        raise DataError(
            f"{folder}: begun by an earlier version (format {begun['format']}, now {FORMAT}), whose rows record less; "
            "finish it with that version, or start afresh with --run.overwrite true"
        )


def _changes(begun: Manifest, fresh: Manifest) -> Iterator[str]:
    old, new = (BEFORE | MODEL_BEFORE | PROMPTS_BEFORE | dict(_flat(kept["config"])) for kept in (begun, fresh))
    sections: set[str] = set()
    # A finished dump of an earlier version is as good as it was, whatever settings have come since.
    for name in sorted(old.keys() | new.keys() if begun["format"] == FORMAT else old.keys()):
        free = name.startswith(FREE) and name not in BOUND
        if not free and old.get(name) != new.get(name):
            sections.add(name.split(".")[0])
            was, now = json.dumps(old.get(name)), json.dumps(new.get(name))
            yield f"{name}: this dump was begun with {was}, and is now asked to go on with {now}"
    for name in sorted(begun["fingerprints"].keys() | fresh["fingerprints"].keys()):
        was, now = (kept["fingerprints"].get(name, "none") for kept in (begun, fresh))
        if was != now and name.split(".")[0] not in sections:  # a changed setting of it has been named already
            yield f"{name}: its content has changed since this dump was begun (fingerprint {was}, now {now})"


def _flat(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def finish(folder: Path, manifest: Manifest, **described: object) -> None:
    """Gather the records into the manifest, write it, remove the folder of records. Every shard must be recorded."""
    plan, records = plan_of(manifest), records_of(folder, load_manifest(folder))
    shards = [records[index] for index in range(len(plan))]
    stops: dict[str, int] = {}
    for record in shards:
        for reason, count in record.stops.items():
            stops[reason] = stops.get(reason, 0) + count
    counts = {
        "rows": sum(record.rows for record in shards),
        "prompts": plan.prompts,
        "tokens": sum(record.tokens for record in shards),
        "cut_prompts": sum(record.cut_prompts for record in shards),
        "stop_reasons": dict(sorted(stops.items())),
    }
    done = {**manifest, **described, "finished": True, "counts": counts}
    done["shards"] = [dataclasses.asdict(record) for record in shards]
    write_json(folder / MANIFEST, done)
    shutil.rmtree(folder / RECORDS, ignore_errors=True)
