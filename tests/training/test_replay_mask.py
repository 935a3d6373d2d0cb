"""Under top-k, top-p and min-p the policy is the law over what could be drawn: in the sampler, old, new, reference and entropy.

Definitions: what could be drawn, from raw logits of lone rows in float64 (tests/rollout/definitions.py), by the weights that
sampled; the softmax over it, written out; all responses of a policy of eight tokens (tests/training/enumerated.py).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import ModelSettings, Policy, load_policy
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.types import Rollout
from steerl.training.algorithm.experience import credit, gather_scored, score
from steerl.training.algorithm.importance import Correction
from steerl.training.algorithm.update import learn
from steerl.training.settings import PPOSettings
from steerl.training.setup import prepare
from tests import warm
from tests.models import tiny_policy
from tests.ppo_runs import LORA, first_experience, first_scored, job, lone_row, lone_values, share_of_threes, warm_head
from tests.rollout import definitions
from tests.training.algorithm.test_update import gradients_of, moved
from tests.training.enumerated import Enumerated

MIXED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02}


def sets_of(policy: Policy, rollout: Rollout, sampling: Sampling) -> list[list[list[int]]]:
    """What could be drawn at each action of each row, by the policy as it is now."""
    found = []
    for row in range(len(rollout)):
        response = definitions.real_response(rollout, row)
        prompt = definitions.real_prompt(rollout, row)
        logits = definitions.alone_logits(policy.model, prompt, response, rollout.start_ids)
        found.append([definitions.kept(each, [], sampling) for each in logits])
    return found


def law_of(policy: Policy, rollout: Rollout, row: int, sets: list[list[int]]) -> list[Tensor]:
    """Log-probs over each set, differentiable: float64, one lone row."""
    arguments, first = lone_row(policy, rollout, row)
    logits = policy.model(**arguments).logits[0, first : first + len(sets)].double() / rollout.temperature
    return [logits[t, ids].log_softmax(-1) for t, ids in enumerate(sets)]


def logprobs_of(policy: Policy, rollout: Rollout, sets: list[list[list[int]]]) -> list[list[float]]:
    with torch.no_grad():
        return [
            [
                float(law[ids.index(token)])
                for law, ids, token in zip(law_of(policy, rollout, row, own), own, response, strict=True)
            ]
            for row, own in enumerate(sets)
            for response in [definitions.real_response(rollout, row)]
        ]


# -- ratios ------------------------------------------------------------------------------------------------------------

RATIOS: list[tuple[str, Any, dict[str, Any], dict[str, Any]]] = [
    ("gpt2", None, {"top_p": 0.8, "temperature": 1.3}, {}),
    ("t5", LORA, {"top_k": 7}, {}),
    ("llama", None, {"min_p": 0.1}, {"value": "shared"}),
    ("bart", LORA, MIXED, {"value": "shared", "bootstrap_cut": True}),
    ("llama", None, {**MIXED, "n": 4}, {"credit": "rloo", "kl_as": "loss"}),
]


@pytest.mark.parametrize("family, peft, law, settings", RATIOS, ids=[f"{case[0]}-{i}" for i, case in enumerate(RATIOS)])
def test_at_learning_rate_zero_every_ratio_is_one_and_nothing_is_corrected(family, peft, law, settings):
    parts, prompts, ppo = job(family, peft, law, learning_rate=0.0, value_learning_rate=1e-2, **settings)
    assert ppo.correction is None
    experience = first_experience(parts, prompts, ppo)
    rollout = experience.rollout
    assert experience.importance_BR is None and rollout.kept is not None
    assert int((rollout.kept.counts_BR[rollout.action_mask_BR] > 0).sum()) > 0
    for numbers in (rollout.policy_logprobs_BR, experience.old_logprobs_BR, experience.reference_logprobs_BR):
        assert (numbers - rollout.behaviour_logprobs_BR).abs().max() < 1e-5
    stats = learn(parts.state, experience, ppo, seed=0)
    assert stats.ratio_first_error < 1e-5 and stats.ratio_mean == pytest.approx(1, abs=1e-6)
    assert stats.clip_fraction == 0 and abs(stats.approx_kl) < 1e-9


def test_without_the_mask_the_law_of_the_draw_is_not_the_policys():
    """So the last test can fail: what it compares differs where the mask is left out."""
    parts, prompts, ppo = job("llama", None, {**MIXED, "replay_mask": False}, correction=Correction("none"))
    rollout = first_scored(parts, prompts, ppo).rollout
    assert rollout.kept is None and (rollout.policy_logprobs_BR - rollout.behaviour_logprobs_BR).abs().max() > 0.05


# -- gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["at the start", "after some learning"])
def test_one_update_is_the_exact_gradient_of_the_expected_score(learned):
    """The expectation over the truncated law by enumeration; later, of ratio x score, whose ratios are that law's, too."""
    every = Enumerated()
    assert sorted(every.responses) == sorted(every.all_responses()) and 20 < len(every.responses) < 65
    assert sum(every.probabilities) == pytest.approx(1)
    if learned:
        moved(every.parts)
    assert_equal(every.gradients(), every.expected_of_ratios() if learned else every.expected())


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    assert scale > 1e-2
    for name, gradient in expected.items():
        assert torch.allclose(found[name].double(), gradient, atol=2e-5 * scale, rtol=0), name


def test_two_ranks_give_that_gradient_too(tmp_path):
    done = warm.run_ranks("tests/training/enumerated.py", str(tmp_path / "found.pt"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(torch.load(tmp_path / "found.pt"), Enumerated().expected())


def loss_by_hand(parts: Any, experience: Any, sets: Any, reference: Any, rows: list[int], ppo: Any) -> Tensor:
    """The whole loss of one minibatch, token by token, in float64 from lone rows over what could be drawn."""
    rollout = experience.rollout
    tokens = sum(len(sets[i]) for i in rows)
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        laws, values = law_of(parts.policy, rollout, i, sets[i]), lone_values(parts.actor_critic, rollout, i)
        for t, (law, ids) in enumerate(zip(laws, sets[i], strict=True)):
            new = law[ids.index(int(rollout.response_BR[i, t]))]
            advantage, old = float(experience.advantages_BR[i, t]), float(experience.old_logprobs_BR[i, t])
            ratio = torch.exp(new - old)
            term = -torch.minimum(ratio * advantage, ratio.clamp(1 - ppo.clip, 1 + ppo.clip) * advantage)
            term = term + ppo.entropy_coef * (law.exp() * law).sum()
            distance = new - reference[i][t]
            term = term + ppo.kl_coef * ratio * (torch.exp(-distance) - 1 + distance)  # k3
            before, wanted = float(experience.values_BR[i, t]), float(experience.returns_BR[i, t])
            held = before + (values[t] - before).clamp(-ppo.value_clip, ppo.value_clip)
            term = term + ppo.value_coef * torch.maximum((values[t] - wanted) ** 2, (held - wanted) ** 2) / 2
            total = total + term / tokens
    return total


LOSSES: list[tuple[str, dict[str, Any]]] = [
    ("gpt2", {"sampling": {"top_p": 0.8, "temperature": 1.3}}),
    ("t5", {"sampling": {"top_k": 7, "temperature": 0.3}}),
    ("bart", {"sampling": MIXED, "value": "shared", "peft": LORA}),
    ("llama", {"sampling": {"min_p": 0.1}, "value": "shared"}),
]


@pytest.mark.parametrize("family, settings", LOSSES, ids=[f"{family}-{i}" for i, (family, _) in enumerate(LOSSES)])
def test_the_gradient_is_that_of_the_loss_written_out_over_what_could_be_drawn(family, settings):
    """Ratio, entropy and the KL to a reference with other weights, all over the ids that the old weights let through."""
    given = {"max_grad_norm": 0.0, "entropy_coef": 0.05, "kl_as": "loss", "kl_estimator": "k3", "kl_coef": 0.3}
    parts, prompts, ppo = job(family, **given, **settings)
    warm_head(parts.actor_critic)
    other = tiny_policy(family, seed=1)
    parts.reference.policy, parts.reference.adapter_off = other, False
    scored = first_scored(parts, prompts, ppo)
    rollout = scored.rollout
    sets = sets_of(parts.policy, rollout, parts.sampler.sampling)
    reference = logprobs_of(other, rollout, sets)
    for i, own in enumerate(reference):
        assert torch.allclose(scored.reference_logprobs_BR[i, : len(own)], torch.tensor(own), atol=1e-5)
        entropies = [-float((law.detach().exp() * law.detach()).sum()) for law in law_of(parts.policy, rollout, i, sets[i])]
        for numbers in (scored.entropy_BR, rollout.entropy_BR):
            assert torch.allclose(numbers[i, : len(own)], torch.tensor(entropies), atol=1e-5)
    experience = credit(scored, ppo, ppo.kl_coef)[0]
    moved(parts)
    rows = list(range(3, 14))
    found = gradients_of(parts, experience, rows, ppo)
    parameters = {n: p for n, p in parts.actor_critic.named_parameters() if p.requires_grad}
    total = loss_by_hand(parts, experience, sets, reference, rows, ppo)
    expected = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, materialize_grads=True)
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-4
    for name, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(found[name], gradient, atol=2e-5 * scale + 1e-7), name


# -- how far ratios are off without it -------------------------------------------------------------------------------------


@pytest.mark.proofs
@pytest.mark.parametrize("law", [{"top_p": 0.7}, {"top_k": 20, "top_p": 0.8}], ids=lambda law: "+".join(law))
def test_the_share_of_ratios_outside_a_tenth_with_and_without_the_mask(law, tiny_world):
    """What trl#7269 measured, here on one run of ten steps: the same tokens and weights, two ways to score them.

    At the weights that sampled the latter ratio is the mass of what could be drawn: under top-p alone at least p.

    with       policy over what could be drawn / probability that the sampler drew it with
    without    policy over the whole vocabulary / that probability, as where plain log-probs meet a sampler's processed ones
    """
    policy = load_policy(ModelSettings(path=str(tiny_world("reviews") / "sft")))
    prompts = load_prompts(PromptSettings(path=str(tiny_world("reviews") / "prompts.jsonl")), policy, 32)
    ppo = PPOSettings(rollouts_per_step=64, minibatches=4, epochs=2, micro_batch_size=16, learning_rate=1e-4)
    parts = prepare(policy, share_of_threes, Sampling(max_new_tokens=32, **law), ppo, RunSettings())

    def outside(rollout: Rollout) -> list[float]:
        """Shares of ratios outside 0.9 to 1.1 under the weights as they are: with the mask, and without."""
        shares = []
        for one in (rollout, dataclasses.replace(rollout, kept=None)):
            with torch.no_grad():
                ratio_BR = (teacher_forced(policy, one).logprobs_BR - rollout.behaviour_logprobs_BR).exp()
            ratio = ratio_BR[rollout.action_mask_BR]
            shares.append(100 * float(((ratio < 0.9) | (ratio > 1.1)).float().mean()))
        return shares

    print(f"\n{law}: % of ratios outside 0.9 to 1.1\nstep   before learning: with  without   after it: with  without")
    rows = []
    for step in range(10):
        batch = prompts.batch(prompts.take(0, 64 * step, 64))
        samples = parts.sampler.draw(batch, step=step)
        scored = score(parts.actor_critic, parts.reference, *gather_scored(samples, share_of_threes), ppo)
        before = outside(scored.rollout)
        learn(parts.state, credit(scored, ppo, ppo.kl_coef)[0], ppo, seed=0)
        parts.state.step += 1
        rows.append([*before, *outside(scored.rollout)])
        print(f"{step + 1:4d} {rows[-1][0]:23.1f} {rows[-1][1]:8.1f} {rows[-1][2]:16.1f} {rows[-1][3]:8.1f}", flush=True)
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    print(f"mean {means[0]:23.1f} {means[1]:8.1f} {means[2]:16.1f} {means[3]:8.1f}")
    assert means[0] == 0 and means[1] > 10 and means[2] < means[3]


@pytest.mark.proofs
def test_what_recording_and_replaying_cost():
    """Sampling and one update with the mask over those without, in CPU seconds, interleaved; ids and bytes of a token."""
    shape = {"vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "scale": 0.05}
    print(f"\n{'sampling':24s} {'head':>5} {'entropy':>8} {'ids':>8} {'bytes':>8} {'sampling':>9} {'update':>7}")
    for sharpness in (6.0, 3.0):
        for law in ({"top_k": 50}, {"top_p": 0.95}, {"top_k": 50, "top_p": 0.95}, {"min_p": 0.05}):
            seconds: dict[tuple[str, bool], float] = {}
            for replays in (True, False) * 3:
                given = {"max_new_tokens": 48, "stop_ids": [], "replay_mask": None if replays else False, **law}
                correction = None if replays else Correction("none")
                small = {"rollouts_per_step": 32, "micro_batch_size": 32, "minibatches": 1, "epochs": 1, "entropy_coef": 0.01}
                parts, prompts, ppo = job("llama", None, given, correction=correction, overrides=shape, **small)
                with torch.no_grad():
                    parts.policy.model.lm_head.weight.mul_(sharpness)
                began = time.process_time()
                samples = parts.sampler.draw(prompts.batch(list(range(32))))
                sampled = time.process_time() - began
                scored = score(parts.actor_critic, parts.reference, *gather_scored(samples, share_of_threes), ppo)
                rollout = samples.rollout
                experience = credit(scored, ppo, 0.05)[0]
                began = time.process_time()
                learn(parts.state, experience, ppo, seed=0)
                for name, took in (("sampling", sampled), ("update", time.process_time() - began)):
                    seconds[name, replays] = min(seconds.get((name, replays), 1e9), took)
                if replays:
                    entropy = float(rollout.entropy_BR.sum() / rollout.actions_B.sum())
                    ids = len(rollout.kept.ids) / int(rollout.actions_B.sum())
            ratios = [seconds[name, True] / seconds[name, False] for name in ("sampling", "update")]
            told = "+".join(f"{name} {value}" for name, value in law.items())
            print(
                f"{told:24s} {sharpness:5.0f} {entropy:8.2f} {ids:8.0f} {4 * ids + 8:8.0f} {ratios[0]:9.2f} {ratios[1]:7.2f}",
                flush=True,
            )
