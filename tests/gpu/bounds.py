"""Models of the size that these tests take, and log-probs by a definition of its own: a row alone, in float32, on the CPU.

How far half precision may be off: bfloat16 keeps 8 bits, so every activation is off by up to 2^-9 of itself. Through two
blocks and a head, whose logits are sums of some hundred products and of size 1 to 5, a log-prob is off by some 0.01 to 0.03,
and the worst of a few hundred by three times that. A wrong position, a leaking pad or a forgotten vector moves log-probs by 0.3
and more at these weights (`test_a_wrong_position_would_be_seen`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Rollout
from tests.models import tiny, tiny_tokenizer

MEAN, WORST = 0.03, 0.25
"""Of bfloat16 log-probs, in nats."""
FLOAT32 = 1e-4
"""Of float32 ones: sums in another order, and no TensorFloat-32 (torch's default)."""
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16, 17], [21, 22, 23, 24, 25]]
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Heads 32 wide: what attention kernels take."""


def policy_on(device: torch.device, dtype: torch.dtype, family: str = "llama", **overrides: Any) -> Policy:
    model = tiny(family, scale=0.1, **{**WIDE, **overrides}).to(device, dtype)
    return Policy.of(model, tiny_tokenizer(model.config.vocab_size))


def batch() -> PromptBatch:
    return PromptBatch.of_ids(PROMPTS, rows=list(range(len(PROMPTS))))


def exact(policy: Policy) -> torch.nn.Module:
    """The same numbers as weights, in float32 on the CPU, with attention written out."""
    model = copy.deepcopy(policy.model).to("cpu", torch.float32)
    model.set_attn_implementation("eager")
    return model.eval()


def alone(model: torch.nn.Module, rollout: Rollout, i: int) -> torch.Tensor:
    """Log-probs of row i's tokens: one row, unpadded, no cache."""
    prompt = rollout.prompt_BP[i][rollout.prompt_mask_BP[i]].cpu()
    response = rollout.response_BR[i, : int(rollout.lengths_B[i])].cpu()
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
    law = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
    return law.gather(1, response[:, None])[:, 0]


def off(policy: Policy, rollout: Rollout, logprobs_BR: torch.Tensor) -> torch.Tensor:
    """|given - exact| of every action."""
    model, logprobs_BR = exact(policy), logprobs_BR.detach()
    rows = [
        (logprobs_BR[i, : int(rollout.lengths_B[i])].double().cpu() - alone(model, rollout, i)).abs()
        for i in range(len(rollout))
    ]
    return torch.cat(rows)
