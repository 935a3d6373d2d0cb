"""What a report shows of a dump: counts of all its rows, and some of the rows themselves, with their scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from steerl.reward.jobs.selection import read_scores, score_files
from steerl.rollout.dumps.manifest import load_manifest, plan_of
from steerl.rollout.model.auto_classes import load_tokenizer
from steerl.rollout.prompts.chat import Speller
from steerl.rollout.types import STOP_REASONS, Rollout, Texts
from steerl.training.report.run_data import ROW_STRENGTH, ReportRun, SampleView, shown_episode

BINS = 24
"""Bars of the histogram of lengths, at most."""


def read_dump_folder(path: Path, name: str, most: int) -> ReportRun:
    """Counts of all rows; of the rows themselves at most `most`, spread evenly."""
    from steerl.rollout.dumps.store import read_dump

    manifest = load_manifest(path)
    decode, scores = _decoder(path / "tokenizer"), _scores(path)
    stride = max(1, math.ceil(plan_of(manifest).rows / most)) if most else 0
    lengths: Counter[int] = Counter()
    stops: Counter[str] = Counter()
    turns: Counter[int] = Counter()
    ends: Counter[str] = Counter()
    rows: list[SampleView] = []
    position = 0
    for rollout, texts in read_dump(path):
        lengths.update(rollout.actions_B.tolist())
        stops.update(STOP_REASONS[stop] for stop in rollout.stop_B.tolist())
        turns.update(len(episode.turns) for episode in texts.episodes or ())
        ends.update(episode.ended_by for episode in texts.episodes or ())
        for i in range(len(rollout)):
            if stride and (position + i) % stride == 0:
                rows.append(_dumped(rollout, texts, i, decode, scores))
        position += len(rollout)
    bars = [_histogram(f"response length, tokens: {name}", lengths), _counted(f"how responses end: {name}", stops)]
    if turns:
        bars += [_histogram(f"turns of an episode: {name}", turns), _counted(f"what ends episodes: {name}", ends)]
    return ReportRun(
        name=name,
        rows=rows,
        config=_yaml(manifest["config"]),
        versions=versions if isinstance(versions := manifest.get("versions"), dict) else {},
        summary={"rows": position, "rows shown": len(rows), "tokens": sum(n * count for n, count in lengths.items())},
        bars=bars,
    )


def _dumped(
    rollout: Rollout, texts: Texts, i: int, decode: Callable[[int], str], scores: Mapping[tuple[int, int], Mapping[str, object]]
) -> SampleView:
    length, prompt_ids = int(rollout.lengths_B[i]), rollout.prompt_BP[i][rollout.prompt_mask_BP[i]].tolist()
    ids = rollout.response_BR[i, :length].tolist()
    action_mask = rollout.action_mask_BR[i, :length].tolist()

    def drawn(values_R: Tensor) -> list[float | None]:
        """None at what was fed, where the stored 0 means nothing."""
        return [value if own else None for value, own in zip(_floats(values_R[:length]), action_mask, strict=True)]

    policy, behaviour = drawn(rollout.policy_logprobs_BR[i]), drawn(rollout.behaviour_logprobs_BR[i])
    strengths = _floats(rollout.strength_BK[i])
    turns, played = shown_episode(None if texts.episodes is None else texts.episodes[i])
    gap = [None if b is None or p is None else round(b - p, 6) for b, p in zip(behaviour, policy, strict=True)]
    identity = (int(rollout.row_B[i]), int(rollout.sample_B[i]))
    facts = {
        "step": int(rollout.policy_step_B[i]),
        "row": identity[0],
        "sample": identity[1],
        **scores.get(identity, {}),
        "gap": max((abs(value) for value in gap if value is not None), default=0.0),
        "length": sum(action_mask),
        **({} if all(action_mask) else {"fed": length - sum(action_mask)}),
        "stop_reason": STOP_REASONS[int(rollout.stop_B[i])],
        **played,
        "temperature": rollout.temperature,
        "steering": rollout.steering,
        "strength": dict(enumerate(strengths)) if len(strengths) > 1 else (strengths or [0.0])[0],
        **({"columns": {key: values[i] for key, values in texts.columns.items()}} if texts.columns else {}),
    }
    names = [ROW_STRENGTH] if len(strengths) == 1 else [f"{ROW_STRENGTH}, site {site}" for site in range(len(strengths))]
    steered = {name: [strength] * length for name, strength in zip(names, strengths, strict=True)}
    return SampleView(
        prompt_text=texts.prompt_texts[i],
        completion=texts.completions[i],
        prompt_ids=prompt_ids,
        prompt_tokens=[decode(token) for token in prompt_ids],
        ids=ids,
        texts=[decode(token) for token in ids],
        facts=facts,
        action_mask=[] if all(action_mask) else action_mask,
        turns=turns,
        quantities={"policy_logprobs": policy, "behaviour_logprobs": behaviour, "gap": gap, **steered},
    )


def _scores(path: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """(prompt, sample) -> reward and parts, where scores lie beside the dump."""
    if not score_files(path):
        return {}
    plan = plan_of(load_manifest(path))
    columns = {name: [_float(value) for value in column.astype("float32")] for name, column in read_scores(path, plan).items()}
    scores = {}
    for key in range(plan.rows):
        parts = {name: values[key] for name, values in columns.items() if name != "total" and values[key] is not None}
        reward = columns["total"][key] if "total" in columns else None
        scores[divmod(key, plan.samples)] = {"reward": reward, "parts": parts}
    return scores


def _decoder(folder: Path) -> Callable[[int], str]:
    """The text of a token by itself; its number where the dump holds no tokenizer."""
    if not folder.is_dir():
        return str
    return Speller(load_tokenizer(str(folder), "tokenizer of the dump")).token


def _counted(title: str, counts: Counter[str]) -> dict[str, object]:
    return {"title": title, "labels": list(counts), "counts": list(counts.values())}


def _histogram(title: str, lengths: Counter[int]) -> dict[str, object]:
    low, high = min(lengths, default=0), max(lengths, default=0)
    width = max(1, math.ceil((high - low + 1) / BINS))
    counts = [0] * math.ceil((high - low + 1) / width)
    for length, count in lengths.items():
        counts[(length - low) // width] += count
    labels = [
        str(low + i * width) if width == 1 else f"{low + i * width}-{low + (i + 1) * width - 1}" for i in range(len(counts))
    ]
    return {"title": title, "labels": labels, "counts": counts}


def _floats(values: Tensor) -> list[float | None]:
    return [_float(value) for value in values.numpy()]


def _float(value: Any) -> float | None:
    """The shortest decimal that is this float32; JSON has no NaN and no infinities."""
    return float(str(value)) if math.isfinite(value) else None


def _yaml(value: object) -> str:
    import yaml

    return str(yaml.safe_dump(value, sort_keys=False, allow_unicode=True)) if value else ""
