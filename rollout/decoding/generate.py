"""Plain `generate`, its dictionary of scores and logits stacked, prompt and response taken apart by hand.

    generate(logits_processor=[the behaviour's distribution], return_dict_in_generate, output_scores, output_logits)
        sequences  . . p p p r r e     from the start's width on ── response_BR ── where a stop ends it ── lengths_B
        scores     (rows, steps, V)    what tokens were drawn from ── log-softmax ── behaviour
        logits     (rows, steps, V)    raw, divided by temperature ── log-softmax ── policy, entropy
                                       where scores are finite alone, with sampling.replay_mask

Slow and wide (two tensors of rows x tokens x vocabulary). It is the definition that the decode loop is held to: the same
tokens, because both draw them with the same numbers, and the same log-probs to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from steerl.rollout.decoding.distribution import Distribution, History
from steerl.rollout.decoding.loop import DecodeInputs, Responses, no_distribution
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.decoding.weights import Space, Weights
from steerl.rollout.model.generation_config import ClosedGenerationConfig
from steerl.rollout.model.language_model import generate_arguments
from steerl.rollout.model.policy import Policy
from steerl.rollout.ragged import Kept, listed
from steerl.rollout.types import STOP_LENGTH, STOP_USER


def plain_generate(
    policy: Policy,
    distribution: Distribution,
    stops: Stops,
    inputs: DecodeInputs,
    prompt_BP: Tensor,
    mask_BP: Tensor,
    *,
    caching: bool,
) -> Responses:
    """The responses to these prompts, padded as generate takes them."""
    sampling, width = distribution.sampling, inputs.real_BL.shape[1]
    config = ClosedGenerationConfig.of(
        policy.pad_id,
        policy.start_ids,
        max_new_tokens=inputs.uniforms_BR.shape[1],
        do_sample=not sampling.greedy,
        eos_token_id=stops.all_ids or None,
        use_cache=caching,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    criteria = [_StopStrings(stops, width, inputs.before)] if stops.has_strings else []
    with _KeyedDraws(inputs.uniforms_BR):
        output = policy.core.generate(
            **generate_arguments(policy, prompt_BP, mask_BP, policy.capabilities.position_offset),
            generation_config=config,
            logits_processor=LogitsProcessorList([_Behaviour(distribution, inputs.real_BL)]),
            stopping_criteria=StoppingCriteriaList(criteria),
        )
    response_BR = output.sequences[:, width:]
    scores_BRV, logits_BRV = torch.stack(output.scores, dim=1), torch.stack(output.logits, dim=1)
    ends = (_end(stops, ids, before) for ids, before in zip(response_BR.tolist(), inputs.before, strict=True))
    lengths_B, stop_B = torch.tensor(list(ends), device=response_BR.device).unbind(1)
    beyond_BR = torch.arange(response_BR.shape[1], device=response_BR.device)[None] >= lengths_B[:, None]
    bad_BR = ~(scores_BRV.amax(-1).isfinite() & logits_BRV.amax(-1).isfinite()) & ~beyond_BR
    if bool(bad_BR.any()):
        t, row = bad_BR.T.nonzero()[0].tolist()
        raise no_distribution(inputs.names[row], t)
    kept = None
    if sampling.replays_mask:
        kept_BRV = scores_BRV.isfinite() & ~beyond_BR[..., None]
        ids, counts_N = listed(kept_BRV.flatten(0, 1))
        kept = Kept(ids, counts_N.view(beyond_BR.shape))
        logits_BRV = logits_BRV.masked_fill(~kept_BRV, float("-inf"))
    policy_BR, entropy_BR = _logprobs(logits_BRV, response_BR, sampling.policy_temperature)
    behaviour_BR = policy_BR if sampling.greedy else _logprobs(scores_BRV, response_BR, 1.0)[0]
    return Responses(
        response_BR=response_BR.masked_fill(beyond_BR, 0),
        lengths_B=lengths_B,
        ended_B=stop_B != STOP_LENGTH,
        stop_B=stop_B,
        behaviour_logprobs_BR=behaviour_BR.masked_fill(beyond_BR, 0),
        policy_logprobs_BR=policy_BR.masked_fill(beyond_BR, 0),
        entropy_BR=entropy_BR.masked_fill(beyond_BR, 0),
        kept=kept,
    )


def _logprobs(scores_BRV: Tensor, tokens_BR: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens and entropies, in float64, a row at a time."""
    logprobs, entropies = [], []
    for scores_RV, tokens_R in zip(scores_BRV, tokens_BR, strict=True):
        logprobs_RV = torch.log_softmax(scores_RV.double() / temperature, dim=-1)
        logprobs.append(logprobs_RV.gather(-1, tokens_R[:, None])[:, 0])
        entropies.append(torch.special.entr(logprobs_RV.exp()).sum(-1))
    return torch.stack(logprobs).float(), torch.stack(entropies).float()


def _end(stops: Stops, ids: list[int], before: list[int]) -> tuple[int, int]:
    """(actions, reason) of a row: the first stop id or completed stop string."""
    codes = stops.by_id(torch.tensor(ids, device=stops.ids.device)).tolist()
    by_id = next((t + 1 for t, code in enumerate(codes) if code != STOP_LENGTH), None)
    by_string = stops.first(ids if by_id is None else ids[: by_id - 1], before)
    if by_string is not None:
        return by_string, STOP_USER
    return (len(ids), STOP_LENGTH) if by_id is None else (by_id, codes[by_id - 1])


class _Behaviour(LogitsProcessor):
    """What tokens are drawn from, as the one processor of generate."""

    def __init__(self, distribution: Distribution, real_BL: Tensor):
        self.distribution, self.real_BL = distribution, real_BL

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = input_ids.shape[1] - self.real_BL.shape[1]
        real_BL = torch.nn.functional.pad(self.real_BL, (0, drawn), value=True)
        return self.distribution.behaviour_scores(scores, History(input_ids, real_BL, self.distribution))


class _StopStrings(StoppingCriteria):
    def __init__(self, stops: Stops, width: int, before: list[list[int]]):
        self.stops, self.width, self.before = stops, width, before

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = zip(input_ids[:, self.width :].tolist(), self.before, strict=True)
        hits = [self.stops.completes(ids, before) for ids, before in rows]
        return torch.tensor(hits, dtype=torch.bool, device=input_ids.device)


class _KeyedDraws(TorchFunctionMode):
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
