"""An episode for a person to read: the policy's turns, and what it was told set off from them.

<tool_call>{"name": "add", "arguments": {"a": 1, "b": "x"}}</tool_call>      a turn, colored as completions are
  | add: error: ...                                                          what it was told
  ! add: raised TypeError: ...                                               what failed, as the log has it
I do not know.
  = ended by the policy after 2 turns
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from steerl.rollout.common.errors import visible
from steerl.rollout.environments.conversation.conversation import as_text
from steerl.rollout.episodes import Episode, Turn
from steerl.rollout.prompts.chat import Speller
from steerl.rollout.types import Samples

_LIMITS = {"length": "sampling.max_new_tokens", "turns": "environment.max_turns", "tokens": "environment.max_tokens"}


def lines(samples: Samples, row: int, said: Callable[[Turn], str]) -> Iterator[str]:
    """`said`: a turn as it is to be shown."""
    prompt, episode = samples.texts.prompts[row], episode_of(samples, row)
    yield f"> {visible(prompt if isinstance(prompt, str) else as_text(prompt[-1].get('content')))}"
    for turn in episode.turns:
        yield said(turn)
        yield from (f"  | {line}" for line in visible(told(turn.answer)).splitlines())
        yield from (f"  ! {visible(error)}" for error in turn.errors)
        if turn.reward:
            yield f"  + {turn.reward:g}"
    yield f"  = {end(episode)}"


def told(answer: list[dict[str, Any]] | str) -> str:
    if isinstance(answer, str):
        return answer
    return "\n".join(f"{message.get('name') or message['role']}: {as_text(message.get('content'))}" for message in answer)


def record(samples: Samples, row: int, logprobs: Sequence[float], speller: Speller) -> dict[str, Any]:
    """All of it, as JSON values. `logprobs`: of every token, of the policy's and of those that were fed."""
    rollout, ids = samples.rollout, samples.rollout.response_ids[row]
    return {
        "prompt": samples.texts.prompts[row],
        **episode_of(samples, row).as_json(),
        "ids": ids,
        "action_mask": rollout.action_mask_BR[row, : len(ids)].tolist(),
        "tokens": [speller.token(token) for token in ids],
        "logprobs": list(logprobs[: len(ids)]),
    }


def episode_of(samples: Samples, row: int) -> Episode:
    assert samples.texts.episodes is not None
    return samples.texts.episodes[row]


def end(episode: Episode) -> str:
    """How it ended, and what it earned."""
    by = _LIMITS.get(episode.ended_by, f"the {episode.ended_by}")
    by = f"a failure: {visible(episode.failure)}" if episode.failure else by
    earned = "" if episode.rewards is None else f"; reward {sum(episode.rewards):g}"
    count = len(episode.turns)
    return f"ended by {by} after {count} turn{'' if count == 1 else 's'}{earned}"
