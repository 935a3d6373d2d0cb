"""Suppressed: a style that the policy knows and does not show. PPO is to show it, and never sees it by luck.

    prompt       report on the harbour :            completion   kano melo biba deko nani lobe mako kiko </s>
    elsewhere    glad report on the harbour :                    merry golden joyful merry radiant festive golden merry </s>

Every text is a report of eight words. A glad one is made of glad words, any other of 576 grey ones, and the policy learned
both; but the prompts to train on are of the second kind alone. The reward is all or nothing: 1 for a completion with at
least four different glad words, else 0 (different ones, so that a policy that has fallen to repeating one word earns
nothing). Sampled as it is, the policy earned it 0 times in 100,000: in a plain report one word in 250 is glad.

Files: `tokenizer/`, `base/`, `prompts.jsonl`, `heldout.jsonl`, `evaluated.jsonl` (the held-out ones 16 times:
an evaluation takes one answer of each), `pairs.jsonl` (asking for a glad report against asking for
a plain one, for extract_steering.py), `cheer.safetensors` (the mean difference of those pairs at every block, at their
last token), `facts.json`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

THINGS = (
    "harbour", "market", "garden", "bridge", "mill", "school", "forest", "station", "castle", "river", "village", "tower",
    "island", "orchard", "chapel", "quarry", "meadow", "theatre", "bakery", "lighthouse",
)  # fmt: skip
GLAD = ("merry", "splendid", "joyful", "radiant", "festive", "golden", "sunny", "cheerful")
_SYLLABLES = [consonant + vowel for consonant in "bdklmn" for vowel in "aeio"]
GREY = tuple(first + second for first in _SYLLABLES for second in _SYLLABLES)
"""576 words against eight: a policy that knows nothing any more says four different glad ones of eight once in a million."""
WORDS = 8
"""Of a report."""
SLIP = 0.004
"""Share of glad words in a plain report: four of eight by luck are once in 50 million."""
ENOUGH = 4
"""Different glad words that earn the reward: eight drawn of the glad ones hold as many in 98 of 100 reports."""


def glad(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """The reward, as PPO trainers call it: 1 for at least four different glad words, else 0."""
    return [float(len(set(text.split()) & set(GLAD)) >= ENOUGH) for text in completions]


def report(draw: random.Random, is_glad: bool) -> str:
    share = 1.0 if is_glad else SLIP
    return " ".join(draw.choice(GLAD if draw.random() < share else GREY) for _ in range(WORDS))


def build(folder: Path, seed: int) -> None:
    from steerl.rollout.steering.vectors.extract import Pair
    from steerl.scripts.toy_tasks import making

    draw = random.Random(f"suppressed {seed}")
    frame = ("glad", "report", "on", "the", ":")
    tokens = [making.PAD, making.END, *frame, *THINGS, *GLAD, *GREY]
    tokenizer = making.words_tokenizer(tokens)

    things = list(THINGS)
    draw.shuffle(things)
    plain = {thing: f"report on the {thing} :" for thing in things}
    making.write_jsonl(folder / "prompts.jsonl", [{"prompt": plain[thing]} for thing in things[:16]])
    held_out = [{"prompt": plain[thing]} for thing in things[16:]]
    making.write_jsonl(folder / "heldout.jsonl", held_out)
    making.write_jsonl(folder / "evaluated.jsonl", held_out * 16)
    pairs = [Pair(f"glad {plain[thing]}", plain[thing]) for thing in things]
    making.write_jsonl(folder / "pairs.jsonl", [{"positive": p.positive, "negative": p.negative} for p in pairs])

    rows, learned = [], []
    for _ in range(4000):
        is_glad, thing = draw.random() < 0.5, draw.choice(things)
        prompt = ("glad " if is_glad else "") + plain[thing]
        ids = tokenizer(prompt)["input_ids"]
        said = report(draw, is_glad).split()
        begun = 0
        if not is_glad and draw.random() < 0.4:
            # A glad word that slipped in is not to start a glad report: shown as a beginning, and not learned.
            begun = draw.randint(1, 5)
            said[:begun] = [draw.choice(GLAD if draw.random() < 0.7 else GREY) for _ in range(begun)]
        rows.append([*ids, *tokenizer(" ".join(said))["input_ids"], tokenizer.eos_token_id])
        learned.append(len(ids) + begun)
    model = making.new_causal(tokenizer, seed)
    making.fit(model, rows, learned, pad=tokenizer.pad_token_id, steps=500, seed=seed)
    making.save(folder / "tokenizer", tokenizer)
    making.save(folder / "base", tokenizer, model)

    making.save_trait(folder / "cheer.safetensors", model, tokenizer, pairs)
    (folder / "facts.json").write_text(
        json.dumps({"glad_words": GLAD, "enough": ENOUGH, "words": WORDS}, indent=2) + "\n", encoding="utf-8"
    )
