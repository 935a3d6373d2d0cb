"""Every weight that two ranks hold in parts, read out of its file part by part, is what a whole load gives, bit for bit."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from steerl.rollout.model import unread
from steerl.rollout.model.auto_classes import load_head
from steerl.rollout.model.unread import File, Unread
from tests import warm
from tests.models import tiny
from tests.training.engine.loading import CASES
from tests.training.engine.test_engines import config_of

FEW = ("llama", "gemma2", "mixtral", "lora", "classifier")  # an engine of DeepSpeed's takes a second or two


@pytest.mark.parametrize("engine", ["zero3", "fsdp2", pytest.param("zero3 more", marks=pytest.mark.proofs)])
def test_shares_of_every_weight_are_those_of_a_whole_load(engine: str, tmp_path: Path) -> None:
    # DeepSpeed without mixed precision takes float32 alone
    names = {"zero3": FEW, "zero3 more": [n for n in CASES if n not in (*FEW, "half")]}.get(engine, list(CASES))
    config = config_of("ddp" if engine == "fsdp2" else engine, tmp_path)
    program = [str(Path(__file__).with_name("loading.py")), str(tmp_path), str(tmp_path / "out.json"), ",".join(names)]
    command = warm.accelerate_launch(config, *program, *(["fully_shard"] if engine == "fsdp2" else []))
    done = warm.run(command, env={**os.environ, "PYTHONPATH": str(warm.ROOT)})
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads((tmp_path / "out.json").read_text())
    for name in names:
        assert told[name]["found"] == [] and told[name]["left"] == [] and told[name]["unread"] > 20_000, (name, told[name])
        # All but the value head's row and its bias lie in halves, those of the reference too.
        assert sum(share > 0.7 for share in told[name]["shares"]) <= 2 and len(told[name]["shares"]) > 40, name
        assert told[name]["held"] == (name != "dora")


def stored(tmp_path: Path, **tensors: torch.Tensor) -> dict[str, Unread]:
    save_file(tensors, tmp_path / "w.safetensors")
    file = File(str(tmp_path / "w.safetensors"))
    return {name: file.get_tensor(name) for name in tensors}


def test_an_unread_weight_is_the_tensor_of_its_file(tmp_path: Path) -> None:
    plain = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = stored(tmp_path, w=plain)["w"].to(torch.float32)
    assert isinstance(weight, Unread) and weight.dtype == torch.float32 and weight.shape == (6, 5)
    for view in (lambda t: t[2:5], lambda t: t.T, lambda t: t.chunk(3)[1], lambda t: t.view(30)[4:9], lambda t: t[:, None, 1]):
        assert isinstance(view(weight), Unread) and torch.equal(view(weight).read(), view(plain.float()))
    for result in (lambda t: t @ t.T, lambda t: t.sum(), lambda t: t + 1, lambda t: t.reshape(-1).view(torch.int32)):
        assert type(result(weight)) is torch.Tensor and torch.equal(result(weight), result(plain.float()))
    joined = torch.stack([weight, weight])
    assert isinstance(joined, Unread) and torch.equal(joined.read(), torch.stack([plain, plain]).float())
    # one dtype after another: the first rounds
    numbers = torch.tensor([1.001, 2.002])
    assert torch.equal(stored(tmp_path, w=numbers)["w"].bfloat16().float().read(), numbers.bfloat16().float())


def test_nothing_is_written_to_a_file(tmp_path: Path) -> None:
    weight = stored(tmp_path, w=torch.ones(3, 2))["w"]
    for change in (lambda t: t.zero_(), lambda t: t.add_(1), lambda t: t[1].fill_(2)):
        with pytest.raises(RuntimeError, match="which is not written to"):
            change(weight)
    read = weight.read()
    read.zero_()
    assert torch.equal(weight.read(), torch.ones(3, 2))


def test_a_model_is_read_in_with_its_ties(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path)
    model: Any = load_head(str(tmp_path), "policy", read=False)
    other = copy.deepcopy(model)
    assert all(isinstance(p, Unread) and isinstance(p, nn.Parameter) for p in [*model.parameters(), *other.parameters()])
    unread.read_in(model)
    assert model.lm_head.weight is model.transformer.wte.weight and not isinstance(model.lm_head.weight, Unread)
    assert all(isinstance(p, Unread) for p in other.parameters())
    ids = torch.tensor([[5, 9, 3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)


def test_a_layer_has_its_weights_in_memory_while_it_runs(tmp_path: Path) -> None:
    """As kernels want them that are given a weight and not a tensor's operations; and only that long."""
    tiny("gpt2").save_pretrained(tmp_path)
    model: Any = load_head(str(tmp_path), "policy", read=False)
    block, seen = model.transformer.h[1], []
    block.mlp.register_forward_pre_hook(lambda *_: seen.append(block.attn.c_attn.weight.data_ptr()))
    with torch.no_grad(), unread.layers_read(model, ["GPT2Block"]):
        model(torch.tensor([[5, 9, 3]]))
        assert seen[0] and all(isinstance(p, Unread) for p in model.parameters())
        with pytest.raises(RuntimeError):
            block.mlp.register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
            model(torch.tensor([[5, 9, 3]]))
    assert all(isinstance(p, Unread) for p in model.parameters())
