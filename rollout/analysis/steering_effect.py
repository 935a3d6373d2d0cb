"""What a vector does and what it costs: the chosen measure and the KL per response, strength by strength.

    strength   measure   gain per unit   KL per token   KL per response
         0.0      0.12            -             0.000             0.00
         2.0      0.31         0.095            0.021             0.42

The KL is that of the steered distribution from the plain one, over responses drawn steered: at each token the exact
sum over the vocabulary, so that few responses give a steady figure.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering.spec.spec import Site, SteeringSpec, Strength
from steerl.rollout.steering.steering import Steering
from steerl.rollout.types import Rollout, Texts

Measure = Callable[[Rollout, Texts], Tensor]


@dataclass(frozen=True)
class CurvePoint:
    """One strength's figures, means over responses."""

    strength: float
    measure: float
    kl_per_token: float
    kl_per_sequence: float

    def gain(self, plain: CurvePoint) -> float:
        """How much the measure moved per unit of strength."""
        return (self.measure - plain.measure) / self.strength if self.strength else math.nan


def kl_from_plain(policy: Policy, steering: Steering, rollout: Rollout) -> Tensor:
    """KL(steered || plain) at every action, (B, R): exact over the vocabulary, 0 beyond a row's end."""
    with torch.no_grad():
        mu_BRV = teacher_forced(policy, rollout, want_entropy=False, want_all=True, steering=steering).all_logprobs_BRV
        with unsteered():
            pi_BRV = teacher_forced(policy, rollout, want_entropy=False, want_all=True).all_logprobs_BRV
    if mu_BRV is None or pi_BRV is None:  # no actions
        return torch.zeros_like(rollout.policy_logprobs_BR)
    apart_BRV = torch.where(mu_BRV == float("-inf"), 0.0, mu_BRV - pi_BRV)  # what cannot be drawn adds nothing
    return torch.where(rollout.action_mask_BR, (mu_BRV.exp() * apart_BRV).sum(-1), 0.0)


def effect_curve(
    policy: Policy,
    site: Site,
    prompts: PromptBatch,
    sampling: Sampling,
    strengths: Sequence[float],
    measure: Measure,
    *,
    seed: int = 0,
    folder: str = "",
) -> list[CurvePoint]:
    """The site at each strength (0 is always measured first): same prompts, same random numbers."""
    curve: list[CurvePoint] = []
    for strength in sorted({0.0, *map(float, strengths)}, key=abs):
        at = dataclasses.replace(site, strength=Strength(value=strength), schedule=None)
        steering = Steering(policy.model, SteeringSpec(sites=(at,), role="data", folder=folder), policy.tokenizer, seed)
        # The KL is over the whole vocabulary, whatever could be drawn of it.
        rollout, texts = Sampler(policy, dataclasses.replace(sampling, replay_mask=False), steering).sample(prompts)
        kl_BR = kl_from_plain(policy, steering, rollout)
        tokens = int(rollout.actions_B.sum())
        values = measure(rollout, texts).double()
        if values.shape != (len(rollout),) or not bool(torch.isfinite(values).all()):
            raise UserError(f"measure: expected one finite number per response ({len(rollout)}), found {values}")
        kl_per_token = float(kl_BR.sum()) / max(tokens, 1)
        curve.append(CurvePoint(strength, float(values.mean()), kl_per_token, float(kl_BR.sum(1).mean())))
    return curve


def strength_for(curve: Sequence[CurvePoint], nats_per_sequence: float) -> float | None:
    """The strength (of the sign that was measured) at which a response costs that much KL, between measured points."""
    points = sorted((p for p in curve if p.strength >= 0), key=lambda p: p.strength)
    if len(points) < 2:
        points = sorted((p for p in curve if p.strength <= 0), key=lambda p: -p.strength)
    for low, high in zip(points, points[1:], strict=False):
        if low.kl_per_sequence <= nats_per_sequence <= high.kl_per_sequence and high.kl_per_sequence > low.kl_per_sequence:
            # KL grows with the square of a small strength: interpolate its root.
            a, b, c = (math.sqrt(max(v, 0.0)) for v in (low.kl_per_sequence, high.kl_per_sequence, nats_per_sequence))
            return low.strength + (high.strength - low.strength) * (c - a) / (b - a)
    return None


def table(curve: Sequence[CurvePoint], name: str) -> str:
    """The curve as text."""
    plain = next(p for p in curve if p.strength == 0.0)
    lines = [f"{'strength':>9}{name:>14}{'gain per unit':>15}{'KL per token':>14}{'KL per response':>17}"]
    for p in curve:
        gain = "-" if not p.strength else f"{p.gain(plain):.4f}"
        lines.append(f"{p.strength:>9g}{p.measure:>14.4f}{gain:>15}{p.kl_per_token:>14.4f}{p.kl_per_sequence:>17.3f}")
    return "\n".join(lines)
