"""What a model does with padding and caches is seen on the model; models without a causal law are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rollout.errors import Problem
from rollout.habits import Habits
from rollout.logprobs import teacher_forced
from rollout.policy import Policy
from rollout.prompts import PromptBatch
from rollout.sampler import Sampler
from rollout.sampling import Sampling
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.rollout.definitions import worst_gap

ORDINARY = Habits(padding=True, caching=True, picking=True, pads_in_text=True)
EXPECTED = {
    "gpt2": ORDINARY,
    "mistral": ORDINARY,
    "mamba": ORDINARY,
    "t5": ORDINARY,
    "bart": ORDINARY,
    "m2m_100": Habits(padding=True, caching=True, picking=True, pads_in_text=False),
    "recurrent_gemma": Habits(padding=False, caching=False, picking=True, pads_in_text=True),
    "rwkv": Habits(padding=False, caching=False, picking=True, pads_in_text=True),
}


@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_seen(family: str) -> None:
    assert tiny_policy(family).habits == EXPECTED[family]


def test_a_model_that_reads_its_padding_is_seen_whatever_it_is_called() -> None:
    model = tiny("llama")
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, "attention_mask": None, "position_ids": None})
    assert not Policy.of(model, tiny_tokenizer()).habits.padding


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_noise_is_not_taken_for_a_habit(dtype: torch.dtype) -> None:
    for family in ("gpt2", "llama", "bart"):
        policy = Policy.of(tiny(family).to(dtype), tiny_tokenizer())
        assert policy.habits.padding and policy.habits.caching


def test_a_context_of_a_few_tokens_is_enough() -> None:
    for context in (1, 2, 4, 9):
        model = tiny("gpt2", n_positions=context)
        assert Policy.of(model, tiny_tokenizer()).habits.padding


def test_models_that_look_ahead_are_refused() -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(Problem, match="looks ahead"):
        _ = Policy.of(model.eval(), tiny_tokenizer()).habits
    with pytest.raises(Problem, match="looks ahead"):
        _ = tiny_policy("prophetnet").habits


def test_modes_are_put_back() -> None:
    model = tiny("gpt2")
    model.train()
    _ = Policy.of(model, tiny_tokenizer()).habits
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
    assert policy.habits.first == 2 and policy.room == 32
    settings = Sampling(max_new_tokens=20)
    rollout, _ = Sampler(policy, settings).sample(PromptBatch.of_ids([[5, 6, 7], [8] * 12]))
    assert not (rollout.response_BR == 1).any()
    assert worst_gap(model, rollout, settings) < 1e-5
    assert (teacher_forced(policy, rollout).logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-5
    with pytest.raises(Problem, match="do not fit the model's context of 32"):
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
