"""Supervised data: rows of a table, under the expected names, every one checked, split into training and held-out ones.

    path ── rows ── columns renamed ── kind read off the columns ── every row checked ── limit ── training | held out

Rows are plain dicts until all of them are known to be right, so that a bad one is told by its number.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steerl.rollout.common.errors import DataError, UserError
from steerl.rollout.prompts.chat import (
    TEMPLATE_COLUMNS,
    check_messages,
    conversation_ids,
    is_conversation,
    template_arguments,
    template_tools,
)
from steerl.rollout.prompts.sources import Source, mixed, read_sources, refuse_weights
from steerl.rollout.prompts.tables import columns_of, read_table
from steerl.training.stages.settings import TableSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TableRow = dict[str, Any]


def read_rows(
    settings: TableSettings, check: Callable[[list[TableRow], str], list[TableRow]]
) -> tuple[list[TableRow], list[TableRow]]:
    """(rows, held-out rows of their own), renamed and passed through `check`, which knows what a stage's rows are."""
    parts: list[list[TableRow]] = []
    for path, where in ((settings.path, "prompts.path"), (settings.heldout_path, "prompts.heldout_path")):
        if not path and where == "prompts.heldout_path":
            parts.append([])
            continue
        if not path:
            raise DataError(f"{where}: missing; name a jsonl, parquet or csv file, a dataset folder or a hub name")
        rows = list(read_table(path, settings.split, settings.name)) if isinstance(path, str) else _of_several(path, settings)
        if not rows:
            raise DataError(f"{where}: {path} has no rows")
        columns = {**settings.columns, **({"text": settings.column} if settings.column else {})}
        parts.append(check(rename(rows, columns), where))
    return parts[0][: settings.limit] if settings.limit else parts[0], parts[1]


def _of_several(paths: Sequence[str | Source], settings: TableSettings) -> list[TableRow]:
    refuse_weights(paths, "an epoch")
    sources, tables = read_sources(paths, settings.split, settings.name)
    if own := [source.column for source in sources if source.column]:
        raise DataError(f"prompts.path: column {own[0]!r} of one source; the columns here are those of prompts.columns")
    return list(mixed(sources, tables))


def rename(rows: Sequence[TableRow], columns: Mapping[str, str], where: str = "prompts.columns") -> list[TableRow]:
    """Rows under the expected names; `columns` says what the data calls them."""
    names = columns_of(rows)
    for expected, given in columns.items():
        if given not in names:
            raise DataError(f"{where}.{expected}: the data has no column {given!r}; it has: {', '.join(names)}")
    back = {given: expected for expected, given in columns.items()}
    return [{**{k: v for k, v in row.items() if k not in back}, **{back[k]: row[k] for k in back if k in row}} for row in rows]


def hold_out(
    rows: Sequence[TableRow], settings: TableSettings, seed: int, heldout: Sequence[TableRow]
) -> tuple[list[TableRow], list[TableRow]]:
    """(training rows, held-out rows): `heldout` where there are any, else a share of `rows` drawn by the seed."""
    if not 0 <= settings.heldout < 1:
        raise DataError(f"prompts.heldout: {settings.heldout}; give the share of rows to hold out, from 0 to below 1")
    if heldout or not settings.heldout:
        return list(rows), list(heldout)
    count = max(1, round(len(rows) * settings.heldout))
    if count >= len(rows):
        raise DataError(f"prompts.heldout: {settings.heldout} of {len(rows)} row(s) leaves none to learn from; give 0")
    chosen = set(random.Random(f"heldout {seed}").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def check_values(rows: Sequence[TableRow], names: Sequence[str], where: str = "prompts.path") -> bool:
    """Every named column holds a text in every row, or a conversation in every row. Whether it is conversations."""
    if not rows:
        return False
    talks = is_conversation(rows[0].get(names[0]))
    wanted = "a list of messages ({role, content})" if talks else "a text"
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        for name in names:
            value = row.get(name)
            if talks and is_conversation(value):
                try:
                    check_messages(value, f"{where}: row {number}: {name}")
                except UserError as problem:
                    problems += problem.lines
            elif talks or not isinstance(value, str):
                kind = "missing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
                problems.append(f"{where}: row {number}: {name} is {kind}, expected {wanted}, as in row 1")
    raise_first(problems)
    return talks


def with_template(rows: Sequence[TableRow], names: Sequence[str], where: str = "prompts.path") -> list[TableRow]:
    """The named columns of conversations, and what their chat template is given besides, where any row has it.

    trl reads a column off the first row, and tools as JSON text, which Arrow leaves as it is."""
    there, records = columns_of(rows), [{name: row[name] for name in names if name in row} for row in rows]
    for number, (row, record) in enumerate(zip(rows, records, strict=True), 1):
        told = f"{where}: row {number}"
        if "tools" in there:
            tools = template_tools(row.get("tools"), told)
            record["tools"] = json.dumps(tools, ensure_ascii=False) if tools else None
        if "chat_template_kwargs" in there:
            record["chat_template_kwargs"] = template_arguments(row.get("chat_template_kwargs"), told)
            for name in ("add_generation_prompt", "continue_final_message"):  # of a prompt that is answered, not of a row
                record["chat_template_kwargs"].pop(name, None)
    if not any(record.get("chat_template_kwargs") for record in records):
        return [{name: value for name, value in record.items() if name != "chat_template_kwargs"} for record in records]
    return records


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TableRow],
    wholes: Sequence[Sequence[str]],
    *,
    what: str,
    eos: str,
    where: str = "prompts.path",
) -> None:
    """Refuse a tokenizer without what the rows need: a chat template where they are conversations, and an eos token.

    Messages whose content is no plain text come out of the template as text, or the row is told. `wholes`: the columns that
    make a conversation together; `what` and `eos`: what the rows are called, and what the eos token is for."""
    if any(is_conversation(value) for value in rows[0].values()):
        if not tokenizer.chat_template:
            raise DataError(
                f"model.path: the {what} are conversations, but the tokenizer has no chat template; give texts, or add one"
            )
        for number, row in enumerate(rows, 1):
            for names in wholes:
                messages = [message for name in names for message in row.get(name) or ()]
                if not all(isinstance(message.get("content"), str | None) for message in messages):
                    given = [row.get(name) for name in TEMPLATE_COLUMNS]
                    conversation_ids(tokenizer, messages, *given, whole=True, where=f"prompts.path: row {number}")
    if tokenizer.eos_token is None:
        raise DataError(f"model.path: the tokenizer has no eos token, {eos}; set one and save the tokenizer")


def raise_first(problems: Sequence[str], most: int = 3) -> None:
    """A UserError of the first few lines and how many more there are; nothing without any."""
    if problems:
        more = [f"... and {len(problems) - most} more rows like these"] if len(problems) > most else []
        raise DataError(*problems[:most], *more)


def missing_columns(rows: Sequence[TableRow], wanted: str, where: str = "prompts.path") -> UserError:
    found = ", ".join(columns_of(rows)) or "none"
    return DataError(f"{where}: expected {wanted}; found the columns: {found}; say what is what with prompts.columns")
