"""What is exported is what save_pretrained writes, bit for bit; with an adapter, a plain model of it computes the same."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.vllm.weights import export
from steerl.rollout.model import adapters, sharding
from steerl.rollout.model.policy import Policy
from steerl.rollout.weights.blocks import Block
from tests import warm
from tests.models import tiny_policy
from tests.rollout.engines.vllm import shards


def exported(policy: Policy, **settings: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    blocks = export.blocks(policy, **settings)
    export.send(blocks, lambda weights: found.update((name, value.clone()) for name, value in weights))
    announced = [(entry.name, entry.shape, entry.torch_dtype) for block in blocks for entry in block.announced()]
    assert announced == [(name, tuple(value.shape), value.dtype) for name, value in found.items()]
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "bloom", "phi3"])
def test_names_layout_and_values_are_those_of_a_checkpoint(family: str, tmp_path: Path) -> None:
    policy = tiny_policy(family)
    policy.core.save_pretrained(tmp_path)
    found = exported(policy)
    assert same(found, load_file(tmp_path / "model.safetensors"))
    if family == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in found  # as the family's checkpoints have them


def test_a_layer_is_brought_together_at_a_time() -> None:
    blocks = export.blocks(tiny_policy("llama"))
    assert [len(block.tensors) for block in blocks] == [1, 9, 9, 1, 1]


ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"peft_type": "LORA", "r": 2},
    "everywhere": {"peft_type": "LORA", "r": 3, "target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5},
    "dora": {"peft_type": "DORA", "r": 2},
    "bias": {"peft_type": "LORA", "r": 2, "bias": "all"},
    "head": {"peft_type": "LORA", "r": 2, "modules_to_save": ["lm_head"]},
    "embedding": {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens", "q_proj"]},
    "ia3": {"peft_type": "IA3", "target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "loha": {"peft_type": "LOHA", "r": 2, "target_modules": ["q_proj", "up_proj"]},
    "oft": {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ["q_proj", "up_proj"]},
    "norms": {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]},
}


def adapted(kind: str, family: str = "llama") -> Policy:
    torch.manual_seed(0)
    base = tiny_policy(family)
    model = adapters.add(base.model, ADAPTERS[kind])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return Policy.of(model, base.tokenizer)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_weights_compute_what_the_adapted_model_does(kind: str, tmp_path: Path) -> None:
    policy = adapted(kind)
    before = copy.deepcopy(policy.model.state_dict())
    found = exported(policy)
    assert same(dict(policy.model.state_dict()), before), "the policy was changed"
    plain = AutoModelForCausalLM.from_config(policy.core.config).eval()
    plain.load_state_dict(found)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected, off = policy.model(ids).logits, tiny_policy("llama").model(ids).logits
        assert float((expected - off).abs().max()) > 0.1, "an adapter that does nothing proves nothing"
        assert torch.allclose(plain(ids).logits, expected, atol=2e-5)


def test_merged_conv1d_layers_keep_their_layout() -> None:
    policy = adapted("lora", "gpt2")
    plain = AutoModelForCausalLM.from_config(policy.core.config).eval()
    plain.load_state_dict(exported(policy), strict=False)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.allclose(plain(ids).logits, policy.model(ids).logits, atol=2e-5)


def test_without_merge_the_base_is_as_it_was() -> None:
    assert same(exported(adapted("everywhere"), merge=False), exported(tiny_policy("llama")))


def test_an_adapter_in_a_tied_head_is_refused() -> None:
    base = tiny_policy("qwen3", tie_word_embeddings=True)
    model = adapters.add(base.model, {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens"]})
    with pytest.raises(UserError, match=r"model\.peft: an adapter sits in the embedding or in the head that is tied to it"):
        export.blocks(Policy.of(model, base.tokenizer))


def test_a_head_of_its_own_where_the_config_ties_it_is_refused() -> None:
    policy = tiny_policy("qwen3", tie_word_embeddings=True)
    policy.core.lm_head.weight = torch.nn.Parameter(policy.core.lm_head.weight.clone())
    with pytest.raises(UserError, match="has a head of its own"):
        export.blocks(policy)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_two_ranks_send_what_one_process_would(engine: str, tmp_path: Path) -> None:
    """The file, bitwise; and a main process that fails in mid-gather ends both in one line, at once."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    done = warm.run(shards.command(engine, tmp_path), env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, policy in shards.policies().items():
        assert same(load_file(tmp_path / f"{name}.safetensors"), exported(policy)), name
    adapted = shards.policies()["adapted"]
    adapters.save(adapted.model, tmp_path / "expected")
    files = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "expected")]
    assert same(*files)
    assert same(load_file(tmp_path / "base.safetensors"), exported(adapted, merge=False))
    other = "engine: after the sync of step 4 the server computes something else than the"
    assert (tmp_path / "gaps.0").read_text().splitlines() == ["equal", f"{other} "]
    assert (tmp_path / "gaps.1").read_text().splitlines() == ["equal"]  # the main process tells
    for rank in range(2):
        told = (tmp_path / f"failed.{rank}").read_text().splitlines()
        assert told == (["0 engine.sync: no room"] if rank == 0 else ["0 "]), told


class Watched(Block):
    """Counts how often it is brought together."""

    def saved(self, values: Any) -> dict[str, Tensor]:
        if "bad" in values:
            raise UserError("cannot be merged")
        return dict(values)


@pytest.mark.parametrize("fails_at", [0, 1, 3, 4, None])
def test_whatever_fails_every_block_is_brought_together_once(fails_at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[str] = []
    whole = sharding.whole

    def counted(tensors: Any) -> Any:
        gathered.extend(tensors)
        return whole(tensors)

    monkeypatch.setattr(sharding, "whole", counted)
    names = ["a", "b", "bad" if fails_at is None else "c", "d"]
    blocks = [Watched(None, {name: torch.ones(1)}, {}, True) for name in names]

    def consume(weights: Iterator[tuple[str, Tensor]]) -> None:
        for place, _ in enumerate(weights):
            if place == fails_at:
                raise UserError("no room")
        if fails_at == len(names):
            raise UserError("no room")

    with pytest.raises(UserError, match="cannot be merged" if fails_at is None else "no room"):
        export.send(blocks, consume)
    assert gathered == names
