"""Hostile cases, a forked child each: this process has everything imported, so that a case costs what it does and no start.

python -m tests.fuzz.server FOLDER FIRST LAST      an object per case on stdout: seed, what it was, the fault ("" = none)

A case passes when its command ends by itself, within bounds of time and memory, with a result (status 0) or with clear
lines and a documented status; no traceback, no raw control character, no input changed, nothing left half-written.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.fuzz import cases, world

WALL, PROCESSOR, MEMORY = 120, 20, 1 << 30
"""Seconds by the clock and of the processor, and bytes beyond what the server holds, that a case may take."""
LEFT = ("out", "out.jsonl", "out.html", "out.safetensors", "out.effect.json", "out.safetensors.effect.json")
"""Where commands may write."""
RAW = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def forked(work: Callable[[], None], folder: Path) -> int:
    """`work` in a child, with its output in folder/stdout and folder/stderr; its status, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        os.setsid()
        for number, name in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        status = 0
        try:
            work()
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:  # noqa: BLE001 - a traceback is what is looked for
            traceback.print_exc()
            status = 1
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(UnicodeError, ValueError, OSError):
                stream.flush()
        os._exit(status)
    until = time.monotonic() + WALL
    ended = (0, 0)
    while ended[0] == 0 and time.monotonic() < until:
        ended = os.waitpid(child, os.WNOHANG)
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # its own workers, and itself where it did not end
    if ended[0] == 0:
        os.waitpid(child, 0)
        return -signal.SIGALRM
    return os.waitstatus_to_exitcode(ended[1])


def bounded(command: str, argv: list[str], folder: Path) -> None:
    os.chdir(folder)
    held = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) << 10  # type: ignore[union-attr]
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, held + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR, PROCESSOR + 5))
    world.run(command, argv)


def contents(folder: Path) -> dict[str, str]:
    """Hash by path of every file, those aside that the command may write."""
    files = (path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: _hash(path) for name, path in sorted(named.items()) if name.split("/")[0] not in LEFT}


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "link"


def judge(case: cases.Case, status: int, out: bytes, err: bytes, folder: Path, before: dict[str, str]) -> str:
    """What is wrong with the way that a case ended; empty where nothing is."""
    if status < 0:
        return f"no answer: ended by {signal.Signals(-status).name}"
    try:
        said, told = out.decode(), err.decode()
    except UnicodeDecodeError:
        return "bytes that are no text"
    if "Traceback (most recent call last)" in told:
        return "traceback: " + [line for line in told.splitlines() if line.strip()][-1][:300]
    if raw := RAW.search(told) or RAW.search(said):
        return f"a raw {raw.group()!r} near {raw.string[max(raw.start() - 40, 0) : raw.end() + 20]!r}"
    lines = [line for line in told.splitlines() if line.strip()]
    if status not in (0, 2) and not (case.command == "inspect_rollouts" and status == 1):
        return f"status {status}: {lines[-1:]}"
    if status and not any(": " in line for line in lines):
        return f"status {status} without a clear line: {lines[:2]}"
    if len(lines) > 40 or any(len(line) > 2000 for line in lines):
        return f"{len(lines)} lines, the longest of {max(map(len, lines))}"
    made = [folder / name for name in (*LEFT, *(["run", "dump"] if case.goes_on else [])) if (folder / name).exists()]
    if status == 0 and not (said.strip() or made or case.names):
        return "status 0 without a result"
    if (folder / "PWNED").exists():
        return "a pickle was run"
    after = contents(folder)
    changed = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if not case.goes_on and (changed := [name for name in changed if name in before or not case.names]):
        return f"changed: {changed[:3]}"
    for path in (path for place in made for path in ([place] if place.is_file() else sorted(place.rglob("*")))):
        if path.name.endswith(".tmp"):
            return f"left behind: {path.name}"
        if path.suffix == ".json" and not case.goes_on:
            json.loads(path.read_text())
    return ""


def one(seed: int, base: Path, scratch: Path) -> dict[str, object]:
    folder = scratch / "case"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    shutil.copytree(base, folder, symlinks=True)
    case = cases.make(seed, folder)
    before = contents(folder)
    start = time.monotonic()
    status = forked(lambda: bounded(case.command, case.argv, folder), scratch)
    out, err = ((scratch / name).read_bytes() for name in ("stdout", "stderr"))
    fault = judge(case, status, out, err, folder, before)
    told = err.decode(errors="replace")[-400:]
    seconds = round(time.monotonic() - start, 2)
    return {
        "seed": seed,
        "case": f"{case.command}: {case.what}"[:300],
        "status": status,
        "fault": fault,
        "said": told,
        "s": seconds,
    }


def main(folder: Path, first: int, last: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / "base"
    if not base.exists():

        def prepare() -> None:
            world.make(base)
            (folder / "modules.json").write_text(json.dumps(sorted(sys.modules)))

        assert forked(prepare, folder) == 0, (folder / "stderr").read_text()
    for name in json.loads((folder / "modules.json").read_text()):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for seed in range(first, last):
        print(json.dumps(one(seed, base, folder / f"scratch-{first}")), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3]))
