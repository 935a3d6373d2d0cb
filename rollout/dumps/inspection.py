"""What a dump holds and whether it is whole, in one pass over its shards with flat memory (a bit per row is kept).

inspect(folder) -> Inspection      every checksum compared; rows counted, doubled and missing ones found
to_text(inspection, width)         a page for a person
"""

from __future__ import annotations

import collections
import heapq
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from steerl.rollout.dumps.manifest import load_manifest, plan_of, standing
from steerl.rollout.dumps.store import read_shard
from steerl.rollout.environments.outcomes import tally
from steerl.rollout.types import STOP_REASONS, Rollout, Samples, Texts

NAMED = 5
"""How many doubled or missing rows are named one by one."""
BINS = 12
"""Bars of the length histogram, at most."""


@dataclass(frozen=True)
class Worst:
    """A row whose two log-probs lie far apart, and where."""

    gap: float
    prompt_index: int
    sample_index: int
    position: int
    behaviour: float
    policy: float
    text: str


@dataclass
class Inspection:
    """Filled in one pass by `inspect`."""

    folder: str
    finished: bool
    shards: int
    expected: int
    """Rows that the finished dump holds."""
    damaged: dict[str, str]
    """File -> what is wrong with it. Its rows are not read and count as missing."""
    absent: int
    """Shards not made yet."""
    rows: int = 0
    tokens: int = 0
    """What the policy drew; lengths and gaps are of these, too."""
    fed: int = 0
    """Tokens of responses that the policy did not draw: tools' results, later user turns."""
    turns: int = 0
    played: collections.Counter[str] = field(default_factory=collections.Counter)
    """Of episodes: outcomes.tally."""
    given: float = 0.0
    """All rewards of environments."""
    shown: list[Samples] = field(default_factory=list)
    """The first episodes, a row each."""
    lengths: collections.Counter[int] = field(default_factory=collections.Counter)
    stops: collections.Counter[str] = field(default_factory=collections.Counter)
    steered: collections.Counter[str] = field(default_factory=collections.Counter)
    doubled: list[tuple[int, int]] = field(default_factory=list)
    """(prompt, sample) of rows that are there more than once, or that the plan does not know."""
    missing: int = 0
    missing_first: list[tuple[int, int]] = field(default_factory=list)
    not_finite: int = 0
    """Tokens whose log-prob is NaN or infinite."""
    gap_sum: float = 0.0
    gap_max: float = 0.0
    worst: list[Worst] = field(default_factory=list)

    @property
    def gap_mean(self) -> float:
        return self.gap_sum / self.tokens if self.tokens else 0.0

    @property
    def whole(self) -> bool:
        """No damage. A dump that is still being made is whole as far as it goes."""
        return not (self.damaged or self.doubled or self.not_finite or (self.missing and self.finished))


def inspect(folder: Path, worst: int = 5, episodes: int = 0) -> Inspection:
    manifest = load_manifest(folder)
    plan = plan_of(manifest)
    state = standing(folder, manifest)
    damaged = {plan.file(index): damage for index, damage in state.damaged.items()}
    dump = Inspection(str(folder), manifest["finished"], len(plan), plan.rows, damaged, len(state.absent))
    seen = np.zeros(plan.rows, dtype=bool)
    for index in sorted(state.whole):
        for rollout, texts in read_shard(folder / plan.file(index)):
            _count(dump, rollout)
            _play(dump, rollout, texts, episodes)
            _mark(dump, seen, rollout, plan.samples)
            _measure_gap(dump, rollout, texts, worst)
    gone = np.flatnonzero(~seen)
    dump.missing = len(gone)
    dump.missing_first = [divmod(int(key), plan.samples) for key in gone[:NAMED]]
    return dump


def _count(dump: Inspection, rollout: Rollout) -> None:
    dump.rows += len(rollout)
    actions = int(rollout.actions_B.sum())
    dump.tokens += actions
    dump.fed += int(rollout.lengths_B.sum()) - actions
    dump.turns += sum(map(len, rollout.turns))
    dump.lengths.update(rollout.actions_B.tolist())
    dump.stops.update(STOP_REASONS[stop] for stop in rollout.stop_B.tolist())
    if rollout.steering:
        dump.steered[rollout.steering] += int((rollout.strength_BK != 0).any(1).sum())


def _play(dump: Inspection, rollout: Rollout, texts: Texts, keep: int) -> None:
    for i, episode in enumerate(texts.episodes or ()):
        dump.played.update(tally([episode]))
        dump.given += math.fsum(episode.rewards or ())
        if len(dump.shown) < keep:
            dump.shown.append(Samples(rollout, texts).select([i]))


def _mark(dump: Inspection, seen: np.ndarray, rollout: Rollout, samples: int) -> None:
    for prompt, sample in zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True):
        key = prompt * samples + sample
        if not (0 <= sample < samples and 0 <= key < len(seen)) or seen[key]:
            dump.doubled.append((prompt, sample))
        else:
            seen[key] = True


def _measure_gap(dump: Inspection, rollout: Rollout, texts: Texts, keep: int) -> None:
    behaviour_BR, policy_BR, mask_BR = rollout.behaviour_logprobs_BR, rollout.policy_logprobs_BR, rollout.action_mask_BR
    finite_BR = behaviour_BR.isfinite() & policy_BR.isfinite()
    dump.not_finite += int((mask_BR & ~finite_BR).sum())
    gap_BR = torch.where(mask_BR & finite_BR, (behaviour_BR - policy_BR).abs(), 0.0)
    dump.gap_sum += float(gap_BR.double().sum())
    gap_B, position_B = gap_BR.max(1)
    dump.gap_max = max(dump.gap_max, float(gap_B.max()))
    for row in gap_B.topk(min(keep, len(rollout))).indices.tolist():
        at = int(position_B[row])
        if rollout.actions_B[row]:
            dump.worst.append(
                Worst(
                    gap=float(gap_B[row]),
                    prompt_index=int(rollout.row_B[row]),
                    sample_index=int(rollout.sample_B[row]),
                    position=at,
                    behaviour=float(behaviour_BR[row, at]),
                    policy=float(policy_BR[row, at]),
                    text=texts.completions[row],
                )
            )
    dump.worst = heapq.nsmallest(keep, dump.worst, key=lambda w: (-w.gap, w.prompt_index, w.sample_index))


# -- for a person ---------------------------------------------------------------------------------------------------


def to_text(dump: Inspection, width: int = 100) -> list[str]:
    state = "finished" if dump.finished else "unfinished"
    made = dump.shards - dump.absent - len(dump.damaged)
    lines = [f"{dump.folder}: {state}, {made} of {dump.shards} shards whole, {dump.rows:,} of {dump.expected:,} rows"]
    lines += [f"  {file} {damage}" for file, damage in dump.damaged.items()]
    if dump.damaged:
        lines.append("  make damaged shards again: dump_rollouts.py with the dump's settings and --run.resume true")
    if dump.doubled:
        lines.append(f"  doubled or unexpected rows: {len(dump.doubled)}, such as {_named(dump.doubled[:NAMED])}")
    if dump.missing:
        lines.append(f"  missing rows: {dump.missing:,}, the first {_named(dump.missing_first)}")
    if dump.not_finite:
        lines.append(f"  tokens whose log-prob is not finite: {dump.not_finite:,}")
    if not dump.rows:
        return lines
    stops = ", ".join(f"{reason} {count:,}" for reason, count in dump.stops.most_common())
    mean = dump.tokens / dump.rows
    lines += ["", f"stop reasons: {stops}"]
    lines += [f"steered by {label}: {count:,} rows" for label, count in dump.steered.items()]
    lines += ["", f"response lengths: {dump.tokens:,} tokens, mean {mean:.1f}, {min(dump.lengths)} to {max(dump.lengths)}"]
    lines += histogram(dump.lengths, width)
    if dump.fed:
        lines.append(f"beside them {dump.fed:,} tokens that rows were fed in between; {dump.turns / dump.rows:.1f} turns a row")
    lines += _played(dump)
    lines += ["", f"gap |behaviour - policy| per token, nats: mean {dump.gap_mean:.2e}, largest {dump.gap_max:.2e}"]
    if dump.gap_max > 0:
        for worst in dump.worst:
            where = f"  prompt {worst.prompt_index} sample {worst.sample_index} token {worst.position}"
            numbers = f"{worst.gap:.2e} ({worst.behaviour:.3f} against {worst.policy:.3f})"
            lines.append(shorten(f"{where}: {numbers} {worst.text!r}", width))
    return lines


def _played(dump: Inspection) -> list[str]:
    played, count = dump.played, dump.played["episodes"]
    if not count:
        return []
    ends = ", ".join(f"{name.removeprefix('ended_')} {n:,}" for name, n in played.most_common() if name.startswith("ended_"))
    calls = f"{played['tool_calls']:,} calls, {played['tool_errors']:,} failed; {played['cut_answers']:,} answers cut"
    lines = ["", f"episodes: {count:,}, ended by {ends}; {calls}; {played['failures']:,} lost their environment"]
    if given := played["rewarded"]:
        lines.append(f"the environment's reward: mean {dump.given / given:.4f} of {given:,} episodes")
    return lines


def histogram(lengths: collections.Counter[int], width: int = 100) -> list[str]:
    low, high = min(lengths), max(lengths)
    step = max(1, math.ceil((high - low + 1) / BINS))
    bins: collections.Counter[int] = collections.Counter()
    for length, count in lengths.items():
        bins[(length - low) // step] += count
    tallest, room = max(bins.values()), max(width - 30, 10)
    lines = []
    for index in range((high - low) // step + 1):
        first, last = low + index * step, min(low + (index + 1) * step - 1, high)
        label = f"{first}" if first == last else f"{first}-{last}"
        bar = "#" * math.ceil(room * bins[index] / tallest)
        lines.append(f"  {label:>13} {bins[index]:>9,} {bar}")
    return lines


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 3, 1)] + "..."


def _named(keys: list[tuple[int, int]]) -> str:
    return ", ".join(f"(prompt {prompt}, sample {sample})" for prompt, sample in keys)


def to_json(dump: Inspection) -> dict[str, object]:
    """The same for programs."""
    return {
        "folder": dump.folder,
        "finished": dump.finished,
        "whole": dump.whole,
        "shards": dump.shards,
        "damaged": dump.damaged,
        "rows": dump.rows,
        "expected": dump.expected,
        "missing": dump.missing,
        "doubled": len(dump.doubled),
        "tokens": dump.tokens,
        "fed_tokens": dump.fed,
        "turns": dump.turns,
        **({"environment": {**dump.played, "reward": dump.given}} if dump.played else {}),
        "lengths": {str(length): dump.lengths[length] for length in sorted(dump.lengths)},
        "stop_reasons": dict(dump.stops),
        "steered": dict(dump.steered),
        "not_finite": dump.not_finite,
        "gap": {"mean": dump.gap_mean, "max": dump.gap_max},
        "worst": [vars(worst) for worst in dump.worst],
    }
