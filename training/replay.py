"""Stored rollouts instead of fresh ones: the rows of a dump, fed to the same loop in a reproducible order.

    DUMP ── finished? same tokenizer? ──> shards in the order of (seed, epoch) ──> prompts of a shard in its order
                                                                                     with all samples of each ──> a step

The rows keep both their log-probs: the importance correction weighs what the policy of today makes of them by the distribution
they were drawn from. Memory is that of a few shards. Where a step begins is `position`, prompts taken so far, as when sampling.
"""

from __future__ import annotations

import dataclasses
import logging
import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import DataError
from steerl.rollout.common.fingerprint import model_fingerprint, tokenizer_fingerprint
from steerl.rollout.dumps.manifest import finished_shards, load_manifest, plan_of
from steerl.rollout.dumps.store import read_dump
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import Steering
from steerl.rollout.steering.spec.spec import ROLES
from steerl.rollout.types import Rollout, Samples, Texts
from steerl.training.algorithm.custom import compares_samples
from steerl.training.settings import PPOSettings

_HELD = 4
"""Shards in memory beside those that a step fills: where it begins and ends, and where an epoch does."""
_logger = logging.getLogger(__name__)


class Replay:
    """A dump that a run learns from. It gives the prompts, and their rows: `take`, `batch`, `draw`."""

    def __init__(self, folder: str | Path, policy: Policy, settings: PPOSettings, steering: Steering | None = None):
        """`steering` is the job's own; the dump must have been drawn under the same."""
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"ppo.replay: {folder} is not a folder; name one that dump_rollouts.py wrote")
        finished_shards(self.folder)  # says so where it is unfinished
        manifest = load_manifest(self.folder)
        self.plan = plan_of(manifest)
        self.samples = self.plan.samples
        self.vocabulary = policy.core.get_input_embeddings().weight.shape[0]
        self.start_ids = tuple(policy.start_ids)
        self.steering = steering if steering is not None and ROLES[steering.role].learns else None
        """What the rows are steered with again."""
        self.cut: dict[int, int] = {}
        """No prompt is cut here: stored ones are as long as they were drawn from."""
        # all of a step, which asks twice: for its prompts, and for their rows
        self._held = _HELD + settings.rollouts_per_step // (self.samples * self.plan.shard_prompts)
        self._shards: OrderedDict[int, Samples] = OrderedDict()
        self._check_source(manifest.get("fingerprints", {}), policy, steering.label if steering is not None else "")
        if compares_samples(settings) and self.samples < 2:
            raise DataError(f"ppo.replay: {folder} has one sample per prompt; ppo.credit {settings.credit} compares several")
        if settings.kl_target is not None:
            told = "the KL of stored rows is not that of the policy, which draws others"
            raise DataError(f"ppo.kl_target: {told}; leave it out with ppo.replay, ppo.kl_coef stays as it is")
        if settings.rollouts_per_step % self.samples:
            whole = settings.rollouts_per_step // self.samples * self.samples or self.samples
            told = f"{settings.rollouts_per_step} is no multiple of the {self.samples} samples per prompt of ppo.replay"
            raise DataError(f"ppo.rollouts_per_step: {told}; {whole} would do")

    def take(self, seed: int, position: int, count: int) -> list[int]:
        """The `count` prompts from `position` on; every epoch has an order of its own."""
        prompts: list[int] = []
        while len(prompts) < count:
            epoch, start = divmod(position + len(prompts), self.plan.prompts)
            prompts += self._order(seed, epoch)[start : start + count - len(prompts)]
        return prompts

    def batch(self, rows: Sequence[int], occurrences: Sequence[int] | None = None) -> PromptBatch:
        """The stored prompts. One that comes twice brings the same rows twice: `occurrences` tell nothing here."""
        firsts = [self._samples(row).select([0]) for row in rows]
        texts = Texts.join([texts for _, texts in firsts])
        return PromptBatch(
            ids=[rollout.prompt_ids[0] for rollout, _ in firsts],
            rows=list(rows),
            prompts=texts.prompts,
            prompt_texts=texts.prompt_texts,
            columns=texts.columns,
        )

    def draw(self, prompts: PromptBatch, /, *, step: int = 0, progress: float = 0.0) -> Samples:
        """All samples of the prompts, in their order: read, where a Sampler would draw."""
        if not len(prompts):
            return self._samples(0).select([])
        samples = Samples.join([self._samples(row) for row in prompts.rows])
        rollout = samples.rollout.trim()
        if not self.same_weights:  # so that nothing takes its policy_logprobs for those of a policy that learns here
            rollout = dataclasses.replace(rollout, policy_step_B=-1 - rollout.policy_step_B)
        return Samples(rollout, samples.texts)

    def weights_changed(self, step: int) -> None:
        """What is stored stays."""

    def close(self) -> None:
        self._shards.clear()

    def _samples(self, prompt: int) -> Samples:
        """The stored rows of a prompt."""
        index = prompt // self.plan.shard_prompts
        first = (prompt - self.plan.shard(index).start) * self.samples
        return self._shard(index).select(range(first, first + self.samples))

    def _order(self, seed: int, epoch: int) -> list[int]:
        draw = random.Random(f"replay {seed} {epoch}")
        shards = list(range(len(self.plan)))
        draw.shuffle(shards)
        found: list[int] = []
        for index in shards:
            prompts = list(self.plan.shard(index))
            draw.shuffle(prompts)
            found += prompts
        return found

    def _shard(self, index: int) -> Samples:
        """The rows of a shard; its checksum is compared whenever it is read."""
        if index in self._shards:
            self._shards.move_to_end(index)
            return self._shards[index]
        samples = Samples.join(list(read_dump(self.folder, shards=[index])))
        self._check_rows(samples.rollout, self.plan.file(index))
        self._shards[index] = samples
        while len(self._shards) > self._held:
            self._shards.popitem(last=False)
        return samples

    # -- what is refused --------------------------------------------------------------------------------------------

    def _check_source(self, made_from: dict[str, Any], policy: Policy, steering: str) -> None:
        told = f"ppo.replay: {self.folder}"
        if policy.tokenizer is not None and made_from.get("model.tokenizer") != tokenizer_fingerprint(policy.tokenizer):
            raise DataError(
                f"{told} was sampled with another tokenizer than the policy's; its ids mean other text. Name its own model"
            )
        if steering != made_from.get("steering", "") and steering:
            other = made_from.get("steering") or "none"
            raise DataError(
                f"{told} was sampled under the steering {other}, the job has {steering}; leave steering out, or give that one"
            )
        self.same_weights = made_from.get("model.path") == model_fingerprint(policy.core)
        if not self.same_weights:
            _logger.warning("%s was sampled from other weights than model.path; ppo.correction weighs what differs", told)

    def _check_rows(self, rollout: Rollout, file: str) -> None:
        told = f"ppo.replay: {self.folder / file}"
        if rollout.greedy:
            raise DataError(
                f"{told} holds greedy rows, which have no distribution to weigh by; sample the dump with sampling.greedy false"
            )
        if rollout.start_ids != self.start_ids:
            raise DataError(
                f"{told} begins responses with the ids {list(rollout.start_ids)}, the policy with {list(self.start_ids)}"
            )
        if self.steering is not None and (lacking := self.steering.lacking(rollout.applied)) is not None:
            raise DataError(f"{told} holds {lacking}; dump the rows again, or leave steering out and set ppo.correction")
        largest = max(int(rollout.prompt_BP.max()), int(rollout.response_BR.max()))
        if largest >= self.vocabulary:
            raise DataError(
                f"{told} holds the id {largest}, the policy's vocabulary ends at {self.vocabulary - 1}; name its own model"
            )
