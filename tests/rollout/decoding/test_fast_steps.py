"""Cheaper decoding steps change no token and no log-prob, and leave nothing behind: growing caches, copies of weights."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from steerl.rollout.decoding import cache, layout, loop
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import Steering
from tests.models import FAMILIES, families, tiny_policy
from tests.rollout.steering.helpers import policy as steered_policy
from tests.rollout.steering.helpers import vector

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [5, 6, 7], [13]]
NO_COLUMNS = {"mamba", "mamba2", "rwkv", "recurrent_gemma"}
"""Their caches hold states alone."""
OWN_KIND = {"openai-gpt"}
"""It decodes without a cache."""
LEFT_OUT = {"prophetnet"}
"""It is refused: it looks ahead."""


def sampled(policy: Any, steering: Any = None, **settings: Any) -> Any:
    sampling = Sampling(**{"max_new_tokens": 44, "n": 3, "stop_ids": list(range(20, 23)), **settings})
    rollout, _ = Sampler(policy, sampling, steering).sample(PromptBatch.of_ids(PROMPTS), step=1)
    return rollout


def assert_same(one: Any, other: Any) -> None:
    assert torch.equal(one.response_BR, other.response_BR) and torch.equal(one.lengths_B, other.lengths_B)
    for name in ("behaviour_logprobs_BR", "policy_logprobs_BR", "entropy_BR"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=0)


def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Inside, steps are transformers' own."""
    patch = monkeypatch.context()

    @contextlib.contextmanager
    def plain():
        with patch as inner:
            inner.setattr(cache, "grow", lambda *_: None)
            inner.setattr(layout, "for_few_rows", lambda _: contextlib.nullcontext())
            yield

    return plain()


@pytest.mark.parametrize("family", families(sorted(set(FAMILIES) - LEFT_OUT), "mistral", "jamba", "qwen3"))
def test_tokens_and_logprobs_are_those_of_plain_steps(family, monkeypatch):
    policy = tiny_policy(family)
    made: list[str] = []
    real = cache.grow

    def grow(kwargs: dict[str, Any], columns: int) -> None:
        real(kwargs, columns)
        for held in cache.caches_of(kwargs):
            own = held.self_attention_cache if isinstance(held, EncoderDecoderCache) else held
            made.extend(type(layer).__name__ for layer in getattr(own, "layers", ()))

    monkeypatch.setattr(cache, "grow", grow)
    fast = sampled(policy)
    with without(monkeypatch):
        plain = sampled(policy)
    assert_same(fast, plain)
    assert len(set(fast.lengths_B.tolist())) > 2, "rows leave on the way"
    assert any("Growing" in name for name in made) == (family not in NO_COLUMNS | OWN_KIND)
    assert family in OWN_KIND or not {"DynamicLayer", "DynamicSlidingWindowLayer"} & set(made)


def test_steered_rows_are_those_of_plain_steps(monkeypatch):
    ours = steered_policy("llama")
    spec = {"sites": [{"at": {"layers": [0]}, "vector": vector(), "strength": 2.0}]}
    steering = Steering(ours.model, spec, ours.tokenizer)
    fast = sampled(ours, steering)
    with without(monkeypatch):
        assert_same(fast, sampled(ours, steering))
    assert not torch.equal(fast.response_BR, sampled(ours).response_BR)


# -- the cache --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 4, 40])
def test_a_layer_holds_all_columns_in_their_order(window):
    """Against the columns themselves, put together from nothing at every step."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(5, 2, 7, 3, generator=draw)
    layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(window)
    layer.update(first, -first)
    layers = [layer]
    cache.grow({"past_key_values": type("C", (), {"layers": layers})()}, 90)
    assert layers[0] is not layer
    columns = first
    for t in range(90):
        if t in (3, 50, 51):
            index = torch.tensor([0, 2, 3, 1][: len(columns) - 1])
            layers[0].reorder_cache(index)
            columns = columns[index]
        new = torch.randn(len(columns), 2, 1, 3, generator=draw)
        columns = torch.cat([columns, new], dim=2)
        keys, values = layers[0].update(new, -new)
        seen = columns if window is None else columns[:, :, -window:]
        assert torch.equal(keys, seen) and torch.equal(values, -seen), t
        assert layers[0].get_seq_length() == columns.shape[2]
        buffer = layers[0].columns[0].buffer
        assert buffer.shape[2] <= max(seen.shape[2] * 5 / 4, seen.shape[2] + 32) + 1
    assert buffer.shape[2] <= 97, "never more than will be needed"


def test_a_column_is_written_and_what_is_there_is_not_copied():
    first = torch.randn(2, 2, 7, 3)
    layer = DynamicLayer()
    layer.update(first, first)
    layers = [layer]
    cache.grow({"past_key_values": type("C", (), {"layers": layers})()}, 64)
    places = {layers[0].update(first[:, :, :1], first[:, :, :1])[0].data_ptr() for _ in range(64)}
    assert len(places) == 2, "a buffer with room for 32, and another as it is used up"


def test_other_layers_keep_their_own_way():
    class Own(DynamicLayer):
        pass

    layers = [Own(), DynamicLayer()]
    layers[0].update(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2))
    before = list(layers)
    cache.grow({"past_key_values": type("C", (), {"layers": layers})()}, 8)
    assert layers == before, "one of another class, and one that holds nothing yet"


def test_nothing_of_a_batch_stays():
    policy = tiny_policy("llama")

    def held() -> int:
        gc.collect()
        return sum(type(thing) in (cache._Columns, layout._Product) for thing in gc.get_objects())

    before = held()
    for _ in range(3):
        sampled(policy)
        assert held() == before


# -- weights ----------------------------------------------------------------------------------------------------------------


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 96, bias=False)).requires_grad_(False)


def test_products_are_the_same_bit_for_bit_and_weights_stay_where_they_are():
    model, x = network(), torch.randn(16, 1, 64)
    expected, weight = model(x), model[0].weight
    told: list[int] = []
    model[2].register_forward_hook(lambda *_: told.append(1))
    with layout.for_few_rows(model):
        assert not model[0].forward.copy.is_contiguous() and torch.equal(model[0].forward.copy, weight)
        assert torch.equal(model(x), expected) and told == [1]
        assert model[0].weight is weight and weight.is_contiguous()
        with layout.for_few_rows(model):  # a batch in the middle of another
            assert torch.equal(model(x), expected)
        assert "forward" in vars(model[0])
    with pytest.raises(ZeroDivisionError), layout.for_few_rows(model):
        _ = 1 / 0
    assert not any("forward" in vars(module) for module in model)


def test_a_product_that_would_come_out_otherwise_takes_the_weights_as_they_are(monkeypatch):
    """A copy that is off by rounding is seen at the first product of that shape."""
    monkeypatch.setattr(layout, "_SAME", {})
    model, x = network(), torch.randn(16, 1, 64)
    expected = model(x)
    with layout.for_few_rows(model):
        model[0].forward.copy.mul_(1 + 1e-6)
        assert torch.equal(model(x), expected)
    assert sorted(layout._SAME.values()) == [False, True], "the other layer takes its copy"


def test_what_is_no_plain_layer_is_left_alone(monkeypatch):
    model = network()
    with layout.for_few_rows(model.double()):
        assert "forward" not in vars(model[0])
    model = network()
    monkeypatch.setattr(layout, "_MOST", 4 * (64 * 48 + 48 * 96) - 1)
    with layout.for_few_rows(model):
        assert not any("forward" in vars(module) for module in model), "too much memory"


def test_copies_are_made_once_a_batch_has_gone_on_for_a_while(monkeypatch):
    made: list[int] = []
    real = layout.for_few_rows
    monkeypatch.setattr(layout, "for_few_rows", lambda model: made.append(1) or real(model))
    policy = tiny_policy("llama")
    sampled(policy, max_new_tokens=3 * loop._SETTLED - 1)
    assert not made
    sampled(policy, max_new_tokens=3 * loop._SETTLED)
    assert made == [1]
    monkeypatch.setattr(loop, "_FEW", 2)
    sampled(policy, max_new_tokens=3 * loop._SETTLED, stop_ids=[])
    assert made == [1], "many rows"
