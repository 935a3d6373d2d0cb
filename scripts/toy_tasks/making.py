"""What the worlds share: tokenizers and tiny models made from nothing, the same bytes for the same seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import locate
from steerl.rollout.steering.vectors.extract import Pair, directions
from steerl.rollout.steering.vectors.files import save_vector

PAD, END = "<pad>", "</s>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bytes_tokenizer(texts: Iterable[str], vocabulary: int, digits: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: frequent words are one token, any other text can be spelled; pad is its own token.

    `digits`: each is a token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if digits:
        split = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, END, *ROLES],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def words_tokenizer(tokens: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token a word, blanks between them; PAD and END are among `tokens`."""
    core = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=PAD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False)


head_dim = 16
"""Numbers of an attention head of the models made here: `steerl tiny --head_dim` sets it."""


def llama_config(tokenizer: PreTrainedTokenizerFast, **overrides: object) -> LlamaConfig:
    """Hidden 64, two layers: small enough to learn in seconds."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**shape, **overrides})


def new_causal(tokenizer: PreTrainedTokenizerFast, seed: int, **overrides: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(tokenizer, **overrides))


def new_classifier(tokenizer: PreTrainedTokenizerFast, seed: int, **overrides: object) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(llama_config(tokenizer, num_labels=1, **overrides))


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask."""
    width = max(len(row) for row in rows)
    ids_BS = torch.full((len(rows), width), pad)
    for index, row in enumerate(rows):
        ids_BS[index, : len(row)] = torch.tensor(row)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BS, torch.arange(width)[None] < lengths_B[:, None]


def fit(
    model: torch.nn.Module,
    rows: Sequence[Sequence[int]],
    targets: Sequence[Any],
    *,
    pad: int,
    steps: int,
    seed: int,
    batch: int = 48,
    learning_rate: float = 4e-3,
) -> float:
    """Train on random batches with a warm-up and a cosine decay; the last loss.

    A row's target is, for a causal model, the number of its first tokens that are not to be learned (a prompt); for a
    classifier the probability that its sigmoid is to give.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    classifies = isinstance(model, LlamaForSequenceClassification)
    model.train()
    loss = torch.zeros(())
    for _ in range(steps):
        chosen = [draw.randrange(len(rows)) for _ in range(batch)]
        ids_BS, mask_BS = padded([rows[i] for i in chosen], pad)
        if classifies:
            logits_B = model(input_ids=ids_BS, attention_mask=mask_BS, use_cache=False).logits[:, 0]
            wanted_B = torch.tensor([float(targets[i]) for i in chosen])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits_B, wanted_B)
        else:
            learned_BS = mask_BS & (torch.arange(ids_BS.shape[1])[None] >= torch.tensor([targets[i] for i in chosen])[:, None])
            labels_BS = torch.where(learned_BS, ids_BS, -100)
            loss = model(input_ids=ids_BS, attention_mask=mask_BS, labels=labels_BS, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    model.eval()
    return float(loss.detach())


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, model: torch.nn.Module | None = None) -> None:
    """A folder that the Auto classes load, its tokenizer included."""
    tokenizer.save_pretrained(folder)
    if model is not None:
        model.save_pretrained(folder)  # type: ignore[operator]


def save_trait(file: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]) -> None:
    """The mean difference of pairs at every block, at their last token, as a vector file."""
    points = locate(model, At(layers="all"))
    vectors = directions(model, tokenizer, pairs, points, "mean_diff", "last")
    notes = {"method": "mean_diff", "position": "last", "component": "block_output", "pairs": len(pairs)}
    save_vector(file, {int(p.layer or 0): v for p, v in zip(points, vectors, strict=True)}, notes, model)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
