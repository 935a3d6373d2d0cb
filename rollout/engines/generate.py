"""The reference path: plain `generate` with its own dictionaries of scores, stacked and read off by hand.

Slow and wide (two tensors of rows x tokens x vocabulary); kept as the definition that the streaming path is held to:
the same tokens for the same uniforms, and the same log-probs to 1e-6.
"""

from __future__ import annotations

from typing import Any

import torch
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.random import uniforms
from steerl.rollout.decoding.distribution import Distribution, History
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.decoding.weights import Space, Weights
from steerl.rollout.model.generation_config import ClosedGenerationConfig
from steerl.rollout.model.language_model import generate_arguments, no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import encoder_input
from steerl.rollout.types import STOP_LENGTH, STOP_USER, Rollout, left_pad
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


def reference_generate(policy: Policy, sampling: Sampling, batch: PromptBatch, *, step: int = 0) -> tuple[Rollout, Any]:
    """The rollout of `batch` in one generate call, and generate's own output beside it."""
    device = policy.device
    law, stops = Distribution(sampling, policy), Stops(sampling, policy)
    stops.to(device)
    pairs = [(i, j) for i in range(len(batch)) for j in range(sampling.n)]
    row_B = torch.tensor([batch.rows[i] for i, _ in pairs], device=device)
    sample_B = torch.tensor([j for _, j in pairs], device=device)
    prompt_BP, mask_BP = left_pad([batch.ids[i] for i, _ in pairs], policy.pad_id, device)
    before = [stops.before(batch.ids[i]) for i, _ in pairs]
    ids, mask = encoder_input(prompt_BP, mask_BP) if policy.is_seq2seq else (prompt_BP, mask_BP)
    capabilities, widths = policy.capabilities, {len(row) for row in batch.ids}
    if len(widths) > 1 and not (capabilities.padding and len({capabilities.is_long(length) for length in widths}) == 1):
        raise UserError(
            f"prompts: {type(policy.core).__name__} takes no padding; give the reference path prompts of one length"
        )
    start = torch.tensor(policy.start_ids, device=device)[None].expand(len(pairs), -1) if policy.is_seq2seq else prompt_BP
    real = torch.ones_like(start, dtype=torch.bool) if policy.is_seq2seq else mask_BP
    uniforms_BR = uniforms(sampling.seed, step, row_B, sample_B, torch.arange(sampling.max_new_tokens, device=device))
    config = ClosedGenerationConfig.of(
        policy.pad_id,
        policy.start_ids,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=not sampling.greedy,
        eos_token_id=stops.all_ids or None,
        use_cache=capabilities.caches((len(policy.start_ids) or max(widths)) + sampling.max_new_tokens),
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    with no_dropout(policy.core), torch.no_grad(), _Draws(uniforms_BR):
        output = policy.core.generate(
            **generate_arguments(policy, ids, mask, policy.capabilities.position_offset),
            generation_config=config,
            logits_processor=LogitsProcessorList([_LawProcessor(law, real)]),
            stopping_criteria=StoppingCriteriaList([_StopCriteria(stops, start.shape[1], before)] if stops.has_strings else []),
        )
    width = start.shape[1]
    assert torch.equal(output.sequences[:, :width], start)  # the structure is certain: start, then what was drawn
    response_BR = output.sequences[:, width:]
    policy_BR = _gathered(torch.stack(output.logits, dim=1), response_BR, sampling.policy_temperature)
    behaviour_BR = _gathered(torch.stack(output.scores, dim=1), response_BR, 1.0)
    ends = (_end(stops, row, said) for row, said in zip(response_BR.tolist(), before, strict=True))
    taken, reasons = zip(*ends, strict=True)
    lengths_B, stop_B = torch.tensor(taken, device=device), torch.tensor(reasons, device=device)
    mask_BR = torch.arange(response_BR.shape[1], device=device)[None] < lengths_B[:, None]
    rollout = Rollout(
        prompt_BP=prompt_BP,
        prompt_mask_BP=mask_BP,
        response_BR=response_BR.masked_fill(~mask_BR, 0),
        lengths_B=lengths_B,
        ended_B=stop_B != STOP_LENGTH,
        behaviour_logprobs_BR=(policy_BR if sampling.greedy else behaviour_BR).masked_fill(~mask_BR, 0),
        policy_logprobs_BR=policy_BR.masked_fill(~mask_BR, 0),
        row_B=row_B,
        sample_B=sample_B,
        stop_B=stop_B,
        temperature=sampling.policy_temperature,
        policy_step=step,
        start_ids=policy.start_ids,
        greedy=sampling.greedy,
    )
    return rollout, output


def _gathered(scores_BRV: Tensor, tokens_BR: Tensor, temperature: float) -> Tensor:
    """Log-probs of the tokens, in float64, a row at a time."""
    found = []
    for scores_RV, tokens_R in zip(scores_BRV, tokens_BR, strict=True):
        logprobs_RV = torch.log_softmax(scores_RV.double() / temperature, dim=-1)
        found.append(logprobs_RV.gather(-1, tokens_R[:, None])[:, 0].float())
    return torch.stack(found)


def _end(stops: Stops, ids: list[int], before: list[int]) -> tuple[int, int]:
    """(actions, reason) of a row: the first stop id or completed stop string."""
    codes = stops.by_id(torch.tensor(ids, device=stops.ids.device)).tolist()
    by_id = next((t + 1 for t, code in enumerate(codes) if code != STOP_LENGTH), None)
    by_string = stops.first(ids if by_id is None else ids[: by_id - 1], before)
    if by_string is not None:
        return by_string, STOP_USER
    return (len(ids), STOP_LENGTH) if by_id is None else (by_id, codes[by_id - 1])


class _LawProcessor(LogitsProcessor):
    """The behaviour's law as the one processor of generate."""

    def __init__(self, law: Distribution, real_BP: Tensor):
        self.law, self.real_BP = law, real_BP

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = torch.ones(
            len(input_ids), input_ids.shape[1] - self.real_BP.shape[1], dtype=torch.bool, device=input_ids.device
        )
        history = History(input_ids, torch.cat([self.real_BP, drawn], dim=1), self.law)
        return self.law.behaviour_scores(scores, history)


class _StopCriteria(StoppingCriteria):
    def __init__(self, stops: Stops, width: int, before: list[list[int]]):
        self.stops, self.width, self.before = stops, width, before

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = zip(input_ids[:, self.width :].tolist(), self.before, strict=True)
        hits = [self.stops.completes(ids, said) for ids, said in rows]
        return torch.tensor(hits, dtype=torch.bool, device=input_ids.device)


class _Draws(TorchFunctionMode):
    """While active, `torch.multinomial` is the row-keyed inverse-CDF draw: one column of the uniforms per call."""

    def __init__(self, uniforms_BR: Tensor):
        super().__init__()
        self.uniforms_BR, self.step = uniforms_BR, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.multinomial:
            return func(*args, **(kwargs or {}))
        uniform_B = self.uniforms_BR[:, self.step]
        self.step += 1
        return Weights(args[0].log(), Space()).draw(uniform_B)[:, None]
