"""What makes a step fast is counted, not timed; and with all of it off, ten steps give the same numbers.

The counts see a step from outside: calls of the trunk below the head and the tokens they get, and every tensor that any
operation makes, forward and backward.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from steerl.rollout.decoding import cache, layout, loop
from steerl.rollout.decoding import compiled as decoding_compiled
from steerl.rollout.scoring import chunked_head, logprobs
from steerl.training.algorithm.experience import credit, gather_scored, score
from steerl.training.algorithm.update import learn
from steerl.training.model import compiled as learning_compiled
from tests.models import tiny_tokenizer
from tests.ppo_runs import LORA, job, share_of_threes

VOCABULARY, WIDTH = 2048, 32


class Trunk:
    """Calls of a transformer below its head, and the tokens that go through it."""

    def __init__(self, policy: Any):
        self.calls, self.tokens = 0, 0
        module: nn.Module = policy.core.base_model
        assert module is not policy.core
        module.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.calls += 1
        self.tokens += (args[0] if args else kwargs["input_ids"]).numel()


class Made(TorchDispatchMode):
    """The largest tensor that any operation makes, and the rows of all tensors of one entry per token of the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.head_rows = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, tuple | list) else (made,):
            if isinstance(value, Tensor) and not function.is_view:
                self.largest = max(self.largest, value.numel())
                if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm) and value.shape[-1] == VOCABULARY:
                    self.head_rows += len(value)
        return made


def counted(**settings: Any) -> dict[str, Any]:
    """One step of a job of 16 rows whose responses end at different places, and what it took."""
    fixed = {"epochs": 2, "minibatches": 2, "micro_batch_size": 16, "micro_batch_tokens": 0}
    overrides = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "tokenizer": tiny_tokenizer()}
    sampling = {"max_new_tokens": 24, "stop_ids": list(range(3, VOCABULARY, 8))}
    parts, prompts, ppo = job("llama", sampling=sampling, overrides=overrides, **{**fixed, **settings})
    samples = parts.sampler.draw(prompts.batch(prompts.take(0, 0, 16)), step=0)
    rollout = samples.rollout
    policies = {"policy": parts.policy, "value": parts.actor_critic.value_model, "reference": parts.reference.policy}
    trunks = {name: Trunk(policy) for name, policy in policies.items() if policy is not None}
    with Made() as made:
        scored = score(parts.actor_critic, parts.reference, *gather_scored(samples, share_of_threes), ppo)
        learn(parts.state, credit(scored, ppo, ppo.kl_coef)[0], ppo, seed=0)
    return {
        "calls": {name: trunk.calls for name, trunk in trunks.items()},
        "tokens": trunks["policy"].tokens,
        "real": int((rollout.prompt_mask_BP.sum(1) + rollout.lengths_B).sum()),
        "actions": int(rollout.lengths_B.sum()),
        "largest": made.largest,
        "head_rows": made.head_rows,
        "padded": len(rollout) * (rollout.prompt_width + rollout.response_width),
    }


def test_a_step_makes_one_forward_for_each_model_and_minibatch():
    """Scoring: policy, value, reference. Learning: 2 epochs of 2 minibatches, policy and value."""
    assert counted()["calls"] == {"policy": 1 + 4, "value": 1 + 4, "reference": 1}


def test_a_shared_trunk_runs_once_for_policy_and_value():
    assert counted(value="shared")["calls"] == {"policy": 1 + 4, "reference": 1}


def test_the_head_gets_the_rows_of_real_actions_and_no_others(monkeypatch):
    """Scoring: policy and reference, once each. Learning: 2 epochs, and what the backward pass computes again."""
    found = counted()
    assert found["head_rows"] == 2 * found["actions"] + 2 * found["actions"]  # one chunk: kept for the backward pass
    monkeypatch.setitem(chunked_head.CHUNK, "cpu", 16 * VOCABULARY)
    chunked = counted()
    assert 4 * chunked["actions"] < chunked["head_rows"] <= 6 * chunked["actions"]
    monkeypatch.setattr(chunked_head, "enabled", False)
    assert counted()["head_rows"] > 6 * found["actions"]


def test_no_tensor_of_a_step_is_larger_than_a_chunk_of_logits_or_the_heads_own_weight(monkeypatch):
    rows = 48
    monkeypatch.setitem(chunked_head.CHUNK, "cpu", rows * VOCABULARY)
    found = counted()
    assert found["largest"] <= rows * VOCABULARY and found["actions"] > 2 * rows
    monkeypatch.setattr(chunked_head, "enabled", False)
    assert counted()["largest"] > 2 * rows * VOCABULARY


def test_the_tokens_that_are_run_are_little_more_than_the_real_ones(monkeypatch):
    """Scoring and two epochs: three times every row. Beyond that only what padding is left after sorting and cutting."""
    small = {"micro_batch_tokens": None, "micro_batch_size": 2}
    found = counted(**small)
    assert found["real"] < 0.7 * found["padded"]
    assert found["tokens"] < 3 * 1.15 * found["real"]
    monkeypatch.setattr(logprobs, "aligned", False)
    assert counted(**{**small, "micro_batch_tokens": 0, "micro_batch_size": 8})["tokens"] > 3 * 1.2 * found["real"]


# -- on and off ----------------------------------------------------------------------------------------------------------


EPS = 1e-4
"""Adam's. Else it makes whole steps of roundings where the true gradient is zero (an attention key's bias)."""
RATE = 3e-3
GROW, FEW_ROWS = cache.grow, layout.for_few_rows


class Twin:
    """A job with every fast path on, or off."""

    def __init__(self, family: str, peft: Any, fast: bool, patch: pytest.MonkeyPatch, **settings: Any):
        self.fast, self.patch = fast, patch
        if not fast:
            settings = {name: value for name, value in settings.items() if name not in ("compile", "packing", "sampling")}
        fixed = {"rollouts_per_step": 8, "epochs": 1, "entropy_coef": 0.01, "learning_rate": RATE, "micro_batch_size": 3}
        fixed |= {"micro_batch_tokens": None if fast else 0}
        self.parts, self.prompts, self.ppo = job(family, peft, **{**fixed, **settings})
        self.optimizer = self.parts.state.optimizer
        for group in self.optimizer.param_groups:
            group["fused"], group["eps"] = fast, EPS
        self.gradients: list[list[Tensor]] = []
        self.optimizer.optimizer.register_step_pre_hook(
            lambda *_: self.gradients.append([p.grad.clone() for p in self.weights()])
        )

    def weights(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def become(self, other: Twin) -> None:
        self.parts.actor_critic.load_state_dict(other.parts.actor_critic.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
        for group in self.optimizer.param_groups:
            group["fused"] = self.fast

    def take(self, step: int) -> dict[str, list[Tensor]]:
        """What one PPO step makes, and the gradients of its first optimizer step."""
        self.patch.setattr(chunked_head, "enabled", self.fast)
        self.patch.setattr(logprobs, "aligned", self.fast)
        self.patch.setattr(cache, "grow", GROW if self.fast else lambda kwargs, columns: None)
        self.patch.setattr(layout, "for_few_rows", FEW_ROWS if self.fast else lambda model: contextlib.nullcontext())
        self.gradients.clear()
        samples = self.parts.sampler.draw(self.prompts.batch(self.prompts.take(0, 8 * step, 8)), step=step)
        gathered = gather_scored(samples, share_of_threes)
        scored = score(self.parts.actor_critic, self.parts.reference, *gathered, self.ppo)
        experience, _ = credit(scored, self.ppo, self.ppo.kl_coef)
        stats = learn(self.parts.state, experience, self.ppo, seed=0)
        assert stats.ratio_first_error < 1e-6
        self.parts.state.step += 1
        return {
            "ids": [samples.rollout.response_BR],
            "logprobs": [scored.old_logprobs_BR, scored.reference_logprobs_BR],
            "rewards": [experience.rewards_BR],
            "gradients": self.gradients[0],
            "weights": [p.detach().clone() for p in self.weights()],
        }


@pytest.mark.parametrize(
    "family, peft, settings",
    [
        ("llama", None, {}),
        ("gpt2", LORA, {"value": "shared"}),
        ("t5", None, {}),
        ("gemma2", None, {}),
        ("llama", None, {"compile": "on", "packing": True, "sampling": {"compile": True}}),
    ],
)
def test_ten_steps_with_every_fast_path_off_give_the_same_numbers(family, peft, settings, monkeypatch):
    """Every step begins with equal weights and moments: what ten steps of Adam make of a rounding is the processor's affair."""
    monkeypatch.setitem(chunked_head.CHUNK, "cpu", 7 * 64)  # several chunks, the last ones kept
    monkeypatch.setattr(loop, "_SETTLED", 1)  # layouts change at the second step already
    for each in (decoding_compiled, learning_compiled):
        monkeypatch.setattr(each, "BACKEND", "aot_eager")
    fast, plain = (Twin(family, peft, on, monkeypatch, **settings) for on in (True, False))
    bounds = {"ids": 0, "logprobs": 1e-5, "rewards": 1e-6, "gradients": 2e-6, "weights": 1e-5}
    # of float32's roundings; an optimizer step multiplies those of a gradient by RATE / EPS at most
    seen = []
    for step in range(10):
        plain.become(fast)
        ours, theirs = fast.take(step), plain.take(step)
        for name, bound in bounds.items():
            for a, b in zip(ours[name], theirs[name], strict=True):
                assert a.shape == b.shape and (a - b).abs().max() <= bound, (step, name)
        seen.append(ours["logprobs"][0][:, :1])
    assert (seen[0] - seen[9]).abs().max() > 1e-3
