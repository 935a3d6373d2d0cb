"""Rows through the head in chunks: the numbers and gradients of all logits at once, and who is left to see the logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.ragged import Kept
from steerl.rollout.scoring import chunked_head, logprobs
from steerl.rollout.scoring.alignment import forward_inputs
from steerl.rollout.scoring.logit_postprocessing import logit_postprocessing
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.models import tiny_policy

LORA_HEAD = {"peft_type": "LORA", "r": 2, "target_modules": ["lm_head"]}


def rolled(policy: Policy, **settings: Any) -> Rollout:
    batch = PromptBatch.of_ids([[5, 6, 7], [9, 8, 7, 6, 5, 4, 10], [20], [2, 0, 33, 2]])
    rollout = Sampler(policy, Sampling(**{"max_new_tokens": 6, "temperature": 0.7, **settings})).sample(batch)[0]
    lengths_B = torch.tensor([3, 6, 1, 5]).minimum(rollout.lengths_B)
    kept = None
    if rollout.kept is not None:
        rows = zip(rollout.kept.lists(), lengths_B.tolist(), strict=True)
        kept = Kept.of_lists([[ids if t < n else [] for t, ids in enumerate(row)] for row, n in rows])
    return dataclasses.replace(rollout, lengths_B=lengths_B, action_mask_BR=None, kept=kept)


def loss_of(logprobs_BR: Tensor, entropy_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """Every token pulls with a weight of its own, so that a mix-up of rows shows."""
    weight_BR = torch.linspace(-1.0, 2.0, mask_BR.numel()).view(mask_BR.shape)
    return torch.where(mask_BR, weight_BR * (logprobs_BR + 0.3 * entropy_BR), 0.0).sum()


def all_at_once(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(log-probs, entropies) in float64, of all logits of each row by itself; over the ids that it kept, where it did."""
    found = []
    for i in range(len(rollout)):
        row = rollout.select([i]).trim()
        logits_RV = policy.model(**forward_inputs(policy, row)).logits[0, -row.response_width :].double()
        sets = [None] * len(logits_RV) if row.kept is None else row.kept.lists()[0]
        laws = [(logits_RV[t, ids or range(64)] / rollout.temperature).log_softmax(-1) for t, ids in enumerate(sets)]
        places = [ids.index(int(row.response_BR[0, t])) if ids else int(row.response_BR[0, t]) for t, ids in enumerate(sets)]
        both_R2 = torch.stack([torch.stack([law[at], -(law.exp() * law).sum()]) for law, at in zip(laws, places, strict=True)])
        found.append(torch.nn.functional.pad(both_R2, (0, 0, 0, rollout.response_width - row.response_width)))
    return torch.stack(found)[..., 0], torch.stack(found)[..., 1]


def gradients(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    named = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    return dict(
        zip(named, torch.autograd.grad(loss, list(named.values()), materialize_grads=True, allow_unused=True), strict=True)
    )


def with_lora(policy: Policy) -> Policy:
    from steerl.rollout.model import adapters

    model = adapters.add(policy.model, LORA_HEAD)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    return policy.with_model(model)


TRUNCATED = {"temperature": 1.2, "top_k": 30, "top_p": 0.9}


# tied (gpt2), untied (llama), scaled before (t5), biased (gptj), biased after, scaled and capped after, an adapter on the head
@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "t5", "gptj", "bart", "gemma2", "cohere", "granite", "recurrent_gemma", "mamba", "llama+lora",
     "gpt2+kept", "gemma2+kept", "bart+kept", "llama+lora+kept"]
)  # fmt: skip
@pytest.mark.parametrize("rows", [3, 10_000])
def test_chunks_give_the_numbers_and_gradients_of_all_logits_at_once(family, rows, monkeypatch):
    overrides = {"bart": {}, "granite": {"logits_scaling": 3.0}, "gemma2": {"final_logit_softcapping": 2.0}}
    family, *more = family.split("+")
    policy = tiny_policy(family, **overrides.get(family, {}))
    if family == "bart":
        policy.model.final_logits_bias.normal_(generator=torch.Generator().manual_seed(0))
    if "lora" in more:
        policy = with_lora(policy)
    rollout = rolled(policy, **(TRUNCATED if "kept" in more else {}))
    assert (rollout.kept is not None) == ("kept" in more)
    assert chunked_head.readable(policy) is not None
    monkeypatch.setitem(chunked_head.CHUNK, "cpu", rows * policy.vocab_size)
    expected_logprobs, expected_entropy = all_at_once(policy, rollout)
    expected = gradients(policy, loss_of(expected_logprobs, expected_entropy, rollout.mask_BR))
    found = teacher_forced(policy, rollout)
    mask_BR = rollout.mask_BR
    assert (found.logprobs_BR - expected_logprobs)[mask_BR].abs().max() < 1e-5
    assert (found.entropy_BR - expected_entropy)[mask_BR].abs().max() < 1e-5
    assert not found.logprobs_BR[~mask_BR].any() and not found.entropy_BR[~mask_BR].any()
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients(policy, loss_of(found.logprobs_BR, found.entropy_BR, mask_BR)).items():
        assert torch.allclose(gradient, expected[name].float(), atol=1e-5 * scale), name
    assert torch.equal(teacher_forced(policy, rollout, want_entropy=False).logprobs_BR, found.logprobs_BR)
    assert "forward" not in vars(policy.core.get_output_embeddings())


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_all_logits_at_once_are_masked_alike(family, monkeypatch):
    """Where somebody sees the logits; and where all log-probs are asked for, minus infinity for what was not kept."""
    policy = tiny_policy(family)
    rollout = rolled(policy, **TRUNCATED)
    expected_logprobs, expected_entropy = all_at_once(policy, rollout)
    expected = gradients(policy, loss_of(expected_logprobs, expected_entropy, rollout.action_mask_BR))
    monkeypatch.setattr(chunked_head, "enabled", False)
    found = teacher_forced(policy, rollout)
    for one, other in ((found.logprobs_BR, expected_logprobs), (found.entropy_BR, expected_entropy)):
        assert (one - other)[rollout.action_mask_BR].abs().max() < 1e-5
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in gradients(policy, loss_of(found.logprobs_BR, found.entropy_BR, rollout.action_mask_BR)).items():
        assert torch.allclose(gradient, expected[name].float(), atol=1e-5 * scale), name
    everything = teacher_forced(policy, rollout, want_all=True).all_logprobs_BRV
    for row, own in zip(everything, rollout.kept.lists(), strict=True):
        for law, ids in zip(row, own, strict=True):
            assert not ids or law.isfinite().nonzero()[:, 0].tolist() == ids


def test_a_model_that_cuts_its_logits_keeps_its_own_way():
    """ProphetNet predicts several tokens ahead and cuts the other streams off its logits."""
    from tests.models import tiny, tiny_tokenizer

    policy = Policy.of(tiny("prophetnet"), tiny_tokenizer())
    assert logit_postprocessing(policy) is None and chunked_head.readable(policy) is None


def test_a_new_head_is_observed_anew():
    policy = tiny_policy("gpt2")
    assert logit_postprocessing(policy) is not None

    class Doubling(torch.nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    policy.model.lm_head = Doubling(32, 64)
    rollout = rolled(policy)
    expected_BR = all_at_once(policy, rollout)[0]
    assert (teacher_forced(policy, rollout).logprobs_BR - expected_BR)[rollout.mask_BR].abs().max() < 1e-5


@pytest.mark.parametrize("where", ["head", "model"])
def test_a_users_hook_sees_the_logits(where):
    policy = tiny_policy("llama")
    rollout = rolled(policy)
    seen = []
    module = policy.model if where == "model" else policy.model.lm_head
    hook = module.register_forward_hook(
        lambda module, inputs, output: seen.append(output.shape if where == "head" else output.logits.shape)
    )
    plain = teacher_forced(policy, rollout).logprobs_BR
    hook.remove()
    assert [tuple(shape) for shape in seen] == [(4, rollout.response_width, 64)]
    assert (teacher_forced(policy, rollout).logprobs_BR - plain).abs().max() < 1e-5 and len(seen) == 1


def test_steering_on_the_head_edits_whole_logits(monkeypatch):
    """A site on the head or after it has rows and columns to go by."""
    policy = tiny_policy("llama")
    rollout = rolled(policy)
    site = {"at": {"module": "lm_head"}, "vector": [1.0] * 8 + [0.0] * 56, "strength": 3.0, "where": {"steps": [1, 2]}}
    steering = Steering(policy.model, {"sites": [site]}, policy.tokenizer)
    rollout = dataclasses.replace(rollout, steering=steering.name, strength_BK=torch.ones(4, 1), positions_BKN=None)
    steered = teacher_forced(policy, rollout, steering=steering).logprobs_BR
    plain = teacher_forced(policy, rollout).logprobs_BR
    monkeypatch.setattr(chunked_head, "enabled", False)
    expected = teacher_forced(policy, rollout, steering=steering).logprobs_BR
    assert torch.equal(steered, expected) and (steered - plain)[:, 1].abs().max() > 0.1
    assert (steered - plain)[:, 0].abs().max() < 1e-5


def test_autocast_numbers_are_float32_of_the_same_half_precision_logits():
    policy = tiny_policy("llama")
    rollout = rolled(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = teacher_forced(policy, rollout)
        expected, _ = all_at_once(policy, rollout)
    assert found.logprobs_BR.dtype == torch.float32
    mask_BR = rollout.mask_BR
    assert (found.logprobs_BR - expected)[mask_BR].abs().max() < 0.1  # bf16 rounds another layout otherwise
    loss_of(found.logprobs_BR, found.entropy_BR, mask_BR).backward()
    found_grad = policy.model.lm_head.weight.grad.clone()
    policy.model.zero_grad()
    loss_of(expected, torch.zeros_like(expected), mask_BR).backward()
    assert found_grad.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found_grad.flatten(), policy.model.lm_head.weight.grad.flatten(), dim=0) > 0.9


def test_tokens_of_no_probability_count_nothing():
    """A head whose bias rules tokens out: no NaN in the entropy, nor in a gradient."""
    policy = tiny_policy("gptj")
    rollout = rolled(policy)
    free = [i for i in range(64) if i not in rollout.response_BR.tolist()[0] and not (rollout.response_BR == i).any()]
    with torch.no_grad():
        policy.model.lm_head.bias[free] = -torch.inf
    found = teacher_forced(policy, rollout)
    loss_of(found.logprobs_BR, found.entropy_BR, rollout.mask_BR).backward()
    assert found.entropy_BR.isfinite().all() and policy.model.lm_head.weight.grad.isfinite().all()
    assert not policy.model.lm_head.weight.grad[free].any()


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_neo", "mistral", "mamba", "gemma2"])
def test_rows_from_their_first_token_on_are_the_padded_ones(family, monkeypatch):
    policy = tiny_policy(family)
    rollout = rolled(policy)
    with torch.no_grad():
        found = teacher_forced(policy, rollout, want_hidden=True)
        monkeypatch.setattr(logprobs, "aligned", False)
        padded = teacher_forced(policy, rollout, want_hidden=True)
    assert (found.logprobs_BR - padded.logprobs_BR).abs().max() < 1e-5
    difference = torch.where(rollout.mask_BR[..., None], found.hidden_BRD - padded.hidden_BRD, 0.0)
    assert difference.abs().max() < 1e-4


def test_hooks_of_our_own_are_not_a_users():
    """Those that place virtual tokens read no logits: the head goes on in chunks."""
    from steerl.rollout.model import adapters

    policy = tiny_policy("llama")
    policy = policy.with_model(adapters.add(policy.model, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
    assert chunked_head.readable(policy) is not None
    policy.core.register_forward_hook(lambda module, inputs, output: None)
    assert chunked_head.readable(policy) is None
