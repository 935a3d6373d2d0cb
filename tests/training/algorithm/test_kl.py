"""KL estimators and loss forms against the exact KL of an enumerated vocabulary; the controller against its closed form."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from steerl.reward.types import Scores
from steerl.rollout.types import Rollout, Texts
from steerl.training.algorithm import kl
from steerl.training.algorithm.experience import credit
from steerl.training.algorithm.importance import Correction, importance_weights
from steerl.training.algorithm.update import micro_batch_loss
from steerl.training.run.metrics import kl_to_reference
from steerl.training.settings import PPOSettings
from steerl.training.types import PolicyOutput, Scored


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


# -- where the sampler's law is not the policy's ------------------------------------------------------------------------


def rows_of(tokens_BR, log_mu_BR, log_pi_BR, log_reference_BR) -> Scored:
    """Rows that were drawn under mu, scored; every row has all of its tokens."""
    rows, width = tokens_BR.shape
    numbers = torch.zeros(rows, width)
    rollout = Rollout.of_ids(
        [[1]] * rows, tokens_BR, behaviour_logprobs_BR=log_mu_BR.float(), policy_logprobs_BR=log_pi_BR.float()
    )
    return Scored(
        rollout=rollout,
        texts=Texts(prompts=[""] * rows, prompt_texts=[""] * rows, completions=[""] * rows),
        scores=Scores(torch.zeros(rows)),
        old_logprobs_BR=log_pi_BR.float(),
        reference_logprobs_BR=log_reference_BR.float(),
        values_BR=numbers,
        after_B=torch.zeros(rows),
        entropy_BR=numbers,
        seconds={},
    )


MU = [1, 2, 3, 5, 9]
"""Of a vocabulary of five, in rows of twenty: their mean is the exact expectation under mu."""
UNBOUND = Correction("token_truncate", high=1e9)


def one_token(correction):
    """(logits of the policy as it learns, log-probs of the reference, the update's own gradient, what a step says)."""
    policy, old, reference = laws(seed=4)
    tokens = torch.tensor([token for token, count in enumerate(MU) for _ in range(count)])
    mu = (torch.tensor(MU).double() / sum(MU)).log()
    scored = rows_of(tokens[:, None], mu[tokens][:, None], old[tokens][:, None], reference[tokens][:, None])

    def gradient(estimator):
        ppo = PPOSettings(
            kl_as="loss", kl_estimator=estimator, credit="rloo", correction=correction, rollouts_per_step=20, minibatches=1
        )
        experience, _ = credit(scored, ppo, 1.0)

        def model(rollout, **_):
            return PolicyOutput(policy.log_softmax(0)[rollout.response_BR])

        state = SimpleNamespace(model=model, step=0, kl=kl.FixedKL(1.0))
        counts = {"tokens": len(tokens), "rows": len(tokens)}
        total, _, _ = micro_batch_loss(state, experience, list(range(len(tokens))), counts, ppo)
        return torch.autograd.grad(total, policy)[0]

    experience, _ = credit(scored, PPOSettings(credit="rloo", correction=correction), 0.0)
    return policy, old, reference, mu, gradient, kl_to_reference(scored, experience.importance_BR)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_kl_as_a_loss_is_the_exact_kls_whatever_law_drew_the_tokens(estimator):
    policy, _, reference, _, gradient, _ = one_token(UNBOUND)
    (true,) = torch.autograd.grad(exact(policy, reference), policy)
    found = gradient(estimator)
    assert float(torch.cosine_similarity(found, true, dim=0)) == pytest.approx(1.0, abs=1e-6)
    assert float(found.norm() / true.norm()) == pytest.approx(1.0, abs=1e-5)


def test_weights_of_the_kl_as_a_loss_are_bounded_as_the_setting_says():
    policy, old, reference, mu, gradient, _ = one_token(Correction("token_truncate", high=1.1))
    weights = torch.tensor([min(math.exp(float(a - b)), 1.1) for a, b in zip(old, mu, strict=True)]).double()
    terms = weights * mu.exp() * kl.as_loss(policy.log_softmax(0), old, reference, "k3")
    (expected,) = torch.autograd.grad(terms.sum(), policy)
    assert torch.allclose(gradient("k3"), expected, atol=1e-6)


def test_the_kl_that_is_logged_and_held_is_the_policys_whatever_law_drew_the_tokens():
    _, old, reference, mu, _, said = one_token(UNBOUND)
    true = float((old.exp() * (old - reference)).sum())
    assert said.per_response == pytest.approx(true, abs=1e-5)
    assert said.k3_token == pytest.approx(true, abs=1e-5)
    assert abs(float((mu.exp() * (old - reference)).sum()) - true) > 0.1  # what the rows say without their weights
    # Bounded weights share out 1 among the rows all the same: a bound does not make the KL look small.
    weights = [min(math.exp(float(a - b)), 1.1) for a, b in zip(old, mu, strict=True)]
    share = [count * weight for count, weight in zip(MU, weights, strict=True)]
    expected = sum(s * float(d) for s, d in zip(share, old - reference, strict=True)) / sum(share)
    assert one_token(Correction("token_truncate", high=1.1))[-1].per_response == pytest.approx(expected, abs=1e-5)


def test_rows_weigh_whole_under_sequence_weights():
    """Two tokens of two kinds, the second's law hanging on the first: eight rows are mu exactly."""
    pairs = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 0], [1, 1], [1, 1], [1, 1], [1, 1]])
    log_mu = torch.tensor([[1 / 4, 1 / 2]] * 2 + [[3 / 4, 1 / 3]] * 2 + [[3 / 4, 2 / 3]] * 4).double().log()
    draw = torch.Generator().manual_seed(5)
    tables = [torch.randn(3, 2, generator=draw, dtype=torch.float64).log_softmax(1) for _ in range(2)]
    log_pi, log_reference = (torch.stack([t[0][pairs[:, 0]], t[1 + pairs[:, 0], pairs[:, 1]]], 1) for t in tables)
    pi, reference = tables
    true = 0.0
    for a in (0, 1):
        for b in (0, 1):
            log = float(pi[0, a] + pi[1 + a, b])
            true += math.exp(log) * (log - float(reference[0, a] + reference[1 + a, b]))
    scored = rows_of(pairs, log_mu, log_pi, log_reference)
    weights, _ = importance_weights(log_pi, log_mu, scored.rollout.action_mask_BR, Correction("sequence_truncate", high=1e9))
    assert kl_to_reference(scored, weights).per_response == pytest.approx(true, abs=1e-5)
    plain = float((log_pi - log_reference).sum(1).mean())
    assert kl_to_reference(scored).per_response == pytest.approx(plain, abs=1e-6) and abs(plain - true) > 0.05
