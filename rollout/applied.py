"""Applied: how rows are steered, as their record says it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Applied(NamedTuple):
    """How rows are steered, by the names of a Rollout's fields: all that a second pass over them needs."""

    strength_BK: Tensor
    positions_BKN: Tensor
    policy_step_B: Tensor
    steering_seed: int | None

    @staticmethod
    def nothing(row_B: Tensor, policy_step: int, sites: int = 0) -> Applied:
        """Rows that no site touches."""
        strength_BK = torch.zeros(len(row_B), sites, device=row_B.device)
        positions_BKN = row_B.new_full((len(row_B), sites, min(sites, 1)), -1)
        return Applied(strength_BK, positions_BKN, torch.full_like(row_B, policy_step), 0)

    @staticmethod
    def join(parts: Sequence[Applied]) -> Applied:
        """The rows of all, with as many places for positions as the widest has."""
        most = max(part.positions_BKN.shape[2] for part in parts)
        listed = [pad(part.positions_BKN, (0, most - part.positions_BKN.shape[2]), value=-1) for part in parts]
        steps = torch.cat([part.policy_step_B for part in parts])
        return Applied(torch.cat([part.strength_BK for part in parts]), torch.cat(listed), steps, parts[0].steering_seed)

    def select(self, index: Tensor) -> Applied:
        tensors = (self.strength_BK[index], self.positions_BKN[index], self.policy_step_B[index])
        return Applied(*tensors, self.steering_seed)

    def to(self, device: torch.device) -> Applied:
        tensors = (self.strength_BK.to(device), self.positions_BKN.to(device), self.policy_step_B.to(device))
        return Applied(*tensors, self.steering_seed)
