"""Run folders or dumps -> one self-contained HTML page: results, curves, a token-level rollout viewer, settings.

    report([RUN, ...], out)     reads what runs left behind (report_data.py), packs it into report_assets/page.html
    figure([RUN, ...], out)     the main curves as a PNG, with matplotlib

The page needs no network and no server. Data lies in it as gzip in base64, rows in chunks that are unpacked only when they
are looked at, so that a page of tens of thousands of samples opens at once.
"""

from __future__ import annotations

import base64
import fnmatch
import gzip
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import write_text, written_aside
from steerl.training.report.dump_data import read_dump_folder
from steerl.training.report.run_data import ReportRun, read_run
from steerl.training.run.log import METRICS

ASSETS = Path(__file__).parent / "assets"
CHUNK = 64
"""Samples that are unpacked together."""

# title -> the metrics it shows (patterns, in this order). A metric goes to the first panel that wants it; what no panel
# wants gets one per room.
PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward", ("reward/mean", "eval/reward*", "evaluation/reward*")),
    ("KL to the reference, nats per response", ("kl/ref", "eval/kl*", "evaluation/kl*")),
    ("KL weight", ("kl/coef",)),
    ("reward: spread", ("reward/std",)),
    ("reward: parts", ("reward/*",)),
    ("entropy", ("policy/entropy",)),
    ("clip fraction", ("ppo/clip_fraction", "value/clip_fraction")),
    ("ratio", ("ppo/ratio_first", "ppo/ratio_mean")),
    ("approximate KL of the update", ("ppo/approx_kl",)),
    ("policy loss", ("ppo/policy_loss",)),
    ("value loss", ("value/loss",)),
    ("explained variance of the value", ("value/explained_variance",)),
    ("gap between sampler and trainer, nats", ("gap/max", "gap/mean")),
    ("response length, tokens", ("rollout/length*",)),
    ("turns and calls of an episode", ("environment/turns", "environment/tool_*")),
    ("reward of the environment", ("environment/reward",)),
    ("what ends episodes, share", ("environment/ended_*",)),
    ("how responses end, share", ("rollout/ended", "rollout/stop*")),
    ("gradient norm", ("ppo/grad_norm",)),
    ("effective sample size", ("correction/ess*",)),
    ("KL of the correction", ("correction/kl*",)),
    ("seconds of each phase", ("time/*_s",)),
    ("tokens per second", ("time/tokens_per_s",)),
    ("memory, MiB", ("memory/*",)),
)


def report(folders: Sequence[Path], out: Path | None = None, *, rows: int = 2000) -> Path:
    """Write the page; beside the first folder's data as report.html where `out` is not given. `rows`: of each dump."""
    runs = read(folders, rows=rows)
    path = out or Path(folders[0]) / "report.html"
    write_text(path, page(runs))
    return path


def page(runs: Sequence[ReportRun]) -> str:
    """The whole page."""
    title = ", ".join(run.name for run in runs)
    index = {
        "title": title,
        "chunk": CHUNK,
        "panels": panels(runs),
        "bars": [bars for run in runs for bars in run.bars],
        "runs": [
            {
                "name": run.name,
                "metrics": {"step": run.steps, "columns": run.metrics},
                "heads": run.heads(),
                "config": run.config,
                "versions": run.versions,
                "summary": run.summary,
                "examples": run.examples(),
            }
            for run in runs
        ],
    }
    blobs = [_blob("index", index)]
    for number, run in enumerate(runs):
        blobs.append(_blob(f"texts-{number}", [[row.prompt_text, row.completion] for row in run.rows]))
        for chunk, start in enumerate(range(0, len(run.rows), CHUNK)):
            blobs.append(_blob(f"rows-{number}-{chunk}", [row.tokens() for row in run.rows[start : start + CHUNK]]))
    parts = {
        "title": html.escape(title),
        "style": _asset("style.css"),
        "script": "\n".join(_asset(name) for name in ("curves.js", "viewer.js", "page.js")),
        "blobs": "\n".join(blobs),
    }
    # In one pass: what is put in may itself hold a {{script}}, as a run's name may.
    return re.sub(r"\{\{(\w+)\}\}", lambda spot: parts[spot[1]], _asset("page.html"))


def panels(runs: Sequence[ReportRun]) -> list[dict[str, object]]:
    """Which metrics are drawn together. Every metric of every run is somewhere."""
    left = dict.fromkeys(name for run in runs for name in run.metrics)
    charts: list[dict[str, object]] = []
    for title, patterns in PANELS:
        keys = [key for pattern in patterns for key in left if fnmatch.fnmatchcase(key, pattern)]
        if title.startswith("seconds"):
            keys = [key for key in keys if key != "time/tokens_per_s"]
        for key in keys:
            left.pop(key, None)
        if keys:
            charts.append({"title": title, "keys": list(dict.fromkeys(keys)), "target": _target(runs, keys)})
    for room in dict.fromkeys(key.rpartition("/")[0] for key in left):
        charts.append(
            {"title": room or "other", "keys": [key for key in left if key.rpartition("/")[0] == room], "target": None}
        )
    return charts


def _target(runs: Sequence[ReportRun], keys: Sequence[str]) -> float | None:
    """The KL target, where all runs have the same."""
    targets = {run.kl_target for run in runs}
    return targets.pop() if "kl/ref" in keys and len(targets) == 1 else None


def _blob(name: str, value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packed = base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), mtime=0)).decode()
    return f'<script type="text/plain" id="{name}">{packed}</script>'


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


# -- reading -------------------------------------------------------------------------------------------------------


def read(folders: Sequence[Path], *, rows: int = 2000) -> list[ReportRun]:
    """All folders, under names that tell them apart."""
    if not folders:
        raise UserError("report: no run named; report.py RUN [RUN ...]")
    paths = [Path(folder) for folder in folders]
    return [read_one(path, name, rows=rows) for path, name in zip(paths, _names(paths), strict=True)]


def read_one(path: Path, name: str, *, rows: int = 2000) -> ReportRun:
    if (path / METRICS).is_file():
        return read_run(path, name)
    if (path / "manifest.json").is_file():
        return read_dump_folder(path, name, rows)
    what = "is not a folder" if not path.is_dir() else f"holds neither {METRICS} (a run) nor manifest.json (a dump)"
    raise UserError(f"report: {path} {what}; name the folder that a job wrote as its run.dir")


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names; with as many parents as it takes to tell them apart."""
    full = [Path(os.path.abspath(path)).parts for path in paths]
    for depth in range(1, max(map(len, full)) + 1):
        names = ["/".join(parts[-depth:]).lstrip("/") for parts in full]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(parts[-1:])} {i + 1}" for i, parts in enumerate(full)]


# -- PNG -----------------------------------------------------------------------------------------------------------

FIGURE = ("reward/mean", "kl/ref", "policy/entropy", "rollout/length_mean")


def figure(folders: Sequence[Path], out: Path, keys: Sequence[str] = FIGURE) -> Path:
    """The named metrics side by side, a line per run; metrics that no run has are left out."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UserError("png: matplotlib is not installed; pip install matplotlib") from error

    runs = [run for run in read(folders, rows=0) if run.steps]
    shown = [key for key in keys if any(key in run.metrics for run in runs)]
    if not shown:
        raise UserError(f"png: no metrics to draw in {', '.join(map(str, folders))}; {', '.join(keys)} were looked for")
    drawing = Figure(figsize=(4.2 * len(shown), 3.1), layout="constrained", dpi=130)
    for axis, key in zip(drawing.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for run in runs:
            if key in run.metrics:
                axis.plot(
                    run.steps, [float("nan") if v is None else v for v in run.metrics[key]], label=run.name, linewidth=1.5
                )
        if key == "kl/ref" and (target := _target(runs, [key])) is not None:
            axis.axhline(target, color="0.5", linestyle=":", label="target")
        axis.set_title(key, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(runs) > 1:
            axis.legend(fontsize=8)
    with written_aside(Path(out)) as aside:
        drawing.savefig(aside, format="png")
    return Path(out)
