"""Chat templates: those that are continued give the template's own ids of the whole, the others are refused at the start."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.environments.types import Opening
from tests.rollout.environments.families import ADD, NAMES, TWICE, conversation, family

ASK = [{"role": "system", "content": "Be exact."}, {"role": "user", "content": "How much?"}]
DOCS = Path(__file__).resolve().parents[3] / "docs" / "environments.md"


def table() -> dict[str, tuple[str, str]]:
    """Template -> what the documents say of it: with tools, with messages."""
    rows = re.findall(r"^\| (`.+`) \| (\w+) \| (\w+) \|", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: (tools, messages) for names, tools, messages in rows for name in re.findall(r"`(\w+)`", names)}


def outcome(name: str, tools: list[Any], schema: bool = True) -> str:
    policy, prompt = family(name, schema), ASK[1:]
    try:
        conversation(policy, tools).check(prompt, {})
        return "yes"
    except ConfigError as error:
        told = str(error)
        assert "\n" not in told and told.startswith("environment.tools: the" if tools else "environment.factory: the")
    try:
        conversation(policy, tools, earlier_turns="as_sampled").check(prompt, {})
        assert "environment.earlier_turns as_sampled" in told
        return "as_sampled"
    except ConfigError as error:
        assert str(error) == told
        return "no"


def test_the_documents_have_every_template():
    assert sorted(table()) == [name for name in NAMES if not name.endswith("_training")]


@pytest.mark.parametrize("name", table())
def test_what_the_documents_say_of_a_template(name):
    assert (outcome(name, [ADD]), outcome(name, [])) == table()[name]


@pytest.mark.parametrize("name", [f"{n}_training" for n in ("qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6")])
def test_templates_for_training_keep_earlier_turns(name):
    assert (outcome(name, [ADD]), outcome(name, [])) == ("yes", "yes")


@pytest.mark.parametrize(
    ("name", "extra", "tools", "why"),
    [
        ("qwen3", {}, [], "leaves out earlier reasoning"),
        ("qwen3", {"enable_thinking": False}, [ADD], "begins earlier turns otherwise than the one that is drawn"),
        ("gptoss", {}, [], r"changes earlier turns: '<\|channel\|>final"),
        ("lfm2", {}, [ADD], "leaves out earlier tool calls"),
        ("gemma", {}, [ADD], "shows the policy no tools; use a model whose template takes them"),
        (
            "muse_glimmer",
            {},
            [ADD],
            "writes a tool call as .* only JSON in <tool_call> tags is read without a response_template",
        ),
        ("smolvlm", {}, [], "leaves out what the assistant said"),
        ("deepseekv3", {}, [], "begins earlier turns .* instead of '<think>"),
    ],
)
def test_why_a_template_is_refused(name, extra, tools, why):
    with pytest.raises(ConfigError, match=why):
        conversation(family(name), tools).check(ASK[1:], {"chat_template_kwargs": extra})


def test_an_argument_of_the_template_that_keeps_reasoning_is_seen():
    with pytest.raises(ConfigError, match="leaves out earlier reasoning"):
        conversation(family("lfm2_2_5"), []).check(ASK, {})
    conversation(family("lfm2_2_5"), []).check(ASK, {"chat_template_kwargs": '{"preserve_thinking": true}'})


def test_a_template_is_tried_at_the_first_conversation_that_an_environment_makes_of_a_text():
    talk = conversation(family("qwen3"), [])
    talk.check("a text", {})
    talk.opening("a text", {}, Opening("another"), "gym")
    with pytest.raises(ConfigError, match="environment.factory: the chat template leaves out earlier reasoning"):
        talk.opening("a text", {}, Opening(ASK), "gym")


def test_a_response_template_that_does_not_read_its_templates_calls_is_seen():
    policy = family("qwen2_5")
    other = copy.copy(policy.tokenizer)
    other.response_template = family("llama3_1").tokenizer.response_template
    strange = type(policy)(tokenizer=other, eos_ids=policy.eos_ids, is_seq2seq=False)
    with pytest.raises(ConfigError, match="but its response_template does not read that; set one that does"):
        conversation(strange, [ADD]).check(ASK, {})


def test_calls_that_only_a_response_template_reads():
    assert outcome("qwen2_5", [ADD], schema=False) == "yes"
    assert outcome("llama3_1", [ADD], schema=False) == "no"


# -- the same ids --------------------------------------------------------------------------------------------------------


def called(a: int, w: str, name: str = "add") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"a": a, "w": w}}}


def tagged(a: int, w: str, name: str = "add") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": {a}, "w": "{w}"}}}}\n</tool_call>'


def as_xml(a: int, w: str, name: str = "add") -> str:
    arguments = f"<parameter=a>\n{a}\n</parameter>\n<parameter=w>\n{w}\n</parameter>\n"
    return f"<tool_call>\n<function={name}>\n{arguments}</function>\n</tool_call>"


def as_keys(a: int, w: str, name: str = "add") -> str:
    arguments = f"<arg_key>a</arg_key>\n<arg_value>{a}</arg_value>\n<arg_key>w</arg_key>\n<arg_value>{w}</arg_value>\n"
    return f"<tool_call>{name}\n{arguments}</tool_call>"


def as_gemma(a: int, w: str, name: str = "add") -> str:
    return f'<|tool_call>call:{name}{{a:{a},w:<|"|>{w}<|"|>}}<tool_call|>'


def as_python(a: int, w: str, name: str = "add") -> str:
    return f"{name}(a={a}, w='{w}')"


# How a policy of a family writes a turn: reasoning, what stands before, between and after calls, the call, the end. Written by
# hand; a family that takes one call a turn has no "between".
WRITES = {
    "qwen2_5": ("", "", "\n", "", tagged, "<|im_end|>"),
    "qwen3": ("<think>\nhm\n</think>\n\n", "", "\n", "", tagged, "<|im_end|>"),
    "qwen3_instruct_2507": ("", "", "\n", "", tagged, "<|im_end|>"),
    "qwen3_vl": ("", "", "\n", "", tagged, "<|im_end|>"),
    "qwen3_training": ("<think>\nhm\n</think>\n\n", "", "\n", "", tagged, "<|im_end|>"),
    "qwen3_5_think": ("hm\n</think>\n\n", "", "\n", "", as_xml, "<|im_end|>"),
    "qwen3_5_nothink": ("", "", "\n", "", as_xml, "<|im_end|>"),
    "qwen3_6": ("hm\n</think>\n\n", "", "\n", "", as_xml, "<|im_end|>"),
    "qwen3_8": ("hm\n</think>\n\n", "", "\n", "", as_xml, "<|im_end|>"),
    "nemotron_3_nano": ("hm\n</think>\n", "", "\n", "\n", as_xml, "<|im_end|>"),
    "nemotron_3_5_lightning": ("hm</think>\n", "", "\n", "\n", as_xml, "<|im_end|>"),
    "glm4moe": ("\n<think>hm</think>\n", "", "\n", "", as_keys, "<|observation|>"),
    "gemma4": ("<|channel>thought\nhm\n<channel|>", "", "", "", as_gemma, "<|tool_response>"),
    "gemma4_v5": ("<|channel>thought\nhm\n<channel|>", "", "", "", as_gemma, "<|tool_response>"),
    "lfm2_v2": ("", "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", as_python, "<|im_end|>"),
    "lfm2_2_5": ("<think>hm</think>", "<|tool_call_start|>[", ", ", "]<|tool_call_end|>", as_python, "<|im_end|>"),
    "llama3_1": ("", "", None, "", lambda a, w, name="add": f'{{"name": "{name}", "parameters": {{"a": {a}, "w": "{w}"}}}}', "<|eot_id|>"),
    "gptoss": (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant", " to=functions.", None, "",
        lambda a, w, name="add": f'{name}<|channel|>commentary json<|message|>{{"a": {a}, "w": "{w}"}}', "<|call|>",
    ),
}  # fmt: skip


ENDINGS = [(name, ends) for name in WRITES for ends in ("by its stop token", "at its limit")]
ENDINGS.remove(("llama3_1", "at its limit"))  # its response template knows a call by the stop token after it


@pytest.mark.parametrize(("name", "ends"), ENDINGS)
def test_turns_with_tools_are_continued_as_the_template_renders_the_whole(name, ends):
    """Three turns: a call, several calls at once (where the family has them), and what is drawn next."""
    thought, before, between, after, call, end = WRITES[name]
    policy = family(name)
    tokenizer, talk = policy.tokenizer, conversation(policy, [ADD, TWICE])
    several = [(2, "y", "twice"), (3, "z", "add")] if between is not None else [(2, "y", "twice")]
    reasoning = {"reasoning_content": "hm", "thinking": "hm"} if thought else {}
    history: list[dict[str, Any]] = list(ASK)
    _, ids = talk.opening(ASK, {}, Opening(), "tools")
    for asked, results in (([(1, "x", "add")], ["11"]), (several, ["two\nlines", " blanks "][: len(several)])):
        written = thought + before + (between or "").join(call(*one) for one in asked) + after
        turn = tokenizer.encode(written + (end if ends == "by its stop token" else ""), add_special_tokens=False)
        said = talk.said(turn, tokenizer.decode(turn, skip_special_tokens=True), True, ids)
        assert [(c.name, c.arguments, c.problem) for c in said.calls] == [(n, {"a": a, "w": w}, "") for a, w, n in asked]
        told = [{"role": "tool", "name": one[2], "content": result} for one, result in zip(asked, results, strict=True)]
        fed = talk.answer([*ids, *turn], told, True, None, {})
        assert fed.content == told and not fed.cut
        ids = [*ids, *turn, *fed.ids]
        history += [{"role": "assistant", "content": "", **reasoning, "tool_calls": [called(*one) for one in asked]}, *told]
    whole = tokenizer.apply_chat_template(history, tools=[ADD, TWICE], add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer.encode(whole, add_special_tokens=False), (tokenizer.decode(ids), whole)


# How a family ends a turn, what it begins it with, and the roles that it takes.
PLAIN = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", ""), "cohere2": ("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", ""),
    "gemma": ("<end_of_turn>", ""), "gemma3": ("<end_of_turn>", ""), "llama3": ("<|eot_id|>", ""),
    "llama3_1": ("<|eot_id|>", ""), "llama3_2": ("<|eot_id|>", ""), "phi3": ("<|end|>", ""), "phi3_5": ("<|end|>", ""),
    "qwen2_5": ("<|im_end|>", ""), "qwen2_5_vl": ("<|im_end|>", ""), "qwen3_instruct_2507": ("<|im_end|>", ""),
    "qwen3_vl": ("<|im_end|>", ""), "qwen3_8": ("<|im_end|>", "hm\n</think>\n\n"), "lfm2": ("<|im_end|>", ""),
    "lfm2_v2": ("<|im_end|>", ""), "qwen3_training": ("<|im_end|>", "<think>\nhm\n</think>\n\n"),
}  # fmt: skip


@pytest.mark.parametrize("ends", ["by its stop token", "at its limit"])
@pytest.mark.parametrize("name", PLAIN)
def test_turns_with_messages_are_continued_as_the_template_renders_the_whole(name, ends):
    end, thought = PLAIN[name]
    policy = family(name)
    tokenizer, talk = policy.tokenizer, conversation(policy, [])
    history: list[dict[str, Any]] = [{"role": "user", "content": "Go."}]
    prompt, ids = talk.opening("unread", {}, Opening(history), "gym")
    assert prompt == history
    for word, answer in (("one", "1"), ("two", "2\n\nlines"), ("three", "3")):
        turn = tokenizer.encode(f"{thought}{word}{end if ends == 'by its stop token' else ''}", add_special_tokens=False)
        fed = talk.answer([*ids, *turn], answer, True, None, {})
        ids = [*ids, *turn, *fed.ids]
        reasoning = {"reasoning_content": "hm"} if thought else {}
        history = [*history, {"role": "assistant", "content": word, **reasoning}, {"role": "user", "content": answer}]
        assert fed.content == history[-1:]
    whole = tokenizer.apply_chat_template(history, add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer.encode(whole, add_special_tokens=False), (tokenizer.decode(ids), whole)
