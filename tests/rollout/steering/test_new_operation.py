"""One function and one entry of the table make an operation: in specs, in sampling, in a graph, in training, in interventions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding import compiled
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import Steering, load_spec
from steerl.rollout.steering.core.table import TABLE, Operation
from steerl.rollout.steering.deploy import save
from steerl.rollout.steering.interventions.intervene import intervene
from tests.models import tiny
from tests.ppo_runs import first_scored, job, lone_logprobs
from tests.rollout.steering.helpers import WIDTH, policy, prompts

ROOT = Path(__file__).resolve().parents[3]


def squash(
    base: Tensor,
    source: Tensor | None,
    weight_KD: Tensor,
    bias_K: Tensor,
    strength: float | Tensor = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """h + a (tanh(h W^T / t) b) W: what an adapter that is bounded would do."""
    return base + strength * ((torch.tanh(base @ weight_KD.T / temperature) * bias_K) @ weight_KD)


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = Operation(squash, "learned", "", strength="strength", starts=lambda basis, random: {"weight": random})
    monkeypatch.setitem(TABLE, "squash", operation)


def numbers(rank: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"weight": 0.4 * torch.randn(rank, WIDTH, generator=g), "bias": torch.randn(rank, generator=g)}


def by_hand(block: torch.nn.Module, first: int, weight: Tensor, bias: Tensor, strength: float, temperature: float) -> Any:
    """A plain hook with the formula written entry by entry, from position `first` of a lone row on."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        h = out[0] if isinstance(out, tuple) else out
        score = torch.einsum("btd,kd->btk", h, weight) / temperature
        squashed = 2.0 * torch.sigmoid(2.0 * score) - 1.0
        moved = strength * torch.einsum("btk,k,kd->btd", squashed, bias, weight)
        edited = torch.cat([h[:, :first], (h + moved)[:, first:]], dim=1)
        return (edited, *out[1:]) if isinstance(out, tuple) else edited

    return block.register_forward_hook(hook)


def spec(folder: Path, **more: Any) -> dict[str, Any]:
    save_file(numbers(), folder / "squash.safetensors")
    op = {"type": "squash", "temperature": 0.7}
    site = {"at": {"layers": [0]}, "op": op, "vector": {"file": str(folder / "squash.safetensors")}, "strength": 1.5}
    return {"sites": [site], **more}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    compiled._MODELS.clear()
    yield
    compiled._MODELS.clear()


def test_in_sampling_and_in_a_graph(tmp_path: Path, eager: None) -> None:
    ours = policy("llama")
    steering = Steering(ours.model, spec(tmp_path), ours.tokenizer)
    drawn = []
    for compile in (False, True):
        settings = Sampling(n=2, max_new_tokens=5, batch_size=6, seed=3, compile=compile)
        with torch.no_grad():
            drawn.append(Sampler(ours, settings, steering).sample(PromptBatch.of_ids(prompts()))[0])
    rollout = drawn[0]
    assert compiled._MODELS[ours.core].graphs
    assert torch.equal(rollout.response_BR, drawn[1].response_BR)
    torch.testing.assert_close(rollout.behaviour_logprobs_BR, drawn[1].behaviour_logprobs_BR, atol=1e-5, rtol=0.0)
    for row in range(len(rollout)):
        n, start = int(rollout.lengths_B[row]), int(rollout.prompt_mask_BP[row].sum()) - 1
        with torch.no_grad():
            plain = lone_logprobs(ours, rollout, row)
            hook = by_hand(ours.core.model.layers[0], start, **numbers(), strength=1.5, temperature=0.7)
            steered = lone_logprobs(ours, rollout, row)
            hook.remove()
        torch.testing.assert_close(rollout.behaviour_logprobs_BR[row, :n].double(), steered, atol=1e-5, rtol=0.0)
        assert float((steered - plain).abs().max()) > 1e-3


def test_in_the_trainers_own_pass() -> None:
    """Fresh, it changes nothing; trained, log-probs and gradients of its tensors are those of the formula hung on by hand."""
    op = {"type": "squash", "rank": 3, "temperature": 0.7}
    site = {"at": {"layers": [0]}, "op": op, "strength": 1.5}
    parts, rows, ppo = job("gpt2", steering=load_spec({"role": "trainable", "sites": [site]}))
    rollout = first_scored(parts, rows, ppo).rollout
    layer = parts.steering.sites[0].trained.layers[0]
    assert layer.bias.eq(0).all() and layer.weight.ne(0).all()
    with torch.no_grad():
        fresh = parts.actor_critic(rollout).logprobs_BR
        layer.weight.copy_(numbers()["weight"])
        layer.bias.copy_(numbers()["bias"])
    logprobs_BR = parts.actor_critic(rollout).logprobs_BR
    logprobs_BR.sum().backward()
    own = {name: tensor.clone().requires_grad_() for name, tensor in numbers().items()}
    for row in range(len(rollout)):
        n, start = int(rollout.lengths_B[row]), int(rollout.prompt_mask_BP[row].sum()) - 1
        with torch.no_grad():
            assert torch.allclose(fresh[row, :n].double(), lone_logprobs(parts.policy, rollout, row), atol=1e-5)
        hook = by_hand(parts.policy.core.transformer.h[0], start, **own, strength=1.5, temperature=0.7)
        expected = lone_logprobs(parts.policy, rollout, row)
        hook.remove()
        torch.testing.assert_close(logprobs_BR[row, :n].detach().double(), expected.detach(), atol=1e-5, rtol=0.0)
        expected.sum().backward()
    for name, tensor in own.items():
        torch.testing.assert_close(getattr(layer, name).grad, tensor.grad, atol=1e-3, rtol=1e-3)
        assert float(tensor.grad.abs().max()) > 1e-2


def test_saved_read_checked_and_told(tmp_path: Path) -> None:
    ours = policy("llama")
    steering = Steering(ours.model, spec(tmp_path, on_deploy="keep"), ours.tokenizer)
    again = Steering(ours.model, load_spec(save(steering, tmp_path / "kept")), ours.tokenizer)
    assert all(torch.equal(again.sites[0].held[0][name], tensor) for name, tensor in numbers().items())
    with pytest.raises(UserError, match=r"factor.*has no effect with op squash; it goes with scale"):
        load_spec({"sites": [{"at": {"layers": [0]}, "op": {"type": "squash", "factor": 2.0}}]})
    save_file({"weight": torch.zeros(3, WIDTH + 1), "bias": torch.zeros(3)}, tmp_path / "squash.safetensors")
    bad = {"at": {"layers": [0]}, "op": {"type": "squash"}, "vector": {"file": str(tmp_path / "squash.safetensors")}}
    with pytest.raises(UserError, match=r"tensor 'weight' has shape \(3, 33\); layer 0 needs 3 x 32"):
        Steering(ours.model, {"sites": [bad]}, ours.tokenizer)


def test_in_an_intervention() -> None:
    model, ids = tiny("llama"), torch.tensor([[5, 6, 7]])
    one = {"at": {"layers": [0]}, "op": "squash", "parameters": {**numbers(), "strength": 1.5, "temperature": 0.7}}
    with torch.no_grad():
        found = intervene(model, [one], {"input_ids": ids}).intervened_outputs.logits
        hook = by_hand(model.model.layers[0], 0, **numbers(), strength=1.5, temperature=0.7)
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=0.0)
        hook.remove()


def test_the_guide_names_every_operation() -> None:
    guide = (ROOT / "docs" / "steering" / "reference.md").read_text(encoding="utf-8")
    assert [name for name in TABLE if name not in ("squash", "function") and f"`{name}`" not in guide] == []
