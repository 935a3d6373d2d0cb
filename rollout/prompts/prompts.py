"""Prompts: a file or dataset of texts or conversations -> tokenized batches in an order that can be taken up anywhere.

    file, folder, hub ── rows ── column ─┬─ text ── tokenizer ───────────┬─ ids ── cut or refused ── PromptBatch
                                         └─ messages ── chat template ───┘

`take(seed, position, count)` is a function of its arguments: epoch e is one shuffle keyed by (seed, e), so a run goes on
from a position, and processes share a list of positions without losing or repeating a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from steerl.rollout.common import processes
from steerl.rollout.common.errors import DataError, UserError
from steerl.rollout.prompts.chat import check_messages, conversation_ids, text_ids
from steerl.rollout.prompts.held import Held
from steerl.rollout.prompts.sources import Source, prompt_column, read_prompts, refuse_weights
from steerl.rollout.prompts.stream import Stream
from steerl.rollout.prompts.tables import read_table, reader, rows_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steerl.rollout.model.policy import Policy

LOOKED_AT = 1000
"""Prompts that are made into tokens before any work begins: cut ones are counted, and a template may refuse them."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSettings:
    """Where prompts come from, and how long they may be."""

    path: str | list[str | Source] = ""
    """jsonl, json, parquet or csv file, a saved dataset's folder, or a hub name; or a list of such, [a.jsonl, {path: b.jsonl,
    weight: 2}], each with its weight, split, name, column and, for the column `source`, what it is called."""
    split: str = ""
    """Split of a dataset with several; train where it is not given."""
    name: str = ""
    """Configuration of a hub dataset that has several."""
    column: str = ""
    """The column with the prompt; where it is not given the first of prompt, messages, conversations, question, query,
    instruction and text that is there. A conversation whose last message is the assistant's is gone on with; the columns
    tools and chat_template_kwargs go to the chat template."""
    max_tokens: int = 0
    """Most tokens of a prompt; 0 = what the model's context leaves."""
    too_long: Literal["cut", "refuse"] = "cut"
    """cut keeps a longer prompt's last tokens, and the bos before them where the tokenizer puts one; refuse ends the job."""
    limit: int = 0
    """Only the first rows, of several sources each one's; 0 = all."""
    streaming: bool = False
    """Rows are read when their turn comes, from a file or over the network, and never all held."""
    shuffle_buffer: int | None = None
    """Rows of a stream that are held and shuffled at a time: 1,000 where it is not given, 0 for the file's own order."""

    def __post_init__(self) -> None:
        problems = [
            f"prompts.{n}: {getattr(self, n)}, but it must be 0 or more"
            for n in ("max_tokens", "limit", "shuffle_buffer")
            if (getattr(self, n) or 0) < 0
        ]
        if self.shuffle_buffer is not None and not self.streaming:
            problems.append(
                "prompts.shuffle_buffer: has no effect, for all rows are shuffled; set prompts.streaming, or leave it out"
            )
        if self.streaming and not isinstance(self.path, str):
            problems.append("prompts.streaming: true, but prompts.path is a list, whose rows must be counted; give one path")
        if problems:
            raise DataError(*problems)


@dataclass(frozen=True)
class PromptBatch:
    """Tokenized prompts with the dataset rows that they come from."""

    ids: list[list[int]]
    rows: list[int]
    prompts: list[object]
    """As read: a string, or a list of messages."""
    prompt_texts: list[str]
    """As the model sees them, special tokens kept."""
    columns: dict[str, list[object]] = field(default_factory=dict)
    """The dataset's other columns."""
    occurrences: list[int] | None = None
    """How often each row was there before: its samples go on counting, else a row that comes twice would say the same twice."""
    column: str = "prompt"
    """The dataset's column that the prompts stand in."""

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self, at: int, which: int, n: int) -> int:
        """The number of the `which`-th of `n` samples of prompt `at`."""
        return which if self.occurrences is None else self.occurrences[at] * n + which

    def __post_init__(self) -> None:
        for row, ids in zip(self.rows, self.ids, strict=True):
            if not len(ids):
                raise DataError(f"prompts: row {row} has an empty prompt; a model needs at least one token to go on from")

    @staticmethod
    def of_ids(
        ids: Sequence[Sequence[int]], rows: Sequence[int] | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> PromptBatch:
        """Prompts that are token ids already; with a tokenizer their texts are decoded."""
        lists = [[int(i) for i in prompt] for prompt in ids]
        texts = [tokenizer.decode(prompt) if tokenizer else "" for prompt in lists]
        return PromptBatch(lists, list(range(len(lists))) if rows is None else [int(r) for r in rows], list(texts), texts)

    def select(self, index: Sequence[int]) -> PromptBatch:
        return PromptBatch(
            ids=[self.ids[i] for i in index],
            rows=[self.rows[i] for i in index],
            prompts=[self.prompts[i] for i in index],
            prompt_texts=[self.prompt_texts[i] for i in index],
            columns={name: [column[i] for i in index] for name, column in self.columns.items()},
            column=self.column,
        )


BEFORE: dict[str, object] = {f"{section}.streaming": False for section in ("prompts", "heldout")}
"""What settings are in jobs of before there were these."""


class Prompts:
    """A dataset's prompts for one policy. Rows are tokenized when they are asked for."""

    def __init__(
        self, table: Sequence[dict[str, Any]], column: str, policy: Policy, settings: PromptSettings, room: int | None = None
    ):
        self.table, self.column, self.policy, self.settings = _held(table, settings), column, policy, settings
        limits = [limit for limit in (settings.max_tokens, room) if limit]
        self.most = min(limits) if limits else None
        self.others = [name for name in self.table.columns if name != column]
        """The data set's other columns: every batch has them all, with None where a row lacks one."""
        self.cut: dict[int, int] = {}
        """Dataset row -> its tokens before it was cut, of every row that this process has cut so far."""

    def __bool__(self) -> bool:
        return bool(self.table)

    def __len__(self) -> int:
        """Of a stream the rows are counted, which reads them all once."""
        return len(self.table)

    def batch(self, rows: Sequence[int], occurrences: Sequence[int] | None = None) -> PromptBatch:
        """The prompts of these dataset rows, in this order."""
        for row in rows:
            if not self.table.has(row):
                raise DataError(f"prompts: row {row} is asked for, but there are {len(self)} rows")
        records = [self.table[int(row)] for row in rows]
        ids = [self._fit(int(row), self._ids(int(row), record)) for row, record in zip(rows, records, strict=True)]
        return PromptBatch(
            ids=ids,
            rows=[int(row) for row in rows],
            prompts=[record[self.column] for record in records],
            prompt_texts=[self.policy.tokenizer.decode(prompt) for prompt in ids],
            columns={name: [record.get(name) for record in records] for name in self.others},
            occurrences=None if occurrences is None else list(occurrences),
            column=self.column,
        )

    def take(self, seed: int, position: int, count: int) -> list[int]:
        """Dataset rows at positions [position, position + count) of the endless order of `seed`."""
        return self.table.take(seed, position, count)

    def order(self, seed: int, position: int = 0) -> Iterator[int]:
        """The endless order itself, from a position on."""
        while True:
            yield self.take(seed, position, 1)[0]
            position += 1

    def first(self, count: int) -> list[int]:
        """The first `count` rows, or all; of several sources their first ones in turn."""
        return self.table.first(count)

    def fingerprints(self, setting: str) -> dict[str, str]:
        """What the rows are, as a hash; of several sources one each."""
        return self.table.fingerprints(setting)

    def check(self) -> Prompts:
        """Read every prompt once, so that an empty or refused one is found before any work is done; of a stream the first."""
        problems: list[str] = []
        rows = self.table.checked(LOOKED_AT)
        for row in range(rows):
            try:
                record = self.table[row]
                self._check_value(row, record.get(self.column))
                # A template may refuse what it is given, whatever its length.
                looks = row < LOOKED_AT and (self.most or isinstance(record.get(self.column), list))
                if looks or (self.most and self.settings.too_long == "refuse"):
                    self._fit(row, self._ids(row, record), told=True)
            except UserError as problem:
                problems += problem.lines
            if len(problems) >= 5:
                break
        if problems:
            raise DataError(*dict.fromkeys(problems))
        if self.cut:
            looked = "first " if rows >= LOOKED_AT else ""
            self._tell(f"{len(self.cut):,} of the {looked}{min(rows, LOOKED_AT):,} prompts", max(self.cut.values()))
        return self

    def _tell(self, which: str, longest: int) -> None:
        if processes.start().is_main:
            logger.warning(
                "prompts: %s of %s have more than the %s tokens that prompts.max_tokens or the model's context leave (up to "
                "%s); they are cut to their last ones (prompts.too_long refuse ends the job instead)",
                *(which, self.table.called or "the job", f"{self.most:,}", f"{longest:,}"),
            )

    def _check_value(self, row: int, value: object) -> None:
        where = self.table.where(row)
        if value is None or (isinstance(value, (str, list)) and not len(value)):
            raise DataError(f"{where}: the column {self.column!r} is empty; give every row a prompt, or leave the row out")
        if isinstance(value, list):
            check_messages(value, where)
            if not getattr(self.policy.tokenizer, "chat_template", None):
                raise DataError(
                    f"prompts.path: {self.table.called or 'the prompts'} holds conversations, but the tokenizer has no chat "
                    "template; add one to it, or give texts"
                )
        elif not isinstance(value, str):
            raise DataError(
                f"{where}: expected a text or a list of messages, found {type(value).__name__}; choose another prompts.column"
            )

    def _ids(self, row: int, record: dict[str, object]) -> list[int]:
        value, tokenizer = record.get(self.column), self.policy.tokenizer
        self._check_value(row, value)
        if isinstance(value, list):
            given = (record.get("tools"), record.get("chat_template_kwargs"))
            return conversation_ids(tokenizer, value, *given, where=self.table.where(row))
        return text_ids(self.policy, str(value))

    def _fit(self, row: int, ids: list[int], told: bool = False) -> list[int]:
        if self.most is None or len(ids) <= self.most:
            return ids
        if self.settings.too_long == "refuse":
            raise DataError(
                f"prompts: row {row} has {len(ids)} tokens, more than the {self.most} that prompts.max_tokens or the model's "
                "context leave; cut it (prompts.too_long cut) or leave it out"
            )
        if not (told or self.cut):
            self._tell(f"row {row} and maybe others", len(ids))
        self.cut[row] = len(ids)
        bos = [self.policy.tokenizer.bos_token_id]
        first = next((begun for begun in (self._first, bos) if begun and ids[: len(begun)] == begun), [])
        first = first if len(first) < self.most else []
        return [*first, *ids[len(ids) - self.most + len(first) :]]

    @cached_property
    def _first(self) -> list[int]:
        """What the tokenizer puts before every text (bos, [CLS], a language): a model has seen no text without it."""
        ids, plain = (self.policy.tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
        at = next((at for at in range(len(ids)) if ids[at : at + len(plain)] == plain), 0)
        return [int(i) for i in ids[:at]]


def _held(table: Sequence[dict[str, Any]], settings: PromptSettings) -> Held:
    if isinstance(table, Held):
        return table
    if not hasattr(table, "__len__") and hasattr(table, "skip"):  # a data set of `datasets` that streams
        return Stream(rows_of(table), "the prompts", settings.shuffle_buffer, settings.limit)
    return Held(table, settings.path if isinstance(settings.path, str) else "", settings.limit)


def load_prompts(settings: PromptSettings, policy: Policy, max_new_tokens: int = 0, once: str = "") -> Prompts:
    """The prompts of `settings`. With `max_new_tokens` a prompt may only be as long as the context leaves beside them; `once`
    names who has every row once, and so no use for the sources' weights."""
    if once:
        refuse_weights(settings.path, once)
    if not settings.path:
        raise DataError("prompts.path: missing; name a file, a dataset folder or a hub name, --prompts.path FILE")
    table: Sequence[dict[str, Any]]
    if isinstance(settings.path, str):
        path, split, name = settings.path, settings.split, settings.name
        if settings.streaming:
            table = Stream(reader(path, split, name), path, settings.shuffle_buffer, settings.limit)
        else:
            table = read_table(path, split, name)
        if not table:
            raise DataError(f"prompts.path: {settings.path} has no rows")
        column = prompt_column(table, settings.path, settings.column)
    else:
        table, column = read_prompts(settings.path, settings.split, settings.name, settings.column, settings.limit)
    room = None
    if (context := policy.token_budget) is not None:
        room = context if policy.is_seq2seq else context - max_new_tokens
        if room < 1:
            raise DataError(f"sampling.max_new_tokens: {max_new_tokens} leaves no room for a prompt in a context of {context}")
    return Prompts(table, column, policy, settings, room).check()
