"""The process between a job and its vLLM server: whatever ends the job, the server and all that it started end too.

    job ── starts ──> guard ── starts ──> server (a session of its own) ──> engine, workers, trackers
                        └── fork ──> watcher: ends them should the guard itself be killed

    python -I guard.py PARENT COMMAND ...       PARENT: the job's process id; leaves with the server's status

Standard library alone: it is run as a file. Linux: what a server has started is read in /proc.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

EVERY = 0.2
"""Seconds between two looks at who is still there."""
GRACE = 5.0
"""Seconds that a server has to leave by itself."""
TRACKERS = 1.0
"""Those that the trackers of shared memory have after it, to give back what is left of it."""
SCRATCH = "STEERL_SCRATCH"
"""In the environment: a folder of the job's, weights in memory above all, that goes with a job which could not remove it."""
_SUBREAPER = 36


def main(parent: int, command: list[str]) -> int:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: asked.append(number))
    # Whoever loses its parent below here is taken in here, not by init, and is found.
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    # vLLM leaves its sockets and more where temporary files are. A socket's whole path has at most 107 characters.
    place = tempfile.gettempdir()
    jobs = os.environ.pop(SCRATCH, "")
    scratch = tempfile.mkdtemp(prefix="steerl-engine-", dir=place if len(place) < 50 else "/tmp")
    server = subprocess.Popen(command, start_new_session=True, env={**os.environ, "TMPDIR": scratch})
    guard = os.getpid()
    watcher = os.fork()
    if not watcher:
        return watch(guard, server.pid, scratch)
    while not asked and os.getppid() == parent and server.poll() is None:
        time.sleep(EVERY)
    if server.poll() is None:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(GRACE)
    os.kill(watcher, signal.SIGKILL)
    os.waitpid(watcher, 0)
    sweep(server.pid, guard)
    for folder in [scratch, *([jobs] if jobs and os.getppid() != parent else [])]:
        shutil.rmtree(folder, ignore_errors=True)
    status = server.wait()
    return status if status >= 0 else 128 - status


def watch(guard: int, session: int, scratch: str) -> int:
    """Wait for the guard to be gone; then nobody else ends the server."""
    os.setsid()
    while os.getppid() == guard:
        time.sleep(EVERY)
    sweep(session, os.getpid())
    shutil.rmtree(scratch, ignore_errors=True)
    return 0


def sweep(session: int, me: int) -> None:
    """Kill all that belongs to the session or descends from it or from this process, the trackers of shared memory last."""
    until = time.monotonic() + TRACKERS
    known: set[int] = set()
    while left := belonging(session, me, known):
        known |= left  # whose children others take in when it is gone
        others = {pid for pid in left if not is_tracker(pid)}
        for pid in others or (left if time.monotonic() > until else ()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        reap()
        time.sleep(0.02)


def belonging(session: int, me: int, known: Collection[int] = ()) -> set[int]:
    """Those that run."""
    parents, family, runs = {}, {me, *known}, set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, parent, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            pid = int(folder.name)
            parents[pid] = int(parent)
            if int(its_session) == session:
                family.add(pid)
            if state not in "ZX":
                runs.add(pid)
    while found := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= found
    return (family & runs) - {me}


def is_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def reap() -> None:
    """Those that were taken in and have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
