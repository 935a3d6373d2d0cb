"""One step ahead (engine.ahead): while a step learns, the server draws the next step's rows with the weights from before.

    step k    draw: the rows of k ── begin: the rows of k + 1 ──────────────────────.
              score, credit, learn                              server draws       │ weights of k
              weights_changed: wait for them, keep them <──────────────────────────'; then the server gets those of k + 1

A row says which weights drew it (policy_step_B), and the correction weighs it. Rows that wait are part of a checkpoint, so a
resumed run is the same to the last bit; none is ever dropped for its age, which would favour short answers.
"""

from __future__ import annotations

from steerl.rollout.engines.vllm.sampler import Begun, ServerSampler
from steerl.rollout.prompts.prompts import PromptBatch, Prompts
from steerl.rollout.types import Samples
from steerl.training.algorithm.experience import asked_here
from steerl.training.settings import PPOSettings
from steerl.training.types import TrainState


class Ahead:
    """A source of rollouts around the server's."""

    def __init__(self, sampler: ServerSampler, prompts: Prompts, state: TrainState, settings: PPOSettings, seed: int):
        self.sampler, self.prompts, self.state, self.settings, self.seed = sampler, prompts, state, settings, seed
        self._begun: Begun | None = None

    def draw(self, prompts: PromptBatch, /, *, step: int, progress: float) -> Samples:
        if self.state.drawn is None:  # the first step of a run
            samples = self.sampler.draw(prompts, step=step, progress=progress)
        else:
            samples = self._drawn(prompts)
        if step + 1 < self.settings.steps:
            count = self.settings.rollouts_per_step // self.sampling_n
            rows = self.prompts.take(self.seed, self.state.prompt_position + count, count)
            batch = asked_here(self.prompts, rows)
            then = (step + 1) / self.settings.steps
            self._begun = self.sampler.begin(batch, step=step + 1, progress=then, weights=step)
        return samples

    @property
    def sampling_n(self) -> int:
        return self.sampler.sampling.n

    def _drawn(self, prompts: PromptBatch) -> Samples:
        """Of the rows that wait those that this process asks for: a checkpoint holds those of all."""
        rollout, self.state.drawn = self.state.drawn, None
        assert rollout is not None
        places = {pair: at for at, pair in enumerate(zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True))}
        n = self.sampling_n
        index = [places[row, prompts.sample(i, j, n)] for i, row in enumerate(prompts.rows) for j in range(n)]
        rollout = rollout.select(index).trim().to(self.sampler.policy.device)
        return Samples(rollout, self.sampler.texts(prompts, rollout))

    def weights_changed(self, step: int) -> None:
        if self._begun is not None:
            self.state.drawn, self._begun = self.sampler.finish(self._begun, moved=True).rollout, None
        self.sampler.weights_changed(step)

    def close(self) -> None:
        self.sampler.close()
