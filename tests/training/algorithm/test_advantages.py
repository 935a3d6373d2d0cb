"""Credit against written-out loops in plain Python floats (float64), on ragged rows."""

from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
import torch

from steerl.reward.types import Scores
from steerl.rollout.types import Rollout
from steerl.training.algorithm import advantages, loss
from steerl.training.algorithm.importance import Correction, importance_weights
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


# -- masks with holes ------------------------------------------------------------------------------------------------


def holed(seed: int):
    """(mask, each row's actions, a draw): rows whose actions need not lie side by side; nothing but they may matter."""
    draw = random.Random(seed)
    rows, width = draw.randint(2, 6), draw.randint(1, 9)
    places = [sorted(draw.sample(range(width), draw.randint(0, width))) for _ in range(rows)]
    places[0] = places[0] or [draw.randrange(width)]
    mask = torch.tensor([[t in own for t in range(width)] for own in places])

    def numbers() -> torch.Tensor:
        return torch.tensor([[draw.gauss(0, 1) if t in own else math.nan for t in range(width)] for own in places]).double()

    return mask, places, draw, numbers


def without_gaps(value: torch.Tensor, places: list[list[int]]) -> torch.Tensor:
    """The rows with their gaps cut out, and nothing beyond their ends."""
    width = max(len(own) for own in places)
    return torch.stack([torch.cat([row[own], row.new_zeros(width - len(own))]) for row, own in zip(value, places, strict=True)])


def all_functions(mask, tensors, after, group, gamma, lam, kind):
    """What every function of credit, correction and loss makes of the rows: per token, and in one number."""
    task, distance, values, old, mu = tensors
    rewards = advantages.token_rewards(task, mask, distance, 0.3)
    credit = advantages.gae(rewards, values, mask, gamma=gamma, lam=lam, bootstrap_B=after)
    weights, totals = importance_weights(old, mu, mask, Correction(kind, high=1.3, low=0.7))
    share = loss.token_weights(mask, tokens=int(mask.sum()), rows=len(mask), reduction="sequence")
    policy, more = loss.policy_loss(old, mu, credit.advantages_BR, mask, share, clip_low=0.2, clip_high=0.2)
    value, other = loss.value_loss(values, old, credit.returns_BR, mask, share, clip=0.2)
    tokens = {
        "rewards": rewards,
        "gae": credit.advantages_BR,
        "returns": credit.returns_BR,
        "plain gae": advantages.gae(rewards, values, mask, gamma=gamma, lam=lam).advantages_BR,
        "rloo": advantages.rloo(rewards, mask, group, gamma=gamma).advantages_BR,
        "group": advantages.group(rewards, mask, group, gamma=gamma).returns_BR,
        "whitened": advantages.whiten(credit.advantages_BR, mask),
        "importance": weights,
        "share": share,
    }
    explained = advantages.explained_variance(values, credit.returns_BR, mask)
    return tokens, {**totals, **more, **other, "policy": policy, "value": value, "explained": explained}


def test_time_is_actions_wherever_they_stand():
    """500 masks: every function gives the actions what it gives the same rows without their gaps, and the gaps nothing."""
    for seed in range(500):
        mask, places, draw, numbers = holed(seed)
        tensors = [numbers() for _ in range(5)]
        after = torch.tensor([draw.gauss(0, 1) for _ in places]).double()
        group = torch.tensor([draw.randrange(2) for _ in places])
        kind = draw.choice(["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
        rest = (after, group, draw.choice([1.0, 0.9]), draw.choice([1.0, 0.8]), kind)
        tokens, totals = all_functions(mask, tensors, *rest)
        short = torch.arange(max(map(len, places)))[None] < torch.tensor([[len(own)] for own in places])
        own_tokens, own_totals = all_functions(short, [without_gaps(value, places) for value in tensors], *rest)
        for name, value in tokens.items():
            assert value[~mask].eq(0).all(), (seed, name)
            assert torch.allclose(without_gaps(value, places), own_tokens[name], rtol=0, atol=1e-10), (seed, name)
        for name, value in totals.items():
            assert float(value) == pytest.approx(float(own_totals[name]), abs=1e-10), (seed, name)


def test_credit_passes_over_a_hole():
    mask = torch.tensor([[True, True, False, False, True]])
    score = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0]])
    found = advantages.gae(score, torch.zeros(1, 5), mask, gamma=1.0, lam=1.0)
    assert found.advantages_BR.tolist() == [[1, 1, 0, 0, 1]]
