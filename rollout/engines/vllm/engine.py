"""VllmEngine: one server of a job, to all its ranks. It starts it, sends it weights and steering, asks it, and ends it.

ready ── the main process starts a server, or finds that of engine.url ── all ranks know it
sync  ── weights of all ranks, layer by layer, to the server ── some rows scored again ── its version is the step's
begin, finish ── rows; where the server has died the main process starts it again, and what was not answered is asked again:
                 draws are keyed, so nothing changes
"""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm import model_folder
from steerl.rollout.engines.vllm.client import Client, Gone
from steerl.rollout.engines.vllm.server import Server
from steerl.rollout.engines.vllm.steering import ServerSteering
from steerl.rollout.engines.vllm.support import refusals
from steerl.rollout.engines.vllm.weights import export
from steerl.rollout.engines.vllm.weights.rescore import TOKENS, check_rows
from steerl.rollout.engines.vllm.weights.sync import Sync
from steerl.rollout.engines.vllm.wire import VERSION, Answer, Ask, Law
from steerl.rollout.model.policy import Policy
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout

DEATHS = 3
"""Restarts within one draw, after which the server is at fault."""
THREADS = 512
"""Requests under way from one rank."""
LOG = "engine.log"
"""In the run's folder: what the server says."""
TAKEN = 256
"""Answers fetched at once."""
Value = TypeVar("Value")
_logger = logging.getLogger(__name__)


@dataclass
class Asked:
    """Rows that were asked for, and what came of each."""

    law: Law
    prompts: list[list[int]]
    asks: list[Ask]
    version: int
    """The weights that are to draw them."""
    waiting: dict[int, Future[None]]
    """Requests under way, by row."""
    answers: dict[int, Answer]


class Inside(Protocol):
    """Calls a function where the policy's forward pass may be run."""

    def __call__(self, call: Callable[[], Value], /) -> Value: ...


class VllmEngine:
    """Every rank makes the same calls, `begin` aside. `alone`: each process has a server of its own; no call is collective."""

    def __init__(
        self,
        policy: Policy,
        settings: EngineSettings,
        log: Path,
        *,
        steering: Steering | None = None,
        dtype: str | None = None,
        longest: int | None = None,
        tolerance: float = 1e-3,
        inside: Inside = lambda call: call(),
        alone: bool = False,
    ):
        """What cannot be done is refused here; the server starts with the first draw or sync. `dtype`: of the
        server's weights, where it is not the policy's. `longest`: tokens of a prompt with its response, where that is less than
        the model's context. `inside` calls a function where the policy's forward pass may be run."""
        self.policy, self.settings, self.inside, self.alone, self.tolerance = policy, settings, inside, alone, tolerance
        self.steering = ServerSteering(steering) if steering is not None else None
        if problems := [*refusals(policy), *(self.steering.refusals() if self.steering is not None else [])]:
            raise ConfigError(*problems)
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self.folder = self._on_main(self._make_scratch)
        self.client = Client(settings.url or "http://127.0.0.1")
        self.weights = Sync(self.client, policy, settings, self.folder, alone=alone)
        self.version, self.restarts = -1, 0
        """`version`: the step whose weights the server has; -1 before the first."""
        self._flags = [*(["--dtype", dtype] if dtype else []), *self.weights.flags()]
        if longest is not None:  # the rows that are scored again have room, too
            self._flags += ["--max-model-len", str(max(longest, 2 * TOKENS))]
        self._flags += self.steering.flags() if self.steering is not None else []
        self._log = log
        self._server: Server | None = None
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="vllm")
        self.recent: Rollout | None = None
        """Rows that were drawn last, of which some are scored again after a sync."""
        self._gap, self._seconds = 0.0, 0.0

    # -- its life -------------------------------------------------------------------------------------------------------

    def ready(self, step: int) -> None:
        """There is a server, with weights: those of `step` where it has none yet."""
        if self.version < 0:
            self.sync(step)

    def sync(self, step: int) -> None:
        """The policy's weights and steering as they are now, which are those after `step` updates. Every rank comes here."""
        if self.version < 0:
            self.client.move(self._on_main(self._start))
        began = time.perf_counter()
        for _ in range(DEATHS):
            with contextlib.suppress(Gone):
                self.weights.send(step)
                if self.steering is not None:
                    self.inside(partial(self.steering.take, step))
                    self._on_main(self._steer)
                self._check(step)
                break
            self.client.move(self._on_main(self._start_again))
        else:
            raise UserError(f"engine: the server died {DEATHS} times while it was sent weights; {self._log} says why")
        self.version, self._seconds = step, time.perf_counter() - began

    def close(self) -> None:
        """The server that was started here ends, whatever it is at. What is under way is dropped."""
        if self._server is not None:
            self._server.stop()
        self.client.close()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.weights.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def metrics(self) -> dict[str, float]:
        """Of the last sync, and of the run so far."""
        checked = {"engine/gap_max": self._gap} if self.settings.check_rows else {}
        return {"engine/sync_s": self._seconds, "engine/restarts": float(self.restarts), **checked}

    def _make_scratch(self) -> Path:
        """A folder in memory, where there is one: weights go through it. It goes with this object, or the process."""
        memory = Path("/dev/shm")
        place = memory if memory.is_dir() else None
        self._scratch = tempfile.TemporaryDirectory(prefix="steerl-", dir=place, ignore_cleanup_errors=True)
        return Path(self._scratch.name)

    def server(self) -> Server:
        """The one to start, with a folder of the policy's config and tokenizer."""
        return Server(
            self.settings, model_folder.write(self.policy, self.folder / "model"), self._log, self._flags, self.folder
        )

    def _start(self) -> str:
        if self.settings.url:
            model_folder.write(self.policy, self.folder / "model")
        else:
            self._server = self.server()
            self._server.start()
            self.client.move(self._server.url)
        return self._found()

    def _found(self) -> str:
        """Main process: one that answers; that of engine.url may be another than it was."""
        self._hello()
        return self.client.url

    def _start_again(self) -> str:
        """Main process: another server in the place of one that is gone."""
        if self._server is None:
            raise UserError(f"engine.url: nobody answers at {self.client.url} any more; start the server again, and resume")
        self.restarts += 1
        _logger.warning("engine: the server is gone (%s); it is started again", self._log)
        self._server.restart()
        self.client.move(self._server.url)
        return self._found()

    def _hello(self) -> None:
        try:
            workers = self.client.rpc("steerl_hello")
        except Gone as error:
            if self.settings.url:
                raise UserError(
                    f"engine.url: nobody answers ({error}); `steerl engine serve` starts a server, or leave engine.url out"
                ) from error
            raise UserError(f"engine: the server died as soon as it had started; see {self._log}") from error
        for told in workers:
            if told["wire"] != VERSION:
                raise UserError(
                    f"engine: the server's steerl speaks version {told['wire']} of the wire, this one {VERSION}; install the "
                    "same steerl beside vLLM (make vllm)"
                )

    def _check(self, step: int) -> None:
        """Some rows again, by the server and by the policy."""
        count = self.settings.check_rows
        how: dict[str, Any] = {"step": step, "tolerance": self.tolerance, "inside": self.inside, "alone": self.alone}
        self._gap = check_rows(self.ask, self.policy, self.recent, count, **how) if count else 0.0

    def _steer(self) -> None:
        if self.steering is not None:
            self.steering.send(self.client, self.folder)

    # -- rows -----------------------------------------------------------------------------------------------------------

    def law(self, sampling: Sampling) -> Law:
        return Law(sampling, self.policy.vocab_size, tuple(self.policy.eos_ids), str(self.folder / "model"))

    def begin(self, law: Law, prompts: list[list[int]], asks: list[Ask]) -> Asked:
        """Ask, and come back at once."""
        asked = Asked(law, prompts, asks, self.version, {}, {})
        self._send(asked)
        return asked

    def add(self, asked: Asked, prompt: list[int], ask: Ask) -> int:
        """One row more, under way at once; its number."""
        asked.prompts.append(prompt)
        asked.asks.append(ask)
        self._submit(asked, len(asked.asks) - 1)
        return len(asked.asks) - 1

    def ended(self, asked: Asked) -> dict[int, Answer]:
        """What has been answered since it was asked last, without waiting."""
        return self._collect(asked, [b for b, future in asked.waiting.items() if future.done()])

    def go_on(self, asked: Asked, local: Callable[[], object], *, moved: bool = False) -> None:
        """Rows of which some are added as others are answered: `local` adds and answers until nothing more of this process's
        is under way, and is called again where a server died meanwhile. Every rank comes here."""
        for _ in range(DEATHS):
            local()
            if not self._most(len(asked.asks) - len(asked.answers)):
                return
            self._revive(moved)
            self._send(asked)
        raise UserError(f"engine: the server died {DEATHS} times in one draw; {self._log} says why")

    def finish(self, asked: Asked, *, moved: bool = False) -> list[Answer]:
        """The answers, in the order of the asks. Every rank comes here, with as many rows as it has. `moved`: the policy has
        learned since they were asked for."""
        self.go_on(asked, lambda: self._collect(asked), moved=moved)
        return [asked.answers[b] for b in range(len(asked.asks))]

    def ask(self, law: Law, prompts: list[list[int]], asks: list[Ask]) -> list[Answer]:
        """Of one process alone, whose server is there; Gone where it is not."""
        asked = self.begin(law, prompts, asks)
        self._collect(asked)
        if len(asked.answers) < len(asks):
            raise Gone(f"{len(asks) - len(asked.answers)} rows were not answered")
        return [asked.answers[b] for b in range(len(asks))]

    def _send(self, asked: Asked) -> None:
        open_rows = [b for b in range(len(asked.asks)) if b not in asked.answers]
        if (open_rows or not asked.asks) and not self._lawful(asked.law):
            return
        for b in open_rows:
            self._submit(asked, b)

    def _submit(self, asked: Asked, b: int) -> None:
        call = (asked.prompts[b], asked.law, asked.asks[b], self.weights.model)
        asked.waiting[b] = self._pool.submit(self.client.generate, *call)

    def _lawful(self, law: Law) -> bool:
        """Tell the workers of a law before the first row that is drawn by it: one that they cannot read is refused here."""
        try:
            for told in self.client.rpc("steerl_law", law.text):
                if told["problem"]:
                    raise UserError(f"engine: the server cannot draw by these settings of sampling: {told['problem']}")
        except Gone:
            return False
        return True

    def _collect(self, asked: Asked, rows: list[int] | None = None) -> dict[int, Answer]:
        """Wait for these rows, or all that are under way, and fetch them; those of a server that is gone stay open."""
        ended, fetched = [], dict[int, Answer]()
        for b in list(asked.waiting) if rows is None else rows:
            with contextlib.suppress(Gone):
                asked.waiting.pop(b).result()
                ended.append(b)
        with contextlib.suppress(Gone):
            for at in range(0, len(ended), TAKEN):
                part = ended[at : at + TAKEN]
                taken, *_ = self.client.rpc("steerl_take", json.dumps([asked.asks[b].id for b in part]))
                found = {b: taken[asked.asks[b].id] for b in part if asked.asks[b].id in taken}
                fetched |= {b: Answer.of_packed(answer) for b, answer in found.items()}
        asked.answers |= fetched
        return fetched

    def _revive(self, moved: bool) -> None:
        """A server with the weights that it had: those that are kept, or, where the policy has not moved on, sent anew."""
        lives = self._server is None or self._server.alive()
        self.client.move(self._on_main(lambda: self._found() if lives and self.client.healthy() else self._start_again()))
        with contextlib.suppress(Gone):  # the next round finds out
            if self.weights.keeps:
                self._on_main(self.weights.again)
            elif moved:
                raise UserError(
                    f"engine: the server died while it drew with weights that engine.sync {self.weights.kind} keeps no copy "
                    "of; --run.resume true goes on from the last checkpoint"
                )
            else:
                self.weights.send(self.version)
            self._on_main(self._steer)

    # -- steering -------------------------------------------------------------------------------------------------------

    def check_edits(self, rollout: Rollout, answers: Sequence[Answer], drawn_BP: Tensor | None = None) -> None:
        assert self.steering is not None
        self.steering.check_edits(rollout, answers, drawn_BP)

    def steered(self, applied: Applied, b: int) -> dict[str, Any]:
        assert self.steering is not None
        return self.steering.of_row(applied, b)

    # -- ranks ----------------------------------------------------------------------------------------------------------

    def _on_main(self, call: Callable[[], Value]) -> Value:
        """By the main process, for all; where the server is gone, Gone everywhere."""
        return export.on_main(call, alone=self.alone)

    def _most(self, count: int) -> int:
        return count if self.alone else processes.most(count)
