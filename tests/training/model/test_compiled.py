"""Compiled layers learn what plain ones learn, score what they learn, see everybody's hooks, and are refused where they do not."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.steering import load_spec
from steerl.training.algorithm.update import learn
from steerl.training.model import compiled
from steerl.training.model.compiled import CompiledLayers, compile_layers
from steerl.training.settings import PPOSettings
from tests.ppo_runs import LORA, first_experience, first_scored, job

BLOCK = {"name": "block", "at": {"layers": [1]}, "op": {"type": "noise"}, "strength": 0.6}
INSIDE = {"name": "inside", "at": {"layers": [0], "component": "mlp_output"}, "op": {"type": "noise"}, "strength": 0.6}
TRAINED = {"name": "trained", "at": {"layers": [0]}, "op": {"type": "loreft", "rank": 2}}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "separate value": ({}, 4),
    "shared value, adapter": ({"value": "shared", "peft": LORA}, 2),
    "no value, rows alone": ({"credit": "rloo", "sampling": {"n": 2}, "micro_batch_size": 1, "micro_batch_tokens": 0}, 2),
    "packed": ({"packing": True}, 4),
    "value first": ({"value": "shared", "value_warmup_steps": 5}, 2),
    "steered": ({"steering": {"role": "policy", "sites": [BLOCK]}}, 4),
    "steered inside": ({"steering": {"role": "policy", "sites": [BLOCK, INSIDE]}}, 3),
    "steering that learns": ({"steering": {"role": "trainable", "sites": [TRAINED]}}, 4),
    "preventative": (
        {"steering": {"role": "preventative", "sites": [BLOCK], "correction": {"type": "token_truncate"}}}, 4,
    ),
}  # fmt: skip
"""The settings, and how many of the layers of two-layer models are compiled."""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without the compiler's minute; its counts from nothing."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()


def learned(updates: int = 2, **settings: Any):
    """(parts, statistics of each update, weights)"""
    steering = load_spec(settings.pop("steering")) if "steering" in settings else None
    parts, prompts, ppo = job(**{"family": "llama", **settings}, steering=steering)
    stats = [learn(parts.state, first_experience(parts, prompts, ppo), ppo, seed=i) for i in range(updates)]
    return parts, stats, {name: value.detach().clone() for name, value in parts.actor_critic.state_dict().items()}


def assert_same(settings: dict[str, Any], updates: int = 2):
    _, plain, expected = learned(updates, **settings)
    parts, found, weights = learned(updates, **settings, compile="on")
    assert not parts.actor_critic.compiled.failed and weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=name)
    for one, other in zip(found, plain, strict=True):
        assert abs(one.policy_loss - other.policy_loss) < 1e-5 and abs(one.grad_norm - other.grad_norm) < 1e-4
        assert max(one.ratio_first_error, other.ratio_first_error) < 2e-6
    return parts


@pytest.mark.parametrize("name", CASES)
def test_the_same_is_learned(name):
    settings, whole = CASES[name]
    parts = assert_same(settings)
    assert len(parts.actor_critic.compiled.whole()) == whole
    assert counters["stats"]["unique_graphs"] and not counters["recompile_limit"] and not counters["graph_break"]


def test_one_graph_serves_all_layers_of_actor_and_critic_at_all_shapes(monkeypatch):
    compilings: list[object] = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, inputs: compilings.append(graph) or graph)
    learned(compile="on")
    assert len(compilings) == 1 and counters["stats"]["unique_graphs"] == 2  # one without the compiler, to count them


@pytest.mark.proofs
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "qwen2"])
def test_ten_updates_through_the_compiler_itself(family, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    # Four optimizer steps each. Adam would make a step of its rate out of a gradient that is rounding alone.
    assert_same({"family": family, "optimizer": "SGD", "learning_rate": 0.05}, updates=3)


def test_only_what_is_learned_from_is_compiled(monkeypatch):
    """Sampling, the reference (the adapter off) and evaluations go by the plain layers; scoring and learning do not."""
    ran: list[bool] = []

    def counting(graph, inputs):
        return lambda *args: ran.append(torch.is_grad_enabled()) or graph(*args)

    monkeypatch.setattr(compiled, "BACKEND", counting)
    parts, prompts, ppo = job("llama", LORA, compile="on", value="shared")
    ran.clear()
    samples = parts.sampler.draw(prompts.batch(prompts.take(0, 0, 16)), step=0)
    parts.reference.logprobs(samples.rollout)
    with torch.no_grad():
        parts.actor_critic(samples.rollout)
    assert not ran
    parts.actor_critic(samples.rollout)
    assert ran == [True, True]  # two layers
    assert not any("forward" in vars(module) for module in parts.actor_critic.modules())


def test_a_hook_that_comes_later_is_not_left_out():
    parts, prompts, ppo = job("llama", compile="on")
    before = first_scored(parts, prompts, ppo).old_logprobs_BR
    layer = parts.policy.core.model.layers[0]
    handles = [layer.mlp.register_forward_hook(lambda module, args, output: 2 * output)]
    inside = first_scored(parts, prompts, ppo).old_logprobs_BR
    handles.pop().remove()
    handles.append(layer.register_forward_hook(lambda module, args, output: 2 * output))
    around = first_scored(parts, prompts, ppo).old_logprobs_BR
    assert (before - inside).abs().max() > 1e-3 and (before - around).abs().max() > 1e-3


# -- refusals -----------------------------------------------------------------------------------------------------------


REFUSED = {
    "encoder-decoder": {"family": "t5"},
    "ppo.checkpointing": {"checkpointing": True},
    "virtual tokens": {"peft": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}},
    "hooks inside": {
        "steering": load_spec({"role": "policy", "sites": [{**INSIDE, "at": {"layers": "all", "component": "mlp_output"}}]}),
        "value": "shared",
    },
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_compiled_is_refused_or_left_as_it_is(reason, caplog):
    with pytest.raises(ConfigError, match=f"ppo.compile: on, but .*{reason}.*; set it to off"):
        job(**{"family": "llama", **REFUSED[reason]}, compile="on")
    with caplog.at_level(logging.WARNING):
        parts, _, _ = job(**{"family": "llama", **REFUSED[reason]}, compile="auto")
    assert parts.actor_critic.compiled is contextlib.nullcontext
    assert [r.getMessage() for r in caplog.records if "ppo.compile" in r.getMessage() and reason in r.getMessage()]


MANY = {
    "layer": lambda layer, hidden: hidden * float(f"1.{layer.self_attn.layer_idx}"),
    "length of rows": lambda layer, hidden: sum((0.0 * hidden for _ in range(hidden.shape[1])), hidden),
}


@pytest.mark.parametrize("each", MANY)
def test_layers_that_would_take_many_graphs_never_reach_the_compiler(each, monkeypatch):
    """Layers that differ by what they hold; states that are gone through token by token."""
    compilings: list[object] = []
    own = LlamaDecoderLayer.forward
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, inputs: compilings.append(graph) or graph)
    many = MANY[each]
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, *args, **kwargs: many(self, own(self, *args, **kwargs)))
    with pytest.raises(ConfigError, match=f"LlamaForCausalLM compiles a graph for each {each}; set it to off"):
        job("llama", compile="on", overrides={"num_hidden_layers": 5})
    assert not compilings


@pytest.mark.proofs
@pytest.mark.parametrize("family", ["recurrent_gemma", "mamba", "rwkv"])
def test_families_that_go_through_rows_token_by_token_are_refused(family, monkeypatch):
    compilings: list[object] = []
    monkeypatch.setattr(compiled, "BACKEND", lambda graph, inputs: compilings.append(graph) or graph)
    with pytest.raises(ConfigError, match="compiles a graph for each length of rows; set it to off"):
        job(family, compile="on")
    assert not compilings


def test_weights_that_an_engine_holds_and_layers_of_somebody_else_are_refused():
    parts, _, _ = job("llama")
    with pytest.raises(ConfigError, match="DeepSpeed holds the weights"):
        compile_layers(parts.actor_critic, PPOSettings(compile="on"), "DeepSpeed")
    layer = parts.policy.core.model.layers[0]
    layer.forward = layer.forward
    with pytest.raises(ConfigError, match="forward of its own on the layers of Llama"):
        compile_layers(parts.actor_critic, PPOSettings(compile="on"))


def test_a_compiler_that_fails_or_errs_is_found_out_before_learning(monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no C++ compiler")

    def err(graph, inputs):
        return lambda *args: [1.01 * value for value in graph(*args)]

    for backend, said in ((fail, "cannot be compiled .*no C.. compiler"), (err, "a graph does not give the numbers of Llama")):
        monkeypatch.setattr(compiled, "BACKEND", backend)
        with pytest.raises(ConfigError, match=said):
            job("llama", compile="on")
        assert job("llama", compile="auto")[0].actor_critic.compiled is contextlib.nullcontext


def test_a_compiler_that_fails_later_leaves_the_numbers_alone(monkeypatch, caplog):
    parts, prompts, ppo = job("llama", compile="on")
    plain = first_scored(parts, prompts, ppo)

    def fail(graph, inputs):
        raise RuntimeError("out of memory")

    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", fail)
    parts.actor_critic.compiled = CompiledLayers(parts.actor_critic)
    found = first_scored(parts, prompts, ppo)
    assert torch.equal(found.old_logprobs_BR, plain.old_logprobs_BR) and torch.equal(found.values_BR, plain.values_BR)
    told = [r.getMessage() for r in caplog.records if "ppo.compile" in r.getMessage()]
    assert len(told) == 1 and "out of memory" in told[0] and "learning goes on uncompiled" in told[0]
