"""The records of a PPO step: what the model says, the scored rows, what the update reads and says; and a run's state.

    PolicyOutput ──> Scored ──> Experience ──> UpdateStats ──> StepStats ──> TrainState.advance, the KL's weight, budgets
                                                                   └───────> metrics, by their names, last of all

Scored and Experience hold all rows of the step, of all ranks: ids and a few floats per token, on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from steerl.reward.types import Reward, Scores
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout, Texts

if TYPE_CHECKING:
    from accelerate import Accelerator


class PolicyOutput(NamedTuple):
    """One forward pass of policy and value over rollouts; 0 where there is no action. None where not asked for."""

    logprobs_BR: Tensor
    entropy_BR: Tensor | None = None
    values_BR: Tensor | None = None
    """Of the state before every action; None with critic-free credit."""
    after_B: Tensor | None = None
    """Value of the state at the end of each row, which has read what was fed after the last action."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """All rows of the step and what was measured on them before learning. Entries that are no action hold 0."""

    rollout: Rollout
    texts: Texts
    """On the main process; of no rows on others."""
    scores: Scores
    """The task reward: before KL and penalties."""
    old_logprobs_BR: Tensor
    """The policy's, in the trainer's own forward pass: one side of the ratio."""
    reference_logprobs_BR: Tensor | None
    """Under the reference, at the same temperature; None without a reference."""
    values_BR: Tensor
    after_B: Tensor
    """Value of the state at the end of rows that were cut; 0 elsewhere and unless they bootstrap."""
    entropy_BR: Tensor
    seconds: dict[str, float]
    plain_logprobs_BR: Tensor | None = None
    """The plain model's, in the trainer's own forward pass, where it drew the rows and will be left, and the steered one learns
    from them (role preventative)."""

    @property
    def left_logprobs_BR(self) -> Tensor:
        """Of the policy whose KL to the reference counts: the plain one where it is what a run leaves of two."""
        return self.old_logprobs_BR if self.plain_logprobs_BR is None else self.plain_logprobs_BR


@dataclass(frozen=True, kw_only=True)
class Experience:
    """What the update reads."""

    rollout: Rollout
    old_logprobs_BR: Tensor
    reference_logprobs_BR: Tensor | None
    values_BR: Tensor
    rewards_BR: Tensor
    """Task reward, penalty and, where the KL is in the reward, - coefficient x KL."""
    advantages_BR: Tensor
    returns_BR: Tensor
    importance_BR: Tensor | None
    """pi_old / mu, truncated or masked; None without a correction."""


@dataclass(frozen=True, kw_only=True)
class LossStats:
    """Means over actions of a minibatch, or over the minibatches of a step; None where there is no such loss."""

    policy_loss: float
    approx_kl: float
    ratio_mean: float
    grad_norm: float
    clip_fraction: float | None = None
    value_loss: float | None = None
    value_clip_fraction: float | None = None
    kl_loss: float | None = None
    own: dict[str, float] = field(default_factory=dict)
    """What a loss of the user's own tells, by its names."""


@dataclass(frozen=True, kw_only=True)
class MinibatchStats(LossStats):
    """What one optimizer step measured."""

    ratio_error: float
    """Largest |ratio - 1| on this rank."""


@dataclass(frozen=True, kw_only=True)
class UpdateStats(LossStats):
    """What the update of one step measured."""

    optimizer_steps: int
    ratio_first: float
    """Mean ratio of the first minibatch, whose weights are those of the old log-probs."""
    ratio_first_error: float
    """Largest |ratio - 1| of the first minibatch, on all ranks."""
    learning_rate: float
    """Of the policy."""

    @staticmethod
    def of(minibatches: Sequence[MinibatchStats], ratio_first_error: float, learning_rate: float) -> UpdateStats:
        rest: dict[str, Any] = {"ratio_first_error": ratio_first_error, "learning_rate": learning_rate}
        if not minibatches:  # nothing to learn from
            none: dict[str, Any] = dict.fromkeys(("policy_loss", "clip_fraction", "approx_kl", "grad_norm"), 0.0)
            return UpdateStats(optimizer_steps=0, ratio_first=1.0, ratio_mean=1.0, **none, **rest)

        def mean(name: str) -> float | None:
            values = [getattr(one, name) for one in minibatches]
            return None if values[0] is None else sum(values) / len(values)

        means: dict[str, Any] = {one.name: mean(one.name) for one in fields(LossStats) if one.name != "own"}
        told: dict[str, list[float]] = {}
        for one in minibatches:
            for name, value in one.own.items():
                told.setdefault(name, []).append(value)
        means["own"] = {name: sum(values) / len(values) for name, values in told.items()}
        first = minibatches[0].ratio_mean
        return UpdateStats(optimizer_steps=len(minibatches), ratio_first=first, **means, **rest)

    def metrics(self) -> dict[str, float]:
        named = {
            "kl/loss": self.kl_loss,
            "ppo/approx_kl": self.approx_kl,
            "ppo/clip_fraction": self.clip_fraction,
            "ppo/policy_loss": self.policy_loss,
            "value/clip_fraction": self.value_clip_fraction,
            "value/loss": self.value_loss,
            "ppo/ratio_mean": self.ratio_mean,
            "ppo/grad_norm": self.grad_norm,
            "ppo/ratio_first": self.ratio_first,
            "ppo/ratio_first_error": self.ratio_first_error,
            "ppo/optimizer_steps": float(self.optimizer_steps),
            "ppo/learning_rate": self.learning_rate,
            **self.own,
        }
        return {name: value for name, value in named.items() if value is not None}


class KLStats(NamedTuple):
    """The policy's KL to the reference."""

    per_response: float
    """k1 summed over a response, mean over rows."""
    k3_token: float


class GapStats(NamedTuple):
    """|sampler's - trainer's| log-prob of the policy, over the actions that these weights drew."""

    largest: float
    mean: float


@dataclass(frozen=True, kw_only=True)
class SteeringStats:
    """What steering did to a step's rows; None where it was not measured, or no row is of that kind."""

    share: float
    """Of rows on which any site acted."""
    strength: float
    """The first site's, mean over the rows that it steered."""
    scale: float
    reward_steered: float | None = None
    reward_plain: float | None = None
    edits_per_row: float | None = None
    kl_sequence: float | None = None
    """Nats per steered response, of the distribution sampled from, from the unsteered policy."""
    kl_token: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What the loop itself, the KL's weight, budgets and the log's line read of a step. Metrics are made from it, not it from
    them: a metric may have any name."""

    rows: int
    tokens: int
    """Actions."""
    cut_prompts: int
    reward: float
    kl: KLStats | None
    """None without a reference."""
    kl_coef: float
    """The KL's weight in this step."""
    gap: GapStats | None
    """None where other weights drew all rows."""
    steering: SteeringStats | None
    update: UpdateStats

    @property
    def kl_per_response(self) -> float:
        return 0.0 if self.kl is None else self.kl.per_response


class KLController(Protocol):
    """The weight of the KL to the reference, moved after every step (algorithm/kl.py)."""

    coefficient: float

    def update(self, kl_per_sequence: float, rollouts: int) -> None: ...

    def state_dict(self) -> dict[str, float]: ...

    def load_state_dict(self, state: dict[str, float]) -> None: ...


@dataclass
class TrainState:
    """Everything that a later step depends on, so that a checkpoint can hold all of it. Mutable: the loop moves it on.

    Learning rates, sampling, and the order of prompts and minibatches are functions of (seed, step) and have no state. Nothing
    in a step draws from a global random number generator."""

    model: Any
    """The prepared ActorCritic: plain, or wrapped by DDP, DeepSpeed or FSDP."""
    optimizer: Optimizer
    """The prepared optimizer."""
    accelerator: Accelerator
    """Gathers sharded weights."""
    kl: KLController
    reward: Reward
    """Where it keeps statistics it has state_dict() and load_state_dict(mapping of JSON values)."""
    steering: Steering | None = None
    """The job's steering: its KL budget moves `scale` from step to step."""
    step: int = 0
    """Steps completed; the next one has this index."""
    prompt_position: int = 0
    """Prompts taken so far; the next step begins here."""
    totals: dict[str, float] = field(default_factory=dict)
    """Running figures of the run: seconds, tokens, gap_max, optimizer_steps."""
    drawn: Rollout | None = None
    """Rows of the next step that were drawn while this one learned (engine.ahead): this process's."""
    reward_before: float | None = None
    """The evaluation's reward before the first step; None until it was taken."""

    @property
    def module(self) -> Any:
        """The ActorCritic itself. accelerate's unwrap_model would import deepspeed, wherever it is installed, to ask for it."""
        return getattr(self.model, "module", self.model)

    def advance(self, prompts: int, stats: StepStats, seconds: float) -> None:
        """A step is done."""
        self.step += 1
        self.prompt_position += prompts
        added = {
            "seconds": seconds,
            "rollouts": float(stats.rows),
            "tokens": float(stats.tokens),
            "optimizer_steps": float(stats.update.optimizer_steps),
        }
        self.totals = self.totals | {name: self.totals.get(name, 0.0) + value for name, value in added.items()}
        self.totals["gap_max"] = max(self.totals.get("gap_max", 0.0), stats.gap.largest if stats.gap else 0.0)

    def trained(self) -> dict[str, Tensor]:
        """The unwrapped module's trained parameters and its buffers by name: what a checkpoint has to hold.

        Under ZeRO-3 and FSDP these are shards (engine/state_parts.py)."""
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        return named | dict(self.module.named_buffers())

    def numbers(self) -> dict[str, Any]:
        """All that is not a tensor, as JSON values."""
        reward = self.reward.state_dict() if hasattr(self.reward, "state_dict") else {}
        return {
            "step": self.step,
            "prompt_position": self.prompt_position,
            "kl": self.kl.state_dict(),
            "reward": reward,
            "steering": {} if self.steering is None else {"scale": self.steering.scale},
            "totals": dict(self.totals),
            "before": {} if self.reward_before is None else {"eval/reward": self.reward_before},
        }

    def load_numbers(self, numbers: dict[str, Any]) -> None:
        self.step = int(numbers["step"])
        self.prompt_position = int(numbers["prompt_position"])
        self.kl.load_state_dict(numbers["kl"])
        if hasattr(self.reward, "load_state_dict"):
            self.reward.load_state_dict(numbers["reward"])
        if self.steering is not None:
            self.steering.scale = float(numbers["steering"]["scale"])
        self.totals = dict(numbers["totals"])
        self.reward_before = numbers["before"].get("eval/reward")
