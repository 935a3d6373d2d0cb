"""The table of heads: what each checkpoint was saved with, what each role takes, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from steerl.rollout.common.errors import UserError
from steerl.rollout.model.auto_classes import HEADS, choose_head, head_of, heads_for, load_head

GPT2 = {
    "n_embd": 8,
    "n_layer": 1,
    "n_head": 1,
    "vocab_size": 20,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20, "decoder_start_token_id": 0}
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 20}


def saved(tmp_path, class_name: str, config: transformers.PretrainedConfig) -> str:
    torch.manual_seed(0)
    getattr(transformers, class_name)(config).save_pretrained(tmp_path / class_name)
    return str(tmp_path / class_name)


@pytest.mark.parametrize(
    "class_name, head",
    [
        ("GPT2LMHeadModel", "causal"),
        ("GPT2ForSequenceClassification", "sequence_classification"),
        ("GPT2ForTokenClassification", "token_classification"),
        ("GPT2ForQuestionAnswering", "question_answering"),
        ("GPT2Model", None),
        ("T5ForConditionalGeneration", "seq2seq"),
        ("BartForConditionalGeneration", "seq2seq"),
        ("BartForCausalLM", "causal"),
        ("BertForMaskedLM", "masked"),
        ("BertForPreTraining", None),
    ],
)
def test_the_saved_head_is_read_off_the_architecture(class_name, head):
    config = getattr(transformers, class_name).config_class(architectures=[class_name])
    assert head_of(config) == head


def test_every_head_loads_a_model_of_its_own_class(tmp_path):
    bert = transformers.BertConfig(**BERT)
    for head, class_name in {
        "masked": "BertForMaskedLM",
        "sequence_classification": "BertForSequenceClassification",
        "token_classification": "BertForTokenClassification",
        "question_answering": "BertForQuestionAnswering",
    }.items():
        path = saved(tmp_path, class_name, bert)
        assert type(HEADS[head].from_pretrained(path)).__name__ == class_name
        assert head_of(transformers.AutoConfig.from_pretrained(path)) == head
    assert set(heads_for(bert)) == set(HEADS) - {"seq2seq"}


def test_the_loader_returns_the_saved_weights_in_eval_mode(tmp_path):
    for role, class_name, config in [
        ("policy", "GPT2LMHeadModel", transformers.GPT2Config(**GPT2)),
        ("policy", "T5ForConditionalGeneration", transformers.T5Config(**T5)),
        ("reward", "GPT2ForSequenceClassification", transformers.GPT2Config(**GPT2, num_labels=1)),
    ]:
        path = saved(tmp_path, class_name, config)
        model = load_head(path, role)
        expected = getattr(transformers, class_name).from_pretrained(path).state_dict()
        assert type(model).__name__ == class_name and not model.training
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert load_head(path, role, dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize(
    "class_name, config, role, head, words",
    [
        (
            "BertForMaskedLM",
            transformers.BertConfig(**BERT),
            "policy",
            "auto",
            ["masked head", "policy takes causal or seq2seq"],
        ),
        ("BertForMaskedLM", transformers.BertConfig(**BERT), "policy", "causal", ["saved with a masked head"]),
        ("T5ForConditionalGeneration", transformers.T5Config(**T5), "policy", "causal", ["no causal head", "it has: seq2seq"]),
        ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2), "policy", "seq2seq", ["no seq2seq head"]),
        ("GPT2LMHeadModel", transformers.GPT2Config(**GPT2), "reward", "auto", ["causal head", "reward takes sequence_class"]),
        (
            "GPT2LMHeadModel",
            transformers.GPT2Config(**GPT2),
            "reward",
            "sequence_classification",
            ["no weights for score.weight"],
        ),
        ("BertForQuestionAnswering", transformers.BertConfig(**BERT), "reward", "auto", ["question_answering head"]),
        ("BertForMaskedLM", transformers.BertConfig(**BERT), "reward", "sequence", ["unknown head 'sequence'"]),
    ],
)
def test_a_head_that_the_role_cannot_use_is_refused_by_name(tmp_path, class_name, config, role, head, words):
    path = saved(tmp_path, class_name, config)
    with pytest.raises(UserError) as caught:
        load_head(path, role, head, field="part.path")
    (line,) = caught.value.lines
    assert line.startswith("part.path: ") and all(word in line for word in words), line


def test_a_fresh_head_needs_a_whole_trunk(tmp_path, caplog):
    path = saved(tmp_path, "GPT2LMHeadModel", transformers.GPT2Config(**GPT2))
    model = load_head(path, "reward", fresh=True, num_labels=1)
    assert model.score.weight.shape == (1, 8)
    trunk = transformers.GPT2LMHeadModel.from_pretrained(path).transformer.state_dict()
    assert all(torch.equal(value, trunk[name]) for name, value in model.transformer.state_dict().items())
    assert "LOAD REPORT" not in caplog.text
    # A masked LM has no pooler: it is part of what a classifier learns afresh.
    load_head(saved(tmp_path, "BertForMaskedLM", transformers.BertConfig(**BERT)), "reward", fresh=True, num_labels=1)
    deeper = transformers.AutoConfig.from_pretrained(path)
    deeper.n_layer = 2
    deeper.save_pretrained(path)
    with pytest.raises(UserError, match="no weights for transformer.h.1"):
        load_head(path, "reward", fresh=True, num_labels=1)
    with pytest.raises(UserError, match="no weights for transformer.h.1"):
        load_head(path, "policy")
    deeper.n_layer, deeper.vocab_size = 1, 30
    deeper.save_pretrained(path)
    with pytest.raises(UserError, match="weights of another shape for transformer.wte.weight"):
        load_head(path, "policy")


def test_a_folder_without_a_model_is_one_line(tmp_path):
    for path, words in [(tmp_path / "nowhere", "neither a folder"), (tmp_path, "holds no model")]:
        with pytest.raises(UserError, match=words) as caught:
            load_head(str(path), "policy")
        assert len(str(caught.value).splitlines()) == 1


def test_auto_choice_of_a_bare_trunk_follows_its_shape():
    assert choose_head(transformers.GPT2Config(architectures=["GPT2Model"]), "policy") == "causal"
    assert choose_head(transformers.T5Config(architectures=["T5Model"]), "policy") == "seq2seq"
    assert choose_head(transformers.BertConfig(architectures=["BertModel"]), "reward") == "sequence_classification"


LLAMA = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20}


def rewritten(folder: str, change) -> str:
    """The checkpoint with other tensors in its file."""
    from safetensors.torch import load_file, save_file

    file = Path(folder) / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_constants_that_old_checkpoints_hold_are_left_out_and_weights_without_a_place_are_refused(tmp_path):
    path = saved(tmp_path, "GPT2LMHeadModel", transformers.GPT2Config(**GPT2))
    old = {"bias": torch.ones(1, 1, 16, 16, dtype=torch.bool), "masked_bias": torch.tensor(-1e4)}
    rewritten(path, lambda found: found.update({f"transformer.h.0.attn.{name}": value for name, value in old.items()}))
    assert load_head(path, "policy").config.n_layer == 1
    rewritten(path, lambda found: found.update({"transformer.h.1.mlp.c_fc.weight": torch.ones(8, 32)}))
    with pytest.raises(UserError, match=r"no place for: .*h\.1\.mlp\.c_fc\.weight"):
        load_head(path, "policy")
    path = saved(tmp_path, "LlamaForCausalLM", transformers.LlamaConfig(**LLAMA))
    rewritten(path, lambda found: found.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(8)}))
    with pytest.raises(UserError, match=r"no place for: .*q_proj\.bias"):
        load_head(path, "policy")


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "LlamaModel", "GPT2LMHeadModel", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("layers", [2, 1, 0, -1])
def test_a_config_with_fewer_layers_than_the_weights_is_refused(class_name, layers, tmp_path):
    """The model would be another one, in silence; weights of its trunk without a place are named."""
    sizes = {"GPT2LMHeadModel": {**GPT2, "n_layer": 3}, "T5ForConditionalGeneration": {**T5, "num_layers": 3}}
    path = saved(tmp_path, class_name, getattr(transformers, class_name).config_class(**sizes.get(class_name, LLAMA)))
    file = Path(path) / "config.json"
    name = {"GPT2LMHeadModel": "n_layer", "T5ForConditionalGeneration": "num_layers"}.get(class_name, "num_hidden_layers")
    file.write_text(json.dumps({**json.loads(file.read_text()), name: layers}))
    trunk = class_name == "LlamaModel"
    for role in ("value", "reward") if trunk else ("policy", "value"):
        with pytest.raises(UserError) as caught:
            load_head(path, role, "causal" if role == "policy" and "T5" not in class_name else "auto", fresh=trunk)
        (line,) = caught.value.lines
        wanted = "it must be 1 to 4096" if layers < 1 else "has weights that its config.json has no place for: "
        assert line.startswith(f"model.path: {path!r}") and wanted in line


def test_heads_and_poolers_of_another_task_may_be_left_over(tmp_path):
    """What the model has no module for is no part of its trunk."""
    bert, llama = transformers.BertConfig(**BERT, num_labels=1), transformers.LlamaConfig(**LLAMA, num_labels=1)
    for class_name, config, role, head in (
        ("LlamaForCausalLM", llama, "reward", "sequence_classification"),
        ("LlamaForSequenceClassification", llama, "reward", "token_classification"),
        ("LlamaForTokenClassification", llama, "reward", "sequence_classification"),
        ("BertForPreTraining", bert, "reward", "token_classification"),
        ("BertForSequenceClassification", bert, "reward", "token_classification"),
        ("BertForMaskedLM", bert, "reward", "sequence_classification"),
    ):
        assert load_head(saved(tmp_path, class_name, config), role, head, fresh=True) is not None


class Bomb:
    """Pickled, it writes a file where it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_objects_are_refused_and_never_run(tmp_path):
    """Plain tensors in pytorch_model.bin are read (torch runs nothing for them); anything else is not."""
    path = Path(saved(tmp_path, "GPT2LMHeadModel", transformers.GPT2Config(**GPT2)))
    model = load_head(str(path), "policy")
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    assert torch.equal(load_head(str(path), "policy").lm_head.weight, model.lm_head.weight)
    torch.save({"lm_head.weight": Bomb(tmp_path / "ran")}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded as causal: it holds pickled objects .* save it as safetensors"):
        load_head(str(path), "policy")
    (path / "pytorch_model.bin").rename(path / "model.safetensors")
    with pytest.raises(UserError, match="cannot be loaded as causal"):
        load_head(str(path), "policy")
    assert not (tmp_path / "ran").exists()


def test_code_that_a_folder_brings_is_neither_run_nor_asked_about(tmp_path, monkeypatch):
    path = Path(saved(tmp_path, "GPT2LMHeadModel", transformers.GPT2Config(**GPT2)))
    config = json.loads((path / "config.json").read_text()) | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    with pytest.raises(UserError, match="not run unless model.trust_remote_code is true"):
        load_head(str(path), "policy")
    assert not (tmp_path / "ran").exists()
