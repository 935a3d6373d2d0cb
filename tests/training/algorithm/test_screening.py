"""Rows that the reward screens out: the step is as if they were not there, and a step without any other moves nothing."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from steerl.reward.types import Scores
from steerl.rollout.common.errors import UserError
from steerl.training.algorithm.experience import credit
from steerl.training.algorithm.update import learn
from tests.ppo_runs import first_scored, job


def screened(scored, marks):
    return dataclasses.replace(scored, scores=dataclasses.replace(scored.scores, screened_B=torch.tensor(marks)))


SETTINGS = [
    {"value": "shared"},
    {"value": "shared", "whiten_rewards": True, "loss_reduction": "sequence"},
    {"credit": "group", "sampling": {"n": 4}},
    {"credit": "rloo", "sampling": {"n": 4}},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["gae", "whitened", "group", "rloo"])
def test_the_step_is_that_of_the_other_rows(settings):
    given = {"kl_coef": 0.05, "epochs": 2, "minibatches": 1, "rollouts_per_step": 16, **settings}
    parts, prompts, ppo = job("gpt2", **given)
    scored = first_scored(parts, prompts, ppo)
    marks = [i % 3 == 0 for i in range(16)]
    experience, metrics = credit(screened(scored, marks), ppo, ppo.kl_coef)
    assert metrics["reward/screened"] == pytest.approx(6 / 16)
    kept = [i for i, mark in enumerate(marks) if not mark]
    assert not experience.rollout.action_mask_BR[marks].any()
    alone = dataclasses.replace(
        scored,
        rollout=scored.rollout.select(kept),
        scores=Scores(scored.scores.total_B[kept]),
        **{
            n: getattr(scored, n)[kept]
            for n in ("old_logprobs_BR", "reference_logprobs_BR", "values_BR", "after_B", "entropy_BR")
        },
    )
    expected, _ = credit(alone, ppo, ppo.kl_coef)
    for name in ("advantages_BR", "returns_BR", "rewards_BR"):
        assert torch.allclose(getattr(experience, name)[kept], getattr(expected, name), atol=1e-6), name
    begun = copy.deepcopy(parts.state.model.state_dict())
    learn(parts.state, experience, ppo, seed=0)
    here = copy.deepcopy(parts.state.model.state_dict())
    again, _, ppo = job("gpt2", **{**given, "rollouts_per_step": len(kept)} if "sampling" not in settings else given)
    learn(again.state, expected, ppo, seed=0)
    there = again.state.model.state_dict()
    assert any(not torch.equal(begun[name], here[name]) for name in begun)
    # Adam's first steps are of the gradient's sign: where that is a rounding's, so is the step.
    moved = torch.cat([(here[n] - begun[n]).flatten() for n in begun])
    other = torch.cat([(there[n] - begun[n]).flatten() for n in begun])
    assert torch.nn.functional.cosine_similarity(moved, other, dim=0) > 0.999


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_a_step_that_is_screened_whole_moves_nothing(value):
    parts, prompts, ppo = job("gpt2", value=value, weight_decay=0.1)
    scored = first_scored(parts, prompts, ppo)
    learn(parts.state, credit(scored, ppo, ppo.kl_coef)[0], ppo, seed=0)  # the optimizer has momentum
    begun = copy.deepcopy(parts.state.model.state_dict())
    experience, metrics = credit(screened(scored, [True] * 16), ppo, ppo.kl_coef)
    update = learn(parts.state, experience, ppo, seed=0)
    assert all(torch.equal(begun[name], weight) for name, weight in parts.state.model.state_dict().items())
    assert metrics["reward/screened"] == 1.0 and update.optimizer_steps == 0
    assert all(number == number for number in (update.metrics() | metrics).values())


def test_nothing_screened_is_nothing_changed():
    parts, prompts, ppo = job("gpt2", value="shared")
    scored = first_scored(parts, prompts, ppo)
    plain, _ = credit(scored, ppo, ppo.kl_coef)
    marked, metrics = credit(screened(scored, [False] * 16), ppo, ppo.kl_coef)
    assert metrics["reward/screened"] == 0.0
    for name in ("advantages_BR", "returns_BR", "rewards_BR"):
        assert torch.equal(getattr(plain, name), getattr(marked, name))


def test_marks_are_one_bool_a_row():
    with pytest.raises(UserError, match="expected a tensor of 2 bools"):
        Scores(torch.zeros(2), screened_B=torch.zeros(2))
