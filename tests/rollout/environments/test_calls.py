"""Turns read as messages and calls, without and with a response template."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerl.rollout.environments.types import Call, Opening
from tests.models import tiny_tokenizer
from tests.rollout.environments.families import ADD, TWICE, conversation, family
from tests.rollout.environments.test_conversation import POLICY, encode

GOOD = '<tool_call>{"name": "add", "arguments": {"a": 1, "w": "x"}}</tool_call>'


def said(text: str, tools: Any = (ADD, TWICE), policy: Any = POLICY) -> Any:
    return conversation(policy, list(tools)).said(encode(text, policy), text, True, [])


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call at all ", "no call at all ", []),
        (GOOD, "", [Call("add", {"a": 1, "w": "x"})]),
        (f"Let me see.\n{GOOD}\n", "Let me see.", [Call("add", {"a": 1, "w": "x"})]),
        (
            f"{GOOD}\n{GOOD.replace('add', 'twice')} so",
            "so",
            [Call("add", {"a": 1, "w": "x"}), Call("twice", {"a": 1, "w": "x"})],
        ),
        ('<tool_call>\n{"name": "add"}\n</tool_call>', "", [Call("add")]),
        ('<tool_call>{"name": "add", "arguments": null}', "", [Call("add")]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [Call("add", {"a": 1})]),
        ('<tool_call>{"name": "sub"}</tool_call>', "", [Call("sub", {}, "no tool named 'sub'; there are: add, twice")]),
        (
            '<tool_call>{"name": "add", "arguments": [1]}</tool_call>',
            "",
            [Call("add", {}, "the arguments of add are no mapping of names to values")],
        ),
    ],
)
def test_calls_in_tags(text, content, calls):
    turn = said(text)
    assert turn.text == text and list(turn.calls) == calls
    written = [{"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    assert turn.message == {"role": "assistant", "content": content, **({"tool_calls": written} if written else {})}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<tool_call>add(1, 2)</tool_call>", "the call is not JSON: "),
        ('<tool_call>{"name": "add", "argum', "the call is not JSON: "),
        ("<tool_call></tool_call>", "the call is not JSON: "),
        ("<tool_call>" + "[" * 100_000, "the call is not JSON: "),
        (
            '<tool_call>{"name": "add", "arguments": "{\\"w\\": \\"\\\\ud800\\"}"}</tool_call>',
            "the call cannot be written as JSON",
        ),
        ('<tool_call>["add"]</tool_call>', "the call has no name"),
        ('<tool_call>{"name": 5}</tool_call>', "the call has no name"),
        ('<tool_call>{"name": ""}</tool_call>', "the call has no name"),
        ('<tool_call>{"name": "add", "arguments": {"w": "\\ud800"}}</tool_call>', "the call cannot be written as JSON"),
    ],
)
def test_calls_that_cannot_be_read_are_told_and_stay_in_the_text(text, problem):
    turn = said(text)
    assert len(turn.calls) == 1 and turn.calls[0].problem.startswith(problem) and turn.calls[0].name == ""
    assert turn.message == {"role": "assistant", "content": text}


def test_what_can_be_read_beside_what_cannot():
    turn = said(f"<tool_call>{{</tool_call> {GOOD}")
    assert [bool(call.problem) for call in turn.calls] == [True, False]
    assert turn.message["content"] == "<tool_call>{</tool_call>" and len(turn.message["tool_calls"]) == 1


def test_without_tools_nothing_is_a_call_and_texts_are_no_messages():
    assert said(GOOD, []).message == {"role": "assistant", "content": GOOD} and said(GOOD, []).calls == ()
    turn = conversation(POLICY, []).said(encode(GOOD), GOOD, False, [])
    assert (turn.text, turn.message, turn.calls) == (GOOD, None, ())


def test_tags_that_are_special_tokens_are_read_from_the_ids():
    tokenizer = tiny_tokenizer(330, kind="bytes")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool_call>", "</tool_call>"]})
    policy = type(POLICY)(tokenizer=tokenizer, eos_ids=(2,), is_seq2seq=False)
    ids = [*encode(f"so {GOOD}", policy), 2]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert "<tool_call>" not in text
    turn = conversation(policy, [ADD]).said(ids, text, True, [5])
    assert turn.calls == (Call("add", {"a": 1, "w": "x"}),) and turn.message["content"] == "so"


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=30),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=6,
    ),
    st.integers(0, 60),
)
def test_nothing_that_a_policy_says_is_an_error_of_ours(name, arguments, cut):
    """Any JSON as a call, cut anywhere, in tags and by response templates; what comes of it is JSON again."""
    body = json.dumps({"name": name, "arguments": arguments})
    texts = (
        f"<tool_call>{body[: -cut or None]}</tool_call>",
        f"<tool_call>{body[: -cut or None]}",
        f"x {body[: -cut or None]}",
    )
    for policy in (POLICY, family("qwen2_5"), family("llama3_1"), family("gptoss"), family("gemma4")):
        for text in texts:
            turn = said(text, policy=policy)
            json.dumps(turn.message)
            assert turn.message["role"] == "assistant" and isinstance(turn.message["content"], str)
            assert all(call.problem or call.name in ("add", "twice") for call in turn.calls)


# -- by a response template ---------------------------------------------------------------------------------------------


def test_reasoning_calls_and_types_by_a_response_template():
    policy = family("qwen3_5_think")
    _, before = conversation(policy, [ADD]).opening([{"role": "user", "content": "?"}], {}, Opening(), "tools")
    text = "hm\n</think>\n\nSo:\n<tool_call>\n<function=add>\n<parameter=a>\n7\n</parameter>\n<parameter=w>\n7\n</parameter>\n</function>\n</tool_call>"
    turn = conversation(policy, [ADD]).said(encode(text + "<|im_end|>", policy), text, True, before)
    assert turn.calls == (Call("add", {"a": 7, "w": "7"}),)
    assert (turn.message["reasoning_content"], turn.message["content"].strip()) == ("hm", "So:")
    bare = conversation(policy, []).said(encode(text + "<|im_end|>", policy), text, True, before)
    assert bare.calls == () and bare.message["reasoning_content"] == "hm"


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", "", "STOP"])
def test_ends_of_turns_are_no_part_of_the_content(end):
    policy = family("qwen2_5")
    policy.tokenizer.add_special_tokens({"extra_special_tokens": ["<|endoftext|>"]})
    turn = conversation(policy, [ADD]).said(encode(f"Well.{end}", policy), "Well.", True, [])
    assert turn.message["content"] == "Well."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen2_5", '<tool_call>\n{"name": "add", "argu\n</tool_call><|im_end|>'),
        ("qwen2_5", '<tool_call>\n{"name": "add", "arguments": {"a"'),
        ("llama3_1", '{"name": "add", "parameters": {"a": }}<|eot_id|>'),
        ("gptoss", " to=functions.add<|channel|>commentary json<|message|>{a<|call|>"),
    ],
)
def test_a_call_that_a_response_template_cannot_read_is_told(name, text):
    policy = family(name)
    turn = conversation(policy, [ADD]).said(encode(text, policy), "plain", True, [])
    assert len(turn.calls) == 1 and turn.calls[0].problem.startswith("the call could not be read: ")
    assert turn.message == {"role": "assistant", "content": "plain"}
