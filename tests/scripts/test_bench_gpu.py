"""`make gpu`, as far as a CPU shows it: the whole command on a machine that has no more than it may need, and what becomes of
jobs that fail, hang or take their process with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.scripts.gpu import run, table
from steerl.scripts.gpu.cases import REHEARSAL, ROWS, SIZES, jobs

ROOT = Path(__file__).parents[2]
ABSENT = ("trl", "datasets", "wandb", "deepspeed", "docstring_parser", "jsonargparse", "matplotlib", "__editable__", "steerl")


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    """The environment of a machine's own Python that has the packages, but for some, and knows nothing of this checkout."""
    (tmp_path / "site").mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(ABSENT) and entry.suffix != ".pth":
            (tmp_path / "site" / entry.name).symlink_to(entry)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "site")}


def rehearse(bare: dict[str, str], out: Path, *flags: str) -> dict[str, object]:
    command = ["make", "-s", "gpu", f"PYTHON={sys._base_executable}", "DEVICE=cpu", f"ARGS=--out {out} {' '.join(flags)}"]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    said = (out / "gpu.md").read_text()
    assert said in done.stdout
    found: dict[str, object] = json.loads((out / "gpu.json").read_text())
    return found


def test_the_command_runs_on_a_cpu_without_what_it_can_do_without(bare, tmp_path):
    bare["PYTEST_ADDOPTS"] = "-k 'alone or wrong or 8bit'"
    found = rehearse(bare, tmp_path / "out", '--card.only "2 rows"')
    assert {"trl", "datasets", "wandb", "deepspeed"} <= set(found["missing"]) and found["device"] == "cpu"
    assert {"torch", "transformers"} <= set(found["versions"]) and not {"trl", "datasets"} & set(found["versions"])
    outcomes = {name: test["outcome"] for name, test in found["tests"].items()}
    assert set(outcomes.values()) <= {"passed", "skipped"} and list(outcomes.values()).count("passed") >= 3, outcomes
    half = found["tests"]["test_decoding.py::test_a_rollouts_log_probs_are_those_of_each_row_alone[bfloat16]"]
    assert 1e-4 < half["found"]["sampler_worst"] < 0.25  # was in half precision
    assert found["machine"]["flops"] > 0 and found["machine"]["bandwidth"]
    told = {case["name"]: case for case in found["cases"]}
    assert set(told) == {job.name for job in jobs(True) if "2 rows" in job.name}
    assert told.pop("update (group) tiny 2 rows: grpo")["left_out"] == "trl is not installed"
    for name, case in told.items():
        assert case["tokens_per_second"] > 0 and case["peak_mb"] > 0, (name, case)
        assert all(0 < share < 1 for share in case["share_of_limit"].values())
    assert set(found["compile"]["ratios"]) == {"tiny, 2 rows"} and "sampling.compile" in found["compile"]["verdict"]


@pytest.mark.proofs
def test_the_whole_rehearsal_passes(bare, tmp_path):
    found = rehearse(bare, tmp_path / "out")
    assert {test["outcome"] for test in found["tests"].values()} == {"passed", "skipped"}
    assert len(found["cases"]) == len(jobs(True)) and not any("failed" in case for case in found["cases"])


def test_every_job_has_a_name_of_its_own_and_the_rehearsal_has_the_same_ones():
    real, tiny = jobs(False), jobs(True)
    assert len({job.name for job in real}) == len(real) and {job.case.device for job in real} == {"cuda"}
    assert {(job.work, job.who) for job in real} == {(job.work, job.who) for job in tiny}
    assert {(job.size, job.case.rows) for job in real} == {(size, rows) for size in SIZES for rows in ROWS}
    for size, count in ((size, count) for size in SIZES for count in ROWS):
        asked = [job.who for job in real if (job.work, job.size, job.case.rows) == ("update", size, count)]
        assert asked == ["ours", "compiled"], "the plain one first"
    assert {job.size for job in tiny} == set(REHEARSAL) and {job.case.dtype for job in [*real, *tiny]} == {"bfloat16"}
    weights = {size: sum(limit_weights(case)) for size, case in SIZES.items()}  # of Qwen2.5, embeddings tied: 0.49 and 1.54 G
    assert weights == pytest.approx({"0.5B": 0.494e9, "1.5B": 1.544e9}, rel=0.01)


def limit_weights(case):
    from steerl.scripts.bench_cases import limit

    return limit.weights(case)


CHILD = """#!/bin/bash
# of the jobs asked for: 1 ends its process, 2 never ends, 3 fails with the device, others are done; the machine is measured
for number in ${5//,/ }; do
  case $number in
    1) exit 3;;
    2) exec sleep 600;;
    3) echo '{"failed": "CUDA error", "took": 0.1}'; exit 1;;
    *) echo '{"seconds": 1.0, "flops": 2.0, "took": 0.1}';;
  esac
done
"""


def ran(tmp_path, monkeypatch, numbers, seconds=60.0):
    """{number: what came of it}, by a stand-in for the child."""
    (tmp_path / "python").write_text(CHILD)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(run, "PATIENCE", 1.0)
    known = {job: number for number, job in enumerate(jobs(True))}
    wanted = [None if number < 0 else list(known)[number] for number in numbers]
    report = run.Report(tmp_path, held={"machine": None})
    end = run.time.monotonic() + seconds
    found = run.measured(wanted, known, tmp_path, run.GPUSettings(device="cpu"), end, report)
    return {-1 if job is None else known[job]: what for job, what in found}


def test_a_job_that_hangs_or_takes_its_process_with_it_costs_no_other(tmp_path, monkeypatch):
    found = ran(tmp_path, monkeypatch, [-1, 0, 1, 3, 4, 2, 5, 6])
    assert [number for number, what in found.items() if "seconds" in what] == [-1, 0, 4, 5, 6]
    assert found[3]["failed"] == "CUDA error"
    assert "ended with status 3" in found[1]["failed"] and "not done after 1 s" in found[2]["failed"]


def test_what_there_is_no_time_for_is_left_out(tmp_path, monkeypatch):
    found = ran(tmp_path, monkeypatch, [0, 2, 4], seconds=0.5)
    assert "seconds" in found[0] and all("no time was left" in found[number]["left_out"] for number in (2, 4))


def case_of(who, rows, seconds, tokens=100):
    return {
        "name": f"{who} {rows}", "work": "sampling", "size": "0.5B", "rows": rows, "who": who, "seconds": seconds, "tokens": tokens,
        "tokens_per_second": tokens / seconds, "peak_mb": 1.0, "share_of_limit": {"sample": 0.5},
    }  # fmt: skip


def test_the_verdict_on_compiled_steps_is_of_the_slowest_pair():
    pairs = [
        case_of("ours", 64, 6.0),
        case_of("compiled", 64, 2.0),
        case_of("ours", 256, 6.0),
        case_of("compiled", 256, 6.0, 190),
    ]
    found = table.verdict(pairs)
    assert found["ratios"] == pytest.approx({"0.5B, 64 rows": 3.0, "0.5B, 256 rows": 1.9}) and found["doubles"] is False
    assert table.verdict(pairs[:2])["doubles"] is True and "stays" in table.verdict(pairs[:2])["verdict"]
    assert table.verdict([pairs[1], {**pairs[0], "who": "plain"}])["doubles"] is None, "nothing to compare with"
    lines = table.figures([*pairs, {"work": "sampling", "size": "0.5B", "rows": 64, "who": "grpo", "failed": "a | b"}])
    assert "| compiled | 50 | 2.00 | 3.00 |" in lines[3] and "failed: a / b" in lines[-1]
    assert len({line.count("|") for line in lines}) == 1


def test_a_gpu_that_is_not_there_is_said_at_once(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="torch sees no GPU here; --card.device cpu rehearses it"):
        run.measure(tmp_path, run.GPUSettings())
