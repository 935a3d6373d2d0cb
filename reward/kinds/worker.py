"""A process of its own for a user's function, so that a call that hangs can be killed.

    Worker.call(arguments, timeout) --pickle--> python -P reward/kinds/worker.py FD --> function(**arguments)
          ^------- what it gave, or why it did not, or Overdue (killed; the next call starts a new process) -------'

Not `multiprocessing`: a spawned process there imports the launching script again, and a forked one inherits CUDA and
the threads of the process group. A signal would not do either: it cannot break into C code such as a regular expression.
The process is started by path, and imports nothing from the folder that it is started in: a stranger's `reward.py` or
`ctypes.py` may lie there.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerl.reward.kinds.loading import CallResult

STARTUP = 600.0
"""Seconds that importing the function's file may take."""


class Overdue(Exception):
    """The call took longer than it may."""


class WorkerFailed(Exception):
    """The function raised, or its process died."""


class Worker:
    """Calls one function in another process, which is started when first needed and after every kill."""

    def __init__(self, function: str, arguments: dict[str, object], where: str):
        self.function, self.arguments, self.where = function, arguments, where
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        self.turn = threading.Lock()

    def call(self, arguments: dict[str, object], told: CallResult, logs: Sequence[str], timeout: float | None) -> CallResult:
        """`told`: what is to be filled. `logs`: which of its methods the function is given."""
        with self.turn:
            if self.process is None or self.process.poll() is not None:
                self._start()
            assert self.pipe is not None
            try:
                self.pipe.send_bytes(pickle.dumps(({**arguments, **self.arguments}, told, logs)))
                kind, value = self._receive(timeout, f"not done after {timeout} s")
            except (EOFError, BrokenPipeError, ConnectionResetError) as error:
                raise WorkerFailed(f"its process ended (exit status {self._status()})") from error
            if kind == "raised":
                raise WorkerFailed(value)
            filled: CallResult = value
            return filled

    def _start(self) -> None:
        """A UserError where it does not start: no fallback is for that."""
        from steerl.rollout.common.errors import UserError

        self.close()
        here, there = Pipe()
        command = [sys.executable, "-P", os.path.abspath(__file__), str(there.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        there.close()
        self.pipe = here
        try:
            self.pipe.send_bytes(pickle.dumps((self.function, self.where, [p for p in sys.path if p])))
            kind, value = self._receive(STARTUP, f"its file was not imported after {STARTUP:.0f} s")
        except Overdue as error:
            raise UserError(f"{self.where}: {error}") from error
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise UserError(
                f"{self.where}: the process for {self.function} ended while it started (exit status {self._status()})"
            ) from error
        if kind == "raised":
            self.close()
            raise UserError(*value)

    def _status(self) -> int | None:
        code = self.process.wait() if self.process is not None else None
        self.close()
        return code

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


def serve(pipe: Connection) -> None:
    """The other process: load, say so, then answer call by call until the pipe closes."""
    spec, where, paths = pickle.loads(pipe.recv_bytes())
    sys.path += [path for path in paths if path not in sys.path]  # last: what may hide a module there does not here
    from steerl.reward.kinds.loading import load_function
    from steerl.rollout.common.errors import UserError, said

    try:
        function = load_function(spec, where)
    except UserError as problem:
        pipe.send_bytes(pickle.dumps(("raised", problem.lines)))
        return
    pipe.send_bytes(pickle.dumps(("ready", None)))
    while True:
        try:
            arguments, told, logs = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps(("gave", told.take(function(**arguments, **told.log(logs)))))
        except (Exception, SystemExit) as error:  # noqa: BLE001  told to the caller, who names the row
            answer = pickle.dumps(("raised", said(error)))
        pipe.send_bytes(answer)


def die_with_parent() -> None:
    """A function that hangs must not outlive a job that was killed and could not end it (Linux)."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    die_with_parent()
    serve(Connection(int(sys.argv[1])))
