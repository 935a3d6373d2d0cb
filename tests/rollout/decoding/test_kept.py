"""What could be drawn is in the record: the sets of the settings, from raw logits of lone rows in float64; in both engines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steerl.rollout.decoding.distribution import Distribution, History
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.weights import Space
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.ragged import Kept, listed
from steerl.rollout.types import Rollout
from tests.models import tiny_policy
from tests.rollout.definitions import alone_logits, kept, real_prompt, real_response

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 10, 11, 12], [20], [40, 41, 40, 41, 40]]
MIXTURES: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "temperature": 1.4},
    "min_p": {"min_p": 0.2, "temperature": 0.8},
    "all three": {"top_k": 12, "top_p": 0.9, "min_p": 0.03, "temperature": 1.2},
    "with penalties": {"top_k": 12, "top_p": 0.9, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
}


def sets_of(policy: Any, rollout: Rollout, settings: Sampling) -> list[list[list[int]]]:
    """Of each token of each row, from the row by itself; empty beyond its end."""
    found = []
    for row in range(len(rollout)):
        prompt, response = real_prompt(rollout, row), real_response(rollout, row)
        logits = alone_logits(policy.model, prompt, response, rollout.start_ids)
        before = [*(rollout.start_ids or prompt)]
        own = [kept(logits[t], [*before, *response[:t]], settings) for t in range(len(response))]
        found.append(own + [[]] * (rollout.response_width - len(own)))
    return found


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("family", ("gpt2", "llama", "bart"))
def test_the_record_holds_the_sets_of_lone_rows_in_both_engines(family: str, name: str) -> None:
    """Rows end early and are dropped while others go on, one of twelve a while later; several samples share a prefill."""
    policy = tiny_policy(family)
    settings = Sampling(max_new_tokens=10, n=3, seed=2, stop_ids=[*range(30, 40)], batch_size=16, **MIXTURES[name])
    for kind in ("stream", "generate"):
        rollout, _ = Sampler(policy, settings, engine=EngineSettings(kind)).sample(PromptBatch.of_ids(PROMPTS))
        assert rollout.kept is not None and rollout.kept.lists() == sets_of(policy, rollout, settings)
        assert len(set(rollout.lengths_B.tolist())) > 2
        rows = zip(rollout.response_BR.tolist(), rollout.kept.lists(), strict=True)
        drawn = [[token in ids for token, ids in zip(*row, strict=True)] for row in rows]
        assert torch.equal(torch.tensor(drawn), rollout.action_mask_BR)


def test_ties_go_by_the_written_rule() -> None:
    """Top-k keeps all that are tied with the last of its k, top-p the lower id first, min-p what is exactly at its bound."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0, 0.0]]).log_softmax(-1)
    policy = tiny_policy("gpt2")
    for given, expected in (
        ({"top_k": 2}, [0, 1, 2, 3]),
        ({"top_p": float(logits[0, :3].exp().sum())}, [0, 1, 2]),
        ({"min_p": 0.36787}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.6}, [0, 1]),
    ):
        settings = Sampling(**given)
        rule = Distribution(settings, policy)
        history = History(torch.tensor([[5]]), torch.tensor([[True]]), rule)
        drawn = rule.draw(logits, history, torch.tensor([0.5], dtype=torch.float64), Space())
        assert drawn.kept_BV is not None and drawn.kept_BV[0].nonzero()[:, 0].tolist() == expected
        assert kept(logits[0].tolist(), [5], settings) == expected


def test_a_place_where_nothing_was_left_out_has_no_ids() -> None:
    """Flat logits under min-p: every token is as likely as the likeliest."""
    mask = torch.tensor([[True, False, True], [True, True, True], [False, False, False]])
    ids, counts = listed(mask)
    assert ids.tolist() == [0, 2] and counts.tolist() == [2, 0, 0]
    policy = tiny_policy("gpt2")
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()
    rollout, _ = Sampler(policy, Sampling(max_new_tokens=4, min_p=0.5)).sample(PromptBatch.of_ids(PROMPTS))
    assert rollout.kept is not None and not len(rollout.kept.ids) and not rollout.kept.counts_BR.any()
    assert torch.allclose(rollout.policy_logprobs_BR[rollout.mask_BR], -torch.tensor(64.0).log())


@pytest.mark.parametrize("rows, size", [(1, 13), (3, 4096), (8, 999), (5, 8)])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_a_mask_is_listed_whatever_its_size_and_however_many_are_true(rows: int, size: int, share: float) -> None:
    mask = torch.rand(rows + 1, size, generator=torch.Generator().manual_seed(size)) < share
    for part in (mask[:-1], mask[1:]):  # the second begins in the middle of eight
        ids, counts = listed(part)
        expected = [[i for i in range(size) if row[i]] for row in part.tolist()]
        expected = [[] if len(row) == size else row for row in expected]
        assert counts.tolist() == [len(row) for row in expected] and ids.tolist() == [i for row in expected for i in row]


def test_steps_become_rows() -> None:
    steps = [([[1, 2], [], [3]]), ([[4], [5, 6, 7], []])]
    given = [(torch.tensor([i for ids in row for i in ids]).int(), torch.tensor([len(ids) for ids in row])) for row in steps]
    assert Kept.of_steps(given, 3).lists() == [[[1, 2], [4], []], [[], [5, 6, 7], []], [[3], [], []]]


@pytest.mark.parametrize("given", ({}, {"top_p": 0.9, "replay_mask": False}, {"greedy": True}, {"bad_words_ids": [[5]]}))
def test_nothing_is_recorded_where_nothing_is_replayed(given: dict[str, Any]) -> None:
    for kind in ("stream", "generate"):
        sampler = Sampler(tiny_policy("gpt2"), Sampling(max_new_tokens=4, **given), engine=EngineSettings(kind))
        assert sampler.sample(PromptBatch.of_ids(PROMPTS)).rollout.kept is None


def test_bans_that_leave_only_the_unlikeliest_keep_finite_numbers() -> None:
    """What could be drawn is 200 nats below what was banned: beside that its weight is 0, by itself it is not."""
    policy = tiny_policy("gpt2")
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()
    hook = policy.model.lm_head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([7]), 200.0))
    settings = Sampling(max_new_tokens=4, top_k=63, bad_words_ids=[[7]])
    rollout, _ = Sampler(policy, settings).sample(PromptBatch.of_ids(PROMPTS))
    hook.remove()
    log_63 = torch.tensor(63.0).log()
    for numbers in (rollout.policy_logprobs_BR, rollout.behaviour_logprobs_BR, -rollout.entropy_BR):
        assert torch.allclose(numbers[rollout.mask_BR], -log_63)
