"""Blocks and components found by structure: what is called attn_output and mlp_output is what is added to the stream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from steerl.rollout.common.errors import UserError
from steerl.rollout.steering import Steering
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import locate, stacks, unwrap
from tests.models import FAMILIES, tiny

NOT_HERE = {"mamba", "mamba2", "recurrent_gemma", "rwkv", "jamba", "bamba", "lfm2", "prophetnet"}
PRE_NORM = [
    "gpt2",
    "gpt_neo",
    "opt",
    "bloom",
    "mpt",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "starcoder2",
    "t5",
    "mt5",
    "mixtral",
    "falcon_alibi",
    "gptj",
    "phi",
    "gpt_neox",
    "cohere",
    # with norms between a component and the stream
    "gemma2",
    "gemma3",
    "olmo2",
    "glm4",
    "exaone4",
]
_GROUPED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "head_dim": 8}
OTHERS = {"glm4": "glm4", "exaone4": "exaone4"}


def of_family(family: str) -> Any:
    """A model of the table; of the others one whose norms are far from the identity."""
    if family not in OTHERS:
        model = tiny(family)
    else:
        config = AutoConfig.for_model(OTHERS[family], vocab_size=64, num_key_value_heads=2, pad_token_id=0, **_GROUPED)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            parameter.data.uniform_(0.5, 2.0)
    return model


@pytest.mark.parametrize("family", PRE_NORM)
def test_block_output_is_input_plus_the_components(family: str) -> None:
    """The residual stream written down: output = input + attention (+ cross-attention) + mlp, with what was located."""
    model = of_family(family)
    found = stacks(model)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda _, __, out: seen.__setitem__(name, (out if isinstance(out, Tensor) else out[0]).reshape(1, 4, -1).clone())

    stack = "encoder" if "encoder" in found else "decoder"
    block = found[stack].blocks[0]
    handles = [block.register_forward_hook(keep("block_output"))]
    handles.append(
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.__setitem__("in", args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    )
    for name in ("attn_output", "mlp_output"):
        point = locate(model, At(layers=(0,), component=name, stack=stack))[0]
        handles.append(point.module.register_forward_hook(keep(name)))
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model(ids, **({"decoder_input_ids": ids} if stack == "encoder" else {}))
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(
        seen["block_output"], seen["in"] + seen["attn_output"] + seen["mlp_output"], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("family", ["gemma2", "olmo2", "glm4", "exaone4", "llama", "gpt_neox"])
@pytest.mark.parametrize("component", ["attn_output", "mlp_output"])
def test_steering_a_component_of_the_last_block_moves_its_output_by_the_vector(family: str, component: str) -> None:
    """By definition: what is added to the stream reaches the last block's output as it is (the mlp reads it on the way where it
    comes after, so attn_output is looked at in parallel blocks and through the mlp's own share)."""
    model = of_family(family)
    ids, block = torch.tensor([[5, 6, 7, 8]]), stacks(model)["decoder"].blocks[-1]
    spec = {"at": {"layers": [-1], "component": component}, "vector": [0.3] * 32, "where": {"prompt": "all"}}
    steering = Steering(model, {"sites": [spec]})
    point = {name: locate(model, At(layers=(-1,), component=name))[0].module for name in ("attn_output", "mlp_output")}
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out if isinstance(out, Tensor) else out[0]})
        )
        for name, module in (("block", block), ("mlp", point["mlp_output"]))
    ]
    with torch.no_grad():
        model(ids)
        plain = dict(seen)
        with steering.active():
            model(ids)
    for handle in handles:
        handle.remove()
    moved = seen["block"] - plain["block"]
    if component == "attn_output":
        moved = moved - (seen["mlp"] - plain["mlp"])
    torch.testing.assert_close(moved, torch.full_like(moved, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("component", ["attn_output", "mlp_output"])
def test_a_factor_between_a_component_and_the_stream_is_refused(component: str) -> None:
    model = tiny("granite", residual_multiplier=0.22)
    with pytest.raises(UserError, match=r"at.component: GraniteDecoderLayer adds 0.22 times what its Granite\w+ gives"):
        locate(model, At(layers="all", component=component))
    assert locate(tiny("granite"), At(layers="all", component=component))  # its factor is 1: nothing is in the way


def test_blocks_that_norm_the_sum_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny("bart")
    for _ in range(2):
        assert locate(model, At(layers="all", component="mlp_output", stack="encoder"))
    assert len([r for r in caplog.records if "BartEncoderLayer is not its input plus" in r.getMessage()]) == 1


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - NOT_HERE))
def test_heads_are_columns_of_the_output_projections_input(family: str) -> None:
    """Zeroing every head equals zeroing what enters the output projection; each family has its four heads."""
    model = tiny(family)
    for stack in stacks(model):
        point = locate(model, At(layers=(0,), head=(0, 1, 2, 3), stack=stack))[0]
        assert point.width == 32 and point.columns == tuple(range(32)) and point.io == "input"
        one = locate(model, At(layers=(0,), head=(2,), stack=stack))[0]
        assert one.columns == tuple(range(16, 24))
        with pytest.raises(UserError, match="out of range"):
            locate(model, At(layers=(0,), head=(4,), stack=stack))


def test_a_head_is_what_its_values_make_it() -> None:
    """Ablating head 1 of a llama equals setting its columns of o_proj's weight to zero, at every position."""
    model = tiny("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    steering = Steering(
        model, {"sites": [{"at": {"layers": [0], "head": 1}, "op": {"type": "zero"}, "where": {"prompt": "all"}}]}
    )
    with torch.no_grad():
        with steering.active():
            found = model(ids).logits
        weight = model.model.layers[0].self_attn.o_proj.weight
        kept = weight[:, 8:16].clone()
        weight[:, 8:16] = 0.0
        expected = model(ids).logits
        weight[:, 8:16] = kept
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_wrappers_are_taken_off() -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    model = tiny("llama")
    assert unwrap(nn.DataParallel(model)) is model
    assert unwrap(torch.compile(model)) is model
    wrapped = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert unwrap(wrapped) is wrapped.get_base_model()
    assert len(stacks(wrapped)["decoder"].blocks) == 2
    virtual = get_peft_model(tiny("llama"), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="virtual tokens"):
        unwrap(virtual)


def test_ddp_and_lora_are_steered(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.nn.parallel import DistributedDataParallel

    ids = torch.tensor([[5, 6, 7, 8]])
    spec = {"sites": [{"at": {"layers": [0]}, "vector": [1.0] * 32, "strength": 2.0, "where": {"prompt": "all"}}]}
    model = get_peft_model(tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        steering = Steering(wrapped, spec)
        with torch.no_grad():
            with steering.active():
                found = wrapped(ids).logits
            block = model.get_base_model().model.layers[0]
            handle = block.register_forward_hook(lambda _, __, out: out + 2.0)
            expected = model(ids).logits
            handle.remove()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_path_reaches_anything() -> None:
    model = tiny("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    for path, io, width in (
        ("model.embed_tokens", "output", 32),
        ("model.layers.1.mlp.gate_proj", "output", 64),
        ("model.layers.1.mlp.down_proj", "input", 64),
        ("model.norm", "output", 32),
        ("lm_head", "input", 32),
    ):
        spec = {
            "sites": [{"at": {"module": path, "io": io}, "vector": [0.5] * width, "where": {"prompt": [-1], "steps": "none"}}]
        }
        steering = Steering(model, spec)
        with torch.no_grad(), steering.active(prompt_mask_BP=torch.ones(1, 4)):
            found = model(ids).logits
        moved = torch.zeros(1, 4, width)
        moved[:, -1] = 0.5
        module = dict(model.named_modules())[path]
        handle = (
            module.register_forward_hook(lambda _, __, out: out + moved)
            if io == "output"
            else module.register_forward_pre_hook(lambda _, args: (args[0] + moved,))
        )
        with torch.no_grad():
            torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)
        handle.remove()


def test_blocks_without_a_component_say_so() -> None:
    with pytest.raises(UserError, match=r"at.component: block 0 \(MambaBlock: norm, mixer\) has no attn_output"):
        locate(tiny("mamba"), At(layers=(0,), component="attn_output"))
