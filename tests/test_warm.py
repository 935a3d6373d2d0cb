"""The forked processes that tests take for fresh ones: what a launcher holds does not come with its ranks."""

from __future__ import annotations

import json
import os
import sys

from tests import warm

PROGRAM = """
import atexit, json, logging, os, random, signal, sys, threading
import numpy, torch
from accelerate.state import AcceleratorState, GradientState, PartialState

print("found " + json.dumps({
    "states": [len(state._shared_state) for state in (PartialState, AcceleratorState, GradientState)],
    "group": torch.distributed.is_initialized(),
    "logs": [len(logger.handlers) for logger in (logging.root, *map(logging.getLogger, ("torch", "accelerate", "steerl")))],
    "at exit": atexit._ncallbacks(),
    "signals": [repr(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)],
    "hangup": callable(signal.getsignal(signal.SIGHUP)),
    "threads": [thread.name for thread in threading.enumerate()],
    "sockets": sum("socket:" in os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")) if "RANK" in os.environ else 0,
    "argv": sys.argv[1:],
    "apart": [random.random(), numpy.random.random(), torch.initial_seed()],
}), flush=True)
"""


def test_a_launchers_forked_ranks_begin_as_other_processes_do(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    alone = warm.run([sys.executable, str(tmp_path / "program.py"), "a", "b"])
    launched = warm.run(warm.accelerate_launch("ddp", str(tmp_path / "program.py"), "a", "b"), env=dict(os.environ))
    assert launched.returncode == 0, launched.stderr
    found = [
        json.loads(line[6:]) for each in (alone, launched) for line in each.stdout.splitlines() if line.startswith("found ")
    ]
    assert len(found) == 3
    drawn = [tuple(one.pop("apart")) for one in found]
    assert found[1:] == [found[0]] * 2
    assert found[0]["states"] == [0, 0, 0] and "SIG_DFL" in found[0]["signals"][0] and found[0]["argv"] == ["a", "b"]
    assert len({number for pair in drawn for number in pair}) == 9, "no two have random states in common"
