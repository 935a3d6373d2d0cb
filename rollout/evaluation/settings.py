"""How a policy answers the harness: settings of `steerl eval`, and the same as arguments of the model `steerl`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.settings_reader import Checked, Reader, within
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.steering import load_spec
from steerl.rollout.steering.spec.spec import ROLES, SteeringSpec

if TYPE_CHECKING:
    from steerl.rollout.model.policy import Policy
    from steerl.rollout.steering import Steering

Spec = Mapping[str, object] | str | Path | SteeringSpec


@dataclass(frozen=True)
class AnswerSettings(Checked):
    """How requests are answered; none of it changes what is asked."""

    batch_size: int = within(16, low=1)
    """Most rows of a pass. Results do not depend on it."""
    batch_tokens: int = within(0, low=0)
    """Most tokens of a pass (rows x the longest of them); 0 = batch_size alone."""
    max_length: int | None = within(None, low=2)
    """Most tokens that the model is given; null = its context. What is longer is cut on the left, as the harness does."""
    seed: int = within(0, low=0)
    """Seed of generations that are sampled; with the request, and how often it was there before, it decides every token."""
    prefix_token_id: int | None = within(None, low=0)
    """What an empty context is replaced by; null = the tokenizer's bos, else its eos."""
    add_bos_token: bool | None = None
    """Whether texts begin with the tokenizer's bos; null = as it does by itself."""
    enable_thinking: bool | None = None
    """Given to the chat template where it is not null."""
    think_end_token: str = ""
    """Of a generation only what follows the last of this text counts."""


@dataclass(frozen=True)
class Arguments(AnswerSettings, ModelSettings):
    """`model_args` of the model `steerl` in the harness."""


def read_arguments(given: Mapping[str, object]) -> Arguments:
    """What the harness hands over; `pretrained`, its own models' name for the path, is understood."""
    named = {"path" if name == "pretrained" else name: value for name, value in given.items()}
    size = named.get("batch_size")
    if isinstance(size, str):  # as its command line gives it
        if not size.isdigit():
            raise ConfigError(f"batch_size: {size!r}; sizes are not searched for: give a number of rows, batch_size=16")
        named["batch_size"] = int(size)
    problems: list[str] = []
    arguments = Reader(problems, "model_args").read(Arguments, named)
    if problems:
        raise ConfigError(*problems)
    return arguments  # type: ignore[no-any-return]


def evaluated_spec(source: Spec) -> SteeringSpec:
    """The spec of a steering that acts on a model as it is, on texts that come from no data of ours."""
    spec = load_spec(source)
    if not ROLES[spec.role].draws:
        raise ConfigError(f"steering.role: {spec.role} acts while PPO learns, never on what is evaluated; set it to policy")
    if spec.role == "trainable":
        raise ConfigError(
            "steering.role: trainable is still to be learned; name what a run left, RUN/model/steering.yaml, or use policy"
        )
    problems = []
    for index, site in enumerate(spec.sites):
        if site.strength.column:
            problems.append(
                f"steering.sites[{index}].strength: column {site.strength.column!r}, but tasks have no columns; give a number"
            )
        if len(site.strength.samples) > 1:
            problems.append(f"steering.sites[{index}].strength: one for each sample, but a request has one; give a number")
    if problems:
        raise ConfigError(*problems)
    return spec


def steering_of(policy: Policy, source: Spec | None, seed: int) -> Steering | None:
    from steerl.rollout.steering import Steering

    return None if source is None else Steering(policy.model, evaluated_spec(source), policy.tokenizer, seed)
