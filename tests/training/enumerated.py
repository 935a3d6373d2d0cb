"""A policy of eight tokens whose every response under top-k and top-p is drawn, and what one update makes of all of them.

    python tests/training/enumerated.py FILE      by test_replay_mask.py in two ranks: the gradients, written to FILE

Each response counts its probability under the law that is drawn from, so that the update's loss is an expectation and not a
mean over draws: its gradient is then exact. `expected` is it by enumeration in float64, from logits alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steerl.reward.types import Scores
from steerl.rollout.common import processes
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Rollout
from steerl.training.algorithm.update import update
from steerl.training.settings import PPOSettings
from steerl.training.setup import Components, prepare
from steerl.training.types import Experience
from tests.models import tiny_policy
from tests.rollout import definitions

PROMPT = [5, 4]
SAMPLING = Sampling(max_new_tokens=3, n=4000, batch_size=4000, temperature=1.3, top_k=4, top_p=0.85)
PPO = PPOSettings(rollouts_per_step=4000, micro_batch_size=4, max_grad_norm=0.0, credit="rloo", clip=0.9, kl_coef=0.0)
STOP = 2


def score(response: list[int]) -> float:
    """Any number for a response."""
    return sum((t + 1) * (token % 3 - 0.7) for t, token in enumerate(response))


class Enumerated:
    """All responses, their probabilities, and the experience of them."""

    def __init__(self) -> None:
        self.parts: Components = prepare(
            tiny_policy("gpt2", vocab_size=8),
            lambda rollout, texts: Scores(torch.zeros(len(rollout))),
            SAMPLING,
            PPO,
            RunSettings(),
        )
        policy = self.parts.policy
        self.old = copy.deepcopy(policy.model).double()
        drawn = self.parts.sampler.draw(PromptBatch.of_ids([PROMPT])).rollout
        first: dict[tuple[int, ...], int] = {}
        for row in range(len(drawn)):
            first.setdefault(tuple(definitions.real_response(drawn, row)), row)
        self.rollout: Rollout = drawn.select(list(first.values()))
        self.responses = [list(response) for response in first]
        self.probabilities = [float(self.logprobs(self.old, response).detach().sum().exp()) for response in self.responses]

    def logprobs(self, model: Any, response: list[int]) -> Tensor:
        """Of a response's tokens, differentiable: a model's own logits over what the old policy let through."""
        logits_TV = model(torch.tensor([[*PROMPT, *response]])).logits[0, len(PROMPT) - 1 : -1].double() / SAMPLING.temperature
        sets = [self.drawable(response[:t]) for t in range(len(response))]
        return torch.stack([logits_TV[t, i] - logits_TV[t, sets[t]].logsumexp(0) for t, i in enumerate(response)])

    def drawable(self, before: list[int]) -> list[int]:
        with torch.no_grad():
            logits_V = self.old(torch.tensor([[*PROMPT, *before]])).logits[0, -1].tolist()
        return definitions.kept(logits_V, [], SAMPLING)

    def all_responses(self, before: list[int] | None = None) -> list[list[int]]:
        before = before or []
        if len(before) == SAMPLING.max_new_tokens or STOP in before:
            return [before]
        return [one for token in self.drawable(before) for one in self.all_responses([*before, token])]

    def experience(self) -> Experience:
        rollout = self.rollout.trim()
        tokens = int(rollout.action_mask_BR.sum())
        zeros_BR = torch.zeros_like(rollout.policy_logprobs_BR)
        scores_B1 = torch.tensor([[score(response)] for response in self.responses])
        weight_B1 = torch.tensor(self.probabilities)[:, None] * tokens  # the loss is a mean over tokens
        return Experience(
            rollout=rollout,
            old_logprobs_BR=rollout.behaviour_logprobs_BR,  # what was drawn from, by the sampler
            reference_logprobs_BR=None,
            values_BR=zeros_BR,
            rewards_BR=zeros_BR,
            advantages_BR=zeros_BR + scores_B1,
            returns_BR=zeros_BR,
            importance_BR=(zeros_BR + weight_B1).float(),
        )

    def gradients(self) -> dict[str, Tensor]:
        """What the optimizer would have stepped with."""
        caught: dict[str, Tensor] = {}
        model, optimizer = self.parts.actor_critic, self.parts.state.optimizer

        def step() -> None:
            caught.update({n: p.grad.clone() for n, p in model.actor.named_parameters() if p.grad is not None})

        real, optimizer.step = optimizer.step, step
        update(self.parts.state, self.experience(), list(range(len(self.responses))), PPO)
        optimizer.step = real
        return caught

    def expected(self) -> dict[str, Tensor]:
        """Minus the gradient of the expected score: of the sum over responses of probability x score."""
        return self._gradient(lambda new_T, old_T: new_T.sum().exp())

    def expected_of_ratios(self) -> dict[str, Tensor]:
        """The same where the weights are others than those that sampled: of the old probability x sum of ratios x score."""
        return self._gradient(lambda new_T, old_T: old_T.sum().exp() * (new_T - old_T).exp().sum())

    def _gradient(self, weight: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        model, total = copy.deepcopy(self.parts.policy.model).double(), torch.zeros((), dtype=torch.float64)
        for response in self.all_responses():
            total = total - score(response) * weight(self.logprobs(model, response), self.logprobs(self.old, response).detach())
        named = dict(model.named_parameters())
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(named, found, strict=True))


if __name__ == "__main__":
    processes.start()
    found = Enumerated().gradients()
    if processes.start().rank == 0:
        torch.save(found, sys.argv[1])
    if processes.close():
        processes.end()
