"""RolloutSource: what draws a step's rows, by three calls; what gives their prompts; and a look at what a source gave.

    step ── PromptSource.take, batch ──> PromptBatch ── RolloutSource.draw ──> Samples ──> score, credit, learn
                                                               ^                             │
                                                               '────── weights_changed ──────'

In process: engines/sampler.py (the decode loop, or plain generate), training/engine's around it, and training/replay.py,
which reads where others draw. `train(source=...)` takes one of your own (docs/extending.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Rollout, Samples, Texts, row_name


class RolloutSource(Protocol):
    """Who draws. Every rank makes the same calls, as often as the others."""

    def draw(self, prompts: PromptBatch, /, *, step: int, progress: float) -> Samples:
        """n samples of each prompt; of no prompts, no rows. `step`: updates that the weights have seen; `progress`: 0 to 1."""

    def weights_changed(self, step: int) -> None:
        """The policy has learned, or was loaded: copies of its weights are brought up to date, as after `step` updates."""

    def close(self) -> None:
        """The run is over, whatever ended it."""


class PromptSource(Protocol):
    """Who gives prompts: a dataset's (`Prompts`), or a dump's (`Replay`)."""

    @property
    def cut(self) -> Mapping[int, int]:
        """Prompts that were cut, with their lengths."""

    def take(self, seed: int, position: int, count: int) -> list[int]:
        """Rows at positions [position, position + count) of the endless order of `seed`."""

    def batch(self, rows: Sequence[int], occurrences: Sequence[int] | None = None) -> PromptBatch:
        """The prompts of these rows; of no rows, an empty batch."""


@dataclass(frozen=True)
class CheckedSource:
    """A source of somebody's own: each answer is what was asked for, in the prompts' order, or one line says what is not."""

    source: RolloutSource
    policy: Policy
    sampling: Sampling
    steering: str = ""
    """The label of the steering that the policy learns under."""

    def draw(self, prompts: PromptBatch, /, *, step: int, progress: float) -> Samples:
        samples = self.source.draw(prompts, step=step, progress=progress)
        return checked(samples, prompts, self.policy, self.sampling, self.steering)

    def weights_changed(self, step: int) -> None:
        self.source.weights_changed(step)

    def close(self) -> None:
        self.source.close()


def checked(samples: Samples, prompts: PromptBatch, policy: Policy, sampling: Sampling, steering: str = "") -> Samples:
    """`samples` in the order of the prompts. Refused is what no correction makes good."""
    if not isinstance(samples, Samples):
        raise UserError(f"source: draw gave {type(samples).__name__}; give Samples(rollout, texts)")
    rollout, texts = samples
    if not isinstance(rollout, Rollout) or not isinstance(texts, Texts):
        found = f"Samples({type(rollout).__name__}, {type(texts).__name__})"
        raise UserError(f"source: draw gave {found}; give Samples of a Rollout and its Texts")
    if len(texts) != len(rollout):
        raise UserError(f"source: {len(rollout)} rows, but texts of {len(texts)}; give one for every row")
    if not len(rollout) and not len(prompts):
        return samples
    wanted = {
        "start_ids": (tuple(rollout.start_ids), tuple(policy.start_ids), "give the policy's, Policy.start_ids"),
        "temperature": (rollout.temperature, sampling.policy_temperature, "draw at sampling.temperature"),
        "steering": (rollout.steering, steering, "steer the rows, and record what Steering.applied gives, and its label"),
        "greedy": (rollout.greedy, False, "greedy rows have no distribution to learn by; draw them"),
    }
    for name, (found, needed, remedy) in wanted.items():
        if found != needed:
            raise UserError(f"source: Rollout.{name} is {found!r}, expected {needed!r}; {remedy}")
    order = _order(rollout, prompts, sampling.n)
    _check_tokens(rollout, policy.vocab_size, sampling.max_new_tokens)
    if order != list(range(len(rollout))):
        samples = samples.select(order)
    asked = [prompt for prompt in prompts.ids for _ in range(sampling.n)]
    for i, (found, ids) in enumerate(zip(samples.rollout.prompt_ids, asked, strict=True)):
        if found != list(ids):
            raise UserError(
                f"source: {row_name(samples.rollout, i)} answers a prompt of {len(found)} ids {_brief(found)}, asked was one "
                f"of {len(ids)} {_brief(ids)}; give PromptBatch.ids as they are"
            )
    return samples


def _order(rollout: Rollout, prompts: PromptBatch, n: int) -> list[int]:
    """Places of the asked rows, in the order of the prompts and of the samples of each."""
    asked = [(prompts.rows[at], prompts.sample(at, which, n)) for at in range(len(prompts)) for which in range(n)]
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, pair in enumerate(zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True)):
        places[pair].append(place)
    order = []
    for row, sample in asked:
        if not places[row, sample]:
            raise UserError(
                f"source: row {row} sample {sample} is missing among the {len(rollout)} rows; give {n} of each of the "
                f"{len(prompts)} prompts, row_B from PromptBatch.rows and sample_B from PromptBatch.sample"
            )
        order.append(places[row, sample].pop(0))
    if more := [pair for pair, left in places.items() if left]:
        row, sample = more[0]
        raise UserError(
            f"source: row {row} sample {sample} was not asked for (or comes too often); asked were {len(asked)} rows, "
            f"{n} of each of {len(prompts)} prompts"
        )
    return order


def _check_tokens(rollout: Rollout, vocabulary: int, most: int) -> None:
    """What stands at each token: ids of the policy, log-probs that are ones."""

    def refuse(bad_BR: Tensor, value_BR: Tensor, name: str, told: str) -> None:
        if bool(bad_BR.any()):
            row, token = bad_BR.nonzero()[0].tolist()
            value = value_BR[row, token].item()
            raise UserError(f"source: {name} of {row_name(rollout, row)}, token {token}, is {value:.6g}; {told}")

    outside_BR = (rollout.response_BR < 0) | (rollout.response_BR >= vocabulary)
    refuse(outside_BR & rollout.extent_BR, rollout.response_BR, "response_BR", f"ids go from 0 to {vocabulary - 1}")
    for name in ("behaviour_logprobs_BR", "policy_logprobs_BR"):
        value_BR = getattr(rollout, name)
        bad_BR = ~(value_BR.isfinite() & (value_BR < 1e-3))  # a rounding above 0
        refuse(bad_BR & rollout.action_mask_BR, value_BR, name, "a log-prob is finite, and 0 or less")
    longest = [max((end - first for first, end in turns), default=0) for turns in rollout.turns]
    if longest and max(longest) > most:
        row = longest.index(max(longest))
        raise UserError(
            f"source: {row_name(rollout, row)} has {longest[row]} actions in a turn, sampling.max_new_tokens is {most}; stop "
            "there, or set more"
        )


def _brief(ids: Sequence[int]) -> str:
    return f"[{', '.join(str(i) for i in ids[:6])}{', ...' if len(ids) > 6 else ''}]"
