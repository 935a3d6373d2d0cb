"""Run folders or dumps -> one self-contained HTML page: results, curves, a token-level rollout viewer, settings.

    report([RUN, ...], out)     reads what runs left behind (run_data.py), packs it into assets/page.html
    figure([RUN, ...], out)     the main curves as a PNG, with matplotlib

The page needs no network and no server. Data lies in it as gzip in base64, rows in chunks that are unpacked only when they
are looked at, so that a page of tens of thousands of samples opens at once. `steerl watch` serves the same page without data,
which then asks for them (live.py).
"""

from __future__ import annotations

import base64
import fnmatch
import gzip
import hashlib
import html
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import write_text, written_aside
from steerl.training.report.run_data import ReportRun, read_run
from steerl.training.run.log import METRICS

ASSETS = Path(__file__).parent / "assets"
SCRIPTS = ("data.js", "curves.js", "viewer.js", "page.js")
CHUNK = 64
"""Samples that are unpacked together."""

# group, title, the metrics it shows (patterns, in this order). A metric goes to the first panel that wants it; what no panel
# wants gets one per room. The first group is open when the page is; the others are folded.
PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("at a glance", "reward", ("reward/mean", "eval/reward*", "evaluation/reward*")),
    ("at a glance", "KL to the reference, nats per response", ("kl/ref", "eval/kl*", "evaluation/kl*")),
    ("at a glance", "gap between sampler and trainer, nats", ("gap/max", "gap/mean")),
    ("at a glance", "loss", ("loss", "eval_loss")),
    ("at a glance", "response length, tokens", ("rollout/length*", "eval/length")),
    ("at a glance", "seconds of each phase", tuple(f"time/{p}_s" for p in ("sample", "reward", "score", "learn", "evaluate"))),
    ("reward", "reward: spread", ("reward/std",)),
    ("reward", "reward: parts", ("reward/*",)),
    ("reward", "reward of the environment", ("environment/reward",)),
    ("rollouts", "rows of an evaluation", ("eval/rows",)),
    ("reward", "evaluation: parts", ("eval/*", "evaluation/*")),
    ("learning", "KL weight", ("kl/coef",)),
    ("learning", "entropy", ("policy/entropy",)),
    ("learning", "clip fraction", ("ppo/clip_fraction", "value/clip_fraction")),
    ("learning", "ratio", ("ppo/ratio_first", "ppo/ratio_mean")),
    ("learning", "approximate KL of the update", ("ppo/approx_kl",)),
    ("learning", "policy loss", ("ppo/policy_loss",)),
    ("learning", "value loss", ("value/loss",)),
    ("learning", "explained variance of the value", ("value/explained_variance",)),
    ("learning", "gradient norm", ("ppo/grad_norm", "grad_norm")),
    ("learning", "learning rate", ("*learning_rate",)),
    ("rollouts", "how responses end, share", ("rollout/ended", "rollout/stop*")),
    ("rollouts", "turns and calls of an episode", ("environment/turns", "environment/tool_*")),
    ("rollouts", "what ends episodes, share", ("environment/ended_*",)),
    ("correction and steering", "effective sample size", ("correction/ess*",)),
    ("correction and steering", "KL of the correction", ("correction/kl*",)),
    ("correction and steering", "steering: strength and scale", ("steering/strength*", "steering/scale*")),
    ("engine, speed, memory", "tokens per second", ("time/tokens_per_s",)),
    ("engine, speed, memory", "memory, MiB", ("memory/*",)),
    ("engine, speed, memory", "seconds of the sync to the engine", ("engine/sync_s",)),
    ("engine, speed, memory", "gap of the engine, nats", ("engine/gap*",)),
    ("engine, speed, memory", "restarts of the engine", ("engine/restarts",)),
    ("engine, speed, memory", "seconds in detail", ("time/*_s",)),
)
OTHER = "other"


def report(folders: Sequence[Path], out: Path | None = None, *, rows: int = 2000) -> Path:
    """Write the page; beside the first folder's data as report.html where `out` is not given. `rows`: of each dump."""
    runs = read(folders, rows=rows)
    path = out or Path(folders[0]) / "report.html"
    write_text(path, page(runs))
    return path


def page(runs: Sequence[ReportRun]) -> str:
    """The whole page, its data in it."""
    blobs = [_blob("index", index(runs))]
    for number, run in enumerate(runs):
        blobs.append(_blob(f"texts-{number}", [[row.prompt_text, row.completion] for row in run.rows]))
        for chunk, start in enumerate(range(0, len(run.rows), CHUNK)):
            blobs.append(_blob(f"rows-{number}-{chunk}", [row.tokens() for row in run.rows[start : start + CHUNK]]))
    style, code = stylesheet(), script()
    return filled(
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(code)}",
        title=html.escape(_title(runs)),
        head=f"<style>{style}</style>",
        foot="\n".join([*blobs, f"<script>{code}</script>"]),
    )


def filled(**parts: str) -> str:
    """page.html with its places filled, in one pass: what is put in may itself hold a {{head}}, as a run's name may."""
    return re.sub(r"\{\{(\w+)\}\}", lambda spot: parts[spot[1]], _asset("page.html"))


def stylesheet() -> str:
    return _asset("style.css")


def script() -> str:
    return "\n".join(_asset(name) for name in SCRIPTS)


def _hash(text: str) -> str:
    """As a content security policy names what it lets run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _title(runs: Sequence[ReportRun]) -> str:
    return ", ".join(run.name for run in runs)


def index(runs: Sequence[ReportRun]) -> dict[str, object]:
    """All but the rows."""
    return {
        "title": _title(runs),
        "chunk": CHUNK,
        "panels": panels(runs),
        "bars": [bars for run in runs for bars in run.bars],
        "runs": [run_index(run) for run in runs],
    }


def run_index(run: ReportRun) -> dict[str, object]:
    return {
        "name": run.name,
        "metrics": {"step": run.steps, "columns": run.metrics},
        "ends": run.ends,
        "heads": run.heads(),
        "config": run.config,
        "versions": run.versions,
        "summary": run.summary,
        "examples": run.examples(),
    }


def panels(runs: Sequence[ReportRun]) -> list[dict[str, object]]:
    """Which metrics are drawn together. Every metric of every run is somewhere."""
    left = dict.fromkeys(name for run in runs for name in (*run.metrics, *run.ends))
    charts: list[dict[str, object]] = []
    for rank, (group, title, patterns) in enumerate(PANELS):
        keys = dict.fromkeys(key for pattern in patterns for key in left if fnmatch.fnmatchcase(key, pattern))
        for key in keys:
            del left[key]
        if keys:
            charts.append(_panel(group, title, rank, list(keys), _target(runs, list(keys))))
    for room in dict.fromkeys(key.rpartition("/")[0] for key in left):
        keys_of_room = [key for key in left if key.rpartition("/")[0] == room]
        charts.append(_panel(OTHER, room or OTHER, len(PANELS), keys_of_room, None))
    return charts


def _panel(group: str, title: str, rank: int, keys: list[str], target: float | None) -> dict[str, object]:
    return {"group": group, "title": title, "rank": rank, "keys": keys, "target": target}


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
    return [read_one(path, name, rows=rows) for path, name in zip(paths, names_of(paths), strict=True)]


def read_one(path: Path, name: str, *, rows: int = 2000) -> ReportRun:
    if (path / METRICS).is_file():
        return read_run(path, name)
    if (path / "manifest.json").is_file():
        from steerl.training.report.dump_data import read_dump_folder  # the only page that needs torch

        return read_dump_folder(path, name, rows)
    what = "is not a folder" if not path.is_dir() else f"holds neither {METRICS} (a run) nor manifest.json (a dump)"
    raise UserError(f"report: {path} {what}; name the folder that a job wrote as its run.dir")


def names_of(paths: Sequence[Path]) -> list[str]:
    """The folders' own names; with as many parents as it takes to tell them apart. Bytes that are no text are marked so."""
    full = [Path(os.path.abspath(path)).parts for path in paths]
    full = [tuple(part.encode("utf-8", "replace").decode() for part in parts) for parts in full]
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
