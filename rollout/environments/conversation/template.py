"""ChatTemplate: what a checkpoint's chat template puts after a turn, as text and as ids.

[user, a turn that stands for the policy's, new messages] ── rendered ──> all that follows that turn ── ids
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from steerl.rollout.common.errors import DataError
from steerl.rollout.environments.conversation.calls import call_of
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import TEMPLATE_ERRORS, Speller, template_arguments, template_tools

SAID = "zqSaidqz"
"""Stands for what the policy said."""
MARK = "\ue0f5"
"""Splits what looks like a special token within a text that is none of the template's: its parts are encoded one by one."""
_ASK = {"role": "user", "content": "?"}


def clean(text: str) -> str:
    """Without halves of surrogate pairs, which no tokenizer and no file takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


class ChatTemplate:
    """The template of a policy's tokenizer, given the tools."""

    def __init__(self, policy: Policy, tools: Sequence[Mapping[str, Any]]):
        self.policy, self.tokenizer, self.tools = policy, policy.tokenizer, list(tools)
        self.speller = Speller(policy.tokenizer)

    def arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the template is given beside the messages: the row's own, and the tools."""
        given = template_arguments(row.get("chat_template_kwargs"))
        given.pop("add_generation_prompt", None)
        given.pop("continue_final_message", None)
        return {**given, "tools": self.all_tools(row) or None}

    def all_tools(self, row: Mapping[str, Any]) -> list[Any]:
        return [*template_tools(row.get("tools")), *self.tools]

    def render(self, messages: Sequence[Any], row: Mapping[str, Any], opens: bool = True, **others: Any) -> str:
        """The conversation as a text; `opens`: the assistant's next turn is begun."""
        arguments = {**self.arguments(row), **others, "add_generation_prompt": opens}
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments))
        except TEMPLATE_ERRORS as error:
            told = " ".join(str(error).split()) or type(error).__name__
            told = f"environment: the chat template does not take this conversation: {told:.200}"
            raise DataError(f"{told}; use one that does") from error

    # -- what follows a turn --------------------------------------------------------------------------------------------

    def after_turn(self, told: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> str:
        """What follows the policy's turn where it is told these messages, from the end of its turn on."""
        named = [message.get("name") or "tool" for message in told if message["role"] == "tool"]
        calls = [call_of(name, {"value": SAID if at == len(named) else ""}) for at, name in enumerate(named, 1)]
        turn = {"role": "assistant", "content": ""}
        text = ""
        if calls:
            try:
                text = self.render([_ASK, {**turn, "tool_calls": calls}, *told], row)
            except DataError:
                if len(calls) == 1:
                    raise
                text = self.render([_ASK, {**turn, "tool_calls": calls[-1:]}, *told], row)  # one call a turn is all it takes
        if SAID in text:
            return self._from_end(text.partition(SAID)[2], row)
        text = self.render([_ASK, {**turn, "content": SAID}, *told], row)
        if SAID not in text:
            raise DataError("environment: the chat template leaves out what the assistant said; use one that takes a text")
        return text.partition(SAID)[2]

    def _from_end(self, text: str, row: Mapping[str, Any]) -> str:
        """`text` from where the turn ends in it: at a stop token, or as a turn without calls ends."""
        plain = self.render([_ASK, {"role": "assistant", "content": SAID}], row, opens=False).partition(SAID)[2]
        marked = [i for i in self.encode(plain) if i in self.speller.silent][:1]
        ends = self.tokenizer.convert_ids_to_tokens([*map(int, self.policy.eos_ids), *marked])
        ends += [plain] if plain.strip() and not marked else []
        if not (places := [at for end in ends if end and (at := text.find(end)) >= 0]):
            raise DataError(
                "environment: the chat template ends a turn that calls a tool with no stop token; use one that does"
            )
        return text[min(places) :]

    # -- text -> ids ----------------------------------------------------------------------------------------------------

    def shield(self, value: Any) -> Any:
        """A text that is told the policy, so that what looks like a special token in it is encoded as the text it is."""
        if not isinstance(value, str):
            return value
        text = clean(value)
        while (split := self._control.sub(lambda found: found[0][0] + MARK + found[0][1:], text)) != text:
            text = split
        return text

    def ids(self, text: str, inside: bool = True) -> list[int]:
        """The ids of a text with shields in it. `inside`: it follows others, so that no blank is put before it."""
        first, *others = text.split(MARK)
        ids = self._inside(first) if inside else self.encode(first)
        return ids + [i for piece in others for i in self._inside(piece)]

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False, verbose=False)]

    def _inside(self, text: str) -> list[int]:
        line, ids = self.encode("\n"), self.encode("\n" + text)
        return ids[len(line) :] if line and ids[: len(line)] == line else self.encode(text)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Tokens that a text must not become: the special ones, and those that the template writes."""
        template = ""
        if getattr(self.tokenizer, "chat_template", None):
            template = self.tokenizer.get_chat_template(tools=self.tools or None)
        added = [token for token in self.tokenizer.added_tokens_decoder.values() if token.special or token.content in template]
        texts = {*(token.content for token in added), *self.tokenizer.all_special_tokens}
        texts = {text for text in texts if len(text) > 1 and not text.isspace()}
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
