"""From columns of a padded batch to real tokens, and from rules to the positions they select. Pure functions.

    column c            0   1   2   3 | 4   5   6        P = 4 columns of prompt, then the response
    prompt mask         .   x   x   x                    3 real prompt tokens
    real index r            0   1   2   3   4   5        only real tokens count
    response step s        -2  -1   0   1   2   3        s = r - (prompt tokens - 1); step 0 draws the first token

`first` is the number of columns that are in the cache already, `width` the columns of this call: nothing is counted.

In a row of several turns steps count actions, and the prompt whose places a rule names is the first one:

    token               p   p   p   a   a   f   f   a   a    a: the policy's, f: what it was fed between
    real index r        0   1   2   3   4   5   6   7   8
    step s              -   -   0   1   -   -   2   3   4    the column that predicts action s; none where it predicts an f
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerl.rollout.common.errors import UserError
from steerl.rollout.ragged import runs, table
from steerl.rollout.steering.core.places import Ramp

_NO_END = 1 << 62


def real_index(prompt_mask_BP: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """(r, real) of the columns first .. first + width - 1, both (B, width). Response columns are always real."""
    rows, prompt = prompt_mask_BP.shape
    inside = prompt_mask_BP[:, first : first + width]
    index = prompt_mask_BP.long().cumsum(1)
    index_BT = index[:, first : first + width] - 1
    beyond = width - inside.shape[1]
    if beyond:
        start = max(first, prompt)
        steps = torch.arange(start - prompt, start - prompt + beyond, device=prompt_mask_BP.device)
        index_BT = torch.cat([index_BT, index[:, -1:] + steps], dim=1)
        inside = torch.cat([inside, inside.new_ones(rows, beyond)], dim=1)
    return index_BT, inside


class Columns(NamedTuple):
    """What the rules ask of columns."""

    index_BT: Tensor
    """Their place among the row's real tokens."""
    length_B: Tensor
    """The real tokens of the first prompt."""
    step_BT: Tensor
    """The action that is predicted there; negative where none is."""
    next_BT: Tensor
    """The action that comes next, here or later: what ramps follow."""
    fed_BT: Tensor | None = None
    """What was fed after the first prompt, where anything was."""


def columns_of(index_BT: Tensor, length_B: Tensor, turns_BU2: Tensor | None = None) -> Columns:
    """Of one turn: `length_B` real tokens of prompt, then actions. Of several turns: see `turns_of`."""
    if turns_BU2 is None:
        step_BT = index_BT - (length_B[:, None] - 1)
        return Columns(index_BT, length_B, step_BT, step_BT)
    first_B = turns_BU2[:, 0, 0]
    start_B1U, end_B1U = turns_BU2[:, None].unbind(-1)
    after_BT1 = index_BT[..., None] + 1
    next_BT = (after_BT1 - start_B1U).clamp_min(0).minimum(end_B1U - start_B1U).sum(-1)
    predicts_BT = ((start_B1U <= after_BT1) & (after_BT1 < end_B1U)).any(-1)
    drawn_BT = ((start_B1U < after_BT1) & (after_BT1 <= end_B1U)).any(-1)
    fed_BT = (index_BT >= first_B[:, None]) & ~drawn_BT
    return Columns(index_BT, first_B, torch.where(predicts_BT, next_BT, -1), next_BT, fed_BT)


def turns_of(turns: Sequence[Sequence[tuple[int, int]]], lengths: Sequence[int]) -> Tensor:
    """(B, U, 2): the runs of actions among the row's given tokens, as many as `lengths` says, and what is drawn after them."""
    return table([[*row, (length, _NO_END)] for row, length in zip(turns, lengths, strict=True)], torch.int64)


def drawn_turns(mask_BP: Tensor, drawn_BP: Tensor | None) -> Tensor | None:
    """The same of columns, `mask_BP` the real ones and `drawn_BP` the actions among them; None where there are none."""
    if drawn_BP is None or not bool(drawn_BP.any()):
        return None
    padding = (mask_BP.cumsum(1) == 0).sum(1).tolist()
    turns = [[(a - left, b - left) for a, b in row] for row, left in zip(runs(drawn_BP), padding, strict=True)]
    return turns_of(turns, mask_BP.sum(1).tolist()).to(mask_BP.device)


def in_steps(rule: Any, step: int) -> bool:
    """Whether a step rule selects this step. Steps before 0 are the prompt and never selected here."""
    if step < 0 or rule == "none":
        return False
    if rule == "all":
        return True
    if rule == "generated_positions":
        return step >= 1
    if isinstance(rule, dict):
        if "every" in rule:
            return step % rule["every"] == 0
        start, end = rule["window"]
        return start <= step < end
    return step in rule


def select_steps(rule: Any, step_BT: Tensor) -> Tensor:
    """The same over a tensor of steps."""
    later = step_BT >= 0
    if rule == "none":
        return torch.zeros_like(later)
    if rule == "all":
        return later
    if rule == "generated_positions":
        return step_BT >= 1
    if isinstance(rule, dict):
        if "every" in rule:
            return later & (step_BT % rule["every"] == 0)
        start, end = rule["window"]
        return later & (step_BT >= start) & (step_BT < end)
    return torch.isin(step_BT, torch.tensor(rule, device=step_BT.device))


def select_listed(index_BT: Tensor, length_B: Tensor, places: Sequence[int]) -> Tensor:
    """Positions from a list that holds for every row, negative ones counted from each prompt's end."""
    listed = torch.tensor(list(places), dtype=torch.int64, device=index_BT.device)
    wanted_BK = torch.where(listed < 0, length_B[:, None] + listed, listed[None])
    return (index_BT[:, :, None] == wanted_BK[:, None, :]).any(-1)


def select_prompt(rule: Any, index_BT: Tensor, length_B: Tensor, places_BK: Tensor | None = None) -> Tensor:
    """Whether a prompt rule selects each position. `places_BK`: a column's positions per row, padded with -1."""
    prompt = index_BT < length_B[:, None]
    if rule == "none":
        return torch.zeros_like(prompt)
    if rule == "all":
        return prompt
    if rule == "last":
        return index_BT == length_B[:, None] - 1
    if isinstance(rule, dict) and "window" in rule:
        start, end = (torch.tensor(v, device=index_BT.device) for v in rule["window"])
        start_B = torch.where(start < 0, (length_B + start).clamp_min(0), start)
        end_B = torch.where(end < 0, length_B + end, end)
        return prompt & (index_BT >= start_B[:, None]) & (index_BT < end_B[:, None])
    if isinstance(rule, dict):
        assert places_BK is not None, "a column rule needs the rows' positions"
        return prompt & (index_BT[:, :, None] == places_BK[:, None, :]).any(-1)
    return prompt & select_listed(index_BT, length_B, rule)


def ramp_factor(ramp: Ramp | None, step: int) -> float:
    """The ramp at one step: `start` up to step 0, `end` from step `over` on."""
    if ramp is None:
        return 1.0
    share = min(max(step, 0), ramp.over) / ramp.over
    if ramp.type == "cosine":
        share = 0.5 * (1.0 - math.cos(math.pi * share))
    return ramp.start + (ramp.end - ramp.start) * share


def ramp_factors(ramp: Ramp, step_BT: Tensor) -> Tensor:
    """The same over a tensor of steps, from the same numbers: a table, so that both ways agree to the last bit."""
    table = torch.tensor([ramp_factor(ramp, s) for s in range(ramp.over + 1)], device=step_BT.device)
    return table[step_BT.clamp(0, ramp.over)]


def places_of(column: Sequence[object], length_B: Tensor, name: str) -> Tensor:
    """A data column's positions per row as (B, K), negative ones from each prompt's end, padded with -1."""
    rows: list[list[int]] = []
    for value, length in zip(column, length_B.tolist(), strict=True):
        listed = [value] if isinstance(value, int) else value
        if not isinstance(listed, Sequence) or isinstance(listed, str) or any(not isinstance(v, int) for v in listed):
            raise UserError(f"column {name!r}: expected token positions (a whole number or a list), found {value!r}")
        rows.append([v + length if v < 0 else v for v in listed])
    widest = max((len(row) for row in rows), default=0) or 1
    table = [row + [-1] * (widest - len(row)) for row in rows]
    return torch.tensor(table, dtype=torch.int64, device=length_B.device)
