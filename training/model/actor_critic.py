"""Policy and value in one module, so that DDP, ZeRO and FSDP see one forward; and the reference beside it.

rollout ──> actor (the policy) ──> log-probs, entropy
               │ hidden states that predict each action
               ├──> head                          value: shared
               └    critic ──> hidden ──> head    value: separate, or a folder

V(s_t) is read where action t is predicted. The head starts at zero (or as a reward model's), so V starts at zero.
The reference is never inside the module: nothing of it is trained, reduced or saved.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.model import adapters
from steerl.rollout.model.policy import Policy, no_dropout
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.scoring.logit_postprocessing import logit_postprocessing
from steerl.rollout.scoring.logprobs import TeacherForced, teacher_forced
from steerl.rollout.steering import Steering, SteeringSpec, unsteered
from steerl.rollout.types import Rollout
from steerl.training.model import value_model
from steerl.training.settings import PPOSettings
from torch import Tensor, nn

Found = TypeVar("Found")


class ActorCritic(nn.Module):
    """`model(rollout, columns)` -> {"old": log-probs (B, R), "entropy": (B, R), "values": (B, R), "after": (B, 1)}.

    "values" is absent where there is no value (critic-free credit), "after" unless it is asked for."""

    def __init__(self, policy: Policy, trunk: Policy | None, head: nn.Linear | None, steering: Steering | None):
        super().__init__()
        self.policy, self.trunk, self.steering = policy, trunk, steering
        self.actor = policy.model
        self.critic = trunk.model if trunk is not None else None
        self.head = head
        self.vectors = steering.parameters_module if steering is not None else None

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the policy computes in."""
        return next(p.dtype for p in self.actor.parameters() if p.is_floating_point())

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Around a forward and backward pass that keeps few activations and computes the others again.

        Layers look at their training flag before they do so; it is on in here only, for decoding with a cache needs it off,
        and their dropout is off until the backward pass has run."""
        cores = [policy.core for policy in (self.policy, self.trunk) if policy is not None]
        layers = [module for core in cores for module in core.modules() if getattr(module, "gradient_checkpointing", False)]
        with contextlib.ExitStack() as stack:
            for layer in layers:
                layer.training = True
                stack.callback(setattr, layer, "training", False)
            for core in cores if layers else ():
                stack.enter_context(no_dropout(core))
            yield

    def policy_parameters(self) -> list[nn.Parameter]:
        """All that changes the policy: weights or adapters, and trained steering."""
        modules = [self.actor, *([self.vectors] if self.vectors is not None else [])]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        modules = [module for module in (self.critic, self.head) if module is not None]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers that FSDP keeps in one piece."""
        cores = [policy.core for policy in (self.policy, self.trunk) if policy is not None]
        return sorted({name for core in cores for name in getattr(core, "_no_split_modules", None) or ()})

    def inside(self, function: Callable[[], Found]) -> Found:
        """What `function` gives when it is called within this module's forward pass: engines that spread weights over ranks
        bring together there what lies outside of layers. Every rank comes here."""
        if not needs_sync(self):
            return function()
        kept: list[Found] = []
        with torch.no_grad():
            self(None, call=lambda: kept.append(function()))
        return kept[0]

    def forward(
        self,
        rollout: Rollout | None,
        columns: dict[str, list[Any]] | None = None,
        *,
        entropy: bool = False,
        after: bool = False,
        detach_value: bool = False,
        call: Callable[[], None] | None = None,
    ) -> dict[str, Tensor]:
        """`after` adds the value of the state after each row's last action; `detach_value` keeps a shared trunk out of the
        value's gradient. `call` is all that is done, where there is no rollout."""
        if rollout is None:
            assert call is not None
            call()
            return {}
        asked = widened(rollout) if after and self.head is not None else rollout
        width, mask_BR = rollout.response_width, rollout.mask_BR
        forced = self._policy_pass(asked, columns, entropy)
        found = {"old": torch.where(mask_BR, forced.logprobs_BR[:, :width], 0.0)}
        if entropy:
            found["entropy"] = torch.where(mask_BR, forced.entropy_BR[:, :width], 0.0)
        if self.head is None:
            return found
        if self.trunk is not None:
            forced = teacher_forced(self.trunk, asked, want_hidden=True, want_logprobs=False)
        assert forced.hidden_BRD is not None
        hidden_BRD = forced.hidden_BRD.detach() if detach_value and self.trunk is None else forced.hidden_BRD
        with torch.autocast(hidden_BRD.device.type, enabled=False):  # a value is a number to regress on, not a law
            values_BR = self.head(hidden_BRD.to(self.head.weight.dtype))[..., 0]
        found["values"] = torch.where(mask_BR, values_BR[:, :width], 0.0)
        if asked is not rollout:
            found["after"] = values_BR.gather(1, rollout.lengths_B[:, None])
        return found

    def _policy_pass(self, rollout: Rollout, columns: dict[str, list[Any]] | None, entropy: bool) -> TeacherForced:
        # Behaviour and data are roles of the sampler alone: the policy that learns is then the plain model.
        steers = self.steering is not None and self.steering.role in ("policy", "trainable") and rollout.steering
        shared = self.head is not None and self.trunk is None
        return teacher_forced(
            self.policy,
            rollout,
            want_hidden=shared,
            want_entropy=entropy,
            steering=self.steering if steers else None,
            columns=columns,
        )


def checkpoint_activations(actor_critic: ActorCritic) -> None:
    """Let actor and critic compute activations again in the backward pass, inside `recomputing`."""
    for policy in (actor_critic.policy, actor_critic.trunk):
        if policy is not None:
            core = policy.core
            if not getattr(core, "supports_gradient_checkpointing", False):
                raise UserError(f"ppo.checkpointing: {type(core).__name__} cannot recompute its activations; leave it out")
            # renamed in transformers 5.2x
            enable = getattr(core, "activation_checkpointing_enable", core.gradient_checkpointing_enable)
            enable()
            core.eval()


def widened(rollout: Rollout) -> Rollout:
    """One column more, so that the state after each row's last action is among those that predict something."""
    wide = rollout.pad_to(rollout.prompt_width, rollout.response_width + 1)
    return dataclasses.replace(wide, lengths_B=wide.lengths_B + 1)


class Reference:
    """What the KL is measured to: a frozen copy, or the policy's own model with adapter and steering off."""

    def __init__(self, policy: Policy, *, adapter_off: bool):
        self.policy, self.adapter_off = policy, adapter_off
        self.autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        """The precision that the policy is run in."""
        self.inside: Callable[[Callable[[], Tensor]], Tensor] = lambda function: function()
        """Where the policy's own model is run: ActorCritic.inside. A copy stays whole on every rank."""

    def logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs of the responses under the reference, unsteered, at the rollout's temperature."""
        off = adapters.off(self.policy.model) if self.adapter_off else contextlib.nullcontext()
        with torch.no_grad(), self.autocast(), unsteered(), off:
            return self.inside(lambda: teacher_forced(self.policy, rollout, want_entropy=False).logprobs_BR)


def build(
    policy: Policy, settings: PPOSettings, spec: SteeringSpec | None, *, seed: int
) -> tuple[ActorCritic, Reference | None, Steering | None]:
    """Actor and critic, reference, steering. Copies are taken first, so that they are of the plain model."""
    trains_vectors = spec is not None and spec.role == "trainable"
    reference = _reference(policy, settings.reference, trains_vectors)
    trunk, head = (None, None) if settings.credit != "gae" else value_model.build(policy, settings.value)
    if trains_vectors:
        for parameter in policy.model.parameters():
            parameter.requires_grad_(False)
    for model in (policy, *([reference.policy] if reference is not None else [])):
        logit_postprocessing(model)  # observed here, where every rank comes and weights are whole
    steering = Steering(policy.core, spec, policy.tokenizer, seed) if spec is not None else None
    return ActorCritic(policy, trunk, head, steering), reference, steering


def _reference(policy: Policy, kind: str, trains_vectors: bool) -> Reference | None:
    if kind == "none":
        return None
    has_adapter = hasattr(policy.model, "peft_config")
    if kind == "adapter":
        return Reference(policy, adapter_off=True)
    if kind == "auto" and trains_vectors:
        return Reference(policy, adapter_off=False)  # nothing of the model itself moves
    # Off, the policy must be as it starts, and stay so.
    if kind == "auto" and has_adapter and adapters.changes_nothing(policy.model) and not adapters.learns_in_base(policy.model):
        return Reference(policy, adapter_off=True)
    frozen = copy.deepcopy(policy.model).requires_grad_(False).eval()
    copied = policy.with_model(frozen)
    vars(copied)["capabilities"] = policy.capabilities  # a copy's are the same
    return Reference(copied, adapter_off=False)
