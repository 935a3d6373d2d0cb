"""Models as an engine holds them: what needs their weights runs inside a forward pass, where they are brought together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from steerl.rollout.model import compat, unread
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.model.unread import Unread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Result = TypeVar("Result")


class Held(nn.Module):
    """The root that an engine wraps; its forward takes `call` and does nothing else then."""

    def __init__(self, *policies: Policy | None):
        super().__init__()
        self.policies = tuple(policy for policy in policies if policy is not None)

    def cores(self) -> list[PreTrainedModel]:
        """The transformers models, adapters taken off."""
        return [policy.core for policy in self.policies]

    @property
    def _no_split_modules(self) -> list[str]:
        """Names of the layers that FSDP keeps in one piece."""
        return compat.unsplit_layers(self.cores())

    def inside(self, function: Callable[[], Result]) -> Result:
        """What `function` gives when it is called within this module's forward pass: engines that spread weights over ranks
        bring together there what lies outside of layers. Every rank comes here."""
        if not needs_sync(self):
            return function()
        results: list[Result] = []
        with torch.no_grad():
            self(None, call=lambda: results.append(function()))
        if callable(reshard := getattr(self, "reshard", None)):
            reshard()  # FSDP leaves the root's own weights together: a backward pass might follow
        return results[0]


class HeldCopy(Held):
    """One model alone, which nothing trains."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.model = policy.model

    def forward(self, _: None, *, call: Callable[[], None]) -> Tensor:
        call()
        return torch.empty(0)


def read_whole(held: Sequence[Held]) -> None:
    """Every weight whole. On a CPU the first policy's may stay in the memory that the file is mapped to, which is this
    process's own; all others are read."""
    unread.replace(held[0].policies[0].model, Unread.shown)
    for module in held:
        unread.read_in(module)
