"""The user's tools or environments, each episode's in a process of its own: what raises, hangs or dies there is told here.

    Pool ── once ──> zygote (loads the file) ──fork──> child of an episode
      └─ session() ─> reset(row) ─> step(said) ... ─> end()     futures; `workers` calls side by side, `timeout` seconds each

`tools`: functions without state; a call that fails is told to the policy, and the next one gets a new process if need be.
`trl`: an object whose public methods are tools, told likewise; what kills its process ends the episode.
`gym`: an object with reset and step; whatever it raises ends the episode.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.reduction import send_handle
from typing import Any, TypeVar

from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.common.worker import STARTUP, Ended, Overdue, WorkerProcess
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.environments.types import Answer, Call, Ending, Opening, Said, Session

Value = TypeVar("Value")
STUCK = 60.0
"""Seconds in which the zygote has forked or ended a child, and in which it ends itself."""
CLOSED = "the job is ending"


class Failed(Exception):
    """What the user's code raised. `told`: the same for the policy."""

    def __init__(self, line: str, told: str):
        super().__init__(line)
        self.told = told


class Lost(Exception):
    """The process is gone: it took too long and was killed, or it ended by itself."""


class Pool:
    """Makes sessions. A ConfigError where the user's file, or what it holds, cannot be served."""

    def __init__(self, settings: EnvironmentSettings):
        self.settings = settings
        self.named = [(f"environment.tools[{place}]", spec) for place, spec in enumerate(settings.tools)]
        self.named += [("environment.factory", settings.factory)] if settings.factory else []
        self.lock, self.closed = threading.Lock(), False
        self.threads = ThreadPoolExecutor(settings.workers, thread_name_prefix="environment")
        try:
            self.zygote = Zygote(self.named)
        except UserError as error:
            raise ConfigError(*error.lines) from error
        try:
            self.kind, self.tools = self._described()
        except BaseException:
            self.close()
            raise

    def _described(self) -> tuple[str, list[dict[str, Any]]]:
        """The kind, and the tools' schemas, which a child makes: they need torch, which the zygote need not have."""
        try:
            child = Child(self, None)
            kind = "tools" if self.settings.tools else child.ask(self.settings.timeout, "make")
            tools, problems = child.ask(STARTUP, "describe_tools" if self.settings.tools else "describe_environment")
        except (Failed, Lost) as error:
            where = ": ".join(self.named[0])
            problems = [line if (line := str(error)).startswith("environment.") else f"{where}: {line}"]
        if problems:
            raise ConfigError(*problems)
        child.close()
        return kind, tools

    def session(self, seed: int | None = None) -> Session:
        """`seed`: of the random numbers that the user's code draws (random, numpy, torch); None: others every time."""
        return EpisodeSession(self, seed)

    def fork(self, handle: int, seed: int | None) -> tuple[Zygote, int]:
        """A child that talks over this socket, of a new zygote where the last one was killed."""
        with self.lock:
            if self.closed:
                raise Lost(CLOSED)
            try:
                if not self.zygote.process.alive:
                    self.zygote = Zygote(self.named)
                return self.zygote, self.zygote.fork(handle, seed)
            except (UserError, Ended, Overdue, OSError) as error:
                raise Lost(f"no process can be started for it: {error}") from error

    def end(self, zygote: Zygote, pid: int) -> str:
        """Why a child is gone; it is now."""
        with self.lock:
            if self.closed:
                return CLOSED
            try:
                return f"its process ended (exit status {zygote.end(pid)})"
            except (Ended, Overdue, OSError) as error:
                return f"the process that started it ended ({error})"

    def close(self) -> None:
        """End all processes, whatever they are doing."""
        with self.lock:
            self.closed = True
            self.zygote.close()
        self.threads.shutdown()


class Zygote:
    """The process that loaded the user's file (zygote.py)."""

    def __init__(self, named: list[tuple[str, str]]):
        where, name = named[0]
        # The order of sets is part of what an environment draws.
        environment = {"PYTHONHASHSEED": "0", **os.environ}
        self.process = WorkerProcess(
            "steerl.rollout.environments.host.zygote", name, where, named, stdout=subprocess.DEVNULL, env=environment
        )

    def fork(self, handle: int, seed: int | None) -> int:
        self.process.send("fork", seed)
        send_handle(self.process.pipe, handle, self.process.process.pid)
        pid = self.process.receive(STUCK, "the process that starts others does not answer")
        if not isinstance(pid, int):
            raise OSError(pid)
        return pid

    def end(self, pid: int) -> int | None:
        self.process.send("end", pid)
        status: int | None = self.process.receive(STUCK, "the process that starts others does not answer")
        return status

    def close(self) -> None:
        self.process.pipe.close()  # then it ends, all others first
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.process.wait(STUCK)
        self.process.close()


class Child:
    """An episode's process (hosted.py)."""

    def __init__(self, pool: Pool, seed: int | None):
        self.pool, self.closed = pool, False
        try:
            self.socket, there = socket.socketpair()
        except OSError as error:  # too many open files
            raise Lost(f"no process can be started for it: {error}") from error
        with there:
            try:
                self.zygote, self.pid = pool.fork(there.fileno(), seed)
            except Lost:
                self.socket.close()
                raise
        self.answers = self.socket.makefile("rb")

    def ask(self, timeout: float, what: str, *arguments: object) -> Any:
        self.socket.settimeout(timeout)
        try:
            self.socket.sendall(pickle.dumps((what, *arguments)))
            outcome, *value = json.loads(self.answers.readline())
        except TimeoutError as error:
            self.close()
            raise Lost(f"not done after {timeout:g} s") from error
        except (OSError, ValueError, TypeError) as error:  # it closed its end, or wrote what is no answer
            raise Lost(self.close()) from error
        if outcome == "raised":
            raise Failed(*value)
        return value[0]

    def close(self) -> str:
        """How it ended."""
        if self.closed:  # another one may have its id by now
            return CLOSED
        self.closed = True
        self.answers.close()
        self.socket.close()
        return self.pool.end(self.zygote, self.pid)


class EpisodeSession:
    """One episode's tools or environment. One call at a time."""

    def __init__(self, pool: Pool, seed: int | None):
        self.pool, self.seed = pool, seed
        self.child: Child | None = None
        self.failure = ""

    def reset(self, row: dict[str, Any]) -> Future[Opening]:
        return self._submit(lambda: self._reset(row), Opening(failure=CLOSED))

    def step(self, said: Said) -> Future[Answer]:
        return self._submit(lambda: self._step(said), Answer(failure=CLOSED))

    def end(self) -> Future[Ending]:
        return self._submit(self._end, Ending(failure=CLOSED))

    def _submit(self, work: Callable[[], Value], closed: Value) -> Future[Value]:
        try:
            return self.pool.threads.submit(work)
        except RuntimeError:  # the pool is closed
            future: Future[Value] = Future()
            future.set_result(closed)
            return future

    def _reset(self, row: dict[str, Any]) -> Opening:
        if self.pool.kind == "tools":
            return Opening()
        try:
            self._ask("make")
            return Opening(self._ask("reset", row))
        except (Failed, Lost) as error:
            return Opening(failure=self._fail("reset", error))

    def _step(self, said: Said) -> Answer:
        if self.failure:
            return Answer(failure=self.failure)
        try:
            if self.pool.kind == "gym":
                return Answer(*self._ask("step", said.text))
        except (Failed, Lost) as error:
            return Answer(failure=self._fail("step", error))
        messages, errors = [], []
        for call in said.calls:
            content, problem = self._called(call)
            messages.append({"role": "tool", "name": call.name, "content": content})
            errors += [problem] if problem else []
            if self.failure:
                break
        return Answer(messages, errors=tuple(errors), failure=self.failure)

    def _called(self, call: Call) -> tuple[str, str]:
        """What the policy is told, and the error's line."""
        names = [tool["function"]["name"] for tool in self.pool.tools]
        name = " ".join(f"{call.name:.100}".split())
        problem = call.problem
        if not problem and call.name not in names:
            problem = f"there is no tool {name!r}; there are: {', '.join(names)}"
        if problem:
            return f"error: {problem}", f"{name}: {' '.join(problem.split())}".removeprefix(": ")
        try:
            return self._ask("call", call.name, call.arguments), ""
        except Failed as error:
            return f"error: {error.told}", f"{name}: {error}"
        except Lost as error:
            self.child = None
            if self.pool.kind != "tools":
                self._fail(name, error)
            return f"error: {error}", f"{name}: {error}"

    def _end(self) -> Ending:
        if self.child is None:
            return Ending(failure=self.failure)
        try:
            ending = {} if self.pool.kind == "tools" else self._ask("end")
        except (Failed, Lost) as error:
            return Ending(failure=self._fail("end", error))
        self.child.close()
        self.child = None
        return Ending(**ending)

    def _ask(self, what: str, *arguments: object) -> Any:
        self.child = self.child or Child(self.pool, self.seed)
        return self.child.ask(self.pool.settings.timeout, what, *arguments)

    def _fail(self, what: str, error: Exception) -> str:
        """What went wrong; the environment is gone then."""
        if self.child is not None:
            self.child.close()
        self.child, self.failure = None, f"{what}: {error}"
        return self.failure
