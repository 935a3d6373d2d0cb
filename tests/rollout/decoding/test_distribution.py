"""The draw follows the recorded law (exactness row 26), and every processor is its definition, in the declared order."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding.distribution import Distribution, History
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.weights import Space, Weights, kth_largest, nucleus
from tests.models import tiny_policy
from tests.rollout.definitions import entropy, law, log_softmax

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 2.5},
    "cold": {"temperature": 0.4},
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "penalty": {"repetition_penalty": 1.8},
    "ngrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[3], [5, 6]]},
    "everything": {
        "temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2, "bad_words_ids": [[9]],
    },
}  # fmt: skip
SEEN = [5, 6, 7, 5]


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_policy("gpt2")


def history(rule: Distribution, rows: int, pads: int = 3) -> History:
    tokens = torch.tensor([[0] * pads + SEEN]).expand(rows, -1)
    real = torch.tensor([[False] * pads + [True] * len(SEEN)]).expand(rows, -1)
    return History(tokens, real, rule)


@pytest.mark.parametrize("size", (64, 300))
@pytest.mark.parametrize("name", SETTINGS)
def test_counts_of_many_draws_pass_a_chi_square_test_against_the_recorded_law(policy: Any, name: str, size: int) -> None:
    settings, draws = Sampling(**SETTINGS[name]), 40_000
    rule = Distribution(settings, policy)
    rule.vocab_size = size
    logits = torch.randn(1, size, generator=torch.Generator().manual_seed(size)) * 1.5
    expected = law(logits[0].double().tolist(), SEEN, settings)
    rows = torch.arange(draws)
    counts, recorded = torch.zeros(size), torch.full((size,), -math.inf)
    for part in rows.split(4000):
        uniform = uniforms(11, 2, part, part * 0, 5)
        drawn = rule.draw(logits.expand(len(part), -1), history(rule, len(part)), uniform, Space())
        counts += torch.bincount(drawn.tokens_B, minlength=size)
        recorded[drawn.tokens_B] = drawn.behaviour_B
        assert not drawn.bad_B.any()
    for token in counts.nonzero()[:, 0].tolist():
        assert abs(float(recorded[token]) - expected[token]) < 1e-5
    probabilities = torch.tensor(expected, dtype=torch.float64).exp()
    assert not counts[probabilities == 0].any()
    kept = probabilities * draws >= 5
    observed = torch.cat([counts[kept].double(), counts[~kept].double().sum()[None]])
    wanted = torch.cat([probabilities[kept], probabilities[~kept].sum()[None]]) * draws
    use = wanted > 0
    assert stats.chisquare(observed[use].numpy(), (wanted[use] / wanted[use].sum() * draws).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("name", SETTINGS)
def test_scores_are_the_definition(policy: Any, name: str) -> None:
    settings = Sampling(**SETTINGS[name])
    rule = Distribution(settings, policy)
    logits = torch.randn(6, 64, generator=torch.Generator().manual_seed(4)) * 2
    scores = rule.behaviour_scores(logits, history(rule, 6)).double()
    weights = Weights(logits / settings.temperature, Space())
    for row in range(6):
        expected = law(logits[row].double().tolist(), SEEN, settings)
        assert torch.allclose(scores[row].log_softmax(0), torch.tensor(expected, dtype=torch.float64), atol=1e-5)
        tempered = [x / settings.temperature for x in logits[row].double().tolist()]
        assert abs(float(weights.entropy()[row]) - entropy(tempered)) < 1e-5


def test_the_nucleus_of_the_textbook() -> None:
    """Of 0.5, 0.3, 0.1, 0.07, 0.03 with p = 0.9 the first three, whatever their order and temperature-free scale."""
    probabilities = torch.tensor([0.03, 0.3, 0.07, 0.5, 0.1])
    for shift in (0.0, 5.0, -30.0):
        kept = nucleus(Weights((probabilities.log() + shift)[None], Space()), 0.9)[0]
        assert kept.tolist() == [False, True, False, True, True]


@pytest.mark.parametrize("p", (1e-6, 0.1, 0.25, 0.5, 0.75, 0.999999))
def test_nuclei_of_ties_are_the_smallest_set_and_lower_ids_come_first(p: float) -> None:
    kept = nucleus(Weights(torch.zeros(2, 8), Space()), p)[0]
    need = max(math.ceil(p * 8 - 1e-6), 1)
    assert kept.tolist() == [i < need for i in range(8)]


@pytest.mark.parametrize("size", (40, 700, 5000))
def test_nuclei_over_flat_and_peaked_laws(size: int) -> None:
    """More tokens than the first look holds are found as well."""
    generator = torch.Generator().manual_seed(size)
    for scale in (0.01, 1.0, 8.0):
        scores = torch.randn(4, size, generator=generator) * scale
        for p in (0.3, 0.9, 0.999):
            found = nucleus(Weights(scores, Space()), p)
            for row in range(4):
                mass, count = 0.0, 0
                logs = log_softmax(scores[row].double().tolist())
                order = sorted(range(size), key=lambda i, logs=logs: -logs[i])
                while mass < p * (1 - 1e-7):
                    mass, count = mass + math.exp(logs[order[count]]), count + 1
                assert abs(int(found[row].sum()) - count) <= (scale < 0.1)  # equal up to one token at a rounded edge
                assert set(order[: count - 1]) <= set(found[row].nonzero()[:, 0].tolist())


def test_top_k_larger_than_the_vocabulary_keeps_all(policy: Any) -> None:
    rule = Distribution(Sampling(top_k=1000), policy)
    assert rule.behaviour_scores(torch.randn(2, 64), history(rule, 2)).isfinite().all()


@pytest.mark.parametrize("size", [64, 1000, 9001])
@pytest.mark.parametrize("k", [1, 3, 50])
def test_the_kth_largest_is_that_of_the_sorted_row(k: int, size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    tied = torch.randint(0, 40, (4, size), generator=draw).float()
    last = torch.arange(size).float().expand(2, -1)
    for table in (torch.randn(4, size, generator=draw), tied, last, -last):
        expected = [[sorted(row)[-k]] for row in table.tolist()]
        assert kth_largest(table, k).tolist() == expected


def test_uniforms_at_the_edges_draw_the_first_and_last_possible_token() -> None:
    """A token of weight 0 is never drawn, at the ends, between blocks or inside one."""
    scores = torch.full((1, 1000), -math.inf)
    for token, weight in ((3, 1.0), (255, 2.0), (256, 1.0), (700, 4.0)):
        scores[0, token] = math.log(weight)
    weights = Weights(scores.expand(10, -1), Space())
    near = 1e-6  # the weights themselves are float32
    edges = [0.0, 0.125 - near, 0.125 + near, 0.375 - near, 0.375 + near, 0.5 - near, 0.5 + near, 0.9, 1 - 2.0**-53, 0.2]
    assert weights.draw(torch.tensor(edges, dtype=torch.float64)).tolist() == [3, 3, 255, 255, 256, 256, 700, 700, 700, 255]


def test_a_law_of_one_token_always_draws_it() -> None:
    scores = torch.full((5, 64), -math.inf)
    scores[:, 63] = -800.0
    weights = Weights(scores, Space())
    assert weights.draw(torch.rand(5, dtype=torch.float64)).tolist() == [63] * 5
    assert torch.equal(weights.logprobs(torch.full((5,), 63), weights.total_B), torch.zeros(5))
    assert torch.equal(weights.entropy(), torch.zeros(5))


def test_very_unlikely_tokens_keep_exact_logprobs() -> None:
    scores = torch.zeros(1, 300)
    scores[0, 5] = -80.0
    expected = -80.0 - math.log(299 + math.exp(-80.0))
    weights = Weights(scores, Space())
    assert abs(float(weights.logprobs(torch.tensor([5]), weights.total_B)) - expected) < 1e-5


def test_of_some_tokens_the_likeliest_of_them_is_the_top() -> None:
    """However unlikely they are beside those that are left out; a row of which nothing is left has no distribution."""
    scores = torch.tensor([[0.0, -300.0, -301.0, 5.0], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    keep = torch.tensor([[False, True, True, False], [True, False, False, True], [False] * 4])
    weights = Weights.of_some(scores, keep, Space())
    expected = torch.tensor([math.log1p(math.exp(-1.0)), math.log1p(math.exp(-3.0))])
    found = -weights.logprobs(torch.tensor([1, 3, 0]), weights.total_B)
    assert torch.allclose(found[:2], expected, atol=1e-6) and weights.bad_B.tolist() == [False, False, True]
    assert [weights.draw(torch.full((3,), u, dtype=torch.float64)).tolist()[:2] for u in (0.0, 0.99)] == [[1, 0], [2, 3]]
    assert torch.allclose(
        weights.entropy()[:2].double(), torch.tensor([entropy(row) for row in ([0.0, -1.0], [0.0, -3.0])]).double()
    )


@pytest.mark.parametrize("rows, size", [(5, 300), (7, 40_000)])
def test_where_nothing_is_taken_out_the_numbers_are_the_same_in_less_memory(rows: int, size: int) -> None:
    """Bit for bit, whatever the step before left in the buffers; 40,000: more than one piece."""
    space, uniform = Space(), torch.rand(rows, dtype=torch.float64)
    for step in range(3):
        scores = torch.randn(rows - step, size, generator=torch.Generator().manual_seed(step)) * 3
        scores[0, :9] = -math.inf
        found = []
        for weights in (Weights(scores, space, entropy=True, truncated=False), Weights(scores, Space(), entropy=True)):
            tokens = weights.draw(uniform[: rows - step])
            found.append(torch.cat([tokens, weights.logprobs(tokens, weights.total_B), weights.entropy()]))
        assert torch.equal(*found) and found[0].isfinite().all()
    assert not [name for name, *_ in space.buffers if "shifted" in name]


def test_padding_is_not_seen_by_penalties_and_bans(policy: Any) -> None:
    """Left pads (id 0) are no text: neither penalized, nor part of an n-gram, nor the beginning of a bad word."""
    settings = Sampling(repetition_penalty=2.0, no_repeat_ngram_size=2, bad_words_ids=[[0, 5, 6]])
    rule = Distribution(settings, policy)
    logits = torch.randn(1, 64)
    tokens = torch.tensor([[0, 0, 5]])
    for pads, real in ((2, [False, False, True]), (0, [True, True, True])):
        scores = rule.behaviour_scores(logits, History(tokens, torch.tensor([real]), rule))[0].double()
        expected = law(logits[0].double().tolist(), [5] if pads else [0, 0, 5], settings)
        assert torch.allclose(scores.log_softmax(0), torch.tensor(expected, dtype=torch.float64), atol=1e-5)


def test_bad_words_as_strings_are_banned_at_the_beginning_and_after_a_blank() -> None:
    policy = tiny_policy("gpt2")
    rule = Distribution(Sampling(bad_words=["ab"]), policy)
    a, b, blank = (policy.tokenizer.encode(text)[0] for text in ("a", "b", " "))
    assert (a, b) in rule.banned_after and (blank, a, b) in rule.banned_after


@pytest.mark.parametrize("words", [["\u8cea"], ["ab", "\u8cea"], ["ab", "\u8cea", "b"]])
def test_every_bad_word_that_cannot_be_spelt_is_named(words: list[str]) -> None:
    with pytest.raises(UserError, match="sampling.bad_words: the tokenizer cannot spell '\u8cea'; leave it out"):
        Distribution(Sampling(bad_words=words, bad_words_ids=[[5]]), tiny_policy("gpt2"))
