"""A process of its own for a user's function, so that a call that hangs can be killed.

    Worker.call(arguments, timeout) --pickle--> python -m reward.worker FD file.py:name --> function(**arguments)
          ^------------- result, or what it raised, or Overdue (killed; the next call starts a new process) --------'

Not `multiprocessing`: a spawned process there imports the launching script again, and a forked one inherits CUDA and
the threads of the process group. A signal would not do either: it cannot break into C code such as a regular expression.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Any

STARTUP = 600.0
"""Seconds that importing the function's file may take."""


class Overdue(Exception):
    """The call took longer than it may."""


class WorkerFailed(Exception):
    """The function raised, or its process died."""


class Worker:
    """Calls one function in another process, which is started when first needed and after every kill."""

    def __init__(self, function: str, arguments: dict[str, Any]):
        self.function, self.arguments = function, arguments
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        self.turn = threading.Lock()

    def call(self, arguments: dict[str, Any], timeout: float | None) -> Any:
        with self.turn:
            if self.process is None or self.process.poll() is not None:
                self._start()
            assert self.pipe is not None
            try:
                self.pipe.send_bytes(pickle.dumps({**arguments, **self.arguments}))
                kind, value = self._receive(timeout, f"not done after {timeout} s")
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                code = self.process.wait() if self.process is not None else None
                self.close()
                raise WorkerFailed(f"its process ended (exit status {code})") from error
            if kind == "raised":
                raise WorkerFailed(value)
            return value

    def _start(self) -> None:
        self.close()
        here, there = Pipe()
        folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        paths = os.pathsep.join([folder, *(p for p in sys.path if p)])
        command = [sys.executable, "-m", "reward.worker", str(there.fileno()), self.function]
        self.process = subprocess.Popen(
            command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": paths}
        )
        there.close()
        self.pipe = here
        try:
            kind, value = self._receive(STARTUP, f"its file was not imported after {STARTUP:.0f} s")
        except EOFError as error:
            raise WorkerFailed("its process ended while it started") from error
        if kind == "raised":
            self.close()
            raise WorkerFailed(value)

    def _receive(self, timeout: float | None, late: str) -> tuple[str, Any]:
        assert self.pipe is not None
        if not self.pipe.poll(timeout):
            self.close()
            raise Overdue(late)
        kind, value = pickle.loads(self.pipe.recv_bytes())
        return kind, value

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        if self.pipe is not None:
            self.pipe.close()
        self.process, self.pipe = None, None

    def __del__(self) -> None:
        self.close()


def serve(pipe: Connection, spec: str) -> None:
    """The other process: load, say so, then answer call by call until the pipe closes."""
    from reward.loading import load_function, said
    from rollout.errors import Problem

    try:
        function = load_function(spec, "reward")
    except Problem as problem:
        pipe.send_bytes(pickle.dumps(("raised", str(problem))))
        return
    pipe.send_bytes(pickle.dumps(("ready", None)))
    while True:
        try:
            arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps(("gave", function(**arguments)))
        except Exception as error:  # noqa: BLE001  told to the caller, who names the row
            answer = pickle.dumps(("raised", said(error)))
        pipe.send_bytes(answer)


def die_with_parent() -> None:
    """A function that hangs must not outlive a job that was killed and could not end it (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    serve(Connection(int(sys.argv[1])), sys.argv[2])
