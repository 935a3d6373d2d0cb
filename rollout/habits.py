"""How a model takes padding and caching: seen on the model itself with a few short forward passes, not read off its name.

    alone       a b c d e            logits of the last two tokens
    padded      . . a b c d e        the same, or this model must not be left-padded (states that run through padding,
                                     positions it counts by itself): rows of one length are then batched together
    later       a b c X e            the same before X, or the model looks ahead and has no law of the next token
    cached      a b c | d | e        the same, or its cache is not used
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.errors import Problem

if TYPE_CHECKING:
    from rollout.policy import Policy


@dataclass(frozen=True)
class Habits:
    """What holds for this model."""

    padding: bool
    """Padded rows (left for decoder-only models, right for encoders) equal lone ones."""
    caching: bool
    """Decoding with the cache equals one pass over the whole sequence."""


def forward_arguments(core: Any) -> frozenset[str]:
    """Names that the model's forward takes."""
    return frozenset(inspect.signature(core.forward).parameters)


def positions(mask: Tensor) -> Tensor:
    """Position of every token, counting real ones only; padding on the left gets 0."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def observe(policy: Policy) -> Habits:
    """Run the passes of this file's head on `policy`'s model. Call without dropout and without gradients."""
    real, pads = 5, 3
    limits = [limit for limit in (policy.context, policy.decoder_context) if limit is not None]
    if limits:
        real = max(min(real, min(limits) - len(policy.start_ids) - 1), 1)
        pads = max(min(pads, min(limits) - real), 0)
    ids = [i for i in range(policy.vocab_size) if i not in (policy.pad_id, *policy.eos_ids)] or [0]
    row = torch.tensor([[ids[(7 * k + 3) % len(ids)] for k in range(real)]], device=policy.device)
    alone = _logits(policy, row, torch.ones_like(row, dtype=torch.bool))
    tolerance = max(100 * torch.finfo(alone.dtype).eps if alone.dtype == torch.float32 else 10 * torch.finfo(alone.dtype).eps, 2e-5)

    def same(logits: Tensor, expected: Tensor) -> bool:
        logits, expected = logits.float(), expected.float()
        finite = expected.isfinite()
        if not bool(torch.equal(finite, logits.isfinite())) or not bool(finite.any()):
            return bool(torch.equal(finite, logits.isfinite()))
        scale = expected[finite].std(correction=0) + 1e-3 * expected[finite].abs().mean() + 1e-12
        return bool((logits[finite] - expected[finite]).pow(2).mean().sqrt() <= tolerance * scale)

    padding = True
    if pads:
        fill = torch.full_like(row[:, :1], policy.pad_id).expand(-1, pads)
        sides = [row, fill] if policy.is_seq2seq else [fill, row]
        mask = torch.cat([torch.full_like(side, side is row, dtype=torch.bool) for side in sides], dim=1)
        padding = same(_logits(policy, torch.cat(sides, dim=1), mask)[:, -2:], alone[:, -2:])
    if not policy.is_seq2seq and real > 2:
        changed = row.clone()
        changed[:, -1] = ids[(7 * real + 11) % len(ids)]
        if not same(_logits(policy, changed, torch.ones_like(row, dtype=torch.bool))[:, :-1], alone[:, :-1]):
            raise Problem(
                f"model: {type(policy.core).__name__} looks ahead: a later token changes the logits before it, so it is no "
                "causal language model; load a decoder (for BERT-like models, a checkpoint with is_decoder: true)"
            )
    return Habits(padding=padding, caching=_caches(policy, row, alone, same))


def _caches(policy: Policy, row: Tensor, alone: Tensor, same: Any) -> bool:
    """Whether decoding step by step with the cache gives the same logits as one pass over the whole."""
    steps = 2
    if not policy.is_seq2seq and row.shape[1] <= steps:
        return True
    core = policy.core
    if "use_cache" not in forward_arguments(core) and "past_key_values" not in forward_arguments(core):
        return False
    seen: list[Tensor] = []

    def follow(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any) -> None:
        del logits_processor, stopping_criteria, generation_config
        ids = input_ids
        for step in range(steps + 1):
            first = {"is_first_iteration": True} if step == 0 else {"next_sequence_length": 1}
            outputs = model(**model.prepare_inputs_for_generation(ids, **first, **kwargs), return_dict=True)
            kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=policy.is_seq2seq)
            seen.append(outputs.logits[:, -1:])
            ids = torch.cat([ids, tail[:, step : step + 1]], dim=1)

    from rollout.sampling import ClosedGenerationConfig

    if policy.is_seq2seq:
        prompt, tail = row, row[:, : steps + 1]
    else:
        prompt, tail = row[:, :-steps], torch.cat([row[:, -steps:], row[:, :1]], dim=1)
    inputs = generate_arguments(policy, prompt, torch.ones_like(prompt, dtype=torch.bool))
    config = ClosedGenerationConfig.of(policy, max_new_tokens=steps + 1, use_cache=True)
    core.generate(**inputs, generation_config=config, custom_generate=follow)
    if policy.is_seq2seq:
        full = torch.cat([torch.tensor([policy.start_ids], device=row.device), tail[:, :steps]], dim=1)
        alone = core(input_ids=row, attention_mask=torch.ones_like(row), decoder_input_ids=full, use_cache=False).logits
    return same(torch.cat(seen, dim=1), alone[:, -steps - 1 :])


def generate_arguments(policy: Policy, prompt_BP: Tensor, mask_BP: Tensor) -> dict[str, Any]:
    """What generate is given besides its config: ids and explicit mask and positions, by the names that the model takes."""
    takes = forward_arguments(policy.core)
    given: dict[str, Any] = {"input_ids": prompt_BP, **policy.extra}
    if "attention_mask" in takes:
        given["attention_mask"] = mask_BP.long()
    if policy.is_seq2seq:
        start = torch.tensor(policy.start_ids, device=prompt_BP.device)
        given["decoder_input_ids"] = start[None].expand(len(prompt_BP), -1)
    elif "position_ids" in takes:
        given["position_ids"] = positions(mask_BP)
    return given


def _logits(policy: Policy, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits of one plain pass: of `ids`, or of a decoder that starts from them."""
    takes = forward_arguments(policy.core)
    given: dict[str, Any] = {"input_ids": ids, **policy.extra}
    if "attention_mask" in takes:
        given["attention_mask"] = mask.long()
    if policy.is_seq2seq:
        given["decoder_input_ids"] = torch.tensor([[*policy.start_ids, *ids[0, :2].tolist()]], device=ids.device)
    elif "position_ids" in takes:
        given["position_ids"] = positions(mask)
    if "use_cache" in takes:
        given["use_cache"] = False
    return policy.core(**given).logits
