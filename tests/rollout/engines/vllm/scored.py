"""What stands in for a server that scores rows."""

from __future__ import annotations

import copy

import torch

from steerl.rollout.engines.vllm.wire import Answer, Ask, Law
from steerl.rollout.model.policy import Policy


class Scorer:
    """One that holds a model: each row by itself, in float64."""

    def __init__(self, policy: Policy, version: int = 4):
        self.policy, self.version, self.asked = policy, version, 0

    def __call__(self, law: Law, prompts: list[list[int]], asks: list[Ask]) -> list[Answer]:
        self.asked = len(asks)
        return [self.answer(prompt, list(ask.forced)) for prompt, ask in zip(prompts, asks, strict=True)]

    def answer(self, prompt: list[int], forced: list[int]) -> Answer:
        model = copy.deepcopy(self.policy.model).double()
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([prompt + forced])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        numbers = logprobs_TV.gather(1, torch.tensor(forced)[:, None])[:, 0].tolist()
        return Answer(ids=forced, behaviour=numbers, policy=numbers, versions=(self.version, self.version))
