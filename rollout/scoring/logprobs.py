"""Log-probs, entropies and hidden states of given responses, in one teacher-forced pass.

    rollout ── forward_inputs (alignment.py) ── model ──┬─ its head in chunks (chunked_head.py): log-prob and entropy
                                                        └─ or all logits at once, where somebody is to see them

Everything is raised to float32 before the temperature and the log-softmax, which is over the ids that could be drawn where the
rollout has kept them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.model import compat, virtual_tokens
from steerl.rollout.model.hooks import is_steerable
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.ragged import Kept
from steerl.rollout.scoring.alignment import Packing, first_predicting, forward_inputs, predicting
from steerl.rollout.scoring.chunked_head import HeadPass, readable, swapped_in
from steerl.rollout.scoring.steered import Steers, steered
from steerl.rollout.types import Rollout

aligned = True
"""False keeps the padding on the left in every pass: more columns, a mask, the same numbers."""


@dataclass(frozen=True)
class TeacherForced:
    """What one teacher-forced pass says of every action; masked entries hold 0."""

    logprobs_BR: Tensor
    entropy_BR: Tensor
    hidden_BRD: Tensor | None = None
    """The head's input at the positions that predict the response: what V(s_t) reads."""
    all_logprobs_BRV: Tensor | None = None
    """Log-probs of every token of the vocabulary, where they were asked for."""
    likeliest_BR: Tensor | None = None
    """Whether each action is the likeliest token, where that was asked for; False where masked."""


@dataclass(frozen=True)
class _Wanted:
    """What a pass is to give, and how it is laid out."""

    temperature: float
    hidden: bool
    entropy: bool
    logprobs: bool
    all: bool
    likeliest: bool
    from_first: bool
    """Each row begins at column 0, with its first token."""


def token_logprobs(logits_BRV: Tensor, tokens_BR: Tensor, temperature: float = 1.0, kept: Kept | None = None) -> Tensor:
    """Log-probs of the tokens under softmax(logits / temperature), over what is kept where that is given."""
    return _of_tokens(_logprobs(logits_BRV, temperature, kept), tokens_BR)


def entropy(logits_BRV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), in nats."""
    return _entropy(_logprobs(logits_BRV, temperature))


def _logprobs(logits_BRV: Tensor, temperature: float, kept: Kept | None = None) -> Tensor:
    scores = logits_BRV.float()
    if kept is not None:
        place_N = torch.arange(kept.counts_BR.numel(), device=scores.device)
        scores = scores.masked_fill(~kept.mask(place_N, scores.shape[-1]).view(scores.shape), float("-inf"))
    return torch.log_softmax(scores if temperature == 1 else scores / temperature, dim=-1)


def _of_tokens(logprobs_BRV: Tensor, tokens_BR: Tensor) -> Tensor:
    return logprobs_BRV.gather(-1, tokens_BR[..., None])[..., 0]


def _entropy(logprobs_BRV: Tensor) -> Tensor:
    # Tokens of probability 0 add nothing; their log-prob of -inf must not meet their 0.
    return -(logprobs_BRV.exp() * logprobs_BRV.masked_fill(logprobs_BRV == float("-inf"), 0.0)).sum(-1)


def teacher_forced(
    policy: Policy,
    rollout: Rollout,
    *,
    temperature: float | None = None,
    want_hidden: bool = False,
    want_entropy: bool = True,
    want_logprobs: bool = True,
    want_all: bool = False,
    want_likeliest: bool = False,
    max_rows: int | None = None,
    steering: Steers | None = None,
    packed: bool = False,
) -> TeacherForced:
    """Score a rollout's responses in one forward pass, without dropout; gradients as the caller has them.

    `want_logprobs` False leaves the logits alone: a value's trunk has hidden states and no vocabulary; `want_all` keeps the
    log-probs of all tokens, -inf for those that the rollout's `kept` leaves out; `want_likeliest`, without gradients, takes the
    place of the entropy. `max_rows` splits the pass by rows. A model
    that cannot be left-padded gets rows of one prompt length at a time, and as many passes as on the rank that has most, where
    each is a collective call.
    `steering` steers each of those passes; without it an `active` block around the call does, where there is one pass.
    `packed` lays the rows of a pass one after another without padding, where nothing says that the model cannot take it so
    (packing_problem).
    """
    if not len(rollout) or not rollout.response_width:
        return TeacherForced(rollout.policy_logprobs_BR, rollout.policy_logprobs_BR)
    assert not (want_likeliest and want_entropy), "one second number for each action"
    with no_dropout(policy.core):
        # The caller's columns stay where they can: a steering block around this call knows rows and columns by them.
        wanted = _Wanted(
            rollout.temperature if temperature is None else temperature,
            want_hidden,
            want_entropy,
            want_logprobs,
            want_all,
            want_likeliest,
            from_first=not packed and steering is None and not want_all and may_begin_at_first(policy, want_logprobs),
        )
        padded = packed or wanted.from_first or bool(rollout.prompt_mask_BP.all()) or policy.capabilities.padding
        groups = list(row_groups(policy, rollout, padded, max_rows))
        own = len(groups)
        if (not policy.capabilities.padding or policy.capabilities.boundary is not None) and needs_sync(policy.model):
            groups += [groups[-1]] * (processes.most(own) - own)
        results = []
        for index in groups:
            whole = len(index) == len(rollout) and len(groups) == 1
            part = rollout if whole and (policy.is_seq2seq or padded) else narrowed(rollout.select(index))
            packing = Packing.of(part) if packed else None
            with steered(steering, policy, part, packing):
                results.append(_one_pass(policy, part, wanted, packing))
            if whole:
                return results[0]
    back = torch.cat(groups[:own]).argsort()

    def joined(name: str) -> Tensor:
        values = [getattr(result, name) for result in results]
        # What only kept this rank in step takes part in the backward pass, too: it adds zeros.
        idle = [0.0 * value.sum() for value in values[own:]]
        return torch.cat(values[:own])[back] + (sum(idle) if idle else 0.0)

    return TeacherForced(
        joined("logprobs_BR"),
        joined("entropy_BR"),
        joined("hidden_BRD") if want_hidden else None,
        joined("all_logprobs_BRV") if want_all else None,
        joined("likeliest_BR").bool() if want_likeliest else None,
    )


def row_groups(policy: Policy, rollout: Rollout, padded: bool, max_rows: int | None) -> Iterator[Tensor]:
    """Rows that go through one pass together: all, but for one prompt length where the model takes no padding, and for one
    side of the length at which its distribution changes."""
    rows = torch.arange(len(rollout), device=rollout.device)
    if padded and policy.capabilities.boundary is None:
        yield from rows.split(max_rows or len(rows))
        return
    lengths_B = rollout.prompt_mask_BP.sum(1)
    kind_B = torch.zeros_like(lengths_B) if padded else 2 * lengths_B
    if policy.capabilities.boundary is not None:
        kind_B = kind_B + (lengths_B + rollout.lengths_B - 1 > policy.capabilities.boundary)
    for kind in kind_B.unique():
        group = rows[kind_B == kind]
        yield from group.split(max_rows or len(group))


def narrowed(rollout: Rollout) -> Rollout:
    """Without the columns on the left in which every row has padding."""
    empty = int((~rollout.prompt_mask_BP).sum(1).min())
    return dataclasses.replace(
        rollout, prompt_BP=rollout.prompt_BP[:, empty:], prompt_mask_BP=rollout.prompt_mask_BP[:, empty:]
    )


def may_begin_at_first(policy: Policy, want_logprobs: bool) -> bool:
    """Whether rows may begin at column 0: not where virtual tokens are placed by the caller's columns, nor where the model is
    to give its last logits as it does; nor where a steering knows rows by their columns, or is compared with when at rest."""
    free = aligned and not policy.is_seq2seq and not is_steerable(policy.core) and not virtual_tokens.count(policy.model)
    return free and (not want_logprobs or readable(policy) is not None)


def _one_pass(policy: Policy, rollout: Rollout, wanted: _Wanted, packing: Packing | None) -> TeacherForced:
    first_B = first_predicting(rollout) if wanted.from_first else None
    if packing is not None:
        first_B = packing.place_BW[:, rollout.prompt_width - 1]
    given = forward_inputs(policy, rollout, wanted.from_first, packing)
    postprocessing = readable(policy) if wanted.logprobs and not wanted.all else None
    if postprocessing is None:
        return _all_at_once(policy, rollout, given, first_B, wanted)
    head_pass = HeadPass(policy.core, postprocessing, rollout, first_B, wanted.temperature, wanted.entropy, wanted.likeliest)
    with swapped_in(head_pass):
        output = _forward(policy, given)
    numbers_BR2, hidden_BTD = head_pass.numbers_BR2, head_pass.hidden_BTD
    if numbers_BR2 is None or hidden_BTD is None:
        raise RuntimeError(f"{type(policy.core).__name__} calls its output embedding otherwise than when it was observed")
    # The head's own output where the model passes it on: engines follow the graph through it.
    numbers_BR2 = (output if output.shape == numbers_BR2.shape else numbers_BR2).to(rollout.device)
    hidden_BRD = predicting(hidden_BTD, first_B, rollout.response_width) if wanted.hidden else None
    logprobs_BR, second_BR = numbers_BR2.unbind(-1)
    if wanted.likeliest:
        return TeacherForced(logprobs_BR, torch.zeros_like(logprobs_BR), hidden_BRD, likeliest_BR=second_BR.bool())
    return TeacherForced(logprobs_BR, second_BR, hidden_BRD)


def _all_at_once(
    policy: Policy, rollout: Rollout, given: dict[str, Any], first_B: Tensor | None, wanted: _Wanted
) -> TeacherForced:
    """All logits of the responses together, as the model gives them."""
    width, name = rollout.response_width, type(policy.core).__name__
    head_inputs: list[Tensor] = []
    with contextlib.ExitStack() as stack:
        if wanted.hidden:
            if (head := policy.core.get_output_embeddings()) is None:
                raise UserError(f"model: {name} has no output embedding, so a value cannot read its input")
            stack.callback(head.register_forward_pre_hook(lambda _, inputs: head_inputs.append(inputs[0])).remove)
        logits = _forward(policy, given)
    total = given["decoder_input_ids" if policy.is_seq2seq else "input_ids"].shape[1]
    if logits.shape[1] not in (width, total):
        raise RuntimeError(f"{name} gave logits for {logits.shape[1]} positions, expected {width} or {total}")
    hidden_BRD = None
    if wanted.hidden:
        if not head_inputs or head_inputs[-1].dim() != 3:
            raise UserError(f"model: {name} does not call its output embedding on one row of states per token")
        hidden_BRD = predicting(head_inputs[-1], first_B, width)
    zeros_BR = torch.zeros_like(rollout.policy_logprobs_BR)
    if not wanted.logprobs:
        return TeacherForced(zeros_BR, zeros_BR, hidden_BRD)
    logprobs_BRV = _logprobs(predicting(logits, first_B, width).to(rollout.device), wanted.temperature, rollout.kept)
    logprobs_BR = torch.where(rollout.action_mask_BR, _of_tokens(logprobs_BRV, rollout.response_BR), 0.0)
    entropy_BR = torch.where(rollout.action_mask_BR, _entropy(logprobs_BRV), 0.0) if wanted.entropy else zeros_BR
    likeliest_BR = (logprobs_BRV.argmax(-1) == rollout.response_BR) & rollout.action_mask_BR if wanted.likeliest else None
    return TeacherForced(logprobs_BR, entropy_BR, hidden_BRD, logprobs_BRV if wanted.all else None, likeliest_BR)


def _forward(policy: Policy, given: dict[str, Any]) -> Any:
    """The logits of one pass. A mask is left away where nothing that is read could see padding: no need to warn of it."""
    with compat.without_message("recommend passing in an `attention_mask`"):
        return policy.model(**given).logits
