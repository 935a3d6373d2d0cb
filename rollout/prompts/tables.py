"""Rows of a table, wherever they lie: jsonl, json, csv, parquet, a saved dataset's folder, a hub name.

jsonl, json and csv need no package besides Python. `read_table` holds the rows, or finds them in an Arrow file; `reader` gives
them one after the other, from any one on. Arrow fills a struct's missing keys with None, which a chat template would see: such
keys are taken out again, so a conversation read from parquet is the one that was written.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.rollout.common.errors import DataError, one_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = dict[str, object]


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


def reader(path: str, split: str = "", name: str = "") -> Callable[[int], Iterator[Row]]:
    """What gives the rows of `path` from any one on, without holding them."""
    file = Path(path).expanduser()
    kind = file.suffix.lower()
    if file.is_dir():
        if any((file / marker).is_file() for marker in _SAVED):
            told = "is a saved data set, whose rows are read when asked for anyway; leave it out"
            raise DataError(f"prompts.streaming: {path} {told}")
        return rows_of(_load_folder(file, split, name, "prompts", streaming=True))
    if not file.is_file():
        if is_file_name(path):
            raise DataError(f"prompts.path: {path} does not exist; check the path")
        return rows_of(_load_hub(path, split, name, "prompts", streaming=True))
    if kind in (".parquet", ".pq"):
        return lambda begin: _parquet_rows(file, begin)
    if kind in (".csv", ".tsv"):
        return lambda begin: islice(_csv_rows(file, "\t" if kind == ".tsv" else ",", "prompts"), begin, None)
    if kind in (".jsonl", ".ndjson"):
        return lambda begin: _jsonl_rows(file, "prompts", begin)
    raise DataError(f"prompts.streaming: {path} cannot be read piece by piece; use jsonl, csv, tsv or parquet")


def rows_of(dataset: Any) -> Callable[[int], Iterator[Row]]:
    """The same of a data set of `datasets` that streams."""
    return lambda begin: map(without_missing, dataset.skip(begin) if begin else dataset)


def is_file_name(path: str) -> bool:
    """Whether it can be no name of the hub."""
    return path.startswith((".", "/", "~")) or Path(path).suffix.lower() in (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def may_be_of_hub(path: str) -> bool:
    """A path that is not here and has the form of a hub name: NAME or OWNER/NAME."""
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None
    return is_name and not is_file_name(path) and not Path(path).exists()


def columns_of(rows: Sequence[dict[str, object]]) -> list[str]:
    """The columns of a table: every row's, for a row of a jsonl file may lack some."""
    if (known := getattr(rows, "columns", None)) is not None:
        return list(known)
    return list(dict.fromkeys(name for row in rows for name in row))


def _read_file(file: Path, field: str) -> Sequence[dict[str, object]]:
    kind = "".join(file.suffixes[-1:]).lower()
    if kind in (".jsonl", ".ndjson"):
        return list(_jsonl_rows(file, field))
    if kind == ".json":
        return _read_json(file, field)
    if kind in (".csv", ".tsv"):
        return list(_csv_rows(file, "\t" if kind == ".tsv" else ",", field))
    if kind in (".parquet", ".pq"):
        return _read_parquet(file, field)
    raise DataError(f"{field}.path: {file} has no ending that is known; use jsonl, json, csv, tsv or parquet")


def _jsonl_rows(file: Path, field: str, begin: int = 0) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        filled = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        for number, line in islice(filled, begin, None):
            try:
                row = json.loads(line, object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                kind = "cannot be read" if type(error) is ValueError else "is not JSON"
                raise DataError(f"{field}.path: {file} line {number} {kind}: {one_line(error)}") from error
            if not isinstance(row, dict):
                raise DataError(f"{field}.path: {file} line {number} is a {type(row).__name__}; every line must be an object")
            yield row


def _read_json(file: Path, field: str) -> list[dict[str, object]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (json.JSONDecodeError, RecursionError):
        return list(_jsonl_rows(file, field))
    except ValueError as error:
        raise DataError(f"{field}.path: {file}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{field}.path: {file} must hold a list of objects")
    return rows


def _csv_rows(file: Path, delimiter: str, field: str) -> Iterator[Row]:
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
                yield row
                begins = reader.line_num + 1
        except csv.Error as error:
            told = "a quote that is opened there is never closed" if "unexpected end" in str(error) else str(error)
            raise DataError(
                f"{field}.path: {file} line {begins} cannot be read as CSV: {told}; fix it, or save it as jsonl"
            ) from error


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


def _parquet_rows(file: Path, begin: int) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if begin >= rows:
                    begin -= rows
                    continue
                for batch in table.iter_batches(_AT_ONCE, row_groups=[group]):
                    yield from map(without_missing, batch.slice(min(begin, len(batch))).to_pylist())
                    begin = max(begin - len(batch), 0)
    except pyarrow.ArrowException as error:
        raise DataError(f"prompts.path: {file} cannot be read as parquet: {str(error).splitlines()[0]}") from error


_AT_ONCE = 1024
_SAVED = ("state.json", "dataset_dict.json")


def _load_folder(folder: Path, split: str, name: str, field: str, streaming: bool = False) -> Dataset:
    import datasets

    try:
        if any((folder / marker).is_file() for marker in _SAVED):
            return _one_split(datasets.load_from_disk(str(folder)), str(folder), split, field)
        return _one_split(datasets.load_dataset(str(folder), name or None, streaming=streaming), str(folder), split, field)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{field}.path: {folder} cannot be read as a dataset: {line_of(error)}") from error


def _load_hub(path: str, split: str, name: str, field: str, streaming: bool = False) -> Dataset:
    import datasets

    try:
        return _one_split(datasets.load_dataset(path, name or None, streaming=streaming), path, split, field)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{field}.path: {path} is neither a file or folder here nor a dataset that can be fetched: {line_of(error)}"
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
        self.dataset, self.columns = dataset, dataset.column_names

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


def line_of(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
