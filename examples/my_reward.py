"""A reward of one's own, tried on texts before a run is started with it.

steerl tiny --out runs/tiny --worlds reviews
python examples/my_reward.py
steerl ppo --config steerl:ppo --run.dir runs/mine --model.path runs/tiny/reviews/sft \
    --prompts.path runs/tiny/reviews/prompts.jsonl \
    --reward '[{name: kind, kind: function, function: examples/my_reward.py:kind}]'
"""

from collections.abc import Callable
from typing import Any

from steerl import ModelSettings, PromptSettings, Sampler, Sampling, build_reward, load_policy, load_prompts

KIND = {"warm", "tender", "charming", "moving", "clever", "great", "lovely", "superb"}


def kind(
    prompts: list[Any], completions: list[str], genre: list[str], log_metric: Callable[[str, float], None], **columns: list[Any]
) -> list[float | None]:
    """The share of kind words, from none to one in eight; None (does not apply) for westerns.

    `genre` is a column of the data; what goes to `log_metric` becomes the metric reward/kind/words."""
    words = [completion.split() for completion in completions]
    log_metric("words", sum(map(len, words)) / len(words))
    shares = [sum(word in KIND for word in row) / max(len(row), 1) for row in words]
    return [None if g == "western" else min(8 * share, 1.0) for g, share in zip(genre, shares, strict=True)]


def main() -> None:
    policy = load_policy(ModelSettings(path="runs/tiny/reviews/sft"))
    prompts = load_prompts(PromptSettings(path="runs/tiny/reviews/prompts.jsonl"), policy)
    rollout, texts = Sampler(policy, Sampling(max_new_tokens=32)).sample(prompts.batch(range(8)))
    terms = [
        {"name": "kind", "kind": "function", "function": kind},
        {"name": "short", "kind": "length", "unit": "words", "max": 20, "weight": 0.2},
    ]
    scores = build_reward(terms)(rollout, texts)
    for row, completion in enumerate(texts.completions):
        parts = "  ".join(f"{name} {values[row]:.2f}" for name, values in scores.parts.items())
        print(f"{scores.total_B[row]:5.2f}  ({parts}) {completion}")


if __name__ == "__main__":
    main()
