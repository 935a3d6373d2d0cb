"""Half precision, compiled steps, attention: what is drawn and scored on a GPU is what the weights say."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from steerl.rollout.decoding import compiled
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.gpu.bounds import FLOAT32, MEAN, WIDE, WORST, alone, batch, exact, off, policy_on
from tests.gpu.conftest import only_cuda

pytestmark = pytest.mark.gpu
TOKENS = 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def drawn(policy: Policy, steering: Any = None, step: int = 0, **settings: Any) -> Rollout:
    asked = Sampling(**{"max_new_tokens": TOKENS, "n": 4, **settings})
    rows = dataclasses.replace(batch(), columns={"s": [2.0, 0.0, -1.5, 1.0]})
    return Sampler(policy, asked, steering).sample(rows, step=step).rollout


def test_a_wrong_position_would_be_seen(device):
    """What these tests can tell: one position off moves log-probs by more than any bound here."""
    policy = policy_on(device, torch.float32)
    rollout, model = drawn(policy, n=1), exact(policy)
    ids = torch.cat([rollout.prompt_BP[1], rollout.response_BR[1]])[None].cpu()
    places = torch.arange(ids.shape[1])[None]
    shifted = torch.where(places > 4, places + 1, places)
    right, wrong = (model(input_ids=ids, position_ids=at, use_cache=False).logits.log_softmax(-1) for at in (places, shifted))
    assert (right - wrong).abs().amax() > 2 * WORST


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rollouts_log_probs_are_those_of_each_row_alone(device, dtype, record_property):
    """By the sampler and by the trainer's pass, over padded rows of four lengths that end at different places."""
    policy = policy_on(device, DTYPES[dtype])
    rollout = drawn(policy, stop_ids=[11, 17, 23])
    assert rollout.response_BR.device.type == device.type and len(set(rollout.lengths_B.tolist())) > 1
    for who, numbers in (("sampler", rollout.policy_logprobs_BR), ("trainer", teacher_forced(policy, rollout).logprobs_BR)):
        far = off(policy, rollout, numbers)
        record_property(f"{who}_mean", float(far.mean()))
        record_property(f"{who}_worst", float(far.max()))
        assert far.mean() < (MEAN if dtype == "bfloat16" else FLOAT32) and far.max() < (
            WORST if dtype == "bfloat16" else FLOAT32
        )


# -- compiled steps: on a GPU a CUDA graph ----------------------------------------------------------------------------


def launches(call: Any) -> int | None:
    """CUDA graphs that were launched meanwhile; None where the profiler sees no launch of anything."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
    counts = {event.key: event.count for event in profiled.key_averages()}
    if not any(name.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")) for name in counts):
        return None
    return sum(count for name, count in counts.items() if "GraphLaunch" in name)


VECTOR = torch.linspace(-1, 1, WIDE["hidden_size"]).tolist()
STEERINGS: dict[str, Any] = {
    "plain": None,
    "steered": {
        "sites": [
            {"at": {"layers": [0]}, "vector": VECTOR, "strength": {"column": "s"}, "where": {"steps": {"window": [2, 12]}}},
            {
                "at": {"layers": [1], "component": "mlp_output"}, "vector": VECTOR[::-1], "op": {"type": "ablate"},
                "where": {"steps": "all", "exclude": {"token_ids": [5, 9, 14, 33, 40]}},
            },
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("steered", STEERINGS)
def test_compiled_steps_give_the_eager_paths_tokens_and_log_probs(device, steered, record_property):
    """In float32, where rounding decides a draw once in some ten thousand: token for token, steered and not, in a second batch
    too (whose steps replay what the first recorded)."""
    policy = policy_on(device, torch.float32)
    steering = Steering(policy.core, STEERINGS[steered], policy.tokenizer) if STEERINGS[steered] else None
    for step in (0, 1):
        eager, graph = (drawn(policy, steering, step, compile=compiles) for compiles in (False, True))
        assert compiled._state_of(policy.core).graphs and not compiled._state_of(policy.core).failed, compiled._WARNED
        assert torch.equal(eager.response_BR, graph.response_BR)
        for name in ("policy_logprobs_BR", "behaviour_logprobs_BR", "entropy_BR"):
            torch.testing.assert_close(getattr(graph, name), getattr(eager, name), atol=FLOAT32, rtol=0)
    if steering is not None:
        plain = drawn(policy, step=1)
        assert not torch.equal(plain.response_BR, graph.response_BR)
    if device.type == "cuda":
        found = launches(lambda: drawn(policy, steering, 2, compile=True))
        record_property("graph_launches", -1 if found is None else found)
        assert found is None or found >= TOKENS - 1, "steps were run without a graph"


def test_compiled_steps_in_half_precision_are_as_near_as_the_eager_ones(device, record_property):
    """Their kernels round otherwise, so tokens differ now and then: each path is held to the exact numbers of its own rows."""
    policy = policy_on(device, torch.bfloat16)
    for how in ("eager", "compiled"):
        rollout = drawn(policy, compile=how == "compiled")
        far = off(policy, rollout, rollout.policy_logprobs_BR)
        record_property(f"{how}_mean", float(far.mean()))
        assert far.mean() < MEAN and far.max() < WORST
    assert compiled._state_of(policy.core).graphs and not compiled._state_of(policy.core).failed, compiled._WARNED


def test_rows_that_end_leave_the_graph_by_halves(device, monkeypatch):
    monkeypatch.setattr(compiled, "FEWEST", 4)
    policy = policy_on(device, torch.float32)
    stops = list(range(20, 32))
    eager, graph = (drawn(policy, compile=compiles, stop_ids=stops) for compiles in (False, True))
    assert torch.equal(eager.response_BR, graph.response_BR) and torch.equal(eager.lengths_B, graph.lengths_B)
    torch.testing.assert_close(graph.policy_logprobs_BR, eager.policy_logprobs_BR, atol=FLOAT32, rtol=0)
    assert len(compiled._state_of(policy.core).graphs) > 1


def test_weights_that_change_are_the_graphs_too(device):
    """What learning does between two batches: in place, under a graph that was recorded before."""
    policy = policy_on(device, torch.float32)
    drawn(policy, compile=True)
    drawn(policy, compile=True, step=1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.2)
    eager, graph = (drawn(policy, compile=compiles, step=2) for compiles in (False, True))
    assert torch.equal(eager.response_BR, graph.response_BR)


# -- attention kernels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flash_attention_2"])
def test_padding_is_not_seen_by_any_attention(device, kernel, record_property):
    """Padded rows, drawn and scored by each kernel, against each row alone by attention written out."""
    if kernel == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    if kernel == "flash_attention_2":
        only_cuda(device, kernel)
    policy = policy_on(device, torch.bfloat16)
    policy.model.set_attn_implementation(kernel)
    rollout = drawn(policy, stop_ids=[11, 17, 23])
    for numbers in (rollout.policy_logprobs_BR, teacher_forced(policy, rollout).logprobs_BR):
        far = off(policy, rollout, numbers)
        record_property("worst", float(far.max()))
        assert far.mean() < MEAN and far.max() < WORST


def test_the_flash_kernel_of_torch_takes_rows_without_padding(device, record_property):
    """Rows of one length need no mask: the trainer's pass then goes through torch's own flash kernel, and no other is there."""
    policy = policy_on(device, torch.bfloat16)
    policy.model.set_attn_implementation("sdpa")
    rows = dataclasses.replace(batch().select([0]), columns={})
    rollout = Sampler(policy, Sampling(max_new_tokens=TOKENS, n=6)).sample(rows).rollout
    _ = policy.capabilities  # seen over padded rows, which want a mask
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        numbers = teacher_forced(policy, rollout).logprobs_BR
    far = off(policy, rollout, numbers)
    record_property("worst", float(far.max()))
    assert far.mean() < MEAN and far.max() < WORST
    assert len(alone(exact(policy), rollout, 0)) == TOKENS
