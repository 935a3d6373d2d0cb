"""Log-probs, values and references of padded batches against one unpadded row at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steerl.rollout.common.errors import UserError
from steerl.rollout.model.policy import Policy
from steerl.rollout.steering import load_spec
from steerl.training.algorithm.experience import credit
from steerl.training.model import value_model
from steerl.training.model.reference import Reference
from steerl.training.run.metrics import gap_tolerance
from tests.models import tiny, tiny_tokenizer
from tests.ppo_runs import LORA, first_scored, job, lone_logprobs, lone_values, warm_head

FAMILIES = ("gpt2", "llama", "bloom", "opt", "t5", "bart")


def scored_run(family, **settings):
    parts, prompts, ppo = job(family, **settings)
    warm_head(parts.actor_critic)
    return parts, first_scored(parts, prompts, ppo)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", ["separate", "shared"])
@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_log_probs_and_values_are_those_of_lone_rows(family, value, peft):
    parts, scored = scored_run(family, value=value, peft=peft, bootstrap_cut=True, sampling={"temperature": 0.8})
    rollout, policy = scored.rollout, parts.policy
    assert len(set(rollout.lengths_B.tolist())) > 2 and not rollout.prompt_mask_BP.all()
    with torch.no_grad():
        for i in range(len(rollout)):
            n = int(rollout.lengths_B[i])
            logprobs, values = lone_logprobs(policy, rollout, i), lone_values(parts.actor_critic, rollout, i)
            assert torch.allclose(scored.old_logprobs_BR[i, :n].double(), logprobs, atol=1e-5)
            assert torch.allclose(scored.values_BR[i, :n].double(), values[:n], atol=1e-5)
            after = 0.0 if rollout.ended_B[i] else float(values[n])
            assert float(scored.after_B[i]) == pytest.approx(after, abs=1e-5)
            assert scored.old_logprobs_BR[i, n:].eq(0).all() and scored.values_BR[i, n:].eq(0).all()


@pytest.mark.parametrize(
    "family, value, peft",
    [("gpt2", "separate", None), ("llama", "shared", LORA), ("t5", "separate", LORA), ("bart", "shared", None)],
)
def test_what_was_fed_is_read_and_holds_nothing(family, value, peft):
    """Rows with gaps: every number is read in the whole sequence; the value that a cut row goes on with is that of the state at
    its end, where its next action would be predicted. GAE from these by a loop over the actions."""
    parts, prompts, ppo = job(
        family, value=value, peft=peft, bootstrap_cut=True, gamma=0.9, lam=0.8, kl_coef=0.0, whiten_advantages=False,
        missing_stop_penalty=0.5,
    )  # fmt: skip
    warm_head(parts.actor_critic)
    scored = first_scored(parts, prompts, ppo, gaps=True)
    experience, _ = credit(scored, ppo, 0.0)
    rollout, mask_BR = scored.rollout, scored.rollout.action_mask_BR
    last_is_fed = [not mask_BR[i, int(n) - 1] for i, n in enumerate(rollout.lengths_B)]
    assert sum(last_is_fed) > 2 and not mask_BR.any(1).all() and (~mask_BR[:, 0] & mask_BR.any(1)).any()
    with torch.no_grad():
        for i in range(len(rollout)):
            n, own = int(rollout.lengths_B[i]), mask_BR[i].nonzero()[:, 0].tolist()
            logprobs, values = lone_logprobs(parts.policy, rollout, i), lone_values(parts.actor_critic, rollout, i)
            assert torch.allclose(scored.old_logprobs_BR[i, own].double(), logprobs[own], atol=1e-5)
            assert torch.allclose(scored.values_BR[i, own].double(), values[own], atol=1e-5)
            carry, ahead = 0.0, 0.0 if rollout.ended_B[i] else float(values[n])
            assert float(scored.after_B[i]) == pytest.approx(ahead, abs=1e-5)
            reward = float(scored.scores.total_B[i]) - (0.0 if rollout.ended_B[i] else 0.5)
            for t in reversed(own):
                carry = reward + 0.9 * ahead - float(values[t]) + 0.9 * 0.8 * carry
                ahead, reward = float(values[t]), 0.0
                assert float(experience.advantages_BR[i, t]) == pytest.approx(carry, abs=1e-4)
    for held in (scored.old_logprobs_BR, scored.values_BR, scored.entropy_BR, scored.reference_logprobs_BR):
        assert held[~mask_BR].eq(0).all() and held[mask_BR].ne(0).all()


def test_what_was_fed_is_read_by_a_steered_policy_too():
    """Its passes keep their padding and a mask: the sampler, which drew in the whole sequence, found the same."""
    site = {"at": {"layers": [1]}, "vector": [0.5 - i % 3 for i in range(32)], "strength": 2.0}
    parts, prompts, ppo = job("llama", steering=load_spec({"role": "policy", "sites": [site]}))
    scored = first_scored(parts, prompts, ppo, gaps=True)
    rollout = scored.rollout
    assert (rollout.extent_BR & ~rollout.action_mask_BR).any() and not rollout.prompt_mask_BP.all()
    assert (scored.old_logprobs_BR - scored.rollout.policy_logprobs_BR).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_fresh_value_is_zero(family):
    for value in ("separate", "shared"):
        parts, prompts, ppo = job(family, value=value)
        assert first_scored(parts, prompts, ppo).values_BR.eq(0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_adapter_switched_off_is_a_separate_reference(family):
    base = copy.deepcopy(tiny(family))
    parts, prompts, ppo = job(family, peft=LORA, reference="adapter")
    with torch.no_grad():  # an adapter that has learned something
        for name, parameter in parts.policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
    scored = first_scored(parts, prompts, ppo)
    separate = Reference(parts.policy.with_model(base), adapter_off=False).logprobs(scored.rollout)
    assert torch.allclose(scored.reference_logprobs_BR, separate, atol=1e-5)
    assert (scored.old_logprobs_BR - separate).abs().max() > 0.01
    trains = {name for name, p in parts.policy.model.named_parameters() if p.requires_grad}
    assert trains and all("lora_" in name for name in trains)


def test_auto_takes_the_adapter_off_only_where_that_is_the_start():
    fresh, _, _ = job("gpt2", peft=LORA)
    assert fresh.reference.adapter_off
    random, prompts, ppo = job("gpt2", peft={**LORA, "init_lora_weights": False})
    assert not random.reference.adapter_off
    scored = first_scored(random, prompts, ppo)
    assert torch.allclose(scored.reference_logprobs_BR, scored.old_logprobs_BR, atol=1e-6)
    none, prompts, ppo = job("gpt2", reference="none", kl_coef=0.0)
    assert first_scored(none, prompts, ppo).reference_logprobs_BR is None


def test_the_reference_stays_where_the_policy_started():
    parts, prompts, ppo = job("gpt2")
    before = first_scored(parts, prompts, ppo)
    with torch.no_grad():
        for parameter in parts.policy.model.parameters():
            parameter.add_(0.05)
    after = first_scored(parts, prompts, ppo)
    own = Reference(parts.policy.with_model(tiny("gpt2")), adapter_off=False).logprobs(after.rollout)
    assert (after.reference_logprobs_BR - own).abs().max() < 1e-5
    assert not torch.equal(after.old_logprobs_BR, own) and torch.equal(before.reference_logprobs_BR, before.old_logprobs_BR)


def test_the_reference_is_not_steered_and_the_policy_is():
    spec = load_spec({"role": "policy", "sites": [{"at": {"layers": [1]}, "op": {"type": "noise"}, "strength": 0.5}]})
    parts, prompts, ppo = job("llama", steering=spec)
    scored = first_scored(parts, prompts, ppo)
    plain = Reference(parts.policy.with_model(tiny("llama")), adapter_off=False).logprobs(scored.rollout)
    assert torch.allclose(scored.reference_logprobs_BR, plain, atol=1e-6)  # the two passes split the rows differently
    assert (scored.old_logprobs_BR - plain).abs().max() > 0.01
    assert (scored.old_logprobs_BR - scored.rollout.policy_logprobs_BR).abs().max() < 1e-5


# -- a value from a folder --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_value_starts_from_a_reward_model(family, tmp_path):
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(1)
    config = tiny(family, seed=9).config
    config.num_labels = 1
    rewarder = AutoModelForSequenceClassification.from_config(config).eval()
    rewarder.save_pretrained(tmp_path)
    parts, prompts, ppo = job(family, value=str(tmp_path))
    scored = first_scored(parts, prompts, ppo)
    rollout = scored.rollout
    with torch.no_grad():
        for i in range(len(rollout)):
            prompt = rollout.prompt_BP[i][rollout.prompt_mask_BP[i]]
            whole = torch.cat([prompt, rollout.response_BR[i, : int(rollout.lengths_B[i])]])
            for t in range(int(rollout.lengths_B[i])):
                prefix = whole[: len(prompt) + t][None]  # the state in which action t is chosen
                logit = rewarder.score(rewarder.base_model(prefix).last_hidden_state)[0, -1, 0]
                assert float(scored.values_BR[i, t]) == pytest.approx(float(logit), abs=1e-5)


def test_a_value_starts_from_a_language_model(tmp_path):
    tiny("llama", seed=4).save_pretrained(tmp_path)
    parts, _, _ = job("gpt2", value=str(tmp_path))
    assert parts.actor_critic.critic.config.model_type == "llama"
    assert not any("lm_head" in name for name, _ in parts.actor_critic.named_parameters() if name.startswith("critic"))


@pytest.mark.parametrize(
    "value, text",
    [
        ("nowhere/at/all", "ppo.value: 'nowhere/at/all' is neither a folder"),
        ("seq2seq", "is a t5 model and the policy is causal"),
    ],
)
def test_a_value_folder_that_does_not_fit(value, text, tmp_path):
    if value == "seq2seq":
        tiny("t5").save_pretrained(tmp_path)
        value = str(tmp_path)
    with pytest.raises(UserError, match=text):
        job("gpt2", value=value)


def test_the_gap_tolerance_follows_the_dtype():
    from steerl.training.settings import PPOSettings

    assert gap_tolerance(PPOSettings(), torch.float32) == 1e-3
    assert gap_tolerance(PPOSettings(), torch.bfloat16) == 1.0
    assert gap_tolerance(PPOSettings(gap_tolerance=0.2), torch.float32) == 0.2


def test_a_separate_value_of_a_model_that_asks_for_its_heads_dtype():
    """Mamba casts its states to the dtype of the head's weight, which a value's trunk does not have."""
    parts, prompts, ppo = job("mamba")
    assert first_scored(parts, prompts, ppo).values_BR.isfinite().all()


def test_a_separate_value_of_a_model_that_takes_over_its_heads_bias():
    """BERT, as a decoder: the trunk's pass runs without a head, and the policy's own stays."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", vocab_size=64, is_decoder=True, **sizes)).eval()
    policy = Policy.of(model, tiny_tokenizer())
    trunk, head = value_model.build_value_model(policy, "separate")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert trunk.core(input_ids=ids).logits.shape == (1, 3, 1) and model(input_ids=ids).logits.shape == (1, 3, 64)
    assert head.in_features == 32 and policy.core.get_output_embeddings().bias.shape == (64,)
