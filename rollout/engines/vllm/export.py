"""The policy's weights as a checkpoint names them: what the server is sent."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from steerl.rollout.model.policy import Policy


def weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every weight; one that is tied to another comes once."""
    for name, parameter in policy.core.named_parameters():
        yield name, parameter.detach()
