"""The self-check passes what is right, and names the mistake in what is wrong: each is made here and put into a rollout."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from steerl.rollout.analysis.verify import verify
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.models import tiny, tiny_policy, tiny_tokenizer

PROMPTS = PromptBatch.of_ids([[5, 6, 7], [9, 8, 7, 6, 5, 4, 10, 11, 12], [20], [2, 0, 33, 2]], rows=[3, 1, 4, 15])
SETTINGS = Sampling(max_new_tokens=10, n=2, temperature=0.7, top_k=20, repetition_penalty=1.2, replay_mask=False)


def recorded(policy: Policy, policy_BR: torch.Tensor | None = None) -> Rollout:
    rollout, _ = Sampler(policy, SETTINGS).sample(PROMPTS)
    if policy_BR is None:
        return rollout
    wrong = torch.where(rollout.mask_BR, policy_BR[:, : rollout.response_width], torch.zeros(()))
    return dataclasses.replace(rollout, policy_logprobs_BR=wrong)


def forward(policy: Policy, rollout: Rollout, temperature: float = 0.7, shift: int = 0, **given: Any) -> torch.Tensor:
    """A plain padded pass with whatever of masks and positions it is given."""
    ids = torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1)
    with torch.no_grad():
        logits = policy.model(input_ids=ids, use_cache=False, **given).logits / temperature
    width = rollout.response_width
    end = ids.shape[1] - 1 - shift
    return logits[:, end - width : end].log_softmax(-1).gather(-1, rollout.response_BR[..., None])[..., 0]


@pytest.mark.parametrize("family", ("gpt2", "llama", "bloom", "bart", "t5", "mamba", "recurrent_gemma"))
def test_what_the_sampler_records_passes(family: str) -> None:
    policy = tiny_policy(family)
    report = verify(policy, recorded(policy), SETTINGS)
    assert report.passed and report.largest < 1e-5 and report.rows == 8 and len(report.lines()) == 1


def test_each_known_mistake_is_named() -> None:
    policy = tiny_policy("gpt2")
    rollout = recorded(policy)
    mask = torch.cat([rollout.prompt_mask_BP, torch.ones_like(rollout.mask_BR)], dim=1).long()
    place = (mask.cumsum(1) - 1).clamp(min=0)
    good = {"attention_mask": mask, "position_ids": place}
    assert verify(policy, recorded(policy, forward(policy, rollout, **good))).passed
    for name, wrong in {
        "positions": forward(policy, rollout, attention_mask=mask),
        "padding": forward(
            policy, rollout, attention_mask=torch.ones_like(mask), position_ids=torch.arange(mask.shape[1])[None]
        ),
        "alignment": forward(policy, rollout, shift=1, **good),
        "temperature": forward(policy, rollout, temperature=1.0, **good),
    }.items():
        report = verify(policy, recorded(policy, wrong))
        assert not report.passed and report.cause.startswith(name), (name, report.cause)
        assert report.worst_row in PROMPTS.rows and len(report.lines()) == 2


def test_a_leaking_generation_config_is_named() -> None:
    model = tiny("llama")
    policy = Policy.of(model, tiny_tokenizer())
    rollout = recorded(policy)
    model.generation_config.repetition_penalty, model.generation_config.top_k = 1.7, 0
    ids = torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1)
    raw = forward(policy, rollout)  # only for its shape
    for b in range(len(rollout)):
        start = int((~rollout.prompt_mask_BP[b]).sum())
        with torch.no_grad():
            logits = model(input_ids=ids[b : b + 1, start:], use_cache=False).logits[0]
        for t in range(rollout.response_width):
            scores = logits[rollout.prompt_width - start - 1 + t].clone()
            # the plain library's way: left pads are seen as well
            seen = ids[b, : rollout.prompt_width + t].unique()
            scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 1.7, scores[seen] / 1.7)
            raw[b, t] = (scores / 0.7).log_softmax(-1)[rollout.response_BR[b, t]]
    report = verify(policy, recorded(policy, raw))
    assert not report.passed and report.cause.startswith("a leaking generation config")


def test_dropout_dtype_and_other_weights_are_named() -> None:
    model = tiny("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    policy = Policy.of(model, tiny_tokenizer())
    rollout = recorded(policy)
    model.train()
    mask = torch.cat([rollout.prompt_mask_BP, torch.ones_like(rollout.mask_BR)], dim=1).long()
    noisy = forward(policy, rollout, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    assert verify(policy, recorded(policy, noisy)).cause.startswith("dropout")
    assert model.training
    half = Policy.of(tiny("llama").to(torch.bfloat16), tiny_tokenizer())
    assert verify(half, recorded(half), tolerance=1e-4).cause.startswith("dtype: bfloat16")
    assert verify(half, recorded(half)).passed and half.model.dtype == torch.bfloat16
    other = tiny_policy("llama", seed=1)
    assert verify(other, recorded(tiny_policy("llama"))).cause.startswith("other weights")


def test_the_behaviours_law_is_checked_where_the_settings_are_given() -> None:
    policy = tiny_policy("llama")
    rollout = recorded(policy)
    assert verify(policy, rollout, SETTINGS).passed
    report = verify(policy, rollout, dataclasses.replace(SETTINGS, repetition_penalty=1.0))
    assert not report.passed and report.cause.startswith("behaviour")


def test_weights_are_the_same_bits_afterwards() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        policy = Policy.of(tiny("llama").to(dtype), tiny_tokenizer())
        before = copy.deepcopy(policy.model.state_dict())
        verify(policy, recorded(policy))
        assert all(
            torch.equal(before[name], value) and value.dtype == before[name].dtype
            for name, value in policy.model.state_dict().items()
        )


def test_an_empty_rollout_passes() -> None:
    policy = tiny_policy("gpt2")
    assert verify(policy, recorded(policy).select([])).passed


def test_steered_rows_pass_with_the_steering_that_drew_them_and_another_is_named() -> None:
    """Two sites by columns, draws and noise, at any seed; and the cause says what was given instead."""
    policy = tiny_policy("llama")
    sites: list[dict[str, Any]] = [
        {"at": {"layers": [0]}, "vector": [0.3, -0.2] * 16, "strength": {"column": "much"}},
        {"at": {"layers": [1]}, "op": {"type": "noise"}, "strength": {"dist": "uniform", "high": 3.0}},
    ]
    sites[1]["where"] = {"prompt": {"column": "spots"}}
    columns = {"much": [1.0, 2.0, 0.5, 1.5], "spots": [[0], [1, 2], [0], [3]]}
    spec = {"sites": sites, "fraction": 0.7}
    steering = Steering(policy.core, spec, policy.tokenizer, seed=4)
    settings = Sampling(max_new_tokens=6, n=2)
    rollout, _ = Sampler(policy, settings, steering).sample(dataclasses.replace(PROMPTS, columns=columns), step=2)
    for seed in (4, 5):
        assert verify(policy, rollout, settings, steering=Steering(policy.core, spec, policy.tokenizer, seed)).passed
    sites[0]["vector"] = [0.1, -0.2] * 16
    for other in (Steering(policy.core, spec, policy.tokenizer, seed=4), None):
        report = verify(policy, rollout, settings, steering=other)
        label = "none" if other is None else other.label
        assert not report.passed and f"taken under {steering.label}, and this pass under {label}" in report.cause
