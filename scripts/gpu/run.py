"""`steerl bench --gpu` (`make gpu`): the tests that need a GPU, then figures of this card; all in some ten minutes.

    tests/gpu, by pytest ──> a line each      jobs of cases.py, by child.py ──> a line each
              └──────────────> gpu.json, gpu.md, written again after every line <──┘

Each part has a share of the time. What is not begun when it is over is left out, and says so; what fails, hangs or takes its
process with it costs no other figure. It needs no network, and no more than torch, transformers, accelerate, peft, pyarrow
and pytest: what else is compared with is measured where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import versions, write_json, write_text
from steerl.scripts.gpu import table
from steerl.scripts.gpu.cases import Job, jobs

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("trl", "datasets", "wandb", "deepspeed", "bitsandbytes", "flash_attn", "vllm", "kernels")
"""What is used where it is installed."""
FOR_TESTS = 0.4
"""Of the time; what they leave is the figures'."""
PATIENCE = 180.0
"""Seconds that one job may take."""


@dataclass(frozen=True)
class GPUSettings:
    """The measurements on a GPU."""

    device: Literal["cuda", "cpu"] = "cuda"
    """cpu = a rehearsal with tiny shapes: everything runs, and no figure means anything."""
    minutes: float = 9.0
    """All of it takes about so long at most."""
    tests: bool = True
    """The tests of tests/gpu first, where this is a checkout."""
    only: str = ""
    """Only figures whose name has this in it."""


@dataclass
class Report:
    """What gpu.json holds."""

    out: Path
    began: float = field(default_factory=time.monotonic)
    held: dict[str, Any] = field(default_factory=dict)

    def write(self, **parts: object) -> None:
        self.held |= {**parts, "seconds": round(time.monotonic() - self.began, 1)}
        write_json(self.out / "gpu.json", self.held)
        write_text(self.out / "gpu.md", table.markdown(self.held))


def measure(out: Path, settings: GPUSettings) -> dict[str, Any]:
    """Run it all; raises where a test failed, once everything is written."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("bench.card.device: cuda, but torch sees no GPU here; --card.device cpu rehearses it with tiny shapes")
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out)
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    about = {"device": settings.device, "driver": driver(), "python": sys.version.split()[0], "versions": versions()}
    report.write(**about, missing=missing, minutes=settings.minutes, machine=None, tests=None, cases=[])
    end = report.began + 60 * settings.minutes
    if settings.tests and (ROOT / "tests" / "gpu").is_dir():
        report.write(tests=tested(out, settings, time.monotonic() + 60 * settings.minutes * FOR_TESTS))
    wanted = [job for job in jobs(settings.device == "cpu") if settings.only in job.name]
    known = {job: number for number, job in enumerate(jobs(settings.device == "cpu"))}
    left = {job: why for job in wanted if (why := lacking(job, missing))}
    measuring: list[Job | None] = [None, *(job for job in wanted if job not in left)]
    cases = [entry(job, {"left_out": why}) for job, why in left.items()]
    for job, found in measured(measuring, known, out, settings, end, report):
        print(
            f"{time.monotonic() - report.began:5.0f} s  {job.name if job else 'the machine'}: {table.told(found)}", flush=True
        )
        if job is None:
            report.write(machine=found)
        else:
            cases.append(entry(job, found))
            report.write(cases=cases, compile=table.verdict(cases))
    print(f"\n{(out / 'gpu.md').read_text(encoding='utf-8')}\n{out / 'gpu.json'}", flush=True)
    if bad := [name for name, test in (report.held["tests"] or {}).items() if test["outcome"] == "failed"]:
        raise UserError(*(f"bench: {name} failed: {report.held['tests'][name]['said']}" for name in bad))
    return report.held


def lacking(job: Job, missing: list[str]) -> str | None:
    """Why a job cannot be had here."""
    needed = [name for name in ("trl", "datasets") if job.who == "grpo" and name in missing]
    return f"{needed[0]} is not installed" if needed else None


def entry(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    return {"name": job.name, "work": job.work, "size": job.size, "rows": job.case.rows, "who": job.who, **found}


def environment(settings: GPUSettings, out: Path) -> dict[str, str]:
    """Of the processes that are started: this checkout's modules, whether or not it is installed."""
    found = {**os.environ, "STEERL_GPU": settings.device, "STEERL_GPU_LINES": str(out / "tests.jsonl")}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    found |= {"ACCELERATE_MIXED_PRECISION": "no", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    found |= {"DS_ACCELERATOR": settings.device, "OMP_WAIT_POLICY": "PASSIVE"}
    if settings.device == "cpu":  # on a machine with a GPU, too
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


# -- the tests --------------------------------------------------------------------------------------------------------


def tested(out: Path, settings: GPUSettings, end: float) -> dict[str, dict[str, Any]]:
    """{test: {"outcome": passed, failed, skipped or cut off, "seconds", "said", "found"}}."""
    lines = out / "tests.jsonl"
    lines.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    cut_off = False
    with (out / "tests.log").open("w") as log:
        try:
            subprocess.run(
                command, cwd=ROOT, env=environment(settings, out), stdout=log, stderr=log, timeout=end - time.monotonic()
            )
        except subprocess.TimeoutExpired:
            cut_off = True
    found: dict[str, dict[str, Any]] = {}
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
        test = json.loads(line)
        found[test.pop("test")] = test
    if cut_off:
        found["the others"] = {"outcome": "cut off", "seconds": 0.0, "said": "the tests' time was over", "found": {}}
    if not found:
        tail = (out / "tests.log").read_text(encoding="utf-8").strip().splitlines()[-3:]
        found["tests/gpu"] = {"outcome": "failed", "seconds": 0.0, "said": " ".join(tail), "found": {}}
    return found


# -- the figures ------------------------------------------------------------------------------------------------------


def measured(
    wanted: list[Job | None], known: dict[Job, int], out: Path, settings: GPUSettings, end: float, report: Report
) -> Iterator[tuple[Job | None, dict[str, Any]]]:
    """Each job with what came of it. A process that ends is followed by another with what is left."""
    left = list(wanted)
    with (out / "cases.log").open("w") as log:
        while left and time.monotonic() < end:
            numbers = ",".join(str(-1 if job is None else known[job]) for job in left)
            command = [sys.executable, "-m", "steerl.scripts.gpu.child", settings.device, str(out / "run"), numbers]
            given = {**environment(settings, out), "STEERL_GPU_LIMITS": json.dumps(report.held["machine"] or {})}
            process = subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.PIPE, stderr=log)
            came = 0
            while left:
                patience = min(PATIENCE, end - time.monotonic())
                found = next_line(process.stdout, patience)
                if isinstance(found, dict):
                    came += 1
                    yield left.pop(0), found
                    continue
                process.kill()
                status = process.wait()
                if found == "silent" and patience < PATIENCE:  # time is over
                    break
                if found == "silent":
                    yield left.pop(0), {"failed": f"not done after {PATIENCE:.0f} s"}
                elif not came:  # begun, and gone with its process
                    yield left.pop(0), {"failed": f"its process ended with status {status}: {out / 'cases.log'}"}
                break
            process.kill()
            process.wait()
    for job in left:
        yield job, {"left_out": f"no time was left of {settings.minutes:g} minutes"}


def next_line(pipe: IO[bytes] | None, patience: float) -> dict[str, Any] | str:
    """What a child's next line holds; "silent" where none comes, "ended" where none can."""
    assert pipe is not None
    if not select.select([pipe], [], [], max(patience, 0.0))[0]:
        return "silent"
    line = pipe.readline()
    found: dict[str, Any] | str = json.loads(line) if line.endswith(b"\n") else "ended"
    return found
