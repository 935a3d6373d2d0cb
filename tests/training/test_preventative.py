"""Role preventative: rows of the plain policy, learned from by the steered one, and a plain model at the end."""

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

from steerl.rollout.analysis.verify import verify
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.environments.environment import environment_of
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring import logprobs
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering, SteeringSpec, load_spec
from steerl.rollout.types import Rollout
from steerl.training import steering as steered
from steerl.training.algorithm import update as updating
from steerl.training.algorithm.experience import credit
from steerl.training.algorithm.importance import Correction, importance_weights
from steerl.training.algorithm.update import learn
from steerl.training.model.reference import Reference
from steerl.training.ppo import train
from steerl.training.run.metrics import check_gap, kl_to_reference
from steerl.training.settings import PPOSettings, with_correction
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.ppo_runs import LORA, first_scored, job, lone_logprobs, prompts_of, share_of_threes
from tests.rollout.steering.helpers import vector

SITE: dict[str, Any] = {"name": "here", "at": {"layers": [0]}, "vector": vector(), "strength": 1.0}


def spec(kind: str = "token_truncate", role: str = "preventative", **more: Any) -> SteeringSpec:
    site = {**SITE, **{name: more.pop(name) for name in ("strength", "schedule", "where") if name in more}}
    correction = {} if role in ("policy", "trainable") else {"correction": {"type": kind}}
    return load_spec({"role": role, "sites": [site], **correction, **more})


def alone(policy: Policy, rollout: Rollout, row: int, strength: float) -> Tensor:
    """A row's log-probs by itself in float64, with the vector put on block 0 by a hook of our own where step 0 begins."""
    model = policy.core.model.layers[0]
    first = int(rollout.prompt_mask_BP[row].sum()) - 1
    push = torch.tensor(vector(), dtype=torch.float64) * strength

    def put(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        moved = torch.cat([hidden[:, :first], hidden[:, first:] + push], dim=1)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = model.register_forward_hook(put)
    found = lone_logprobs(policy, rollout, row)
    handle.remove()
    return found


# -- what is drawn, and the numbers of both laws --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stream", "generate"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bloom"])
def test_what_is_drawn_is_what_an_unsteered_run_draws(family: str, kind: str) -> None:
    policy, batch = tiny_policy(family), PromptBatch.of_ids([[5, 6, 7], [8, 9], [10, 11, 12, 13]])
    settings, engine = Sampling(max_new_tokens=9, n=4, batch_size=5, stop_ids=(3, 11, 40), seed=3), EngineSettings(kind=kind)
    plain = Sampler(policy, settings, None, engine).sample(batch).rollout
    steering = Steering(policy.core, spec(strength={"samples": [0.0, 1.0]}))
    rollout, _ = Sampler(policy, settings, steering, engine).sample(batch)
    assert rollout.response_ids == plain.response_ids and torch.equal(rollout.stop_B, plain.stop_B)
    assert torch.equal(rollout.behaviour_logprobs_BR, plain.behaviour_logprobs_BR)
    again = teacher_forced(policy, rollout, steering=steering)
    torch.testing.assert_close(rollout.policy_logprobs_BR, again.logprobs_BR, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(rollout.entropy_BR, again.entropy_BR, atol=1e-5, rtol=0.0)
    off_B = (rollout.policy_logprobs_BR - rollout.behaviour_logprobs_BR).abs().amax(1)
    assert bool(((off_B > 1e-3) == (rollout.strength_B != 0)).all()) and rollout.strength_B.unique().tolist() == [0.0, 1.0]
    assert verify(policy, rollout, steering=steering).passed
    if family == "llama":
        policy.core.double()
        for row in range(len(rollout)):
            length, strength = int(rollout.lengths_B[row]), float(rollout.strength_B[row])
            for found_BR, much in ((rollout.policy_logprobs_BR, strength), (rollout.behaviour_logprobs_BR, 0.0)):
                torch.testing.assert_close(
                    found_BR[row, :length].double(), alone(policy, rollout, row, much), atol=1e-5, rtol=0.0
                )


def test_episodes_are_steered_over_all_of_their_turns() -> None:
    """Turn by turn as they are drawn, and as one pass over the whole row says."""
    policy = tiny_policy("llama")
    settings = EnvironmentSettings(factory=f"{Path(__file__).parents[1] / 'games.py'}:chatter", max_turns=3, max_tokens=30)
    sampling, prompts = Sampling(max_new_tokens=6, n=2, batch_size=3), prompts_of(policy)
    with environment_of(settings, policy) as environment:
        assert environment is not None
        rollouts = [
            EpisodeSampler(Sampler(policy, sampling, steering), environment).sample(prompts.batch([0, 1, 2])).rollout
            for steering in (None, Steering(policy.core, spec(where={"steps": {"window": [2, 9]}})))
        ]
    plain, rollout = rollouts
    assert bool((rollout.action_mask_BR != rollout.extent_BR).any()) and plain.response_ids == rollout.response_ids
    forced = teacher_forced(policy, rollout, steering=Steering(policy.core, spec(where={"steps": {"window": [2, 9]}})))
    torch.testing.assert_close(rollout.policy_logprobs_BR, forced.logprobs_BR, atol=1e-5, rtol=0.0)
    torch.testing.assert_close(rollout.behaviour_logprobs_BR, plain.behaviour_logprobs_BR, atol=1e-6, rtol=0.0)
    assert (rollout.policy_logprobs_BR - rollout.behaviour_logprobs_BR).abs().max() > 1e-2


# -- gradients, by every response of three of five tokens -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "exact"),
    [("sequence_truncate", True), ("sequence_mask", True), ("token_truncate", False), ("token_mask", False), ("none", False)],
)
def test_corrections_by_enumeration(kind: str, exact: bool) -> None:
    """E over the plain law of the weighed gradient, against the gradient of the steered policy's expected reward; both laws by
    a hook and a pass of our own."""
    policy = Policy.of(tiny("llama", vocab_size=5, eos_token_id=None, scale=0.4).double(), tiny_tokenizer(5))
    responses = torch.cartesian_prod(*[torch.arange(5)] * 3)
    rollout = Rollout.of_ids([[1, 4]] * 125, responses, ended_B=[False] * 125)
    reward_B = torch.randn(125, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        mu_BR = torch.stack([alone(policy, rollout, row, 0.0) for row in range(125)])
    pi_BR = torch.stack([alone(policy, rollout, row, 0.8) for row in range(125)])
    weights = list(policy.core.parameters())

    def gradient(objective: Tensor) -> Tensor:
        found = torch.autograd.grad(objective, weights, retain_graph=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found])

    true = gradient((pi_BR.sum(1).exp() * reward_B).sum())
    weights_BR, _ = importance_weights(pi_BR.detach(), mu_BR, rollout.mask_BR, Correction(kind, high=1e9))
    ours = gradient((mu_BR.sum(1).exp()[:, None] * weights_BR * reward_B[:, None] * pi_BR).sum())
    error = float((ours - true).norm() / true.norm())
    assert error < 1e-6 if exact else error > 0.1, f"{kind}: {error}"


def test_the_update_has_the_steered_policys_gradient() -> None:
    """The whole chain (score, credit, one minibatch) against the loss written out row by row: ratios and gradient through the
    steered pass, weights steered / plain, the KL of the plain policy in the reward."""
    steering = spec("sequence_truncate", strength={"samples": [0.0, 0.5, 1.0, -1.0]})
    parts, prompts, ppo = job(
        "llama", steering=steering, sampling={"n": 4, "temperature": 1.3}, credit="rloo", minibatches=1, epochs=1,
        kl_coef=0.3, max_grad_norm=0.0,
    )  # fmt: skip
    with torch.no_grad():  # a reference that is another model, or there is no KL
        for parameter in parts.reference.policy.model.parameters():
            parameter.add_(0.02)
    ppo = with_correction(ppo, steering)
    scored = first_scored(parts, prompts, ppo)
    rollout, rows = scored.rollout, len(scored.rollout)
    experience, _ = credit(scored, ppo, ppo.kl_coef)
    caught: dict[str, Tensor] = {}
    optimizer = parts.state.optimizer
    optimizer.step = lambda: caught.update({n: p.grad.clone() for n, p in parts.policy.model.named_parameters()})
    updating.update(parts.state, experience, list(range(rows)), ppo)

    policy = dataclasses.replace(parts.policy)
    for model in (policy.core, parts.reference.policy.core):
        model.double()
    new = [alone(policy, rollout, row, float(rollout.strength_B[row])) for row in range(rows)]
    plain = [alone(policy, rollout, row, 0.0).detach() for row in range(rows)]
    reference = [lone_logprobs(parts.reference.policy, rollout, row).detach() for row in range(rows)]
    score = [float(scored.scores.total_B[row]) - 0.3 * float((plain[row] - reference[row]).sum()) for row in range(rows)]
    tokens, loss = int(rollout.lengths_B.sum()), torch.zeros((), dtype=torch.float64)
    for row in range(rows):
        others = [score[i] for i in range(rows) if i != row and rollout.row_B[i] == rollout.row_B[row]]
        weight = min(float((new[row].detach() - plain[row]).sum().exp()), 2.0)
        advantage = score[row] - sum(others) / len(others)
        loss = loss - weight * advantage * (new[row] - new[row].detach()).exp().sum() / tokens
    named = dict(policy.core.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True), strict=True))
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, found in caught.items():
        assert (found - expected[name]).abs().max() < 1e-4 * scale, name


# -- a step ---------------------------------------------------------------------------------------------------------------------

CASES = [
    ("llama", None, {}, {}),
    ("gpt2", LORA, {"fraction": 0.5}, {}),
    ("t5", None, {}, {"value": "shared"}),
    ("gpt2", None, {"strength": {"dist": "uniform", "low": -1, "high": 1}}, {"packing": True, "micro_batch_size": 3}),
]


@pytest.mark.parametrize(("family", "peft", "more", "settings"), CASES)
def test_a_step(family: str, peft: Any, more: dict[str, Any], settings: dict[str, Any]) -> None:
    """The first ratio is 1; both laws are the trainer's, too; the KL to the reference is the plain policy's, which is 0 before
    anything is learned however strong the steering; and every budget has a KL to go by."""
    steering = spec(**more)
    parts, prompts, ppo = job(
        family, peft, steering=steering, sampling={"n": 4}, learning_rate=0.0, value_learning_rate=1e-3, **settings
    )
    scored = first_scored(parts, prompts, ppo)
    rollout, plain_BR = scored.rollout, Reference(tiny_policy(family), adapter_off=False).logprobs(scored.rollout)
    assert torch.allclose(scored.reference_logprobs_BR, plain_BR, atol=1e-5)
    assert torch.allclose(rollout.behaviour_logprobs_BR, plain_BR, atol=1e-5)
    assert torch.allclose(scored.plain_logprobs_BR, plain_BR, atol=1e-5)
    assert (rollout.policy_logprobs_BR - scored.old_logprobs_BR).abs().max() < 1e-5
    assert (scored.old_logprobs_BR - plain_BR).abs().max() > 1e-2
    gap = check_gap(scored, 1e-4, 0, corrected=True)
    assert gap.largest < 1e-5
    experience, metrics = credit(scored, with_correction(ppo, steering), 0.1)
    assert metrics["correction/ess"] < len(rollout) and experience.importance_BR is not None
    kl = kl_to_reference(scored, experience.importance_BR)
    assert abs(kl.per_response) < 1e-4 and abs(kl.k3_token) < 1e-5
    away_BR = torch.rand(
        plain_BR.shape, generator=torch.Generator().manual_seed(0)
    )  # rows are the plain policy's: none weighs more
    moved = dataclasses.replace(scored, reference_logprobs_BR=scored.reference_logprobs_BR - away_BR)
    away_B = torch.where(rollout.action_mask_BR, away_BR, 0.0).sum(1)
    kl = kl_to_reference(moved, experience.importance_BR)
    assert kl.per_response == pytest.approx(float(away_B.mean()), abs=1e-4)
    stats = learn(parts.state, experience, ppo, seed=0)
    assert stats.ratio_first_error < 2e-6 and stats.clip_fraction == 0  # other micro-batches than those of scoring round
    told = steered.measure(parts.actor_critic, scored)
    off_B = (rollout.behaviour_logprobs_BR.double() - scored.old_logprobs_BR.double()).sum(1)
    assert told.kl_sequence == pytest.approx(float(off_B[rollout.strength_B != 0].mean()), abs=1e-4)


@pytest.mark.parametrize("side", ["policy_logprobs_BR", "behaviour_logprobs_BR"])
def test_the_alarm_hears_both_sides(side: str) -> None:
    parts, prompts, ppo = job("llama", steering=spec(), sampling={"n": 4})
    scored = first_scored(parts, prompts, ppo)
    value_BR = getattr(scored.rollout, side).clone()
    value_BR[3, 1] -= 0.25
    bad = dataclasses.replace(scored, rollout=dataclasses.replace(scored.rollout, **{side: value_BR}))
    with pytest.raises(UserError, match=rf"token 1 of row .* is {float(value_BR[3, 1]):.4f}, .* a gap of 0.25 nats"):
        check_gap(bad, 1e-3, 0, corrected=True)


# -- runs -----------------------------------------------------------------------------------------------------------------------


def run(
    folder: Path, steering: SteeringSpec | None, reward: Any = share_of_threes, resume: bool = False, **more: Any
) -> Policy:
    policy = tiny_policy("llama")
    small = {"steps": 3, "rollouts_per_step": 8, "minibatches": 2, "epochs": 2, "eval_prompts": 4, "learning_rate": 1e-2}
    train(
        policy, prompts_of(policy), reward, Sampling(max_new_tokens=5, n=2), PPOSettings(**{**small, **more}),
        RunSettings(dir=str(folder), save_every=1, resume=resume), steering=steering,
    )  # fmt: skip
    return policy


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def same_weights(one: Path, two: Path) -> bool:
    left, right = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_at_strength_0_it_is_the_plain_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, losses, KL and weights, to the last bit; what is told beside is of the steering and its weights, which are 1."""
    monkeypatch.setattr(
        logprobs, "aligned", False
    )  # a steered model's rows are laid out so, in the same numbers up to rounding
    run(tmp_path / "plain", None)
    run(tmp_path / "zero", spec("none", strength=0.0))
    for one, two in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "zero"), strict=True):
        beside = {name for name in two if name.startswith(("steering/", "correction/"))}
        assert {name: value for name, value in two.items() if name not in beside} == one
        assert two["correction/max"] == pytest.approx(1.0, abs=1e-5) and two["steering/share"] == 0
    assert same_weights(tmp_path / "plain", tmp_path / "zero")


@pytest.mark.parametrize("more", [
    {"strength": {"samples": [0.5, 2.0]}, "schedule": {"until": 0.9}},
    {"fraction": 0.5, "kl_budget": {"nats_per_sequence": 0.05}, "strength": 2.0},
], ids=["samples", "budget"])  # fmt: skip
def test_a_run_goes_on_to_the_last_bit_and_leaves_a_plain_model(more: dict[str, Any], tmp_path: Path) -> None:
    def breaks(rollout: Rollout, texts: Any) -> Any:
        if int(rollout.policy_step_B[0]) == 2:
            raise KeyboardInterrupt
        return share_of_threes(rollout, texts)

    policy = run(tmp_path / "whole", spec(**more))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", spec(**more), breaks)
    run(tmp_path / "cut", spec(**more), resume=True)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole") and same_weights(tmp_path / "cut", tmp_path / "whole")
    told = metrics(tmp_path / "whole")
    assert all(line["gap/max"] < 1e-5 and line["ppo/ratio_first_error"] == 0 for line in told)
    assert abs(told[0]["kl/ref"]) < 1e-4 < told[-1]["kl/ref"] and told[0]["steering/kl_sequence"] > 1e-3
    assert (len({line["steering/scale"] for line in told}) > 1) == ("kl_budget" in more)
    assert not list((tmp_path / "whole" / "model").glob("steering*"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    assert all(torch.equal(value, policy.core.state_dict()[name]) for name, value in model.state_dict().items())


REFUSED = [
    ({}, {"correction": None}, {}, "steering.correction: missing; rollouts of steering.role preventative"),
    ({}, {}, {"top_p": 0.5}, "top_k, top_p or min_p together with steering.role preventative"),
    ({}, {}, {"repetition_penalty": 1.2}, "penalties and bans together with steering.role preventative"),
    ({"kl_as": "loss"}, {}, {}, "ppo.kl_as: loss has the gradient of the steered policy's KL"),
    ({"replay": "dump"}, {}, {}, "steering.role: preventative learns from rows that the plain policy of today draws"),
    ({}, {"on_deploy": "fold"}, {}, "steering.on_deploy: fold .* role preventative leaves a plain one; use strip"),
]


@pytest.mark.parametrize(("ppo", "more", "sampling", "told"), REFUSED)
def test_what_does_not_go_together(ppo: Any, more: Any, sampling: Any, told: str, tmp_path: Path) -> None:
    policy, steering = tiny_policy("llama"), load_spec({**spec().mapping(), **more})
    folder = RunSettings(dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=told):
        train(policy, prompts_of(policy), share_of_threes, Sampling(**sampling), PPOSettings(**ppo), folder, steering=steering)
