"""What the formats are made of: the rows of a dump with their scores, or the samples that a run has recorded.

    dump: rollouts-*.parquet + scores-*.parquet --'
    run:  samples.jsonl                         --'--> Source: what it is of, and its Records, one at a time, as often as asked

A format is a module of its own that takes a Source and yields or writes what its tool reads.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from steerl.reward.jobs.selection import read_whole_scores, score_files
from steerl.rollout.common.errors import DataError
from steerl.rollout.common.yaml_files import load_text
from steerl.rollout.dumps.manifest import MANIFEST, load_manifest, plan_of
from steerl.rollout.dumps.store import read_dump
from steerl.rollout.episodes import Episode
from steerl.rollout.prompts.chat import answered, continued, continues, template_tools
from steerl.rollout.types import STOP_REASONS, Rollout, Texts
from steerl.training.formats.messages import plain
from steerl.training.report.run_data import lines_of
from steerl.training.run.log import METRICS, SAMPLES

NO_SCORES = "none"
_KEPT = (
    *("row", "sample", "step", "prompt", "prompt_text", "completion", "reward", "parts", "episode", "action_mask"),
    *("prompt_ids", "prompt_tokens", "response_ids", "response_tokens"),
)
"""Fields of a sample that have a place of their own in a Record."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row: what was asked and said, its ids, its numbers per token, its rewards, and what else is one value for it."""

    id: str
    """Of its own among the records of a source; ASCII."""
    row: int
    sample: int
    prompt: str | list[dict[str, Any]]
    """As read: a text or a conversation."""
    prompt_text: str
    completion: str
    prompt_ids: list[int]
    ids: list[int]
    """All that follows the prompt."""
    action_mask: list[bool]
    """False at what was fed."""
    numbers: dict[str, list[float | None]]
    """Per token of `ids`, None at what was fed: log-probs, advantages, values, ..."""
    reward: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    columns: dict[str, Any] = field(default_factory=dict)
    """The data set's other columns, as JSON values."""
    facts: dict[str, Any] = field(default_factory=dict)
    """One value for the row: step, ended, stop_reason, temperature, steering, strength, ..."""
    episode: Episode | None = None
    tools: list[Any] = field(default_factory=list)
    """Schemas: the data's, then the environment's."""

    @cached_property
    def said(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(the prompt, what follows it) as messages; a text is the user's, its completion the assistant's."""
        nothing = [{"role": "assistant", "content": ""}]  # an environment that was gone before the first turn
        if isinstance(self.prompt, str):
            after = [{"role": "assistant", "content": self.completion}] if self.episode is None else self.episode.messages
            return [{"role": "user", "content": self.prompt}], plain(after or nothing)
        extra = self.columns.get("chat_template_kwargs")
        if self.episode is None:
            whole = answered(self.prompt, self.completion, extra, self.prompt_text)
        else:
            whole = continued(self.prompt, self.episode.messages, extra, self.prompt_text)
        before = len(self.prompt) - continues(self.prompt, extra)
        return plain(whole[:before]), plain(whole[before:] or nothing)

    def drawn(self, name: str) -> list[float] | None:
        """A number of every action; None where they are not all known."""
        values = self.numbers.get(name)
        found = [v for v, own in zip(values or [], self.action_mask, strict=bool(values)) if own and v is not None]
        return found if values is not None and len(found) == sum(self.action_mask) else None

    @property
    def about(self) -> dict[str, Any]:
        """What a format keeps as metadata."""
        where = {"prompt_index": self.row, "sample_index": self.sample, **self.facts}
        return where | ({"columns": self.columns} if self.columns else {})


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dump or a run."""

    kind: str
    folder: Path
    model: str
    data: str
    config: dict[str, Any]
    versions: dict[str, str]
    changed: float
    """When it was written last, in seconds since 1970."""
    rows: int
    read: Callable[[], Iterator[Record]]

    @property
    def key(self) -> str:
        """Tells it from others of the same name, where a tool reads several exports."""
        return hashlib.sha256(f"{self.folder.resolve()} {self.changed}".encode()).hexdigest()[:16]


def source_of(folder: Path, scores: str | None) -> Source:
    """A UserError where it is neither, or holds nothing that can be exported."""
    if (folder / MANIFEST).is_file():
        return _dump(folder, scores)
    if not (folder / METRICS).is_file() and not (folder / SAMPLES).is_file():
        what = f"holds neither {MANIFEST} (a dump) nor {METRICS} (a run)" if folder.is_dir() else "is not a folder"
        raise DataError(f"{folder}: {what}; name what steerl dump or steerl ppo wrote")
    if scores is not None:
        raise DataError(f"scores: {scores}, but {folder} is a run, whose samples have their rewards; leave it out")
    return _run(folder)


def _source(kind: str, folder: Path, config: object, **others: Any) -> Source:
    settings: dict[str, Any] = plain(config) if isinstance(config, dict) else {}

    def setting(section: str) -> str:
        inner = settings.get(section)
        value = inner.get("path") if isinstance(inner, dict) else None
        value = value if isinstance(value, str) else ""
        return Path(value).name if Path(value).is_absolute() else value  # a file that is passed on names no one's folders

    return Source(kind=kind, folder=folder, model=setting("model"), data=setting("prompts"), config=settings, **others)


# -- a dump ---------------------------------------------------------------------------------------------------------------


def _dump(folder: Path, scores: str | None) -> Source:
    manifest = load_manifest(folder)
    plan = plan_of(manifest)
    environment = plain(manifest.get("tools") or [])
    columns: dict[str, np.ndarray] = {}
    if scores != NO_SCORES and (scores is not None or score_files(folder)):
        columns = read_whole_scores(Path(scores or folder), plan, "total")

    def read() -> Iterator[Record]:
        for rollout, texts in read_dump(folder):
            for i in range(len(rollout)):
                key = int(rollout.row_B[i]) * plan.samples + int(rollout.sample_B[i])
                of_row = {name: float(values[key]) for name, values in columns.items()}
                yield _dumped(rollout, texts, i, of_row, environment)

    return _source(
        *("dump", folder, manifest["config"]),
        versions=manifest.get("versions") or {},
        changed=(folder / MANIFEST).stat().st_mtime,
        rows=plan.rows,
        read=read,
    )


def _dumped(rollout: Rollout, texts: Texts, i: int, scores: Mapping[str, float], environment: Sequence[Any]) -> Record:
    length = int(rollout.lengths_B[i])
    mask = rollout.action_mask_BR[i, :length].tolist()

    def drawn(values_BR: Tensor) -> list[float | None]:
        return [value if own else None for value, own in zip(values_BR[i, :length].tolist(), mask, strict=True)]

    episode = None if texts.episodes is None else texts.episodes[i]
    given = None if episode is None or episode.rewards is None else sum(episode.rewards)
    strengths = rollout.strength_BK[i].tolist()
    row, sample = int(rollout.row_B[i]), int(rollout.sample_B[i])
    columns = plain({name: values[i] for name, values in texts.columns.items()})
    tools = template_tools(columns.pop("tools", None)) if isinstance(texts.prompts[i], list) else []
    return Record(
        id=f"{row}-{sample}",
        row=row,
        sample=sample,
        prompt=plain(texts.prompts[i]),
        prompt_text=plain(texts.prompt_texts[i]),
        completion=plain(texts.completions[i]),
        prompt_ids=rollout.prompt_BP[i][rollout.prompt_mask_BP[i]].tolist(),
        ids=rollout.response_BR[i, :length].tolist(),
        action_mask=mask,
        numbers={
            "behaviour_logprobs": drawn(rollout.behaviour_logprobs_BR),
            "policy_logprobs": drawn(rollout.policy_logprobs_BR),
        },
        reward=scores.get("total", given),
        parts={plain(name): value for name, value in scores.items() if name != "total" and value == value},
        columns=columns,
        facts={
            "step": int(rollout.policy_step_B[i]),
            "ended": bool(rollout.ended_B[i]),
            "stop_reason": STOP_REASONS[int(rollout.stop_B[i])],
            "temperature": rollout.temperature,
            "steering": rollout.steering,
            "strength": float(rollout.strength_B[i]),
            **({"strengths": strengths} if len(strengths) > 1 else {}),
        },
        episode=None if episode is None else Episode.of_json(plain(dataclasses.asdict(episode))),
        tools=[*tools, *environment],
    )


# -- a run ----------------------------------------------------------------------------------------------------------------


def _run(folder: Path) -> Source:
    path = folder / SAMPLES
    rows = 0
    if path.is_file():
        with path.open("rb") as file:
            rows = sum(bool(line.strip()) for line in file)
    if not rows:
        raise DataError(f"{path}: no sample in it; a run records some of its rows with ppo.samples 1 or more")
    config = (folder / "config.yaml").read_text(encoding="utf-8") if (folder / "config.yaml").is_file() else ""
    return _source(
        *("run", folder, load_text(config, "config.yaml", [])),
        versions={},
        changed=path.stat().st_mtime,
        rows=rows,
        read=lambda: (_sampled(path, number, line) for number, line in enumerate(lines_of(path), 1)),
    )


def _sampled(path: Path, number: int, line: Mapping[str, Any]) -> Record:
    """A line of samples.jsonl. Its number is in the id: a row may be the best and a random one at once."""
    try:
        line = plain(line)
        ids = line["response_ids"]
        mask = line.get("action_mask") or [True] * len(ids)
        numbers = {
            name: values
            for name, values in line.items()
            if isinstance(values, list) and len(values) == len(ids) and name not in (*_KEPT, "strengths")
        }
        rest = {n: v for n, v in line.items() if n not in (*_KEPT, *numbers)}
        return Record(
            id=f"step{line['step']}-{number}",
            row=line["row"],
            sample=line["sample"],
            prompt=line["prompt"],
            prompt_text=line["prompt_text"],
            completion=line["completion"],
            prompt_ids=line["prompt_ids"],
            ids=ids,
            action_mask=mask,
            numbers=numbers,
            reward=line.get("reward"),
            parts={name: value for name, value in (line.get("parts") or {}).items() if value is not None},
            facts={"step": line["step"], **{name: value for name, value in rest.items() if value is not None}},
            episode=Episode.of_json(line["episode"]) if line.get("episode") else None,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: line {number} is no sample of a run ({type(error).__name__}: {error}); take it out"
        ) from error
