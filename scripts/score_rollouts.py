"""Scores of a dump or of texts.

    steerl score --config steerl:score --dump.dir DUMP --run.dir RUN

Leaves RUN/scores-NNNNN.parquet (prompt_index, sample_index, total, a column per part) and RUN/manifest.json. RUN may be
the dump's own folder; the manifest is then scores.json. A job that was cut short goes on with --run.resume true, on any
number of processes, and leaves the same table.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.configs.reader import run_command

from steerl.reward.build import build_reward, read_terms
from steerl.reward.settings import TextSettings
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings, versions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steerl.reward.jobs.scoring import Source


@dataclass(frozen=True)
class DumpSettings:
    """A dump of rollouts that is to be scored."""

    dir: str = ""
    """The folder that dump_rollouts.py wrote."""


@dataclass(frozen=True)
class ScoreJob:
    """Score every row of a dump, or of a dataset of texts or conversations."""

    dump: DumpSettings = field(default_factory=DumpSettings)
    texts: TextSettings = field(default_factory=TextSettings)
    """Instead of a dump: texts or conversations that were not sampled here."""
    reward: list[dict[str, object]] = field(default_factory=list, metadata={"check": read_terms})
    """The parts of the reward; each is a column of the scores."""
    run: RunSettings = field(default_factory=RunSettings)


def main(job: ScoreJob) -> None:
    if job.run.push_to_hub:
        raise UserError("run.push_to_hub: has no effect on scores; leave it out")
    if bool(job.dump.dir) == bool(job.texts.path):
        raise UserError("dump.dir and texts.path: name one of them, the dump or the texts to score")
    from steerl.reward.jobs.scoring import manifest_name, opened_for_scores

    dump = Path(job.dump.dir) if job.dump.dir else None
    source, tokenizer = open_source(job, dump)
    with opened_for_scores(job.run, dump, dataclasses.asdict(job)) as folder:
        write(job, folder, manifest_name(folder, dump), source, tokenizer)


def write(job: ScoreJob, folder: Path, name: str, source: Source, tokenizer: PreTrainedTokenizerBase | None) -> None:
    from steerl.reward.jobs.scoring import begin, check_order, finish, is_whole, score_source

    me = processes.start()
    reward = build_reward(job.reward, device=me.device, tokenizer=tokenizer)
    try:
        check_order(reward)
        described = {"versions": versions(), "world_size": me.world_size}
        begun = processes.on_main(lambda: begin(job.run, folder, name, source, reward, dataclasses.asdict(job), **described))
        # One answer for all: files appear while others look.
        todo = processes.on_main(lambda: [i for i in range(len(source.rows)) if not is_whole(folder, i, begun)])
        if begun["finished"] and not todo:
            if me.is_main:
                print(f"{folder}: finished already")
            return
        with processes.stop_signal() as stop:
            score_source(source, reward, folder, begun, todo, sys.stderr, stop.here)
        if me.is_main:
            show(folder, finish(folder, name, {**begun, **described}))
            if job.dump.dir:
                best = shlex.join([job.dump.dir, f"{folder}-best.jsonl", "--scores", str(folder)])
                print(f"next: steerl select {best} --select.mode best")
    finally:
        reward.close()


def open_source(job: ScoreJob, dump: Path | None) -> tuple[Source, PreTrainedTokenizerBase | None]:
    """The rows, and the tokenizer that their ids are of."""
    from steerl.reward.jobs.scoring import CALL_ROWS, DumpSource, TextSource
    from steerl.reward.kinds.model_inputs import load_tokenizer
    from steerl.reward.texts import load_texts

    if dump is None:
        if job.run.save_every < 0:
            raise UserError(f"run.save_every: {job.run.save_every}; give the rows of a shard, 0 for {CALL_ROWS}")
        return TextSource(load_texts(job.texts, "texts"), job.run.save_every or CALL_ROWS), None
    if job.run.save_every:
        raise UserError("run.save_every: has no effect on the scores of a dump, which are cut as the dump is; leave it out")
    source = DumpSource.of(dump)
    return source, load_tokenizer("", [str(dump / "tokenizer")], "dump") if (dump / "tokenizer").is_dir() else None


def show(folder: Path, manifest: dict[str, Any]) -> None:
    scores = manifest["scores"]
    width = max(map(len, scores))
    print(f"{folder}: {scores['total']['rows']:,} rows scored in {len(manifest['shards'])} shards")
    for column, told in scores.items():
        spread = "  ".join(f"{key} {told[key]:.4g}" for key in ("mean", "std", "min", "max") if key in told)
        print(f"  {column:{width}}  {spread}  ({told['rows']:,} rows)")


def cli() -> None:
    run_command(main, ScoreJob)


if __name__ == "__main__":
    cli()
