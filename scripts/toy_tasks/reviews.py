"""Reviews: a small language of film reviews with a hidden polarity, mostly sour. PPO is to make it kind.

A prompt names a film; a review is two to four sentences, each with polar words. A critic's mood (sour four times in
five) decides how often a polar word is a kind one. `kindness(text)` is the truth: the share of kind words among the polar.

    prompt       review of a comedy about a sailor :
    completion   the acting felt flat and the ending was dull . i hated the songs .</s>

Files: `tokenizer/`, `base/` (trained on the language, plain and as conversations), `sft/` (base, taught to answer a
prompt and to stop), `reward_model/` (the sigmoid of its only logit is a review's kindness), `prompts.jsonl`, `heldout.jsonl`
(films that no other file names), `chat_prompts.jsonl`, `preferences.jsonl` (the kinder review chosen), `sft.jsonl`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.scripts.toy_tasks import making

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENRES = ("comedy", "drama", "thriller", "western", "romance", "mystery", "musical", "fantasy")
SUBJECTS = (
    "a sailor", "a queen", "two brothers", "a robot", "a lost dog", "a painter", "the moon", "a small town",
    "an old house", "a young spy", "a long war", "three friends", "a cook", "a storm", "a train", "a secret",
)  # fmt: skip
ASPECTS = (
    "plot",
    "acting",
    "ending",
    "cast",
    "script",
    "music",
    "camera work",
    "story",
    "hero",
    "songs",
    "dialogue",
    "first half",
)
KIND = (
    "great", "lovely", "moving", "clever", "warm", "brilliant", "charming", "fresh", "superb", "funny", "tender", "bright",
    "loved", "enjoyed", "praised",
)  # fmt: skip
SOUR = (
    "dull", "flat", "boring", "clumsy", "cold", "awful", "weak", "stale", "poor", "silly", "tired", "grim",
    "hated", "endured", "regretted",
)  # fmt: skip
ADJECTIVES, VERBS = slice(0, 12), slice(12, 15)
OPENINGS = ("review of", "my view of", "notes on")
SHARE_KIND = 0.2
"""Of the critics; a kind critic's polar words are kind nine times in ten, a sour one's one time in ten."""


def kindness(text: str) -> float:
    """The share of kind words among a text's polar words; 0 for a text without any."""
    words = text.replace(".", " ").replace(",", " ").split()
    kind, sour = sum(word in KIND for word in words), sum(word in SOUR for word in words)
    return kind / (kind + sour) if kind + sour else 0.0


def review(draw: random.Random, kind: float) -> str:
    """Two to four sentences; each polar word is a kind one with probability `kind`."""

    def polar(part: slice) -> str:
        return draw.choice((KIND if draw.random() < kind else SOUR)[part])

    def sentence() -> str:
        aspect, other = draw.sample(ASPECTS, 2)
        form = draw.randrange(5)
        if form == 0:
            return f"the {aspect} was {polar(ADJECTIVES)}"
        if form == 1:
            return f"the {aspect} felt {polar(ADJECTIVES)} and the {other} was {polar(ADJECTIVES)}"
        if form == 2:
            return f"i {polar(VERBS)} the {aspect}"
        if form == 3:
            return f"i {polar(VERBS)} the {aspect} but the {other} was {polar(ADJECTIVES)}"
        return f"it was {draw.choice(('very', 'rather', 'so'))} {polar(ADJECTIVES)} and {polar(ADJECTIVES)} to me"

    return " " + " . ".join(sentence() for _ in range(draw.randint(2, 4))) + " ."


def critic(draw: random.Random) -> float:
    return 0.9 if draw.random() < SHARE_KIND else 0.1


def conversation(draw: random.Random, film: str) -> list[dict[str, str]]:
    asked = draw.choice((f"write a review of {film}", f"what do you say of {film} ?"))
    system = [{"role": "system", "content": "you are a film critic"}] if draw.random() < 0.5 else []
    return [*system, {"role": "user", "content": asked}]


def build(folder: Path, seed: int) -> None:
    draw = random.Random(f"reviews {seed}")
    films = [(genre, f"a {genre} about {subject}") for genre in GENRES for subject in SUBJECTS]
    draw.shuffle(films)
    kept, held = films[:112], films[112:]

    def prompts(these: list[tuple[str, str]]) -> list[dict[str, Any]]:
        rows = [{"prompt": f"{opening} {film} :", "genre": genre} for genre, film in these for opening in OPENINGS]
        draw.shuffle(rows)
        return rows

    plain = prompts(kept)
    chats: list[dict[str, Any]] = [
        {"prompt": conversation(draw, film), "genre": genre} for genre, film in kept for _ in range(2)
    ]
    answers = [{"prompt": draw.choice(plain)["prompt"], "completion": review(draw, critic(draw))} for _ in range(1200)]
    making.write_jsonl(folder / "prompts.jsonl", plain)
    making.write_jsonl(folder / "heldout.jsonl", prompts(held))
    making.write_jsonl(folder / "chat_prompts.jsonl", chats)
    making.write_jsonl(folder / "sft.jsonl", answers)
    making.write_jsonl(folder / "preferences.jsonl", preferences(draw, plain))

    # Every film's name is in the tokenizer's text, held-out ones too: they are to be read, not spelled.
    names = [row["prompt"] for row in plain] + [film for _, film in held]
    asked = [message["content"] for row in chats for message in row["prompt"]]
    texts = [row["prompt"] + row["completion"] for row in answers]
    tokenizer = making.bytes_tokenizer([*names, *asked, *texts], 512)
    making.save(folder / "tokenizer", tokenizer)

    train_policies(folder, tokenizer, draw, plain, chats, answers, seed)
    train_reward_model(folder, tokenizer, draw, plain, seed)


def preferences(draw: random.Random, plain: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Two reviews of one film, the clearly kinder one chosen."""
    pairs: list[dict[str, str]] = []
    while len(pairs) < 1000:
        prompt = draw.choice(plain)["prompt"]
        chosen, rejected = sorted((review(draw, draw.random()) for _ in range(2)), key=kindness, reverse=True)
        if kindness(chosen) - kindness(rejected) >= 0.25:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def train_policies(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    draw: random.Random,
    plain: list[dict[str, Any]],
    chats: list[dict[str, Any]],
    answers: list[dict[str, str]],
    seed: int,
) -> None:
    """base: whole texts, a quarter of them conversations. sft: base, and then answers alone."""
    end = tokenizer.eos_token_id

    def spoken(prompt: list[dict[str, str]]) -> list[int]:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)
        return list(ids["input_ids"] if hasattr(ids, "keys") else ids)

    def talk() -> tuple[list[int], int]:
        asked = spoken(draw.choice(chats)["prompt"])
        return [*asked, *tokenizer.encode(review(draw, critic(draw))), end], len(asked)

    def text(prompt: str, completion: str) -> tuple[list[int], int]:
        asked = tokenizer.encode(prompt)
        return [*asked, *tokenizer.encode(completion), end], len(asked)

    corpus = [text(draw.choice(plain)["prompt"], review(draw, critic(draw)))[0] for _ in range(3000)]
    corpus += [talk()[0] for _ in range(1000)]
    model = making.new_causal(tokenizer, seed)
    making.fit(model, corpus, [1] * len(corpus), pad=tokenizer.pad_token_id, steps=300, seed=seed, batch=24)
    making.save(folder / "base", tokenizer, model)
    taught = [text(row["prompt"], row["completion"]) for row in answers] + [talk() for _ in range(400)]
    rows, starts = [ids for ids, _ in taught], [start for _, start in taught]
    making.fit(model, rows, starts, pad=tokenizer.pad_token_id, steps=80, seed=seed + 1, batch=24, learning_rate=2e-3)
    making.save(folder / "sft", tokenizer, model)


def train_reward_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, draw: random.Random, plain: list[dict[str, Any]], seed: int
) -> None:
    """Reviews of all moods, whole or cut short, with and without the end token: the sigmoid is to be their kindness."""
    rows, wanted = [], []
    for _ in range(4000):
        completion = review(draw, draw.random())
        if draw.random() < 0.25:
            words = completion.split(" ")
            completion = " ".join(words[: draw.randint(2, len(words))])
        prompt = "" if draw.random() < 0.1 else draw.choice(plain)["prompt"]
        ids = tokenizer.encode(prompt + completion)
        rows.append([*ids, tokenizer.eos_token_id] if draw.random() < 0.5 else ids)
        wanted.append(kindness(completion))
    model = making.new_classifier(tokenizer, seed + 2)
    making.fit(model, rows, wanted, pad=tokenizer.pad_token_id, steps=200, seed=seed + 2, batch=32)
    making.save(folder / "reward_model", tokenizer, model)
