"""Loading a policy: kinds, adapters, ids, and one clear line for everything that cannot be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model import adapters
from steerl.rollout.model.language_model import unwrap
from steerl.rollout.model.policy import ModelSettings, Policy, load_policy
from steerl.rollout.prompts.prompts import PromptBatch
from tests.models import tiny, tiny_policy, tiny_tokenizer


def saved(folder: Path, family: str = "gpt2", tokenizer: bool = True, **overrides: Any) -> str:
    tiny(family, **overrides).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer(chat=True).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("family", "kind", "start"), [("gpt2", "causal", ()), ("t5", "seq2seq", (0,)), ("mbart", "seq2seq", (2, 5))]
)
def test_a_folder_loads_as_what_its_config_says(tmp_path: Path, family: str, kind: str, start: tuple[int, ...]) -> None:
    policy = load_policy(ModelSettings(path=saved(tmp_path, family)))
    assert (policy.kind, policy.start_ids, policy.pad_id, policy.eos_ids) == (kind, start, 0, (2,))
    assert not policy.model.training and policy.vocab_size == 64 and policy.device.type == "cpu"
    for name, value in tiny(family).state_dict().items():
        assert torch.equal(value, policy.model.state_dict()[name])


def test_contexts() -> None:
    expected = {
        "gpt2": (128, None),
        "llama": (128, None),
        "bloom": (None, None),
        "t5": (None, None),
        "bart": (128, 128),
        "led": (128, 128),
    }
    for family, contexts in expected.items():
        policy = tiny_policy(family)
        assert (policy.context, policy.decoder_context) == contexts, family


def test_dtype_is_as_saved_or_as_asked(tmp_path: Path) -> None:
    tiny("gpt2").to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert load_policy(ModelSettings(path=str(tmp_path))).model.dtype == torch.bfloat16
    assert load_policy(ModelSettings(path=str(tmp_path), dtype="float32")).model.dtype == torch.float32


def test_an_adapters_folder_brings_its_base(tmp_path: Path) -> None:
    base = load_policy(ModelSettings(path=saved(tmp_path / "base")))
    adapted = adapters.add(base.model, {"peft_type": "LORA", "r": 4, "init_lora_weights": False})
    adapters.save(adapted, tmp_path / "adapter")
    prompts = PromptBatch.of_ids([[5, 6, 7]])
    expected, _ = Sampler(Policy.of(adapted, base.tokenizer), Sampling(max_new_tokens=6)).sample(prompts)
    for settings in (
        ModelSettings(path=str(tmp_path / "adapter")),
        ModelSettings(path=str(tmp_path / "base"), adapter=str(tmp_path / "adapter")),
    ):
        policy = load_policy(settings)
        found, _ = Sampler(policy, Sampling(max_new_tokens=6)).sample(prompts)
        assert torch.equal(found.response_BR, expected.response_BR)
        assert torch.equal(found.policy_logprobs_BR, expected.policy_logprobs_BR)
    plain, _ = Sampler(load_policy(ModelSettings(path=str(tmp_path / "base"))), Sampling(max_new_tokens=6)).sample(prompts)
    assert not torch.allclose(plain.policy_logprobs_BR, expected.policy_logprobs_BR)
    with pytest.raises(UserError, match="is an adapter and model.adapter is set too"):
        load_policy(ModelSettings(path=str(tmp_path / "adapter"), adapter=str(tmp_path / "adapter")))


def test_wrappers_are_taken_off() -> None:
    model = tiny("gpt2")
    adapted = adapters.add(tiny("gpt2"), {"peft_type": "LORA", "r": 4})
    assert unwrap(torch.nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    assert unwrap(adapted) is adapted.get_base_model()
    assert unwrap(torch.nn.DataParallel(adapted)) is adapted.get_base_model()


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model.path: missing"):
        load_policy(ModelSettings())
    with pytest.raises(UserError, match="model.path: .*nowhere"):
        load_policy(ModelSettings(path=str(tmp_path / "nowhere")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="model.path: .*empty"):
        load_policy(ModelSettings(path=str(tmp_path / "empty")))
    with pytest.raises(UserError, match="no tokenizer in .*; save it there, or name another folder with model.tokenizer"):
        load_policy(ModelSettings(path=saved(tmp_path / "bare", tokenizer=False)))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert load_policy(ModelSettings(path=str(tmp_path / "bare"), tokenizer=str(tmp_path / "tokenizer"))).pad_id == 0


def test_models_without_a_generation_head(tmp_path: Path) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=64, n_embd=32, n_layer=1, n_head=2, pad_token_id=0)
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.save_pretrained(tmp_path / "classifier")
    tiny_tokenizer().save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="classif"):
        load_policy(ModelSettings(path=str(tmp_path / "classifier")))
    with pytest.raises(UserError, match="GPT2ForSequenceClassification has no generation head"):
        Policy.of(classifier, tiny_tokenizer())
    tiny("llama").model.save_pretrained(tmp_path / "trunk")
    tiny_tokenizer().save_pretrained(tmp_path / "trunk")
    with pytest.raises(UserError, match=r"lm_head|no weights|trunk"):
        load_policy(ModelSettings(path=str(tmp_path / "trunk")))
    with pytest.raises(UserError, match="LlamaModel has no generation head"):
        Policy.of(tiny("llama").model, tiny_tokenizer())


def test_a_kind_that_the_model_is_not(tmp_path: Path) -> None:
    path = saved(tmp_path)
    with pytest.raises(UserError, match="seq2seq"):
        load_policy(ModelSettings(path=path, kind="seq2seq"))
    with pytest.raises(UserError, match="model.kind: seq2seq, but GPT2LMHeadModel is a decoder-only model"):
        Policy.of(tiny("gpt2"), tiny_tokenizer(), kind="seq2seq")


def test_a_vocabulary_that_does_not_fit_the_tokenizer() -> None:
    with pytest.raises(UserError, match=r"highest id is 63, but the model's embedding has 50 rows"):
        Policy.of(tiny("gpt2", vocab_size=50), tiny_tokenizer())
    policy = Policy.of(tiny("gpt2", vocab_size=80), tiny_tokenizer())  # rows to spare are usual
    rollout, texts = Sampler(policy, Sampling(max_new_tokens=20, n=8)).sample(PromptBatch.of_ids([[5]]))
    assert int(rollout.response_BR.max()) >= 64 and len(texts) == 8


def test_ids_that_a_config_left_at_another_models_values() -> None:
    """A tiny config that keeps GPT-2's eos 50256: it can never be drawn, and must not break anything."""
    model = tiny("gpt2", eos_token_id=50256, bos_token_id=50256, pad_token_id=None)
    policy = Policy.of(model, tiny_tokenizer(pad=None))
    assert policy.eos_ids == () and policy.pad_id == 0
    rollout, _ = Sampler(policy, Sampling(max_new_tokens=5)).sample(PromptBatch.of_ids([[5], [6, 7]]))
    assert rollout.lengths_B.tolist() == [5, 5] and not rollout.ended_B.any()


def test_stop_ids_are_the_generation_configs_else_the_configs_else_the_tokenizers() -> None:
    model = tiny("gpt2")
    model.generation_config.eos_token_id = [7, 9]
    assert Policy.of(model, tiny_tokenizer()).eos_ids == (7, 9)
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = 11
    assert Policy.of(model, tiny_tokenizer()).eos_ids == (11,)
    model.config.eos_token_id = None
    assert Policy.of(model, tiny_tokenizer()).eos_ids == (2,)


def test_an_encoder_decoder_without_a_start() -> None:
    model = tiny("t5")
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = None
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        Policy.of(model, tiny_tokenizer())
