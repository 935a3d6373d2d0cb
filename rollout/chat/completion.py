"""Completions in the form of Llama's API, over the sampler: texts, dialogs, token lists.

    text_completion(policy, prompts)   ─┐                                  ┌─ {"generation": text, "tokens", "logprobs"}
    chat_completion(policy, dialogs)   ─┼─ ids ── complete ── Completed[] ─┼─ {"generation": {"role", "content"}, ...}
    generate(policy, prompt_tokens)    ─┘        (Sampler)                 └─ (tokens, logprobs)

As there: log-probs are of the raw logits at temperature 1, whatever the tokens were drawn with; the stop token is cut off;
`max_gen_len` defaults to the context less one; temperature 0 is greedy; `echo` gives the prompt's tokens too, the first
of them without a log-prob. A row's limit is what the context leaves beside its own prompt, not beside the longest one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steerl.rollout.chat.confidence import prompt_logprobs
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.stops import Stops
from steerl.rollout.engines.sampler import OnToken, Sampler
from steerl.rollout.engines.vllm.sampler import ServerSampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import conversation_ids, text_ids
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.types import STOP_EOS, STOP_LENGTH, STOP_REASONS, Rollout


@dataclass(frozen=True)
class Completed:
    """One prompt's completion."""

    prompt_ids: list[int]
    ids: list[int]
    """As sampled, without the stop token or what completed a stop string."""
    text: str
    """Without special tokens, ending before a matched stop string."""
    stop_reason: str
    logprobs: list[float] | None
    """Of `ids`, at temperature 1; None where they were not asked for."""
    prompt_logprobs: list[float | None] | None
    """Of the prompt, the first None; None where no echo was asked for."""
    rollout: Rollout | None
    """The row as it was sampled; None where the context left no room."""


# -- Llama's three functions ----------------------------------------------------------------------------------------


def text_completion(
    policy: Policy,
    prompts: Sequence[str],
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    logprobs: bool = False,
    echo: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """[{"generation": str}] of texts; with `logprobs` also "tokens" and "logprobs". `more` as for `generate`."""
    if isinstance(prompts, str):
        raise UserError("prompts: one text; give a list of texts")
    ids = [text_ids(policy, prompt) for prompt in prompts]
    completed = _complete(policy, ids, temperature, top_p, max_gen_len, logprobs, echo, more)
    return [
        {"generation": _text(policy, done, echo), **(_numbers(policy, done, echo) if logprobs else {})} for done in completed
    ]


def chat_completion(
    policy: Policy,
    dialogs: Sequence[Sequence[dict[str, Any]]],
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_gen_len: int | None = None,
    logprobs: bool = False,
    **more: Any,
) -> list[dict[str, Any]]:
    """[{"generation": {"role": "assistant", "content": str}}] of dialogs, through the tokenizer's chat template."""
    for index, dialog in enumerate(dialogs):
        check_dialog(dialog, f"dialogs[{index}]")
    if not getattr(policy.tokenizer, "chat_template", None):
        raise UserError(
            "dialogs: the tokenizer has no chat template; use text_completion, or save a template with the tokenizer"
        )
    ids = [conversation_ids(policy.tokenizer, list(dialog)) for dialog in dialogs]
    completed = _complete(policy, ids, temperature, top_p, max_gen_len, logprobs, False, more)
    return [
        {
            "generation": {"role": "assistant", "content": done.text},
            **(_numbers(policy, done, False) if logprobs else {}),
        }
        for done in completed
    ]


def generate(
    policy: Policy,
    prompt_tokens: Sequence[Sequence[int]],
    max_gen_len: int | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    logprobs: bool = False,
    echo: bool = False,
    *,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 32,
    max_batch_size: int | None = None,
    max_seq_len: int | None = None,
    steering: Any = None,
) -> tuple[list[list[int]], list[list[float | None]] | None]:
    """(tokens, logprobs) of token lists. `max_batch_size` and `max_seq_len` refuse what is larger, as Llama's build does."""
    more = {
        "stop": stop, "seed": seed, "batch_size": batch_size, "max_batch_size": max_batch_size, "max_seq_len": max_seq_len,
        "steering": steering,
    }  # fmt: skip
    completed = _complete(policy, prompt_tokens, temperature, top_p, max_gen_len, logprobs, echo, more)
    tokens = [[*done.prompt_ids, *done.ids] if echo else done.ids for done in completed]
    return tokens, [_logprobs(done, echo) for done in completed] if logprobs else None


def _complete(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    temperature: float,
    top_p: float,
    max_gen_len: int | None,
    logprobs: bool,
    echo: bool,
    more: dict[str, Any],
) -> list[Completed]:
    """Llama's arguments -> Sampling, after the checks that its `build` and `generate` make by assertion."""
    known = ("stop", "seed", "batch_size", "max_batch_size", "max_seq_len", "steering")
    if unknown := [name for name in more if name not in known]:
        raise TypeError(f"unknown argument(s) {', '.join(unknown)}; known are {', '.join(known)}")
    most, context = more.get("max_batch_size"), _context(policy, more.get("max_seq_len"))
    if not len(prompt_ids):
        raise UserError("prompts: none; give at least one")
    if most is not None and len(prompt_ids) > most:
        raise UserError(f"prompts: {len(prompt_ids)} of them, more than max_batch_size {most}; give fewer at once")
    if max_gen_len is None and context is None:
        raise UserError("max_gen_len: this model's context has no limit; say how many tokens at most")
    if max_gen_len is not None and max_gen_len < 0:
        raise UserError(f"max_gen_len: {max_gen_len}; give 0 or more")
    wanted = max_gen_len if max_gen_len is not None else (context or 1) - 1
    sampling = Sampling(
        temperature=temperature or 1.0,
        greedy=temperature == 0,
        top_p=top_p if temperature else 1.0,
        max_new_tokens=max(wanted, 1),
        stop=list(more.get("stop", ())),
        seed=more.get("seed", 0),
        batch_size=more.get("batch_size", 32),
    )
    return complete(
        policy, prompt_ids, sampling, logprobs=logprobs, echo=echo, steering=more.get("steering"), limit=wanted, context=context
    )


# -- the one below them ---------------------------------------------------------------------------------------------


def complete(
    policy: Policy,
    prompt_ids: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    logprobs: bool = False,
    echo: bool = False,
    steering: Any = None,
    step: int = 0,
    rows: Sequence[int] | None = None,
    limit: int | None = None,
    context: int | None = None,
    on_token: OnToken | None = None,
    draws: Callable[[Sampling, Any], Sampler | ServerSampler] | None = None,
) -> list[Completed]:
    """One completion per prompt. `limit` is sampling.max_new_tokens unless given (0: nothing is sampled, echo alone).

    A completion is keyed by seed, `step` and its row (`rows`, else 0, 1, ...): another one of them gives another text.
    `on_token` as for Sampler.sample; `draws` makes what draws from (sampling, steering): another engine's.
    """
    check_sampling(sampling)
    prompts = [[int(token) for token in ids] for ids in prompt_ids]
    context = _context(policy, None) if context is None else context
    limit = sampling.max_new_tokens if limit is None else limit
    for row, ids in enumerate(prompts):
        _check_prompt(policy, row, ids, context)
    if echo and policy.is_seq2seq:
        raise UserError("echo: an encoder-decoder does not predict its prompt, so there is nothing to echo; leave it out")
    room = [_room(policy, len(ids), limit, context) for ids in prompts]
    done: dict[int, Completed] = {}
    for most in sorted(set(room), reverse=True):
        group = [row for row, own in enumerate(room) if own == most]
        if most < 1:
            done.update({row: Completed(prompts[row], [], "", STOP_REASONS[STOP_LENGTH], [], None, None) for row in group})
            continue
        own = dataclasses.replace(sampling, max_new_tokens=most, replay_mask=False)
        sampler = draws(own, steering) if draws is not None else Sampler(policy, own, steering)
        batch = PromptBatch.of_ids(
            [prompts[row] for row in group], [rows[row] if rows else row for row in group], policy.tokenizer
        )
        rollout, texts = sampler.sample(batch, step=step, on_token=on_token)
        numbers = raw_logprobs(policy, rollout, sampling, steering) if logprobs else None
        for at, row in enumerate(group):
            one = rollout.select([at])
            ids = _shown_ids(sampler.stops, one, texts.completions[at], prompts[row])
            shown = None if numbers is None else numbers[at, : len(ids)].tolist()
            reason = STOP_REASONS[int(one.stop_B[0])]
            done[row] = Completed(prompts[row], ids, texts.completions[at], reason, shown, None, one)
    completed = [done[row] for row in range(len(prompts))]
    if not echo or not logprobs:
        return completed
    said = prompt_logprobs(policy, prompts, steering=steering, batch_size=sampling.batch_size)
    return [dataclasses.replace(one, prompt_logprobs=numbers) for one, numbers in zip(completed, said, strict=True)]


# -- checks and pieces ------------------------------------------------------------------------------------------------


def check_sampling(sampling: Sampling) -> None:
    if sampling.n != 1:
        raise UserError(f"sampling.n: {sampling.n}, but a prompt has one completion; leave it at 1, or dump rollouts")
    if sampling.replay_mask:
        raise UserError("sampling.replay_mask: true, but nothing learns from a completion, so it has no effect; leave it out")


def check_dialog(dialog: Sequence[dict[str, Any]], where: str = "dialog") -> None:
    """A system message first or not at all, then user and assistant in turn, a user's last; tools answer an assistant."""
    if not len(dialog):
        raise UserError(f"{where}: no messages; a dialog begins with a system or a user message")
    for at, message in enumerate(dialog):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message.get("content") is None:
            raise UserError(f"{where}[{at}]: expected {{'role': ..., 'content': ...}}, found {str(message)[:80]}")
    roles = [message["role"] for message in dialog]
    turns = roles[1:] if roles[0] == "system" else roles
    offset = len(roles) - len(turns)
    follows = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool"), "": ("user",)}
    before = ""
    for at, role in enumerate(turns):
        if role not in follows[before]:
            after = before or ("system" if offset else "nothing")
            raise UserError(
                f"{where}[{at + offset}]: role {role!r} after {after!r}, expected {' or '.join(follows[before])}; "
                "a system message first, then user and assistant in turn"
            )
        before = role
    if before not in ("user", "tool"):
        raise UserError(
            f"{where}: the last message is the {before or 'system'}'s; it must be the user's, which is to be answered"
        )


def _check_prompt(policy: Policy, row: int, ids: list[int], context: int | None) -> None:
    if not ids:
        raise UserError(f"prompts[{row}]: empty; a model needs at least one token to go on from")
    wrong = next((token for token in ids if not 0 <= token < policy.vocab_size), None)
    if wrong is not None:
        raise UserError(f"prompts[{row}]: the id {wrong} is out of range; ids go from 0 to {policy.vocab_size - 1}")
    room = policy.context if policy.is_seq2seq else context
    if room is not None and len(ids) > room:
        raise UserError(f"prompts[{row}]: {len(ids)} tokens, more than the {room} of the context; shorten it")


def _context(policy: Policy, limit: int | None) -> int | None:
    """Most tokens of a sequence: the model's, or less where `limit` says so; of the decoder's own for encoder-decoders."""
    own = policy.context
    if policy.is_seq2seq:
        own = None if policy.decoder_context is None else policy.decoder_context - len(policy.start_ids)
    if limit is None:
        return own
    if limit < 1 or (own is not None and limit > own):
        raise UserError(
            f"max_seq_len: {limit}; give 1 to {own if own is not None else 'any number'}, what the model's context holds"
        )
    return limit


def _room(policy: Policy, length: int, limit: int, context: int | None) -> int:
    """Tokens that a completion may have: what the context leaves, or the length beyond which the model changes."""
    used, switch = 0 if policy.is_seq2seq else length, policy.capabilities.boundary
    ends = [end for end in (context, switch) if end is not None and not (end == switch and policy.capabilities.is_long(length))]
    return min([limit, *(end - used for end in ends)])


def raw_logprobs(policy: Policy, rollout: Rollout, sampling: Sampling, steering: Any) -> torch.Tensor:
    """Of every token, at temperature 1."""
    if steering is None and sampling.policy_temperature == 1:
        return rollout.policy_logprobs_BR
    with torch.no_grad():
        forced = teacher_forced(
            policy, rollout, temperature=1.0, want_entropy=False, max_rows=sampling.batch_size, steering=steering
        )
    return forced.logprobs_BR


def _shown_ids(stops: Stops, row: Rollout, text: str, prompt_ids: list[int]) -> list[int]:
    """A row's ids without its stop token, and without those that only belong to a matched stop string."""
    ids: list[int] = row.response_BR[0, : int(row.lengths_B[0])].tolist()
    stop = int(row.stop_B[0])
    if stop == STOP_EOS or (stop != STOP_LENGTH and ids[-1] in stops.user_ids):
        return ids[:-1]
    if stop == STOP_LENGTH:
        return ids
    return next((ids[:n] for n in range(len(ids)) if stops.text(ids[:n], prompt_ids).startswith(text)), ids)


def _text(policy: Policy, done: Completed, echo: bool) -> str:
    return str(policy.tokenizer.decode(done.prompt_ids, skip_special_tokens=True)) + done.text if echo else done.text


def _numbers(policy: Policy, done: Completed, echo: bool) -> dict[str, Any]:
    ids = [*done.prompt_ids, *done.ids] if echo else done.ids
    return {"tokens": [policy.tokenizer.decode([token]) for token in ids], "logprobs": _logprobs(done, echo)}


def _logprobs(done: Completed, echo: bool) -> list[float | None]:
    own: list[float | None] = [*(done.logprobs or [])]
    return [*(done.prompt_logprobs or []), *own] if echo else own
