"""Logits and tokens lined up (exactness rows 5 to 8): token_logprobs, entropy, teacher-forced passes, hidden states, gradients."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import entropy, teacher_forced, token_logprobs
from steerl.rollout.types import Rollout
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.rollout import definitions
from tests.rollout.definitions import alone_logits, real_prompt, real_response

FAMILIES = (
    "gpt2",
    "llama",
    "opt",
    "bloom",
    "gpt_neox",
    "gemma2",
    "mistral",
    "cohere",
    "mamba",
    "recurrent_gemma",
    "t5",
    "bart",
    "mbart",
)


def rolled(policy: Policy, **settings: Any) -> Rollout:
    batch = PromptBatch.of_ids([[5, 6, 7], [9, 8, 7, 6, 5, 4, 10], [20], [2, 0, 33, 2]])
    return Sampler(
        policy, Sampling(**{"max_new_tokens": 8, "temperature": 0.7, "stop_ids": [30, 31, 32, 33], **settings})
    ).sample(batch)[0]


def test_pick_and_entropy_are_the_float64_loop() -> None:
    logits = torch.randn(2, 3, 11) * 4
    logits[0, 0, 5] = -math.inf
    tokens = torch.tensor([[1, 2, 3], [10, 0, 4]])
    for temperature in (1.0, 0.3, 2.0):
        for dtype in (torch.float32, torch.bfloat16):
            given = logits.to(dtype)
            for b in range(2):
                for t in range(3):
                    scores = [x / temperature for x in given[b, t].double().tolist()]
                    expected = definitions.log_softmax(scores)[int(tokens[b, t])]
                    assert abs(float(token_logprobs(given, tokens, temperature)[b, t]) - expected) < 1e-5
                    assert abs(float(entropy(given, temperature)[b, t]) - definitions.entropy(scores)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_a_teacher_forced_pass_equals_rows_alone_and_the_samplers_own_numbers(family: str) -> None:
    policy = tiny_policy(family)
    rollout = rolled(policy)
    with torch.no_grad():
        forced = teacher_forced(policy, rollout)
        hot = teacher_forced(policy, rollout, temperature=2.0)
        split = teacher_forced(policy, rollout, max_rows=3)
    assert (forced.logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5
    assert rollout.entropy_BR is not None and (forced.entropy_BR - rollout.entropy_BR).abs().max() < 1e-5
    assert (split.logprobs_BR - forced.logprobs_BR).abs().max() < 1e-5
    for b in range(len(rollout)):
        response = real_response(rollout, b)
        logits = alone_logits(policy.model, real_prompt(rollout, b), response, rollout.start_ids)
        for t, token in enumerate(response):
            for temperature, found in ((0.7, forced), (2.0, hot)):
                scores = [x / temperature for x in logits[t]]
                assert abs(float(found.logprobs_BR[b, t]) - definitions.log_softmax(scores)[token]) < 1e-5
                assert abs(float(found.entropy_BR[b, t]) - definitions.entropy(scores)) < 1e-5
        assert not forced.logprobs_BR[b, len(response) :].any() and not forced.entropy_BR[b, len(response) :].any()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_whose_logits_predict_each_token(family: str) -> None:
    """The head on hidden_BRD gives the log-probs: so V(s_t) reads the state that predicts action t."""
    policy = tiny_policy(family)
    rollout = rolled(policy, temperature=1.0)
    with torch.no_grad():
        forced = teacher_forced(policy, rollout, want_hidden=True)
        only = teacher_forced(policy, rollout, want_hidden=True, want_logprobs=False)
        logits = policy.model.get_output_embeddings()(forced.hidden_BRD)
    assert forced.hidden_BRD is not None and forced.hidden_BRD.shape == (4, rollout.response_width, 32)
    assert torch.equal(only.hidden_BRD, forced.hidden_BRD)
    config = policy.model.config  # what a model does to its logits after the head
    if family == "gemma2":
        logits = torch.tanh(logits / config.final_logit_softcapping) * config.final_logit_softcapping
    if family == "recurrent_gemma":
        logits = torch.tanh(logits / config.logits_soft_cap) * config.logits_soft_cap
    if family == "cohere":
        logits = logits * config.logit_scale
    if hasattr(policy.model, "final_logits_bias"):
        logits = logits + policy.model.final_logits_bias
    found = torch.where(rollout.mask_BR, token_logprobs(logits, rollout.response_BR), torch.zeros(()))
    assert (found - forced.logprobs_BR).abs().max() < 1e-5


@pytest.mark.parametrize("family", ("gpt2", "llama", "t5", "bart", "mamba", "recurrent_gemma"))
def test_gradients_equal_those_of_rows_alone(family: str) -> None:
    policy = tiny_policy(family)
    rollout = rolled(policy)
    forced = teacher_forced(policy, rollout)
    assert forced.logprobs_BR.requires_grad
    forced.logprobs_BR.sum().backward()
    batch = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}
    policy.model.zero_grad()
    for b in range(len(rollout)):
        prompt, response = real_prompt(rollout, b), real_response(rollout, b)
        if rollout.start_ids:
            decoder = torch.tensor([[*rollout.start_ids, *response]])
            logits = policy.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder, use_cache=False).logits[0]
            logits = logits[len(rollout.start_ids) - 1 : -1]
        else:
            logits = policy.model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        (logits / 0.7).log_softmax(-1).gather(-1, torch.tensor(response)[:, None]).sum().backward()
    for name, parameter in policy.model.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max() + 1e-1
            assert (parameter.grad - batch[name]).abs().max() <= 2e-5 * scale, name


def test_wider_padding_row_order_and_bystanders_change_nothing() -> None:
    policy = tiny_policy("llama")
    rollout = rolled(policy)
    with torch.no_grad():
        base = teacher_forced(policy, rollout).logprobs_BR
        wide = teacher_forced(policy, rollout.pad_to(rollout.prompt_width + 5, rollout.response_width + 4)).logprobs_BR
        some = teacher_forced(policy, rollout.select([3, 0])).logprobs_BR
    assert (wide[:, : base.shape[1]] - base).abs().max() < 1e-5 and not wide[:, base.shape[1] :].any()
    assert (some - base[[3, 0]]).abs().max() < 1e-5


def test_what_lies_beyond_a_rows_end_is_not_read() -> None:
    policy = tiny_policy("gpt2")
    rollout = rolled(policy)
    assert not rollout.mask_BR.all()
    other = dataclasses.replace(rollout, response_BR=torch.where(rollout.mask_BR, rollout.response_BR, torch.tensor(50)))
    other = dataclasses.replace(other, prompt_BP=torch.where(rollout.prompt_mask_BP, rollout.prompt_BP, torch.tensor(51)))
    with torch.no_grad():
        assert (teacher_forced(policy, other).logprobs_BR - teacher_forced(policy, rollout).logprobs_BR).abs().max() < 1e-6


def test_dropout_is_off_and_training_modes_come_back() -> None:
    model = tiny("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    policy = Policy.of(model, tiny_tokenizer())
    rollout = rolled(policy)
    model.train()
    forced = teacher_forced(policy, rollout)
    assert (forced.logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5 and model.training


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("family", ("gpt2", "bart", "llama"))
def test_no_dropout_keeps_gradient_checkpointing(family: str) -> None:
    """Checkpointed layers keep their training flag, and lose their dropout: same numbers, same gradients."""
    rates = {"gpt2": {"resid_pdrop": 0.3, "attn_pdrop": 0.3}, "bart": {"dropout": 0.3, "attention_dropout": 0.3}, "llama": {}}[
        family
    ]
    policy = tiny_policy(family, **rates)
    rollout = rolled(policy)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.model.gradient_checkpointing_enable()
        policy.model.train()
        policy.model.zero_grad()
        with no_dropout(policy.model):
            forced = teacher_forced(policy, rollout)
            forced.logprobs_BR.sum().backward()
        assert policy.model.training
        assert (forced.logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5
        grads.append({name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None})
    assert all((grads[0][name] - grads[1][name]).abs().max() < 1e-4 for name in grads[0])


def test_a_model_that_does_not_call_its_head_on_one_row_of_states_cannot_give_hidden_states() -> None:
    policy = tiny_policy("gpt2")
    policy.model.set_output_embeddings(torch.nn.Linear(32, 64))
    rollout = rolled(tiny_policy("gpt2"))
    policy.model.get_output_embeddings = lambda: torch.nn.Linear(32, 64)
    with pytest.raises(UserError, match="does not call its output embedding"):
        teacher_forced(policy, rollout, want_hidden=True)


def test_an_empty_rollout_scores_to_nothing() -> None:
    policy = tiny_policy("gpt2")
    empty = rolled(policy).select([])
    assert teacher_forced(policy, empty).logprobs_BR.shape[0] == 0


def test_a_mask_that_is_not_needed_is_not_warned_of() -> None:
    """Rows begin at column 0 and have padding behind them: transformers would say that a mask is missing."""
    from transformers.utils import logging as theirs

    policy, seen, handler = tiny_policy("gpt2"), [], logging.Handler()
    policy.core.config.pad_token_id = policy.pad_id
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    ending = Sampling(max_new_tokens=8, stop_ids=list(range(3, 24)), n=8)
    rollout, _ = Sampler(policy, ending).sample(PromptBatch.of_ids([[5, 6, 7], [8]]))
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        theirs.warning_once.cache_clear()
        teacher_forced(policy, rollout)
        assert seen == []
        theirs.warning_once.cache_clear()
        policy.core(input_ids=torch.tensor([[policy.pad_id, 5, 6]]))  # somebody else's pass
        assert len(seen) == 1
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
