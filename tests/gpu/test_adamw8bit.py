"""AdamW with moments of 8 bits: its first step is AdamW's, the next ones stay near, a resumed run is the run, the memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.training import ppo
from steerl.training.engine.engine import start
from steerl.training.engine.optimizer import build_optimizer
from steerl.training.settings import PPOSettings
from tests.gpu.bounds import policy_on
from tests.gpu.conftest import only_cuda
from tests.ppo_runs import prompts_of, share_of_threes

pytestmark = pytest.mark.gpu
SMALL = PPOSettings(
    steps=4, rollouts_per_step=16, minibatches=2, epochs=2, learning_rate=1e-3, optimizer="adamw8bit", eval_prompts=0
)


@pytest.fixture(autouse=True)
def installed(device: torch.device) -> None:
    only_cuda(device, "bitsandbytes")
    pytest.importorskip("bitsandbytes")


def test_the_first_step_is_adamws_and_ten_stay_near(device: torch.device, record_property) -> None:
    """A block's moments are stored with 8 bits after a step, so the first is not off; then by a share of what the steps did."""
    draw = torch.Generator(device).manual_seed(0)
    begun = torch.randn(128, 256, device=device, generator=draw)
    gradients = [torch.randn(128, 256, device=device, generator=draw) for _ in range(10)]
    after: dict[str, list[torch.Tensor]] = {}
    for name in ("adamw", "adamw8bit"):
        weight = torch.nn.Parameter(begun.clone())
        groups = [{"name": "policy", "params": [weight], "base_lr": 1e-2, "lr": 1e-2}]
        optimizer = build_optimizer(start(), groups, dataclasses.replace(SMALL, optimizer=name))
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimizer.step()
            after.setdefault(name, []).append(weight.detach().clone())
        if name == "adamw8bit":
            (state,) = optimizer.state.values()
            assert state["state1"].dtype == state["state2"].dtype == torch.uint8
    off = [(a - b).norm() / (a - begun).norm() for a, b in zip(after["adamw"], after["adamw8bit"], strict=True)]
    record_property("off_after_1", float(off[0]))
    record_property("off_after_10", float(off[-1]))
    assert off[0] < 1e-4 and 0 < off[-1] < 0.1


def run(folder: Path, steps: int, **settings: object) -> dict[str, torch.Tensor]:
    policy = policy_on(torch.device("cpu"), torch.float32)
    ppo.train(
        policy,
        prompts_of(policy),
        share_of_threes,
        Sampling(max_new_tokens=8, stop_ids=[11, 17, 23]),
        dataclasses.replace(SMALL, steps=steps),
        RunSettings(dir=str(folder), save_every=2, keep=9, **settings),  # type: ignore[arg-type]
    )
    return {name: value.cpu().clone() for name, value in policy.model.state_dict().items()}


def test_a_resumed_run_keeps_its_states(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 4, resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
