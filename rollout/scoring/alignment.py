"""The only place where logits and tokens are lined up: position P + t - 1 predicts response token t.

input          . . p p p r r         the sequence without its last column, which predicts nothing
logits               ^ ^ ^           the last R positions, each one's row of logits
response             r r e           what they predict

from_first     p p p r r . .         decoder-only models: the same rows, each from its first token on. Padding comes after
                   ^ ^ ^             what is read and needs no mask; P + t - 1 is then each row's own

packed         p p p r r p r r r p r    rows one after another in one row, positions from the start again in each: a model that
                   ^ ^ ^ ^ ^ ^ ^ ^ ^    keeps attention within them (capabilities.packing_problem) needs no padding at all

forward_inputs(policy, rollout)   what the model is given
predicting(states, first, width)  of logits or hidden states, those that predict the response
response_logits(policy, rollout)  both, for a plain pass
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.model.language_model import named, positions
from steerl.rollout.model.policy import Policy
from steerl.rollout.types import Rollout


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a pass are, that has rows one after another: N of them, out of the rows' W columns."""

    column_N: Tensor
    """Of each token, among the columns of all rows."""
    place_BW: Tensor
    """Of each column, among the tokens; 0 where it holds none."""

    @staticmethod
    def of(rollout: Rollout) -> Packing:
        mask_BW = torch.cat([rollout.prompt_mask_BP, rollout.extent_BR[:, 1:]], dim=1)  # a row's last token predicts nothing
        column_N = mask_BW.flatten().nonzero()[:, 0]
        place_BW = torch.zeros(mask_BW.shape, dtype=torch.int64, device=mask_BW.device)
        place_BW.view(-1)[column_N] = torch.arange(len(column_N), device=mask_BW.device)
        return Packing(column_N, place_BW)

    def unpacked(self, states_1NX: Tensor) -> Tensor:
        """(B, W, X): as rows of their own. What stands at padding means nothing."""
        return states_1NX.flatten(0, -2)[self.place_BW.to(states_1NX.device)]

    def packed(self, states_BWX: Tensor) -> Tensor:
        """(1, N, X)."""
        return states_BWX.flatten(0, 1)[self.column_N.to(states_BWX.device)][None]


def response_logits(policy: Policy, rollout: Rollout) -> Tensor:
    """(B, R, V): the logits that predict the response, of one plain pass."""
    return predicting(policy.core(**forward_inputs(policy, rollout)).logits, None, rollout.response_width)


def first_predicting(rollout: Rollout) -> Tensor:
    """(B,): the column that predicts each row's first response token, where rows begin at column 0."""
    return rollout.prompt_mask_BP.sum(1) - 1


def predicting(states_BTX: Tensor, first_B: Tensor | None, width: int) -> Tensor:
    """(B, R, X): the states that predict the response. `first_B`: each row's first such column (the place of it, where rows are
    packed into one); None = the last R of all."""
    if first_B is None:
        return states_BTX[:, -width:]
    return states_BTX.flatten(0, 1)[predicting_places(states_BTX, first_B, width)]


def predicting_places(states_BTX: Tensor, first_B: Tensor | None, width: int) -> Tensor:
    """(B, R): the same as places in the states of all rows one after another."""
    rows, total = states_BTX.shape[:2]
    device = states_BTX.device
    if first_B is None:
        first_B = torch.full((rows,), total - width, device=device)
    column_BR = first_B.to(device)[:, None] + torch.arange(width, device=device)[None]
    return torch.arange(rows, device=device)[:, None] * total + column_BR.clamp(max=total - 1)


def forward_inputs(
    policy: Policy, rollout: Rollout, from_first: bool = False, packing: Packing | None = None
) -> dict[str, Any]:
    """The forward's arguments for the whole sequence but its last column; `from_first`: each row from its first token on."""
    response_BR, offset = rollout.response_BR[:, :-1], 0 if policy.is_seq2seq else policy.capabilities.position_offset
    if policy.is_seq2seq:
        ids_BP, mask_BP = encoder_input(rollout.prompt_BP, rollout.prompt_mask_BP)
        decoder_ids = torch.cat([rollout.start_BK, response_BR], dim=1)
        inputs: dict[str, Tensor | None] = {
            "input_ids": ids_BP,
            "attention_mask": mask_BP.long(),
            "decoder_input_ids": decoder_ids,
        }
    elif packing is not None:
        ids_BW = torch.cat([rollout.prompt_BP, response_BR], dim=1)
        mask_BW = torch.cat([rollout.prompt_mask_BP, torch.ones_like(response_BR, dtype=torch.bool)], dim=1)
        packed = (value_BW.flatten()[packing.column_N][None] for value_BW in (ids_BW, positions(mask_BW, offset)))
        return named(policy, **dict(zip(("input_ids", "position_ids"), packed, strict=True)), use_cache=False)
    elif from_first:
        ids_BS = _without_padding(rollout)
        position_S = torch.arange(ids_BS.shape[1], device=ids_BS.device) + offset
        position_1S = _within_context(policy, rollout, position_S)[None]
        return named(policy, input_ids=ids_BS, position_ids=position_1S, use_cache=False)
    else:
        # Tokens after a row's end change nothing before them, so only padding on the left needs the mask.
        mask_BS = torch.cat([rollout.prompt_mask_BP, torch.ones_like(response_BR, dtype=torch.bool)], dim=1)
        inputs = {
            "input_ids": torch.cat([rollout.prompt_BP, response_BR], dim=1),
            "attention_mask": None if bool(mask_BS.all()) else mask_BS.long(),
            "position_ids": _within_context(policy, rollout, positions(mask_BS, offset)),
        }
    return named(policy, **inputs, logits_to_keep=rollout.response_width, use_cache=False)


def encoder_input(prompt_BP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded prompts as an encoder reads them: real tokens first, so that every position is what it is alone."""
    order = (~mask_BP).to(torch.int8).argsort(dim=1, stable=True)
    return prompt_BP.gather(1, order), mask_BP.gather(1, order)


def _within_context(policy: Policy, rollout: Rollout, position: Tensor) -> Tensor:
    """No position past the context, nor past the longest row's where that has a say: only columns beyond a row's end are."""
    if policy.capabilities.boundary is not None:
        longest = int((rollout.prompt_mask_BP.sum(1) + rollout.lengths_B).max()) - 1
        position = position.clamp(max=policy.capabilities.position_offset + max(longest, 1) - 1)
    return position if policy.context is None else position.clamp(max=policy.context - 1)


def _without_padding(rollout: Rollout) -> Tensor:
    """Prompts and responses without the padding before them, as wide as the longest row needs."""
    ids_BS = torch.cat([rollout.prompt_BP, rollout.response_BR[:, :-1]], dim=1)
    real_B = rollout.prompt_mask_BP.sum(1)
    width = max(int((real_B + rollout.lengths_B).max()) - 1, 1)
    column_BS = torch.arange(width, device=ids_BS.device)[None] + (rollout.prompt_width - real_B)[:, None]
    return ids_BS.gather(1, column_BS.clamp(max=ids_BS.shape[1] - 1))
