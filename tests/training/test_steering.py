"""Steering in training: corrections against enumeration, what is logged, the budget, what a run leaves, resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from steerl.rollout.analysis.steering_effect import kl_from_plain
from steerl.rollout.analysis.steering_table import applied, edits_per_row, table
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering, load_spec
from steerl.rollout.steering.deploy import check_fold, fold, save
from steerl.rollout.types import Rollout
from steerl.training import steering as steered
from steerl.training.algorithm.importance import Correction, importance_weights
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.ppo_runs import first_scored, job, prompts_of, share_of_threes
from tests.rollout.steering.helpers import vector

# -- corrections by exact enumeration: 5 tokens, 3 steps ------------------------------------------------------------------------


def enumerated() -> tuple[Policy, Steering, Rollout, Tensor]:
    """Every response of three tokens to one prompt, with both laws, and a reward for each that has nothing smooth about it."""
    policy = Policy.of(tiny("llama", vocab_size=5, eos_token_id=None, scale=0.4), tiny_tokenizer(5))
    steering = Steering(
        policy.model,
        {
            "role": "behaviour",
            "correction": {"type": "none"},
            "sites": [{"at": {"layers": [0]}, "vector": vector(3), "strength": 0.8}],
        },
    )
    responses = torch.cartesian_prod(*[torch.arange(5)] * 3)
    count = len(responses)
    rollout = Rollout.of_ids(
        [[1, 4]] * count, responses, ended_B=[False] * count, strength_BK=[[0.8]] * count, steering=steering.label
    )
    reward_B = torch.randn(count, generator=torch.Generator().manual_seed(1))
    return policy, steering, rollout, reward_B


def gradient(policy: Policy, objective: Tensor) -> Tensor:
    weights = [p for p in policy.core.parameters() if p.requires_grad]
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(objective, weights, retain_graph=True)])


@pytest.mark.parametrize(
    ("kind", "bounds", "error"),
    [
        ("none", {}, 0.518),
        ("token_truncate", {}, 0.265),
        ("token_mask", {}, 0.265),
        ("geometric_truncate", {}, 0.235),
        ("geometric_mask", {}, 0.235),
        ("sequence_truncate", {}, 0.0),
        ("sequence_mask", {}, 0.0),
        ("token_truncate", {"low": 0.5, "high": 2.0}, 0.293),
        ("token_mask", {"low": 0.5, "high": 2.0}, 0.211),  # IcePop
        ("sequence_truncate", {"low": 0.5, "high": 2.0}, 0.226),
        ("sequence_mask", {"low": 0.5, "high": 2.0}, 0.131),
    ],
)
def test_corrections_by_enumeration(kind: str, bounds: dict[str, float], error: float) -> None:
    """E over mu of the weighed gradient, summed over all responses, against the gradient of the expected reward under pi: off by
    `error` of its norm, as docs/methods/corrections.md has it."""
    policy, steering, rollout, reward_B = enumerated()
    with torch.no_grad():
        mu_BR = teacher_forced(policy, rollout, steering=steering).logprobs_BR
    pi_BR = teacher_forced(policy, rollout).logprobs_BR
    assert float(mu_BR.sum(1).exp().sum()) == pytest.approx(1.0, abs=1e-5) and float(pi_BR.sum(1).exp().sum()) == pytest.approx(
        1.0, abs=1e-5
    )
    true = gradient(policy, (pi_BR.sum(1).exp() * reward_B).sum())
    weights_BR, metrics = importance_weights(
        pi_BR.detach(), mu_BR, rollout.mask_BR, Correction(kind, **{"high": 1e9, **bounds})
    )
    found = gradient(policy, (mu_BR.sum(1).exp()[:, None] * weights_BR * reward_B[:, None] * pi_BR).sum())
    measured = float((found - true).norm() / true.norm())
    assert measured == pytest.approx(error, abs=5e-3 if error else 1e-4), kind
    # What is logged is about rows as they were given, here each once: their mean log-ratio, not the expectation.
    assert metrics["correction/kl_sequence"] == pytest.approx(float((mu_BR - pi_BR).sum(1).mean()), abs=1e-5)


def test_truncation_and_masking_lose_what_they_say() -> None:
    policy, steering, rollout, _ = enumerated()
    with torch.no_grad():
        mu_BR, pi_BR = (
            teacher_forced(policy, rollout, steering=steering).logprobs_BR,
            teacher_forced(policy, rollout).logprobs_BR,
        )
    ratio_B = (pi_BR - mu_BR).sum(1).exp()
    cut, told = importance_weights(pi_BR, mu_BR, rollout.mask_BR, Correction("sequence_truncate", high=1.5, low=0.5))
    assert torch.allclose(cut[:, 0], ratio_B.clamp(0.5, 1.5), atol=1e-5)
    masked, _ = importance_weights(pi_BR, mu_BR, rollout.mask_BR, Correction("sequence_mask", high=1.5, low=0.5))
    assert torch.allclose(masked[:, 0], torch.where((ratio_B > 1.5) | (ratio_B < 0.5), 0.0, ratio_B), atol=1e-5)
    assert told["correction/share_outside"] == pytest.approx(
        float(((ratio_B > 1.5) | (ratio_B < 0.5)).double().mean()), abs=1e-6
    )
    assert told["correction/ess"] == pytest.approx(float(ratio_B.sum() ** 2 / (ratio_B**2).sum()), rel=1e-4)


# -- what is logged, and the budget ----------------------------------------------------------------------------------------------

SITE = {"name": "here", "at": {"layers": [0]}, "vector": vector(), "strength": 2.0}


def test_what_is_logged() -> None:
    spec = load_spec(
        {
            "role": "behaviour",
            "correction": {"type": "token_truncate"},
            "fraction": 0.5,
            "sites": [{**SITE, "where": {"steps": {"window": [0, 3]}}}],
        }
    )
    parts, prompts, ppo = job("llama", steering=spec, sampling={"n": 4})
    scored = first_scored(parts, prompts, ppo)
    found = steered.measure(parts.actor_critic, scored)
    rollout, steered_B = scored.rollout, scored.rollout.strength_B != 0
    assert found.share == 0.5 and found.strength == 2.0
    total_B = scored.scores.total_B
    assert found.reward_steered == pytest.approx(float(total_B[steered_B].mean())) != found.reward_plain
    gap_B = torch.where(rollout.mask_BR, rollout.behaviour_logprobs_BR - rollout.policy_logprobs_BR, 0.0).sum(1)
    assert found.kl_sequence == pytest.approx(float(gap_B[steered_B].mean()), rel=1e-5)
    assert float(gap_B[~steered_B].abs().max()) < 1e-4
    # steps 0 to 2 of each steered row, as far as it goes: the last token of a response is never run
    expected_B = torch.where(steered_B, rollout.lengths_B.clamp(max=3), 0)
    assert found.edits_per_row == pytest.approx(float(expected_B.double().mean()))


@pytest.mark.parametrize("role", ["policy", "trainable", "behaviour"])
def test_the_budget_brings_the_kl_down(role: str, tmp_path: Path) -> None:
    sites = [{**SITE, "strength": 3.0}]
    spec = {"role": role, "sites": sites, "kl_budget": {"nats_per_sequence": 0.5}} | (
        {"correction": {"type": "none"}} if role == "behaviour" else {}
    )
    policy = tiny_policy("llama")
    settings = PPOSettings(
        steps=12, rollouts_per_step=32, minibatches=1, epochs=1, eval_prompts=0, learning_rate=0.0, samples=0
    )
    train(
        policy,
        prompts_of(policy),
        share_of_threes,
        Sampling(max_new_tokens=4),
        settings,
        RunSettings(dir=str(tmp_path / role)),
        steering=load_spec(spec),
    )
    steps = [json.loads(line) for line in (tmp_path / role / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["steering/kl_sequence"] > 1.0 and steps[0]["steering/scale"] == 1.0
    late = [step["steering/kl_sequence"] for step in steps[-4:]]
    assert 0.2 < sum(late) / 4 < 1.0 and steps[-1]["steering/scale"] < 0.8
    assert all(step["gap/max"] < 1e-4 for step in steps)


def test_the_budget_may_stop_the_run(tmp_path: Path) -> None:
    spec = load_spec({"sites": [SITE], "kl_budget": {"nats_per_sequence": 0.01, "action": "error"}})
    policy = tiny_policy("llama")
    with pytest.raises(UserError, match=r"step 1: steered responses cost .* above steering.kl_budget 0.01"):
        train(
            policy,
            prompts_of(policy),
            share_of_threes,
            Sampling(max_new_tokens=4),
            PPOSettings(steps=2, eval_prompts=0),
            RunSettings(dir=str(tmp_path / "r")),
            steering=spec,
        )


def test_explained_strengths_are_those_that_were_applied() -> None:
    policy = tiny_policy("gpt2")
    spec = {"sites": [
        {"name": "a", **{k: SITE[k] for k in ("at", "vector")}, "strength": 2.0, "where": {"steps": {"window": [1, 3]}, "ramp": {"over": 4}}},
        {"name": "b", "at": {"layers": [1]}, "vector": vector(1), "strength": {"column": "much"}, "where": {"prompt": [0], "steps": "none"}},
    ]}  # fmt: skip
    steering = Steering(policy.model, spec, policy.tokenizer)
    batch = PromptBatch.of_ids([[5, 6, 7], [8, 9]])
    columns = {"much": [1.5, 0.0]}
    rollout, _ = Sampler(policy, Sampling(max_new_tokens=5), steering).sample(dataclasses.replace(batch, columns=columns))
    found = applied(policy, steering, rollout)
    assert found["a"].tolist() == [pytest.approx([0, 0, 0, 1.5, 1.0, 0, 0, 0])] * 2
    assert found["b"].tolist() == [pytest.approx([1.5, *[0] * 7]), pytest.approx([0.0] * 8)]
    assert edits_per_row(steering, rollout).tolist() == [3, 2]
    lines = table(policy, steering, rollout, 0).splitlines()
    assert lines[0].split() == ["token", "position", "step", "a", "b"] and len(lines) == 1 + 3 + 5


# -- what a run leaves -----------------------------------------------------------------------------------------------------------

EVERYWHERE = {"prompt": "all", "steps": "all"}


def completions(model: Any, steering: Steering | None = None) -> Tensor:
    policy = Policy.of(model, tiny_tokenizer())
    return (
        Sampler(policy, Sampling(max_new_tokens=8, seed=4), steering)
        .sample(PromptBatch.of_ids([[5, 6, 7], [8, 9], [10, 11, 12, 13]]))[0]
        .response_BR
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox", "t5"])
def test_a_trained_vector_saved_loaded_and_folded_gives_the_same_completions(family: str, tmp_path: Path) -> None:
    if family == "t5":
        with pytest.raises(UserError, match="no option for one; use keep"):
            fold(Steering(tiny("t5"), {"sites": [{**SITE, "where": EVERYWHERE}]}), tiny("t5"))
        return
    spec = load_spec(
        {"role": "trainable", "sites": [{**SITE, "vector": {"init": "zeros"}, "where": EVERYWHERE}], "on_deploy": "fold"}
    )
    policy = tiny_policy(family)
    plain = completions(policy.core)
    settings = PPOSettings(
        steps=3, rollouts_per_step=16, minibatches=1, epochs=2, eval_prompts=0, learning_rate=0.3, samples=0, kl_coef=0.0
    )
    folder = tmp_path / "run"
    train(
        policy,
        prompts_of(policy),
        share_of_threes,
        Sampling(max_new_tokens=6),
        settings,
        RunSettings(dir=str(folder)),
        steering=spec,
    )
    folded = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    # The trained vector itself: train again the same way, keeping it.
    again = tiny_policy(family)
    kept = load_spec({**spec.mapping(), "on_deploy": "keep"})
    train(
        again,
        prompts_of(again),
        share_of_threes,
        Sampling(max_new_tokens=6),
        settings,
        RunSettings(dir=str(tmp_path / "kept")),
        steering=kept,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "kept" / "model").eval()
    loaded = Steering(model, tmp_path / "kept" / "model" / "steering.yaml")
    assert loaded.role == "policy" and float(loaded.sites[0].held[0]["vector"].abs().max()) > 0.1
    steered_ids = completions(model, loaded)
    assert torch.equal(steered_ids, completions(folded)), "folded differs from steered"
    assert not torch.equal(steered_ids, plain), "the vector does nothing, so the test says nothing"
    assert torch.equal(completions(model), plain), "the base moved"


@pytest.mark.parametrize("kind", ["loreft", "adapter", "direft"])
def test_a_trained_operation_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    spec = load_spec(
        {
            "role": "trainable",
            "sites": [{"name": "r", "at": {"layers": [0, 1]}, "op": {"type": kind, "rank": 3}, "where": EVERYWHERE}],
        }
    )
    policy = tiny_policy("llama")
    settings = PPOSettings(steps=2, rollouts_per_step=16, minibatches=1, epochs=2, eval_prompts=0, learning_rate=0.1, samples=0)
    train(
        policy,
        prompts_of(policy),
        share_of_threes,
        Sampling(max_new_tokens=6),
        settings,
        RunSettings(dir=str(tmp_path / "run")),
        steering=spec,
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").eval()
    loaded = Steering(model, tmp_path / "run" / "model" / "steering.yaml")
    assert not torch.equal(completions(model, loaded), completions(model))
    if kind != "adapter":
        rotation = loaded.sites[0].held[0]["rotation"]
        torch.testing.assert_close(rotation.T @ rotation, torch.eye(3), atol=1e-4, rtol=0.0)
    listed = {**SITE, "strength": {"samples": [1.0, -2.0]}, "schedule": {"to": 0.5}}
    whole = load_spec(save(Steering(model, {"sites": [listed]}), tmp_path / "listed"))
    assert whole.sites[0].strength.samples == (0.5, -1.0) and whole.sites[0].schedule is None
    twice = Steering(model, save(loaded, tmp_path / "again"))
    assert torch.equal(completions(model, twice), completions(model, loaded))


def test_strip_leaves_a_plain_model(tmp_path: Path) -> None:
    policy = tiny_policy("llama")
    spec = load_spec({"sites": [SITE], "on_deploy": "strip"})
    settings = PPOSettings(steps=1, rollouts_per_step=8, minibatches=1, epochs=1, eval_prompts=4, learning_rate=1e-3, samples=0)
    train(
        policy,
        prompts_of(policy),
        share_of_threes,
        Sampling(max_new_tokens=4),
        settings,
        RunSettings(dir=str(tmp_path / "run")),
        steering=spec,
    )
    assert not list((tmp_path / "run" / "model").glob("steering*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert all(torch.equal(value, policy.core.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "acts at some positions; write where"),
        ({"where": EVERYWHERE, "op": {"type": "ablate"}}, "has op ablate"),
        ({"where": EVERYWHERE, "strength": {"dist": "uniform", "high": 2}}, "differs between rows"),
        ({"where": EVERYWHERE, "strength": {"samples": [2.0]}}, "differs between rows"),
        ({"where": EVERYWHERE, "at": {"layers": [0], "component": "block_input"}}, "acts on an input"),
    ],
)
def test_what_cannot_be_folded_is_said_at_the_start(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        check_fold(Steering(tiny("llama"), {"sites": [{**SITE, **change}]}))
    policy = tiny_policy("llama")
    with pytest.raises(UserError, match=words):
        train(
            policy, prompts_of(policy), share_of_threes, Sampling(max_new_tokens=4), PPOSettings(steps=1), RunSettings(dir=str(tmp_path / "r")),
            steering=load_spec({"sites": [{**SITE, **change}], "on_deploy": "fold"}),
        )  # fmt: skip
    assert not (tmp_path / "r" / "model").exists()


def test_a_model_whose_parts_do_not_add_up_is_not_folded() -> None:
    """olmo2 norms what its mlp gives before adding it: a bias in the matrix is another thing, and is refused."""
    with pytest.raises(UserError, match="use keep"):
        fold(Steering(tiny("olmo2"), {"sites": [{**SITE, "where": EVERYWHERE}]}), tiny("olmo2"))


def test_role_data_is_not_for_ppo() -> None:
    policy = tiny_policy("llama")
    with pytest.raises(UserError, match="role: data|data is for dumps"):
        train(
            policy,
            prompts_of(policy),
            share_of_threes,
            Sampling(),
            PPOSettings(),
            RunSettings(),
            steering=load_spec({"role": "data", "sites": [SITE]}),
        )


# -- resume --------------------------------------------------------------------------------------------------------------------

RESUMED = {
    "policy": {"role": "policy", "fraction": 0.5, "kl_budget": {"nats_per_sequence": 0.5}, "sites": [
        {**SITE, "strength": {"dist": "uniform", "low": 1, "high": 3}, "schedule": {"until": 0.9}},
        {"name": "b", "at": {"layers": [1]}, "op": {"type": "noise"}, "strength": {"dist": "uniform", "low": 0, "high": 1}, "schedule": {"from": 0.2, "to": 1.0}},
    ]},
    "trainable": {"role": "trainable", "sites": [{**SITE, "op": {"type": "loreft"}, "vector": None, "strength": 1.0}]},
    "behaviour": {"role": "behaviour", "correction": {"type": "token_truncate"}, "sites": [{**SITE, "strength": {"samples": [2.0, 0.5]}, "schedule": {}}]},
}  # fmt: skip


@pytest.mark.parametrize("role", RESUMED)
def test_a_resumed_run_is_the_undisturbed_one(role: str, tmp_path: Path) -> None:
    spec = load_spec(RESUMED[role])
    settings = PPOSettings(steps=4, rollouts_per_step=8, minibatches=2, epochs=1, eval_prompts=0, learning_rate=1e-2, samples=0)

    def run(folder: str, reward: Any, resume: bool = False) -> None:
        policy = tiny_policy("llama")
        train(
            policy,
            prompts_of(policy),
            reward,
            Sampling(max_new_tokens=5, n=2),
            settings,
            RunSettings(dir=str(tmp_path / folder), save_every=1, resume=resume),
            steering=spec,
        )

    def breaks(rollout: Rollout, texts: Any) -> Any:
        if int(rollout.policy_step_B[0]) == 2:
            raise KeyboardInterrupt
        return share_of_threes(rollout, texts)

    run("whole", share_of_threes)
    with pytest.raises(KeyboardInterrupt):
        run("cut", breaks)
    run("cut", share_of_threes, resume=True)

    def metrics(folder: str) -> list[dict[str, float]]:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "memory/"))} for line in lines]

    assert metrics("cut") == metrics("whole")
    for file in (tmp_path / "whole" / "model").glob("*.safetensors"):
        one, two = load_file(file), load_file(tmp_path / "cut" / "model" / file.name)
        assert all(torch.equal(one[name], two[name]) for name in one) and set(one) == set(two), file.name


def test_the_vector_of_a_budget_is_what_the_curve_says() -> None:
    """kl_from_plain (exact) agrees with the k1 estimate that the budget uses, in the mean."""
    policy = tiny_policy("llama")
    steering = Steering(policy.model, {"role": "data", "sites": [{**SITE, "strength": 1.0}]})
    rollout, _ = Sampler(policy, Sampling(n=800, max_new_tokens=3, batch_size=800), steering).sample(
        PromptBatch.of_ids([[5, 6]])
    )
    exact = float(kl_from_plain(policy, steering, rollout).sum(1).mean())
    drawn = (rollout.behaviour_logprobs_BR - rollout.policy_logprobs_BR).sum(1)
    assert abs(exact - float(drawn.mean())) < 4 * float(drawn.std()) / 800**0.5
