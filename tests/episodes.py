"""Hand-made episodes: rows of several turns with what the policy was told in between. No model is needed, an id is a character.

talk("2+3?", ("<add 2 3>", "5"), ("it is 5", ""), rewards=[0.5, None], reward=2.0)      one row
samples_of([talk(...), ...], answer=[...])                                              rows, with columns of the data
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from steerl.rollout.episodes import Episode, Turn
from steerl.rollout.types import Rollout, Samples, Texts


class Talk(NamedTuple):
    prompt: Any
    response: str
    """All that follows the prompt."""
    mask: list[bool]
    episode: Episode


def ids_of(text: str) -> list[int]:
    return [4 + ord(character) % 50 for character in text]


def talk(
    prompt: str,
    *turns: tuple[str, str],
    rewards: Sequence[float | None] = (),
    chat: bool = True,
    ended_by: str = "policy",
    **whole: Any,
) -> Talk:
    """(what the policy said, what it was told then) for every turn. In a conversation a first `<name ...>` is a tool call, whose
    result comes between two signs that are fed."""
    response, mask, said = "", [], []
    for (text, told), reward in itertools.zip_longest(turns, rewards):
        first = len(response)
        fed = f"[{told}]" if chat and told else told
        response += text + fed
        mask += [True] * len(text) + [False] * len(fed)
        message, answer, calls = None, told, int(text.startswith("<"))
        if chat:
            message = {"role": "assistant", "content": "" if calls else text}
            if calls:
                name, *numbers = text.strip("<>").split()
                message["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": {"of": numbers}}}]
            answer = [{"role": "tool" if calls else "user", "content": told}] if told else []
        errors = (f"{text.strip('<>').split()[0]}: {told.removeprefix('Error: ')}",) if told.startswith("Error: ") else ()
        said.append(Turn(first, first + len(text), text, message, answer, calls, errors, told.endswith("..."), reward))
    asked = [{"role": "user", "content": prompt}] if chat else prompt
    return Talk(asked, response, mask, Episode(tuple(said), ended_by, **whole))


def samples_of(talks: Sequence[Talk], samples: int = 1, first_row: int = 10, **columns: Any) -> Samples:
    """`samples` of each prompt; dataset row i + first_row, so that places in the batch and in the dataset differ."""
    rows = range(len(talks))
    scale = [[-0.5 - place / 100 if drawn else 0.0 for place, drawn in enumerate(one.mask)] for one in talks]
    rollout = Rollout.of_ids(
        [ids_of(one.prompt if isinstance(one.prompt, str) else one.prompt[0]["content"]) for one in talks],
        [ids_of(one.response) for one in talks],
        action_mask_BR=[one.mask for one in talks],
        behaviour_logprobs_BR=scale,
        policy_logprobs_BR=scale,
        ended_B=[one.episode.ended_by not in ("length", "tokens") for one in talks],
        row_B=[i // samples + first_row for i in rows],
        sample_B=[i % samples for i in rows],
    )
    texts = Texts(
        prompts=[one.prompt for one in talks],
        prompt_texts=[one.prompt if isinstance(one.prompt, str) else f"user: {one.prompt[0]['content']}" for one in talks],
        completions=[one.response for one in talks],
        columns=columns,
        episodes=[one.episode for one in talks],
    )
    return Samples(rollout, texts)


CALCULATOR = [
    talk("2+3?", ("<add 2 3>", "5"), ("it is 5", ""), rewards=[0.5, None], reward=2.0, state={"calls": 1}),
    talk("4*5?", ("<add 4 5>", "9"), ("<mul 4 5>", "Error: ValueError: no"), ("20", ""), rewards=[None, -0.5, 1.0],
         state={"calls": 2}),
    talk("1?", ("one", ""), state={"calls": 0}),
    talk("hm?", ("<add 1", "lost..."), ended_by="failure", failure="TimeoutError: 60 s", rewards=[0.25], state={}),
]  # fmt: skip
"""Two turns and three, a single one that earned nothing, and an environment that was lost."""
