"""PEFT adapters: every kind that is accepted, against closed forms, lone rows and peft's own model; and what is refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import adapters, virtual_tokens
from steerl.rollout.model.settings import base_of, is_adapter_folder
from tests.models import tiny

KINDS = {
    "LORA": {"peft_type": "LORA", "r": 4, "init_lora_weights": False},
    "DORA": {"peft_type": "DORA", "r": 4, "init_lora_weights": False},
    "IA3": {"peft_type": "IA3", "init_ia3_weights": False},
    "LOHA": {"peft_type": "LOHA", "r": 2, "init_weights": False, "target_modules": "all-linear"},
    "LOKR": {"peft_type": "LOKR", "r": 2, "init_weights": False, "target_modules": "all-linear"},
    "OFT": {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "init_weights": False, "target_modules": "all-linear"},
    "VERA": {"peft_type": "VERA", "r": 4, "init_weights": False, "target_modules": ["q_proj"]},
    "LN_TUNING": {"peft_type": "LN_TUNING"},
    "PREFIX_TUNING": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3},
    "PROMPT_TUNING": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3},
    "P_TUNING": {"peft_type": "P_TUNING", "num_virtual_tokens": 3, "encoder_hidden_size": 8},
}
WEIGHT = [kind for kind in KINDS if kind in adapters.WEIGHT_KINDS]
MAIN = ["LORA", "DORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"]
START = torch.tensor([[0, 5, 6, 7]])


def adapted(family: str, kind: str, name: str = "", seed: int = 0, **overrides) -> nn.Module:
    """A tiny model with an adapter that has been moved well away from doing nothing."""
    torch.manual_seed(seed)
    model = adapters.add(tiny(family, **overrides), KINDS[kind], name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.05 if kind == "OFT" else 0.3))
    return model


def logprobs(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Of the whole vocabulary at every position (of the decoder for encoder-decoders)."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            out = model(input_ids=ids, attention_mask=mask, decoder_input_ids=START.expand(len(ids), -1))
        elif mask is None or model.config.model_type == "bloom":
            out = model(input_ids=ids, attention_mask=mask)
        else:
            out = model(input_ids=ids, attention_mask=mask, position_ids=(mask.long().cumsum(1) - 1).clamp(min=0))
    return out.logits.log_softmax(-1)


def ragged(side: str = "left") -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, 60, (n,), generator=generator) for n in (1, 5, 9)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return rows, ids, mask


# -- what an adapter computes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAIN)
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "opt", "bloom", "gpt_neox", "gemma", "mistral", "t5", "bart"])
def test_a_padded_row_equals_the_row_alone(family, kind):
    if kind == "PREFIX_TUNING" and family == "mistral":
        pytest.skip("refused: see test_prefix_tuning_under_a_window_is_refused")
    model = adapted(family, kind)
    # Bart's encoder counts its learned positions from the left edge, so its rows are padded on the right.
    rows, ids, mask = ragged("right" if family == "bart" else "left")
    padded = logprobs(model, ids, mask)
    for i, row in enumerate(rows):
        alone = logprobs(model, row[None])[0]
        own = padded[i] if model.config.is_encoder_decoder else padded[i, 9 - len(row) :]
        torch.testing.assert_close(own, alone, atol=2e-5, rtol=0)
        assert (alone - logprobs(tiny(family), row[None])[0]).abs().max() > 0.01, "the adapter does nothing"


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "t5", "bart"])
def test_virtual_tokens_agree_with_pefts_own_model_on_unpadded_rows(family, kind):
    import peft

    model = adapted(family, kind)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    own = peft.get_peft_model(tiny(family), adapters.adapter_config(KINDS[kind], task)).eval()
    own.prompt_encoder.load_state_dict(model.prompt_encoder.state_dict())
    ids = torch.tensor([[7, 8, 9, 10]])
    expected = logprobs(own, ids, torch.ones_like(ids))[:, -4:]
    torch.testing.assert_close(logprobs(model, ids)[:, -4:], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "PROMPT_TUNING"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_generating_with_a_cache_equals_teacher_forcing_alone(family, kind):
    model = adapted(family, kind)
    rows, ids, mask = ragged()
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    sampled = torch.stack(out.logits, dim=1).log_softmax(-1)
    for i, row in enumerate(rows):
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                expected = model(input_ids=row[None], decoder_input_ids=out.sequences[i : i + 1]).logits[0, :6]
            else:
                whole = torch.cat([row, out.sequences[i, 9:]])
                expected = model(input_ids=whole[None]).logits[0, len(row) - 1 : -1]
        torch.testing.assert_close(sampled[i], expected.log_softmax(-1), atol=2e-5, rtol=0)


def test_lora_is_the_low_rank_sum_and_dora_rescales_its_columns():
    for kind in ("LORA", "DORA"):
        model = adapted("llama", kind)
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        weight, a, b = layer.base_layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = weight + layer.scaling["default"] * b @ a
        if kind == "DORA":
            magnitude = layer.lora_magnitude_vector["default"].weight
            expected = expected * (magnitude / expected.norm(dim=1))[:, None]
        x = torch.randn(3, weight.shape[1])
        torch.testing.assert_close(layer(x), x @ expected.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", WEIGHT)
def test_a_merged_model_computes_what_the_adapter_did(kind):
    model = adapted("llama", kind)
    ids = ragged()[0][2][None]
    before, base = logprobs(model, ids), logprobs(tiny("llama"), ids)
    merged = adapters.merge(model)
    assert type(merged).__name__ == "LlamaForCausalLM" and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(logprobs(merged, ids), before, atol=1e-5, rtol=1e-5)  # a merged weight is rounded once more
    assert (before - base).abs().max() > 0.01


@pytest.mark.parametrize("kind", MAIN)
def test_off_is_the_base_bit_for_bit_and_leaves_frozen_adapters_frozen(kind, tmp_path):
    model = adapted("gpt2", kind)
    ids = ragged()[0][1][None]
    with adapters.off(model):
        assert torch.equal(logprobs(model, ids), logprobs(tiny("gpt2"), ids))
    assert any(parameter.requires_grad for parameter in model.parameters())
    adapters.save(model, tmp_path)
    frozen = adapters.load(tiny("gpt2"), tmp_path)
    with adapters.off(frozen):
        pass
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("kind", MAIN)
def test_only_the_adapter_takes_gradients(kind):
    model = adapted("gpt2", kind)
    rows, ids, mask = ragged()
    model(input_ids=ids, attention_mask=mask).logits.logsumexp(-1).sum().backward()
    taken = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert taken and taken == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "ia3_" in name or "prompt_encoder" in name for name in taken)


def test_a_deep_copy_has_virtual_tokens_of_its_own():
    model = adapted("gpt2", "PROMPT_TUNING")
    twin = copy.deepcopy(model)
    rows, ids, mask = ragged()
    before = logprobs(twin, ids, mask)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.zero_()
    assert torch.equal(logprobs(twin, ids, mask), before)
    assert not torch.equal(logprobs(model, ids, mask), before)


def test_classification_heads_take_adapters_and_save_their_head(tmp_path):
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=64,
        num_labels=1,
        pad_token_id=0,
    )
    for kind in ("LORA", "PROMPT_TUNING"):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_config(config)
        model = adapters.add(copy.deepcopy(base), KINDS[kind])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        rows, ids, mask = ragged("right")
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=mask).logits
            alone = torch.cat([model(input_ids=row[None]).logits for row in rows])
        torch.testing.assert_close(scores, alone, atol=1e-5, rtol=0)
        adapters.save(model, tmp_path / kind)
        again = adapters.load(base.eval(), tmp_path / kind)
        with torch.no_grad():
            torch.testing.assert_close(again(input_ids=ids, attention_mask=mask).logits, scores, atol=1e-6, rtol=0)


# -- several, by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAIN)
def test_named_adapters_are_saved_loaded_and_switched(kind, tmp_path):
    ids = ragged()[0][2][None]
    expected = {}
    for seed, name in enumerate(("kind", "terse")):
        model = adapted("gpt2", kind, name, seed)
        expected[name] = logprobs(model, ids)
        adapters.save(model, tmp_path / name)
        assert (tmp_path / name / "adapter_config.json").is_file() and is_adapter_folder(tmp_path / name)
    model = adapters.load(tiny("gpt2"), tmp_path / "kind", "kind")
    model = adapters.load(model, tmp_path / "terse", "terse")
    for name in ("terse", "kind", "terse"):
        adapters.switch(model, name)
        torch.testing.assert_close(logprobs(model, ids), expected[name], atol=1e-6, rtol=0)
    with pytest.raises(UserError, match="'nobody': unknown; the model has: kind, terse"):
        adapters.switch(model, "nobody")
    with pytest.raises(UserError, match="has an adapter 'kind' already"):
        adapters.load(model, tmp_path / "kind", "kind")


@pytest.mark.parametrize("kind", ["LORA", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"])
def test_a_loaded_adapter_can_be_trained_further_and_saved_again(kind, tmp_path):
    adapters.save(adapted("gpt2", kind), tmp_path / "first")
    model = adapters.load(tiny("gpt2"), tmp_path / "first", trainable=True)
    ids = ragged()[0][2][None]
    torch.testing.assert_close(logprobs(model, ids), logprobs(adapted("gpt2", kind), ids), atol=1e-6, rtol=0)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all("lora" in name or "prompt_encoder" in name for name in trainable)
    before = logprobs(model, ids)
    model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    with torch.no_grad():
        for parameter in trainable.values():
            parameter.sub_(parameter.grad)
    after = logprobs(model, ids)
    assert not torch.allclose(before, after)
    adapters.save(model, tmp_path / "second")
    torch.testing.assert_close(logprobs(adapters.load(tiny("gpt2"), tmp_path / "second"), ids), after, atol=1e-6, rtol=0)


def test_the_base_is_found_from_the_folder_alone(tmp_path, monkeypatch):
    base = tmp_path / "base"
    tiny("gpt2").save_pretrained(base)
    from transformers import AutoModelForCausalLM

    adapters.save(adapters.add(AutoModelForCausalLM.from_pretrained(base), KINDS["LORA"]), tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == str(base.resolve())
    monkeypatch.chdir(tmp_path)
    relative = adapters.add(AutoModelForCausalLM.from_pretrained("base"), KINDS["LORA"])
    monkeypatch.chdir("adapter")  # and loaded from another place
    adapters.save(relative, tmp_path / "moved")
    assert json.loads((tmp_path / "moved" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base.resolve()
    )
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "base_model_name_or_path": "../base"}))
    assert AutoModelForCausalLM.from_pretrained(base_of(tmp_path / "adapter")) is not None
    base.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="the base of .* is missing; give the base as model.path"):
        base_of(tmp_path / "adapter")
    file.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="does not say what its base is"):
        base_of(tmp_path / "adapter")


def test_count_follows_the_active_adapter():
    model = adapted("gpt2", "PROMPT_TUNING")
    assert virtual_tokens.count(model) == 3
    with adapters.off(model):
        assert virtual_tokens.count(model) == 0
    assert virtual_tokens.count(adapted("gpt2", "LORA")) == virtual_tokens.count(tiny("gpt2")) == 0


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mapping, words",
    [
        ({}, ["model.peft.peft_type: missing", "LORA", "PREFIX_TUNING"]),
        ({"peft_type": "LORAX"}, ["unknown value 'LORAX'", "DORA", "IA3", "PROMPT_TUNING"]),
        ({"peft_type": "LORA", "rank": 4}, ["model.peft.rank: LORA has no such field", "lora_alpha"]),
        ({"peft_type": "LORA", "r": 0}, ["model.peft", "r"]),
        (
            {"peft_type": "LORA", "target_modules": ["nowhere"]},
            ["target_modules: ['nowhere'] matches nothing", "c_attn", "c_proj"],
        ),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, ["'pissa' changes the base's own weights"]),
        ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, ["task_type: 'SEQ_CLS', but the model's task is CAUSAL_LM"]),
        ({"peft_type": "PROMPT_TUNING"}, ["num_virtual_tokens: missing"]),
        ({"peft_type": "LORA", "name": "a.b"}, ["'a.b' cannot be an adapter's name"]),
        ({"peft_type": "LORA", "name": "lora"}, ["'lora' cannot be an adapter's name"]),
    ],
)
def test_a_bad_mapping_is_one_clear_line(mapping, words):
    with pytest.raises(UserError) as caught:
        adapters.add(tiny("gpt2"), mapping)
    (line,) = caught.value.lines
    assert all(word in line for word in words) and "\n" not in line, line


def test_an_adapter_that_does_not_fit_is_refused(tmp_path):
    adapters.save(adapted("gpt2", "LORA"), tmp_path / "lora")
    adapters.save(adapted("gpt2", "PROMPT_TUNING"), tmp_path / "prompt")
    with pytest.raises(UserError, match="does not fit this base: .*size mismatch"):
        adapters.load(tiny("gpt2", n_embd=48), tmp_path / "lora")
    with pytest.raises(UserError, match="does not fit this base"):
        adapters.load(tiny("gpt2", n_embd=48), tmp_path / "prompt")
    with pytest.raises(UserError, match="does not fit this base: the base has no place for"):
        adapters.load(tiny("gpt2", n_layer=1), tmp_path / "lora")
    with pytest.raises(UserError, match="does not fit this base: it has no weights for"):
        adapters.load(tiny("gpt2", n_layer=3), tmp_path / "lora")
    with pytest.raises(UserError, match="matches nothing in LlamaForCausalLM"):
        adapters.load(tiny("llama"), tmp_path / "lora")
    with pytest.raises(UserError, match="is not an adapter's folder"):
        adapters.load(tiny("gpt2"), tmp_path)
    (tmp_path / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="has no weights"):
        adapters.load(tiny("gpt2"), tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        adapters.load(tiny("gpt2"), tmp_path / "lora")


def test_what_virtual_tokens_cannot_do_is_refused():
    with pytest.raises(UserError, match="PROMPT_TUNING adapter cannot be merged"):
        adapters.merge(adapted("gpt2", "PROMPT_TUNING"))
    rows, ids, mask = ragged()
    with pytest.raises(UserError, match="a row without real tokens"):
        logprobs(adapted("gpt2", "PROMPT_TUNING"), ids, mask * torch.tensor([[0], [1], [1]]))


def test_prefix_tuning_under_a_window_is_refused():
    model = adapted("mistral", "PREFIX_TUNING")
    rows, ids, mask = ragged()
    with pytest.raises(UserError, match="PREFIX_TUNING with left padding: mistral counts its window"):
        logprobs(model, ids, mask)
    assert logprobs(model, rows[2][None], torch.ones_like(rows[2][None])).isfinite().all()


# -- whether an adapter changes anything ------------------------------------------------------------------------------

FRESH = {
    kind: {key: value for key, value in given.items() if not key.startswith("init_")}
    for kind, given in KINDS.items()
    if kind in WEIGHT
}
FRESH["embedding"] = {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens", "q_proj"]}
FRESH["tokens"] = {"peft_type": "LORA", "r": 2, "trainable_token_indices": [20, 31]}
FRESH["whole head"] = {"peft_type": "LORA", "r": 2, "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("kind", FRESH)
def test_whether_an_adapter_changes_anything_is_read_off_its_weights(kind):
    """Fresh ones are the base bit for bit; one number moved anywhere, of a token that no probe asks for, is a change."""
    torch.manual_seed(0)
    model = adapters.add(tiny("llama"), FRESH[kind])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert adapters.changes_nothing(model) and not adapters.learns_in_base(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    _, ids, mask = ragged()
    with torch.no_grad():
        plain = logprobs(model, ids, mask)
        moved = [p for name, p in model.named_parameters() if p.requires_grad and "lora_A" not in name]
        if kind in ("LOKR", "VERA", "LOHA"):  # products: one factor alone is nothing yet
            for parameter in moved:
                parameter.add_(0.5)
        else:
            (moved[0] if kind == "embedding" else moved[-1]).view(-1)[-1 if kind in ("embedding", "tokens") else 0].add_(0.5)
        if kind not in ("tokens", "embedding"):
            assert not torch.equal(logprobs(model, ids, mask), plain)
    assert not adapters.changes_nothing(model)


def test_biases_of_the_base_that_learn_are_told():
    model = adapters.add(tiny("gpt2"), {"peft_type": "LORA", "r": 2, "bias": "all"})
    assert adapters.changes_nothing(model) and adapters.learns_in_base(model).endswith(".bias")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WEIGHT])
def test_virtual_tokens_always_change_something(kind):
    assert not adapters.changes_nothing(adapters.add(tiny("llama"), KINDS[kind]))
