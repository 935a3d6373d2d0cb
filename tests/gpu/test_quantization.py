"""QLoRA: a base in 4 or 8 bits under an adapter. What its layers compute is near the base's own; what learns is the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.training import ppo
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft
from tests.gpu.bounds import WIDE
from tests.gpu.conftest import only_cuda
from tests.models import tiny, tiny_tokenizer
from tests.ppo_runs import LORA, prompts_of, share_of_threes

pytestmark = pytest.mark.gpu
BITS = {"nf4": 4, "int8": 8}
IDS = [[5, 9, 13, 20, 3, 7]]


@pytest.fixture
def base(device: torch.device, tmp_path: Path) -> Path:
    only_cuda(device, "bitsandbytes")
    pytest.importorskip("bitsandbytes")
    tiny("llama", scale=0.1, **WIDE).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", BITS)
def test_layers_take_few_bits_and_compute_nearly_the_same(base: Path, device: torch.device, kind: str, record_property) -> None:
    policy = load_policy(ModelSettings(path=str(base), quantization=kind), device)
    plain = load_policy(ModelSettings(path=str(base)), device)
    matrix = policy.core.model.layers[0].mlp.up_proj.weight
    stored = matrix.numel() * matrix.element_size()
    assert stored * 8 == plain.core.model.layers[0].mlp.up_proj.weight.numel() * BITS[kind]
    with torch.no_grad():
        laws = [p.model(input_ids=torch.tensor(IDS, device=device)).logits.float().log_softmax(-1) for p in (policy, plain)]
    off = (laws[0] - laws[1]).abs()
    record_property("mean_off", float(off.mean()))
    # Four bits round a weight by some 8 %, eight by 0.5 %, and rounding averages out over the sums.
    assert 0 < off.mean() < (0.3 if kind == "nf4" else 0.05)


@pytest.mark.parametrize("kind", BITS)
def test_a_run_learns_its_adapter_leaves_it_and_goes_on(base: Path, device: torch.device, kind: str, tmp_path: Path) -> None:
    def run(name: str, steps: int, **settings: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        policy = with_peft(load_policy(ModelSettings(path=str(base), quantization=kind), device, read=False), LORA)
        before = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
        ppo.train(
            policy, prompts_of(policy), share_of_threes, Sampling(max_new_tokens=8),
            PPOSettings(steps=steps, rollouts_per_step=16, minibatches=2, epochs=1, learning_rate=1e-3, eval_prompts=0),
            RunSettings(dir=str(tmp_path / name), save_every=2, **settings),  # type: ignore[arg-type]
        )  # fmt: skip
        assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters() if n in before)
        return {n: p.detach().cpu() for n, p in policy.model.named_parameters() if p.requires_grad}

    whole = run("whole", 4)
    run("cut", 2)
    again = run("cut", 4, resume=True)
    assert any(value.any() for name, value in whole.items() if "lora_B" in name)
    for name, value in whole.items():
        assert torch.allclose(again[name], value, atol=1e-6), name
    left = load_policy(ModelSettings(path=str(tmp_path / "whole" / "model"), quantization=kind), device)
    learned = {n: p.detach().cpu() for n, p in left.model.named_parameters() if "lora_" in n}
    assert all(torch.equal(learned[name], value) for name, value in whole.items())
