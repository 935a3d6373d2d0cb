"""ServerSampler: prompts -> a vLLM server -> Rollout. A Sampler to whoever uses it, with the same rows.

begin   who each row is, how it is steered ── one request a row, in threads ──> server      returns at once
finish  <── answers, asked again where the server died ── checks ── Rollout, Texts          collective where the engine is
"""

from __future__ import annotations

import contextlib
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.decoding.loop import OnToken, no_distribution
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm import laws
from steerl.rollout.engines.vllm.engine import LOG, Asked, VllmEngine
from steerl.rollout.engines.vllm.wire import Answer, Ask
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.ragged import Kept, left_pad
from steerl.rollout.steering import Steering
from steerl.rollout.types import STOP_LENGTH, Rollout, Samples, Texts


@dataclass(frozen=True)
class Begun:
    """Rows that a server is drawing."""

    batch: PromptBatch
    step: int
    prompts: list[list[int]]
    row_B: Tensor
    sample_B: Tensor
    applied: Applied
    asked: Asked


class ServerSampler:
    """Draws with one set of settings, steered or not, from the weights that the engine has sent last."""

    def __init__(self, engine: VllmEngine, sampling: Sampling, steering: Steering | None = None):
        self.engine, self.policy, self.sampling, self.steering = engine, engine.policy, sampling, steering
        if sampling.compile:
            raise UserError("sampling.compile: has no effect with engine.kind vllm; leave it out")
        self._inside = Sampler(self.policy, sampling, steering)
        self.stops = self._inside.stops
        self.law = engine.law(sampling)
        self._looked: int | None = None
        """The weights with which the server's law was last looked at."""

    def sample(self, batch: PromptBatch, *, step: int = 0, progress: float = 0.0, on_token: OnToken | None = None) -> Samples:
        """As Sampler.sample. A server shows no token before its row has ended."""
        if on_token is not None:
            raise UserError("engine.kind: vllm shows no token before its row has ended; use stream")
        return self.draw(batch, step=step, progress=progress)

    def draw(self, batch: PromptBatch, /, *, step: int, progress: float) -> Samples:
        self.engine.ready(step)
        return self.finish(self.begin(batch, step=step, progress=progress))

    def weights_changed(self, step: int) -> None:
        self.engine.sync(step)

    def close(self) -> None:
        self.engine.close()

    def begin(self, batch: PromptBatch, *, step: int, progress: float, weights: int | None = None) -> Begun:
        """Ask for all rows. `step` keys the draws; `weights` says which ones draw, where that is another step."""
        self._inside.check(batch)
        n, device = self.sampling.n, self.policy.device
        order = [(i, j) for i in range(len(batch)) for j in range(n)]
        many = batch.select([i for i, _ in order])
        row_B = torch.tensor(many.rows, dtype=torch.int64, device=device)
        sample_B = torch.tensor([batch.sample(i, j, n) for i, j in order], dtype=torch.int64, device=device)
        prompts = [list(ids) for ids in many.ids]
        weights = step if weights is None else weights
        if self.steering is None or not order:
            applied = Applied.nothing(row_B, weights, 0 if self.steering is None else len(self.steering.sites))
        else:
            _, mask_BP = left_pad(prompts, self.policy.pad_id, device)
            applied = self.steering.applied(mask_BP, row_B, sample_B, many.columns, progress=progress, policy_step=step)
            applied = applied._replace(policy_step_B=torch.full_like(row_B, weights))
        asks = [self._ask(applied, b, step, int(row_B[b]), int(sample_B[b])) for b in range(len(order))]
        return Begun(batch, step, prompts, row_B, sample_B, applied, self.engine.begin(self.law, prompts, asks))

    def _ask(self, applied: Applied, b: int, step: int, row: int, sample: int) -> Ask:
        steered = {} if self.steering is None else self.engine.steered(applied, b)
        return Ask(uuid.uuid4().hex, step, row, sample, **steered)

    def finish(self, begun: Begun, *, moved: bool = False) -> Samples:
        """The rows, when all have ended. Every rank comes here. `moved`: the policy has learned meanwhile."""
        answers = self.engine.finish(begun.asked, moved=moved)
        rollout = self._rollout(begun, answers) if answers else self._inside.nothing(begun.step)
        if self.steering is not None and answers:
            self.engine.check_edits(rollout, answers)
        with no_dropout(self.policy.core), torch.no_grad():
            if not moved:
                self._check_laws(rollout, begun.step)
            if self._inside.plain_policy:
                rollout = self.engine.inside(lambda: self._inside.of_policy(rollout))
        self.engine.recent = rollout
        return Samples(rollout, self.texts(begun.batch, rollout))

    def _check_laws(self, rollout: Rollout, step: int) -> None:
        """Once for each sync. Where passes are collective, on every rank or on none."""
        if self.engine.version == self._looked:
            return
        part = laws.rows_of(self.policy, rollout, self.engine.settings.check_rows)
        if len(part):
            tolerance = self.engine.tolerance
            self.engine.inside(lambda: laws.check_laws(self.policy, part, self.sampling, step, tolerance, self.steering))
            self._looked = self.engine.version

    def texts(self, batch: PromptBatch, rollout: Rollout) -> Texts:
        return self._inside.texts(batch, rollout)

    def _rollout(self, begun: Begun, answers: Sequence[Answer]) -> Rollout:
        for b, answer in enumerate(answers):
            name = f"row {int(begun.row_B[b])} (sample {int(begun.sample_B[b])})"
            if answer.bad >= 0:
                raise no_distribution(name, answer.bad)
            if set(answer.versions) != {begun.asked.version}:
                first, last = answer.versions
                drawn = f"step {first}" if first == last else f"steps {first} to {last}"
                raise UserError(
                    f"engine: {name} was drawn by the weights of {drawn}, where the server was sent those of step "
                    f"{begun.asked.version}; somebody else sends it weights, or it lost a sync: a job needs a server of its own"
                )
        stop_B = torch.tensor([answer.stop for answer in answers])
        kept = None
        if self.sampling.replays_mask:
            drawable: list[list[list[int]]] = [
                answer.kept if answer.kept is not None else [[]] * len(answer.ids) for answer in answers
            ]
            kept = Kept.of_lists(drawable, self.policy.device)
        return Rollout.of_ids(
            begun.prompts,
            [answer.ids for answer in answers],
            pad_id=self.policy.pad_id,
            device=self.policy.device,
            row_B=begun.row_B,
            sample_B=begun.sample_B,
            ended_B=stop_B != STOP_LENGTH,
            stop_B=stop_B,
            behaviour_logprobs_BR=[answer.behaviour for answer in answers],
            policy_logprobs_BR=[answer.policy for answer in answers],
            entropy_BR=[answer.entropy for answer in answers],
            kept=kept,
            **self._inside.record(),
            **begun.applied._asdict(),
        )


@contextlib.contextmanager
def sampler_of(
    policy: Policy,
    sampling: Sampling,
    steering: Steering | None,
    engine: EngineSettings,
    folder: Path,
    most: int | None = None,
) -> Iterator[Sampler | ServerSampler]:
    """What a job without training draws with, each process for itself: in process, or a server that ends with the block.
    `most`: tokens of a prompt."""
    if engine.kind != "vllm":
        yield Sampler(policy, sampling, steering, engine)
        return
    longest = None if most is None else most + sampling.max_new_tokens
    with server_of(policy, steering, engine, folder, longest) as server:
        yield ServerSampler(server, sampling, steering)


@contextlib.contextmanager
def server_of(
    policy: Policy, steering: Steering | None, engine: EngineSettings, folder: Path | None = None, longest: int | None = None
) -> Iterator[VllmEngine]:
    """A server of this process's own, whose weights stay as they are. Without a folder nobody keeps what it says."""
    if engine.ahead:
        raise ConfigError("engine.ahead: 1, but nothing learns while rows are drawn here, so it has no effect; leave it out")
    me = processes.start()
    with tempfile.TemporaryDirectory(prefix="steerl-") as scratch:
        log = Path(folder or scratch) / (LOG if me.is_main else f"engine-{me.rank}.log")
        server = VllmEngine(policy, engine, log, steering=steering, longest=longest, alone=True)
        try:
            yield server
        finally:
            server.close()
