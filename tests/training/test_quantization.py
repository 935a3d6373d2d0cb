"""Base models in few bits: who is refused, in one line. What they compute is seen on a GPU (tests/gpu/test_quantization.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.vllm.support import refusals
from steerl.rollout.model import adapters
from steerl.rollout.model.auto_classes import quantized
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.training.checks import check_job, check_quantization
from steerl.training.settings import PPOSettings
from steerl.training.stages.models import load_base, load_trainable
from tests.models import tiny, tiny_policy, tiny_tokenizer
from tests.ppo_runs import LORA


def few_bits(peft: bool = False) -> Any:
    """A policy whose model says of itself what transformers notes on one that it has loaded so."""
    policy = tiny_policy("llama")
    policy.core.is_quantized = True
    return policy.with_model(adapters.add(policy.model, LORA)) if peft else policy


def accelerator(kind: str) -> Any:
    return SimpleNamespace(distributed_type=SimpleNamespace(value=kind))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_without_a_gpu_or_bitsandbytes_it_is_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path), quantization=kind, peft=LORA)
    for load in (lambda: load_policy(settings, read=False), lambda: load_trainable(settings, "policy")):
        with pytest.raises(UserError, match=f"model.quantization: {kind}, but its kernels are a GPU's") as found:
            load()
        assert len(found.value.lines) == 1
    assert load_base(settings, "policy").dtype == torch.float32  # what an adapter is merged into
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(UserError, match="it needs bitsandbytes, which is not installed"):
        quantized(kind, "auto", "model.path")


def test_it_needs_an_adapter_that_learns() -> None:
    for policy, steering in ((few_bits(), None), (few_bits(), SimpleNamespace(role="trainable", correction=None, sites=()))):
        with pytest.raises(UserError, match=r"model.quantization: the model is in few bits, which do not learn") as found:
            check_job(policy, [1], Sampling(), PPOSettings(), steering)
        assert len(found.value.lines) == 1
    check_job(few_bits(peft=True), [1], Sampling(), PPOSettings())
    # Vectors learn beside it, and no copy of it does.
    check_job(
        few_bits(), [1], Sampling(), PPOSettings(value="shared"), SimpleNamespace(role="trainable", correction=None, sites=())
    )


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_engines_that_cut_weights_do_not_hold_it(kind: str) -> None:
    with pytest.raises(UserError, match=f"few bits, which {kind} cannot hold; run one process or DDP"):
        check_quantization(accelerator(kind), few_bits(peft=True), False)
    check_quantization(accelerator(kind), tiny_policy("llama"), True)
    check_quantization(accelerator("MULTI_GPU"), few_bits(peft=True), False)
    with pytest.raises(UserError, match="ppo.export_merged: true, but the base is in few bits"):
        check_quantization(accelerator("NO"), few_bits(peft=True), True)


def test_a_vllm_server_is_not_sent_few_bits() -> None:
    assert any("model.quantization" in line for line in refusals(few_bits()))
    assert not any("model.quantization" in line for line in refusals(tiny_policy("llama")))
