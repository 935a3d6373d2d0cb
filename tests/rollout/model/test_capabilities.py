"""What a model does with padding and caches is seen on the model; models without a causal law are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from steerl.rollout.chat.completion import complete
from steerl.rollout.chat.confidence import given
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.model.capabilities import Capabilities
from steerl.rollout.model.language_model import forward_arguments
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring import logprobs
from steerl.rollout.scoring.logprobs import teacher_forced
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.rollout.definitions import alone_logits, log_softmax, real_prompt, real_response, worst_gap

ORDINARY = Capabilities(padding=True, caching=True, row_selection=True, pads_in_text=True)
EXPECTED = {
    "gpt2": ORDINARY,
    "mistral": ORDINARY,
    "mamba": ORDINARY,
    "t5": ORDINARY,
    "bart": ORDINARY,
    "m2m_100": Capabilities(padding=True, caching=True, row_selection=True, pads_in_text=False),
    "recurrent_gemma": Capabilities(padding=False, caching=False, row_selection=True, pads_in_text=True),
    "rwkv": Capabilities(padding=False, caching=False, row_selection=True, pads_in_text=True),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_seen(family: str) -> None:
    assert tiny_policy(family).capabilities == EXPECTED[family]


def test_a_model_that_reads_its_padding_is_seen_whatever_it_is_called() -> None:
    model = tiny("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None, "position_ids": None})
    assert not Policy.of(model, tiny_tokenizer()).capabilities.padding


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_noise_is_not_taken_for_a_habit(dtype: torch.dtype) -> None:
    for family in ("gpt2", "llama", "bart"):
        policy = Policy.of(tiny(family).to(dtype), tiny_tokenizer())
        assert policy.capabilities.padding and policy.capabilities.caching


def test_a_context_of_a_few_tokens_is_enough() -> None:
    for context in (1, 2, 4, 9):
        model = tiny("gpt2", n_positions=context)
        assert Policy.of(model, tiny_tokenizer()).capabilities.padding


def test_models_that_look_ahead_are_refused() -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(UserError, match="looks ahead"):
        _ = Policy.of(model.eval(), tiny_tokenizer()).capabilities
    with pytest.raises(UserError, match="looks ahead"):
        _ = tiny_policy("prophetnet").capabilities


def test_modes_are_put_back() -> None:
    model = tiny("gpt2")
    model.train()
    _ = Policy.of(model, tiny_tokenizer()).capabilities
    assert all(module.training for module in model.modules())


def test_roberta_like_models_count_from_behind_their_pad() -> None:
    """Explicit positions begin where the model's own do, and the context is as much shorter."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(
        "xlm-roberta", vocab_size=64, is_decoder=True, max_position_embeddings=34, pad_token_id=1, **sizes
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    policy = Policy.of(model, tiny_tokenizer())
    assert policy.capabilities.position_offset == 2 and policy.token_budget == 32
    settings = Sampling(max_new_tokens=20)
    rollout, _ = Sampler(policy, settings).sample(PromptBatch.of_ids([[5, 6, 7], [8] * 12]))
    assert not (rollout.response_BR == 1).any()
    assert worst_gap(model, rollout, settings) < 1e-5
    assert (teacher_forced(policy, rollout).logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5
    with pytest.raises(UserError, match="do not fit the model's context of 32"):
        Sampler(policy, settings).sample(PromptBatch.of_ids([[8] * 13]))


def test_a_cache_that_is_wrong_beyond_a_short_window_is_not_used() -> None:
    """Moshi's own, where the prompt is longer than its window: seen with rows that are longer than it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8, "ffn_dim": 64}
    config = AutoConfig.for_model("moshi", vocab_size=64, sliding_window=6, max_position_embeddings=128, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    policy, settings = Policy.of(model, tiny_tokenizer()), Sampling(max_new_tokens=6)
    rollout, _ = Sampler(policy, settings).sample(PromptBatch.of_ids([[5, 6, 7], list(range(8, 18))]))
    assert worst_gap(model, rollout, settings) < 1e-5


# -- laws that depend on the call ---------------------------------------------------------------------------------------

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 9.0, 20.0],
    "original_max_position_embeddings": 24,
}


def longrope() -> Policy:
    return tiny_policy("phi3", original_max_position_embeddings=24, rope_parameters=LONGROPE)


@pytest.mark.parametrize(
    ("prompts", "new"),
    [([3, 12, 14], 10), ([3, 30, 12, 40], 10), ([25, 40], 6), ([1, 100], 23)],
)
def test_a_law_that_changes_with_length_is_each_rows_own(prompts: list[int], new: int) -> None:
    """longrope: rows within the 24 tokens have the short factors whatever is beside them, rows beyond them the long ones."""
    policy, settings = longrope(), Sampling(max_new_tokens=new, n=2)
    assert policy.capabilities.boundary == 24 and policy.capabilities.padding and policy.capabilities.caching
    batch = PromptBatch.of_ids([list(range(5 + k, 5 + length + k)) for k, length in enumerate(prompts)])
    batch = PromptBatch.of_ids([[i % 50 + 5 for i in ids] for ids in batch.ids])
    rollout, _ = Sampler(policy, settings).sample(batch)
    assert worst_gap(policy.model, rollout, settings) < 1e-5
    wide = rollout.pad_to(rollout.prompt_width + 3, rollout.response_width + 20)
    for part in (rollout, wide):
        with torch.no_grad():
            forced = teacher_forced(policy, part)
        assert (forced.logprobs_BR - part.policy_logprobs_BR).abs().max() < 1e-5


@pytest.mark.parametrize("length", (15, 24))
def test_rows_that_cross_into_another_law_are_refused_and_completions_end_before(length: int) -> None:
    policy = longrope()
    with pytest.raises(
        UserError, match=rf"row 1 has {length} tokens.*past the 24 where Phi3ForCausalLM.*prompts.max_tokens to 14"
    ):
        Sampler(policy, Sampling(max_new_tokens=10)).sample(PromptBatch.of_ids([[5] * 14, [5] * length]))
    found = complete(policy, [[5] * length, [6] * 30], Sampling(max_new_tokens=10), logprobs=True)
    assert len(found[0].ids) <= 24 - length and len(found[1].ids) <= 10


def test_rows_left_padded_and_scored_with_all_their_columns_keep_their_law() -> None:
    """A long prompt with a short response and the other way round: the columns together are more than either row has."""
    policy = longrope()
    rollout = given(policy, [[5] * 20, [6] * 2, [7] * 30], [[8, 9], [9] * 21, [10] * 5])
    for switch in (True, False):
        logprobs.aligned = switch
        try:
            with torch.no_grad():
                forced = teacher_forced(policy, rollout, want_entropy=False)
        finally:
            logprobs.aligned = True
        for row in range(3):
            ids = real_response(rollout, row)
            # Its own pass, without the last token, which predicts nothing.
            logits = alone_logits(policy.model, real_prompt(rollout, row), ids[:-1])
            for t, scores in enumerate(logits):
                assert abs(float(forced.logprobs_BR[row, t]) - log_softmax(scores)[ids[t]]) < 1e-5


def test_the_boundary_is_found_by_what_the_model_does() -> None:
    """A config that says nothing of it: halving finds the length. A law that moves with every length is refused."""
    model = tiny("llama")
    rotary, mode = model.model.rotary_emb, {"at": 37}
    plain = rotary.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        longest = int(position_ids.max()) + 1
        scale = (3.0 if longest > mode["at"] else 1.0) if mode["at"] else 1.0 + longest / 50
        cos, sin = plain(x, position_ids)
        return cos * scale, sin * scale

    rotary.forward = forward
    assert Policy.of(model, tiny_tokenizer()).capabilities.boundary == 37
    mode["at"] = 0
    with pytest.raises(UserError, match="changes with every longer row|counts positions|looks ahead"):
        _ = Policy.of(model, tiny_tokenizer()).capabilities


def test_dynamic_scaling_within_the_context_changes_nothing() -> None:
    policy = tiny_policy(
        "llama", max_position_embeddings=40, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    )
    settings = Sampling(max_new_tokens=10)
    assert policy.capabilities.boundary is None and policy.context == 40
    rollout, _ = Sampler(policy, settings).sample(PromptBatch.of_ids([[5] * 30, [6, 7]]))
    assert worst_gap(policy.model, rollout, settings) < 1e-5
    logprobs.aligned = False
    try:
        with torch.no_grad():
            forced = teacher_forced(policy, rollout.pad_to(35, 30))
    finally:
        logprobs.aligned = True
    assert (forced.logprobs_BR[:, :10] - rollout.policy_logprobs_BR).abs().max() < 1e-5


@pytest.mark.parametrize(("capacity", "new"), [(3, 12), (3, 2), (64, 12)])
def test_experts_of_a_bounded_capacity_are_decoded_without_the_cache_where_it_is_reached(capacity: int, new: int) -> None:
    policy, settings = tiny_policy("switch", expert_capacity=capacity), Sampling(max_new_tokens=new, n=2)
    assert policy.capabilities.max_cached_tokens == capacity and policy.capabilities.padding
    rollout, _ = Sampler(policy, settings).sample(PromptBatch.of_ids([[5, 6, 7], [8] * 12]))
    assert worst_gap(policy.model, rollout, settings) < 1e-5
    with torch.no_grad():
        forced = teacher_forced(policy, rollout)
    assert (forced.logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5
    same, _ = Sampler(policy, settings, engine=EngineSettings("generate")).sample(PromptBatch.of_ids([[5, 6, 7], [8] * 12]))
    assert torch.equal(same.response_BR, rollout.response_BR)


def test_a_forward_of_a_models_own_is_asked_anew():
    model = tiny("llama")
    before = forward_arguments(model)
    assert {"input_ids", "position_ids"} <= before and "self" not in before and before == forward_arguments(model)
    model.forward = lambda input_ids: None
    assert forward_arguments(model) == {"input_ids"}
    del model.forward
    assert forward_arguments(model) == before
