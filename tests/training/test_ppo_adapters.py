"""Exactness with every kind of adapter that PPO accepts, on decoder-only models and encoder-decoders (rows 1-13 and 25).

Definitions: a row alone, unpadded, teacher-forced in float64 (tests/ppo_runs.py); the law's processors written out in
tests/rollout/definitions.py are checked there, here they run through adapters.
"""

from __future__ import annotations

import json

import pytest
import torch

from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model import adapters
from steerl.rollout.model.policy import ModelSettings, Policy, load_policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import load_spec
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.ppo_runs import first_scored, job, lone_logprobs, prompts_of, share_of_threes
from tests.rollout.model.test_adapters import KINDS, MAIN, WEIGHT, adapted

FAMILIES = ["gpt2", "llama", "t5", "bart"]
PROMPTS = [[5], [6, 7, 8, 9, 10], [2, 0, 6], [11] * 8]
"""One token; ragged; a prompt that holds the stop token and the pad token; a repeated stop token."""
ENDS = {"max_new_tokens": 8, "stop_ids": [11, 17, 23, 30], "n": 2}


def sampled(family: str, kind: str, **settings):
    policy = Policy.of(adapted(family, kind), tiny_tokenizer())
    return policy, Sampler(policy, Sampling(**{**ENDS, **settings})).sample(PromptBatch.of_ids(PROMPTS))[0]


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("family", FAMILIES)
def test_both_logprobs_of_a_sampled_row_are_those_of_the_row_alone(family, kind):
    policy, rollout = sampled(family, kind, temperature=0.7)
    forced = teacher_forced(policy, rollout)
    for i in range(len(rollout)):
        length = int(rollout.lengths_B[i])
        alone = lone_logprobs(policy, rollout, i).float()
        for found in (rollout.policy_logprobs_BR, rollout.behaviour_logprobs_BR, forced.logprobs_BR):
            torch.testing.assert_close(found[i, :length], alone, atol=1e-5, rtol=0)
        assert not rollout.policy_logprobs_BR[i, length:].any()
        stops = [t for t, token in enumerate(rollout.response_BR[i, :length].tolist()) if token in (2, 11, 17, 23, 30)]
        assert stops == ([length - 1] if rollout.ended_B[i] else []), "the mask runs through the first stop token"


@pytest.mark.parametrize("kind", [kind for kind in WEIGHT if kind not in MAIN])
def test_the_other_weight_adapters_too(kind):
    policy, rollout = sampled("llama", kind)
    for i in range(len(rollout)):
        found = rollout.policy_logprobs_BR[i, : int(rollout.lengths_B[i])]
        torch.testing.assert_close(found, lone_logprobs(policy, rollout, i).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "PROMPT_TUNING"])
@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("law", [{"top_p": 0.8}, {"top_k": 5}, {"repetition_penalty": 1.5}, {"min_p": 0.8}])
def test_behaviour_is_the_law_of_the_draw_and_policy_is_not(family, kind, law):
    policy, rollout = sampled(family, kind, replay_mask=False, **law)
    plain = torch.cat([lone_logprobs(policy, rollout, i).float() for i in range(len(rollout))])
    torch.testing.assert_close(rollout.policy_logprobs_BR[rollout.action_mask_BR], plain, atol=1e-5, rtol=0)
    assert (rollout.behaviour_logprobs_BR[rollout.action_mask_BR] - plain).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING"])
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_neighbours_and_batch_size_change_no_token(family, kind):
    _, together = sampled(family, kind)
    _, apart = sampled(family, kind, batch_size=1)
    assert torch.equal(together.response_BR, apart.response_BR) and torch.equal(together.lengths_B, apart.lengths_B)


@pytest.mark.parametrize(
    "family, kind", [(f, k) for f in FAMILIES for k in MAIN if f in ("gpt2", "t5") or k == "PROMPT_TUNING"]
)
def test_at_learning_rate_zero_the_ratio_is_one_and_the_reference_is_the_base(tmp_path, family, kind):
    mapping = {key: value for key, value in KINDS[kind].items() if not key.startswith("init_")}
    parts, prompts, _ = job(family, peft=mapping)
    settings = PPOSettings(
        steps=1, rollouts_per_step=8, minibatches=2, epochs=2, micro_batch_size=3, learning_rate=0.0, value_learning_rate=0.0,
        reference="adapter", eval_prompts=0,
    )  # fmt: skip
    run = RunSettings(dir=str(tmp_path / "run"))
    train(parts.policy, prompts, share_of_threes, Sampling(max_new_tokens=6, stop_ids=[11, 17]), settings, run)
    (line,) = [json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["ppo/ratio_first_error"] < 1e-5 and line["ppo/clip_fraction"] == 0 and line["gap/max"] < 1e-4
    assert abs(line["ppo/approx_kl"]) < 1e-9 and abs(line["ppo/ratio_mean"] - 1) < 1e-6
    # Weight adapters start as their base; virtual tokens are another model than their base from the first step on.
    assert (abs(line["kl/ref"]) < 1e-4) == (kind in adapters.WEIGHT_KINDS)


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_step_moves_the_adapter_alone_and_the_run_leaves_it(tmp_path, family, kind):
    tiny(family).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    policy = with_peft(plain := load_policy(ModelSettings(path=str(tmp_path / "base"))), KINDS[kind])
    virtual = KINDS[kind].get("num_virtual_tokens", 0)
    assert plain.context is None or policy.context == plain.context - virtual  # they take up room
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    settings = PPOSettings(
        steps=2, rollouts_per_step=8, minibatches=2, epochs=1, micro_batch_size=4, learning_rate=1e-2, reference="adapter",
        eval_prompts=0,
    )  # fmt: skip
    run = RunSettings(dir=str(tmp_path / "run"))
    train(policy, prompts_of(policy), share_of_threes, Sampling(max_new_tokens=6, stop_ids=[11, 17]), settings, run)
    moved = {name for name, value in policy.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(any(mark in name for mark in ("lora_", "ia3_", "prompt_encoder")) for name in moved), moved
    # The folder that the run leaves is that very policy: its base is found from it, its numbers are the same.
    left = load_policy(ModelSettings(path=str(tmp_path / "run" / "model")))
    rollout, _ = Sampler(policy, Sampling(**ENDS)).sample(PromptBatch.of_ids(PROMPTS))
    again = teacher_forced(left, rollout)
    torch.testing.assert_close(again.logprobs_BR, rollout.policy_logprobs_BR, atol=1e-5, rtol=0)


def test_virtual_tokens_take_room_from_the_context():
    whole = tiny_policy("gpt2").context
    assert Policy.of(adapted("gpt2", "PROMPT_TUNING"), tiny_tokenizer()).context == whole - 3
    assert Policy.of(adapted("gpt2", "LORA"), tiny_tokenizer()).context == whole


# -- encoder-decoders: steering in both stacks, LoRA beside it ---------------------------------------------------------


def halved(model, stack: str):
    """The definition: block 0 of that stack puts out half of what it did, at every position."""

    def half(module, inputs, output):
        return (output[0] / 2, *output[1:]) if isinstance(output, tuple) else output / 2

    side = model.get_encoder() if stack == "encoder" else model.get_decoder()
    blocks = side.block if hasattr(side, "block") else side.layers
    blocks[0].register_forward_hook(half)
    return model


@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA", "r": 2}])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_steered_encoder_decoder_keeps_its_ratio_and_an_unsteered_reference(family, stack, peft):
    where = {"prompt": "all", "steps": "none" if stack == "encoder" else "all"}
    site = {"at": {"layers": [0], "stack": stack}, "op": {"type": "scale", "factor": 0.5}, "where": where}
    spec = load_spec({"role": "policy", "sites": [site]})
    parts, prompts, ppo = job(family, peft=peft, steering=spec, sampling={"temperature": 0.8})
    scored = first_scored(parts, prompts, ppo)
    rollout = scored.rollout
    plain, steered = (Policy.of(model, tiny_tokenizer()) for model in (tiny(family), halved(tiny(family), stack)))
    with torch.no_grad():
        for i in range(len(rollout)):
            length = int(rollout.lengths_B[i])
            alone = lone_logprobs(steered, rollout, i).float()  # a fresh LoRA adds nothing
            for found in (scored.old_logprobs_BR, rollout.policy_logprobs_BR, rollout.behaviour_logprobs_BR):
                torch.testing.assert_close(found[i, :length], alone, atol=1e-5, rtol=0)
            base = lone_logprobs(plain, rollout, i).float()
            torch.testing.assert_close(scored.reference_logprobs_BR[i, :length], base, atol=1e-5, rtol=0)
    assert (scored.old_logprobs_BR - scored.reference_logprobs_BR)[rollout.action_mask_BR].abs().max() > 0.01
