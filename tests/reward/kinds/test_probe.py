"""The probe part against its definition: each row's ids alone through the plain model, in float64 from the hidden states on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.rollout.common.errors import UserError
from steerl.rollout.steering import Steering
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import locate
from steerl.rollout.steering.vectors.extract import Pair, contrast
from steerl.rollout.steering.vectors.files import save_vector
from steerl.rollout.steering.vectors.probes import Probe, Reading, auc, fit, judge, read_probe, reading_of, threshold_of
from steerl.rollout.types import Rollout, Texts
from steerl.training.setup import with_peft
from tests.models import CONTEXT, families, tiny, tiny_policy, tiny_tokenizer
from tests.ppo_runs import LORA

SLOPE, BIAS, THRESHOLD = 0.7, -0.2, 0.4


def file_of(folder: Path, width: int = 32, **notes: object) -> str:
    vector = torch.randn(width, generator=torch.Generator().manual_seed(3))
    told = {"probe": {"1": dataclasses.asdict(Reading(SLOPE, BIAS, THRESHOLD))}, "component": "block_output"}
    return str(
        save_vector(folder / "probe.safetensors", {1: vector}, {**told, "stack": "decoder", "position": "mean", **notes})
    )


def rows_of(policy) -> Rollout:
    """Ragged; the second has gaps, the third no action, the fourth stops by the eos, which no probe reads, the fifth is it."""
    prompts = [[5], [6, 7, 8], [9, 10], [11, 12], [13]]
    responses = [[20, 21, 22, 23, 24], [25, 26, 27, 28], [29], [30, 31, 2], [2]]
    masks = [[1] * 5, [1, 0, 0, 1], [0], [1, 1, 1], [1]]
    ended = [False, False, False, True, True]
    return Rollout.of_ids(prompts, responses, action_mask_BR=masks, ended_B=ended, start_ids=policy.start_ids)


READ = [[0, 1, 2, 3, 4], [0, 3], [], [0, 1], [0]]
"""Of each row the places that are read."""


def texts_of(rollout: Rollout) -> Texts:
    said = ["x"] * len(rollout)
    return Texts(prompts=said, prompt_texts=said, completions=said)


def defined(policy, rollout: Rollout, path: str) -> list[list[float]]:
    """The logit at each place that is read, of the row by itself."""
    vector = read_probe(Path(path), None, "test").direction_D.double()
    start, found = list(policy.start_ids), []
    for i, places in enumerate(READ):
        prompt, response = rollout.prompt_ids[i], rollout.response_ids[i]
        given = {"input_ids": torch.tensor([prompt if start else prompt + response])}
        given |= {"decoder_input_ids": torch.tensor([start + response])} if start else {}
        (point,) = locate(policy.core, At(layers=(1,)))
        seen: list[torch.Tensor] = []
        handle = point.module.register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out if torch.is_tensor(out) else out[0])
        )
        with torch.no_grad():
            policy.core(**given)
        handle.remove()
        hidden = seen[-1][0].double()[len(start or prompt) :]
        found.append([float(SLOPE * (hidden[t] @ vector) + BIAS) for t in places])
    return found


@pytest.mark.parametrize("family", families(["gpt2"], "gpt2"))
@pytest.mark.parametrize("position", ["mean", "last", "max"])
def test_values_are_the_rows_own(family, position, tmp_path):
    policy, path = tiny_policy(family), file_of(tmp_path)
    rollout = rows_of(policy)
    logits = defined(policy, rollout, path)
    pooled = {"mean": lambda row: sum(row) / len(row), "last": lambda row: row[-1], "max": max}[position]
    for size in (1, 3, 64):
        part = {"kind": "probe", "probe": path, "position": position, "batch_size": size}
        scores = build_reward([part, {"kind": "length", "max": 3, "unit": "tokens"}], policy)(rollout, texts_of(rollout))
        for i, row in enumerate(logits):
            value = float(scores.parts["probe"][i])
            assert (value != value) if not row else value == pytest.approx(pooled(row), abs=2e-4), (size, i)


@pytest.mark.parametrize("family", families(["llama", "recurrent_gemma", "t5", "bart"], "llama", "recurrent_gemma", "t5"))
def test_families(family, tmp_path):
    policy, path = tiny_policy(family), file_of(tmp_path)
    rollout = rows_of(policy)
    scores = build_reward([{"kind": "probe", "probe": path}, {"kind": "length", "max": 3, "unit": "tokens"}], policy)(
        rollout, texts_of(rollout)
    )
    for value, row in zip(scores.parts["probe"].tolist(), defined(policy, rollout, path), strict=True):
        assert (value != value) if not row else value == pytest.approx(sum(row) / len(row), abs=2e-4)


def test_threshold_output_screen_and_weights(tmp_path):
    policy, path = tiny_policy("llama"), file_of(tmp_path)
    rollout = rows_of(policy).select([0, 1, 3, 4])
    said = texts_of(rollout)
    plain = build_reward([{"kind": "probe", "probe": path, "weight": -2.0}], policy)(rollout, said)
    assert torch.equal(plain.total_B, (-2.0 * plain.parts["probe"].double()).float()) and plain.screened_B is None
    above_B = plain.parts["probe"] > THRESHOLD
    assert 0 < int(above_B.sum()) < 4, "the rows are on both sides"
    cut = build_reward([{"kind": "probe", "probe": path, "above": "file"}], policy)(rollout, said)
    assert torch.equal(cut.total_B, torch.where(above_B, plain.parts["probe"], 0.0))
    assert torch.equal(cut.parts["probe.above"], above_B.float())
    likely = build_reward([{"kind": "probe", "probe": path, "output": "probability", "above": "file"}], policy)(rollout, said)
    assert torch.allclose(likely.total_B, torch.where(above_B, plain.parts["probe"].sigmoid(), 0.0))
    parts = [{"kind": "length", "max": 3, "unit": "tokens"}, {"kind": "probe", "probe": path, "screen": True}]
    screen = build_reward(parts, policy)(rollout, said)
    assert torch.equal(screen.total_B, screen.parts["length"]) and torch.equal(screen.screened_B, above_B)
    assert torch.equal(screen.parts["probe"], plain.parts["probe"])
    assert type(screen).join([screen, plain]).screened_B.tolist() == above_B.tolist() + [False] * 4


def test_what_is_read_neither_learns_nor_is_steered(tmp_path):
    path = file_of(tmp_path)
    policy = with_peft(tiny_policy("llama"), LORA)
    rollout = rows_of(policy).select([0, 1])
    reward = build_reward([{"kind": "probe", "probe": path}], policy)
    before = reward(rollout, texts_of(rollout)).total_B
    site = {"name": "push", "at": {"layers": [0]}, "vector": {"values": [3.0] * 32}, "where": {"prompt": "all"}}
    steering = Steering(policy.core, {"sites": [site]}, policy.tokenizer)
    rows = {"prompt_mask_BP": rollout.prompt_mask_BP, "row_B": rollout.row_B, "sample_B": rollout.sample_B}
    applied = steering.applied(**rows)
    with steering.active(**rows, applied=applied), torch.no_grad():
        policy.core(input_ids=rollout.prompt_BP, attention_mask=rollout.prompt_mask_BP.long())
        assert torch.equal(reward(rollout, texts_of(rollout)).total_B, before)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.3)
    assert torch.equal(reward(rollout, texts_of(rollout)).total_B, before)


def saved(folder: Path, family: str = "llama", tokenizer=None, **overrides) -> str:
    tiny(family, **overrides).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


def test_another_model_reads_and_what_does_not_fit_is_told_in_a_line(tmp_path):
    policy, path = tiny_policy("llama"), file_of(tmp_path)
    rollout = rows_of(policy).select([0, 1])
    own = build_reward([{"kind": "probe", "probe": path}], policy)(rollout, texts_of(rollout))
    named = build_reward([{"kind": "probe", "probe": path, "model": saved(tmp_path / "m")}], tokenizer=policy.tokenizer)
    assert torch.allclose(named(rollout, texts_of(rollout)).total_B, own.total_B, atol=1e-5)

    def told(policy=policy, rollout=rollout, **part) -> str:
        with pytest.raises(UserError) as raised:
            build_reward([{"kind": "probe", "probe": path, **part}], policy)(rollout, texts_of(rollout))
        assert len(raised.value.lines) == 1
        return raised.value.lines[0]

    assert "does not exist" in told(probe=str(tmp_path / "none.safetensors"))
    assert "layer: 0, but" in told(layer=0)
    (tmp_path / "wide").mkdir()
    assert "48 wide, but" in told(probe=file_of(tmp_path / "wide", 48))
    (tmp_path / "deep").mkdir()
    deep = file_of(tmp_path / "deep", probe={"7": {"slope": 1.0, "bias": 0.0}})
    assert "no vector for layer 7" in told(probe=deep)
    assert "encoder" in told(probe=file_of(tmp_path / "deep", stack="encoder"))
    save_vector(tmp_path / "v.safetensors", {1: torch.ones(32)}, {})
    assert "without bias and threshold" in told(probe=str(tmp_path / "v.safetensors"))
    assert "model: missing" in told(policy=None)
    word = saved(tmp_path / "word", tokenizer=tiny_tokenizer(kind="word"))
    assert "vocabulary is not the policy's" in told(model=word)
    assert "an encoder-decoder" in told(model=saved(tmp_path / "t5", "t5"))
    long = Rollout.of_ids([[5] * 8], [[6] * CONTEXT])
    assert f"{CONTEXT + 8} tokens" in told(rollout=long)
    assert "these texts have none" in told(rollout=Rollout.of_ids([[]], [[]]))
    assert "weight: without effect" in told(screen=True, weight=2.0)
    assert "revision: without effect" in told(revision="main")


# -- making --------------------------------------------------------------------------------------------------------------


def test_the_regression_is_where_its_penalised_likelihood_is_least():
    draw = torch.Generator().manual_seed(0)
    positive, negative = torch.randn(30, 6, generator=draw) + 0.5, torch.randn(40, 6, generator=draw)
    negative = negative[:30]
    weight_D, bias = fit(positive, negative)
    x = torch.cat([positive, negative]).double()
    spread = x.std(0)
    weight = (weight_D * spread).clone().requires_grad_()
    shift = torch.tensor(bias + float(weight_D @ x.mean(0)), dtype=torch.float64, requires_grad=True)
    logits = ((x - x.mean(0)) / spread) @ weight + shift
    y = torch.tensor([1.0] * 30 + [0.0] * 30, dtype=torch.float64)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
    (loss + 0.5 * 1e-2 * 60 * weight.square().sum()).backward()
    assert float(weight.grad.norm()) < 1e-6 and abs(float(shift.grad)) < 1e-6


def test_auc_threshold_and_rates_by_counting():
    draw = torch.Generator().manual_seed(1)
    positive, negative = (torch.randint(0, 9, (n,), generator=draw).double() + k for n, k in ((23, 2), (31, 0)))
    couples = [(1.0 if p > q else 0.5 if p == q else 0.0) for p in positive.tolist() for q in negative.tolist()]
    assert auc(positive, negative) == pytest.approx(sum(couples) / len(couples))
    for rate in (0.0, 0.1, 0.5):
        allowed = [t for t in negative.tolist() if sum(q > t for q in negative.tolist()) <= rate * 31]
        assert threshold_of(negative, rate) == min(allowed)
    vector = torch.tensor([1.0, 0.0])
    probe = Probe(vector, Reading(2.0, -6.0), At(layers=(0,)), "mean")
    found = judge(
        probe, torch.stack([positive, positive], 1).float(), torch.stack([negative] * 2, 1).float(), 0.1, True
    ).reading
    assert found.threshold == 2 * threshold_of(negative, 0.1) - 6
    assert found.true_positives == pytest.approx(sum(2 * p - 6 > found.threshold for p in positive.tolist()) / 23)
    assert found.accuracy == pytest.approx((int((positive > 3).sum()) + int((negative <= 3).sum())) / 54)


def test_a_file_reads_the_texts_that_it_was_made_from(tmp_path):
    """extract's activations of texts, and the reward's of the same ids with a stop token behind them, give one value."""
    policy = tiny_policy("llama")
    pairs = [Pair(f"ab{c}", f"{c}xyz", prompt) for c, prompt in zip("cdefgh", ("k", "lm") * 3, strict=True)]
    points = locate(policy.core, At(layers=(1,)))
    for position in ("mean", "last"):
        positive, negative = contrast(policy.core, policy.tokenizer, pairs, points, position)
        weight_D, bias = fit(positive[:, 0], negative[:, 0])
        vector = (weight_D * 0.1).float()
        probe = Probe(vector, reading_of(vector, weight_D, bias), At(layers=(1,)), position)
        notes = {"probe": json.dumps({"1": dataclasses.asdict(probe.reading)}), "component": "block_output", "stack": "decoder"}
        path = save_vector(tmp_path / f"{position}.safetensors", {1: vector}, {**notes, "position": position})
        spell = policy.tokenizer
        rollout = Rollout.of_ids(
            [spell(p.prompt)["input_ids"] for p in pairs], [[*spell(p.positive)["input_ids"], 2] for p in pairs]
        )
        value_B = build_reward([{"kind": "probe", "probe": str(path)}], policy)(rollout, texts_of(rollout)).total_B
        assert torch.allclose(value_B.double(), positive[:, 0].double() @ weight_D + bias, atol=1e-4)
