"""Arms x seeds of PPO from one YAML: whole runs, their models measured afresh, a table and a plot with their spread.

    steerl study --config steerl:studies/suppressed --run.dir runs/suppressed

    read, check ──> search: each arm's grid, the best frozen ──> every arm in every seed ──> outcome
    every arm       RUN/search/, search.json, search.md          RUN/<arm>-<seed>/           table.md, results.json, curves.png

A run that is there is left as it is and one that was stopped goes on, so the command may be stopped at any moment and given
again, and given several times at once: the processes share the runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from steerl.configs.reader import run_command, to_mapping

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.common.run_folder import versions, write_json, write_text
from steerl.scripts.studying.curves import plot
from steerl.scripts.studying.plan import Changes, Plan, Run, StudySettings, check, stale


@dataclass(frozen=True)
class StudyPlace:
    """Where a study is written."""

    dir: str = ""
    """The study's folder, with a folder for every run. The same settings go on with what it holds."""


@dataclass(frozen=True)
class StudyJob:
    """Compare settings: every arm in every seed, a table with spread."""

    study: StudySettings
    """What is compared."""
    run: StudyPlace = field(default_factory=StudyPlace)
    """Where it is written."""


def main(job: StudyJob) -> None:
    if processes.start().world_size > 1:
        raise UserError("study: runs have one process each; start `steerl study` itself, several times for several at once")
    folder = Path(job.run.dir)
    if not job.run.dir or (folder.exists() and not folder.is_dir()):
        raise UserError(f"run.dir: {job.run.dir or 'missing'}; name a folder for the study, --run.dir DIR")
    plan = Plan(job.study, folder)
    check(plan)
    with processes.stop_signal() as stop:
        runs = run_study(plan, stop)
    report(plan, runs, job)


def run_study(plan: Plan, stop: processes.Stop) -> dict[str, list[Run]]:
    """The runs of every arm that are reported, all of them there."""
    from steerl.scripts.studying.runs import run_all

    chosen = search(plan, stop)
    runs = {arm: plan.reported(arm, setting) for arm, setting in chosen.items()}
    if lines := [line for arm, of_arm in runs.items() for line in stale(of_arm)]:  # the search chose otherwise than before
        raise ConfigError(*lines)
    # Seed by seed: what is there early is a study of all arms with fewer seeds.
    run_all([run for same_seed in zip(*runs.values(), strict=True) for run in same_seed], plan.study.final, plan.folder, stop)
    return runs


def search(plan: Plan, stop: processes.Stop) -> dict[str, Changes]:
    """The setting of every arm: the best of its grid, by mean final reward; the first of equals."""
    from steerl.scripts.studying.outcome import search_table
    from steerl.scripts.studying.runs import finished, run_all

    grids: dict[str, list[list[Run]]] = {arm: plan.searched(arm) for arm in plan.arms}
    run_all([run for grid in grids.values() for runs in grid for run in runs], plan.study.final, plan.folder, stop)
    chosen: dict[str, Changes] = {}
    told: dict[str, list[dict[str, Any]]] = {}
    for arm, grid in grids.items():
        chosen[arm] = {}
        if not grid:
            continue
        finals = [[finished(run, plan.study.final) or {} for run in runs] for runs in grid]
        found: list[list[Any]] = [[final.get("reward") for final in of_setting] for of_setting in finals]
        # A setting with which a run broke is none to choose.
        means: dict[int, float] = {at: mean(rewards) for at, rewards in enumerate(found) if None not in rewards}
        if not means:
            raise UserError(f"{arm}: with every setting of its search a run broke; the first: {finals[0][0].get('broken')}")
        best = max(means, key=lambda at: means[at])
        chosen[arm] = plan.grid(arm)[best]
        told[arm] = [
            {"setting": setting, "rewards": found[at], "mean": means.get(at), "chosen": at == best}
            for at, setting in enumerate(plan.grid(arm))
        ]
    if told:
        write_json(plan.folder / "search.json", told)
        write_text(plan.folder / "search.md", search_table(told))
    return chosen


def report(plan: Plan, runs: dict[str, list[Run]], job: StudyJob) -> None:
    from steerl.scripts.studying.outcome import outcome, table

    results = {arm: [outcome(run, plan.study) for run in of_arm] for arm, of_arm in runs.items()}
    write_json(plan.folder / "results.json", {"results": results, "study": to_mapping(job), "versions": versions()})
    write_text(plan.folder / "table.md", text := table(results, plan.study))
    print(text)
    print(f"{plan.folder}: table.md, results.json, curves.png; a folder for each run")
    plot(results, plan.folder / "curves.png")


def cli() -> None:
    run_command(main, StudyJob)


if __name__ == "__main__":
    cli()
