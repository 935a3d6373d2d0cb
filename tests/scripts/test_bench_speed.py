"""The speed comparison: what it counts, against loops written out; the lengths that it promises; one quick run."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaModel

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.scripts.bench_cases import limit, scaling, speed
from steerl.scripts.bench_cases.cases import (
    CUDA,
    GROUPS,
    SAMPLING,
    SMALLEST,
    STOP,
    UPDATES,
    Case,
    causal,
    config_of,
    policy_of,
    prompt_batch,
)
from steerl.scripts.bench_cases.child import RUNNERS, Meter, Parity, lengths_of, sampling_of
from steerl.training.model import compiled

ROOT = Path(__file__).parents[2]
SLOW_DISK = {"flops": 100.0, "bandwidth": {"1": 1e9}}


def test_every_case_has_a_name_of_its_own_and_a_shape_that_can_be_built():
    for cases in (CUDA, (*UPDATES, *GROUPS, *SAMPLING)):
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            config = config_of(case)
            assert config.hidden_size % config.num_attention_heads == 0 and case.rows % case.n == 0
            assert case.rows % case.minibatches == 0 and Case(**json.loads(json.dumps(case.to_json()))) == case
    shapes = {case.family + str(case.hidden) for case in CUDA}
    assert shapes == {"qwen2896", "qwen21536", "llama2048"}


def test_the_weights_of_the_limit_are_those_of_the_model():
    for case in (SMALLEST, replace(SMALLEST, hidden=128, layers=3, key_heads=2, intermediate=96)):
        model = causal(case)
        matrices = [p for name, p in model.model.layers.named_parameters() if p.dim() == 2]
        assert limit.weights(case) == (sum(p.numel() for p in matrices), model.lm_head.weight.numel())


def test_the_limit_counts_the_operations_of_live_rows():
    case = Case(hidden=64, layers=2, vocabulary=100, rows=3, response=3, prompt=5, epochs=2)
    layers, head = limit.weights(case)
    lengths = [3, 1, 2]
    alive = [sum(length > t for length in lengths) for t in range(3)]
    operations = 0.0
    for length in lengths:  # row by row, token by token
        for t in range(length):
            new = case.prompt if t == 0 else 1
            operations += 2 * new * layers + 2 * head
            seen = sum(at for at in range(case.prompt)) + case.prompt / 2 if t == 0 else case.prompt + t
            operations += 4 * case.layers * case.hidden * seen
    assert limit.decode_seconds(case, alive, SLOW_DISK) == pytest.approx(operations / 100.0, rel=1e-6)
    score, learn = limit.update_seconds(case, alive, SLOW_DISK)
    positions, tokens = sum(case.prompt + length for length in lengths), sum(lengths)
    products = 2 * positions * layers
    assert score * 100 > 3 * products + 2 * 2 * tokens * head
    assert learn / score == pytest.approx(
        3 * 2 * (2 * products + 2 * tokens * head) / (3 * products + 4 * tokens * head), rel=0.02
    )  # but for attention, a hundredth here


def test_a_slow_memory_is_a_limit_too():
    case = Case(hidden=64, layers=2, vocabulary=1000, rows=2, response=2, prompt=5)
    machine = {"flops": 1e30, "bandwidth": {"1": 10.0, "64": 1.0}}
    layers, head = limit.weights(case)
    cache = [2 * 2 * 64 * 2 * width for width in (5, 6)]
    moved = sum(4 * (layers + head + kept) + 4 * 2 * 1000 for kept in cache)
    assert limit.decode_seconds(case, [2, 2], machine) == pytest.approx(moved / 10)
    assert limit.bandwidth(machine, 100 * 2**20) == 1.0 and limit.bandwidth(machine, 1000.0) == 10.0


def test_stopping_has_the_probability_that_the_case_says_for_both_samplers():
    case = replace(SMALLEST, work="sampling", rows=64, response=32, mean=8)
    model = causal(case)
    ids = torch.tensor(prompt_batch(case).ids)
    chance = model(ids).logits.softmax(-1)[..., STOP]
    assert chance.mean().item() == pytest.approx(1 / 8, rel=0.1)
    rollout, _ = Sampler(policy_of(case), sampling_of(case, Sampling)).sample(prompt_batch(case))
    drawn = rollout.lengths_B.float().mean().item()
    expected = sum((1 - 1 / 8) ** t for t in range(32))  # of a geometric length that is cut
    assert abs(drawn - expected) < 4 * 8 / math.sqrt(64)
    assert lengths_of(rollout.response_BR, case) == rollout.lengths_B.tolist()
    full, _ = Sampler(policy_of(SMALLEST), sampling_of(SMALLEST, Sampling)).sample(prompt_batch(SMALLEST))
    assert full.lengths_B.tolist() == [8] * 8 == lengths_of(full.response_BR, SMALLEST)


def test_the_peers_reward_costs_nothing_and_reads_ids():
    module = Parity()
    hidden = getattr(module, module.base_model_prefix)(input_ids=torch.tensor([[3, 4], [6, 7]])).hidden_states[-1]
    assert module.score(hidden)[..., 0].tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.slow
@pytest.mark.parametrize("who, credit, kl", [("grpo", "group", True), ("rloo", "rloo", False), ("ours", "group", True)])
def test_groups_are_the_same_work_for_both(who, credit, kl, tmp_path, monkeypatch):
    """Rows, tokens, optimizer steps and their rows; a reference where there is a KL alone."""
    case = replace(SMALLEST, rows=8, response=4, n=4, credit=credit, kl=kl, epochs=2, minibatches=2, micro=2)
    case = replace(case, mean=2) if who == "rloo" else case  # a stop token every other time, were it not for min_new_tokens
    steps, passes = [], []
    monkeypatch.setattr(torch.optim.AdamW, "step", counted(torch.optim.AdamW.step, steps))
    monkeypatch.setattr(LlamaModel, "forward", counted(LlamaModel.forward, passes))
    meter = RUNNERS["update", who](case, 2, tmp_path / "run")
    assert meter.tokens == [8 * 4] * 3 and meter.alive == [8] * 4
    assert len(steps) == 3 * case.epochs * case.minibatches
    learning = [len(ids) for _, ids, gradients in passes if gradients and ids.shape[1] > case.prompt]
    scoring = 3 * 8 if who == "ours" else 0  # in grad mode too
    assert set(learning) == {case.micro} and sum(learning) == 3 * case.epochs * 8 + scoring
    assert len({id(model) for model, _, _ in passes}) == 1 + kl
    found = meter.to_json(case, who)["seconds"]
    assert {len(values) for values in found.values()} == {2} and {"sample", "learn"} <= set(found)


@pytest.mark.parametrize(
    "fails, late, said", [(0, 0, None), (1, 0, "went on uncompiled: .*out of memory"), (0, 1, "Detected recompile")]
)
def test_ppo_compile_is_timed_without_its_compiler(fails, late, said, tmp_path, monkeypatch):
    """Rows alone in a pass take a second graph, before the first update. What is not compiled, or in a timed one, is no figure."""
    updates, graphs = [], []

    def backend(graph, inputs):
        graphs.append(len(updates))
        if len(graphs) > 1 and fails:
            raise RuntimeError("out of memory")
        return graph

    def done(meter, lengths):
        updates.append(lengths)
        if late and len(updates) == 2:
            torch.compiler.reset()
        own_done(meter, lengths)

    own_done = Meter.done
    monkeypatch.setattr(Meter, "done", done)
    monkeypatch.setattr(compiled, "BACKEND", backend)
    case = replace(SMALLEST, mean=4, micro=4)
    with pytest.raises(RuntimeError, match=said) if said else contextlib.nullcontext():
        meter = RUNNERS["update", "compiled"](case, 2, tmp_path / "run")
        assert len(meter.tokens) == 3 and graphs == [0, 0]
    assert not sampling_of(replace(case, compile=True), Sampling).compile


def counted(function, calls):
    @functools.wraps(function)
    def called(self, *args, **kwargs):
        calls.append((self, kwargs.get("input_ids"), torch.is_grad_enabled()))
        return function(self, *args, **kwargs)

    return called


def test_beside_groups_stands_the_installed_trl_or_a_line_says_why_not(tmp_path, monkeypatch, capsys):
    case = replace(SMALLEST, credit="rloo", n=4, epochs=1)
    assert speed.implementations(case, None, True) == ["ours", "rloo"] and speed.implementations(case, tmp_path, False) == [
        "ours"
    ]
    assert speed.implementations(SMALLEST, tmp_path, False) == ["ours", "trl"]
    assert speed.implementations(SMALLEST, None, True) == ["ours"]
    for update in (UPDATES[1], next(case for case in CUDA if case.work == "update")):
        assert speed.implementations(update, tmp_path, True) == ["ours", "compiled", "trl"]
        assert speed.implementations(replace(update, work="sampling"), tmp_path, True) == ["ours", "plain"]
    asked = []

    def child(arguments, peer, times, out):
        asked.append(arguments[-1])
        return {"flops": 1e9, "bandwidth": {"1": 1e9}} if len(arguments) == 1 else run_of("ours", [1.0], [4], 5.0)

    monkeypatch.setattr(speed, "child", child)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    speed.measure(tmp_path, speed.SpeedSettings(rounds=1, only="rloo 1 epoch 64x2 V1,024"))
    assert asked[1:] == ["ours"] and "trl and datasets: not installed" in capsys.readouterr().out


def test_a_part_that_the_peer_does_not_tell_is_a_dash():
    machine, case = {"flops": 1e9, "bandwidth": {"1": 1e9}}, replace(SMALLEST, credit="group", n=4)
    peer = {**run_of("grpo", [1.0], [10], 5.0), "seconds": {"rest": [1.0], "sample": [1.0], "learn": [3.0]}}
    found = [speed.entry(case, "ours", [run_of("ours", [1.0], [10], 5.0)], machine), speed.entry(case, "grpo", [peer], machine)]
    assert "| grpo | 5.00 (5.00 to 5.00) | 2.50 | 1.00 / - / 3.00 |" in speed.tables(found)[-1]


def run_of(who, seconds, tokens, peak):
    learned = {} if who == "plain" else {"score": [0.5] * len(seconds), "learn": [0.5] * len(seconds)}
    laps = {"sample": seconds, **learned}
    return {"seconds": laps, "wall": seconds, "tokens": tokens, "peak_mb": peak, "before_mb": 1.0, "alive": [2, 1]}


def test_medians_ratios_and_ranges_are_over_all_rounds():
    machine = {"flops": 1e9, "bandwidth": {"1": 1e9}}
    ours = speed.entry(SMALLEST, "ours", [run_of("ours", [1.0, 3.0], [10, 10], 5.0), run_of("ours", [2.0], [10], 9.0)], machine)
    peer = speed.entry(SMALLEST, "trl", [run_of("trl", [5.0], [10], 21.0)], machine)
    assert ours["seconds_per_update"] == 3.0 and ours["seconds_range"] == [2.0, 4.0] and ours["peak_mb"] == 7.0
    assert ours["rollout_tokens_per_second"] == 5.0 and ours["timed"] == 3
    line = speed.tables([ours, peer])[-1]
    assert "| trl | 6.00 (6.00 to 6.00) | 2.00 |" in line and "| 21 | 3.00 |" in line


def test_a_case_that_is_not_there_is_named():
    with pytest.raises(UserError, match="no case has 'V7'"):
        speed.chosen(speed.SpeedSettings(only="V7"), quick=False)
    assert len(speed.chosen(speed.SpeedSettings(device="cuda"), quick=False)) == len(CUDA)


def test_the_slope_of_a_linear_cost_is_one():
    def point(work, seconds):
        return {"work": {"a": work}, "seconds": {"a": seconds}, "growth_mb": 1.0, "case": {"rows": 1}}

    assert scaling.slope([point(1, 2), point(2, 4), point(4, 16)]) == pytest.approx([1.0, 2.0])
    assert all(len({case.name + str(case.prompt) for case in cases}) == 4 for cases in scaling.DOUBLED.values())


@pytest.mark.proofs
def test_a_quick_run_leaves_its_files(tmp_path):
    command = [sys.executable, "scripts/bench.py", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "bench.json").read_text())
    asked = {"case", "implementation", "seconds_per_update", "rollout_tokens_per_second", "peak_mb"}
    assert [one["implementation"] for one in found] == ["ours", "ours", "plain"] and all(asked <= set(one) for one in found)
    assert all(0 < share < 1.5 for one in found for share in one["share_of_limit"].values())
    assert (tmp_path / "bench.md").read_text() in done.stdout + "\n" and not (tmp_path / "run").exists()
