"""Which optimizer a run gets, and where 8-bit states are refused."""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.training.engine.gradients import finish
from steerl.training.engine.optimizer import build_optimizer, check_optimizer
from steerl.training.settings import PPOSettings
from tests.ppo_runs import job

EIGHT = PPOSettings(optimizer="adamw8bit")


def accelerator(device: str, **fields: Any) -> Any:
    return SimpleNamespace(**{"device": torch.device(device), "deepspeed_plugin": None, "is_fsdp2": False, **fields})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (accelerator("cpu"), "the run is on cpu"),
        (accelerator("mps"), "the run is on mps"),
        (accelerator("cuda", deepspeed_plugin=object()), "DeepSpeed spreads"),
        (accelerator("cuda", is_fsdp2=True), "FSDP spreads"),
        (accelerator("cuda"), "bitsandbytes, which is not installed"),
    ],
)
def test_eight_bits_are_refused_in_one_line(given: Any, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(UserError, match=told) as caught:
        check_optimizer(given, EIGHT)
    assert (
        "\n" not in str(caught.value) and "ppo.optimizer: adamw8bit" in str(caught.value) and "set adamw" in str(caught.value)
    )
    check_optimizer(given, PPOSettings())


def test_a_run_on_a_cpu_says_so_before_anything_is_built() -> None:
    with pytest.raises(UserError, match="ppo.optimizer: adamw8bit, but its kernels are a GPU's"):
        job("gpt2", optimizer="adamw8bit")


def test_without_a_word_it_is_torchs_adamw() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    built = build_optimizer(accelerator("cpu"), [{"params": [weight], "lr": 0.1}], PPOSettings(weight_decay=0.5))
    weight.grad = torch.tensor([1.0, -2.0, 0.0])
    built.step()
    # Adam's first step is the learning rate, against the gradient's sign; decay takes half of a tenth.
    assert torch.allclose(weight.detach(), 0.95 - torch.tensor([0.1, -0.1, 0.0]))


@pytest.mark.parametrize("bound", [0.0, 1e-3, 1.0, 1e9])
def test_clipping_is_torchs_to_the_bit_and_leaves_what_is_within_the_bound(bound):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7)), torch.nn.Parameter(torch.randn(2))]
    for parameter in ours[:2]:  # one that nothing used
        parameter.grad = 0.1 * torch.randn_like(parameter)
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    for one, other in zip(ours, theirs, strict=True):
        other.grad = None if one.grad is None else one.grad.clone()
    state: Any = SimpleNamespace(model=None, optimizer=torch.optim.SGD(ours), accelerator=None)
    versions = [parameter.grad._version for parameter in ours[:2]]
    norm = torch.nn.utils.clip_grad_norm_(theirs, bound or math.inf)
    assert finish(state, bound) == float(norm)
    assert all(torch.equal(one.grad, other.grad) for one, other in zip(ours[:2], theirs[:2], strict=True))
    written = [parameter.grad._version for parameter in ours[:2]] != versions
    assert written == (0 < bound < float(norm))
