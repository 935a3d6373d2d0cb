"""What a reward model reads: the sampled ids as they are, or the text through the reward model's own tokenizer.

    ids    prompt ids + response ids (what was fed in between, too)      when both tokenizers have one vocabulary
    text   a conversation -> the reward model's chat template            otherwise, or `tokens: text`
           (all turns of an episode, tool calls and results too)
           a text         -> prompt + completion, with the tokenizer's own special tokens

Either way a row that does not fit the model's context is refused by name, or cut on its left with `too_long: cut`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steerl.reward.settings import Reads, Tokens
from steerl.reward.types import has_ids
from steerl.rollout.common.errors import DataError
from steerl.rollout.model import auto_classes
from steerl.rollout.model.settings import Hub, base_of, is_adapter_folder
from steerl.rollout.prompts.chat import TEMPLATE_COLUMNS, answered, continued, conversation_ids, is_conversation
from steerl.rollout.types import Rollout, Texts, row_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model", "vocab.json", "vocab.txt")


def vocabulary_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that map the same tokens to the same ids, whatever roles their special tokens have."""
    table = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(table.encode()).hexdigest()


def load_tokenizer(path: str, beside: Sequence[str], where: str, hub: Hub | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer named by `path`, or the one that lies beside the model; None where there is none."""
    folders = (
        [path] if path else [f for f in beside if f and (not Path(f).is_dir() or any((Path(f) / n).is_file() for n in _FILES))]
    )
    if not folders:
        return None
    hub = hub or Hub()
    its_own = hub if folders[0] == beside[-1] else hub.code  # a revision is the model's
    return auto_classes.load_tokenizer(folders[0], f"{where}.tokenizer" if path else f"{where}.path", its_own)


@dataclass(frozen=True)
class ModelInputs:
    """What the model reads, row by row."""

    ids: list[list[int]]
    types: list[list[int]] | None = None
    """Segment ids, where the tokenizer gives them."""
    responses: list[int] | None = None
    """Where each row's response begins; None where the rows are text, whose tokens are not the sampled ones."""


@dataclass(frozen=True)
class InputReader:
    """rollout and texts -> ModelInputs."""

    tokenizer: PreTrainedTokenizerBase | None
    """None: only ids can be read."""
    vocabulary: str | None
    where: str
    tokens: Tokens = "auto"
    reads: Reads = "both"
    add_eos: bool = False
    too_long: Literal["refuse", "cut"] = "refuse"
    context: int | None = None
    size: int = 0
    """Rows of the model's embedding."""

    def __call__(self, rollout: Rollout, texts: Texts, vocabulary: str | None) -> ModelInputs:
        inputs = self._ids(rollout) if self._reads_ids(rollout, vocabulary) else self._text(rollout, texts)
        return self._fitted(inputs, rollout)

    def _reads_ids(self, rollout: Rollout, vocabulary: str | None) -> bool:
        if self.tokens == "ids":
            if not has_ids(rollout):
                raise DataError(f"{self.where}.tokens: ids, but these texts come without ids; use tokens: text")
            return True
        if self.tokens == "auto" and self.reads == "both" and vocabulary is not None and has_ids(rollout):
            if self.tokenizer is None:
                raise DataError(
                    f"{self.where}.tokenizer: missing; the model's folder has none, so name one, or say tokens: ids"
                )
            return vocabulary == self.vocabulary
        return False

    def _ids(self, rollout: Rollout) -> ModelInputs:
        prompts = rollout.prompt_ids
        if rollout.is_encoder_decoder:
            # The encoder's closing token ends its input, not the text that goes on with the response.
            end = getattr(self.tokenizer, "eos_token_id", None)
            prompts = [ids[:-1] if ids and ids[-1] == end else ids for ids in prompts]
        if self.reads == "completion":
            prompts = [[] for _ in prompts]
        ids = [prompt + response for prompt, response in zip(prompts, rollout.response_ids, strict=True)]
        return ModelInputs(ids, responses=[len(prompt) for prompt in prompts])

    def _text(self, rollout: Rollout, texts: Texts) -> ModelInputs:
        if self.tokenizer is None:
            raise DataError(
                f"{self.where}.tokenizer: missing; the model's folder has none, and the rows are to be read as text"
            )
        ended = rollout.ended_B.tolist()
        rows = [self._encode(texts, i, ended[i], row_name(rollout, i)) for i in range(len(texts))]
        types = [types for _, types in rows]
        return ModelInputs([ids for ids, _ in rows], None if any(t is None for t in types) else types)  # type: ignore[arg-type]

    def _encode(self, texts: Texts, index: int, ended: bool, row: str) -> tuple[list[int], list[int] | None]:
        prompt, completion, tokenizer = texts.prompts[index], texts.completions[index], self.tokenizer
        assert tokenizer is not None
        if self.reads == "both" and is_conversation(prompt) and tokenizer.chat_template:
            tools, extra = (texts.columns[name][index] if name in texts.columns else None for name in TEMPLATE_COLUMNS)
            if texts.episodes is None:
                messages = answered(prompt, completion, extra, texts.prompt_texts[index])
            else:
                messages = continued(prompt, texts.episodes[index].messages, extra, texts.prompt_texts[index])
            where = f"{self.where}: {row}"
            return conversation_ids(tokenizer, messages, tools, extra, whole=True, where=where), None
        text = prompt if isinstance(prompt, str) else texts.prompt_texts[index]
        if self.reads == "pair":
            encoded = tokenizer(text, completion)
        else:
            whole = completion if self.reads == "completion" else text + completion
            # A prompt that another template rendered may begin with the very token that this tokenizer would add.
            rendered = bool(tokenizer.bos_token) and whole.startswith(tokenizer.bos_token)
            encoded = tokenizer(whole, add_special_tokens=not rendered)
        ids = list(encoded["input_ids"])
        types = list(encoded["token_type_ids"]) if "token_type_ids" in encoded else None
        if self.add_eos and ended and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
            types = types + types[-1:] if types else types
        return ids, types

    def _fitted(self, inputs: ModelInputs, rollout: Rollout) -> ModelInputs:
        for index, ids in enumerate(inputs.ids):
            name = row_name(rollout, index)
            if not ids:
                raise DataError(f"{self.where}: {name} is empty: there is no token to score; leave the row out")
            if self.size and max(ids) >= self.size:
                raise DataError(
                    f"{self.where}: {name} has token id {max(ids)}, but the model has {self.size} ids; use tokens: text"
                )
            if self.context is None or len(ids) <= self.context:
                continue
            if self.too_long == "refuse":
                lengths = f"{len(ids)} tokens, the model reads {self.context}"
                raise DataError(f"{self.where}: {name} has {lengths}; shorten it, or set too_long: cut")
            self._cut(inputs, index, self.context)
        return inputs

    def _cut(self, inputs: ModelInputs, index: int, context: int) -> None:
        """The last `context` tokens, after a leading bos or cls if there is one."""
        ids, over = inputs.ids[index], len(inputs.ids[index]) - context
        tokenizer = self.tokenizer
        opening = {getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "cls_token_id", None)} - {None}
        kept = 1 if ids[0] in opening and context > 1 else 0
        inputs.ids[index] = ids[:kept] + ids[kept + over :]
        if inputs.types is not None:
            inputs.types[index] = inputs.types[index][:kept] + inputs.types[index][kept + over :]
        if inputs.responses is not None:
            inputs.responses[index] = max(inputs.responses[index] - over, kept)


def folders_of(path: str) -> tuple[str, str]:
    """(model, adapter): an adapter's folder names its base."""
    if is_adapter_folder(path):
        return base_of(path), path
    return path, ""
