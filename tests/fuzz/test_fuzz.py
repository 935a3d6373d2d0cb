"""Hostile input of every kind gets an answer: a result, or clear lines and status 2; no traceback, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def faults(folder: Path, first: int, last: int) -> list[dict]:
    """The cases of these seeds that went wrong. Any of them again: python -m tests.fuzz.server FOLDER SEED SEED+1."""
    command = [sys.executable, "-m", "tests.fuzz.server", str(folder), str(first), str(last)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(found) == last - first
    assert {case["status"] for case in found} >= {0, 2}, "some go well, some are refused"
    print(f"{len(found)} cases, {sum(case['s'] for case in found):.0f} s, status 2: {sum(c['status'] == 2 for c in found)}")
    wrong = [case for case in found if case["fault"]]
    print(*map(json.dumps, wrong), sep="\n")  # whole: an assertion shortens them
    return wrong


@pytest.mark.slow
def test_two_hundred_hostile_cases_are_answered(tmp_path):
    assert faults(tmp_path, 0, 200) == []


@pytest.mark.proofs
def test_two_thousand_more_hostile_cases_are_answered(tmp_path):
    assert faults(tmp_path, 200, 2200) == []
