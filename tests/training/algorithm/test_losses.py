"""gspo, cispo, dppo and the constant reduction: each against its paper's equation, row by row in float64, and where they meet ppo."""

from __future__ import annotations

import math
import random

import pytest
import torch

from steerl.training.algorithm import loss
from steerl.training.algorithm.update import chosen_loss
from steerl.training.settings import PPOSettings
from tests.ppo_runs import first_experience, job
from tests.training.algorithm.test_update import gradients_of, moved

ROWS, WIDTH, LIMIT = 7, 6, 9


def batch(seed: int, *, spread: float = 0.4, one_each: bool = False, whole: bool = False):
    """(new, old, advantages, importance, places): log-probs of which some are certain, NaN wherever no action is. Rows differ
    in length and in their gaps, and one has no action. `one_each`: one advantage and one weight a row."""
    draw = random.Random(seed)
    places = [[t for t in range(WIDTH) if whole or draw.random() < 0.6] for _ in range(ROWS)]
    if not whole:
        places[2] = []
        places[4] = [1]
    old, new, advantages, importance = (torch.full((ROWS, WIDTH), math.nan, dtype=torch.float64) for _ in range(4))
    for i, own in enumerate(places):
        of_row = draw.gauss(0, 1), draw.random()
        for t in own:
            old[i, t] = min(-1e-6, draw.gauss(-1.0, 0.8))
            new[i, t] = min(-1e-6, float(old[i, t]) + draw.gauss(0, spread))
            advantages[i, t], importance[i, t] = of_row if one_each else (draw.gauss(0, 1), draw.random())
    return new, old, advantages, importance, places


def clip(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + 0 * x if x < low else high + 0 * x if x > high else x


def weight(reduction: str, places: list[list[int]], i: int) -> float:
    """What an action of row i counts."""
    rows, tokens = sum(map(bool, places)), sum(map(len, places))
    return {"token": 1 / tokens, "sequence": 1 / (rows * max(len(places[i]), 1)), "constant": 1 / (LIMIT * rows)}[reduction]


def gspo_token(new, old, advantages, importance, places, reduction, low=0.05, high=0.1):
    """Eqs. 13 and 14 of arXiv:2507.18071: s_t = sg(s) pi_t / sg(pi_t), a row's actions alike in min and clip."""
    total = torch.zeros((), dtype=torch.float64)
    for i, own in enumerate(places):
        s = math.exp(sum(float(new[i, t].detach() - old[i, t]) for t in own) / len(own)) if own else 1.0
        for t in own:
            s_t = s * new[i, t].exp() / new[i, t].exp().detach()
            objective = torch.minimum(s_t * advantages[i, t], clip(s_t, 1 - low, 1 + high) * advantages[i, t])
            total = total + weight(reduction, places, i) * importance[i, t] * objective
    return -total


def gspo(new, old, advantages, importance, places, low=0.05, high=0.1):
    """Eqs. 5 and 7: a row is one term, its ratio (pi(y) / pi_old(y))^(1 / |y|), and the gradient goes through it."""
    terms = []
    for i, own in enumerate(places):
        if own:
            likelihoods = [torch.stack([value[i, t] for t in own]).sum().exp() for value in (new, old)]
            s, a = (likelihoods[0] / likelihoods[1]) ** (1 / len(own)), advantages[i, own[0]]
            terms.append(importance[i, own[0]] * torch.minimum(s * a, clip(s, 1 - low, 1 + high) * a))
    return -sum(terms) / len(terms)


def cispo(new, old, advantages, importance, places, reduction, low=0.2, high=0.1):
    """Eqs. 4 and 5 of arXiv:2506.13585: sg(clip(r, 1 - low, 1 + high)) A log pi."""
    total = torch.zeros((), dtype=torch.float64)
    for i, own in enumerate(places):
        for t in own:
            held = min(max(math.exp(float(new[i, t].detach() - old[i, t])), 1 - low), 1 + high)
            total = total + weight(reduction, places, i) * importance[i, t] * held * advantages[i, t] * new[i, t]
    return -total


def dppo(new, old, advantages, importance, places, reduction, divergence="tv", threshold=0.05):
    """Eq. 12 of arXiv:2602.04879 with its binary divergences: M r A."""
    total = torch.zeros((), dtype=torch.float64)
    for i, own in enumerate(places):
        for t in own:
            p, q, a = math.exp(float(old[i, t])), math.exp(float(new[i, t].detach())), float(advantages[i, t])
            outcomes = [(p, q), (1 - p, 1 - q)]
            tv, kl = sum(abs(x - y) for x, y in outcomes) / 2, sum(x * math.log(x / y) for x, y in outcomes)
            far = {"tv": tv, "kl": kl}[divergence] > threshold
            if not (far and ((a > 0 and q / p > 1) or (a < 0 and q / p < 1))):
                ratio = (new[i, t] - old[i, t]).exp()
                total = total + weight(reduction, places, i) * importance[i, t] * ratio * a
    return -total


GSPO = {"loss": "gspo", "clip": 0.05, "clip_high": 0.1}
CASES = {
    "gspo": (GSPO, gspo_token),
    "cispo": ({"loss": "cispo", "clip": 0.2, "clip_high": 0.1}, cispo),
    "tv": ({"loss": "dppo", "dppo_threshold": 0.05}, dppo),
    "kl": (
        {"loss": "dppo", "dppo_divergence": "kl", "dppo_threshold": 0.02},
        lambda *given: dppo(*given, divergence="kl", threshold=0.02),
    ),
}


def weights_of(mask, reduction: str) -> torch.Tensor:
    counts = {"tokens": int(mask.sum()), "rows": int(mask.any(1).sum())}
    weights = loss.token_weights(mask, **counts, reduction=reduction).double()
    return weights * (loss.filled(**counts, limit=LIMIT) if reduction == "constant" else 1.0)


def measured(settings, made, reduction: str, splits=None):
    """(loss, gradient, metrics), summed over the parts of the rows."""
    new, old, advantages, importance, places = made
    leaf = new.clone().requires_grad_()
    mask = torch.tensor([[t in own for t in range(WIDTH)] for own in places])
    weights = weights_of(mask, reduction)
    total, metrics = 0.0, {}
    for rows in splits or [list(range(ROWS))]:
        part, told = chosen_loss(PPOSettings(**settings))(
            leaf[rows], old[rows], advantages[rows], mask[rows], weights_part(mask, weights, rows, reduction),
            importance_BR=None if importance is None else importance[rows],
        )  # fmt: skip
        part.backward()
        total += float(part.detach())
        metrics = {name: metrics.get(name, 0.0) + float(value) for name, value in told.items()}
    assert leaf.grad[~mask].eq(0).all()
    return total, leaf.grad, metrics


def weights_part(mask, weights, rows, reduction):
    """As the update has them: made from the counts of all rows and the mask of these."""
    counts = {"tokens": int(mask.sum()), "rows": int(mask.any(1).sum())}
    made = loss.token_weights(mask[rows], **counts, reduction=reduction).double()
    return weights[rows] if reduction == "constant" else made


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_its_papers_equation(name, reduction):
    settings, by_hand = CASES[name]
    reached = 0
    for seed in range(5):
        made = batch(seed)
        total, gradient, metrics = measured(settings, made, reduction)
        leaf = made[0].clone().requires_grad_()
        expected = by_hand(leaf, *made[1:], reduction)
        expected.backward()
        assert total == pytest.approx(float(expected.detach()), rel=1e-6)
        assert torch.allclose(gradient, leaf.grad.nan_to_num(0.0), rtol=1e-6, atol=1e-9)
        assert float(metrics["policy_loss"]) == pytest.approx(total, rel=1e-12)
        reached += 0 < metrics["clip_fraction"] < 0.9
    assert reached >= 4


def test_gspo_is_the_gradient_through_the_rows_mean_where_a_row_has_one_advantage():
    for seed in range(5):
        made = batch(seed, one_each=True)
        total, gradient, _ = measured(GSPO, made, "sequence")
        leaf = made[0].clone().requires_grad_()
        expected = gspo(leaf, *made[1:])
        expected.backward()
        assert total == pytest.approx(float(expected.detach()), rel=1e-6)
        assert torch.allclose(gradient, leaf.grad.nan_to_num(0.0), rtol=1e-6, atol=1e-9)


def test_gspo_with_a_dual_clip_bounds_what_a_row_may_lose():
    new, old, advantages, importance, places = batch(1, one_each=True)
    new, advantages = old + 0.3, -advantages.abs()
    total, gradient, _ = measured({**GSPO, "dual_clip": 1.2}, (new, old, advantages, importance, places), "sequence")
    expected, bounded = 0.0, 0
    for i, own in enumerate(places):
        if not own:
            continue
        s, a = math.exp(sum(float(new[i, t] - old[i, t]) for t in own) / len(own)), float(advantages[i, own[0]])
        objective = min(s * a, min(max(s, 0.95), 1.1) * a)
        if a < 0 and s > 1.2:
            objective, bounded = 1.2 * a, bounded + 1
            assert gradient[i].eq(0).all()
        expected -= float(importance[i, own[0]]) * objective / sum(map(bool, places))
    assert bounded and total == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence", "constant"])
@pytest.mark.parametrize("name", CASES)
def test_micro_batches_of_every_size_add_up(name, reduction):
    settings, _ = CASES[name]
    made = batch(11)
    total, gradient, metrics = measured(settings, made, reduction)
    for splits in ([[i] for i in range(ROWS)], [[0, 3, 5], [6, 1, 2], [4]], [[4, 2], [0, 1, 3, 5, 6]]):
        other, found, told = measured(settings, made, reduction, splits)
        assert other == pytest.approx(total, rel=1e-12)
        assert torch.allclose(found, gradient, rtol=0, atol=1e-15)
        assert told == pytest.approx(metrics, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_at_the_old_policy_every_loss_has_ppos_gradient_and_takes_none_away(name):
    _, old, *rest = batch(3)
    ratios = dict.fromkeys(("clip_fraction", "approx_kl", "ratio_excess"), 0.0)
    _, plain, _ = measured({}, (old, old, *rest), "token")
    _, gradient, metrics = measured(CASES[name][0], (old, old, *rest), "token")
    assert torch.allclose(gradient, plain, rtol=1e-14, atol=0)
    assert {name: metrics[name] for name in ratios} == ratios


def test_gspo_on_rows_of_one_action_is_ppo_exactly():
    clipped = 0
    for seed in range(5):
        *numbers, _ = batch(seed, whole=True)
        made = *numbers, [[i % WIDTH] for i in range(ROWS)]
        bounds = {"clip": 0.1, "clip_high": 0.2, "dual_clip": 1.3}
        one, other = (measured({"loss": name, **bounds}, made, "sequence") for name in ("ppo", "gspo"))
        assert one[0] == other[0] and torch.equal(one[1], other[1]) and one[2] == other[2]
        clipped += one[2]["clip_fraction"] > 0
    assert clipped > 2


def test_bounds_that_are_never_reached_leave_ppos_gradient():
    made = batch(6)
    plain = measured({"clip": 50.0}, made, "token")
    for settings in (
        {"loss": "cispo", "clip": 50.0},
        *({"loss": "dppo", "dppo_divergence": d, "dppo_threshold": 50.0} for d in ("tv", "kl")),
    ):
        total, gradient, metrics = measured(settings, made, "token")
        assert torch.allclose(gradient, plain[1], rtol=1e-14, atol=0)
        assert settings["loss"] == "cispo" or (total, metrics) == (plain[0], plain[2])
        assert metrics["clip_fraction"] == 0


def test_binary_divergences_of_certain_tokens():
    """Nothing left for other tokens, before or after: 0 log 0 is 0, and what becomes certain is infinitely far."""
    old, new = torch.tensor([0.0, 0.0, -0.5, -1e-9]), torch.tensor([0.0, -0.5, 0.0, -2e-9])
    found = loss.binary_divergence(new, old, "kl")
    assert found[0] == 0 and found[1] == 0.5 and found[2] == math.inf and abs(float(found[3])) < 1e-8
    assert loss.binary_divergence(new, old, "tv").tolist() == pytest.approx(
        [0, 1 - math.exp(-0.5), 1 - math.exp(-0.5), 0], abs=1e-7
    )


def test_the_constant_reduction_on_rows_of_full_length_is_the_mean_over_tokens_exactly():
    parts, prompts, ppo = job("gpt2", max_grad_norm=0.0)
    experience = first_experience(parts, prompts, ppo)
    moved(parts)
    rows = [i for i, actions in enumerate(experience.rollout.actions_B.tolist()) if actions == 9]
    constant = PPOSettings(**{**vars(ppo), "loss_reduction": "constant", "response_limit": 9})
    plain, found = (gradients_of(parts, experience, rows, settings) for settings in (ppo, constant))
    assert len(rows) > 4 and all(torch.equal(gradient, found[name]) for name, gradient in plain.items())


@pytest.mark.parametrize("packing", [False, True])
def test_the_constant_reduction_divides_by_the_limit_and_the_rows_with_actions(packing):
    """The gradient is that of the mean over tokens, times tokens / (limit x rows): counted over the minibatch, not its parts."""
    parts, prompts, ppo = job("gpt2", max_grad_norm=0.0, packing=packing, entropy_coef=0.02)
    experience = first_experience(parts, prompts, ppo, gaps=True)
    moved(parts)
    rows = list(range(2, 13))
    plain = gradients_of(parts, experience, rows, ppo)
    actions = experience.rollout.actions_B[rows]
    assert (actions == 0).any()
    for size in (1, 3, 16):
        constant = PPOSettings(**{**vars(ppo), "loss_reduction": "constant", "response_limit": 30, "micro_batch_size": size})
        found = gradients_of(parts, experience, rows, constant)
        share = float(actions.sum()) / (30 * int((actions > 0).sum()))
        for name, gradient in plain.items():
            assert torch.allclose(found[name], gradient * share, rtol=1e-4, atol=1e-7), (size, name)
