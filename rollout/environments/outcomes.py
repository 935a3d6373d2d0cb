"""How a step's episodes went: metrics, a line for what went wrong, and the end of a run whose environment never works."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence

from steerl.rollout.common.errors import UserError, visible
from steerl.rollout.episodes import ENDS, Episode

_GROUPS = 3
"""Kinds of errors that a line names."""
_SHOWN = 100
"""Characters of each."""
_logger = logging.getLogger(__name__)


def tally(episodes: Sequence[Episode]) -> Counter[str]:
    """How many, calls, errors, cut answers, failures, those that were given a reward; `ended_...` by what."""
    turns = [turn for episode in episodes for turn in episode.turns]
    counts = {
        "episodes": len(episodes),
        "tool_calls": sum(turn.calls for turn in turns),
        "tool_errors": sum(len(turn.errors) for turn in turns),
        "cut_answers": sum(turn.cut for turn in turns),
        "failures": sum(bool(episode.failure) for episode in episodes),
        "rewarded": sum(episode.rewards is not None for episode in episodes),
    }
    return Counter(counts | Counter(f"ended_{episode.ended_by}" for episode in episodes))


def environment_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means per episode; what should not happen at all is counted."""
    counts, count = tally(episodes), len(episodes)
    rewards = [math.fsum(rewards) for episode in episodes if (rewards := episode.rewards) is not None]
    found = {
        "turns": sum(len(episode.turns) for episode in episodes) / count,
        **{name: counts[name] / count for name in ("tool_calls", "tool_errors")},
        **{name: float(counts[name]) for name in ("cut_answers", "failures")},
        **({"reward": math.fsum(rewards) / len(rewards)} if rewards else {}),
        **{f"ended_{end}": counts[f"ended_{end}"] / count for end in ENDS},
    }
    return {f"environment/{name}": value for name, value in found.items()}


def look_at(episodes: Sequence[Episode] | None) -> None:
    """Say what went wrong in a step's episodes; if all of them lost their environment, stop."""
    if not episodes:
        return
    failures = [episode.failure for episode in episodes if episode.failure]
    if len(failures) == len(episodes):
        told = f"all {len(failures)} episodes drawn together lost it, the first by {_short(failures[0])}"
        raise UserError(f"environment: {told}; correct it, then go on with --run.resume true")
    if line := trouble(episodes):
        _logger.warning("environment: %s", line)


def trouble(episodes: Sequence[Episode]) -> str:
    """What went wrong, in one line of bounded length; empty where nothing did."""
    failures = [episode.failure for episode in episodes if episode.failure]
    turns = [turn for episode in episodes for turn in episode.turns]
    errors = [error for turn in turns for error in turn.errors]
    calls = max(sum(turn.calls for turn in turns), len(errors))
    parts = []
    if failures:
        parts.append(f"{len(failures)} of {len(episodes)} episodes lost it: {_grouped(failures)}")
    if errors:
        parts.append(f"{len(errors)} of {calls} calls failed: {_grouped(errors)}")
    return "; ".join(parts)


def _grouped(lines: Sequence[str]) -> str:
    """`9 search: TimeoutError: 5 s, 3 add: ...`: alike are those that agree in what stands before the second colon."""
    firsts: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for line in lines:
        kind = ":".join(line.split(":")[:2])
        firsts.setdefault(kind, line)
        counts[kind] += 1
    told = [f"{count} {_short(firsts[kind])}" for kind, count in counts.most_common(_GROUPS)]
    others = len(lines) - sum(count for _, count in counts.most_common(_GROUPS))
    return ", ".join(told) + (f", {others} others" if others else "")


def _short(line: str) -> str:
    text = visible(" ".join(line.split()))
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
