"""Policy and value in one module, so that DDP, ZeRO and FSDP see one forward.

rollout ──> actor (the policy) ──> log-probs, entropy
               │ hidden states that predict each action
               ├──> head                          value: shared
               └    critic ──> hidden ──> head    value: separate, or a folder (value_model.py)

V(s_t) is read where action t is predicted. The head starts at zero (or as a reward model's), so V starts at zero.
The reference (reference.py) is never inside the module: nothing of it is trained, reduced or saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import compat
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.logprobs import TeacherForced, teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.steering.spec.spec import ROLES
from steerl.rollout.types import Rollout
from steerl.training.model.held import Held
from steerl.training.model.reference import Reference
from steerl.training.types import PolicyOutput


class ActorCritic(Held):
    """`model(rollout)` -> PolicyOutput. The names of its modules are those of the tensors in a checkpoint."""

    def __init__(self, policy: Policy, value_model: Policy | None, head: nn.Linear | None, steering: Steering | None):
        """`value_model`: None where the value shares the policy's; `head`: None where there is no value."""
        super().__init__(policy, value_model)
        self.policy, self.value_model, self.steering = policy, value_model, steering
        self.actor = policy.model
        self.critic = value_model.model if value_model is not None else None
        self.head = head
        self.vectors = steering.parameters_module if steering is not None else None
        self.packed = False
        """Rows of a pass are laid one after another without padding (ppo.packing)."""
        self.compiled: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        """Around a pass: its layers run compiled (ppo.compile)."""

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
        cores = self.cores()
        layers = [
            module for core in cores for module in compat.modules(core) if getattr(module, "gradient_checkpointing", False)
        ]
        with contextlib.ExitStack() as stack:
            for layer in layers:
                layer.training = True
                stack.callback(setattr, layer, "training", False)
            for core in cores if layers else ():
                stack.enter_context(no_dropout(core))
            yield

    def policy_modules(self) -> list[nn.Module]:
        """All that the policy is made of: the model with its adapter, and trained steering."""
        return [module for module in (self.actor, self.vectors) if module is not None]

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for module in self.policy_modules() for p in module.parameters() if p.requires_grad]

    def value_parameters(self) -> list[nn.Parameter]:
        modules = [module for module in (self.critic, self.head) if module is not None]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def forward(
        self,
        rollout: Rollout | None,
        *,
        entropy: bool = False,
        after: bool = False,
        detach_value: bool = False,
        call: Callable[[], None] | None = None,
    ) -> PolicyOutput:
        """Fed tokens are read like any other, and hold 0 in what is given. `after` adds the value at the end of each row,
        where its next action would be predicted; `detach_value` keeps a shared model out of the value's gradient. `call` is all
        that is done, where there is no rollout."""
        if rollout is None:
            assert call is not None
            call()
            return PolicyOutput(torch.empty(0))
        seen = widened(rollout) if after and self.head is not None else rollout
        width, mask_BR = rollout.response_width, rollout.action_mask_BR
        with self.compiled():
            forced = self._policy_pass(seen, entropy)
        logprobs_BR = torch.where(mask_BR, forced.logprobs_BR[:, :width], 0.0)
        entropy_BR = torch.where(mask_BR, forced.entropy_BR[:, :width], 0.0) if entropy else None
        if self.head is None:
            return PolicyOutput(logprobs_BR, entropy_BR)
        if self.value_model is not None:
            with self.compiled():
                forced = teacher_forced(self.value_model, seen, want_hidden=True, want_logprobs=False, packed=self.packed)
        assert forced.hidden_BRD is not None
        hidden_BRD = forced.hidden_BRD.detach() if detach_value and self.value_model is None else forced.hidden_BRD
        with torch.autocast(hidden_BRD.device.type, enabled=False):  # a value is a number to regress on, not a distribution
            states_BR = self.head(hidden_BRD.to(self.head.weight.dtype))[..., 0]
        values_BR = torch.where(mask_BR, states_BR[:, :width], 0.0)
        after_B = states_BR.gather(1, rollout.lengths_B[:, None])[:, 0] if seen is not rollout else None
        return PolicyOutput(logprobs_BR, entropy_BR, values_BR, after_B)

    def _policy_pass(self, rollout: Rollout, entropy: bool) -> TeacherForced:
        shared = self.head is not None and self.value_model is None
        return teacher_forced(
            self.policy,
            rollout,
            want_hidden=shared,
            want_entropy=entropy,
            steering=self.steering if self.learns_steered(rollout) else None,
            packed=self.packed,
        )

    def learns_steered(self, rollout: Rollout) -> bool:
        """Whether the policy of these rows is the steered model. Behaviour and data are roles of the sampler alone."""
        return self.steering is not None and ROLES[self.steering.role].learns and bool(rollout.steering)

    def plain_logprobs(self, rollout: Rollout) -> Tensor | None:
        """The plain model's, where it drew rows that the steered one learns from (role preventative). Collective."""
        if self.steering is None or ROLES[self.steering.role].draws or not self.learns_steered(rollout):
            return None
        return self.inside(lambda: teacher_forced(self.policy, rollout, want_entropy=False, packed=self.packed).logprobs_BR)


def checkpoint_activations(actor_critic: ActorCritic) -> None:
    """Let actor and critic compute activations again in the backward pass, inside `recomputing`."""
    for core in actor_critic.cores():
        if not getattr(core, "supports_gradient_checkpointing", False):
            raise UserError(f"ppo.checkpointing: {type(core).__name__} cannot recompute its activations; leave it out")
        # renamed in transformers 5.2x
        enable = getattr(core, "activation_checkpointing_enable", core.gradient_checkpointing_enable)
        enable()
        core.eval()


def pack_rows(actor_critic: ActorCritic, reference: Reference | None) -> None:
    """Let actor, critic and reference have the rows of a pass one after another, where that changes nothing. Call inside."""
    for policy in actor_critic.policies:
        if problem := policy.packing_problem():
            raise UserError(f"ppo.packing: {problem}; leave it out")
    actor_critic.packed = True
    if reference is not None:
        reference.packed = True  # its model is the policy's, or a copy of it


def widened(rollout: Rollout) -> Rollout:
    """One column more, so that the state after each row's last token, drawn or fed, is among those that predict something."""
    wide = rollout.pad_to(rollout.prompt_width, rollout.response_width + 1)
    return dataclasses.replace(wide, lengths_B=wide.lengths_B + 1)
