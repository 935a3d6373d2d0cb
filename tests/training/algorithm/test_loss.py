"""PPO's losses against written-out loops, against autograd of the exact objective, and under every split of the rows."""

from __future__ import annotations

import math
import random

import pytest
import torch

from steerl.training.algorithm import loss


def batch(seed: int = 0, rows: int = 8, width: int = 5):
    draw = random.Random(seed)
    lengths = [draw.randint(1, width) for _ in range(rows)]
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]

    def fill(scale):
        return torch.tensor([[draw.gauss(0, scale) if t < n else math.nan for t in range(width)] for n in lengths]).double()

    old = fill(1.0)
    return lengths, mask, old + fill(0.5), old, fill(1.0)


def by_hand(lengths, new, old, advantages, low, high, dual, importance, reduction):
    total, count = 0.0, sum(lengths)
    for i, n in enumerate(lengths):
        for t in range(n):
            r, a = math.exp(float(new[i, t] - old[i, t])), float(advantages[i, t])
            bounded = min(max(r, 1 - low), 1 + high)
            objective = min(r * a, bounded * a)
            if dual is not None and a < 0:
                objective = max(objective, dual * a)
            weight = 1 / count if reduction == "token" else 1 / (n * len(lengths))
            total -= float(importance[i, t]) * objective * weight
    return total


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("low, high, dual", [(0.2, 0.2, None), (0.1, 0.3, None), (0.2, 0.2, 1.1)])
def test_policy_loss(reduction, low, high, dual):
    lengths, mask, new, old, advantages = batch()
    importance = torch.rand(mask.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = loss.token_weights(mask, tokens=sum(lengths), rows=len(lengths), reduction=reduction).double()
    found, metrics = loss.policy_loss(
        new, old, advantages, mask, weights, clip_low=low, clip_high=high, dual_clip=dual, importance_BR=importance
    )
    expected = by_hand(lengths, new, old, advantages, low, high, dual, importance, reduction)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert all(math.isfinite(float(value)) for value in metrics.values())


def test_metrics_of_the_policy_loss():
    lengths, mask, new, old, advantages = batch(3)
    weights = loss.token_weights(mask, tokens=sum(lengths), rows=len(lengths)).double()
    _, metrics = loss.policy_loss(new, old, advantages, mask, weights, clip_low=0.2, clip_high=0.2)
    pairs = [(float(new[i, t] - old[i, t]), float(advantages[i, t])) for i, n in enumerate(lengths) for t in range(n)]
    outside = sum((math.exp(d) > 1.2 and a > 0) or (math.exp(d) < 0.8 and a < 0) for d, a in pairs)
    assert outside > 0
    assert float(metrics["clip_fraction"]) == pytest.approx(outside / len(pairs), rel=1e-6)
    assert 1 + float(metrics["ratio_excess"]) == pytest.approx(sum(math.exp(d) for d, _ in pairs) / len(pairs), rel=1e-6)
    assert float(metrics["approx_kl"]) == pytest.approx(sum(math.exp(d) - 1 - d for d, _ in pairs) / len(pairs), rel=1e-6)
    _, same = loss.policy_loss(old, old, advantages, mask, weights, clip_low=0.2, clip_high=0.2)
    assert float(same["clip_fraction"]) == 0 and float(same["approx_kl"]) == 0


@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_every_split_into_micro_batches_gives_the_same_gradient(reduction):
    lengths, mask, new, old, advantages = batch(5)
    leaf = new.nan_to_num(0.0)

    def gradient(splits):
        new_BR = leaf.clone().requires_grad_()
        for rows in splits:
            weights = loss.token_weights(mask[rows], tokens=sum(lengths), rows=len(lengths), reduction=reduction)
            loss.policy_loss(
                new_BR[rows], old[rows], advantages[rows], mask[rows], weights.double(), clip_low=0.2, clip_high=0.2
            )[0].backward()
        return new_BR.grad

    whole = gradient([list(range(8))])
    assert torch.isfinite(whole).all() and whole[~mask].eq(0).all()
    for splits in ([[i] for i in range(8)], [[0, 3, 5, 6], [7, 1, 2, 4]], [[7], [0, 1, 2, 3, 4, 5, 6]]):
        assert torch.allclose(gradient(splits), whole, atol=1e-15)


def test_one_update_is_the_gradient_of_the_exact_objective_on_an_enumerated_policy():
    """Every token of a five-word vocabulary once, weighed by its probability: the sampled loss becomes the exact one."""
    draw = torch.Generator().manual_seed(0)
    old_logits = torch.randn(5, generator=draw, dtype=torch.float64)
    logits = (old_logits + 0.4 * torch.randn(5, generator=draw, dtype=torch.float64)).requires_grad_()
    advantages = torch.randn(5, generator=draw, dtype=torch.float64)
    old = old_logits.log_softmax(0)
    ratio = logits.softmax(0) / old.exp()
    exact = -(old.exp() * torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)).sum()
    (true,) = torch.autograd.grad(exact, logits)
    mask = torch.ones(5, 1, dtype=torch.bool)
    new = logits.log_softmax(0)[:, None]
    sampled, _ = loss.policy_loss(new, old[:, None], advantages[:, None], mask, old.exp()[:, None], clip_low=0.2, clip_high=0.2)
    (found,) = torch.autograd.grad(sampled, logits)
    assert torch.allclose(found, true, atol=1e-14)


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss(clip):
    lengths, mask, values, old, returns = batch(7)
    weights = loss.token_weights(mask, tokens=sum(lengths), rows=len(lengths)).double()
    found, metrics = loss.value_loss(values, old, returns, mask, weights, clip=clip)
    total = 0.0
    for i, n in enumerate(lengths):
        for t in range(n):
            v, o, r = float(values[i, t]), float(old[i, t]), float(returns[i, t])
            error = (v - r) ** 2
            if clip is not None:
                error = max(error, (min(max(v, o - clip), o + clip) - r) ** 2)
            total += error / 2 / sum(lengths)
    assert float(found) == pytest.approx(total, rel=1e-6)
    assert float(metrics["value_loss"]) == pytest.approx(total, rel=1e-6)


def test_a_batch_without_tokens_is_zero_not_nan():
    mask = torch.zeros(2, 3, dtype=torch.bool)
    new = torch.full((2, 3), math.nan, requires_grad=True)
    weights = loss.token_weights(mask, tokens=0, rows=0)
    found, _ = loss.policy_loss(new, new.detach(), new.detach(), mask, weights, clip_low=0.2, clip_high=0.2)
    found.backward()
    assert float(found) == 0 and new.grad.eq(0).all()
