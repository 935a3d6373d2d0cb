"""The dump job: every shard that is not whole yet is sampled and written, on any number of processes.

    each process checks its share of the shards -> the same list everywhere -> shards[rank::world_size] -> make_shard
                                                                      the main process waits for all records -> finish

Who makes which shard is not recorded and does not matter: what a shard holds depends on data and settings alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from steerl.rollout.common import processes
from steerl.rollout.common.errors import Stopped
from steerl.rollout.common.progress import Progress
from steerl.rollout.dumps.manifest import (
    Manifest,
    drop_record,
    finish,
    load_manifest,
    plan_of,
    read_record,
    refuse_earlier,
    standing,
)
from steerl.rollout.dumps.store import make_shard
from steerl.rollout.types import Samples

LOOK_S = 0.1
"""Seconds between two looks for the other processes' records."""


@dataclass(frozen=True)
class Work:
    """What is left of a dump, the same on every process."""

    todo: list[int]
    """Shards to be made."""
    damaged: dict[int, str]
    """Those of them that were there, and what was wrong."""


def left_to_do(folder: Path, begun: Manifest) -> Work:
    """Every shard on disk is read and its checksum compared, each process taking its share. Collective."""
    me, shards = processes.start(), range(len(plan_of(begun)))
    state = standing(folder, begun, shards[me.rank :: me.world_size])
    damaged = dict(processes.gather_objects(sorted(state.damaged.items())))
    if damaged:
        refuse_earlier(folder, begun)
    for index in state.damaged:
        drop_record(folder, index)  # the main process takes a record as the sign that its shard is made
    return Work(sorted([*processes.gather_objects(state.absent), *damaged]), damaged)


def stopped(folder: Path) -> Stopped:
    return Stopped(f"{folder}: stopped after the shard that was begun; --run.resume true goes on")


def dump(
    folder: Path,
    begun: Manifest,
    work: Work,
    sample: Callable[[range], Samples],
    stream: TextIO | None = None,
    stopping: Callable[[], bool] = lambda: False,
    *,
    cut: Collection[int] = (),
    **described: object,
) -> None:
    """Make the shards of `work`. On the main process: show the progress of all on `stream`, and finish the manifest.

    Where `stopping` says so, a process leaves after the shard that it is at. `cut` holds the prompts that `sample` has cut so
    far."""
    plan, me = plan_of(begun), processes.start()
    rows = {index: len(plan.shard(index)) * plan.samples for index in work.todo}
    own, others = work.todo[me.rank :: me.world_size], set(work.todo) - set(work.todo[me.rank :: me.world_size])
    progress = Progress("rollouts", plan.rows, stream if me.is_main else None, already=plan.rows - sum(rows.values()))

    def counted(call: range) -> Samples:
        samples = sample(call)
        progress.add(len(samples.rollout), int(samples.rollout.actions_B.sum()))
        return samples

    def look_for_others() -> None:
        for index in sorted(others):
            if (record := read_record(folder, index)) is not None:
                others.discard(index)
                progress.add(record.rows, record.tokens)

    try:
        for index in own:
            if stopping():
                raise stopped(folder)
            make_shard(folder, plan, index, counted, cut)
            if me.is_main:
                look_for_others()
        # Not a barrier: those time out, and shards may take hours. A process that dies takes its launcher's job along.
        while me.is_main and others:
            if stopping():
                raise stopped(folder)
            time.sleep(LOOK_S)
            look_for_others()
            if not begun["finished"] and load_manifest(folder)["finished"]:
                others.clear()  # what an orphan of a killed launcher finished holds the same rows
    finally:
        progress.close()
    if me.is_main:
        finish(folder, begun, **described)
