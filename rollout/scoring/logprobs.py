"""The only place where logits and tokens are lined up: position P + t - 1 predicts response token t.

    input          . . p p p r r         the sequence without its last column, which predicts nothing
    logits               ^ ^ ^           the last R positions, each one's row of logits
    response             r r e           what they predict

    aligned        p p p r r . .         decoder-only models: the same rows, each from its first token on. Padding comes after
                       ^ ^ ^             what is read and needs no mask; P + t - 1 is then each row's own

Everything is raised to float32 before the temperature and the log-softmax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.model import virtual_tokens
from steerl.rollout.model.language_model import forward_arguments, no_dropout, positions
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.sharding import needs_sync
from steerl.rollout.scoring.chunked_head import predicting, readable, reading
from steerl.rollout.types import Rollout
from torch import Tensor

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


def token_logprobs(logits_BRV: Tensor, tokens_BR: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of the tokens under softmax(logits / temperature)."""
    return _logprobs(logits_BRV, temperature).gather(-1, tokens_BR[..., None])[..., 0]


def entropy(logits_BRV: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), in nats."""
    return _entropy(_logprobs(logits_BRV, temperature))


def _logprobs(logits_BRV: Tensor, temperature: float) -> Tensor:
    scores = logits_BRV.float()
    return torch.log_softmax(scores if temperature == 1 else scores / temperature, dim=-1)


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
    max_rows: int | None = None,
    steering: Any = None,
    columns: dict[str, list[Any]] | None = None,
) -> TeacherForced:
    """Score a rollout's responses in one forward pass, without dropout; gradients as the caller has them.

    `want_logprobs` False leaves the logits alone: a value's trunk has hidden states and no vocabulary; `want_all` keeps all.
    `max_rows` splits the pass by rows. A model that cannot be left-padded gets rows of one prompt length at a time, and as
    many passes as on the rank that has most, where each is a collective call.
    `steering` steers each of those passes; without it an `active` block around the call does, where there is one pass.
    """
    temperature = rollout.temperature if temperature is None else temperature
    if not len(rollout) or not rollout.response_width:
        empty = rollout.policy_logprobs_BR
        return TeacherForced(empty, empty, None)
    parts: list[tuple[Tensor, TeacherForced]] = []
    with no_dropout(policy.core):
        # The caller's columns stay where they can: a steering block around this call knows rows and columns by them.
        at_start = steering is None and not want_all and _from_first_token(policy, want_logprobs)
        padded = at_start or bool(rollout.prompt_mask_BP.all()) or policy.capabilities.padding
        groups = list(_groups(policy, rollout, padded, max_rows))
        own = len(groups)
        if (not policy.capabilities.padding or policy.capabilities.boundary is not None) and needs_sync(policy.model):
            groups += [groups[-1]] * (processes.most(own) - own)
        for index in groups:
            whole = len(index) == len(rollout) and len(groups) == 1
            part = rollout if whole and (policy.is_seq2seq or padded) else _narrowed(rollout.select(index))
            with _steered(steering, policy, part, columns, index):
                one = _one_pass(policy, part, temperature, want_hidden, want_entropy, want_logprobs, want_all, at_start)
                parts.append((index, one))
            if whole:
                return parts[0][1]
    back = torch.cat([index for index, _ in parts[:own]]).argsort()

    def joined(name: str) -> Tensor:
        values = [getattr(forced, name) for _, forced in parts]
        # What only kept this rank in step takes part in the backward pass, too: it adds zeros.
        idle = [0.0 * value.sum() for value in values[own:]]
        return torch.cat(values[:own])[back] + (sum(idle) if idle else 0.0)

    hidden, law = (
        joined(name) if wanted else None for name, wanted in (("hidden_BRD", want_hidden), ("all_logprobs_BRV", want_all))
    )
    return TeacherForced(joined("logprobs_BR"), joined("entropy_BR"), hidden, law)


def encoder_input(prompt_BP: Tensor, mask_BP: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padded prompts as an encoder reads them: real tokens first, so that every position is what it is alone."""
    order = (~mask_BP).to(torch.int8).argsort(dim=1, stable=True)
    return prompt_BP.gather(1, order), mask_BP.gather(1, order)


def _groups(policy: Policy, rollout: Rollout, padded: bool, max_rows: int | None) -> Iterator[Tensor]:
    """Rows that go through one pass together: all, but for one prompt length where the model takes no padding, and for one
    side of the length at which its law changes."""
    rows = torch.arange(len(rollout), device=rollout.device)
    lengths_B = rollout.prompt_mask_BP.sum(1)
    kind_B = torch.zeros_like(lengths_B) if padded else 2 * lengths_B
    if policy.capabilities.boundary is not None:
        kind_B = kind_B + (lengths_B + rollout.lengths_B - 1 > policy.capabilities.boundary)
    for kind in kind_B.unique():
        group = rows[kind_B == kind]
        yield from group.split(max_rows or len(group))


def _narrowed(rollout: Rollout) -> Rollout:
    """Without the columns on the left in which every row has padding."""
    empty = int((~rollout.prompt_mask_BP).sum(1).min())
    return dataclasses.replace(
        rollout, prompt_BP=rollout.prompt_BP[:, empty:], prompt_mask_BP=rollout.prompt_mask_BP[:, empty:]
    )


@contextlib.contextmanager
def _steered(
    steering: Any, policy: Policy, part: Rollout, columns: dict[str, list[Any]] | None, index: Tensor
) -> Iterator[None]:
    if steering is None:
        yield
        return
    mask_BP = encoder_input(part.prompt_BP, part.prompt_mask_BP)[1] if policy.is_seq2seq else part.prompt_mask_BP
    own = {name: [column[i] for i in index.tolist()] for name, column in (columns or {}).items()}
    with steering.active(
        prompt_mask_BP=mask_BP,
        row_B=part.row_B,
        sample_B=part.sample_B,
        columns=own,
        strength_B=part.strength_B,
        policy_step=part.policy_step,
        start_width=max(len(policy.start_ids), 1),
    ):
        yield


def _from_first_token(policy: Policy, want_logprobs: bool) -> bool:
    """Whether rows may begin at column 0: not where virtual tokens are placed by the caller's columns, nor where the model is
    to give its last logits as it does; nor where a steering knows rows by their columns, or is compared with when at rest."""
    from steerl.rollout.model.hooks import is_steerable

    free = aligned and not policy.is_seq2seq and not is_steerable(policy.core) and not virtual_tokens.count(policy.model)
    return free and (not want_logprobs or readable(policy) is not None)


def _one_pass(
    policy: Policy,
    rollout: Rollout,
    temperature: float,
    want_hidden: bool,
    want_entropy: bool,
    want_logprobs: bool,
    want_all: bool,
    at_start: bool,
) -> TeacherForced:
    first_B = rollout.prompt_mask_BP.sum(1) - 1 if at_start else None
    given = forward_inputs(policy, rollout, at_start)
    after = readable(policy) if want_logprobs and not want_all else None
    if after is None:
        return _whole_pass(policy, rollout, given, first_B, temperature, want_hidden, want_entropy, want_logprobs, want_all)
    with reading(policy.core, after, rollout, first_B, temperature, want_entropy) as readout:
        logits = _logits(policy, given)
    if readout.numbers is None or readout.hidden_BTD is None:
        raise RuntimeError(f"{type(policy.core).__name__} calls its output embedding otherwise than when it was observed")
    # The head's own output where the model passes it on: engines follow the graph through it.
    numbers_BR2 = (logits if logits.shape == readout.numbers.shape else readout.numbers).to(rollout.device)
    hidden_BRD = predicting(readout.hidden_BTD, first_B, rollout.response_width) if want_hidden else None
    return TeacherForced(numbers_BR2[..., 0], numbers_BR2[..., 1], hidden_BRD)


def _whole_pass(
    policy: Policy,
    rollout: Rollout,
    given: dict[str, Any],
    first_B: Tensor | None,
    temperature: float,
    want_hidden: bool,
    want_entropy: bool,
    want_logprobs: bool,
    want_all: bool,
) -> TeacherForced:
    """All logits of the responses at once, as the model gives them."""
    width = rollout.response_width
    caught: list[Tensor] = []
    head = policy.core.get_output_embeddings()
    if want_hidden and head is None:
        raise UserError(f"model: {type(policy.core).__name__} has no output embedding, so a value cannot read its input")
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])) if want_hidden else None
    try:
        logits = _logits(policy, given)
    finally:
        if hook is not None:
            hook.remove()
    total = given["decoder_input_ids" if policy.is_seq2seq else "input_ids"].shape[1]
    if logits.shape[1] not in (width, total):
        raise RuntimeError(
            f"{type(policy.core).__name__} gave logits for {logits.shape[1]} positions, expected {width} or {total}"
        )
    hidden_BRD = None
    if want_hidden:
        if not caught or caught[-1].dim() != 3:
            raise UserError(
                f"model: {type(policy.core).__name__} does not call its output embedding on one row of states per token"
            )
        hidden_BRD = predicting(caught[-1], first_B, width)
    if not want_logprobs:
        return TeacherForced(
            torch.zeros_like(rollout.policy_logprobs_BR), torch.zeros_like(rollout.policy_logprobs_BR), hidden_BRD
        )
    mask_BR = rollout.mask_BR
    logprobs_BRV = _logprobs(logits[:, -width:].to(rollout.device), temperature)
    picked_BR = logprobs_BRV.gather(-1, rollout.response_BR[..., None])[..., 0]
    zero = torch.zeros((), device=rollout.device)
    entropy_BR = torch.where(mask_BR, _entropy(logprobs_BRV), zero) if want_entropy else torch.zeros_like(picked_BR)
    return TeacherForced(torch.where(mask_BR, picked_BR, zero), entropy_BR, hidden_BRD, logprobs_BRV if want_all else None)


def _logits(policy: Policy, given: dict[str, Any]) -> Any:
    """One pass. A mask is left away where nothing that is read could see padding: transformers need not warn of it."""
    _WARNS.addFilter(_is_news)
    try:
        return policy.model(**given).logits
    finally:
        _WARNS.removeFilter(_is_news)


_WARNS = logging.getLogger("transformers.modeling_utils")


def _is_news(record: logging.LogRecord) -> bool:
    return "recommend passing in an `attention_mask`" not in record.getMessage()


def forward_inputs(policy: Policy, rollout: Rollout, at_start: bool = False) -> dict[str, Any]:
    """The forward's arguments for the whole sequence but its last column; `at_start`: each row from its first token on."""
    takes = forward_arguments(policy.core)
    response_BR = rollout.response_BR[:, :-1]
    given: dict[str, Any] = {**policy.extra}
    if "use_cache" in takes:
        given["use_cache"] = False
    if policy.is_seq2seq:
        given["input_ids"], mask_BP = encoder_input(rollout.prompt_BP, rollout.prompt_mask_BP)
        given["attention_mask"] = mask_BP.long()
        given["decoder_input_ids"] = torch.cat([rollout.start_BK, response_BR], dim=1)
    elif at_start:
        given["input_ids"] = ids_BS = _pushed(rollout)
        if "position_ids" in takes:
            position_S = torch.arange(ids_BS.shape[1], device=ids_BS.device) + policy.capabilities.position_offset
            given["position_ids"] = _within(policy, rollout, position_S)[None].expand(len(ids_BS), -1)
        return given
    else:
        # Tokens after a row's end change nothing before them, so only padding on the left needs the mask.
        given["input_ids"] = torch.cat([rollout.prompt_BP, response_BR], dim=1)
        mask_BS = torch.cat([rollout.prompt_mask_BP, torch.ones_like(response_BR, dtype=torch.bool)], dim=1)
        if "attention_mask" in takes and not bool(mask_BS.all()):
            given["attention_mask"] = mask_BS.long()
        if "position_ids" in takes:
            given["position_ids"] = _within(policy, rollout, positions(mask_BS, policy.capabilities.position_offset))
    if "logits_to_keep" in takes:
        given["logits_to_keep"] = rollout.response_width
    return given


def _within(policy: Policy, rollout: Rollout, position: Tensor) -> Tensor:
    """No position past the context, nor past the longest row's where that has a say: only columns beyond a row's end are."""
    if policy.capabilities.boundary is not None:
        longest = int((rollout.prompt_mask_BP.sum(1) + rollout.lengths_B).max()) - 1
        position = position.clamp(max=policy.capabilities.position_offset + max(longest, 1) - 1)
    return position if policy.context is None else position.clamp(max=policy.context - 1)


def _pushed(rollout: Rollout) -> Tensor:
    """Prompts and responses without the padding before them, as wide as the longest row needs."""
    ids_BS = torch.cat([rollout.prompt_BP, rollout.response_BR[:, :-1]], dim=1)
    real_B = rollout.prompt_mask_BP.sum(1)
    width = max(int((real_B + rollout.lengths_B).max()) - 1, 1)
    column_BS = torch.arange(width, device=ids_BS.device)[None] + (rollout.prompt_width - real_B)[:, None]
    return ids_BS.gather(1, column_BS.clamp(max=ids_BS.shape[1] - 1))
