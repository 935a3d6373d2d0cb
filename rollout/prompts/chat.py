"""Text and conversations -> ids, and ids -> what they say: the one place where prompt and completion meet.

    text ─────────────────── text_ids ───────────┐                     ┌─ prompt text + completion
    messages (a turn may be open) ─ conversation_ids ── ids + drawn ── Speller.after
    messages + completion ── answered ── conversation_ids(whole=True)        for those who read a row as a conversation

The decoded whole row says what a row says. A completion is what it has beyond the decoded prompt: decoded alone it would
lack the blank that sentencepiece and word tokenizers put before its first word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2

from steerl.rollout.common.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from steerl.rollout.model.policy import Policy

UNKNOWN = "\ufffd"
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns of a conversation's row that the chat template is given, beside the messages."""
_OURS = (
    "conversation", "messages", "tools", "tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length",
    "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError)


# -- ids -> text --------------------------------------------------------------------------------------------------------


class Speller:
    """What ids say, seen from the ids before them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        marked = (i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)
        self.silent = frozenset([*tokenizer.all_special_ids, *marked])
        """Special tokens, which have no part in a completion's text."""
        self._known: dict[int, str] = {}

    def after(self, before: Sequence[int], ids: Sequence[int], skip: bool = True) -> str:
        """The text of `ids` as they follow `before`; without special tokens unless `skip` is False."""
        said = [i for i in ids if i not in self.silent] if skip else list(ids)
        if not before:
            return str(self.tokenizer.decode(said))
        known, whole = self.tokenizer.decode(list(before)), self.tokenizer.decode([*before, *said])
        if not whole.startswith(known):
            known = known.rstrip(UNKNOWN)  # a character that was split at the border is whole now
        return str(whole[len(known) :] if whole.startswith(known) else self.tokenizer.decode(said))

    def ids(self, before: Sequence[int], text: str) -> list[int]:
        """The ids of a text that goes on with `before`: its first blank is not said twice where the tokenizer adds one."""
        tries = [self.tokenizer.encode(given, add_special_tokens=False) for given in (text, text.removeprefix(" "))]
        return next((ids for ids in tries if ids and self.after(before, ids, skip=False) == text), tries[0])

    def token(self, token: int) -> str:
        """A token as it is spelled within a text, with its blank, and special ones too."""
        if token not in self._known:
            self._known[token] = self.after(self._anchor, [token], skip=False)
        return self._known[token]

    @cached_property
    def _anchor(self) -> list[int]:
        """Something for a token to stand after."""
        return next(([i] for i in range(len(self.tokenizer)) if i not in self.silent and self._is_clean([i])), [])

    def tail(self, before: Sequence[int]) -> list[int]:
        """The last few of `before`, from which on what follows is spelled as after all of them."""
        width = 8
        while width < len(before) and not self._is_clean(before[-width:]):
            width *= 2
        return list(before[-width:])

    def _is_clean(self, ids: Sequence[int]) -> bool:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return bool(text.strip()) and UNKNOWN not in text


# -- text -> ids --------------------------------------------------------------------------------------------------------


def text_ids(policy: Policy, text: str) -> list[int]:
    """A text as the tokenizer sees it. A decoder-only model goes on from it, so an end token that was added is taken off."""
    ids = [int(i) for i in policy.tokenizer(text)["input_ids"]]
    if not policy.is_seq2seq and len(ids) > 1:
        plain = [int(i) for i in policy.tokenizer(text, add_special_tokens=False)["input_ids"]]
        added = ids[len(ids) - len(plain) :] != plain
        if added and ids[-1] in (*policy.eos_ids, policy.tokenizer.eos_token_id, policy.tokenizer.sep_token_id):
            ids = ids[:-1]
    return ids


def conversation_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Any],
    tools: object = None,
    extra: object = None,
    *,
    whole: bool = False,
    where: str = "prompts",
) -> list[int]:
    """A conversation through the chat template, which says what begins it: no second bos.

    Its last turn is left open for the policy: an assistant's message at the end is continued, after any other one the
    assistant's turn is begun (`extra`, the template's arguments, may ask for a new turn). `whole`: as it stands.
    """
    check_messages(messages, where)
    arguments = {**template_arguments(extra, where), "tools": template_tools(tools, where) or None}
    goes_on = not whole and continues(messages, extra, where)
    if goes_on and not text_of(messages[-1].get("content")).strip():  # a turn without a word is one that only begins
        if messages[-1].get("tool_calls"):
            raise DataError(
                f"{where}: the last message is the assistant's and only calls tools; there is no text to go on from"
            )
        messages, goes_on = messages[:-1], False
    for name in ("add_generation_prompt", "continue_final_message"):
        arguments.pop(name, None)
    arguments |= {"add_generation_prompt": not (goes_on or whole), "continue_final_message": goes_on}
    try:
        ids = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False, **arguments)
        _check_parts(tokenizer, messages, arguments, where)
    except TEMPLATE_ERRORS as error:  # the template is the checkpoint's own code
        told = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{where}: the chat template does not take this conversation: {told:.200}") from error
    return [int(i) for i in ids]


def continues(messages: Sequence[Any], extra: object = None, where: str = "prompts") -> bool:
    """Whether a completion goes on with the conversation's last message; else it is a message of its own."""
    extra = template_arguments(extra, where)
    opens, goes_on = extra.get("add_generation_prompt"), extra.get("continue_final_message")
    named = f"{where}: chat_template_kwargs"
    for name, value in (("add_generation_prompt", opens), ("continue_final_message", goes_on)):
        if value is not None and not isinstance(value, bool):
            raise DataError(f"{named}: {name} is {value!r:.40}; give true or false, or leave it out")
    if messages[-1]["role"] != "assistant":
        if goes_on or opens is False:
            name = "continue_final_message" if goes_on else "add_generation_prompt"
            raise DataError(f"{named}: {name} {goes_on or opens}, but the last message is not the assistant's; leave it out")
        return False
    if opens and goes_on:
        raise DataError(f"{named}: add_generation_prompt and continue_final_message are both true; choose one")
    if opens is False and goes_on is False:
        raise DataError(f"{named}: add_generation_prompt and continue_final_message are both false; no turn would be open")
    return bool(goes_on) if goes_on is not None else not opens


def answered(prompt: Sequence[Any], completion: str, extra: object = None, prompt_text: str = "") -> list[object]:
    """The conversation with the completion in it: in the assistant's message that it goes on with, or in one of its own.

    `prompt_text`: what the policy saw; a template may have taken the last message's trailing blanks off.
    """
    if not continues(prompt, extra):
        return [*prompt, {"role": "assistant", "content": completion}]
    last = prompt[-1]
    content = last.get("content") or ""
    if isinstance(content, list):
        at = max((i for i, part in enumerate(content) if "text" in part), default=-1)
        if at < 0:
            return [*prompt[:-1], {**last, "content": [*content, {"type": "text", "text": completion}]}]
        text = _as_seen(content[at]["text"], prompt_text)
        parts = [{**part, "text": text + completion} if i == at else part for i, part in enumerate(content)]
        return [*prompt[:-1], {**last, "content": parts}]
    return [*prompt[:-1], {**last, "content": _as_seen(content, prompt_text) + completion}]


def continued(prompt: Sequence[Any], said: Sequence[Mapping[str, Any]], extra: object = None, seen: str = "") -> list[object]:
    """The conversation with all messages of an episode; the first of them goes on with its last one, where that is open."""
    if not said or not continues(prompt, extra):
        return [*prompt, *said]
    *earlier, last = answered(prompt, text_of(said[0].get("content")), extra, seen)
    assert isinstance(last, Mapping)
    return [*earlier, {**said[0], **last}, *said[1:]]


def _as_seen(text: str, prompt_text: str) -> str:
    return text.rstrip() if not prompt_text.endswith(text) and prompt_text.endswith(text.rstrip()) else text


def text_of(content: object) -> str:
    """A message's text: its own, or that of its parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else "" if content is None else str(content)


# -- what a template is given -------------------------------------------------------------------------------------------


def is_conversation(value: object) -> bool:
    """Whether a value is a list of {role, content}, rather than a text."""
    return isinstance(value, list) and bool(value) and all(isinstance(message, dict) and "role" in message for message in value)


def check_messages(messages: object, where: str) -> None:
    """One line where a conversation is none, or where a message would enter it empty or as something that is no text."""
    if not isinstance(messages, list | tuple) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages
    ):
        raise DataError(f"{where}: a conversation is a list of messages with a role and a content, found {str(messages)[:80]}")
    if not messages:
        raise DataError(f"{where}: a conversation without a message; give every row one, or leave the row out")
    for at, message in enumerate(messages):
        told, content = f"{where}: message {at} ({message['role']})", message.get("content")
        if content is None and not message.get("tool_calls"):
            raise DataError(f"{told} has no content; give it a text, or leave the message out")
        if isinstance(content, list):
            if wrong := [part for part in content if not (isinstance(part, Mapping) and isinstance(part.get("text"), str))]:
                raise DataError(f"{told} has a part that is no text, {str(wrong[0])[:60]}; only text is read")
        elif content is not None and not isinstance(content, str | Mapping):
            raise DataError(f"{told} has a content of type {type(content).__name__}, {str(content)[:40]!r}; expected a text")


def template_arguments(extra: object, where: str = "prompts") -> dict[str, object]:
    """`chat_template_kwargs` of a row: a mapping, or one as JSON text."""
    arguments = _parsed(extra, f"{where}: chat_template_kwargs")
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise DataError(
            f"{where}: chat_template_kwargs: expected a mapping of the template's arguments, found {str(arguments)[:60]!r}"
        )
    if taken := [name for name in arguments if name in _OURS]:
        raise DataError(f"{where}: chat_template_kwargs: {taken[0]!r} is not the template's to take; leave it out")
    return arguments


def template_tools(tools: object, where: str = "prompts") -> list[object]:
    """`tools` of a row: a list of descriptions, or one as JSON text."""
    descriptions = _parsed(tools, f"{where}: tools")
    if descriptions is not None and not (
        isinstance(descriptions, list) and all(isinstance(tool, dict) for tool in descriptions)
    ):
        raise DataError(f"{where}: tools: expected a list of descriptions, found {str(descriptions)[:60]!r}")
    return descriptions or []


def _parsed(value: object, named: str) -> object:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise DataError(f"{named}: not JSON ({error}): {value[:60]!r}") from error


def _check_parts(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], arguments: Mapping[str, object], where: str
) -> None:
    """A content that is not a plain text must come out of the template as text, not as Python prints it."""
    for at, message in enumerate(messages):
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        whole = {**arguments, "add_generation_prompt": False, "continue_final_message": False}
        rendered = tokenizer.apply_chat_template(list(messages), tokenize=False, **whole)
        texts = [part["text"].strip() for part in content] if isinstance(content, list) else []
        if str(content) in rendered or not all(text in rendered for text in texts):
            kind = "a list of parts" if isinstance(content, list) else "a mapping"
            told = f"{where}: message {at} ({message['role']}) has {kind} as content"
            raise DataError(f"{told}, which the chat template does not read; give a text")
