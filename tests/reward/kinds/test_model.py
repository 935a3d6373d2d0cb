"""Reward models: batches against one row at a time, positions, ids and text, labels, heads, limits, ensembles.

The definition that scores are held against knows nothing of reward/: the row alone, without padding or mask, and the
score head by hand on the last hidden state (decoders), or the model's own pooled logits (encoders).
"""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from steerl.reward.build import build_reward
from steerl.reward.kinds.model_inputs import vocabulary_of
from steerl.rollout.common.errors import UserError
from steerl.rollout.model.settings import is_adapter_folder
from steerl.rollout.types import Rollout, Texts
from tests.episodes import CALCULATOR, samples_of, talk
from tests.models import FAMILIES, tiny, tiny_tokenizer
from tests.reward.classifiers import ENCODERS, saved, tiny_classifier
from tests.reward.rows import episodes, made

EOS_POOLED = ["t5", "mt5", "umt5", "bart", "mbart"]
DECODERS = [
    "gpt2", "llama", "qwen2", "qwen3", "opt", "bloom", "gpt_neox", "gpt_neo", "gptj", "mpt", "falcon", "mistral", "gemma",
    "gemma2", "gemma3", "phi", "mixtral", "openai-gpt", "ctrl", "biogpt",
]  # fmt: skip
WORDS = ["good film", "a", "the plot was very long and the film was bad", "good", "end.", "was it a good film? it was!"]


def alone(model, ids: list[int]) -> torch.Tensor:
    """(labels,): this row's logits by definition."""
    row = torch.tensor([ids])
    with torch.no_grad():
        head = getattr(model, "score", None) or getattr(model, "classifier", None)
        if isinstance(head, torch.nn.Linear) and model.config.model_type in {FAMILIES[f][0] for f in DECODERS}:
            return head(model.base_model(input_ids=row)[0][0, -1])
        return model(input_ids=row).logits[0]


def sampled(tokenizer, prompts, completions, ended=None):
    """Rows as a sampler of that tokenizer would give them: </s> where a row ended."""
    ended = ended if ended is not None else [True] * len(prompts)
    responses = [tokenizer(text)["input_ids"] + [2] * stop for text, stop in zip(completions, ended, strict=True)]
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    rollout = Rollout.of_ids(ids, responses, ended_B=ended, row_B=[i + 10 for i in range(len(prompts))])
    _, texts = made(completions, prompts)
    return rollout, texts, [p + r for p, r in zip(ids, responses, strict=True)]


def test_a_reward_model_reads_what_a_row_was_fed(tmp_path):
    """The whole row is judged, at its last token, whoever that is from."""
    model, tokenizer = tiny_classifier("llama"), tiny_tokenizer()
    rollout, texts = episodes(["abcde", "abc"], ["11001", "100"])
    part = {"kind": "model", "path": saved(model, tmp_path / "rm", tokenizer), "tokens": "ids"}
    scores = build_reward([part])(rollout, texts)
    rows = [rollout.prompt_BP[i].tolist() + rollout.response_BR[i, :n].tolist() for i, n in enumerate((5, 3))]
    assert torch.allclose(scores.total_B, torch.stack([alone(model, ids)[0] for ids in rows]), atol=1e-5)
    assert scores.per_token(rollout).nonzero().tolist() == [[0, 4], [1, 0]]  # it lands on the last action


@pytest.mark.parametrize("family", [*DECODERS, *EOS_POOLED, *(f for f in ENCODERS if f != "funnel")])
def test_a_batch_scores_as_one_by_one(family, tmp_path):
    model, tokenizer = tiny_classifier(family), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    ended = [True, False, True, True, False, True]
    rollout, texts, rows = sampled(tokenizer, ["say:", "one more prompt", "x", "go on", "and", "q"], WORDS, ended)
    if family in EOS_POOLED:
        rows = [ids if ids[-1] == 2 else [*ids, 2] for ids in rows]
    expected = torch.stack([alone(model, ids)[0] for ids in rows])
    assert expected.std() > 0.05  # a model that says the same of everything would prove nothing
    scores = build_reward([{"kind": "model", "path": path, "batch_size": 4}], tokenizer=tokenizer)(rollout, texts)
    assert (scores.total_B - expected).abs().max() < 1e-5
    order = [3, 0, 5, 1, 4, 2]
    shuffled = build_reward([{"kind": "model", "path": path, "batch_size": 2}], tokenizer=tokenizer)(
        rollout.select(order), texts.select(order)
    )
    assert (shuffled.total_B - expected[order]).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert", "t5"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "</s>", None])
def test_padding_side_and_pad_token_change_nothing(family, side, pad, tmp_path):
    pad_id = {"<pad>": 0, "</s>": 2, None: None}[pad]
    encoder = family in ("bert", "t5")
    model = tiny_classifier(family, pad_token_id=0 if encoder else pad_id)
    tokenizer = tiny_tokenizer(pad=pad, side=side)
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts, rows = sampled(tokenizer, ["say:", "one more", "x"], ["good film", "a", "very very bad"])
    expected = torch.stack([alone(model, ids)[0] for ids in rows])
    for tokens in ("auto", "ids"):
        reward = build_reward([{"kind": "model", "path": path, "tokens": tokens}], tokenizer=tokenizer)
        assert (reward(rollout, texts).total_B - expected).abs().max() < 1e-5


def test_the_position_where_transformers_looks(tmp_path):
    """Definition: transformers' own logits of the row alone, with pad equal to eos."""
    model, tokenizer = tiny_classifier("llama", pad_token_id=2), tiny_tokenizer(pad="</s>")
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts, rows = sampled(tokenizer, ["say:", "x"], ["good film", "bad"], ended=[True, False])
    with torch.no_grad():
        expected = torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in rows])
    part = {"kind": "model", "path": path}
    got = build_reward([{**part, "position": "last_not_pad"}], tokenizer=tokenizer)(rollout, texts).total_B
    plain = build_reward([part], tokenizer=tokenizer)(rollout, texts).total_B
    assert (got - expected).abs().max() < 1e-5
    assert abs(plain[0] - expected[0]) > 1e-3 and abs(plain[1] - expected[1]) < 1e-5
    saved(tiny_classifier("bert"), tmp_path / "encoder", tokenizer)
    with pytest.raises(UserError, match="position: last_not_pad is for decoders"):
        build_reward([{**part, "path": str(tmp_path / "encoder"), "position": "last_not_pad"}])


def test_pad_and_eos_inside_a_text_are_real_tokens(tmp_path):
    model, tokenizer = tiny_classifier("llama"), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    responses = [[9, 0, 2, 11], [7, 0], [0], [12, 13, 14, 15, 0, 0]]
    rollout = Rollout.of_ids([[0, 5], [2, 6, 7], [8], [9]], responses)
    expected = torch.stack([alone(model, p + r)[0] for p, r in zip([[0, 5], [2, 6, 7], [8], [9]], responses, strict=True)])
    got = build_reward([{"kind": "model", "path": path}], tokenizer=tokenizer)(rollout, made([""] * 4)[1])
    assert (got.total_B - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_rows_with_several_eos_share_no_batch_with_others(family, tmp_path):
    """These models pool at the last </s>, and take only batches whose rows have equally many."""
    model, tokenizer = tiny_classifier(family), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    responses = [[9, 2, 11, 2], [7, 2], [2], [12, 13], [5, 2, 2]]
    rollout = Rollout.of_ids([[5, 6]] * 5, responses)
    rows = [[5, 6, *ids] if ids[-1] == 2 else [5, 6, *ids, 2] for ids in responses]
    got = build_reward([{"kind": "model", "path": path}], tokenizer=tokenizer)(rollout, made([""] * 5)[1]).total_B
    assert (got - torch.stack([alone(model, ids)[0] for ids in rows])).abs().max() < 1e-5


def test_a_reward_model_stays_whole_where_policies_are_spread(tmp_path, monkeypatch):
    from transformers.integrations import deepspeed

    from steerl.reward.kinds.classifier import _whole_weights

    spread = type("Zero3", (), {"is_zero3": lambda self: True})()  # what an engine's config says
    monkeypatch.setattr(deepspeed, "is_accelerate_available", lambda: True)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    deepspeed.set_hf_deepspeed_config(spread)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with _whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled() and "FSDP_CPU_RAM_EFFICIENT_LOADING" not in os.environ
        assert deepspeed.is_deepspeed_zero3_enabled() and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_ids_are_kept_where_the_vocabularies_are_equal_and_only_there(tmp_path):
    """The sampled ids spell the text otherwise than the tokenizer would: the two readings differ."""
    model = tiny_classifier("gpt2", vocab_size=264)
    merging = tiny_tokenizer(264, kind="bytes")
    path = saved(model, tmp_path / "rm", merging)
    (a,), (b,), (ab,) = (merging(text)["input_ids"] for text in ("a", "b", "ab"))
    rollout = Rollout.of_ids([[a]], [[a, b]])
    _, texts = made(["ab"], prompts=["a"])
    by_ids, by_text = alone(model, [a, a, b])[0].item(), alone(model, [a, ab])[0].item()
    assert abs(by_ids - by_text) > 1e-3

    def score(tokenizer, **fields):
        return build_reward([{"kind": "model", "path": path, **fields}], tokenizer=tokenizer)(rollout, texts).total_B.item()

    roles = tiny_tokenizer(264, kind="bytes", pad="</s>", side="right")  # other roles, one vocabulary
    assert score(merging) == pytest.approx(by_ids, abs=1e-5)
    assert score(roles) == pytest.approx(by_ids, abs=1e-5)
    assert score(tiny_tokenizer(265, kind="bytes")) == pytest.approx(by_text, abs=1e-5)
    assert score(None) == pytest.approx(by_text, abs=1e-5)
    assert score(merging, tokens="text") == pytest.approx(by_text, abs=1e-5)
    assert score(tiny_tokenizer(265, kind="bytes"), tokens="ids") == pytest.approx(by_ids, abs=1e-5)


def test_a_vocabulary_is_its_tokens_and_ids():
    assert vocabulary_of(tiny_tokenizer(pad=None)) == vocabulary_of(tiny_tokenizer(pad="</s>", chat=True, side="right"))
    assert vocabulary_of(tiny_tokenizer(64)) != vocabulary_of(tiny_tokenizer(60))


def test_conversations_go_through_the_models_own_template(tmp_path):
    model, tokenizer = tiny_classifier("llama"), tiny_tokenizer(chat=True)
    path = saved(model, tmp_path / "rm", tokenizer)
    chat = [{"role": "user", "content": "a film?"}]
    begun = [*chat, {"role": "assistant", "content": "it is "}]
    rollout, texts = made(["good", "good", "bad"], prompts=[chat, begun, "plain: "])
    expected = [
        tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "good"}], return_dict=False),
        tokenizer.apply_chat_template([*chat, {"role": "assistant", "content": "it is good"}], return_dict=False),
        tokenizer("plain: bad")["input_ids"],
    ]
    got = build_reward([{"kind": "model", "path": path, "tokens": "text"}])(rollout, texts).total_B
    assert (got - torch.stack([alone(model, ids)[0] for ids in expected])).abs().max() < 1e-5


def test_a_conversation_is_rendered_as_the_policys_prompt_was(tmp_path):
    """The row's own tools (a list or JSON text) and template arguments, and the turn that the policy went on with."""
    template = (
        "{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}{% if calm %}calm{% endif %}"
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model, tokenizer = tiny_classifier("llama"), tiny_tokenizer(chat=template)
    path = saved(model, tmp_path / "rm", tokenizer)
    chat, tools = [{"role": "user", "content": "film?"}], [{"name": "look"}]
    begun = [*chat, {"role": "assistant", "content": "it is "}]
    rollout, texts = made(
        ["good"] * 5,
        prompts=[chat, chat, chat, begun, begun],
        tools=[tools, json.dumps(tools), "", None, None],
        chat_template_kwargs=[None, {"calm": True}, '{"calm": true}', {}, {"add_generation_prompt": True}],
    )
    rows = [
        "[look]<user>film?.<assistant>good.", "[look]calm<user>film?.<assistant>good.", "calm<user>film?.<assistant>good.",
        "<user>film?.<assistant>it is good.", "<user>film?.<assistant>it is .<assistant>good.",
    ]  # fmt: skip
    expected = torch.stack([alone(model, tokenizer(row)["input_ids"])[0] for row in rows])
    got = build_reward([{"kind": "model", "path": path, "tokens": "text"}])(rollout, texts).total_B
    assert (got - expected).abs().max() < 1e-5
    rollout, texts = made(["good"], prompts=[[{"role": "user", "content": [{"type": "text", "text": "film?"}]}]])
    with pytest.raises(UserError, match=r"row 10 sample 0: message 0 \(user\) has a list of parts as content, which the chat"):
        build_reward([{"kind": "model", "path": path, "tokens": "text"}])(rollout, texts)


def test_sentence_pairs_and_completions_alone(tmp_path):
    core = tiny_tokenizer().backend_tokenizer
    core.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_input_names=names)
    model = tiny_classifier("bert")
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts = made(["good film", "bad"], prompts=["say:", "q"])
    for reads in ("pair", "completion", "both"):
        pairs = zip(texts.prompts, texts.completions, strict=True)
        encoded = [tokenizer(p, c) if reads == "pair" else tokenizer(c if reads == "completion" else p + c) for p, c in pairs]
        with torch.no_grad():
            expected = [model(**{k: torch.tensor([v]) for k, v in row.items()}).logits[0, 0].item() for row in encoded]
        got = build_reward([{"kind": "model", "path": path, "reads": reads, "tokens": "text"}])(rollout, texts).total_B
        assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_eos_after_texts_that_ended(tmp_path):
    model, tokenizer = tiny_classifier("gpt2"), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts = made(["good", "bad"], ended=[True, False])
    got = build_reward([{"kind": "model", "path": path, "tokens": "text", "add_eos": True}])(rollout, texts).total_B
    rows = [[*tokenizer("askgood")["input_ids"], 2], tokenizer("askbad")["input_ids"]]
    assert got.tolist() == pytest.approx([alone(model, ids)[0].item() for ids in rows], abs=1e-5)


def test_labels_and_outputs(tmp_path):
    model = tiny_classifier("gpt2", labels=3, id2label={0: "BAD", 1: "SO", 2: "GOOD"}, label2id={"BAD": 0, "SO": 1, "GOOD": 2})
    tokenizer = tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts, rows = sampled(tokenizer, ["say:", "x"], ["good film", "a"])
    logits = torch.stack([alone(model, ids) for ids in rows]).double()

    def score(**fields):
        return build_reward([{"kind": "model", "path": path, **fields}], tokenizer=tokenizer)(rollout, texts).total_B.double()

    shares = logits.exp() / logits.exp().sum(1, keepdim=True)
    assert torch.allclose(score(label="GOOD"), logits[:, 2], atol=1e-5)
    assert torch.allclose(score(label=1), logits[:, 1], atol=1e-5)
    assert torch.allclose(score(label="GOOD", output="probability"), shares[:, 2], atol=1e-5)
    assert torch.allclose(score(label="GOOD", output="log_probability"), shares[:, 2].log(), atol=1e-5)
    with pytest.raises(UserError, match=r"reward\[0\].label: .* has 3 labels, 0 \(BAD\), 1 \(SO\), 2 \(GOOD\); choose"):
        score()
    for label in ("FINE", 3, -1):
        with pytest.raises(UserError, match=r"reward\[0\].label: .* is no label of"):
            score(label=label)


def test_one_label_as_a_probability(tmp_path):
    model, tokenizer = tiny_classifier("bert"), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts, rows = sampled(tokenizer, ["say:"], ["good film"])
    got = build_reward([{"kind": "model", "path": path, "output": "probability"}], tokenizer=tokenizer)(rollout, texts)
    assert got.total_B.item() == pytest.approx(1 / (1 + torch.exp(-alone(model, rows[0])[0].double()).item()), abs=1e-6)


def test_a_checkpoint_whose_head_is_not_the_configs(tmp_path):
    path = tmp_path / "rm"
    saved(tiny_classifier("llama", labels=2), path)
    config = json.loads((path / "config.json").read_text())
    config["id2label"], config["label2id"] = {"0": "A"}, {"A": 0}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"reward\[0\].path: .*has weights of another shape for score.weight"):
        build_reward([{"kind": "model", "path": str(path)}])


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "bart"])
def test_a_new_head_is_an_error_unless_allowed(family, tmp_path):
    path = saved(tiny(family), tmp_path / "lm")
    with pytest.raises(UserError, match=r"reward\[0\].path: .*has no weights for .*allow_new_head: true"):
        build_reward([{"kind": "model", "path": path}])
    rollout, texts = made(["good", "bad"])
    scores = build_reward([{"kind": "model", "path": path, "allow_new_head": True}])(rollout, texts)
    assert scores.total_B.isfinite().all()


@pytest.mark.parametrize("kind", ["model", "process"])
@pytest.mark.parametrize("device", ["cuda", "cuda:3", "meta", "no such"])
def test_a_device_that_is_not_there_is_one_line(kind, device, tmp_path):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    path = saved(tiny_classifier("gpt2", per_token=kind == "process"), tmp_path / "rm", tiny_tokenizer())
    with pytest.raises(UserError) as told:
        build_reward([{"kind": kind, "path": path, "device": device}])
    (line,) = told.value.lines
    assert line.startswith(f"reward[0].device: '{device}' cannot be used: ") and line.endswith("; leave it out, or say cpu")
    assert "\n" not in line


def test_a_folder_whose_name_says_what_our_messages_say_gets_no_false_remedy(tmp_path):
    path = tmp_path / "has no weights for"
    path.mkdir()
    with pytest.raises(UserError) as told:
        build_reward([{"kind": "model", "path": str(path)}])
    assert "allow_new_head" not in str(told.value)


def test_a_head_that_is_there_is_read_though_a_new_one_is_allowed(tmp_path):
    model, tokenizer = tiny_classifier("llama", labels=2), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts, rows = sampled(tokenizer, ["say:"], ["good film"])
    part = {"kind": "model", "path": path, "allow_new_head": True, "label": 1}
    assert build_reward([part], tokenizer=tokenizer)(rollout, texts).total_B.item() == pytest.approx(
        alone(model, rows[0])[1].item(), abs=1e-5
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_an_adapter_with_its_head_is_a_reward_model(family, tmp_path):
    """Saved by peft alone; the definition is the model that peft put together."""
    import peft

    base, tokenizer = (tiny(family) if family != "bert" else tiny_classifier("bert")), tiny_tokenizer()
    saved(base, tmp_path / "base", tokenizer)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1)
    model.config.pad_token_id = 0
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, init_lora_weights=False, target_modules="all-linear" if family != "gpt2" else ["c_attn"]
    )
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "rm")
    rollout, texts, rows = sampled(tokenizer, ["say:", "x"], ["good film", "a"])
    with torch.no_grad():
        expected = torch.stack([adapted(input_ids=torch.tensor([ids[:-1] + [9]])).logits[0, 0] for ids in rows])
    rollout.response_BR[torch.arange(2), rollout.lengths_B - 1] = (
        9  # not the pad, not eos: transformers then reads the last token, too
    )
    got = build_reward([{"kind": "model", "path": str(tmp_path / "rm")}], tokenizer=tokenizer)(rollout, texts)
    assert (got.total_B - expected).abs().max() < 1e-5
    assert not is_adapter_folder(tmp_path / "base")


def test_an_adapter_without_a_head_on_a_base_without_one(tmp_path):
    import peft

    saved(tiny("llama"), tmp_path / "base")
    adapted = peft.get_peft_model(tiny("llama"), peft.LoraConfig(task_type="CAUSAL_LM", r=4))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "rm")
    with pytest.raises(UserError, match="has no weights for score"):
        build_reward([{"kind": "model", "path": str(tmp_path / "rm")}])


@pytest.mark.parametrize("family", ["gpt2", "bert", "roberta"])
def test_a_row_over_the_context_is_named_or_cut_on_its_left(family, tmp_path):
    over = {"n_positions": 12} if family == "gpt2" else {"max_position_embeddings": 12 + (family == "roberta")}
    model, tokenizer = tiny_classifier(family, **over), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts, rows = sampled(tokenizer, ["say:", "x"], ["a good film it was", "a"])
    part = {"kind": "model", "path": path}
    with pytest.raises(
        UserError, match=rf"row 10 sample 0 has {len(rows[0])} tokens, the model reads 12; shorten it, or set too_long: cut"
    ):
        build_reward([part], tokenizer=tokenizer)(rollout, texts)
    got = build_reward([{**part, "too_long": "cut"}], tokenizer=tokenizer)(rollout, texts).total_B
    assert got.tolist() == pytest.approx([alone(model, rows[0][-12:])[0].item(), alone(model, rows[1])[0].item()], abs=1e-5)
    short = build_reward([{**part, "too_long": "cut", "max_tokens": 5}], tokenizer=tokenizer)(rollout, texts).total_B
    assert short[0].item() == pytest.approx(alone(model, rows[0][-5:])[0].item(), abs=1e-5)


def test_a_cut_text_keeps_its_opening_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    model = tiny_classifier("bert", max_position_embeddings=8)
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts = made(["a good film it was"], prompts=[""])
    got = build_reward([{"kind": "model", "path": path, "too_long": "cut"}])(rollout, texts).total_B.item()
    ids = tokenizer("a good film it was")["input_ids"]
    assert got == pytest.approx(alone(model, [1, *ids[-7:]])[0].item(), abs=1e-5)


def test_empty_responses(tmp_path):
    model, tokenizer = tiny_classifier("llama"), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts = made(["", "good"], prompts=["ask", "ask"])
    got = build_reward([{"kind": "model", "path": path}])(rollout, texts).total_B
    assert got[0].item() == pytest.approx(alone(model, tokenizer("ask")["input_ids"])[0].item(), abs=1e-5)
    valued = build_reward([{"kind": "model", "path": path, "empty": -7.0}])(rollout, texts).total_B
    assert valued.tolist() == pytest.approx([-7.0, got[1].item()], abs=1e-5)
    with pytest.raises(UserError, match=r"reward\[0\] \(model\): row 10 sample 0 is empty: there is no token to score"):
        build_reward([{"kind": "model", "path": path}])(*made([""], prompts=[""]))


@pytest.mark.parametrize("combine", ["mean", "min", "mean_minus_std"])
def test_ensembles(combine, tmp_path):
    tokenizer = tiny_tokenizer()
    models = [tiny_classifier(family, seed=seed) for seed, family in enumerate(("gpt2", "llama", "bert"))]
    paths = [saved(model, tmp_path / f"rm{i}", tokenizer) for i, model in enumerate(models)]
    rollout, texts, rows = sampled(tokenizer, ["say:", "x"], ["good film", "a"])
    members = [[alone(model, ids)[0].item() for ids in rows] for model in models]
    fields = {"combine": combine, **({"k": 0.5} if combine == "mean_minus_std" else {})}
    scores = build_reward([{"kind": "model", "path": paths, **fields}], tokenizer=tokenizer)(rollout, texts)
    for row in range(2):
        values = [member[row] for member in members]
        mean = sum(values) / 3
        std = (sum((v - mean) ** 2 for v in values) / 3) ** 0.5
        expected = {"mean": mean, "min": min(values), "mean_minus_std": mean - 0.5 * std}[combine]
        assert scores.total_B[row].item() == pytest.approx(expected, abs=1e-5)
        assert [scores.parts[f"model.{i}"][row].item() for i in range(3)] == pytest.approx(values, abs=1e-5)


def test_dtype_by_setting(tmp_path):
    model, tokenizer = tiny_classifier("llama"), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts, rows = sampled(tokenizer, ["say:"], ["good film"])
    with torch.no_grad():
        half = model.to(torch.bfloat16)
        expected = half.score(half.model(input_ids=torch.tensor(rows)).last_hidden_state[0, -1]).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # what the training run does around it must not leak in
        got = build_reward([{"kind": "model", "path": path, "dtype": "bfloat16"}], tokenizer=tokenizer)(
            rollout, texts
        ).total_B.item()
        full = build_reward([{"kind": "model", "path": path}], tokenizer=tokenizer)(rollout, texts).total_B.item()
    assert got == pytest.approx(expected, abs=0.02)
    assert full == pytest.approx(alone(tiny_classifier("llama"), rows[0])[0].item(), abs=1e-5)


def test_scores_leave_nothing_behind(tmp_path):
    """No gradients, no dropout, and the models hooks are gone."""
    path = saved(tiny_classifier("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), tmp_path / "rm")
    reward = build_reward([{"kind": "model", "path": path}])
    first, second = (reward(*made(["good", "bad film"])) for _ in range(2))
    assert not first.total_B.requires_grad and torch.equal(first.total_B, second.total_B)
    model = reward.terms[0].score.__self__.members[0].classifier.core
    assert not any(module._forward_hooks for module in model.modules())


def test_a_folder_without_a_tokenizer(tmp_path):
    model, tokenizer = tiny_classifier("llama"), tiny_tokenizer()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "tok")
    rollout, texts, rows = sampled(tokenizer, ["say:"], ["good film"])
    part = {"kind": "model", "path": str(tmp_path / "rm")}
    with pytest.raises(UserError, match=r"tokenizer: missing; the model's folder has none"):
        build_reward([part], tokenizer=tokenizer)(rollout, texts)
    expected = pytest.approx(alone(model, rows[0])[0].item(), abs=1e-5)
    assert (
        build_reward([{**part, "tokenizer": str(tmp_path / "tok")}], tokenizer=tokenizer)(rollout, texts).total_B.item()
        == expected
    )
    assert build_reward([{**part, "tokens": "ids"}])(rollout, texts).total_B.item() == expected


def test_ids_that_the_model_does_not_have(tmp_path):
    path = saved(tiny_classifier("llama", vocab_size=40), tmp_path / "rm", tiny_tokenizer(40))
    with pytest.raises(UserError, match=r"row 10 sample 0 has token id \d+, but the model has 40 ids; use tokens: text"):
        build_reward([{"kind": "model", "path": path, "tokens": "ids"}])(*made(["good film"]))


def test_a_model_that_overflows_names_the_row(tmp_path):
    model = tiny_classifier("llama")
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    path = saved(model, tmp_path / "rm")
    with pytest.raises(UserError, match=r"reward\[0\] \(model\): row 10 sample 0 scored \[nan\]"):
        build_reward([{"kind": "model", "path": path}])(*made(["good"]))


def test_encoder_decoder_rollouts_join_prompt_and_response(tmp_path):
    """The encoder's own </s> ends its input, not the text."""
    model, tokenizer = tiny_classifier("bert"), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout = Rollout.of_ids([[5, 6, 2]], [[7, 8, 2]], start_ids=(0,))
    got = build_reward([{"kind": "model", "path": path}], tokenizer=tokenizer)(rollout, made(["x"])[1]).total_B.item()
    assert got == pytest.approx(alone(model, [5, 6, 7, 8, 2])[0].item(), abs=1e-5)


def test_rows_on_both_sides_of_a_length_that_changes_the_model_score_as_alone(tmp_path):
    """longrope: within the 24 tokens short factors, beyond them long ones, for everything that shares the pass."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 9.0, 20.0]}
    model, tokenizer = tiny_classifier("phi3", original_max_position_embeddings=24, rope_parameters=rope), tiny_tokenizer()
    path = saved(model, tmp_path / "rm", tokenizer)
    rollout, texts, rows = sampled(
        tokenizer, ["say:", "x", "q"], ["good film", "a very bad film it was again", "the end of it all."]
    )
    assert sorted(len(row) > 24 for row in rows) == [False, False, True]
    expected = torch.stack([alone(model, ids)[0] for ids in rows])
    reward = build_reward([{"kind": "model", "path": path}], tokenizer=tokenizer)
    assert (reward(rollout, texts).total_B - expected).abs().max() < 1e-5


# -- episodes ---------------------------------------------------------------------------------------------------------

TALK = (
    "{% for m in messages %}<{{ m.role }}>{% for c in m.tool_calls or [] %}({{ c.function.name }} "
    "{{ c.function.arguments.of | join(' ') }}){% endfor %}{{ m.content }}.{% endfor %}"
)


def test_a_reward_model_reads_all_turns_of_an_episode(tmp_path):
    """Conversations by its own template, calls and results too; texts as they stand; ids as they are."""
    model, tokenizer = tiny_classifier("llama"), tiny_tokenizer(chat=TALK)
    path = saved(model, tmp_path / "rm", tokenizer)
    never = talk("hm?", ended_by="failure", failure="OSError")
    talks = [*CALCULATOR[:2], talk("go", ("left", " you may"), (" right", ""), chat=False), never]
    rollout, texts = samples_of(talks)
    begun = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "let me see: "}]
    texts = Texts.join([texts, dataclasses.replace(texts.select([0]), prompts=[begun])])
    rollout = Rollout.join([rollout, rollout.select([0])])
    rows = [
        "<user>2+3?.<assistant>(add 2 3).<tool>5.<assistant>it is 5.",
        "<user>4*5?.<assistant>(add 4 5).<tool>9.<assistant>(mul 4 5).<tool>Error: ValueError: no.<assistant>20.",
        "goleft you may right",
        "<user>hm?.",
        "<user>1?.<assistant>(add 2 3)let me see: .<tool>5.<assistant>it is 5.",
    ]
    expected = torch.stack([alone(model, tokenizer(row)["input_ids"])[0] for row in rows])
    part = {"kind": "model", "path": path}
    assert (build_reward([{**part, "tokens": "text"}])(rollout, texts).total_B - expected).abs().max() < 1e-5
    ids = [a + b for a, b in zip(rollout.prompt_ids, rollout.response_ids, strict=True)]
    by_ids = torch.stack([alone(model, row)[0] for row in ids])
    assert (build_reward([{**part, "tokens": "ids"}])(rollout, texts).total_B - by_ids).abs().max() < 1e-5


def test_a_template_without_tools_is_said_in_one_line(tmp_path):
    template = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
    path = saved(tiny_classifier("llama"), tmp_path / "rm", tiny_tokenizer(chat=template))
    with pytest.raises(UserError, match="row 10 sample 0: the chat template does not take this conversation: no tools here"):
        build_reward([{"kind": "model", "path": path, "tokens": "text"}])(*samples_of(CALCULATOR[:1]))
