"""Real processes without their start: forked from a server that has imported torch and transformers already.

    run([sys.executable, "scripts/train_ppo.py", ...])     as subprocess.run, with what it wrote as text
    start([...])                                           as subprocess.Popen
    run_ranks("scripts/train_sft.py", ...)                 two ranks over gloo; start_ranks(...) does not wait

Arguments, folder, environment, signals and exit status are a fresh process's own; the order of its imports is not, nor
what a library reads from the environment while it is imported. A launcher's ranks are forked from the launcher, without
what it holds (test_warm.py); fresh from end to end are test_failing_ranks.py (DDP, ZeRO-3) and test_processes.py (torchrun).
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

ROOT = Path(__file__).parents[1]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        *("steerl.configs.reader", "steerl.scripts.train_ppo", "steerl.training.stages.sft", "steerl.training.ppo"),
        *("accelerate", "peft", "torch._dynamo", "transformers.models.gpt2.modeling_gpt2"),  # dynamo: DeepSpeed's
        "tests.warm",
    ]
)
gc.freeze()  # in the server: what is imported stays in pages that the processes share


class Warm:
    """A process, in the words of subprocess.Popen. `said`: its standard input; `terminal`: the path of one to live in."""

    def __init__(
        self,
        command: Sequence[str | Path],
        cwd: Path = ROOT,
        env: Any = None,
        start_new_session: bool = False,
        said: str = "",
        terminal: str = "",
    ):
        assert command[0] == sys.executable, "a Python program"
        self.args = [str(word) for word in command]
        self._folder = tempfile.TemporaryDirectory()
        self._in, self._out, self._err = (Path(self._folder.name) / name for name in ("in", "out", "err"))
        self._in.write_text(said, encoding="utf-8")
        self._out.touch()
        files = [terminal, terminal, os.devnull] if terminal else [str(self._in), str(self._out), str(self._err)]
        environment = dict(os.environ if env is None else env)
        given = (self.args[1:], str(cwd), environment, files, start_new_session or bool(terminal))
        self._process = _SERVER.Process(target=_be, args=given)
        self._process.start()
        self.pid: int = self._process.pid or 0
        self._read = 0
        while terminal and self.poll() is None and self._input() != terminal:
            self._process.join(0.002)  # until then the caller alone holds it open

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") if path.exists() else "" for path in (self._out, self._err))
        return out, err

    def readline(self) -> str:
        """The next line of its output, as soon as it is whole; "" at the end."""
        while True:
            ended = self.poll() is not None
            rest = self._out.read_text(encoding="utf-8")[self._read :]
            line, newline, _ = rest.partition("\n")
            if newline or ended:
                self._read += len(line) + len(newline)
                return line + newline
            self._process.join(0.002)

    def _input(self) -> str:
        try:
            return os.readlink(f"/proc/{self.pid}/fd/0")
        except OSError:  # it ended just now
            return ""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


start = Warm


def run(command: Sequence[str], timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    (done,) = _finished([Warm(command, **options)], timeout)
    return done


def start_ranks(*command: str, env: Any = None) -> list[Warm]:
    """`command` in two ranks over gloo, which find each other by the environment, as a launcher gives it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {**(os.environ if env is None else env), **meeting}
    return [
        Warm([sys.executable, *command], env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)
    ]


def run_ranks(*command: str, env: Any = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Their outputs one after the other, and the first status that is not 0."""
    done = _finished(start_ranks(*command, env=env), timeout)
    status = next((each.returncode for each in done if each.returncode), 0)
    out, err = ("".join(getattr(each, name) for each in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(list(command), status, out, err)


def accelerate_launch(engine: str | Path, *command: str) -> list[str]:
    """The launcher's command line: `engine` is one of configs/accelerate, or a file."""
    config = engine if isinstance(engine, Path) else ROOT / "configs" / "accelerate" / f"{engine}.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    return [*launcher, "--config_file", str(config), *command]


def _finished(processes: list[Warm], timeout: float) -> list[subprocess.CompletedProcess[str]]:
    try:
        said = [process.communicate(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.wait(), *both) for process, both in zip(processes, said, strict=True)
    ]


def _be(argv: list[str], folder: str, environment: dict[str, str], files: list[str], new_session: bool) -> None:
    """In the forked process: become `python ARGV`."""
    if new_session:
        os.setsid()  # the terminal that it opens first is then its own
    terminal = files[:1] == files[1:2] != []
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(files):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        line_wise = 1 if name == "stderr" or terminal or not files else -1
        stream = open(number, "w" if number else "r", line_wise, encoding="utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):  # a launcher's
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    numpy.random.seed()  # else all have the server's
    torch.seed()
    sys.path[:0] = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if argv[:2] == ["-m", "accelerate.commands.launch"]:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen = _Rank  # type: ignore[misc,assignment]
    status: Any = 0
    try:
        _program(*argv)
    except SystemExit as left:
        status = left.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class _Rank:
    """What torch's launcher asks of the subprocess.Popen of a rank."""

    def __init__(self, args: Sequence[str], env: dict[str, str], stdout: Any, stderr: Any, **_: Any):
        assert args[:2] == (sys.executable, "-u"), "a Python program"
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            for number, file in ((1, stdout), (2, stderr)):
                if file:
                    os.dup2(file.fileno(), number)
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            _be(list(args[2:]), os.getcwd(), env, [], True)
        while os.getpgid(self.pid) != self.pid:
            time.sleep(0.001)  # until then the launcher's signals, which go to its group, miss it

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self, timeout: float) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a rank", timeout)
            time.sleep(0.005)
        return self.returncode or 0


def _program(first: str, *words: str) -> None:
    if first == "-c":
        sys.argv = [first, *words[1:]]
        exec(compile(words[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *words]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
