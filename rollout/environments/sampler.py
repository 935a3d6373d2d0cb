"""EpisodeSampler: prompts -> episodes -> Rollout. A sampler to whoever uses it, whose rows have several turns.

    in process   a queue of episodes ── up to batch_size from its head, whatever turn they are at ── Sampler.turns ──.
                        ^                                                          their environments are asked,      │
                        '────────────────────────── at its tail <───────────────── while the next batch is drawn <────'
    a server     every episode by itself: asked for a turn, told its environment's answer, asked for the next one

The queue's order depends on nothing but what was drawn, so a run is the same every time, to the last bit.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import torch

from steerl.rollout.applied import Applied
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding.loop import OnToken
from steerl.rollout.engines.contexts import Contexts
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.vllm.sampler import ServerSampler
from steerl.rollout.environments.environment import Environment
from steerl.rollout.environments.running import Drawn, Running
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.ragged import Kept
from steerl.rollout.types import STOP_LENGTH, Rollout, Samples, Texts

ALIVE = 256
"""Most episodes of one process under way at a time on a server. In process it is two batches: one is drawn while the
environments of the other are at work."""


class EpisodeSampler:
    """Plays `environment` with what `inner` draws."""

    def __init__(self, inner: Sampler | ServerSampler, environment: Environment):
        self.inner, self.environment = inner, environment
        self.policy, self.sampling, self.steering, self.stops = inner.policy, inner.sampling, inner.steering, inner.stops

    def sample(self, batch: PromptBatch, *, step: int = 0, progress: float = 0.0, on_token: OnToken | None = None) -> Samples:
        """`sampling.n` episodes of every prompt, in (prompt, sample) order. Every rank calls this equally often."""
        n = self.sampling.n
        episodes = [self._new(batch, i, batch.sample(i, j, n), step) for i in range(len(batch)) for j in range(n)]
        try:
            rollout = self._rollout(episodes, step, progress, on_token)
        except BaseException:  # environments do not outlive it
            for episode in episodes:
                episode.give_up()
            raise
        return Samples(rollout, self._texts(batch, episodes))

    def _rollout(self, episodes: Sequence[Running], step: int, progress: float, on_token: OnToken | None) -> Rollout:
        if isinstance(self.inner, ServerSampler):
            if on_token is not None:
                raise UserError("engine.kind: vllm shows no token before its turn has ended; use stream")
            self.inner.engine.ready(step)
            return _Served(self.inner, episodes, step, progress).play()
        with self.inner.ready():
            self._play(self.inner, episodes, step, progress, on_token)
            return rollout_of(self.inner, episodes, step)

    def draw(self, batch: PromptBatch, /, *, step: int, progress: float) -> Samples:
        return self.sample(batch, step=step, progress=progress)

    def weights_changed(self, step: int) -> None:
        self.inner.weights_changed(step)

    def close(self) -> None:
        self.inner.close()

    def _new(self, batch: PromptBatch, at: int, sample: int, step: int) -> Running:
        columns = {name: column[at] for name, column in batch.columns.items()}
        data = {batch.column: batch.prompts[at], **columns}
        row, most = batch.rows[at], self.sampling.max_new_tokens
        uniform = uniforms(self.sampling.seed, step, torch.tensor([row]), torch.tensor([sample]), -1)
        seed = int(uniform.item() * 2**32)  # the place before its first token
        return Running(self.environment, self.stops, row, sample, batch.prompts[at], data, most, seed)

    # -- in process ------------------------------------------------------------------------------------------------------

    def _play(self, inner: Sampler, episodes: Sequence[Running], step: int, progress: float, on_token: OnToken | None) -> None:
        unopened, queue = iter(episodes), deque[Running]()
        synced, size = needs_sync(inner.policy.model), self.sampling.batch_size
        while True:
            ready: list[Running] = []
            while len(ready) < size:
                for episode in itertools.islice(unopened, max(2 * size - len(queue) - len(ready), 0)):
                    episode.open()
                    queue.append(episode)
                if not queue:
                    break
                episode = queue.popleft()
                if episode.pending is not None:
                    episode.answered()
                elif not episode.turns:
                    begin(inner, episode)
                if not episode.ended_by:
                    ready.append(episode)
            if not (processes.most(len(ready)) if synced else ready):
                return
            self._turns(inner, ready, step, progress, on_token)
            queue += [episode for episode in ready if not episode.ended_by]

    def _turns(self, inner: Sampler, ready: list[Running], step: int, progress: float, on_token: OnToken | None) -> None:
        """Each of these episodes a turn further."""
        contexts = contexts_of(inner, ready, step, progress)
        rollout = inner.turns(contexts, step=step, progress=progress, on_token=on_token)
        numbers = (rollout.behaviour_logprobs_BR, rollout.policy_logprobs_BR, rollout.entropy_BR)
        listed = [tensor.tolist() for tensor in numbers if tensor is not None]
        kept = None if rollout.kept is None else rollout.kept.lists()
        for b, (episode, ids, stop) in enumerate(zip(ready, rollout.response_ids, rollout.stop_B.tolist(), strict=True)):
            behaviour, policy, entropy = (table[b][: len(ids)] for table in listed)
            episode.take(Drawn(ids, behaviour, policy, entropy, None if kept is None else kept[b][: len(ids)], stop))

    # -- what becomes of them ----------------------------------------------------------------------------------------------

    def _texts(self, batch: PromptBatch, episodes: Sequence[Running]) -> Texts:
        n, tokenizer = self.sampling.n, self.policy.tokenizer
        return Texts(
            prompts=[episode.prompt for episode in episodes],
            prompt_texts=[tokenizer.decode(episode.prompt_ids) for episode in episodes],
            completions=[episode.text() for episode in episodes],
            columns={name: [value for value in column for _ in range(n)] for name, column in batch.columns.items()},
            episodes=[episode.episode() for episode in episodes],
        )


def begin(inner: Sampler, episode: Running) -> None:
    episode.begin()
    episode.fit(inner.room(len(episode.prompt_ids)))
    inner.check(PromptBatch([episode.prompt_ids], [episode.row], [episode.prompt], [""]), min(episode.room, episode.limit))


def contexts_of(inner: Sampler, episodes: Sequence[Running], step: int, progress: float) -> Contexts:
    """What the next turns are drawn from. How a row is steered is found once, when it begins."""
    if not episodes:
        return Contexts([], [], [], [])
    names = list(episodes[0].data)

    def of(some: Sequence[Running], applied: Applied | None) -> Contexts:
        numbers: dict[tuple[int, ...], int] = {}
        contexts = [episode.context for episode in some]
        return Contexts(
            ids=contexts,
            rows=[episode.row for episode in some],
            samples=[episode.sample for episode in some],
            limits=[episode.limit for episode in some],
            columns={name: [episode.data[name] for episode in some] for name in names},
            first=[len(episode.ids) for episode in some],
            turns=[episode.runs for episode in some],
            applied=applied,
            prompts=[numbers.setdefault(tuple(ids), len(numbers)) for ids in contexts],
        )

    if new := [episode for episode in episodes if episode.applied is None]:
        applied = inner.applied(of(new, None), step=step, progress=progress)
        for b, episode in enumerate(new):
            episode.applied = applied.select(torch.tensor([b]))
    return of(episodes, Applied.join([episode.applied for episode in episodes if episode.applied is not None]))


def rollout_of(inner: Sampler, episodes: Sequence[Running], step: int) -> Rollout:
    """Their rows."""
    if not episodes:
        return inner.nothing(step)
    device = inner.policy.device
    applied = Applied.join([episode.applied for episode in episodes if episode.applied is not None])
    kept = Kept.of_lists([episode.kept for episode in episodes], device) if inner.sampling.replays_mask else None
    fields: dict[str, Any] = {
        "action_mask_BR": [episode.actions for episode in episodes],
        "behaviour_logprobs_BR": [episode.behaviour for episode in episodes],
        "policy_logprobs_BR": [episode.policy for episode in episodes],
        "entropy_BR": [episode.entropy for episode in episodes],
        "row_B": [episode.row for episode in episodes],
        "sample_B": [episode.sample for episode in episodes],
        "stop_B": [episode.stop for episode in episodes],
        "ended_B": [episode.stop != STOP_LENGTH for episode in episodes],
    }
    prompts, responses = [episode.prompt_ids for episode in episodes], [episode.ids for episode in episodes]
    fields |= inner.record() | applied._asdict()
    return Rollout.of_ids(prompts, responses, pad_id=inner.policy.pad_id, device=device, kept=kept, **fields)


class _Served:
    """Episodes on a server, each at its own pace."""

    def __init__(self, inner: ServerSampler, episodes: Sequence[Running], step: int, progress: float):
        self.inner, self.episodes, self.step, self.progress = inner, episodes, step, progress
        self.unopened = iter(episodes)
        self.waiting: list[Running] = []
        """For their environments."""
        self.asked = inner.engine.begin(inner.law, [], [])
        self.of_ask: dict[int, Running] = {}
        """Episodes whose turn is being drawn, by the number of the ask."""
        self.drawn: list[tuple[int, Contexts]] = []

    def play(self) -> Rollout:
        self.inner.engine.go_on(self.asked, self._local)
        return self.inner.finished(self.asked, self.drawn, rollout_of(self.inner.inside, self.episodes, self.step), self.step)

    def _local(self) -> None:
        """Until nothing is under way: all have ended, or the server is gone."""
        engine = self.inner.engine
        while True:
            for episode in self._opened():
                episode.open()
                self.waiting.append(episode)
            for episode in [episode for episode in self.waiting if _future(episode).done()]:
                self.waiting.remove(episode)
                self._answered(episode)
            for number, answer in engine.ended(self.asked).items():
                episode = self.of_ask.pop(number)
                self.inner.check(answer, episode.name, self.asked.version)
                numbers = (answer.ids, answer.behaviour, answer.policy, answer.entropy, answer.kept, answer.stop)
                episode.take(Drawn(*numbers))
                if not episode.ended_by:
                    self.waiting.append(episode)
            under_way = [*self.asked.waiting.values(), *map(_future, self.waiting)]
            if not under_way:
                return
            wait(under_way, return_when=FIRST_COMPLETED)

    def _opened(self) -> Iterator[Running]:
        return itertools.islice(self.unopened, max(ALIVE - len(self.waiting) - len(self.of_ask), 0))

    def _answered(self, episode: Running) -> None:
        if episode.pending is not None:
            episode.answered()
        else:
            begin(self.inner.inside, episode)
        if episode.ended_by:
            return
        contexts = contexts_of(self.inner.inside, [episode], self.step, self.progress)
        assert contexts.applied is not None
        ask = self.inner.ask(contexts, contexts.applied, 0, self.step)
        number = self.inner.engine.add(self.asked, contexts.ids[0], ask)
        self.of_ask[number] = episode
        self.drawn.append((number, contexts))


def _future(episode: Running) -> Future[Any]:
    future = episode.reset if episode.pending is None else episode.pending
    assert future is not None
    return future
