"""A process of its own for a user's code, so that what hangs there can be killed.

    WorkerProcess(module, ...) ----> python -P rollout/common/worker.py FD ----> module.serve(pipe, ...): load, say so, answer
          ^------- what it sends, or why it does not: Overdue (it is killed then), Ended -------'

Not `multiprocessing`: a spawned process there imports the launching script again, and a forked one inherits CUDA and
the threads of the process group. A signal would not do either: it cannot break into C code such as a regular expression.
The process is started by path, and imports nothing from the folder that it is started in: a stranger's `reward.py` or
`ctypes.py` may lie there.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import pickle
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from typing import Any

STARTUP = 600.0
"""Seconds that importing the user's file may take."""


class Overdue(Exception):
    """The call took longer than it may."""


class Ended(Exception):
    """The process is gone."""


class WorkerProcess:
    """Another Python that runs `serve` of a module of ours, which loads the user's code and sends ("ready", None), or
    ("raised", lines)."""

    def __init__(self, module: str, name: str, where: str, *given: object, **streams: Any):
        """`name`: of the user's code, for messages. A UserError where it does not start. `given`: builtin types alone."""
        from steerl.rollout.common.errors import UserError

        self.pipe, there = Pipe()
        command = [sys.executable, "-P", os.path.abspath(__file__), str(there.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, **streams)
        there.close()
        try:
            self.send(module, [path for path in sys.path if path], given)
            kind, value = self.receive(STARTUP, f"its file was not imported after {STARTUP:.0f} s")
        except Overdue as error:
            raise UserError(f"{where}: {error}") from error
        except Ended as error:
            raise UserError(f"{where}: the process for {name} ended while it started ({error})") from error
        if kind == "raised":
            self.close()
            raise UserError(*value)

    def send(self, *what: object) -> None:
        try:
            self.pipe.send_bytes(pickle.dumps(what))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._ended() from error

    def receive(self, timeout: float | None, late: str) -> Any:
        try:
            if self.pipe.poll(timeout):
                return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise self._ended() from error
        self.close()
        raise Overdue(late)

    def _ended(self) -> Ended:
        with contextlib.suppress(subprocess.TimeoutExpired):  # or it closed what is not its own, and lives on
            self.process.wait(5.0)
        self.close()
        return Ended(f"exit status {self.process.returncode}")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """What hangs must not outlive a job that was killed and could not end it (Linux). 0: it may again."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, int(number))


if __name__ == "__main__":
    die_with_parent()
    here = Connection(int(sys.argv[1]))
    module, paths, given = pickle.loads(here.recv_bytes())
    sys.path += [path for path in paths if path not in sys.path]  # last: what may hide a module there does not here
    importlib.import_module(module).serve(here, *given)
