"""The speed comparison: this project, compiled too, TRL 1.12's PPOTrainer, the installed TRL's GRPO and RLOO, plain `generate`.

    round 1 .. N ──┬─ the machine's limits
                   └─ case ── ours | compiled | trl | grpo | rloo | plain, each in a process of its own (child.py)
                                                                                          ──> bench.json, tables

Every process has one thread. Times are CPU seconds of the process (the clock's on a GPU); medians over all that was timed in
all rounds, with the least and the most. What was measured in this folder before is never mixed in.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import versions, write_json, write_text
from steerl.scripts.bench_cases.cases import CUDA, GROUPS, SAMPLING, SMALLEST, UPDATES, Case
from steerl.scripts.bench_cases.learning import PEER, install_peer, said_by

_PEERS = {"gae": "trl", "group": "grpo", "rloo": "rloo"}
_TIMED = ("sample", "score", "learn", "reward", "rest")


@dataclass(frozen=True)
class SpeedSettings:
    """The speed comparison."""

    rounds: int = 3
    """Times that everything is measured, each time in a fresh process."""
    times: int = 2
    """Updates (or rollouts) timed in each process, after one that warms up."""
    device: Literal["cpu", "cuda"] = "cpu"
    """cuda = shapes of Qwen2.5 0.5B and 1.5B and Llama 3.2 1B in bfloat16, random weights."""
    only: str = ""
    """Only cases whose name has this in it."""
    peer: str = ""
    """A folder that holds TRL 1.12; empty = installed into OUT/trl-1.12."""
    skip_peer: bool = False
    """Without TRL."""


def measure(out: Path, settings: SpeedSettings, quick: bool = False) -> list[dict[str, object]]:
    """Run it all; leaves bench.json and bench.md in `out`. `quick`: the smallest case, once, without the peer."""
    from steerl.scripts.bench_cases import limit
    from steerl.scripts.bench_cases.child import PEER_SETTINGS

    if quick:
        settings = replace(settings, rounds=1, times=1, skip_peer=True)
    cases = chosen(settings, quick)
    peer = None
    if not settings.skip_peer and any(case.work == "update" and case.credit == "gae" for case in cases):
        peer = Path(settings.peer).absolute() if settings.peer else install_peer(out / "trl-1.12")
    grouped = not settings.skip_peer and any(case.credit != "gae" for case in cases)
    if grouped and (missing := [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]):
        print(f"{' and '.join(missing)}: not installed, so nothing stands beside groups; pip install 'steerl[trl]'", flush=True)
        grouped = False
    out.mkdir(parents=True, exist_ok=True)
    dtype = "bfloat16" if settings.device == "cuda" else "float32"
    machines: list[dict[str, object]] = []
    found: list[dict[str, object]] = []
    lines: list[str] = []
    runs: dict[tuple[str, str], list[dict[str, object]]] = {}
    for number in range(settings.rounds):
        machines.append(child([f"limit:{settings.device}:{dtype}"], None, 1, out))
        for case in cases:
            for who in implementations(case, peer, grouped):
                print(f"round {number + 1} of {settings.rounds}: {case.name}: {who} ...", flush=True)
                runs.setdefault((case.name, who), []).append(
                    child([json.dumps(case.to_json()), who], peer, settings.times, out)
                )
        machine = limit.best(machines)
        by_name = {case.name: case for case in cases}
        found = [entry(by_name[name], who, several, machine) for (name, who), several in runs.items()]
        about = {"machine": machine, "versions": versions(), "peer": PEER, "peer_settings": PEER_SETTINGS}
        lines = [*tables(found), "", *machine_lines(machine)]
        # After every round: a run that is stopped leaves what it has.
        write_json(out / "bench.json", found)
        write_json(out / "bench_about.json", about | {"device": settings.device, "rounds": number + 1})
        write_text(out / "bench.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return found


def chosen(settings: SpeedSettings, quick: bool) -> list[Case]:
    if quick:
        return [SMALLEST, replace(SMALLEST, work="sampling")]
    cases = CUDA if settings.device == "cuda" else (*UPDATES, *GROUPS, *SAMPLING)
    found = [case for case in cases if settings.only in case.name]
    if not found:
        raise UserError(
            f"bench: no case has {settings.only!r} in its name; there are: " + "; ".join(case.name for case in cases)
        )
    return found


def implementations(case: Case, peer: Path | None, grouped: bool) -> list[str]:
    """Ours, and what there is beside it: ppo.compile, TRL 1.12 in its folder, or the installed TRL for groups."""
    if case.work == "sampling":
        return ["ours", "plain"]
    beside = peer is not None if case.credit == "gae" else grouped
    compiled = ["compiled"] if case in (*UPDATES, *CUDA) else []
    return ["ours", *compiled, *([_PEERS[case.credit]] if beside else [])]


def child(arguments: Sequence[str], peer: Path | None, times: int, out: Path) -> dict[str, object]:
    """One process; its last line is what it found."""
    run = out.absolute() / "run"
    # In bfloat16 the weights are so themselves.
    extra = {"ACCELERATE_MIXED_PRECISION": "no"} if "bfloat16" in arguments[0] else {}
    first = peer if arguments[-1] == "trl" else None
    try:
        return said_by("child", [*arguments, str(times), str(run)], first, " ".join(arguments)[-200:], **extra)
    finally:
        shutil.rmtree(run, ignore_errors=True)


# -- what it says -----------------------------------------------------------------------------------------------------


def entry(case: Case, who: str, several: Sequence[dict[str, Any]], machine: dict[str, object]) -> dict[str, object]:
    """One object of bench.json: what all processes of one case and implementation found."""
    from steerl.scripts.bench_cases import limit

    phases = {name: [s for run in several for s in run["seconds"].get(name, [])] for name in _TIMED}
    phases = {name: values for name, values in phases.items() if values}
    tokens = [count for run in several for count in run["tokens"]]
    rates = [count / s for count, s in zip(tokens, phases["sample"], strict=True)]
    whole = [sum(parts) for parts in zip(*phases.values(), strict=True)]
    peaks = [run["peak_mb"] for run in several]
    shares = limit.share(case, several[-1]["alive"], phases, machine)
    return {
        "case": case.name,
        "implementation": who,
        "seconds_per_update": statistics.median(whole) if case.work == "update" else None,
        "seconds_range": spread(whole),
        "rollout_tokens_per_second": statistics.median(rates),
        "rollout_tokens_per_second_range": spread(rates),
        "peak_mb": statistics.median(peaks),
        "peak_mb_range": spread(peaks),
        "growth_mb": statistics.median(run["peak_mb"] - run["before_mb"] for run in several),
        "phases": {name: statistics.median(values) for name, values in phases.items()},
        "share_of_limit": shares,
        "wall_per_update": statistics.median([s for run in several for s in run["wall"]]),
        "timed": len(whole),
    }


def spread(values: Sequence[float]) -> list[float]:
    return [min(values), max(values)]


def tables(found: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown: updates, then sampling; a row for each case and implementation, the other's multiple of ours beside it."""
    ours = {one["case"]: one for one in found if one["implementation"] == "ours"}
    lines: list[str] = []
    updates = [one for one in found if one["seconds_per_update"] is not None]
    if updates:
        lines += [
            "| update | who | seconds (least to most) | x ours | sample / score / learn | rollout tokens/s | peak MB | x ours "
            "| limit: sample / learn |",
            "|" + "---|" * 9,
        ]
    for one in updates:
        us, phases, shares = ours[one["case"]], one["phases"], one["share_of_limit"]
        low, high = one["seconds_range"]
        cells = [
            one["case"].removeprefix("update "), one["implementation"],
            f"{one['seconds_per_update']:.2f} ({low:.2f} to {high:.2f})",
            f"{one['seconds_per_update'] / us['seconds_per_update']:.2f}",
            " / ".join(f"{phases[name]:.2f}" if name in phases else "-" for name in ("sample", "score", "learn")),
            f"{one['rollout_tokens_per_second']:,.0f}", f"{one['peak_mb']:,.0f}", f"{one['peak_mb'] / us['peak_mb']:.2f}",
            f"{shares['sample']:.0%} / " + (f"{shares['learn']:.0%}" if "score" in phases else "-"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    sampling = [one for one in found if one["seconds_per_update"] is None]
    if sampling:
        lines += ["", "| sampling | who | tokens/s (least to most) | ours x | peak MB | ours x | limit |", "|" + "---|" * 7]
    for one in sampling:
        us, (low, high) = ours[one["case"]], one["rollout_tokens_per_second_range"]
        cells = [
            one["case"].removeprefix("sampling "), one["implementation"],
            f"{one['rollout_tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})",
            f"{us['rollout_tokens_per_second'] / one['rollout_tokens_per_second']:.2f}",
            f"{one['peak_mb']:,.0f}", f"{us['peak_mb'] / one['peak_mb']:.2f}", f"{one['share_of_limit']['sample']:.0%}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def machine_lines(machine: dict[str, Any]) -> list[str]:
    rates = ", ".join(f"{size} MB {rate / 1e9:.1f}" for size, rate in machine["bandwidth"].items())
    return [f"Limits measured in the same run: {machine['flops'] / 1e9:.0f} Gflop/s; GB/s by working set: {rates}."]
