"""Importance correction: weights for rollouts whose sampling distribution was not the policy's.

PPO's ratio new / old has the policy's distribution on both sides. Tokens drawn from another one, mu (top-p, penalties, steered
exploration, older weights, another engine), are weighed by pi_old / mu:

    token_*      each token by its own pi_old / mu: low variance, biased (the states before it are mu's)
    sequence_*   each row by the product over its tokens: the true gradient, high variance
    geometric_*  each row by the geometric mean over its tokens: low variance at any length, biased
    *_truncate   weights above `high` become `high`, below `low` become `low`
    *_mask       weights above `high` or below `low` become 0

They weigh the policy loss (and with it a KL in the reward), the KL as a loss, and the KL to the reference that is logged and
held. What the sampler never draws (top-p, top-k) no weight brings back. Entropy, value loss, clip fraction and approx_kl stay
means over the tokens as drawn. The effective sample size falls about as exp(-2 x KL(mu || pi_old) per sequence).
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerl.rollout.steering.spec.spec import Correction


def importance_weights(
    policy_BR: Tensor, behaviour_BR: Tensor, mask_BR: Tensor, correction: Correction
) -> tuple[Tensor, dict[str, float]]:
    """Weights of every action (0 elsewhere) and what they say about the mismatch. All rows of all ranks go in; one without
    actions counts nothing.

    Logged: the effective sample size in rows (of the plain sequence weights) and of the weights in use (as a share), the
    largest weight before truncation, the share truncated or masked, and KL(mu || pi_old) per token and sequence."""
    log_token_BR = torch.where(mask_BR, policy_BR.double() - behaviour_BR.double(), 0.0)
    log_row_B, actions_B, acts_B = log_token_BR.sum(1), mask_BR.sum(1), mask_BR.any(1)
    rows, tokens = max(int(acts_B.sum()), 1), max(int(mask_BR.sum()), 1)
    by_row = correction.type.startswith(("sequence", "geometric"))
    log_used_B = log_row_B / actions_B.clamp(min=1) if correction.type.startswith("geometric") else log_row_B
    # Held where exp is still finite: a row of another policy's may be off by thousands of nats.
    plain_BR = (log_used_B[:, None].expand_as(log_token_BR) if by_row else log_token_BR).clamp(max=700).exp()
    outside_BR = mask_BR & ((plain_BR > correction.high) | (plain_BR < correction.low))
    if correction.type == "none":
        used_BR, outside_BR = torch.ones_like(plain_BR), torch.zeros_like(mask_BR)
    elif correction.type.endswith("truncate"):
        used_BR = plain_BR.clamp(correction.low, correction.high)
    else:
        used_BR = torch.where(outside_BR, 0.0, plain_BR)
    used_BR = torch.where(mask_BR, used_BR, 0.0)
    used = used_BR[mask_BR] if not by_row else used_BR.amax(1)[acts_B]
    metrics = {
        "correction/ess": _effective(log_row_B[acts_B]),
        "correction/ess_share_used": float(used.sum().square() / (used.square().sum().clamp(min=1e-300) * max(len(used), 1))),
        "correction/max": float(torch.where(mask_BR, plain_BR, 0.0).amax()),
        "correction/share_outside": float(outside_BR.sum()) / tokens,
        "correction/kl_token": float(-log_token_BR.sum()) / tokens,
        "correction/kl_sequence": float(-log_row_B.sum()) / rows,
    }
    return used_BR.float(), metrics


def _effective(log_weights_B: Tensor) -> float:
    """(sum w)^2 / sum w^2 from logarithms: 1 to B rows, 0 without any."""
    return 0.0 if not len(log_weights_B) else float((2 * log_weights_B.logsumexp(0) - (2 * log_weights_B).logsumexp(0)).exp())
