"""Chat templates as TRL ships them, over a byte-level tokenizer that has each family's own tokens."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import trl
from tokenizers import AddedToken, Regex, pre_tokenizers
from trl.chat_template_utils import add_response_schema

from steerl.rollout.environments.conversation.conversation import Conversation
from steerl.rollout.environments.settings import EnvironmentSettings
from tests.models import tiny_tokenizer

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|call|>", "<|return|>", "<|endoftext|>", "<turn|>", "<end_of_turn>", "<|tool_response>"),
    *("<|user|>", "<|observation|>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "</s>", "<|eot|>"),
)
"""What ends a turn, in one family or another."""
_TOKEN = re.compile(r"<[|｜]?[^<>\s'\"{}+]{1,40}[|｜]?>|\[[A-Z_]{3,}\]")
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Lines end in tokens of their own, as in all tokenizers of today."""
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "One."}, "w": {"type": "string", "description": "Two."}},
            "required": ["a", "w"],
        },
    },
}
TWICE = {"type": "function", "function": {**ADD["function"], "name": "twice"}}


@cache
def family(name: str, schema: bool = True) -> Any:
    """A policy without a model: the tokenizer of a family, and what ends its turns."""
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer(300, kind="bytes", chat=(FOLDER / f"{name.removesuffix('_training')}.jinja").read_text("utf-8"))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokens = sorted({token for token in _TOKEN.findall(source) if token not in tokenizer.get_vocab()} | {"<|python_tag|>"})
    special = [token for token in tokens if re.search(r"[|｜]|turn|\[", token)]
    tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False) for token in tokens])
    if name.startswith("phi3"):
        tokenizer.eos_token = "<|end|>"
    try:
        add_response_schema(tokenizer)  # known by the template that the variant for training is of
    except ValueError:
        schema = False
    tokenizer.response_template = tokenizer.response_template if schema else None
    tokenizer.chat_template = source
    ids = tokenizer.get_vocab()
    ends = [ids[end] for end in ENDS if end in ids]
    return SimpleNamespace(tokenizer=tokenizer, eos_ids=(*ends, tokenizer.eos_token_id), is_seq2seq=False)


def conversation(policy: Any, tools: list[Any], **settings: Any) -> Conversation:
    named = {"tools": ["x.py:add"]} if tools else {"factory": "x.py:make"}
    return Conversation(policy, tools, EnvironmentSettings(**named, **settings))
