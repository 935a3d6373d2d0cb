"""The benches of engines: the laws that plain vLLM's numbers are compared with, and what is made of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from steerl.scripts.bench_cases import engines, plain_vllm
from steerl.scripts.bench_cases.cases import config_of
from steerl.scripts.bench_cases.plain_vllm import Row


def test_the_place_of_min_p_is_what_differs():
    """Chances .5, .2, .15, .1, .05. Min-p .35 first leaves .5 and .2; top-p .75 of the renormalized then needs both. Top-p
    first keeps .5, .2 and .15, of which min-p leaves the first two. With min-p .25 and top-p .8: first min-p: .5 .2 .15, and
    the nucleus of those is two of them; the other way round three stay."""
    logits_TV = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]], dtype=torch.float64).log() * 0.7
    for min_p, top_p, first, last in ((0.35, 0.75, 2, 2), (0.25, 0.8, 2, 3)):
        how = {"temperature": 0.7, "min_p": min_p, "top_p": top_p}
        assert int(plain_vllm.law_of(logits_TV, how, True).isfinite().sum()) == first
        assert int(plain_vllm.law_of(logits_TV, how, False).isfinite().sum()) == last
    law_V = plain_vllm.law_of(logits_TV, {"temperature": 0.7, "top_p": 0.6}, True)[0].exp()
    assert law_V.tolist() == pytest.approx([5 / 7, 2 / 7, 0, 0, 0])


def test_what_a_processed_log_prob_is_worth():
    """A coin of .8 and .2 cut to its likelier side: it says 0, the policy log .8: a weight of .8 a token, and nothing clipped;
    at .7 all would be."""
    how = {"temperature": 1.0, "top_p": 0.75}
    row = Row([0], [0, 0, 0], [0.0, 0.0, 0.0])
    found = plain_vllm.worth([(row, torch.tensor([[0.8, 0.2]] * 3, dtype=torch.float64).log())], how)
    assert found["law_max"] == pytest.approx(0, abs=1e-12)
    assert found["policy_mean"] == pytest.approx(-math.log(0.8))
    assert found["token_weight_mean"] == pytest.approx(0.8)
    assert found["clipped_at_step_1"] in (0.0, 1.0)  # .8 is the bound itself
    assert plain_vllm.worth([(row, torch.tensor([[0.7, 0.3]] * 3).double().log())], how)["clipped_at_step_1"] == 1.0
    wrong = plain_vllm.worth([(Row([0], [0], [-0.5]), torch.tensor([[0.8, 0.2]]).double().log())], how)
    assert wrong["law_max"] == pytest.approx(0.5)


def test_two_runs_are_compared_row_by_row(tmp_path):
    folders = {}
    for kind, ids, apart in (("stream", [1, 2], 0.0), ("vllm", [1, 2], 1e-6)):
        folders[kind] = folder = tmp_path / kind
        (folder / "model").mkdir(parents=True)
        save_file({"w": torch.ones(2) + apart}, folder / "model" / "model.safetensors")
        both = [[ids, [-1.0, -2.0 + apart]], [[3] if apart else [4], [-1.0]]]
        rows = [
            {"step": 1, "row": b, "sample": 0, "response_ids": r, "behaviour_logprobs": p, "policy_logprobs": p}
            for b, (r, p) in enumerate(both)
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        times = {f"time/{name}_s": 1.0 for name in plain_vllm.PHASES} | {"engine/sync_s": 0.5}
        (folder / "metrics.jsonl").write_text((json.dumps(times) + "\n") * 2)
    found = plain_vllm.beside(folders)
    assert (found["rows"], found["same_rows"]) == (2, 1)
    assert found["logprobs_apart"] == pytest.approx(1e-6) and found["weights_apart"] == pytest.approx(1e-6, rel=0.2)
    assert found["seconds"]["vllm"]["sync"] == 0.5 and "sync" not in found["seconds"]["stream"]
    assert any(line.startswith("| vllm | 1.00 |") for line in plain_vllm.job_lines(found))


def test_sizes_are_what_they_are_called():
    for case, millions in zip(engines.SIZES, (1, 10, 30, 100), strict=True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(case))
        assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.06)
        assert case.hidden // case.query_heads == 32, "a head that vLLM takes on a CPU"
