"""The process that loads the user's file once, and forks itself for each episode.

    Pool ──fork, a socket──> zygote ──fork──> child of one episode (hosted.py)     a fork costs milliseconds, an import seconds
         ──end──────────────────────kill──>

It runs none of the user's code after loading, so it never hangs; all that it started ends with it, and it ends with the job.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.loading import load_function
from steerl.rollout.common.worker import die_with_parent
from steerl.rollout.environments.host import hosted

Function = Callable[..., Any]
TICK = 1.0
"""Seconds between two looks at whether the job is still there: what it started may hold the pipe open."""


def serve(pipe: Connection, named: list[tuple[str, str]]) -> None:
    """`named`: (the setting, what it names)."""
    job = os.getppid()
    os.setpgid(0, 0)  # Ctrl-C and a scheduler's SIGTERM mean the job, which finishes what is begun
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    sources = [spec for _, spec in named]
    functions: list[Function] = []
    problems: list[str] = []
    for where, spec in named:
        try:
            functions.append(load_function(spec, where))
        except UserError as problem:
            problems += problem.lines
    if "numpy" in sys.modules:
        importlib.import_module("numpy.random")  # which is loaded when first used: here once, and seeded in each child
    pipe.send_bytes(pickle.dumps(("raised", problems) if problems else ("ready", None)))
    gc.freeze()  # what is there now stays in pages that the children share
    die_with_parent(0)  # it ends by itself, and then its children's children do too
    _adopt()
    alive: set[int] = set()
    try:
        while os.getppid() == job:
            if pipe.poll(TICK):
                what, number = pickle.loads(pipe.recv_bytes())
                answer = _fork(pipe, number, sources, functions, alive) if what == "fork" else _end(number, alive)
                pipe.send_bytes(pickle.dumps(answer))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    finally:
        while left := _children() | alive:
            for pid in left:
                alive.discard(pid)
                _kill(pid)


def _end(pid: int, alive: set[int]) -> int | None:
    """A child's exit status, negative for a signal."""
    if pid not in alive:
        return None
    alive.discard(pid)
    status = _kill(pid)
    for orphan in _children() - alive:  # those that left their group go on until the job ends
        os.waitpid(orphan, os.WNOHANG)
    return status


def _fork(pipe: Connection, seed: int | None, sources: list[str], functions: list[Function], alive: set[int]) -> int | str:
    """The child's id, or why there is none."""
    handle, zygote = recv_handle(pipe), os.getpid()
    try:
        pid = os.fork()
    except OSError as error:  # no more processes
        return str(error)
    finally:
        if os.getpid() == zygote:
            os.close(handle)
    if pid:
        with contextlib.suppress(OSError):  # both set it: whoever is first, it is set when the end comes
            os.setpgid(pid, pid)
        alive.add(pid)
        return pid
    try:
        os.setpgid(0, 0)
        die_with_parent()
        if os.getppid() == zygote:
            pipe.close()
            nothing = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):  # the job's own must not be flooded
                os.dup2(nothing, stream)
            hosted.serve(handle, sources, functions, seed)
    finally:
        os._exit(0)


def _kill(pid: int) -> int | None:
    """A child, with all of its group."""
    status = None
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:  # those that it started came to this process when it died
            ended, code = os.waitpid(-pid, 0)
            status = os.waitstatus_to_exitcode(code) if ended == pid else status
    with contextlib.suppress(ChildProcessError):  # of another group: what made itself a daemon
        os.waitpid(pid, 0)
    return status


def _adopt() -> None:
    """What outlives its child becomes this process's own (Linux)."""
    if sys.platform == "linux":
        set_child_subreaper = 36
        ctypes.CDLL(None).prctl(set_child_subreaper, 1)


def _children() -> set[int]:
    files = Path("/proc/self/task").glob("*/children")
    return {int(pid) for file in files for pid in file.read_text(encoding="ascii").split()}
