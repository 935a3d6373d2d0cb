"""The records of a PPO step: what the model says, the scored rows, what the update reads; and the state that a step changes.

Scored and Experience hold all rows of the step, of all ranks: ids and a few floats per token, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor
from torch.optim import Optimizer

from steerl.reward.types import Scores
from steerl.rollout.types import Rollout, Texts


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
    accelerator: Any
    """accelerate.Accelerator: unwraps the model, gathers sharded weights."""
    kl: KLController
    reward: Any
    """The reward; where it keeps statistics it has state_dict() and load_state_dict(mapping of JSON values)."""
    steering: Any = None
    """The job's steering: its KL budget moves `scale` from step to step."""
    step: int = 0
    """Steps completed; the next one has this index."""
    prompt_position: int = 0
    """Prompts taken so far; the next step begins here."""
    totals: dict[str, float] = field(default_factory=dict)
    """Running figures of the run: seconds, tokens, gap_max, optimizer_steps."""
    before: dict[str, float] = field(default_factory=dict)
    """The evaluation before the first step (reward, kl); empty until it was taken."""

    def advance(self, prompts: int, metrics: Mapping[str, float], seconds: float) -> None:
        """A step is done."""
        self.step += 1
        self.prompt_position += prompts
        added = {
            "seconds": seconds,
            "rollouts": metrics["rollout/rows"],
            "tokens": metrics["rollout/tokens"],
            "optimizer_steps": metrics["ppo/optimizer_steps"],
        }
        self.totals = self.totals | {name: self.totals.get(name, 0.0) + value for name, value in added.items()}
        self.totals["gap_max"] = max(self.totals.get("gap_max", 0.0), metrics.get("gap/max", 0.0))

    def trained(self) -> dict[str, Tensor]:
        """The unwrapped module's trained parameters and its buffers by name: what a checkpoint has to hold.

        Under ZeRO-3 and FSDP these are shards; full_state.py gathers them."""
        module = self.accelerator.unwrap_model(self.model)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        return named | dict(module.named_buffers())

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
            "before": dict(self.before),
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
        self.before = dict(numbers["before"])
