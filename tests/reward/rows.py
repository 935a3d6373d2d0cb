"""Hand-made rows for the tests of rewards: ragged responses, texts that say what the ids say, columns."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from steerl.rollout.types import Rollout, Texts


def made(
    completions: list[str], prompts: list[Any] | None = None, ended: list[bool] | None = None, **columns: list[Any]
) -> tuple[Rollout, Texts]:
    """Rows with an id per character; dataset row i + 10, so that places in the batch and in the dataset differ."""
    rows = len(completions)
    prompts = prompts if prompts is not None else ["ask"] * rows
    rollout = Rollout.of_ids(
        [[4 + ord(c) % 50 for c in (p if isinstance(p, str) else "chat")] for p in prompts],
        [[4 + ord(c) % 50 for c in text] for text in completions],
        ended_B=[True] * rows if ended is None else ended,
        row_B=[i + 10 for i in range(rows)],
    )
    texts = Texts(prompts=prompts, prompt_texts=[str(p) for p in prompts], completions=completions, columns=columns)
    return rollout, texts


def episodes(completions: list[str], masks: list[str], **columns: Any) -> tuple[Rollout, Texts]:
    """The same with gaps: of each row a 1 where the policy drew the token, a 0 where it was fed."""
    rollout, texts = made(completions, **columns)
    drawn = torch.tensor(
        [[place < len(mask) and mask[place] == "1" for place in range(rollout.response_width)] for mask in masks]
    )
    return dataclasses.replace(rollout, action_mask_BR=drawn), texts
