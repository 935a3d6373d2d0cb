"""The reference that the KL is measured to: a frozen copy, or the policy's own model with adapter and steering off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor

from steerl.rollout.model import adapters
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.types import Rollout
from steerl.training.model.held import HeldCopy


class Reference:
    """What the KL is measured to: a frozen copy, or the policy's own model with adapter and steering off."""

    def __init__(self, policy: Policy, *, adapter_off: bool, copied: bool = False):
        self.policy, self.adapter_off = policy, adapter_off
        self.held = HeldCopy(policy) if copied else None
        """A copy, which an engine holds as it holds the policy."""
        self.autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
        """The precision that the policy is run in."""
        self.inside: Callable[[Callable[[], Tensor]], Tensor] = lambda function: function()
        """Where its weights come together: Held.inside, of the copy or of the policy."""
        self.packed = False
        """Rows are laid one after another, as the policy's are."""

    def logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probs of the responses under the reference, unsteered, at the rollout's temperature."""
        off = adapters.off(self.policy.model) if self.adapter_off else contextlib.nullcontext()
        with torch.no_grad(), self.autocast(), unsteered(), off:
            return self.inside(lambda: teacher_forced(self.policy, rollout, want_entropy=False, packed=self.packed).logprobs_BR)


def build_reference(policy: Policy, kind: str, *, trains_vectors: bool) -> Reference | None:
    """The reference of `ppo.reference`, taken while the policy is as it starts."""
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
    return Reference(policy.with_model(frozen, like=policy), adapter_off=False, copied=True)
