"""KL estimators and loss forms against the exact KL of an enumerated vocabulary; the controller against its closed form."""

from __future__ import annotations

import math

import pytest
import torch

from training import kl


def laws(seed: int = 0, size: int = 5):
    draw = torch.Generator().manual_seed(seed)
    policy = torch.randn(size, generator=draw, dtype=torch.float64, requires_grad=True)
    old = policy.detach() + 0.3 * torch.randn(size, generator=draw, dtype=torch.float64)
    reference = torch.randn(size, generator=draw, dtype=torch.float64)
    return policy, old.log_softmax(0), reference.log_softmax(0)


def exact(policy_logits, reference_log):
    log = policy_logits.log_softmax(0)
    return (log.exp() * (log - reference_log)).sum()


def test_k1_and_k3_are_unbiased_and_k2_is_half_the_square():
    policy, _, reference = laws()
    log = policy.detach().log_softmax(0)
    true = float(exact(policy.detach(), reference))
    for name in ("k1", "k3"):
        assert float((log.exp() * kl.estimate(log, reference, name)).sum()) == pytest.approx(true, abs=1e-12)
    assert kl.estimate(log, reference, "k2").tolist() == pytest.approx(
        [float(a - b) ** 2 / 2 for a, b in zip(log, reference, strict=True)]
    )
    expected = [math.exp(float(b - a)) - 1 - float(b - a) for a, b in zip(log, reference, strict=True)]
    assert kl.estimate(log, reference, "k3").tolist() == pytest.approx(expected, abs=1e-12)
    assert kl.estimate(log, reference, "k3").min() >= 0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_the_loss_form_has_the_gradient_of_the_exact_kl(estimator, on_policy):
    policy, old, reference = laws(seed=1)
    old = policy.detach().log_softmax(0) if on_policy else old
    (true,) = torch.autograd.grad(exact(policy, reference), policy)
    terms = kl.as_loss(policy.log_softmax(0), old, reference, estimator)
    (found,) = torch.autograd.grad((old.exp() * terms).sum(), policy)
    assert torch.allclose(found, true, atol=1e-12)


def test_the_plain_k1_and_k3_would_have_wrong_gradients():
    """Why the loss form exists: shows that the test above can tell."""
    policy, _, reference = laws(seed=2)
    log = policy.log_softmax(0)
    (true,) = torch.autograd.grad(exact(policy, reference), policy)
    for name in ("k1", "k3"):
        (plain,) = torch.autograd.grad((log.detach().exp() * kl.estimate(policy.log_softmax(0), reference, name)).sum(), policy)
        assert (plain - true).norm() > 0.1 * true.norm()


def test_ten_updates_of_the_controller_equal_the_closed_form():
    controller = kl.AdaptiveKL(0.05, target=6.0, horizon=1000)
    measured = [0.1, 5.0, 6.0, 6.6, 7.0, 9.0, 100.0, 5.9, 6.1, 3.0]
    expected = 0.05
    for i, value in enumerate(measured):
        controller.update(value, rollouts=64 + i)
        proportion = value / 6.0 - 1
        expected *= 1 + (0.2 if proportion > 0.2 else -0.2 if proportion < -0.2 else proportion) * (64 + i) / 1000
    assert controller.coefficient == pytest.approx(expected, rel=1e-14)
    other = kl.AdaptiveKL(1.0, target=6.0, horizon=1000)
    other.load_state_dict(controller.state_dict())
    assert other.coefficient == controller.coefficient


def test_a_fixed_coefficient_stays():
    controller = kl.FixedKL(0.1)
    controller.update(100.0, 64)
    assert controller.coefficient == 0.1
