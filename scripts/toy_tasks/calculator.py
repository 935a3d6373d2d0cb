"""Calculator: products and sums that are too large for the policy. PPO is to call a tool, rightly, and say what it told.

    prompt     what is 374 * 528 ?
    turn       <tool_call>{"name": "multiply", "arguments": {"a": 374, "b": 528}}</tool_call></s>
    told       <|tool|>197472</s><|assistant|>
    turn       197472</s>

The policy learned from demonstrations of which few are right: half guess, of those that call a good part name the wrong tool,
swap digits or write broken JSON, and what the tool told is often not what is said. The reward is all or nothing: 1 where the
last turn is the answer. Numbers have three digits, so that a guess is right less than once in a thousand.

Files: `tokenizer/` (its chat template takes tools), `base/`, `tools.py` (add, multiply), `prompts.jsonl`, `heldout.jsonl`
(prompt, a conversation, and answer).
"""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LOW, HIGH = 100, 999
SIGNS = {"add": "+", "multiply": "*"}
CALLS, RIGHT_CALL, SAYS_IT = 0.5, 0.6, 0.6
"""Shares of demonstrations: that call, of these that call rightly, and of those that were told a number that say it."""
COPIES, STEPS = 400, 100
"""Steps on right demonstrations, where it learns to copy numbers; then on all of them."""
TEMPLATE = (
    "{% if tools %}<|system|>tools:{% for tool in tools %} {{ tool.function.name }}("
    "{{ tool.function.parameters.properties | join(', ') }}){% endfor %}</s>{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>{% endfor %}'
    "</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ERRORS = (
    "error: there is no tool 'times'; there are: add, multiply",
    "error: the call is not JSON: Expecting ',' delimiter: line 1 column 38 (char 37)",
)
Message = dict[str, Any]


def add(a: int, b: int) -> int:
    """
    Add two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def multiply(a: int, b: int) -> int:
    """
    Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


def question(draw: random.Random) -> tuple[str, int, int]:
    return draw.choice(sorted(SIGNS)), draw.randint(LOW, HIGH), draw.randint(LOW, HIGH)


def asked(name: str, a: int, b: int) -> dict[str, Any]:
    """A row of the data."""
    content = f"what is {a} {SIGNS[name]} {b} ?"
    return {"prompt": [{"role": "user", "content": content}], "answer": str(result(name, a, b))}


def result(name: str, a: int, b: int) -> int:
    return {"add": add, "multiply": multiply}[name](a, b)


def call(name: str, a: int, b: int) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': {'a': a, 'b': b}})}</tool_call>"


def guess(draw: random.Random, name: str, a: int, b: int) -> str:
    """As long as the answer; mostly wrong."""
    digits = len(str(result(name, a, b)))
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def right(name: str, a: int, b: int) -> list[str]:
    told = str(result(name, a, b))
    return [call(name, a, b), told, told]


def demonstration(draw: random.Random, name: str, a: int, b: int) -> list[str]:
    """What is said, told, said ...: it ends with a turn."""
    if draw.random() >= CALLS:
        return [guess(draw, name, a, b)]
    if draw.random() < RIGHT_CALL:
        says_it = draw.random() < SAYS_IT
        return right(name, a, b) if says_it else [*right(name, a, b)[:2], guess(draw, name, a, b)]
    kind = draw.randrange(4)
    if kind == 0:
        return right(next(other for other in SIGNS if other != name), a, b)
    if kind == 1:
        return right(name, int(str(a)[::-1]), b)
    wrong = call("times", a, b) if kind == 2 else call(name, a, b).replace(", ", " ", 1)
    return [wrong, ERRORS[kind - 2], guess(draw, name, a, b)]


def build(folder: Path, seed: int) -> None:
    from steerl.scripts.toy_tasks import making

    draw = random.Random(f"calculator {seed}")
    rows = {json.dumps(row): row for row in (asked(*question(draw)) for _ in range(1200))}
    making.write_jsonl(folder / "prompts.jsonl", list(rows.values())[:1000])
    making.write_jsonl(folder / "heldout.jsonl", list(rows.values())[1000:])
    tools = "\n\n\n".join(inspect.getsource(function).rstrip() for function in (add, multiply))
    (folder / "tools.py").write_text(f'"""What the policy may call."""\n\n\n{tools}\n', encoding="utf-8")

    tokenizer = tokenizer_of(draw)
    making.save(folder / "tokenizer", tokenizer)
    model = making.new_causal(tokenizer, seed, max_position_embeddings=512, initializer_range=0.1)
    for is_right, steps, learning_rate in ((True, COPIES, 4e-3), (False, STEPS, 1e-3)):
        ids, known = zip(*(example(draw, tokenizer, is_right) for _ in range(4000)), strict=True)
        settings = {"pad": tokenizer.pad_token_id, "steps": steps, "seed": seed}
        making.fit(model, ids, known, batch=32, learning_rate=learning_rate, **settings)
    making.save(folder / "base", tokenizer, model)


def example(draw: random.Random, tokenizer: PreTrainedTokenizerFast, is_right: bool) -> tuple[list[int], int]:
    """A turn of a demonstration after all that came before, and how much that is. Without tools it guesses."""
    name, a, b = question(draw)
    said = right(name, a, b) if is_right else demonstration(draw, name, a, b)
    tools = [{"function": schema} for schema in _SCHEMAS]
    shown = None if len(said) == 1 and draw.random() < 0.2 else tools
    text = tokenizer.apply_chat_template(asked(name, a, b)["prompt"], shown, add_generation_prompt=True, tokenize=False)
    last = draw.randrange(0, len(said), 2)
    for turn, told in zip(said[:last:2], said[1:last:2], strict=True):
        text += f"{turn}</s><|tool|>{told}</s><|assistant|>"
    before = tokenizer.encode(text)
    return [*before, *tokenizer.encode(said[last]), tokenizer.eos_token_id], len(before)


_SCHEMAS = [{"name": name, "parameters": {"properties": {"a": {}, "b": {}}}} for name in SIGNS]


def tokenizer_of(draw: random.Random) -> PreTrainedTokenizerFast:
    """Words and the parts of a call are tokens, every digit is one."""
    from steerl.scripts.toy_tasks import making

    texts = [asked(*question(draw))["prompt"][0]["content"] for _ in range(200)]
    texts += [call(*question(draw))[11:-12] for _ in range(200)]
    tokenizer = making.bytes_tokenizer([*texts, *ERRORS * 50, "tools: add(a, b) multiply(a, b)"], 400, digits=True)
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer
