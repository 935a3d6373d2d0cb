"""A user's function in a process of its own, so that a call that hangs can be killed.

Worker.call(arguments, timeout) ---- process ----> function(**arguments) ---- what it gave, or why it did not, or Overdue
                                                                            (killed; the next call starts a new process)
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection

from steerl.reward.kinds.loading import CallResult, load_function, with_arguments
from steerl.rollout.common.errors import UserError, said
from steerl.rollout.common.worker import Ended, WorkerProcess


class WorkerFailed(Exception):
    """The function raised, or its process died."""


class Worker:
    """Calls one function in another process, which is started when first needed and after every kill."""

    def __init__(self, function: str, arguments: dict[str, object], where: str):
        self.function, self.arguments, self.where = function, arguments, where
        self.process: WorkerProcess | None = None
        self.turn = threading.Lock()

    def call(self, arguments: dict[str, object], told: CallResult, logs: Sequence[str], timeout: float | None) -> CallResult:
        """`told`: what is to be filled. `logs`: which of its methods the function is given."""
        with self.turn:
            if self.process is None or not self.process.alive:
                self.close()
                self.process = WorkerProcess(__name__, self.function, self.where, self.function, self.arguments, self.where)
            try:
                self.process.send(arguments, told, logs)
                kind, value = self.process.receive(timeout, f"not done after {timeout} s")
            except Ended as error:
                raise WorkerFailed(f"its process ended ({error})") from error
            if kind == "raised":
                raise WorkerFailed(value)
            filled: CallResult = value
            return filled

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
        self.process = None

    def __del__(self) -> None:
        self.close()


def serve(pipe: Connection, spec: str, arguments: dict[str, object], where: str) -> None:
    """The other process: load, say so, then answer call by call until the pipe closes."""
    try:
        function = with_arguments(load_function(spec, where), arguments, where)
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
