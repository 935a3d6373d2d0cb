"""What a report shows, and how it is read from a run's folder: metrics.jsonl, samples.jsonl, config, summary, versions.

A torn last line, which a killed run leaves, is passed over with a word; any other bad line is named.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import DataError
from steerl.rollout.common.yaml_files import load_text
from steerl.rollout.episodes import Episode
from steerl.training.run.log import METRICS, SAMPLES, log_line

_HEADS = ("step", "row", "sample", "kind", "reward", "kl", "gap", "length")
_TEXTS = (
    "prompt",
    "prompt_text",
    "completion",
    "prompt_ids",
    "prompt_tokens",
    "response_ids",
    "response_tokens",
    "action_mask",
    "episode",
)
ROW_STRENGTH = "steering strength of the row"


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """One sample as the viewer shows it."""

    prompt_text: str
    completion: str
    prompt_ids: list[int]
    prompt_tokens: list[str]
    ids: list[int]
    texts: list[str]
    facts: dict[str, Any]
    """What is one value for the row: step, row, sample, reward and its parts, KL, ..."""
    quantities: dict[str, list[float | None]]
    """What is a number for every response token; None at those that the policy did not draw."""
    action_mask: list[bool] = field(default_factory=list)
    """False at tokens that the row was fed; empty where the policy drew them all."""
    turns: list[dict[str, Any]] = field(default_factory=list)
    """Of an episode: first, end, reward, calls, errors, cut. What the policy was told then are the tokens up to the next."""

    def tokens(self) -> dict[str, object]:
        return {
            "prompt_ids": self.prompt_ids,
            "prompt_tokens": self.prompt_tokens,
            "ids": self.ids,
            "tokens": self.texts,
            "facts": self.facts,
            "quantities": self.quantities,
            "action_mask": self.action_mask,
            "turns": self.turns,
        }


@dataclass(frozen=True, kw_only=True)
class ReportRun:
    """A run or a dump."""

    name: str
    steps: list[int] = field(default_factory=list)
    metrics: dict[str, list[float | None]] = field(default_factory=dict)
    """Metric -> a value for every step, None where the step does not have it."""
    rows: list[SampleView] = field(default_factory=list)
    config: str = ""
    kl_target: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    summary: dict[str, object] = field(default_factory=dict)
    bars: list[dict[str, object]] = field(default_factory=list)
    """Histograms of a dump."""
    ends: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Metric -> (step, value) of the evaluations before the first step and after the last, which stand in the summary."""

    def heads(self) -> dict[str, list[object]]:
        """What samples are found and sorted by, as columns."""
        kept: dict[str, list[object]] = {name: [row.facts.get(name) for row in self.rows] for name in _HEADS}
        for name, values in kept.items():
            kind: Callable[[object], bool] = _is_number if name != "kind" else lambda value: isinstance(value, str)
            kept[name] = [value if kind(value) else None for value in values]
        return kept

    def examples(self, each: int = 3) -> list[list[object]]:
        """Responses at the first and at the last step that has samples: random ones where they are marked."""
        steps = sorted({int(row.facts["step"]) for row in self.rows})
        rows_shown = []
        for step in dict.fromkeys(steps[:1] + steps[-1:] if self.steps else []):
            rows = [row for row in self.rows if row.facts.get("step") == step]
            rows = [row for row in rows if row.facts.get("kind") == "random"] or rows
            rows_shown += [[step, row.facts.get("reward"), row.prompt_text, row.completion] for row in rows[:each]]
        return rows_shown


# -- a run ----------------------------------------------------------------------------------------------------------------


def read_run(path: Path, name: str) -> ReportRun:
    lines = read_lines(path / METRICS)
    steps, metrics = columns(lines)
    rows = [view_of(line) for line in (read_lines(path / SAMPLES) if (path / SAMPLES).is_file() else [])]
    summary = {"steps": max(steps, default=0)} | read_json(path / "summary.json") if (path / "summary.json").is_file() else {}
    about = run_of(name, _text(path / "config.yaml"), summary, read_json(path / "versions.json"))
    return replace(about, steps=steps, metrics=metrics, rows=rows)


def run_of(name: str, config: str, summary: Mapping[str, Any], versions: Mapping[str, Any]) -> ReportRun:
    """What lies beside a run's metrics and samples."""
    return ReportRun(
        name=name,
        config=config,
        kl_target=setting(config, "ppo", "kl_target"),
        versions={str(key): str(value) for key, value in versions.items()},
        summary={key: value for key, value in summary.items() if not isinstance(value, dict | list)},
        ends=_ends(summary),
    )


def columns(lines: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, list[float | None]]]:
    """Lines of metrics.jsonl, by parse_line, as (steps, metric -> values)."""
    plain = (int, float)  # not bool; parse_line leaves no infinity
    keys = dict.fromkeys(key for line in lines for key, value in line.items() if type(value) in plain)
    keys.pop("step", None)
    values = {key: [value if type(value := line.get(key)) in plain else None for line in lines] for key in keys}
    return [int(line["step"]) for line in lines], values


def _ends(summary: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """NAME_before and NAME_after of the summary are points of eval/NAME; the KL of a policy to itself, before, is 0."""
    found: dict[str, list[tuple[int, float]]] = {}
    if not _is_number(steps := summary.get("steps")):
        return found
    before = {"kl_before": 0.0} if _is_number(summary.get("reward_before")) else {}
    for key, value in (before | dict(summary)).items():
        name, _, when = key.rpartition("_")
        if _is_number(value) and when in ("before", "after"):
            found.setdefault(f"eval/{name}", []).append((0 if when == "before" else int(steps or 0), float(value)))
    return {key: sorted(points) for key, points in found.items()}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return list(lines_of(path))


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a jsonl file, one at a time. A last line without an end was being written when the run was killed."""
    with path.open("rb") as file:  # a text's other line ends, which JSON does not escape, end no line
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield parse_line(line.decode("utf-8", "replace"))
            except ValueError as error:
                if not file.read().strip():
                    log_line(f"{path}: its last line was cut short, by a kill or a full disk, and is left out")
                    break
                raise DataError(f"{path}: line {number} is not one that a run writes ({error}); take it out") from error


def parse_line(line: str) -> dict[str, Any]:
    """The object of a line that a run wrote, with None for NaN and infinities; ValueError where it is none."""
    try:
        value = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("lists in lists without end") from error
    if not isinstance(value, dict) or not _is_number(value.get("step")):
        raise ValueError("no object with a step")
    return value


def view_of(line: Mapping[str, Any]) -> SampleView:
    """The sample that a line of samples.jsonl holds; ValueError where it is none."""
    try:
        return _view(line)
    except (TypeError, AttributeError, LookupError) as error:
        raise ValueError(f"no sample of a run: {error}") from error


def _view(line: Mapping[str, Any]) -> SampleView:
    ids = list(line.get("response_ids") or [])
    texts = list(line.get("response_tokens") or map(str, ids))
    quantities = {
        key: [value if _is_number(value) else None for value in values]
        for key, values in line.items()
        if key not in _TEXTS and isinstance(values, list) and len(values) == len(ids)
    }
    policy, reference = quantities.get("policy_logprobs"), quantities.get("reference_logprobs")
    if policy and reference:
        quantities["reference gap"] = [_minus(a, b) for a, b in zip(policy, reference, strict=True)]
    if line.get("steering"):
        quantities[ROW_STRENGTH] = [line.get("strength")] * len(ids)
    facts = {key: value for key, value in line.items() if key not in _TEXTS and not isinstance(value, list)}
    action_mask = list(line.get("action_mask") or [])
    facts.setdefault("length", sum(action_mask) if action_mask else len(ids))
    turns, played = shown_episode(Episode.of_json(line["episode"]) if line.get("episode") else None)
    facts |= played
    if "gap" in quantities:
        facts["gap"] = max((abs(value) for value in quantities["gap"] if value is not None), default=None)
    prompt_ids = list(line.get("prompt_ids") or [])
    return SampleView(
        prompt_text=str(line.get("prompt_text", line.get("prompt", ""))),
        completion=str(line.get("completion", "")),
        prompt_ids=prompt_ids,
        prompt_tokens=list(line.get("prompt_tokens") or map(str, prompt_ids)),
        ids=ids,
        texts=texts,
        facts=facts,
        quantities=quantities,
        action_mask=action_mask,
        turns=turns,
    )


def shown_episode(episode: Episode | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(its turns as the viewer shows them, what is one value for the whole); nothing where there is none."""
    if episode is None:
        return [], {}
    turns = []
    for turn in episode.turns:
        made = [call.get("function", call) for call in (turn.message or {}).get("tool_calls") or []]
        calls = [f"{call.get('name')} {json.dumps(call.get('arguments'), ensure_ascii=False)}" for call in made]
        shown = {name: getattr(turn, name) for name in ("first", "end", "reward", "cut")}
        turns.append({**shown, "calls": calls, "errors": list(turn.errors)})
    facts = {
        "turns": len(turns),
        "ended_by": episode.ended_by,
        "environment_reward": None if episode.rewards is None else math.fsum(episode.rewards),
        "failure": episode.failure,
        "environment": {n: v if isinstance(v, str) else json.dumps(v) for n, v in episode.state.items()},
    }
    return turns, {name: value for name, value in facts.items() if value not in (None, "", {})}


def _minus(a: float | None, b: float | None) -> float | None:
    # six digits, as the numbers it comes from
    return None if a is None or b is None else round(a - b, 6)


# -- small things -----------------------------------------------------------------------------------------------------------


def _is_number(value: object) -> bool:
    return (type(value) is int and abs(value) < 2**1023) or (isinstance(value, float) and math.isfinite(value))


def _finite(digits: str) -> float | None:
    return number if -_LARGEST <= (number := float(digits)) <= _LARGEST else None  # faster than math.isfinite, and called often


_LARGEST = sys.float_info.max


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or nothing where the file is absent; one that cannot be read is named."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); the job that writes it makes it again") from error
    return value if isinstance(value, dict) else {}


def setting(config: str, *names: str) -> float | None:
    """A number of the run's settings."""
    value: object = load_text(config, "config.yaml", [])
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return float(value) if _is_number(value) else None  # type: ignore[arg-type]
