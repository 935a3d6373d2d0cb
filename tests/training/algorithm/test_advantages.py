"""Credit against written-out loops in plain Python floats (float64), on ragged rows."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
import torch

from steerl.reward.types import Scores
from steerl.rollout.types import Rollout
from steerl.training.algorithm import advantages
from tests.ppo_runs import first_experience, job, warm_head


def ragged(seed: int, rows: int = 7, width: int = 6):
    draw = random.Random(seed)
    lengths = [draw.randint(1, width) for _ in range(rows)]
    lengths[0], lengths[1] = width, 1
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    # Whatever stands beyond the end must not matter.
    values = torch.tensor([[draw.gauss(0, 1) if t < n else math.nan for t in range(width)] for n in lengths]).double()
    rewards = torch.tensor([[draw.gauss(0, 1) if t < n else math.inf for t in range(width)] for n in lengths]).double()
    return lengths, mask, values, rewards


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_is_the_sum_of_discounted_deltas(gamma, lam, cut):
    lengths, mask, values, rewards = ragged(3)
    after = torch.linspace(-1, 1, len(lengths)).double() if cut else None
    found, returns = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_B=after)
    for i, n in enumerate(lengths):
        v = [float(x) for x in values[i, :n]] + [float(after[i]) if cut else 0.0]
        delta = [float(rewards[i, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
            assert found[i, t] == pytest.approx(expected, abs=1e-12)
            assert returns[i, t] == pytest.approx(expected + v[t], abs=1e-12)
        assert found[i, n:].eq(0).all() and returns[i, n:].eq(0).all()


@pytest.mark.parametrize("ended", [True, False])
def test_the_score_sits_on_the_last_action(ended):
    lengths, mask, _, _ = ragged(1)
    rows = len(lengths)
    rollout = scored_rows(lengths, torch.full((rows,), ended))
    rewards = advantages.token_rewards(Scores(torch.ones(rows)).per_token(rollout), mask)
    assert rewards.sum() == rows
    found, _ = advantages.gae(rewards, torch.zeros(mask.shape), mask, gamma=0.9, lam=0.9)
    for i, n in enumerate(lengths):
        assert rewards[i, n - 1] == 1
        assert found[i, n - 1] == 1  # exactly


def test_kl_is_taken_off_per_token_and_masked():
    lengths, mask, kl, dense = ragged(5)
    found = advantages.token_rewards(dense, mask, kl, 0.3)
    for i, n in enumerate(lengths):
        expected = [-0.3 * float(kl[i, t]) + float(dense[i, t]) if t < n else 0.0 for t in range(mask.shape[1])]
        assert found[i].tolist() == pytest.approx(expected, abs=1e-12)


def scored_rows(lengths, ended_B):
    return Rollout.of_ids([[1]] * len(lengths), [[1] * length for length in lengths], ended_B=ended_B)


def test_more_padding_and_another_row_order_change_nothing():
    lengths, mask, values, rewards = ragged(9)
    wide = torch.nn.functional.pad
    plain, _ = advantages.gae(rewards, values, mask)
    padded, _ = advantages.gae(wide(rewards, (0, 5)), wide(values, (0, 5)), wide(mask, (0, 5)))
    assert torch.equal(padded[:, : mask.shape[1]], plain) and padded[:, mask.shape[1] :].eq(0).all()
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
    assert torch.equal(advantages.gae(rewards[order], values[order], mask[order])[0], plain[order])
    white = advantages.whiten(plain, mask)
    assert torch.allclose(advantages.whiten(padded, wide(mask, (0, 5)))[:, : mask.shape[1]], white, atol=1e-14)
    assert torch.allclose(advantages.whiten(plain[order], mask[order]), white[order], atol=1e-14)


@pytest.mark.parametrize("keep_mean", [False, True])
def test_whitening_is_over_real_tokens_only(keep_mean):
    _, mask, values, _ = ragged(2)
    real = [float(x) for x in values[mask]]
    mean = sum(real) / len(real)
    scale = math.sqrt(sum((x - mean) ** 2 for x in real) / len(real))
    found = advantages.whiten(values, mask, keep_mean=keep_mean)
    expected = [(x - mean) / scale + (mean if keep_mean else 0) for x in real]
    assert found[mask].tolist() == pytest.approx(expected, abs=1e-7)
    assert found[~mask].eq(0).all()


def test_one_valid_token_whitens_to_zero():
    mask = torch.tensor([[True, False]])
    assert advantages.whiten(torch.tensor([[3.0, math.nan]]), mask).tolist() == [[0.0, 0.0]]
    assert advantages.whiten(torch.tensor([[3.0, math.nan]]), ~mask & False).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("credit", ["rloo", "group"])
def test_critic_free_credit_compares_the_samples_of_one_prompt(credit):
    lengths, mask, _, rewards = ragged(4, rows=8)
    groups = [5, 2, 5, 2, 5, 9, 2, 5]  # 9 stands alone
    found, returns = getattr(advantages, credit)(rewards, mask, torch.tensor(groups), gamma=0.9)
    total = [sum(0.9**t * float(rewards[i, t]) for t in range(n)) for i, n in enumerate(lengths)]
    for i, n in enumerate(lengths):
        others = [total[j] for j in range(8) if groups[j] == groups[i] and j != i]
        if not others:
            expected = 0.0
        elif credit == "rloo":
            expected = total[i] - sum(others) / len(others)
        else:
            same = [*others, total[i]]
            mean = sum(same) / len(same)
            expected = (total[i] - mean) / (math.sqrt(sum((x - mean) ** 2 for x in same) / (len(same) - 1)) + 1e-4)
        assert found[i, :n].tolist() == pytest.approx([expected] * n, abs=1e-9)
        assert found[i, n:].eq(0).all()
        assert returns[i, :n].tolist() == pytest.approx([total[i]] * n, abs=1e-9)


def test_explained_variance():
    _, mask, values, _ = ragged(6)
    returns = torch.where(mask, values, 7.0)
    assert advantages.explained_variance(returns, returns, mask) == pytest.approx(1.0)
    assert advantages.explained_variance(torch.zeros_like(returns), returns, mask) == pytest.approx(0.0, abs=1e-12)
    assert advantages.explained_variance(values, torch.ones_like(returns), mask) == 0.0


@pytest.mark.parametrize(
    ("credit", "asked", "whitened"),
    [("gae", None, True), ("gae", True, True), ("gae", False, False), ("rloo", None, False), ("group", True, True)],
)
def test_a_steps_advantages_are_whitened_as_the_setting_says(credit, asked, whitened):
    """The whole of `credit`, with its defaults: token by token in float64, ragged rows."""
    sampling = {} if credit == "gae" else {"n": 2}
    parts, prompts, ppo = job(credit=credit, whiten_advantages=asked, kl_coef=0.0, sampling=sampling)
    if credit == "gae":
        warm_head(parts.actor_critic)
    experience = first_experience(parts, prompts, ppo)
    lengths = experience.rollout.lengths_B.tolist()
    assert len(set(lengths)) > 1
    found = [experience.advantages_BR[i, t].item() for i, n in enumerate(lengths) for t in range(n)]
    middle = fmean(found)
    spread = fmean((value - middle) ** 2 for value in found)
    if whitened:
        assert abs(middle) < 1e-6 and abs(spread - 1) < 1e-4
    else:
        assert abs(middle) > 1e-4 or abs(spread - 1) > 0.1
    if credit == "gae" and not whitened:
        for i, n in enumerate(lengths):
            values, carry = experience.values_BR[i].double(), 0.0
            score = float(experience.rewards_BR[i, n - 1])
            for t in reversed(range(n)):
                after = float(values[t + 1]) if t + 1 < n else 0.0
                carry = (score if t == n - 1 else 0.0) + after - float(values[t]) + 0.95 * carry
                assert abs(carry - float(experience.advantages_BR[i, t])) < 1e-5
