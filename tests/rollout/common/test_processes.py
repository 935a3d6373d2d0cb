"""Processes: one alone without torch.distributed, and two real ones over gloo."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from tests import warm

PROGRAM = """
import sys
from dataclasses import dataclass
import torch
from steerl.configs.reader import run_command
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError

@dataclass(frozen=True)
class Job:
    way: str = ""

def refuse():
    raise UserError("prompts.path: told once")

def main(job):
    me = processes.start()
    assert me == processes.start() and me.world_size == 2 and me.device.type == "cpu" and me.is_main == (me.rank == 0)
    ranks = processes.gather_objects([me.rank] * (2 * me.rank))
    assert ranks == [1, 1], ranks
    total = processes.sum_(torch.tensor([me.rank + 1.0]))
    assert total.tolist() == [3.0]
    assert processes.on_main(lambda: {"from": me.rank}) == {"from": 0}
    processes.barrier()
    if job.way == "refuse":
        processes.on_main(refuse)

run_command(main, Job)
"""


def torchrun(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d"]
    command += ["--rdzv_endpoint=localhost:0", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=180)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_a_flag_and_the_handlers_go_away(number):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with processes.stop_signal() as stop:
        assert not stop.here() and not stop.anywhere()
        for _ in range(3):  # from the terminal and from the launcher: one and the same
            signal.raise_signal(number)
        assert stop.here() and stop.anywhere()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_ctrl_c_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(processes, "SAME_PRESS", 0.0)
    with pytest.raises(KeyboardInterrupt), processes.stop_signal() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.here()
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not ended")


def test_one_process_needs_no_group():
    me = processes.start()
    assert (me.rank, me.world_size, me.is_main) == (0, 1, True)
    assert processes.gather_objects([1, 2]) == [1, 2]
    assert processes.sum_(torch.tensor([2.0])).tolist() == [2.0]
    assert processes.on_main(lambda: 5) == 5
    processes.barrier()
    assert processes.close() is False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "argv", "line"),
    [
        (torchrun, ["--way", "refuse"], "prompts.path: told once"),
        (warm.run_ranks, ["--wya", "x"], "wya: unknown (command line, value 'x'); did you mean way?"),
    ],
)
def test_a_problem_is_told_by_one_process(ranks, argv, line, tmp_path):
    """Whether all find it or the main process alone: one line, and the launch fails. All that is asserted before holds."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    ran = ranks(str(tmp_path / "program.py"), *argv)
    assert ran.returncode != 0
    assert ran.stderr.splitlines().count(line) == 1, ran.stderr
    assert "Traceback" not in ran.stderr.split("torch/distributed")[0].split("elastic")[0]


def test_problems_reach_the_caller_in_one_process():
    def refuse() -> None:
        raise UserError("one", "two")

    with pytest.raises(UserError) as caught:
        processes.on_main(refuse)
    assert caught.value.lines == ("one", "two")


def test_a_process_that_ends_itself_runs_what_is_registered_and_loses_no_output():
    """And nothing after: no thread that is still at work is taken down."""
    program = """
import atexit, threading
from steerl.rollout.common import processes
atexit.register(print, "registered")
threading.Thread(target=threading.Event().wait).start()
print("written", end=" ")
processes.end()
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "written registered\n", "")
