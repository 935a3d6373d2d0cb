"""Importance weights against a small policy whose every sequence is enumerated."""

from __future__ import annotations

import itertools
import math

from steerl.configs.reader import read

import pytest
import torch

from steerl.rollout.steering import load_spec
from steerl.rollout.steering.spec.spec import CORRECTIONS
from steerl.scripts.train_ppo import PPOJob
from steerl.training.algorithm import advantages, kl
from steerl.training.algorithm.importance import Correction, importance_weights

VOCABULARY, STEPS = 3, 3


def enumerated():
    """All sequences with their log-probs under pi (with gradient) and under mu; the law depends on the tokens before."""
    draw = torch.Generator().manual_seed(0)
    states = 1 + VOCABULARY + VOCABULARY**2
    pi = torch.randn(states, VOCABULARY, generator=draw, dtype=torch.float64, requires_grad=True)
    mu = (pi.detach() + 0.7 * torch.randn(states, VOCABULARY, generator=draw, dtype=torch.float64)).log_softmax(1)
    sequences = list(itertools.product(range(VOCABULARY), repeat=STEPS))
    state = [[0, 1 + a, 1 + VOCABULARY + a * VOCABULARY + b] for a, b, _ in sequences]
    index, tokens = torch.tensor(state), torch.tensor(sequences)
    log_pi = pi.log_softmax(1)[index, tokens]
    log_mu = mu[index, tokens]
    reward = torch.randn(len(sequences), generator=draw, dtype=torch.float64)
    return pi, log_pi, log_mu, reward


def test_untruncated_sequence_weights_give_the_true_gradient_and_token_weights_do_not():
    pi, log_pi, log_mu, reward = enumerated()
    (true,) = torch.autograd.grad((log_pi.sum(1).exp() * reward).sum(), pi, retain_graph=True)
    mask = torch.ones(log_pi.shape, dtype=torch.bool)
    errors = {}
    for kind in ("sequence_truncate", "sequence_mask", "token_truncate", "none"):
        weights, _ = importance_weights(log_pi.detach(), log_mu, mask, Correction(kind, high=1e9))
        surrogate = (log_mu.sum(1).exp()[:, None] * weights * (log_pi - log_pi.detach()).exp() * reward[:, None]).sum()
        (found,) = torch.autograd.grad(surrogate, pi, retain_graph=True)
        errors[kind] = float((found - true).norm() / true.norm())
    assert errors["sequence_truncate"] < 1e-6 and errors["sequence_mask"] < 1e-6  # weights are float32
    assert errors["token_truncate"] > 0.1 and errors["none"] > 0.1


def test_a_kl_in_the_reward_needs_no_weights_but_those_of_the_policy_loss():
    """What a token costs is a function of the token, whichever law drew it; its expectation is put right by the weights."""
    pi, log_pi, log_mu, reward = enumerated()
    draw = torch.Generator().manual_seed(1)  # a reference: a number for every beginning of a sequence
    begun = [torch.randn(VOCABULARY**t, generator=draw, dtype=torch.float64) for t in range(1, STEPS + 1)]
    reference = torch.stack([each.repeat_interleave(len(log_pi) // len(each)) for each in begun], dim=1)
    (true,) = torch.autograd.grad(
        (log_pi.sum(1).exp() * (reward - 0.3 * (log_pi - reference).sum(1))).sum(), pi, retain_graph=True
    )
    mask = torch.ones(log_pi.shape, dtype=torch.bool)
    weights, _ = importance_weights(log_pi.detach(), log_mu, mask, Correction("sequence_truncate", high=1e9))
    score = torch.zeros(log_pi.shape).double()
    score[:, -1] = reward
    rewards = advantages.token_rewards(score, mask, kl.estimate(log_pi.detach(), reference), 0.3)
    credit = advantages.gae(rewards, torch.zeros_like(rewards), mask, lam=1.0)
    surrogate = log_mu.sum(1).exp()[:, None] * weights * (log_pi - log_pi.detach()).exp() * credit.advantages_BR
    (found,) = torch.autograd.grad(surrogate.sum(), pi)
    assert torch.allclose(found, true, atol=1e-6)


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_each_type_by_hand(kind):
    draw = torch.Generator().manual_seed(3)
    lengths = [4, 1, 3, 2]
    mask = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    policy = torch.where(mask, torch.randn(4, 4, generator=draw), math.nan)
    behaviour = torch.where(mask, torch.randn(4, 4, generator=draw), math.nan)
    weights, metrics = importance_weights(policy, behaviour, mask, Correction(kind, high=1.5, low=0.4))
    family, outside, largest, used = kind.split("_")[0], 0, 0.0, []
    for i, n in enumerate(lengths):
        log = [float(policy[i, t]) - float(behaviour[i, t]) for t in range(n)]
        for t in range(n):
            plain = {"sequence": math.exp(sum(log)), "geometric": math.exp(sum(log) / n)}.get(family, math.exp(log[t]))
            largest = max(largest, plain)
            out = kind != "none" and not 0.4 <= plain <= 1.5
            outside += out
            expected = {"truncate": min(max(plain, 0.4), 1.5), "mask": 0.0 if out else plain, "none": 1.0}[kind.split("_")[-1]]
            assert float(weights[i, t]) == pytest.approx(expected, rel=1e-5)
            if t == 0 or family not in ("sequence", "geometric"):
                used.append(expected)
        assert weights[i, n:].eq(0).all()
    rows = [math.exp(sum(float(policy[i, t]) - float(behaviour[i, t]) for t in range(n))) for i, n in enumerate(lengths)]
    assert metrics["correction/ess"] == pytest.approx(sum(rows) ** 2 / sum(w * w for w in rows), rel=1e-4)
    assert metrics["correction/ess_share_used"] == pytest.approx(
        sum(used) ** 2 / sum(w * w for w in used) / len(used), rel=1e-4
    )
    assert metrics["correction/max"] == pytest.approx(largest, rel=1e-4)
    assert metrics["correction/share_outside"] == pytest.approx(outside / sum(lengths))
    kl = sum(float(behaviour[i, t] - policy[i, t]) for i, n in enumerate(lengths) for t in range(n))
    assert metrics["correction/kl_token"] == pytest.approx(kl / sum(lengths), rel=1e-4)
    assert metrics["correction/kl_sequence"] == pytest.approx(kl / 4, rel=1e-4)


def test_a_bound_alone_corrects_wherever_it_is_set():
    """One class with one default: in the job, and in a steering that explores."""
    site = {"at": {"layers": [0]}, "vector": [1.0]}
    spec = load_spec({"role": "behaviour", "sites": [site], "correction": {"high": 3}})
    job = read(PPOJob, ["--model.path", "m", "--prompts.path", "p", "--ppo.correction", "{high: 3}"])
    assert job.ppo.correction == spec.correction == Correction("token_truncate", 3.0, 0.0) == Correction(high=3.0)
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights, _ = importance_weights(torch.tensor([[0.0, 2.0]]), torch.tensor([[-0.5, 0.0]]), mask, job.ppo.correction)
    assert weights.tolist() == [[pytest.approx(math.exp(0.5)), 3.0]]


def test_a_huge_mismatch_overflows_nothing():
    mask = torch.ones(2, 3, dtype=torch.bool)
    weights, metrics = importance_weights(
        torch.tensor([[0.0] * 3, [-900.0] * 3]), torch.tensor([[-900.0] * 3, [0.0] * 3]), mask, Correction("sequence_truncate")
    )
    assert weights.tolist() == [[2.0] * 3, [0.0] * 3]
    assert metrics["correction/ess"] == pytest.approx(1.0)


def test_masked_on_both_sides_is_icepop():
    """Its M(k): k within [alpha, beta], ends included, else 0; here 0.5 and 2, on tokens; and rows alike by their geometric mean."""
    ratios = [[0.25, 0.5, 1.0, 2.0, 4.0], [2.0, 0.5, 8.0, 1.0, math.nan]]
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    log = torch.tensor(ratios, dtype=torch.float64).log()
    bounds = {"low": 0.5, "high": 2.0}
    weights, said = importance_weights(log, torch.zeros_like(log), mask, Correction("token_mask", **bounds))
    assert torch.allclose(weights, torch.tensor([[0.0, 0.5, 1.0, 2.0, 0.0], [2.0, 0.5, 0.0, 1.0, 0.0]]), atol=1e-6)
    assert said["correction/share_outside"] == pytest.approx(3 / 9)
    rows, _ = importance_weights(log, torch.zeros_like(log), mask, Correction("geometric_mask", **bounds))
    assert torch.allclose(rows, mask * torch.tensor([[1.0], [8.0**0.25]]), atol=1e-6)


def test_where_nothing_is_off_every_type_weighs_one():
    draw = torch.Generator().manual_seed(3)
    log = torch.randn(4, 5, generator=draw)
    mask = torch.rand(4, 5, generator=draw) < 0.7
    for kind in CORRECTIONS:
        weights, _ = importance_weights(log, log, mask, Correction(kind, low=0.5))
        assert torch.equal(weights, mask.float())
