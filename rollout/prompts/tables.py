"""Rows of a table, wherever they lie: jsonl, json, csv, parquet, a saved dataset's folder, a hub name.

jsonl, json and csv need no package besides Python. Arrow fills a struct's missing keys with None, which a chat template
would see: such keys are taken out again, so a conversation read from parquet is the one that was written.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.rollout.common.errors import DataError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def read_table(path: str, split: str = "", name: str = "", field: str = "prompts") -> Sequence[dict[str, object]]:
    """The rows of `path`; `field` is the settings' section that errors name."""
    file = Path(path).expanduser()
    if file.is_dir():
        return _ArrowRows(_load_folder(file, split, name, field))
    if file.is_file():
        try:
            return _read_file(file, field)
        except UnicodeDecodeError as error:
            raise DataError(f"{field}.path: {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
        except OSError as error:
            raise DataError(f"{field}.path: {path} cannot be read: {error.strerror or error}; check its permissions") from error
        except RecursionError as error:
            raise DataError(f"{field}.path: {path} holds JSON that is nested too deeply to be read; flatten it") from error
    if is_file_name(path):
        raise DataError(f"{field}.path: {path} does not exist; check the path")
    return _ArrowRows(_load_hub(path, split, name, field))


def is_file_name(path: str) -> bool:
    """Whether it can be no name of the hub."""
    return path.startswith((".", "/", "~")) or Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def may_be_of_hub(path: str) -> bool:
    """A path that is not here and has the form of a hub name: NAME or OWNER/NAME."""
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
    return is_name and not is_file_name(path) and not Path(path).exists()


def columns_of(rows: Sequence[dict[str, object]]) -> list[str]:
    """The columns of a table: every row's, for a row of a jsonl file may lack some."""
    if isinstance(rows, _ArrowRows):
        return list(rows.dataset.column_names)
    return list(dict.fromkeys(name for row in rows for name in row))


def _read_file(file: Path, field: str) -> Sequence[dict[str, object]]:
    kind = "".join(file.suffixes[-1:]).lower()
    if kind in (".jsonl", ".ndjson"):
        return _read_jsonl(file, field)
    if kind == ".json":
        return _read_json(file, field)
    if kind in (".csv", ".tsv"):
        return _read_csv(file, "\t" if kind == ".tsv" else ",", field)
    if kind in (".parquet", ".pq"):
        return _read_parquet(file, field)
    raise DataError(f"{field}.path: {file} has no ending that is known; use jsonl, json, csv, tsv or parquet")


def _read_jsonl(file: Path, field: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                kind = "cannot be read" if type(error) is ValueError else "is not JSON"
                raise DataError(f"{field}.path: {file} line {number} {kind}: {one_line(error)}") from error
            if not isinstance(row, dict):
                raise DataError(f"{field}.path: {file} line {number} is a {type(row).__name__}; every line must be an object")
            rows.append(row)
    return rows


def _read_json(file: Path, field: str) -> list[dict[str, object]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError):
        return _read_jsonl(file, field)
    except ValueError as error:
        raise DataError(f"{field}.path: {file}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{field}.path: {file} must hold a list of objects")
    return rows


def _read_csv(file: Path, delimiter: str, field: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter=delimiter, strict=True)  # else an open quote takes in the rest of the file
        begins = 1
        try:
            names = list(reader.fieldnames or [])
            if doubled := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
                raise DataError(
                    f"{field}.path: {file} has two columns named {doubled[0]!r}; give every column a name of its own"
                )
            begins = reader.line_num + 1
            for row in reader:
                if None in row or None in row.values():
                    raise DataError(f"{field}.path: {file} line {begins} has another number of fields than the first line")
                rows.append(row)
                begins = reader.line_num + 1
        except csv.Error as error:
            told = "a quote that is opened there is never closed" if "unexpected end" in str(error) else str(error)
            raise DataError(
                f"{field}.path: {file} line {begins} cannot be read as CSV: {told}; fix it, or save it as jsonl"
            ) from error
    return rows


_HALF = re.compile("[\ud800-\udfff]")


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object whose keys are all different: of two equal ones the first would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    for text in (text for pair in pairs for text in pair if isinstance(text, str)):
        if half := _HALF.search(text):
            raise ValueError(f"{half.group()!a} is half of a character, which no file can hold")
    return row


def _read_parquet(file: Path, field: str) -> Sequence[dict[str, object]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowException as error:
        raise DataError(f"{field}.path: {file} cannot be read as parquet: {str(error).splitlines()[0]}") from error
    return [without_missing(row) for row in table.to_pylist()]


def _load_folder(folder: Path, split: str, name: str, field: str) -> Dataset:
    import datasets

    try:
        if any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            return _one_split(datasets.load_from_disk(str(folder)), str(folder), split, field)
        return _one_split(datasets.load_dataset(str(folder), name or None), str(folder), split, field)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{field}.path: {folder} cannot be read as a dataset: {_line(error)}") from error


def _load_hub(path: str, split: str, name: str, field: str) -> Dataset:
    import datasets

    try:
        return _one_split(datasets.load_dataset(path, name or None), path, split, field)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{field}.path: {path} is neither a file or folder here nor a dataset that can be fetched: {_line(error)}"
        ) from error


def _one_split(dataset: Dataset | DatasetDict, path: str, split: str, field: str) -> Dataset:
    if not isinstance(dataset, dict):
        if split and split != str(dataset.split or split):
            raise DataError(f"{field}.split: {split!r}, but {path} is one split, {dataset.split}; leave prompts.split out")
        return dataset
    names = list(dataset)
    chosen = split or ("train" if "train" in names else names[0] if len(names) == 1 else "")
    if chosen not in names:
        raise DataError(f"{field}.split: {split or 'missing'}; {path} has: {', '.join(names)}")
    return dataset[chosen]


class _ArrowRows(Sequence[dict[str, object]]):
    """A dataset's rows as plain objects, read when asked for."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row: dict[str, object] = without_missing(self.dataset[int(index)])
        return row

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (self[i] for i in range(len(self)))


def without_missing(row: dict[str, object]) -> dict[str, object]:
    """The row without the None keys that Arrow put into nested objects; the row's own columns stay."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {key: clean(part) for key, part in value.items() if part is not None or key == "content"}
        if isinstance(value, list):
            return [clean(part) for part in value]
        return value

    return {key: clean(value) for key, value in row.items()}


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
