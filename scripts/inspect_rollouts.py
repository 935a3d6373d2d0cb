"""What a dump holds, and whether it is whole.

steerl inspect DIR                 status 1 where it is damaged
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from steerl.configs.reader import run_command

from steerl.rollout.common.errors import UserError, visible
from steerl.rollout.dumps.manifest import load_manifest, plan_of
from steerl.rollout.episodes import Turn

if TYPE_CHECKING:
    from steerl.rollout.types import Samples


@dataclass(frozen=True)
class InspectJob:
    """Counts, lengths, stop reasons, log-prob gap, doubled and missing rows, scores, worst rows."""

    dir: str = field(metadata={"positional": True})
    """The dump: the folder that dump_rollouts.py wrote."""
    scores: str | None = None
    """The folder of its scores; none: the dump's own."""
    worst: int = 5
    """Rows with the largest log-prob gap that are shown."""
    episodes: int = 2
    """Episodes that are shown turn by turn, where an environment took part: the first ones."""
    json: bool = False
    """Print one JSON object instead of a page."""

    def __post_init__(self) -> None:
        for name in ("worst", "episodes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}: {getattr(self, name)}, but it must be 0 or more")


def score_lines(folder: Path, dump: Path) -> dict[str, dict[str, float]]:
    """Part -> rows, mean, std, min, max; nothing where the dump has no scores."""
    import numpy as np

    from steerl.reward.jobs.selection import read_scores, score_files

    columns = read_scores(folder, plan_of(load_manifest(dump))) if score_files(folder) else {}
    summary = {}
    for name, column in columns.items():
        values = column[~np.isnan(column)]
        if len(values):
            numbers = {"mean": values.mean(), "std": values.std(), "min": values.min(), "max": values.max()}
            summary[name] = {"rows": len(values), **{key: float(value) for key, value in numbers.items()}}
    return summary


def episode_lines(samples: Samples) -> list[str]:
    """An episode turn by turn, each turn with how many tokens it has and how likely the policy was to say it."""
    from steerl.rollout.chat import episodes

    rollout = samples.rollout

    def said(turn: Turn) -> str:
        likely = float(rollout.policy_logprobs_BR[0, turn.first : turn.end].double().sum())
        return f"{visible(turn.text)}  ({turn.end - turn.first} tokens, log-prob {likely:.2f})"

    name = f"prompt {int(rollout.row_B[0])} sample {int(rollout.sample_B[0])}"
    return [f"episode of {name}", *episodes.lines(samples, 0, said)]


def main(job: InspectJob) -> None:
    from steerl.rollout.dumps.inspection import inspect, to_json, to_text

    dump = Path(job.dir)
    found = inspect(dump, job.worst, job.episodes)
    scores = score_lines(Path(job.scores or job.dir), dump)
    if job.json:
        print(json.dumps({**to_json(found), "scores": scores}, ensure_ascii=False))
    else:
        print(visible("\n".join(to_text(found, shutil.get_terminal_size((100, 24)).columns))))
        for name, numbers in scores.items():
            spread = f"mean {numbers['mean']:.4f}, std {numbers['std']:.4f}, {numbers['min']:.4f} to {numbers['max']:.4f}"
            print(visible(f"score {name}: {numbers['rows']:,} rows, {spread}"))
        for samples in found.shown:
            print("\n".join(["", *episode_lines(samples)]))
    if not found.whole:
        for file, damage in found.damaged.items():
            print(visible(f"{dump / file}: {damage}"), file=sys.stderr)
        raise SystemExit(1)


def cli() -> None:
    run_command(main, InspectJob)


if __name__ == "__main__":
    cli()
