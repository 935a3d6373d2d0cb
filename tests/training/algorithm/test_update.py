"""The update: its gradient against a loop over lone rows, its invariance to every split, its counts, bounds and alarms."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from steerl.reward.types import Scores
from steerl.rollout.common.errors import UserError
from steerl.rollout.types import Samples
from steerl.training.algorithm import update as learning
from steerl.training.algorithm.experience import credit, score
from steerl.training.algorithm.schedule import share_of_rate as schedule
from steerl.training.algorithm.update import learn, update
from steerl.training.run.metrics import check_gap
from steerl.training.settings import PPOSettings
from tests.ppo_runs import LORA, first_experience, first_scored, job, lone_logprobs, lone_row, lone_values, warm_head


def gradients_of(parts, experience, rows, ppo) -> dict[str, torch.Tensor]:
    """What the optimizer would have stepped with."""
    caught: dict[str, torch.Tensor] = {}

    def step() -> None:
        caught.update({n: p.grad.clone() for n, p in parts.actor_critic.named_parameters() if p.grad is not None})

    real, parts.state.optimizer.step = parts.state.optimizer.step, step
    update(parts.state, experience, rows, ppo)
    parts.state.optimizer.step = real
    return caught


def moved(parts) -> None:
    """Weights a little away from those that the old log-probs and values are of, as in a later minibatch."""
    draw = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for parameter in parts.actor_critic.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=draw))


def entropy_of(policy, rollout, i):
    arguments, first = lone_row(policy, rollout, i)
    logits = policy.model(**arguments).logits[0, first : first + int(rollout.lengths_B[i])].double()
    log = (logits / rollout.temperature).log_softmax(-1)
    return -(log.exp() * log).sum(-1)


def objective_by_hand(ratio, new, old, advantage, row, ppo):
    """Of one action, whose row's ratio is `row`."""
    move = abs(math.exp(float(new.detach())) - math.exp(old))
    if ppo.loss == "dppo":
        on = (float(ratio.detach()) - 1) * advantage > 0
        return 0 * ratio if move > ppo.dppo_threshold and on else ratio * advantage
    if ppo.loss == "cispo":
        return ratio.detach().clamp(1 - ppo.clip, 1 + ppo.clip) * advantage * new
    if ppo.loss == "gspo":
        ratio = row * torch.exp(new - new.detach())
    return torch.minimum(ratio * advantage, ratio.clamp(1 - ppo.clip, 1 + ppo.clip) * advantage)


def loss_by_hand(parts, experience, rows, ppo) -> torch.Tensor:
    """PPO's whole loss of one minibatch, action by action, in float64 from unpadded rows."""
    rollout = experience.rollout
    places = {i: [t for t, acts in enumerate(rollout.action_mask_BR[i].tolist()) if acts] for i in rows}
    rows = [i for i in rows if places[i]]
    tokens = sum(len(places[i]) for i in rows)
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        weight = {
            "token": 1 / tokens,
            "sequence": 1 / (len(places[i]) * len(rows)),
            "constant": 1 / ((ppo.response_limit or 1) * len(rows)),
        }[ppo.loss_reduction]
        new, values = lone_logprobs(parts.policy, rollout, i), lone_values(parts.actor_critic, rollout, i)
        entropy = entropy_of(parts.policy, rollout, i) if ppo.entropy_coef else None
        row = math.exp(sum(float(new[t].detach() - experience.old_logprobs_BR[i, t]) for t in places[i]) / len(places[i]))
        for t in places[i]:
            advantage, old = float(experience.advantages_BR[i, t]), float(experience.old_logprobs_BR[i, t])
            ratio = torch.exp(new[t] - old)
            objective = objective_by_hand(ratio, new[t], old, advantage, row, ppo)
            before, wanted = float(experience.values_BR[i, t]), float(experience.returns_BR[i, t])
            held = before + (values[t] - before).clamp(-ppo.value_clip, ppo.value_clip)
            error = torch.maximum((values[t] - wanted) ** 2, (held - wanted) ** 2) / 2
            term = -objective + ppo.value_coef * error
            if entropy is not None:
                term = term - ppo.entropy_coef * entropy[t]
            if ppo.kl_as == "loss":
                distance = new[t] - float(experience.reference_logprobs_BR[i, t])
                term = term + ppo.kl_coef * ratio * (torch.exp(-distance) - 1 + distance)  # k3
            total = total + weight * term
    return total


CASES = [
    ("gpt2", {}),
    ("llama", {"value": "shared", "loss_reduction": "sequence"}),
    ("t5", {"entropy_coef": 0.02}),
    ("bart", {"value": "shared", "peft": LORA}),
    ("gpt2", {"peft": LORA, "kl_as": "loss", "kl_estimator": "k3", "kl_coef": 0.3}),
    ("bloom", {"sampling": {"temperature": 0.7}, "entropy_coef": -0.01}),
    ("llama", {"packing": True, "entropy_coef": 0.02, "sampling": {"temperature": 0.7}}),
    ("gpt2", {"packing": True, "value": "shared", "checkpointing": True, "micro_batch_tokens": 20, "peft": LORA}),
    ("llama", {"packing": True, "loss": "gspo", "clip": 0.01, "loss_reduction": "sequence", "value": "shared"}),
    ("t5", {"loss": "cispo", "clip": 0.05, "kl_as": "loss", "kl_estimator": "k3"}),
    ("gpt2", {"loss": "dppo", "dppo_threshold": 0.002, "peft": LORA, "loss_reduction": "constant", "response_limit": 12}),
]


@pytest.mark.parametrize("gaps", [False, True], ids=["", "gaps"])
@pytest.mark.parametrize("family, settings", CASES, ids=[f"{family}-{i}" for i, (family, _) in enumerate(CASES)])
def test_the_gradient_is_that_of_the_written_out_loss(family, settings, gaps):
    parts, prompts, ppo = job(family, max_grad_norm=0.0, bootstrap_cut=gaps, **settings)
    warm_head(parts.actor_critic)
    experience = first_experience(parts, prompts, ppo, gaps)
    moved(parts)
    rows = list(range(3, 14))
    found = gradients_of(parts, experience, rows, ppo)
    parameters = {n: p for n, p in parts.actor_critic.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(
        loss_by_hand(parts, experience, rows, ppo), list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-4
    for name, gradient in zip(parameters, expected, strict=True):
        assert torch.allclose(found[name], gradient, atol=2e-5 * scale + 1e-7), name


@pytest.mark.parametrize("gaps", [False, True], ids=["", "gaps"])
@pytest.mark.parametrize("family, packing", [("gpt2", False), ("t5", False), ("gpt2", True)])
def test_the_split_into_micro_batches_does_not_matter(family, packing, gaps):
    parts, prompts, ppo = job(family, max_grad_norm=0.0, packing=packing)
    warm_head(parts.actor_critic)
    experience = first_experience(parts, prompts, ppo, gaps)
    moved(parts)
    rows = list(range(8))
    one = gradients_of(parts, experience, rows, SimpleNamespace(**{**vars(ppo), "micro_batch_size": 8}))
    for size in (1, 2, 4, 3):
        other = gradients_of(parts, experience, rows, SimpleNamespace(**{**vars(ppo), "micro_batch_size": size}))
        for name, gradient in one.items():
            assert torch.allclose(other[name], gradient, atol=1e-6), (size, name)


@pytest.mark.parametrize("family, settings", [("gpt2", {}), ("t5", {"value": "shared", "loss_reduction": "sequence"})])
def test_padding_and_the_order_of_rows_with_gaps_do_not_matter(family, settings):
    parts, prompts, ppo = job(family, max_grad_norm=0.0, bootstrap_cut=True, **settings)
    warm_head(parts.actor_critic)
    scored = first_scored(parts, prompts, ppo, gaps=True)
    rollout, order = scored.rollout, torch.randperm(len(scored.rollout), generator=torch.Generator().manual_seed(1))
    moved_rows = rollout.pad_to(rollout.prompt_width + 3, rollout.response_width + 4).select(order)
    moved_samples, scores = Samples(moved_rows, scored.texts.select(order)), Scores(scored.scores.total_B[order])
    again = score(parts.actor_critic, parts.reference, moved_samples, scores, ppo)
    one, other = (credit(each, ppo, ppo.kl_coef)[0] for each in (scored, again))
    for name in ("old_logprobs_BR", "values_BR", "rewards_BR", "advantages_BR", "returns_BR"):
        value, wide = getattr(one, name)[order], getattr(other, name)
        assert torch.allclose(wide[:, : rollout.response_width], value, atol=1e-5), name
        assert wide[:, rollout.response_width :].eq(0).all()
    moved(parts)
    rows = list(range(2, 10))
    place = {int(i): new for new, i in enumerate(order)}
    plain, found = (
        gradients_of(parts, experience, chosen, ppo) for experience, chosen in ((one, rows), (other, [place[i] for i in rows]))
    )
    scale = max(float(g.abs().max()) for g in plain.values())
    assert all(torch.allclose(found[name], gradient, atol=2e-5 * scale) for name, gradient in plain.items())


@pytest.mark.parametrize("family, peft", [("gpt2", None), ("opt", LORA), ("t5", None), ("llama", LORA)])
def test_recomputed_activations_give_the_same_gradient_and_no_dropout(family, peft):
    found, passes = [], []
    for checkpointing in (False, True):
        dropout = {"gpt2": {"resid_pdrop": 0.3}, "opt": {"dropout": 0.3}, "t5": {"dropout_rate": 0.3}}.get(family)
        parts, prompts, ppo = job(family, peft, max_grad_norm=0.0, checkpointing=checkpointing, overrides=dropout)
        warm_head(parts.actor_critic)
        experience = first_experience(parts, prompts, ppo)
        moved(parts)
        calls: list[int] = []
        blocks = (m for m in parts.policy.core.modules() if type(m).__name__.endswith(("Block", "DecoderLayer")))
        inner = next(m for block in blocks for m in block.modules() if "Norm" in type(m).__name__)
        handle = inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        found.append(gradients_of(parts, experience, list(range(8)), ppo))
        handle.remove()
        passes.append(len(calls))
        assert not any(module.training for module in parts.policy.core.modules())
    plain, again = found
    assert passes[1] == 2 * passes[0] > 0
    assert plain.keys() == again.keys()
    assert all(torch.allclose(again[name], gradient, atol=1e-6) for name, gradient in plain.items())


def test_optimizer_steps_are_epochs_times_minibatches():
    parts, prompts, ppo = job("gpt2", epochs=3, minibatches=4, micro_batch_size=1)
    experience = first_experience(parts, prompts, ppo)
    stats = learn(parts.state, experience, ppo, seed=0)
    steps = {int(entry["step"]) for entry in parts.state.optimizer.state.values()}
    assert steps == {12} and stats.optimizer_steps == 12


def test_the_gradient_is_clipped_after_accumulation():
    parts, prompts, ppo = job("gpt2", max_grad_norm=1e-9, micro_batch_size=3)
    warm_head(parts.actor_critic)
    experience = first_experience(parts, prompts, ppo)
    found = gradients_of(parts, experience, list(range(8)), ppo)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in found.values()))
    assert 0 < norm <= 1e-9 * (1 + 1e-6)


@pytest.mark.parametrize("family, peft", [("gpt2", None), ("llama", None), ("llama", LORA)])
def test_a_first_optimizer_step_that_rewrites_the_policy_stops_the_run(family, peft):
    """Rates a thousand times too high pass on a tiny model, a hundred thousand times do not; a stop_kl accepts them."""
    for rate, settings in ((1e-2, {}), (20.0 if peft else 1.0, {}), (20.0 if peft else 1.0, {"stop_kl": 1e6})):
        parts, prompts, ppo = job(family, peft, learning_rate=rate, value_learning_rate=1e-3, **settings)
        experience = first_experience(parts, prompts, ppo)
        if rate == 1e-2 or settings:
            learn(parts.state, experience, ppo, seed=0)
            continue
        with pytest.raises(
            UserError, match=r"step 1: one optimizer step moved the policy by .* nats per token.*lower ppo.learn"
        ):
            learn(parts.state, experience, ppo, seed=0)


LAWS = [
    {},
    {"temperature": 0.6},
    {"top_p": 0.8, "temperature": 1.3},
    {"top_k": 7},
    {"min_p": 0.1},
    {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    {"stop": ["ab", "q"], "n": 4},
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: "+".join(law) or "plain")
@pytest.mark.parametrize("family, peft", [("gpt2", None), ("gpt2", LORA), ("t5", None), ("bart", LORA)])
def test_at_learning_rate_zero_every_ratio_is_one(law, family, peft):
    from steerl.training.algorithm.importance import Correction

    parts, prompts, ppo = job(
        family, peft, law, learning_rate=0.0, value_learning_rate=1e-2, epochs=2, correction=Correction("token_truncate")
    )
    before = {n: p.clone() for n, p in parts.policy.model.named_parameters()}
    stats = learn(parts.state, first_experience(parts, prompts, ppo), ppo, seed=0)
    assert stats.ratio_first == pytest.approx(1, abs=1e-6) and stats.ratio_mean == pytest.approx(1, abs=1e-6)
    assert stats.ratio_first_error < 1e-5
    assert stats.clip_fraction == 0 and abs(stats.approx_kl) < 1e-9
    assert all(torch.equal(p, before[n]) for n, p in parts.policy.model.named_parameters())


@pytest.mark.parametrize("law", [{"temperature": 0.6}, {"top_k": 7, "temperature": 1.3}], ids=["plain", "truncated"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_at_learning_rate_zero_rows_with_gaps_have_every_ratio_one(law, family):
    """Without a correction: the policy's distribution is the sampler's at every action, what was fed read and weighed nowhere."""
    parts, prompts, ppo = job(family, None, law, learning_rate=0.0, loss_reduction="sequence", correction=None)
    scored = first_scored(parts, prompts, ppo, gaps=True)
    gap = check_gap(scored, 1e-5, 0, corrected=False)
    assert gap is not None and gap.largest < 1e-5
    stats = learn(parts.state, credit(scored, ppo, ppo.kl_coef)[0], ppo, seed=0)
    assert stats.ratio_first_error < 1e-5 and stats.clip_fraction == 0 and abs(stats.approx_kl) < 1e-9


def test_dropout_changes_nothing():
    parts, prompts, ppo = job(
        "gpt2", learning_rate=0.0, overrides={"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}, epochs=2
    )
    parts.policy.model.train()  # as a caller may hand it over
    stats = learn(parts.state, first_experience(parts, prompts, ppo), ppo, seed=0)
    assert stats.ratio_first_error < 1e-5 and stats.ratio_mean == pytest.approx(1, abs=1e-6)


def test_identical_micro_batches_give_a_ratio_of_exactly_one():
    for family, packing in (("gpt2", False), ("llama", False), ("t5", False), ("gpt2", True)):
        parts, prompts, ppo = job(family, minibatches=1, epochs=1, micro_batch_size=16, packing=packing)
        stats = learn(parts.state, first_experience(parts, prompts, ppo), ppo, seed=0)
        assert stats.ratio_first == 1.0 and stats.ratio_first_error == 0.0


@pytest.mark.parametrize("value", ["separate", "shared"])
def test_in_the_value_warmup_only_the_value_learns(value):
    parts, prompts, ppo = job("gpt2", value=value, value_warmup_steps=1, value_learning_rate=1e-2)
    experience = first_experience(parts, prompts, ppo)
    before = {n: p.clone() for n, p in parts.actor_critic.named_parameters()}
    learn(parts.state, experience, ppo, seed=0)
    changed = {n for n, p in parts.actor_critic.named_parameters() if not torch.equal(p, before[n])}
    assert changed and not any(name.startswith("actor") for name in changed)
    parts.state.step = 1
    learn(parts.state, experience, ppo, seed=0)
    assert any(n.startswith("actor") and not torch.equal(p, before[n]) for n, p in parts.actor_critic.named_parameters())


def test_a_large_step_ends_the_epochs():
    parts, prompts, ppo = job("gpt2", epochs=5, minibatches=4, learning_rate=3e-2, stop_kl=1e-3)
    stats = learn(parts.state, first_experience(parts, prompts, ppo), ppo, seed=0)
    assert 1 < stats.optimizer_steps < 20


def test_two_learning_rates_and_their_schedule():
    parts, _, _ = job("gpt2", learning_rate=1e-3, value_learning_rate=5e-3)
    assert [group["lr"] for group in parts.state.optimizer.param_groups] == [1e-3, 5e-3]
    linear = PPOSettings(steps=10, schedule="linear", warmup_steps=3)
    assert [schedule(linear, s) for s in (0, 1, 2, 3, 9)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1 / 7])
    cosine = PPOSettings(steps=10, schedule="cosine")
    assert [schedule(cosine, s) for s in range(10)] == pytest.approx([(1 + math.cos(math.pi * s / 10)) / 2 for s in range(10)])
    learning.set_learning_rates(parts.state.optimizer, PPOSettings(steps=10, schedule="linear"), 5)
    assert [group["lr"] for group in parts.state.optimizer.param_groups] == pytest.approx([5e-4, 2.5e-3])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights(bad):
    parts, prompts, ppo = job("gpt2")
    experience = first_experience(parts, prompts, ppo)
    experience.advantages_BR[2, 0] = bad
    before = {n: p.clone() for n, p in parts.actor_critic.named_parameters()}
    with pytest.raises(UserError, match=r"step 1: ppo/policy_loss = .*Likely causes: a learning rate that is too high"):
        for _ in range(2):
            learn(parts.state, experience, ppo, seed=0)
    assert all(torch.isfinite(p).all() for p in parts.actor_critic.parameters())
    assert set(before) == {n for n, _ in parts.actor_critic.named_parameters()}


def test_credit_without_a_value_has_no_value_model():
    parts, prompts, ppo = job("gpt2", credit="rloo", sampling={"n": 4})
    assert parts.actor_critic.critic is None and parts.actor_critic.head is None
    stats = learn(parts.state, first_experience(parts, prompts, ppo), ppo, seed=0)
    assert stats.value_loss is None and "value/loss" not in stats.metrics() and len(parts.state.optimizer.param_groups) == 1
