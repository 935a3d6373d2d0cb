"""Credit of groups and penalties for length from their papers' equations: row by row in Python's floats; and whole runs of them."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from steerl.reward.types import Scores
from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.types import Rollout, Samples, Texts
from steerl.training.algorithm.experience import credit, gather_scores
from steerl.training.algorithm.groups import Groups, equal_groups
from steerl.training.algorithm.importance import Correction
from steerl.training.checks import check_job
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings, with_response_limit
from steerl.training.types import Experience, Scored
from tests.models import tiny_policy
from tests.ppo_runs import prompts_of, two_parts

PARTS = {"right": 1.0, "short": -0.5, "style": 3.0}


def rows_by_chance(draw: random.Random) -> Rollout:
    """Groups of one to five rows, not side by side, some fed tokens, some rows without actions."""
    groups = [group for group in range(draw.randint(1, 4)) for _ in range(draw.randint(1, 5))]
    draw.shuffle(groups)
    lengths = [draw.randint(1, 9) for _ in groups]
    masks = [[t < n and draw.random() < 0.8 for t in range(9)] for n in lengths]
    if len(groups) > 2 and draw.random() < 0.5:
        masks[0] = [False] * 9
    return Rollout.of_ids(
        [[1]] * len(groups),
        [[2] * n for n in lengths],
        action_mask_BR=torch.tensor(masks)[:, : max(lengths)],
        ended_B=torch.tensor([draw.random() < 0.6 and mask[n - 1] for n, mask in zip(lengths, masks, strict=True)]),
        row_B=torch.tensor(groups),
    )


def scores_by_chance(draw: random.Random, rows: int, ties: bool = True) -> Scores:
    """Three parts and their sum; a part may not apply to a row, but for the first."""
    parts: dict[str, list[float]] = {}
    for name in PARTS:
        parts[name] = [draw.choice([0.0, 1.0, 2.0]) if ties else draw.gauss(0, 1) for _ in range(rows)]
        if name != "right":
            parts[name] = [math.nan if draw.random() < 0.2 else value for value in parts[name]]
    total = [sum(w * parts[name][i] for name, w in PARTS.items() if not math.isnan(parts[name][i])) for i in range(rows)]
    tensors = {name: torch.tensor(values) for name, values in parts.items()}
    return Scores(torch.tensor(total), tensors, weights=PARTS)


def scored_of(rollout: Rollout, scores: Scores) -> Scored:
    zeros_BR, texts = torch.zeros(rollout.response_BR.shape), Texts(prompts=[], prompt_texts=[], completions=[])
    return Scored(
        rollout=rollout, texts=texts, scores=scores, old_logprobs_BR=zeros_BR, reference_logprobs_BR=None,
        values_BR=zeros_BR, after_B=torch.zeros(len(rollout)), entropy_BR=zeros_BR, seconds={},
    )  # fmt: skip


def credited(rollout: Rollout, scores: Scores, **settings: Any) -> Experience:
    return credit(scored_of(rollout, scores), PPOSettings(**{"kl_coef": 0.0, **settings}), 0.0)[0]


def actions_of(rollout: Rollout) -> list[int]:
    return [sum(row) for row in rollout.action_mask_BR.tolist()]


def compare(found: Experience, expected: list[float]) -> None:
    """Of every action its row's number, 0 elsewhere."""
    for i, mask in enumerate(found.rollout.action_mask_BR.tolist()):
        row = [expected[i] if acts else 0.0 for acts in mask]
        assert found.advantages_BR[i].tolist() == pytest.approx(row, rel=2e-5, abs=2e-5), i


def centred(values: list[float], groups: list[int], counts: list[bool], std: bool) -> list[float]:
    """A value less its group's mean, over the deviation (n - 1) + 1e-4 of the group if asked for; what does not count is 0."""
    found = []
    for value, group, counted in zip(values, groups, counts, strict=True):
        same = [v for v, g, c in zip(values, groups, counts, strict=True) if g == group and c]
        middle = value - fmean(same) if counted else 0.0
        found.append(middle / ((stdev(same) if len(same) > 1 else 0.0) + 1e-4) if std else middle)
    return found


def whitened(values: list[float], actions: list[int]) -> list[float]:
    """Standardized over tokens: a row counts as often as it has actions."""
    tokens = [value for value, n in zip(values, actions, strict=True) for _ in range(n)]
    middle = fmean(tokens)
    spread = math.sqrt(fmean((value - middle) ** 2 for value in tokens) + 1e-8)
    return [(value - middle) / spread for value in values]


@pytest.mark.parametrize(
    "settings",
    [
        {"credit": "group", "group_std": False},
        {"credit": "reinforce_baseline"},
        {"credit": "reinforce_baseline", "whiten_advantages": False},
        {"credit": "group", "group_std": False, "gamma": 0.9, "missing_stop_penalty": 0.7},
    ],
)
def test_returns_are_centred_in_their_group(settings):
    """Dr. GRPO: A = R - mean. REINFORCE++ with baseline: that, less its mean and over its deviation, over all tokens."""
    for seed in range(60):
        draw = random.Random(seed)
        rollout = rows_by_chance(draw)
        scores, actions = scores_by_chance(draw, len(rollout), ties=False), actions_of(rollout)
        if not any(actions):
            continue
        penalty = settings.get("missing_stop_penalty", 0.0)
        totals = [
            (float(scores.total_B[i]) - (0.0 if ended else penalty)) * settings.get("gamma", 1.0) ** max(actions[i] - 1, 0)
            for i, ended in enumerate(rollout.ended_B.tolist())
        ]
        expected = centred(totals, rollout.row_B.tolist(), [n > 0 for n in actions], std=False)
        if settings["credit"] == "reinforce_baseline" and "whiten_advantages" not in settings:
            expected = whitened(expected, actions)
        compare(credited(rollout, scores, **settings), expected)


@pytest.mark.parametrize("whole", [False, True])
def test_parts_are_standardized_in_their_group_before_they_are_summed(whole):
    """GDPO: A = sum of w x (part - mean) / std; `whole`: by its batch, too, as the paper has it, and with both penalties."""
    for seed in range(60):
        draw = random.Random(seed)
        rollout = rows_by_chance(draw)
        scores, actions = scores_by_chance(draw, len(rollout)), actions_of(rollout)
        if not any(actions):
            continue
        weighed = [(weight, scores.parts[name].tolist()) for name, weight in PARTS.items()]
        settings: dict[str, Any] = {"credit": "group", "group_parts": True}
        if whole:
            bounds = {"overlong_buffer": 4, "overlong_penalty": 2.0, "response_limit": 6}
            settings = {"credit": "reinforce_baseline", "group_parts": True, "missing_stop_penalty": 0.3, **bounds}
            weighed += [(0.3, [-1.0 + ended for ended in rollout.ended_B.tolist()])]
            weighed += [(2.0, [-min(max(n - 2, 0) / 4, 1.0) for n in actions])]
        expected = [0.0] * len(rollout)
        for weight, values in weighed:
            counts = [n > 0 and not math.isnan(value) for n, value in zip(actions, values, strict=True)]
            values = [value if count else 0.0 for value, count in zip(values, counts, strict=True)]
            own = centred(values, rollout.row_B.tolist(), counts, std=True)
            expected = [sum_ + weight * value for sum_, value in zip(expected, own, strict=True)]
        found = credited(rollout, scores, **settings)
        compare(found, whitened(expected, actions) if whole else expected)
        if not whole:  # what is logged and learned by a value stays the true reward
            returns = torch.where(rollout.action_mask_BR, scores.total_B[:, None], 0.0)
            assert torch.allclose(found.returns_BR, returns, atol=1e-5)


def test_at_their_neutral_settings_they_are_what_they_were():
    """Exactly: group_std true, one part of weight 1, a baseline that is not whitened, rows far from the limit."""
    for seed in range(20):
        draw = random.Random(seed)
        rollout = rows_by_chance(draw)
        values_B = torch.tensor([draw.gauss(0, 1) for _ in range(len(rollout))])
        plain, named = Scores(values_B), Scores(values_B, {"one": values_B}, weights={"one": 1.0})
        group = credited(rollout, plain, credit="group").advantages_BR
        assert torch.equal(credited(rollout, plain, credit="group", group_std=True).advantages_BR, group)
        assert torch.equal(credited(rollout, named, credit="group", group_parts=True).advantages_BR, group)
        dense = dataclasses.replace(named, tokens_BR=named.per_token(rollout))  # a row earns its sum, wherever it earned it
        has_B = rollout.action_mask_BR.any(1)
        dense = dataclasses.replace(dense, total_B=values_B.where(has_B, 0.0), parts={"one": values_B.where(has_B, 0.0)})
        assert torch.equal(credited(rollout, dense, credit="group", group_parts=True).advantages_BR, group)
        far = {"overlong_buffer": 3, "response_limit": 1000}
        assert torch.equal(credited(rollout, plain, credit="group", **far).advantages_BR, group)
        flat = credited(rollout, plain, credit="reinforce_baseline", whiten_advantages=False).advantages_BR
        assert torch.equal(flat, credited(rollout, plain, credit="group", group_std=False).advantages_BR)


def test_long_rows_pay_by_the_equation():
    """DAPO: 0 up to limit - N actions; (limit - N - n) / N up to the limit; -1 beyond; here N = 3, limit 5, times 2."""
    lengths = [1, 2, 3, 4, 5, 6, 9]
    rollout = Rollout.of_ids([[1]] * 8, [[2] * n for n in lengths] + [[2] * 9])
    mask_BR = rollout.action_mask_BR.clone()
    mask_BR[7] = False  # all of it was fed
    mask_BR[6, 3:8] = False  # nine tokens, four of them actions
    rollout = dataclasses.replace(rollout, action_mask_BR=mask_BR)
    settings = PPOSettings(overlong_buffer=3, overlong_penalty=2.0, response_limit=5, credit="rloo", kl_coef=0.0)
    experience, said = credit(scored_of(rollout, Scores(torch.full((8,), 10.0))), settings, 0.0)
    expected = [10.0 + 2.0 * part for part in (0.0, 0.0, -1 / 3, -2 / 3, -1.0, -1.0, -2 / 3)] + [0.0]
    assert experience.rewards_BR.sum(1).tolist() == pytest.approx(expected, rel=1e-6)
    for i, actions in enumerate(actions_of(rollout)):  # on the last action, and there alone
        places = experience.rewards_BR[i].nonzero()[:, 0].tolist()
        assert places == ([mask_BR[i].nonzero()[-1].item()] if actions else [])
    assert said["credit/overlong"] == pytest.approx((sum(expected) - 70) / 7, rel=1e-6)
    assert said["credit/overlong_share"] == pytest.approx(5 / 7)


def test_groups_are_equal_where_each_part_is():
    """Totals may be alike where parts are not: such a group says something to credit of parts."""
    nan = math.nan
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, nan], [2.0, nan], [1.0, nan], [1.0, 3.0], [nan, 1.0], [nan, 2.0]])
    assert equal_groups(rows, 2).tolist() == [False, True, True, False]
    assert equal_groups(rows[:2].sum(1, keepdim=True), 2).tolist() == [True]
    screened_B = torch.tensor([False, True, True, True, False, False, False, False])
    assert equal_groups(rows, 2, screened_B).tolist() == [True, True, True, False], "what is screened out compares with nothing"


def test_a_group_whose_parts_differ_is_not_drawn_again():
    rollout = Rollout.of_ids([[1]] * 2, [[2, 3], [2]])
    samples = Samples(rollout, Texts(prompts=[""] * 2, prompt_texts=[""] * 2, completions=[""] * 2))
    parts = {"a": torch.tensor([0.0, 1.0]), "b": torch.tensor([1.0, 0.0])}
    for by_parts in (True, False):
        settings = PPOSettings(credit="group", group_parts=by_parts, kl_coef=0.0, drop_equal_groups=True)
        groups = Groups(settings, 2, 1)
        groups.add([0], samples, Scores(torch.ones(2), parts, weights={"a": 1.0, "b": 1.0}))
        assert groups.missing == (0 if by_parts else 1)


# -- weights of parts ------------------------------------------------------------------------------------------------------


def test_a_weighted_sum_says_its_weights_wherever_its_scores_go():
    rollout = Rollout.of_ids([[1]] * 3, [[2, 3], [2], [4]])
    texts = Texts(prompts=[""] * 3, prompt_texts=[""] * 3, completions=["ab", "a", "abcd"])
    scores = two_parts()(rollout, texts)
    weights = {"a": 2.0, "b": -0.1}
    for moved in (scores, scores.to("cpu"), scores.select([2, 0]), Scores.join([scores, scores]), gather_scores([scores])):
        assert moved.weights == weights
    with pytest.raises(UserError, match=r"Scores.weights: c: no such part among \['a'\]"):
        Scores(torch.zeros(1), {"a": torch.zeros(1)}, weights={"c": 1.0})


def test_a_reward_whose_parts_are_not_known_is_refused():
    rollout = Rollout.of_ids([[1]] * 2, [[2, 3], [2]])
    parts = {"a": torch.tensor([1.0, 2.0])}
    with pytest.raises(UserError, match="ppo.group_parts: the reward does not say by which weights"):
        credited(rollout, Scores(torch.ones(2), parts), credit="group", group_parts=True)
    with pytest.raises(UserError, match=r"row 1 sample 0 has parts that come to 2 by their weights .* but the total 5"):
        credited(rollout, Scores(torch.tensor([1.0, 5.0]), parts, weights={"a": 1.0}), credit="group", group_parts=True)


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({"group_std": False}, "ppo.group_std: false has no effect with ppo.credit gae"),
        ({"group_std": False, "credit": "reinforce_baseline"}, "ppo.group_std: false has no effect with"),
        ({"group_parts": True, "credit": "rloo", "kl_coef": 0.0}, "ppo.group_parts: true has no effect with ppo.credit rloo"),
        ({"group_parts": True, "credit": "group", "group_std": False, "kl_coef": 0.0}, "ppo.group_parts: true, but without"),
        ({"group_parts": True, "credit": "group", "gamma": 0.9, "kl_coef": 0.0}, "ppo.gamma: 0.9, but ppo.group_parts"),
        ({"group_parts": True, "credit": "group", "whiten_rewards": True, "kl_as": "loss"}, "ppo.whiten_rewards: true has no"),
        ({"group_parts": True, "credit": "group"}, "ppo.kl_as: reward, but with ppo.group_parts"),
        ({"overlong_penalty": 2.0}, "ppo.overlong_penalty: 2 has no effect without ppo.overlong_buffer"),
        ({"overlong_buffer": -1}, "ppo.overlong_buffer: -1"),
        ({"overlong_buffer": 2, "overlong_penalty": 0.0}, "ppo.overlong_penalty: 0.0"),
        ({"response_limit": 5}, "ppo.response_limit: 5 has no effect without"),
        ({"response_limit": 0, "overlong_buffer": 2}, "ppo.response_limit: 0"),
        ({"response_limit": 5, "overlong_buffer": 6}, "ppo.overlong_buffer: 6 actions do not fit before the limit of 5"),
    ],
)
def test_settings_that_do_nothing_are_one_line(settings, start):
    with pytest.raises(ConfigError) as found:
        PPOSettings(**settings)
    assert len(found.value.lines) == 1 and found.value.lines[0].startswith(start), found.value.lines


def test_where_a_response_may_be_as_long_as_what():
    policy, sampling = SimpleNamespace(model=torch.nn.Linear(1, 1)), Sampling(max_new_tokens=8)
    assert with_response_limit(PPOSettings(overlong_buffer=8), sampling).response_limit == 8
    assert with_response_limit(PPOSettings(overlong_buffer=2, response_limit=9), sampling).response_limit == 9
    assert with_response_limit(PPOSettings(), sampling).response_limit is None
    check_job(policy, [1], sampling, PPOSettings(overlong_buffer=8))

    def refused(environment: Any = None, **settings: Any) -> str:
        with pytest.raises(ConfigError) as found:
            check_job(policy, [1], sampling, PPOSettings(**settings), environment=environment)
        return "\n".join(found.value.lines)

    assert "ppo.overlong_buffer: 9 actions do not fit before the limit of 8 (sampling" in refused(overlong_buffer=9)
    assert "begins after 8 actions, which sampling.max_new_tokens 8 never passes" in refused(
        overlong_buffer=2, response_limit=10
    )
    assert "ppo.response_limit: missing; with environment" in refused(EnvironmentSettings(factory="a.py:b"), overlong_buffer=2)
    stored = {"replay": "somewhere", "correction": Correction("none")}
    assert "ppo.response_limit: missing; with ppo.replay" in refused(overlong_buffer=2, **stored)
    check_job(policy, [1], sampling, PPOSettings(overlong_buffer=2, response_limit=99, **stored))


# -- whole runs ------------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "group without the deviation": {"credit": "group", "group_std": False, "overlong_buffer": 3},
    "reinforce_baseline": {"credit": "reinforce_baseline", "correction": Correction("geometric_mask", high=1.2)},
    "parts": {
        "credit": "reinforce_baseline",
        "group_parts": True,
        "kl_as": "loss",
        "overlong_buffer": 5,
        "missing_stop_penalty": 0.5,
    },
}


def run(folder: Path, steps: int, resume: bool = False, **settings: Any) -> list[dict[str, float]]:
    small = {"rollouts_per_step": 16, "minibatches": 2, "epochs": 2, "learning_rate": 1e-3, "eval_prompts": 0, "samples": 1}
    policy = tiny_policy("gpt2")
    train(
        policy,
        prompts_of(policy),
        two_parts(),
        Sampling(max_new_tokens=8, stop_ids=[11, 17, 23], n=4),
        PPOSettings(steps=steps, **small, **settings),
        RunSettings(dir=str(folder), resume=resume, save_every=1),
    )
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> Tensor:
    from safetensors.torch import load_file

    return torch.cat([value.flatten() for _, value in sorted(load_file(folder / "model" / "model.safetensors").items())])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_by_it_and_goes_on_bitwise(tmp_path, name):
    whole = run(tmp_path / "whole", 3, **RUNS[name])
    run(tmp_path / "cut", 1, **RUNS[name])
    cut = run(tmp_path / "cut", 3, resume=True, **RUNS[name])
    for one, other in zip(whole, cut, strict=True):
        assert {key: value for key, value in one.items() if not key.startswith(("time/", "memory/"))} == {
            key: value for key, value in other.items() if not key.startswith(("time/", "memory/"))
        }
    assert torch.equal(weights_of(tmp_path / "whole"), weights_of(tmp_path / "cut"))
    assert all(row["ppo/grad_norm"] > 0 and row["ppo/ratio_first"] == pytest.approx(1, abs=1e-5) for row in whole)
    if "overlong_buffer" in RUNS[name]:
        assert all(row["credit/overlong"] < 0 < row["credit/overlong_share"] <= 1 for row in whole)
    total = [2 * row["reward/a"] * (16 - row["reward/a_not_applicable"]) / 16 - 0.1 * row["reward/b"] for row in whole]
    assert [row["reward/mean"] for row in whole] == pytest.approx(
        total, rel=1e-4
    )  # the true reward, whatever credit makes of it
