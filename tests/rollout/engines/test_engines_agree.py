"""engine.kind generate and stream: the same tokens over families and all of sampling's settings, log-probs to rounding."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Samples
from tests.models import FAMILIES, tiny_policy

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 10, 11, 12], [20], [2, 0, 33, 2], [40, 41, 40, 41, 40]]
# Positions learned, ALiBi and rotary; windows, experts, states; encoder-decoders, one with a forced bos.
QUICK = (
    *("gpt2", "gpt_neo", "opt", "xglm", "bloom", "mpt", "gpt_neox", "gptj", "llama", "qwen3", "phi", "olmo2", "cohere"),
    *("mistral", "gemma2", "gemma3", "mixtral", "mamba", "rwkv", "jamba", "t5", "switch", "bart", "mbart", "led", "m2m_100"),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 1.6},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.15},
    "penalty": {"repetition_penalty": 1.4},
    "reward": {"repetition_penalty": 0.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words": ["ab"], "bad_words_ids": [[3], [5, 6], [40, 41, 40]]},
    "stop ids": {"stop_ids": [*range(20, 40)]},
    "stop strings": {"stop": ["a", "be", "q"]},
    "greedy": {"greedy": True},
    "greedy, all else": {"greedy": True, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "stop": ["b"], "stop_ids": [30]},
    "truncated thrice": {"temperature": 1.3, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "all": {
        "temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3,
        "bad_words_ids": [[7], [40, 41]], "stop": ["ab", "z"], "stop_ids": [11, 17],
    },
}  # fmt: skip
MIXTURES = ("truncated thrice", "all", "greedy, all else")


def both(family: str, **settings: Any) -> tuple[dict[str, Samples], dict[str, float]]:
    """What the two engines give, in two batches of two samples of each prompt; and their seconds."""
    policy = tiny_policy(family)
    sampling = Sampling(**{"max_new_tokens": 8, "n": 2, "seed": 3, "batch_size": 7, **settings})
    batch = PromptBatch.of_ids(PROMPTS, [7 * i + 3 for i in range(len(PROMPTS))], policy.tokenizer)
    given, seconds = {}, {}
    _ = policy.capabilities  # seen in forward passes, once
    for kind in ("stream", "generate"):
        sampler = Sampler(policy, sampling, engine=EngineSettings(kind))
        began = time.perf_counter()
        given[kind] = sampler.draw(batch, step=4)
        seconds[kind] = time.perf_counter() - began
    return given, seconds


def check(family: str, name: str) -> dict[str, float]:
    given, seconds = both(family, **SETTINGS[name])
    (stream, said), (plain, same) = given["stream"], given["generate"]
    assert same == said
    for field, value in stream.tensors().items():
        other = plain.tensors()[field]
        if value.dtype == torch.float32:
            # up to 10 nats, with a few roundings of 1e-6 each: kernels differ by how many rows a product has
            assert torch.allclose(value, other, rtol=0, atol=1e-5), (name, field)
        else:
            assert torch.equal(value, other), (name, field)
    assert (stream.kept is None) == (plain.kept is None), name
    if stream.kept is not None and plain.kept is not None:
        assert torch.equal(stream.kept.counts_BR, plain.kept.counts_BR) and torch.equal(stream.kept.ids, plain.kept.ids), name
    return seconds


@pytest.mark.parametrize("family", QUICK)
def test_the_engines_draw_the_same_tokens(family: str) -> None:
    """One mixture or two a family, so that each comes with eight families and more."""
    place = QUICK.index(family)
    for name in {MIXTURES[place % 3], MIXTURES[(place + 1) % 3]}:
        check(family, name)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_alone(name: str) -> None:
    for family in ("llama", "t5"):
        check(family, name)


def test_the_settings_tried_here_are_all_that_decide_a_token() -> None:
    others = {"max_new_tokens", "n", "batch_size", "batch_tokens", "seed", "compile"}
    tried = {field for settings in SETTINGS.values() for field in settings}
    assert tried | others | {"replay_mask"} >= Sampling.__dataclass_fields__.keys()


@pytest.mark.proofs
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "prophetnet"])
def test_every_setting_over_every_family(family: str) -> None:
    """And what plain generate costs beside the stream, printed. (prophetnet predicts several tokens at once: no policy.)"""
    seconds = [check(family, name) for name in SETTINGS]
    totals = {kind: sum(each[kind] for each in seconds) for kind in ("stream", "generate")}
    print(
        f"{family}: generate {totals['generate']:.2f} s, stream {totals['stream']:.2f} s: {totals['generate'] / totals['stream']:.2f}"
    )
