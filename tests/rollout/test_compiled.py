"""The compiled decode path draws the same tokens with the same log-probs as the plain one, or steps aside."""

from __future__ import annotations

import logging

import pytest
import torch

from rollout import compiled
from rollout.errors import Problem
from rollout.prompts import PromptBatch
from rollout.sampler import Sampler
from rollout.sampling import Sampling
from tests.models import tiny_policy

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [13]]


def both(policy, **settings):
    batch = PromptBatch.of_ids(PROMPTS, rows=[0, 1, 2, 3])
    plain, _ = Sampler(policy, Sampling(max_new_tokens=12, **settings)).sample(batch, step=3)
    fixed, _ = Sampler(policy, Sampling(max_new_tokens=12, compile=True, **settings)).sample(batch, step=3)
    return plain, fixed


def assert_same(plain, fixed):
    assert torch.equal(plain.response_BR, fixed.response_BR) and torch.equal(plain.lengths_B, fixed.lengths_B)
    for name in ("behaviour_logprobs_BR", "policy_logprobs_BR", "entropy_BR"):
        torch.testing.assert_close(getattr(fixed, name), getattr(plain, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_static_cache_gives_the_plain_paths_numbers(monkeypatch, family):
    policy, calls = tiny_policy(family), []

    def counted(core, config):
        def call(**inputs):
            mask = inputs["attention_mask"]
            mask = next(iter(mask.values())) if isinstance(mask, dict) else mask
            calls.append((tuple(inputs["input_ids"].shape), tuple(mask.shape)))
            return core(**inputs)

        return call

    monkeypatch.setattr(type(policy.core), "get_compiled_call", counted)
    plain, fixed = both(policy, n=2, top_p=0.9)
    assert_same(plain, fixed)
    # Every step but the first, at one shape although rows end; and lengths differ, so ended rows did stay.
    assert len(calls) == int(fixed.lengths_B.max()) - 1 and len(set(calls)) == 1 and calls[0][0] == (8, 1)
    assert len(set(fixed.lengths_B.tolist())) > 1


def test_what_cannot_be_compiled_goes_the_plain_way_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert_same(*both(tiny_policy("t5")))
        assert_same(*both(tiny_policy("t5"), greedy=True))
    assert [record.getMessage() for record in caplog.records if "sampling.compile" in record.getMessage()] == [
        "sampling.compile: an encoder-decoder has two caches; sampling goes the plain way"
    ]
    hooked = tiny_policy("llama")
    assert compiled.why_not(hooked) is None
    hooked.core.model.layers[0].register_forward_hook(lambda *_: None)
    assert "hooks" in str(compiled.why_not(hooked))
    assert compiled.why_not(tiny_policy("mamba")) is not None


def test_steering_is_refused():
    with pytest.raises(Problem, match=r"sampling\.compile: true, but"):
        Sampler(tiny_policy("llama"), Sampling(compile=True), steering=object())


@pytest.mark.proofs
def test_the_compiler_itself_gives_the_plain_paths_numbers():
    """About a minute of compiling; needs a C++ compiler."""
    assert_same(*both(tiny_policy("llama"), n=2))
