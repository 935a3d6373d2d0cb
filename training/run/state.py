"""TrainState: everything that a later training step depends on, in one place, so that a checkpoint can hold all of it.

    tensors   model (the prepared ActorCritic: policy, value, trained steering), optimizer    -> safetensors
    numbers   step, prompt position, KL controller, reward statistics, steering's scale, totals -> JSON

The learning-rate schedule, the sampling, the order of the prompts and the minibatches are functions of (seed, step), so
they have no state of their own. Nothing in a step draws from a global random number generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steerl.training.algorithm.kl import AdaptiveKL, FixedKL
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class TrainState:
    """Mutable on purpose: the loop moves it on by one step at a time."""

    model: nn.Module
    """The prepared ActorCritic: plain, or wrapped by DDP, DeepSpeed or FSDP."""
    optimizer: Optimizer
    """The prepared optimizer."""
    accelerator: Any
    """accelerate.Accelerator: unwraps the model, gathers sharded weights."""
    kl: FixedKL | AdaptiveKL
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
