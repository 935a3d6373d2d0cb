"""Summaries: short articles of town news with one-sentence references, for encoder-decoders (a tiny T5).

The facts of an article stand in any order among asides; its first sentence names only place and day, so taking that one
(the lead-1 baseline) is a fair summary and far from the best.

    article    people in harrow talked of little else on monday . the rain did not help . the baker anna won a silver cup . ...
    summary    anna the baker won a silver cup in harrow on monday .

Files: `tokenizer/`, `base/` (has learned to find and repeat sentences), `sft/` (base, taught to summarize for a while),
`train.jsonl` and `validation.jsonl` (article, summary: what run_summarization.py reads), `sft.jsonl` (prompt, completion),
`prompts.jsonl` and `heldout.jsonl` (prompt, summary: what PPO reads, with ROUGE-L as the reward). Prompts begin "summarize: ".
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from steerl.scripts.toy_tasks import making

PREFIX = "summarize: "
BASE_STEPS, SFT_STEPS = 300, 80
"""`sft` stops while there is something left to learn: sampled summaries are a good deal worse than greedy ones."""
NAMES = (
    "anna", "boris", "carla", "david", "elena", "felix", "greta", "henry", "irene", "jonas", "karin", "louis", "maria", "nils",
    "olga", "peter",
)  # fmt: skip
ROLES = ("baker", "doctor", "farmer", "teacher", "sailor", "painter", "driver", "judge", "cook", "pilot", "singer", "guard")
DEEDS = ("won", "found", "lost", "sold", "bought", "broke", "stole", "built", "painted", "repaired")
THINGS = (
    "a silver cup", "an old boat", "the town clock", "a red car", "a white horse", "the stone bridge", "a golden ring",
    "a small house", "the church bell", "a wooden chair", "a rare book", "a black coat",
)  # fmt: skip
PLACES = ("harrow", "milton", "oakley", "preston", "ridley", "sutton", "thorpe", "weston", "burton", "denham")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
ASIDES = (
    "the rain did not help", "the mayor had no comment", "nobody was surprised", "the streets were full",
    "a crowd stood by and watched", "the news spread quickly", "it was a cold morning", "children ran to see it",
    "the shops closed early", "a band played all night",
)  # fmt: skip


def story(draw: random.Random) -> tuple[list[str], str]:
    """The sentences of an article, and its reference summary."""
    name, other = draw.sample(NAMES, 2)
    role, bystander = draw.sample(ROLES, 2)
    deed, thing, place, day = (draw.choice(words) for words in (DEEDS, THINGS, PLACES, DAYS))
    opening = draw.choice(
        (
            f"people in {place} talked of little else on {day}",
            f"there was much to see in {place} on {day}",
            f"{place} had a busy {day}",
        )
    )
    body = [f"the {role} {name} {deed} {thing}", *draw.sample(ASIDES, draw.randint(1, 3))]
    if draw.random() < 0.5:
        body.append(f"{other} the {bystander} only looked on")
    draw.shuffle(body)
    return [opening, *body], f"{name} the {role} {deed} {thing} in {place} on {day} ."


def article(sentences: list[str]) -> str:
    return " . ".join(sentences) + " ."


def lead(text: str) -> str:
    """The first sentence: the baseline that every summariser is compared with."""
    return text.split(" . ")[0] + " ."


def exercise(draw: random.Random) -> tuple[str, str]:
    """What the base model learns: to repeat the sentence that holds a word."""
    sentences, _ = story(draw)
    sentence = draw.choice(sentences)
    unique = [word for word in sentence.split() if sum(word in other.split() for other in sentences) == 1]
    return f"find {draw.choice(unique)}: {article(sentences)}", f"{sentence} ."


def build(folder: Path, seed: int) -> None:
    draw = random.Random(f"summaries {seed}")
    pairs: dict[str, str] = {}
    while len(pairs) < 1700:
        sentences, summary = story(draw)
        pairs[article(sentences)] = summary
    rows = list(pairs.items())
    train, validation = rows[:1500], rows[1500:]
    making.write_jsonl(folder / "train.jsonl", [{"article": a, "summary": s} for a, s in train])
    making.write_jsonl(folder / "validation.jsonl", [{"article": a, "summary": s} for a, s in validation])
    making.write_jsonl(folder / "sft.jsonl", [{"prompt": PREFIX + a, "completion": s} for a, s in train])
    making.write_jsonl(folder / "prompts.jsonl", [{"prompt": PREFIX + a, "summary": s} for a, s in train])
    making.write_jsonl(folder / "heldout.jsonl", [{"prompt": PREFIX + a, "summary": s} for a, s in validation])

    exercises = [exercise(draw) for _ in range(4000)]
    tokenizer = tokenizer_of([PREFIX + a + " " + s for a, s in train] + [a for a, _ in exercises])
    making.save(folder / "tokenizer", tokenizer)

    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config_of(tokenizer))
    fit(model, tokenizer, exercises, steps=BASE_STEPS, seed=seed)
    making.save(folder / "base", tokenizer, model)
    fit(model, tokenizer, [(PREFIX + a, s) for a, s in train], steps=SFT_STEPS, seed=seed + 1, learning_rate=1e-3)
    making.save(folder / "sft", tokenizer, model)


def tokenizer_of(texts: list[str]) -> PreTrainedTokenizerFast:
    """Bytes with merges, as in the other worlds; like T5's own it ends every text with its stop token."""
    tokenizer = making.bytes_tokenizer(texts, 576)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = None
    return tokenizer


def config_of(tokenizer: PreTrainedTokenizerFast) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=192,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )


def fit(
    model: T5ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    pairs: list[tuple[str, str]],
    *,
    steps: int,
    seed: int,
    batch: int = 32,
    learning_rate: float = 4e-3,
) -> None:
    """Teacher forcing on random batches, with a warm-up and a cosine decay."""
    draw = random.Random(seed)
    sources = [tokenizer(text)["input_ids"] for text, _ in pairs]
    targets = [tokenizer(text)["input_ids"] for _, text in pairs]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(1, steps // 20)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    model.train()
    for _ in range(steps):
        chosen = [draw.randrange(len(pairs)) for _ in range(batch)]
        ids_BP, mask_BP = making.padded([sources[i] for i in chosen], tokenizer.pad_token_id)
        labels_BR, real_BR = making.padded([targets[i] for i in chosen], tokenizer.pad_token_id)
        loss = model(input_ids=ids_BP, attention_mask=mask_BP, labels=torch.where(real_BR, labels_BR, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
    model.eval()
