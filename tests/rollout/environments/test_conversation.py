"""Conversations continued on ids: first prompts, answers, what is cut, what must not become a special token."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from steerl.rollout.common.errors import ConfigError, DataError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.environments.types import Answer, Opening
from steerl.rollout.episodes import Episode
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Rollout
from tests.models import tiny_policy, tiny_tokenizer
from tests.rollout.environments.families import ADD, TWICE, conversation, family
from tests.rollout.environments.scripted import scripted

ASK = [{"role": "user", "content": "How much?"}]
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opener }}{% endif %}"
)


def chatml(kind: str = "bytes") -> Any:
    tokenizer = tiny_tokenizer(330, kind=kind, chat=CHATML)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return SimpleNamespace(tokenizer=tokenizer, eos_ids=(end, 2), is_seq2seq=False)


POLICY = chatml()
END, OTHER = POLICY.eos_ids


def encode(text: str, policy: Any = POLICY) -> list[int]:
    return list(policy.tokenizer.encode(text, add_special_tokens=False))


# -- the first prompt --------------------------------------------------------------------------------------------------


def test_tools_are_shown_beside_the_rows_own_and_the_prompt_stays_as_it_was_read():
    own = {"type": "function", "function": {"name": "own"}}
    row = {"tools": json.dumps([own]), "chat_template_kwargs": {"opener": "So: "}}
    prompt, ids = conversation(POLICY, [ADD]).opening(ASK, row, Opening("unread"), "tools")
    assert prompt is ASK
    shown = json.dumps([own, ADD])
    assert ids == encode(
        f"<|im_start|>system\n{shown}<|im_end|>\n<|im_start|>user\nHow much?<|im_end|>\n<|im_start|>assistant\nSo: "
    )


PARTS = [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    ("content", "observation", "becomes"),
    [
        ("a", "b", "ab"),
        (PARTS, "b", [*PARTS, {"type": "text", "text": "b"}]),
        ("a", [{"type": "text", "text": "b"}], [*PARTS, {"type": "text", "text": "b"}]),
        (PARTS, PARTS, [*PARTS, *PARTS]),
        ("a", None, "a"),
    ],
)
def test_what_trls_reset_gives_is_put_at_the_end_of_the_last_message(content, observation, becomes):
    given = [{"role": "system", "content": "s"}, {"role": "user", "content": content, "name": "n"}]
    copy = json.loads(json.dumps(given))
    talk = conversation(family("qwen3_vl"), [ADD])
    prompt, ids = talk.opening(given, {}, Opening(observation), "trl")
    assert prompt == [given[0], {"role": "user", "content": becomes, "name": "n"}] and given == copy
    plain = [
        given[0],
        {"role": "user", "content": becomes if isinstance(becomes, str) else "".join(p["text"] for p in becomes)},
    ]
    assert ids == talk.policy.tokenizer.apply_chat_template(plain, tools=[ADD], add_generation_prompt=True, return_dict=False)


def test_what_a_gym_like_environment_gives_is_the_prompt():
    talk = conversation(POLICY, [])
    assert talk.opening("unread", {}, Opening("a maze"), "gym") == ("a maze", POLICY.tokenizer("a maze")["input_ids"])
    assert talk.opening("as read", {}, Opening(), "gym") == ("as read", POLICY.tokenizer("as read")["input_ids"])
    prompt, ids = talk.opening("unread", {}, Opening(ASK), "gym")
    assert prompt == ASK and ids == encode("<|im_start|>user\nHow much?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("kind", "prompt", "observation", "line"),
    [
        ("tools", "text", None, "environment.tools: tools need conversations and a chat template; give prompts as messages"),
        ("trl", "text", "more", "environment.tools: tools need conversations"),
        ("trl", ASK, {"a": 1}, "reset gave {'a': 1}; expected a text, a list of parts or None"),
        ("gym", "text", 5, "the prompt that reset gave is 5; expected a text or a list of messages"),
        ("gym", "text", "", "the prompt that reset gave is ''; expected a text"),
        ("gym", "text", [{"role": "user"}], "the prompt that reset gave: message 0 .user. has no content"),
    ],
)
def test_prompts_that_are_none_are_refused_in_a_line(kind, prompt, observation, line):
    with pytest.raises((ConfigError, DataError), match=line) as caught:
        conversation(POLICY, [ADD]).opening(prompt, {}, Opening(observation), kind)
    assert "\n" not in str(caught.value)


def test_texts_and_tokenizers_without_a_template_are_refused_where_tools_are():
    plain = SimpleNamespace(tokenizer=tiny_tokenizer(300, kind="bytes"), eos_ids=(2,), is_seq2seq=False)
    with pytest.raises(ConfigError, match="environment.tools: tools need conversations and a chat template"):
        conversation(plain, [ADD]).check("text", {})
    with pytest.raises(ConfigError, match="environment.tools: a conversation, but the tokenizer has no chat template"):
        conversation(plain, [ADD]).check(ASK, {})
    with pytest.raises(ConfigError, match="a conversation, but the tokenizer has no chat template; give texts, or"):
        conversation(plain, []).opening("text", {}, Opening(ASK), "gym")
    conversation(plain, []).check("text", {})


# -- what is fed -------------------------------------------------------------------------------------------------------

TOKEN = st.integers(0, len(POLICY.tokenizer) - 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(TOKEN, max_size=12), st.sampled_from([[END], [OTHER], encode("</tool_call>"), encode("stop"), []]))
def test_whatever_was_drawn_stays_and_only_its_own_end_of_turn_is_not_fed_again(drawn, end):
    """By a stop token of the template, by another one, by a stop string, by the limit."""
    talk = conversation(POLICY, [ADD])
    before = [*talk.opening(ASK, {}, Opening(), "tools")[1], *drawn, *end]
    fed = talk.answer(
        before, [{"role": "tool", "name": "add", "content": "3"}], True, None, {"chat_template_kwargs": {"opener": "!"}}
    )
    tail = encode("<|im_end|>\n<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n!")
    assert fed.ids == (tail[1:] if before[-1] == END else tail)


def test_an_end_of_turn_that_is_no_token_is_fed_but_for_what_of_it_was_drawn():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    policy = SimpleNamespace(tokenizer=tiny_tokenizer(64, chat=template), eos_ids=(2,), is_seq2seq=False)
    talk, tail = conversation(policy, []), "\nuser: b\nassistant:"
    talk.check(ASK, {})
    for said, rest in ((" a", tail), (" a\n", tail[1:]), (" a\nuser:", " b\nassistant:"), (tail, tail), (" au", tail)):
        before = encode("user: a\nassistant:" + said, policy)
        assert talk.answer(before, "b", True, None).ids == encode(rest, policy)


def test_texts_are_the_tokenizers_ids_of_them_alone():
    for kind in ("bytes", "pieces", "word", "char"):
        tokenizer = tiny_tokenizer(330, kind=kind)
        talk = conversation(SimpleNamespace(tokenizer=tokenizer, eos_ids=(2,), is_seq2seq=False), [])
        fed = talk.answer([1, 5, 2], "the film was good.\n", False, None)
        assert fed.ids == tokenizer.encode("the film was good.\n", add_special_tokens=False)
        assert (fed.content, fed.cut) == ("the film was good.\n", False)
    with pytest.raises(DataError, match="environment.factory: the environment gave messages, but the prompts are texts"):
        talk.answer([1], ASK, False, None)


def test_several_tools_that_a_template_has_one_at_a_time():
    """Llama 3.1's refuses a turn with two calls; what they answered is told nevertheless."""
    policy = family("llama3_1")
    told = [{"role": "tool", "name": name, "content": name} for name in ("add", "twice")]
    fed = conversation(policy, [ADD, TWICE]).answer([policy.tokenizer.convert_tokens_to_ids("<|eot_id|>")], told, True, None)
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    answers = "".join(f"{head.format('ipython')}{json.dumps(name)}<|eot_id|>" for name in ("add", "twice"))
    assert policy.tokenizer.decode(fed.ids) == answers + head.format("assistant")


def test_a_turn_ends_at_the_first_of_its_stop_tokens():
    """GLM's turns have no end of their own: the next one's role ends them, whatever comes after that."""
    policy = family("glm4moe")
    told = [{"role": "tool", "name": "add", "content": "3"}, {"role": "user", "content": "So?"}]
    fed = conversation(policy, [ADD]).answer([5], told, True, None)
    text = "<|observation|>\n<tool_response>\n3\n</tool_response><|user|>\nSo?<|assistant|>"
    assert policy.tokenizer.decode(fed.ids) == text


LINES = (
    "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}{% for m in messages %}{{ m.role }}:{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ '\n##\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{{ tools and tools | length }}{{ opener }}{% endif %}"
)


def test_a_turn_that_ends_in_words_and_what_the_template_makes_of_the_rows_columns():
    policy = SimpleNamespace(tokenizer=tiny_tokenizer(300, kind="bytes", chat=LINES), eos_ids=(2,), is_seq2seq=False)
    row = {"tools": [TWICE], "chat_template_kwargs": {"opener": "!"}}
    talk = conversation(policy, [ADD])
    _, begun = talk.opening(ASK, row, Opening(), "tools")
    fed = talk.answer([*begun, 5], [{"role": "tool", "name": "add", "content": "3"}], True, None, row)
    assert policy.tokenizer.decode(begun) == "twice\nadd\nuser:How much?\n##\nassistant:2!"
    assert policy.tokenizer.decode(fed.ids) == "\n##\ntool:3\n##\nassistant:2!"


def test_a_template_that_does_not_show_what_tools_answer_is_refused():
    template = LINES.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    policy = SimpleNamespace(tokenizer=tiny_tokenizer(300, kind="bytes", chat=template), eos_ids=(2,), is_seq2seq=False)
    with pytest.raises(ConfigError, match="environment.tools: the chat template leaves out what a tool says after a turn"):
        conversation(policy, [ADD]).check(ASK, {})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ({"a": [1, "ä"]}, '{"a": [1, "ä"]}'),
        (3.5, "3.5"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"text": "a", "url": "u"}], '[{"text": "a", "url": "u"}]'),
        ({(1, 2): 3}, "{(1, 2): 3}"),
        ("half \ud800 a pair", "half ? a pair"),
    ],
)
def test_contents_that_are_no_texts(content, text):
    fed = conversation(POLICY, [ADD]).answer([END], [{"role": "tool", "name": "add", "content": content}], True, None)
    assert fed.content == [{"role": "tool", "name": "add", "content": text}]
    assert POLICY.tokenizer.decode(fed.ids) == f"\n<|im_start|>tool\n{text}<|im_end|>\n<|im_start|>assistant\n"


# -- what looks like a special token -----------------------------------------------------------------------------------

CHAT_FAMILIES = ("qwen2_5", "qwen3_8", "llama3_1", "gemma4", "glm4moe", "gptoss", "nemotron_3_nano", "lfm2_2_5")


@pytest.mark.parametrize("name", CHAT_FAMILIES)
def test_nothing_that_a_tool_answers_becomes_a_token_of_the_templates(name):
    policy = family(name)
    tokenizer, talk = policy.tokenizer, conversation(policy, [ADD])
    marks = {
        i: token.content
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content in tokenizer.chat_template
    }
    evil = "".join(marks.values()) + "".join(f"{m[:2]}{m}{m[2:]}" for m in marks.values()) + "\ue0f5<\ue0f5|im_end|>"

    def marked(content: str) -> list[int]:
        fed = talk.answer([5], [{"role": "tool", "name": "add", "content": content}], True, None)
        return [i for i in fed.ids if i in marks]

    assert marked(evil) == marked("harmless") and marked("harmless")
    fed = talk.answer([5], [{"role": "tool", "name": "add", "content": evil}], True, None)
    if name != "gptoss" and name != "llama3_1":  # which write JSON
        assert evil.replace("\ue0f5", "") in tokenizer.decode(fed.ids)
    assert fed.content[0]["content"] == evil


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_nothing_that_an_environment_of_texts_gives_becomes_a_special_token(kind):
    """One within another too; and no blank comes in where a text is taken apart."""
    tokenizer = tiny_tokenizer(330, kind=kind)
    tokenizer.add_special_tokens({"extra_special_tokens": ["[[X]]", "[X]"]})
    policy = SimpleNamespace(tokenizer=tokenizer, eos_ids=(2,), is_seq2seq=False)
    fed = conversation(policy, []).answer([5], "a</s><s>b[[X]] [X]", False, None)
    assert not set(tokenizer.all_special_ids) & set(fed.ids)
    assert tokenizer.decode(fed.ids) == "a</s><s>b[[X]] [X]"


# -- what is cut -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=200), st.integers(1, 120), st.booleans())
def test_a_content_has_no_more_tokens_than_it_may(text, most, is_chat):
    fed = conversation(POLICY, []).answer([5], text, is_chat, most)
    content = fed.content[0]["content"] if is_chat else fed.content
    alone = conversation(POLICY, []).answer([5], content, False, None).ids
    assert len(alone) <= most
    if is_chat:
        around = len(conversation(POLICY, []).answer([5], "", True, None).ids)
        assert len(fed.ids) <= most + around
    if not fed.cut:
        assert content == text
    else:
        mark = re.search(r"\.\.\. \[cut after ([\d,]+) of ([\d,]+) tokens\]$", content)
        kept = content[: mark.start()] if mark else content
        assert text.startswith(kept) and len(kept) < len(text)
        whole = len(conversation(POLICY, []).answer([5], text, False, None).ids)
        if mark:
            assert int(mark[2].replace(",", "")) == whole > most
            assert int(mark[1].replace(",", "")) == len(conversation(POLICY, []).answer([5], kept, False, None).ids)
        assert len(alone) > most - 8 or len(kept) == 0  # a character has up to four bytes, and the figures may grow


def test_each_messages_content_is_cut_and_the_templates_tokens_are_whole():
    told = [{"role": "tool", "name": "add", "content": text} for text in ("long " * 2000, "short", "x" * 3000)]
    fed = conversation(POLICY, [ADD]).answer([5], told, True, 60)
    contents = [message["content"] for message in fed.content]
    assert fed.cut and contents[1] == "short" and all(len(encode(text)) <= 60 for text in contents)
    assert contents[2].startswith("xxx") and contents[2].endswith("of 3,000 tokens]")
    expected = (
        "<|im_end|>\n" + "".join(f"<|im_start|>tool\n{text}<|im_end|>\n" for text in contents) + "<|im_start|>assistant\n"
    )
    assert POLICY.tokenizer.decode(fed.ids) == expected


def test_the_mark_says_how_many_tokens_are_left():
    fed = conversation(POLICY, []).answer([5], "ab" * 400, False, 60)
    tokens, mark = fed.ids[: fed.content.count("ab")], fed.content.partition("...")[2]
    assert tokens == encode("ab") * len(tokens) and mark == f" [cut after {len(tokens)} of 400 tokens]"


def test_megabytes_are_cut_quickly():
    fed = conversation(POLICY, [ADD]).answer([5], [{"role": "tool", "name": "add", "content": "spam " * 200_000}], True, 500)
    assert 490 < len(encode(fed.content[0]["content"])) <= 500 and fed.cut


# -- whole episodes ------------------------------------------------------------------------------------------------------


def test_rows_of_episodes_hold_what_was_drawn_and_what_the_template_puts_between():
    """Turns end by the template's stop token, by others and at their limit; every gap is written out by hand."""
    tokenizer = POLICY.tokenizer
    policy = dataclasses.replace(tiny_policy("llama", tokenizer=tokenizer, vocab_size=len(tokenizer)), eos_ids=(END,))
    others = tuple(range(40, 70))

    def reply(row: dict[str, Any], said: list[Any]) -> Answer:
        return Answer(f"{row['column']} {len(said)}", reward=float(len(said)), done=len(said) == 4)

    environment = scripted(reply, max_turns=5)
    environment.conversation = conversation(policy, [])
    sampling = Sampling(max_new_tokens=5, stop_ids=others, n=8)
    ask = [{"role": "user", "content": "Go."}]
    batch = PromptBatch(
        [[1]] * 3, [0, 1, 2], [ask] * 3, [""] * 3, {"column": ["a", "b", "c"], "chat_template_kwargs": [None] * 3}
    )
    rollout, texts = EpisodeSampler(Sampler(policy, sampling), environment).sample(batch, step=0)
    ends = set()
    for row, episode in enumerate(texts.episodes or []):
        ids, mask = rollout.response_ids[row], rollout.action_mask_BR[row].tolist()
        assert rollout.prompt_ids[row] == encode("<|im_start|>user\nGo.<|im_end|>\n<|im_start|>assistant\n")
        assert len(episode.turns) == 4 and episode.ended_by == "environment" and episode.turns[-1].end == len(ids)
        for count, (turn, then) in enumerate(itertools.pairwise(episode.turns), 1):
            drawn, told = ids[turn.first : turn.end], f"{texts.columns['column'][row]} {count}"
            tail = encode(f"<|im_end|>\n<|im_start|>user\n{told}<|im_end|>\n<|im_start|>assistant\n")
            assert ids[turn.end : then.first] == (tail[1:] if drawn[-1] == END else tail)
            assert mask[turn.first : then.first] == [True] * len(drawn) + [False] * (then.first - turn.end)
            assert turn.message == {"role": "assistant", "content": tokenizer.decode(drawn, skip_special_tokens=True)}
            assert turn.answer == [{"role": "user", "content": told}] and turn.reward == count
            ends.add("its own" if drawn[-1] == END else "another" if drawn[-1] in others else "limit")
    assert ends == {"its own", "another", "limit"}


# -- the example of the record -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["reset", "step"])
def test_messages_that_the_template_refuses_end_their_episode_alone(when):
    policy = chatml()
    policy.tokenizer.chat_template = (
        "{% for m in messages if m.role == 'dog' %}{{ raise_exception('no dogs') }}{% endfor %}"
        + (policy.tokenizer.chat_template)
    )
    policy = dataclasses.replace(
        tiny_policy("llama", tokenizer=policy.tokenizer, vocab_size=len(policy.tokenizer)), eos_ids=(END,)
    )
    dog = [{"role": "dog", "content": "wow"}]

    def opening(row: dict[str, Any]) -> Opening:
        return Opening(dog if when == "reset" and row["bad"] else None)

    def reply(row: dict[str, Any], said: list[Any]) -> Answer:
        return Answer(dog if when == "step" and row["bad"] else "go on", reward=1.0)

    environment = scripted(reply, opening, max_turns=2)
    environment.conversation = conversation(policy, [])
    batch = PromptBatch([[1]] * 2, [0, 1], [[{"role": "user", "content": "Go."}]] * 2, [""] * 2, {"bad": [True, False]})
    texts = EpisodeSampler(Sampler(policy, Sampling(max_new_tokens=3)), environment).sample(batch).texts
    ends = [(episode.ended_by, len(episode.turns), "no dogs" in episode.failure) for episode in texts.episodes or []]
    assert ends == [("failure", 1, True), ("turns", 2, False)]


def test_the_example_in_episodes_docstring():
    said = Episode.__doc__ or ""
    lists = {name: ast.literal_eval(value) for name, value in re.findall(r"^ +(\w+) +(\[.*\])$", said, flags=re.MULTILINE)}
    words = {name: re.search(rf"^ +{name} +(.+)$", said, flags=re.MULTILINE)[1].split() for name in ("prompt", "response")}
    vocabulary = dict(zip(words["prompt"] + words["response"], lists["prompt_ids"] + lists["response_ids"], strict=True))
    spelled = {i: word for word, i in vocabulary.items()}
    assert [spelled[i] for i in lists["response_ids"]] == words["response"]

    core = Tokenizer(models.WordLevel({**{f"<{i}>": i for i in range(12) if i not in spelled}, **vocabulary}, unk_token="<0>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", chat_template=template)
    talk = conversation(SimpleNamespace(tokenizer=tokenizer, eos_ids=(vocabulary["</s>"],), is_seq2seq=False), [])
    row, (first, second) = lists["response_ids"], lists["turns"]
    _, prompt = talk.opening([{"role": "user", "content": "guess"}], {}, Opening(), "gym")
    fed = talk.answer([*prompt, *row[slice(*first)]], "higher", True, None)
    assert (prompt, fed.ids) == (lists["prompt_ids"], row[first[1] : second[0]])

    mask = [bool(drawn) for drawn in lists["action_mask"]]
    rollout = Rollout.of_ids([prompt], [row], action_mask_BR=[mask], policy_logprobs_BR=[lists["logprobs"]])
    assert rollout.turns == [lists["turns"]] and lists["place"] == list(range(len(row)))
    assert [logprob == 0 for logprob in lists["logprobs"]] == [not drawn for drawn in mask]
