"""Settings are checked when built; the generation config is closed; random numbers depend on their keys alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from scipy import stats
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import ClosedGenerationConfig, Sampling, uniforms
from transformers import GenerationConfig

from tests.models import tiny_policy

BAD: dict[str, list[Any]] = {
    "max_new_tokens": [0, -3],
    "temperature": [-0.5, float("nan"), float("inf"), 0.0],
    "top_k": [-1],
    "top_p": [0.0, -0.1, 1.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0.0, -1.0],
    "no_repeat_ngram_size": [-1],
    "bad_words": [[""]],
    "bad_words_ids": [[[]]],
    "stop": [[""]],
    "stop_ids": [[-1]],
    "n": [0],
    "batch_size": [0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_setting_is_one_line_that_names_it_its_value_and_a_remedy(name: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        Sampling(**{name: value})
    assert len(caught.value.lines) == 1 and caught.value.lines[0].startswith(f"sampling.{name}: ")
    assert str(value) in caught.value.lines[0] or value == 0.0


def test_problems_are_gathered_and_temperature_zero_names_greedy() -> None:
    with pytest.raises(UserError) as caught:
        Sampling(top_p=0.0, top_k=-1, temperature=0.0)
    assert len(caught.value.lines) == 3
    assert any("greedy" in line for line in caught.value.lines)


def test_settings_without_effect_under_greedy_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Sampling(greedy=True, top_p=0.9)
    assert "top_p" in caplog.text


@pytest.mark.parametrize(
    ("settings", "truncates", "plain"),
    [({}, False, True), ({"temperature": 2.0}, False, True), ({"top_k": 5}, True, False), ({"top_p": 0.5}, True, False),
     ({"min_p": 0.1}, True, False), ({"repetition_penalty": 1.1}, False, False), ({"greedy": True}, False, False)],
)  # fmt: skip
def test_what_a_setting_does_to_the_two_laws(settings: dict[str, Any], truncates: bool, plain: bool) -> None:
    assert (Sampling(**settings).truncates, Sampling(**settings).is_plain) == (truncates, plain)


def test_the_closed_config_takes_nothing_from_a_checkpoint() -> None:
    policy = tiny_policy("gpt2")
    theirs = GenerationConfig(top_k=3, repetition_penalty=4.0, suppress_tokens=[1], custom_thing=7)
    ours = ClosedGenerationConfig.of(policy, max_new_tokens=5)
    before = ours.to_dict()
    assert ours.update(**theirs.to_dict(), defaults_only=True, allow_custom_entries=True) == {}
    assert ours.to_dict() == before and not hasattr(ours, "custom_thing")
    policy.model.generation_config = theirs
    prepared, _ = policy.model._prepare_generation_config(ours)
    assert prepared.to_dict() == before
    assert not policy.model._get_logits_processor(prepared, input_ids_seq_length=3, device="cpu", model_kwargs={})


def test_uniforms_are_uniform_and_independent_over_each_key() -> None:
    rows, ones = torch.arange(20_000), torch.ones(20_000, dtype=torch.int64)
    series = {
        "row": uniforms(0, 0, rows, ones, 0),
        "sample": uniforms(0, 0, ones, rows, 0),
        "t": uniforms(0, 0, ones[:1], ones[:1], rows)[0],
        "step": torch.cat([uniforms(0, k, ones[:1], ones[:1], 0) for k in range(2000)]),
        "seed": torch.cat([uniforms(k, 0, ones[:1], ones[:1], 0) for k in range(2000)]),
    }
    for name, values in series.items():
        assert values.dtype == torch.float64 and float(values.min()) >= 0 and float(values.max()) < 1
        assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3, name
        assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 4 / len(values) ** 0.5, name
        assert len(values.unique()) == len(values), name


def test_uniforms_of_a_row_of_positions_equal_those_one_by_one() -> None:
    rows, samples = torch.tensor([5, 9, 5]), torch.tensor([0, 0, 1])
    table = uniforms(7, 3, rows, samples, torch.arange(3))
    assert table.shape == (3, 3)
    for t in range(3):
        assert torch.equal(table[:, t], uniforms(7, 3, rows, samples, t))
    assert torch.equal(table[1:2], uniforms(7, 3, rows[1:2], samples[1:2], torch.arange(3)))


def test_uniforms_do_not_change_from_release_to_release() -> None:
    """Stored values: a dump that is resumed with a later version goes on with the same numbers."""
    found = uniforms(42, 3, torch.tensor([0, 1, 10**12]), torch.tensor([0, 5, 2]), torch.tensor([0, 191]))
    assert torch.allclose(found, torch.tensor(STORED, dtype=torch.float64), atol=0, rtol=0)
    assert float(uniforms(-1, 0, torch.tensor([0]), torch.tensor([0]), 0)) == float(
        uniforms(2**64 - 1, 0, torch.tensor([0]), torch.tensor([0]), 0)
    )


STORED = [
    [0.6697115871639002, 0.9137167119648674],
    [0.6032452862009363, 0.7357779993286058],
    [0.9278493298174532, 0.8022323875940313],
]
