"""A study's settings, the jobs that its arms and seeds are, and all that can be found wrong with them before the first begins.

base <- changes <- an arm's changes <- one setting of its grid <- seed, folder: a PPOJob, read as `steerl ppo` reads files
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from steerl.configs.reader import read_layers, to_mapping

from steerl.reward.build import read_terms
from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.common.yaml_files import load_yaml
from steerl.rollout.prompts.tables import read_table
from steerl.scripts.train_ppo import PPOJob, learnable

Changes = dict[str, object]
OWN = ("run.dir", "run.seed", "run.resume", "run.overwrite", "run.allow_changes", "sampling.seed", "dry_run")
"""Settings of a job that the study says."""


@dataclass(frozen=True)
class FinalSettings:
    """What is measured on the model that each run left, loaded afresh."""

    prompts: str = ""
    """Held-out prompts; empty = the job's own: heldout.path, else prompts.path."""
    samples: int = field(default=512, metadata={"low": 1})
    """At least so many answers, equally many of each prompt; of more prompts, the first so many, one of each."""
    measures: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    """Further rewards, name -> a list as `reward` has it: measured beside the job's own, and learned from by nobody."""


@dataclass(frozen=True)
class StudySettings:
    """Arms x seeds of one job."""

    base: str | dict[str, object]
    """The job that all arms share: a YAML file, as `steerl ppo --config` takes it, or a mapping."""
    arms: dict[str, dict[str, object] | None]
    """Name -> what the arm changes, laid over the base as a second --config file is; `search` in it is a grid of its own."""
    changes: dict[str, object] = field(default_factory=dict)
    """Laid over the base for every arm."""
    seeds: int = field(default=5, metadata={"low": 1})
    """Runs of every arm."""
    first_seed: int = field(default=0, metadata={"low": 0})
    """Seeds are run.seed and sampling.seed: this one and the following."""
    search: dict[str, list[object]] = field(default_factory=dict)
    """Grid, setting -> values: every arm runs each combination; the best by mean final reward is what its seeds then run."""
    search_seeds: int = field(default=2, metadata={"low": 1})
    """Runs of every combination."""
    first_search_seed: int = field(default=100, metadata={"low": 0})
    """Settings are chosen on other seeds than those that are reported."""
    only: list[str] = field(default_factory=list)
    """Only these arms; empty = all."""
    reach: float | None = None
    """Count the steps until a step's rollouts have this mean reward."""
    above: float | None = None
    """Count the seeds whose final reward is above this."""
    curves: list[str] = field(default_factory=list)
    """Metrics to draw and to keep beside reward, KL and what is recorded of the measures."""
    final: FinalSettings = field(default_factory=FinalSettings)


@dataclass(frozen=True)
class Run:
    """One run of an arm."""

    arm: str
    seed: int
    job: PPOJob

    @property
    def folder(self) -> Path:
        return Path(self.job.run.dir)


@dataclass(frozen=True)
class Plan:
    """The runs of a study below its folder."""

    study: StudySettings
    folder: Path

    @property
    def arms(self) -> list[str]:
        return [arm for arm in self.study.arms if not self.study.only or arm in self.study.only]

    def grid(self, arm: str) -> list[Changes]:
        """Every combination of an arm's grid; none where it has no grid."""
        axes: Mapping[str, Any] = (self.study.arms[arm] or {}).get("search", self.study.search) or {}  # type: ignore[assignment]
        return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())] if axes else []

    def run(self, arm: str, seed: int, setting: Changes, name: str) -> Run:
        own = {key: value for key, value in (self.study.arms[arm] or {}).items() if key != "search"}
        job = read_layers(
            PPOJob,
            [
                ("study.base", self.study.base),
                ("study.changes", self.study.changes),
                (f"study.arms.{arm}", own),
                *(("search", nested(dotted, value)) for dotted, value in setting.items()),
            ],
        )
        kept = {name: getattr(job.run, name) for name in ("save_every", "keep", "trackers")}
        place = RunSettings(dir=str(self.folder / name), resume=True, seed=seed, **kept)
        return Run(arm, seed, replace(job, run=place, sampling=replace(job.sampling, seed=seed)))

    def reported(self, arm: str, setting: Changes) -> list[Run]:
        seeds = range(self.study.first_seed, self.study.first_seed + self.study.seeds)
        return [self.run(arm, seed, setting, f"{arm}-{seed}") for seed in seeds]

    def searched(self, arm: str) -> list[list[Run]]:
        """The runs of every combination, in the grid's order."""
        seeds = range(self.study.first_search_seed, self.study.first_search_seed + self.study.search_seeds)
        grid = enumerate(self.grid(arm))
        return [[self.run(arm, seed, setting, f"search/{arm}-{at}-{seed}") for seed in seeds] for at, setting in grid]


def nested(dotted: str, value: object) -> Changes:
    """{a.b: value} as {a: {b: value}}."""
    first, _, rest = dotted.partition(".")
    return {first: nested(rest, value) if rest else value}


# -- what is wrong -----------------------------------------------------------------------------------------------------


def check(plan: Plan) -> None:
    """Every problem of every arm at once: settings, what they name, and runs that are there of other settings."""
    if problems := [*of_study(plan.study)] or [*of_final(plan.study.final), *of_arms(plan)]:
        raise ConfigError(*problems)


def of_study(study: StudySettings) -> Iterator[str]:
    if not study.arms:
        yield "study.arms: none; name at least one, {plain: null}"
    for name in study.arms:
        if not name or set(name) & set("/\\\0|") or name.startswith("."):
            yield f"study.arms.{name}: no name of a folder and of a row in a table; use letters, digits, - and _"
    for name in sorted(set(study.only) - set(study.arms)):
        yield f"study.only: {name!r} is no arm; choose from {', '.join(study.arms)}"
    layers = {"study.changes": study.changes, **{f"study.arms.{name}": own or {} for name, own in study.arms.items()}}
    grids: dict[str, Any] = {"study.search": study.search}
    grids |= {f"{place}.search": own["search"] for place, own in layers.items() if "search" in own}
    for place, own in layers.items():
        for setting in (name for name in OWN if named(own, name)):
            yield f"{place}.{setting}: is the study's own to set; take it out"
    for place, grid in grids.items():
        lists = grid.values() if isinstance(grid, dict) else [grid] if grid is not None else []
        if not all(isinstance(values, list) and values for values in lists):
            yield f"{place}: expected lists of values by setting, {{ppo.learning_rate: [1e-4, 1e-3]}}, found {grid!r:.80}"
        elif taken := [name for name in grid or {} if name in OWN]:
            yield f"{place}.{taken[0]}: is the study's own to set; take it out"
    if any(grids.values()):
        apart = study.first_search_seed - study.first_seed
        if -study.search_seeds < apart < study.seeds:
            yield f"study.first_search_seed: {study.first_search_seed}, among the seeds that are reported; choose others"


def of_final(final: FinalSettings) -> Iterator[str]:
    for name, terms in final.measures.items():
        try:
            read_terms(terms)
        except UserError as problem:
            yield from (f"study.final.measures.{name}: {line}" for line in problem.lines)
    if final.prompts:
        try:
            read_table(final.prompts, field="study.final.prompts")
        except UserError as problem:
            yield from (line.replace("prompts.path:", "prompts:", 1) for line in problem.lines)


def named(changes: Mapping[str, Any], dotted: str) -> bool:
    first, _, rest = dotted.partition(".")
    return first in changes and (not rest or (isinstance(changes[first], dict) and named(changes[first], rest)))


def of_arms(plan: Plan) -> Iterator[str]:
    """Lines that all arms share stand once; others have their arm's name."""
    found: dict[str, list[str]] = {}
    for arm in plan.arms:
        for line in dict.fromkeys(of_arm(plan, arm)):
            found.setdefault(line, []).append(arm)
    for line, arms in found.items():
        yield line if arms == plan.arms and len(arms) > 1 else f"{', '.join(arms)}: {line}"


def of_arm(plan: Plan, arm: str) -> list[str]:
    try:
        settings = plan.searched(arm) or [plan.reported(arm, {})]
    except UserError as problem:
        return list(problem.lines)
    return [line for runs in settings for line in of_setting(plan, runs)]


def of_setting(plan: Plan, runs: list[Run]) -> list[str]:
    from steerl.training.planning.dry_run import dry_run

    job = replace(runs[0].job, run=RunSettings(dir=str(plan.folder / ".held" / "none")))
    lines = dry_run(job, learnable(job.model), to_mapping(job)).problems
    for name, terms in plan.study.final.measures.items() if not lines else ():
        further = dry_run(replace(job, reward=terms), learnable(job.model), {}).problems
        lines += [f"study.final.measures.{name}: {line}" for line in further]
    return lines + stale(runs)


def stale(runs: list[Run]) -> list[str]:
    """A line for everything in which runs that are there already are not what the study asks for now."""
    from steerl.training.run import resume

    lines = []
    for run in runs:
        problems: list[str] = []
        path = run.folder / "config.yaml"
        saved = load_yaml(path, problems) if path.is_file() else None
        if problems:
            lines += [f"{run.folder}: config.yaml cannot be read; remove the folder, and it is run again"]
        if saved:
            asked = {name: value for name, value in to_mapping(run.job).items() if name != "dry_run"}
            changed = resume.check(saved, asked, free=(), allow=True)
            told = [line.replace("the run to resume", str(run.folder), 1) for line in changed if not line.startswith("run.")]
            lines += [f"{line}; move its folder away, or give the study another --run.dir" for line in told]
    return lines
