"""gpu.json as tables for people, and the verdict on sampling.compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

ENOUGH = 2.0
"""How many times as fast a compiled decode has to be to be worth its code."""


def markdown(held: dict[str, Any]) -> str:
    machine, lines = held["machine"] or {}, ["# On a GPU", ""]
    versions = ", ".join(f"{name} {version}" for name, version in held["versions"].items())
    if held["device"] == "cpu":
        lines += ["**A rehearsal on a CPU with tiny shapes: no figure means anything.**", ""]
    if "flops" in machine:
        rate = max(machine["bandwidth"].values())
        lines.append(
            f"{machine['name']}, driver {held['driver']}: {machine['flops'] / 1e12:,.1f} Tflop/s (bfloat16 products), "
            f"{rate / 1e9:,.0f} GB/s (a copy, both ways counted), measured in this run."
        )
    elif machine:
        lines.append(f"The machine was not measured: {told(machine)}.")
    lines.append(f"{versions}; not installed: {', '.join(held['missing']) or 'nothing'}. {held['seconds']:.0f} s in all.")
    if held["cases"]:
        lines += ["", *figures(held["cases"]), "", held.get("compile", {}).get("verdict", "")]
    if held["tests"]:
        lines += ["", "| test | outcome | s | found |", "|---|---|---|---|"]
        for name, test in held["tests"].items():
            found = ", ".join(f"{key} {value:.3g}" for key, value in test["found"].items()) or test["said"]
            lines.append(f"| {name} | {test['outcome']} | {test['seconds']:.1f} | {found.replace('|', '/')[:160]} |")
    return "\n".join(lines) + "\n"


def figures(cases: Sequence[dict[str, Any]]) -> list[str]:
    """A row for each job; beside it how many times as fast as the eager path of the same work it was."""
    lines = ["| work | size | rows | who | tokens/s | s | x ours | peak MB | share of the limit |", "|" + "---|" * 9]
    for case in cases:
        first = [str(case[key]) for key in ("work", "size", "rows", "who")]
        if "seconds" not in case:
            lines.append("| " + " | ".join([*first, told(case), *[""] * 4]) + " |")
            continue
        ratio = speed(cases, case)
        shares = " / ".join(f"{name} {share:.0%}" for name, share in case["share_of_limit"].items())
        lines.append(
            "| " + " | ".join([
                *first, f"{case['tokens_per_second']:,.0f}", f"{case['seconds']:.2f}", "" if ratio is None else f"{ratio:.2f}",
                f"{case['peak_mb']:,.0f}", shares,
            ]) + " |"
        )  # fmt: skip
    return lines


def speed(cases: Sequence[dict[str, Any]], case: dict[str, Any]) -> float | None:
    """How many times as fast as ours at the same work."""
    same = ("work", "size", "rows")
    for other in cases:
        if other["who"] == "ours" and "seconds" in other and all(other[key] == case[key] for key in same):
            return float(other["seconds"] * case["tokens"] / (case["seconds"] * other["tokens"]))
    return None


def verdict(cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether sampling.compile at least doubles decoding, by every pair that was measured."""
    steps = [case for case in cases if (case["work"], case["who"]) == ("sampling", "compiled") and "seconds" in case]
    pairs = [(case, speed(cases, case)) for case in steps]
    ratios = {f"{case['size']}, {case['rows']} rows": ratio for case, ratio in pairs if ratio is not None}
    if not ratios:
        return {"ratios": {}, "doubles": None, "verdict": "sampling.compile: no verdict, for nothing of it was measured."}
    slow = [name for name, ratio in ratios.items() if ratio < ENOUGH]
    said = ", ".join(f"{ratio:.2f} ({name})" for name, ratio in ratios.items())
    ends = "it at least doubles decoding, and stays" if not slow else f"it does not double decoding at {'; '.join(slow)}"
    return {"ratios": ratios, "doubles": not slow, "verdict": f"sampling.compile, times the eager path: {said}: {ends}."}


def told(found: dict[str, Any]) -> str:
    """One job in a few words."""
    for key in ("failed", "left_out"):
        if key in found:
            return f"{key.replace('_', ' ')}: {found[key]}".replace("|", "/")
    return f"{found['seconds']:.2f} s" if "seconds" in found else "measured"
