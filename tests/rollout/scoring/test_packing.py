"""Rows one after another in one pass, against each row by itself through the plain model; and who is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model import adapters
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring import chunked_head
from steerl.rollout.scoring.alignment import Packing
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.models import tiny_policy
from tests.rollout.definitions import entropy, real_prompt, real_response
from tests.rollout.steering.helpers import vector

FAMILIES = ("gpt2", "llama", "gemma2", "mistral", "mixtral", "gpt_neox")


def ragged(**fields: Any) -> Rollout:
    """Prompts and responses of one to many tokens, longer than windows are; gaps; and columns that no row needs."""
    prompts = [[5], [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [7, 8, 9], [20], [3, 2, 0, 33]]
    responses = [[7, 2], [7, 8, 3, 9, 9, 10, 11, 12, 13, 14, 15, 16, 17], [9], [5, 6, 7, 8], [30]]
    actions = [[1, 1], [1, 1, 0, 0, *[1] * 9], [1], [1, 0, 0, 1], [0]]
    return Rollout.of_ids(prompts, responses, action_mask_BR=actions, temperature=0.7, **fields).pad_to(15, 16)


def lone(model: Any, rollout: Rollout, row: int) -> tuple[Tensor, Tensor]:
    """(log-probs of all tokens (n, V), the states before the head (n, D)) that predict a row's response: the row by itself."""
    caught: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    prompt, response = real_prompt(rollout, row), real_response(rollout, row)
    logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    handle.remove()
    return (logits.double() / rollout.temperature).log_softmax(-1), caught[0][0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("in_chunks", [True, False], ids=["chunks", "logits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_rows_alone(family: str, in_chunks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs, entropies, what a value reads, and the gradients of all three."""
    monkeypatch.setattr(chunked_head, "enabled", in_chunks)
    policy, rollout = tiny_policy(family), ragged()
    assert policy.packing_problem() is None
    weights = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    draw = torch.Generator().manual_seed(0)
    seen: list[Tensor] = []
    handle = policy.core.get_input_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    forced = teacher_forced(policy, rollout, want_hidden=True, packed=True)
    handle.remove()
    assert seen[-1].shape == (1, 2 + 24 + 3 + 4 + 4)  # every token but each row's last, and nothing else
    slope_BR, bend_BR = (torch.randn(5, 16, generator=draw) for _ in range(2))
    slope_BRD = torch.randn(5, 16, 32, generator=draw) * rollout.action_mask_BR[..., None]
    total = (slope_BR * forced.logprobs_BR + bend_BR * forced.entropy_BR).sum() + (slope_BRD * forced.hidden_BRD).sum()
    packed = torch.autograd.grad(total, list(weights.values()))
    policy.model.zero_grad()
    for row in range(5):
        logprobs_nV, hidden_nD = lone(policy.model, rollout, row)
        expected = torch.zeros((), dtype=torch.double)
        for t, token in enumerate(real_response(rollout, row)):
            if not rollout.action_mask_BR[row, t]:
                assert forced.logprobs_BR[row, t] == 0 and forced.entropy_BR[row, t] == 0
                continue
            logprob, bend = logprobs_nV[t, token], -(logprobs_nV[t].exp() * logprobs_nV[t]).sum()
            assert abs(float((forced.logprobs_BR[row, t] - logprob).detach())) < 1e-5
            assert abs(float(forced.entropy_BR[row, t].detach()) - entropy(logprobs_nV[t].tolist())) < 1e-5
            assert (forced.hidden_BRD[row, t] - hidden_nD[t]).abs().max() < 1e-5
            expected = expected + slope_BR[row, t] * logprob + bend_BR[row, t] * bend
            expected = expected + (slope_BRD[row, t] * hidden_nD[t]).sum()
        if expected.requires_grad:
            expected.backward()
    for (name, parameter), found in zip(weights.items(), packed, strict=True):
        one = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert (one - found).abs().max() <= 1e-5 * (one.abs().max() + 1), name


def test_what_could_be_drawn_goes_along() -> None:
    policy = tiny_policy("llama")
    rollout = Sampler(policy, Sampling(max_new_tokens=6, top_k=4, stop_ids=[30, 31, 32])).sample(
        PromptBatch.of_ids([[5, 6, 7], [9, 8, 7, 6, 5], [20]])
    )[0]
    with torch.no_grad():
        forced = teacher_forced(policy, rollout, packed=True)
        every = teacher_forced(policy, rollout, packed=True, want_all=True)
    assert rollout.kept is not None and (forced.logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5
    assert (every.logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5
    kept = every.all_logprobs_BRV.isfinite().sum(-1)[rollout.action_mask_BR]
    assert every.all_logprobs_BRV is not None and set(kept.tolist()) == {4}


def test_rows_beyond_a_length_have_a_pass_of_their_own() -> None:
    """longrope: the longest position of a pass changes all of its rows."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
    policy = tiny_policy("phi3", rope_parameters=scaling, original_max_position_embeddings=12)
    assert policy.capabilities.boundary == 12 and policy.packing_problem() is None
    rollout = ragged()
    with torch.no_grad():
        forced = teacher_forced(policy, rollout, packed=True)
        for row in range(5):
            one = policy.model(input_ids=torch.tensor([real_prompt(rollout, row) + real_response(rollout, row)[:-1]])).logits[0]
            n = len(real_response(rollout, row))
            expected = (one[-n:] / 0.7).log_softmax(-1)[range(n), real_response(rollout, row)]
            assert torch.allclose(
                forced.logprobs_BR[row, :n], torch.where(rollout.action_mask_BR[row, :n], expected, 0.0), atol=1e-5
            )


@pytest.mark.parametrize(
    ("family", "told"),
    [
        ("t5", "encoder"),
        ("mamba", "takes no positions"),
        ("bloom", "takes no positions"),
        ("opt", "does not keep them apart"),
        ("falcon", "does not keep them apart"),
        ("recurrent_gemma", "does not keep them apart"),
        ("jamba", "does not keep them apart"),
        ("lfm2", "does not keep them apart"),
    ],
)
def test_models_that_run_on_into_the_next_row_are_refused(family: str, told: str) -> None:
    problem = tiny_policy(family).packing_problem()
    assert problem is not None and told in problem and "\n" not in problem


def test_virtual_tokens_and_what_no_short_row_shows_are_refused() -> None:
    policy = tiny_policy("llama")
    prompted = policy.with_model(adapters.add(policy.model, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
    assert "virtual tokens" in str(prompted.packing_problem())
    chunked = tiny_policy("llama", attention_chunk_size=8192)
    assert "chunks" in str(chunked.packing_problem())


SITES: dict[str, dict[str, Any]] = {
    "everywhere": {"where": {"prompt": "all", "steps": "all"}},
    "places": {"where": {"prompt": [0, -2], "steps": [1, 2]}},
    "last": {"where": {"prompt": "last", "steps": {"every": 2}, "exclude": {"token_ids": [5, 9, 12]}}},
    "ramp": {"where": {"prompt": "none", "steps": "all", "ramp": {"type": "cosine", "over": 4}}},
    "noise": {"op": {"type": "noise"}, "where": {"prompt": "all", "steps": "all"}},
    "gate": {"gate": {"layer": 0, "vector": vector(5), "open_above": 0.0}, "where": {"prompt": "all", "steps": "all"}},
}


@pytest.mark.parametrize("kind", SITES)
def test_steered_rows_are_steered_at_their_own_places(kind: str) -> None:
    policy = tiny_policy("llama")
    site = {"at": {"layers": [1]}, "strength": 1.5, **({} if kind == "noise" else {"vector": vector(3)}), **SITES[kind]}
    steering = Steering(policy.core, {"role": "policy", "sites": [site]}, policy.tokenizer)
    strengths = [[1.5], [-0.5], [1.0], [2.0], [0.0]]
    rollout = ragged(steering=steering.label, strength_BK=strengths, policy_step_B=[0] * 5)
    packed = teacher_forced(policy, rollout, steering=steering, packed=True)
    plain = teacher_forced(policy, rollout, packed=True).logprobs_BR
    weight = policy.core.model.embed_tokens.weight
    (gradient,) = torch.autograd.grad(packed.logprobs_BR.sum(), weight)
    alone = [teacher_forced(policy, rollout.select([row]).trim(), steering=steering) for row in range(5)]
    (expected,) = torch.autograd.grad(sum(one.logprobs_BR.sum() for one in alone), weight)
    for row, one in enumerate(alone):
        width = one.logprobs_BR.shape[1]
        assert (packed.logprobs_BR[row, :width] - one.logprobs_BR[0]).abs().max() < 1e-5
    assert (gradient - expected).abs().max() < 1e-5 * (expected.abs().max() + 1)
    moved_B = (packed.logprobs_BR - plain).abs().amax(1) > 1e-3
    assert moved_B.sum() >= 2 and not moved_B[4]


def test_where_each_token_is() -> None:
    rollout = Rollout.of_ids([[5, 6], [7]], [[1, 2, 3], [4]])
    packing = Packing.of(rollout)
    ids = torch.cat([rollout.prompt_BP, rollout.response_BR[:, :-1]], dim=1)
    assert packing.packed(ids[..., None])[0, :, 0].tolist() == [5, 6, 1, 2, 7]
    assert packing.unpacked(torch.tensor([[[5], [6], [1], [2], [7]]]))[1, 1, 0] == 7
