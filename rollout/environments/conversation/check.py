"""check_template: whether a chat template can be continued on ids, seen on a short conversation before any work is done.

The prompt, a turn and what follows it must be what the template makes of the whole:

    begun + turn + after == rendered([*prompt, message of the turn, answer])

Where they are not, the policy would see its earlier turns otherwise than it said them, or than a server that renders the
whole each time would show them to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from steerl.rollout.common.errors import ConfigError, DataError
from steerl.rollout.environments.conversation.calls import call_of, names, read_turn
from steerl.rollout.environments.conversation.template import ChatTemplate

REASON, TOLD = "zqReasonqz", "zqToldqz"
_THOUGHT = {"reasoning_content": REASON, "thinking": REASON}
_MARKS = (("<think>\n", "\n</think>"), ("<|channel>thought\n", "\n<channel|>"))
"""How reasoning is marked within a content."""


def check_template(template: ChatTemplate, prompt: Sequence[Any], row: Mapping[str, Any], field: str, same: bool) -> None:
    """Refuse a template that takes no tools, whose calls are not read, or (`same`) that renders earlier turns otherwise."""
    try:
        if template.tools and template.render(prompt, row) == template.render(prompt, row, tools=None):
            raise DataError("the chat template shows the policy no tools; use a model whose template takes them")
        problem = _Probe(template, prompt, row).problem()
    except DataError as error:
        raise ConfigError(f"{field}: {str(error).removeprefix('environment: ')}") from error
    if problem and same:
        raise ConfigError(
            f"{field}: the chat template {problem}; use one that keeps earlier turns, or go on with the ids as they were "
            "sampled, environment.earlier_turns as_sampled"
        )


class _Probe:
    """A prompt, a turn (that calls a tool, where there are tools) and what is answered."""

    def __init__(self, template: ChatTemplate, prompt: Sequence[Any], row: Mapping[str, Any]):
        self.template, self.row = template, row
        self.head = [*prompt] if prompt[-1]["role"] != "assistant" else [{"role": "user", "content": "?"}]
        name = names(template.tools)[0] if template.tools else ""
        self.calls = [call_of(name, _arguments(template.tools[0]))] if template.tools else []
        self.told = {"role": "tool", "name": name, "content": TOLD} if self.calls else {"role": "user", "content": TOLD}
        self.begun, self.after = template.render(self.head, row), template.after_turn([self.told], row)
        if TOLD not in self.after:
            who = "a tool" if self.calls else "the user"
            raise DataError(f"environment: the chat template leaves out what {who} says after a turn; use one that shows it")

    def problem(self) -> str:
        """What the template says otherwise of the whole; nothing where it can be continued."""
        if self.calls and not self._reads_calls():
            return "leaves out earlier tool calls"
        plain, thought = self.message(), self.message(**_THOUGHT)
        reasoned = self.last(thought)
        if reasoned.startswith(REASON):  # the prompt opens it, so a turn without any is none that is drawn
            return self._difference(thought, reasoned)
        said = [self.last(plain), self._earlier(plain) if self.calls else "A"]  # as the policy may draw it: one must stay so
        if all(differences := [self._difference(plain, turn) for turn in said]):
            return differences[-1]
        if REASON in reasoned:
            return self._difference(thought, reasoned)
        return "" if self._keeps_thoughts() else "leaves out earlier reasoning"

    def message(self, content: str = "", **others: Any) -> dict[str, Any]:
        content = content if self.calls else f"{content}A"
        return {"role": "assistant", "content": content, **others, **({"tool_calls": self.calls} if self.calls else {})}

    def whole(self, message: Mapping[str, Any]) -> str:
        return self.template.render([*self.head, message, self.told], self.row)

    def last(self, message: Mapping[str, Any]) -> str:
        """The turn as it is rendered where it is the last one, up to its end; nothing where it is begun otherwise."""
        text = self.template.render([*self.head, message], self.row, opens=False)
        if not text.startswith(self.begun):
            return ""
        shared = next((n for n in range(min(len(text), len(self.after)), 0, -1) if text.endswith(self.after[:n])), 0)
        return text[len(self.begun) : len(text) - shared]

    def _earlier(self, message: Mapping[str, Any]) -> str:
        """The turn as it is rendered where it is an earlier one; with its header where it is begun otherwise."""
        text = self.whole(message).removesuffix(self.after)
        if text.startswith(self.begun):
            return text[len(self.begun) :]
        return text[len(os.path.commonprefix([text, self.template.render(self.head, self.row, opens=False)])) :]

    def _keeps_thoughts(self) -> bool:
        """Whether reasoning that is marked within a content stays there."""
        source = self.template.tokenizer.get_chat_template(tools=self.template.arguments(self.row)["tools"])
        within = [self.message(f"{opens}{REASON}{closes}\n\n") for opens, closes in _MARKS if closes.strip() in source]
        return all(REASON in self.whole(message) for message in within)

    def _difference(self, message: Mapping[str, Any], turn: str) -> str:
        """What becomes of a turn, as it was drawn, where it is an earlier one."""
        whole, said = self.whole(message), self.begun + turn + self.after
        if whole == said:
            return ""
        if REASON in turn and REASON not in whole:
            return "leaves out earlier reasoning"
        at = len(os.path.commonprefix([whole, said]))
        which = "begins earlier turns otherwise than the one that is drawn" if at < len(self.begun) else "changes earlier turns"
        return f"{which}: {whole[at : at + 24]!r} instead of {said[at : at + 24]!r}"

    def _reads_calls(self) -> bool:
        """Whether calls are part of earlier turns; then they must be read as they are written."""
        template, turn = self.template, self._earlier(self.message())
        if self.calls[0]["function"]["name"] not in turn:
            return False
        ids, before = template.encode(turn), template.encode(self.begun)
        ids += [i for i in template.encode(self.after)[:1] if i in template.speller.silent]  # the stop token that ends it
        _, calls = read_turn(template.speller, template.tools, ids, template.speller.after(before, ids), before)
        if [call_of(call.name, call.arguments) for call in calls if not call.problem] != self.calls:
            reader = "its response_template does not read that"
            if not getattr(template.tokenizer, "response_template", None):
                reader = (
                    "only JSON in <tool_call> tags is read without a response_template (trl's add_response_schema has many)"
                )
            raise DataError(
                f"environment: the chat template writes a tool call as {turn[:80]!r}, but {reader}; set one that does"
            )
        return True


def _arguments(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as the schema has them, of the kinds that every form of writing a call can hold."""
    properties = tool.get("function", tool).get("parameters", {}).get("properties", {})
    kinds: dict[str, Any] = {"string": "A", "integer": 1}
    return {name: kinds[kind] for name, spec in properties.items() for kind in kinds if spec.get("type") == kind}
