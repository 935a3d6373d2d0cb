"""Make the embedded default: tiny tokenizers, models and data to try everything with, trained here, no network.

    steerl tiny --out DIR [--seed 0] [--worlds reviews,...]

    DIR/reviews/      a language of film reviews; PPO makes it kind        (scripts/toy_tasks/reviews.py says the files)
    DIR/randomwalks/  shortest paths in a graph
    DIR/summaries/    encoder-decoders that shorten
    DIR/suppressed/   a style that the policy knows and never shows by itself; steering brings it out
    DIR/hackable/     a checker that can be fooled, and the true reward beside it
    DIR/calculator/   sums that need a tool
    DIR/maze/         a walk of five to ten turns

Every world holds `world.json` (its name and seed). A world appears whole or not at all; one that is there already is kept.
"""

from __future__ import annotations

import difflib
import json
import os
import shlex
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from steerl.configs.reader import run_command

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import write_json, written_aside
from steerl.scripts import toy_tasks as worlds

SPACE = 12 * 2**20
"""Bytes that a world may take; asked for before the work begins."""


_PPO = "steerl ppo --config steerl:{0} --model.path {{0}}/{1} --prompts.path {{0}}/prompts.jsonl --run.dir runs/{0}"
NEXT = {
    "reviews": "steerl complete --model.path {0}/sft 'review of a comedy about a sailor :'",
    "randomwalks": _PPO.format("randomwalks", "base"),
    "summaries": _PPO.format("summaries", "sft") + " --heldout.path {0}/heldout.jsonl",
    "maze": _PPO.format("maze", "base") + " --heldout.path {0}/heldout.jsonl --environment.factory {0}/environment.py:Maze",
}
"""What a toy task is for: its first command."""


@dataclass(frozen=True)
class TinyJob:
    """Make the embedded default: tiny tokenizers, models and data to try everything with. No network."""

    out: str
    """The folder to make them in."""
    seed: int = 0
    """The same seed gives the same bytes."""
    worlds: str = ",".join(worlds.available())
    """Which worlds, with commas between."""
    head_dim: int = 16
    """Numbers of an attention head of the causal models; 32 is the least that vLLM takes on a CPU (engine.kind vllm)."""
    overwrite: bool = False
    """Make those that are there already anew."""


def main(job: TinyJob) -> None:
    names = [name for name in job.worlds.replace(" ", "").split(",") if name]
    known = worlds.available()
    if not names:
        raise UserError(f"worlds: none named; choose from {', '.join(known)}")
    for name in [name for name in names if name not in known]:
        near = difflib.get_close_matches(name, known, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
        raise UserError(f"worlds: {name!r} is unknown; {remedy}")
    if not (2 <= job.head_dim <= 256 and job.head_dim % 2 == 0):
        raise UserError(f"head_dim: {job.head_dim}, but it must be an even number from 2 to 256")
    out = open_out(job.out)
    kind = (job.seed, job.head_dim)
    missing = [name for name in names if job.overwrite or not is_there(out / name, name, *kind)]
    for name in names:
        if name not in missing:
            print(f"{out / name}: there already", flush=True)
    reserve(out, SPACE * len(missing))
    # One thread a world, two worlds at a time: the same bytes on any machine with the same libraries, however many cores.
    began = time.monotonic()
    if missing:
        print(f"{out}: making {', '.join(missing)}, half a minute each or more", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(max_workers=2, mp_context=get_context("spawn")) as pool:
        spread = pool.map if len(missing) > 1 else map
        same = ([value] * len(missing) for value in (out, *kind))
        for name, _ in zip(missing, spread(make, missing, *same), strict=True):
            print(f"{out / name}: made ({time.monotonic() - began:.0f} s)", flush=True)
    if first := next((name for name in names if name in NEXT), None):
        print("next: " + NEXT[first].format(shlex.quote(str(out / first))))


def open_out(name: str) -> Path:
    out = Path(name)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: cannot make {out}: {error.strerror}; name a folder that can be written") from error
    return out


def is_there(folder: Path, name: str, seed: int, head_dim: int = 16) -> bool:
    """Whether this very world was made already; what else stands under its name is not ours to replace unasked."""
    if not folder.exists():
        return False
    try:
        found = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if found.get("world") == name and (found.get("seed"), found.get("head_dim", 16)) == (seed, head_dim):
        return True
    what = f"the world of seed {found['seed']}" if "seed" in found else "something else"
    what += f" with head_dim {found['head_dim']}" if "head_dim" in found else ""
    raise UserError(f"out: {folder} holds {what}; name another folder, or --overwrite true")


def reserve(out: Path, size: int) -> None:
    """Take the space for a moment: a full disk is told before the work, in the disk's own words."""
    probe = out / f".space.{os.getpid()}"
    try:
        with open(probe, "wb") as file:
            for _ in range(0, size, 2**20):
                file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"out: {out} cannot be written: {error.strerror}; {size >> 20} MB are needed") from error
    finally:
        probe.unlink(missing_ok=True)


def make(name: str, out: Path, seed: int, head_dim: int = 16) -> None:
    """One world, whole or not at all."""
    import torch
    from transformers.utils import logging

    from steerl.scripts.toy_tasks import making

    processes.without_gpu()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    final = out / name
    with written_aside(final) as aside:
        aside.mkdir()
        before, making.head_dim = making.head_dim, head_dim
        try:
            worlds.builder(name)(aside, seed)
        finally:
            making.head_dim = before
        shape = {} if head_dim == 16 else {"head_dim": head_dim}
        write_json(aside / "world.json", {"world": name, "seed": seed, **shape})
        if final.exists():
            shutil.rmtree(final)
    torch.set_num_threads(threads)


def cli() -> None:
    run_command(main, TinyJob)


if __name__ == "__main__":
    cli()
