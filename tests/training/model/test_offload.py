"""Activations in host memory: gradients to the bit, and what is moved. On a CPU the copies go from memory to memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from steerl.rollout.common.errors import UserError
from steerl.training.algorithm import update as learning
from steerl.training.model import offload
from tests.ppo_runs import LORA, first_experience, job, warm_head


def gradients(monkeypatch: pytest.MonkeyPatch, family: str, offloading: bool, **settings: Any) -> dict[str, torch.Tensor]:
    parts, prompts, ppo = job(family, max_grad_norm=0.0, **settings)
    warm_head(parts.actor_critic)
    experience = first_experience(parts, prompts, ppo)
    caught: dict[str, torch.Tensor] = {}

    def step() -> None:
        caught.update({n: p.grad.clone() for n, p in parts.actor_critic.named_parameters() if p.grad is not None})

    monkeypatch.setattr(parts.state.optimizer, "step", step)
    if offloading:
        object.__setattr__(ppo, "offload_activations", True)
    learning.update(parts.state, experience, list(range(8)), ppo)
    return caught


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("gpt2", {}),
        ("llama", {"packing": True, "value": "shared"}),
        ("llama", {"checkpointing": True, "peft": LORA}),
        ("mixtral", {"peft": {**LORA, "target_modules": ["q_proj", "v_proj"]}}),
        ("t5", {"checkpointing": True}),
    ],
)
def test_gradients_are_the_same_to_the_bit(family: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = gradients(monkeypatch, family, False, **settings)
    moved: list[torch.Tensor] = []
    real = torch.empty_like

    def noting(like: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "pin_memory" in kwargs:
            moved.append(like)
        return real(like, *args, **kwargs)

    monkeypatch.setattr(learning, "offloaded", lambda: offload.offloaded("cpu", 0))
    monkeypatch.setattr(offload.torch, "empty_like", noting)
    found = gradients(monkeypatch, family, True, **settings)
    assert plain.keys() == found.keys() and all(torch.equal(found[name], gradient) for name, gradient in plain.items())
    assert len(moved) > 10
    # Each pass has its own rows: a tensor of a weight's shape (64 x 32, say) is a weight.
    assert not any(isinstance(tensor, nn.Parameter) or tensor.shape in SHAPES for tensor in moved)


SHAPES = {(64, 32), (32, 64), (32, 32), (32, 96), (32, 128), (128, 32), (4, 64, 32), (4, 32, 64), (4, 128, 32)}


def kept(run: Any, *, out: bool) -> list[bool]:
    """Whether each activation of `run` is still there when the forward pass is over."""
    made: list[weakref.ref[torch.Tensor]] = []
    block = nn.Sequential(*(nn.Linear(16, 16), nn.GELU()) * 3)
    for module in block:
        module.register_forward_hook(lambda m, i, output: made.append(weakref.ref(output.untyped_storage())))
    with offload.offloaded("cpu", 0) if out else offload.offloaded("cuda"):
        total = block(run).sum()
    gc.collect()
    alive = [ref() is not None for ref in made[:-1]]
    total.backward()
    return alive


def test_what_was_moved_is_let_go() -> None:
    data = torch.randn(4, 16)
    assert any(kept(data, out=False)) and not any(kept(data, out=True))


def test_small_expanded_and_weights_stay() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
    for tensor in (weight, weight.t(), weight.to(torch.bfloat16), weight.to(torch.bfloat16).t(), frozen.t(), frozen[:4]):
        assert offload.is_weight(tensor)
    for tensor in (weight @ weight, weight[0].exp(), torch.randn(8, 8), nn.functional.embedding(torch.tensor([1]), weight)):
        assert not offload.is_weight(tensor)


def test_on_a_cpu_it_is_refused() -> None:
    with pytest.raises(UserError, match="offload_activations: true, but the run is on a CPU") as caught:
        job("gpt2", offload_activations=True)
    assert "\n" not in str(caught.value)
