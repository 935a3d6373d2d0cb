"""KL between the policy and its reference: estimators from sampled tokens, forms fit for a loss, and coefficient controllers.

For x drawn from pi, with d = log pi(x) - log ref(x), the direction is always KL(pi || ref):

    k1 = d                      unbiased, may be negative
    k2 = d^2 / 2                biased, its plain gradient is right
    k3 = exp(-d) - 1 + d        unbiased, never negative
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "k2", "k3"]


def estimate(logprobs: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """The chosen estimate of KL(pi || ref) for every token; `logprobs` are pi's."""
    difference = logprobs - reference
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    # expm1 keeps its digits where the two almost agree
    return torch.expm1(-difference) + difference


def as_loss(new: Tensor, old: Tensor, reference: Tensor, estimator: Estimator = "k1") -> Tensor:
    """KL as a loss: a per-token term whose mean gradient is the gradient of KL(new || ref), for tokens drawn from `old`.

    The ratio new / old carries the sampling distribution. Without it k1 has a zero mean gradient and k3 descends another
    divergence. k1 and k3 are unbiased for the KL at every new, so their weighted form is differentiated whole;
    k2 is not, but its own gradient, d x grad log pi, is the right one: there the ratio only weighs.
    """
    ratio = torch.exp(new - old)
    if estimator == "k2":
        ratio = ratio.detach()
    return ratio * estimate(new, reference, estimator)


class FixedKL:
    """KL coefficient that stays."""

    def __init__(self, coefficient: float):
        self.coefficient = float(coefficient)

    def update(self, kl_per_sequence: float, rollouts: int) -> None:
        return None

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """A fixed coefficient is a setting, so a resumed run takes the one it was started with."""


class AdaptiveKL:
    """Adaptive KL coefficient: moves until the KL per sequence (k1, summed over a response, mean over rows) meets its target.

    After every step: coefficient x (1 + clip(KL / target - 1, -0.2, 0.2) x rollouts / horizon).
    """

    def __init__(self, coefficient: float, target: float, horizon: float):
        self.coefficient, self.target, self.horizon = float(coefficient), float(target), float(horizon)

    def update(self, kl_per_sequence: float, rollouts: int) -> None:
        error = min(max(kl_per_sequence / self.target - 1.0, -0.2), 0.2)
        self.coefficient *= 1.0 + error * rollouts / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = float(state["coefficient"])
