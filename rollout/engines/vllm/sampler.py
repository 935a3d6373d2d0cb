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

from steerl.rollout.applied import Applied
from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.decoding.loop import OnToken, no_distribution
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.contexts import Contexts
from steerl.rollout.engines.sampler import Sampler, drawing
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm import laws
from steerl.rollout.engines.vllm.engine import LOG, Asked, VllmEngine
from steerl.rollout.engines.vllm.wire import Answer, Ask
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.ragged import Kept
from steerl.rollout.steering import Steering
from steerl.rollout.types import STOP_LENGTH, Rollout, Samples, Texts


@dataclass(frozen=True)
class Begun:
    """Rows that a server is drawing."""

    batch: PromptBatch
    step: int
    contexts: Contexts
    applied: Applied
    asked: Asked


class ServerSampler:
    """Draws with one set of settings, steered or not, from the weights that the engine has sent last."""

    def __init__(self, engine: VllmEngine, sampling: Sampling, steering: Steering | None = None):
        self.engine, self.policy, self.sampling = engine, engine.policy, sampling
        self.steering = drawing(steering)
        if sampling.compile:
            raise UserError("sampling.compile: has no effect with engine.kind vllm; leave it out")
        self.inside = Sampler(self.policy, sampling, steering)
        self.stops = self.inside.stops
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
        self.inside.check(batch)
        contexts = Contexts.of(batch, self.sampling)
        applied = self.inside.applied(contexts, step=step, progress=progress)
        if weights is not None:
            applied = applied._replace(policy_step_B=torch.full_like(applied.policy_step_B, weights))
        asks = [self.ask(contexts, applied, b, step) for b in range(len(contexts))]
        return Begun(batch, step, contexts, applied, self.engine.begin(self.law, contexts.ids, asks))

    def ask(self, contexts: Contexts, applied: Applied, b: int, step: int) -> Ask:
        """For the next turn of one of the contexts."""
        steered = {} if self.steering is None else self.engine.steered(applied, b)
        first = 0 if contexts.first is None else contexts.first[b]
        turns = () if contexts.turns is None else tuple(contexts.turns[b])
        who = (uuid.uuid4().hex, step, contexts.rows[b], contexts.samples[b])
        return Ask(*who, **steered, first=first, limit=contexts.limits[b], turns=turns)

    def finish(self, begun: Begun, *, moved: bool = False) -> Samples:
        """The rows, when all have ended. Every rank comes here. `moved`: the policy has learned meanwhile."""
        answers = self.engine.finish(begun.asked, moved=moved)
        rollout = self.inside.nothing(begun.step)
        if answers:
            rollout = self.rollout(begun.contexts, begun.applied, begun.asked, answers)
            if self.steering is not None:
                self.engine.check_edits(rollout, answers)
        rollout = self._sealed(rollout, rollout, begun.step, moved)
        return Samples(rollout, self.texts(begun.batch, rollout))

    def finished(self, asked: Asked, turns: Sequence[tuple[int, Contexts]], rollout: Rollout, step: int) -> Rollout:
        """Rows whose turns were asked for one by one, as the asks of these numbers: `finish` for them. The law is looked at
        where rows begin, the edits in every turn."""
        count = self.engine.settings.check_rows
        looked = turns if self.steering is not None else [turn for turn in turns if turn[1].first == [0]][:count]
        begun = self.inside.nothing(step)
        if looked:
            contexts, answers = Contexts.join([one for _, one in looked]), [asked.answers[number] for number, _ in looked]
            assert contexts.applied is not None and contexts.first is not None
            drawn = self.rollout(contexts, contexts.applied, asked, answers)
            if self.steering is not None:
                self.engine.check_edits(drawn, answers, contexts.drawn(self.policy.device))
            begun = drawn.select([b for b, first in enumerate(contexts.first) if first == 0][:count]).trim()
        return self._sealed(rollout, begun, step)

    def _sealed(self, rollout: Rollout, begun: Rollout, step: int, moved: bool = False) -> Rollout:
        """With the policy's own numbers where another model drew. `begun`: rows that are looked at, now and after the next
        sync."""
        with no_dropout(self.policy.core), torch.no_grad():
            if not moved:
                self._check_laws(begun, step)
            if self.inside.two_laws:
                same = begun is rollout
                rollout = self.engine.inside(lambda: self.inside.of_policy(rollout))
                begun = rollout if same else begun
        self.engine.recent = begun
        return rollout

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
        return self.inside.texts(batch, rollout)

    def check(self, answer: Answer, name: str, version: int) -> None:
        """An answer by the weights that were sent, and of tokens that could be drawn."""
        if answer.bad >= 0:
            raise no_distribution(name, answer.bad)
        if set(answer.versions) != {version}:
            first, last = answer.versions
            drawn = f"step {first}" if first == last else f"steps {first} to {last}"
            raise UserError(
                f"engine: {name} was drawn by the weights of {drawn}, where the server was sent those of step "
                f"{version}; somebody else sends it weights, or it lost a sync: a job needs a server of its own"
            )

    def rollout(self, contexts: Contexts, applied: Applied, asked: Asked, answers: Sequence[Answer]) -> Rollout:
        """The turns that were drawn, whose prompts are the contexts."""
        for row, sample, answer in zip(contexts.rows, contexts.samples, answers, strict=True):
            self.check(answer, f"row {row} (sample {sample})", asked.version)
        stop_B = torch.tensor([answer.stop for answer in answers])
        kept = None
        if self.sampling.replays_mask:
            drawable: list[list[list[int]]] = [
                answer.kept if answer.kept is not None else [[]] * len(answer.ids) for answer in answers
            ]
            kept = Kept.of_lists(drawable, self.policy.device)
        return Rollout.of_ids(
            contexts.ids,
            [answer.ids for answer in answers],
            pad_id=self.policy.pad_id,
            device=self.policy.device,
            row_B=contexts.rows,
            sample_B=contexts.samples,
            ended_B=stop_B != STOP_LENGTH,
            stop_B=stop_B,
            behaviour_logprobs_BR=[answer.behaviour for answer in answers],
            policy_logprobs_BR=[answer.policy for answer in answers],
            entropy_BR=[answer.entropy for answer in answers],
            kept=kept,
            **self.inside.record(),
            **applied._asdict(),
        )


@contextlib.contextmanager
def sampler_of(
    policy: Policy,
    sampling: Sampling,
    steering: Steering | None,
    engine: EngineSettings,
    folder: Path,
    longest: int | None = None,
) -> Iterator[Sampler | ServerSampler]:
    """What a job without training draws with, each process for itself: in process, or a server that ends with the block.
    `longest`: tokens of a row."""
    if engine.kind != "vllm":
        yield Sampler(policy, sampling, steering, engine)
        return
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
        server = VllmEngine(policy, engine, log, steering=drawing(steering), longest=longest, alone=True)
        try:
            yield server
        finally:
            server.close()
