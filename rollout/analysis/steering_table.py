"""What was applied where: the strength of every site at every real token of a rollout.

    table(...)      token   position  step   cheer   calm
                    film        2      0      4.0     -
                    good        3      1      3.9    0.5

`applied` is one steered pass over the rollout, read off the very selections that the edits used.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.scoring.steered import given_columns
from steerl.rollout.steering.core import positions
from steerl.rollout.steering.engine import Active
from steerl.rollout.steering.selection import select
from steerl.rollout.steering.state import StackCall
from steerl.rollout.steering.steering import Steering
from steerl.rollout.types import Rollout


def applied(policy: Policy, steering: Steering, rollout: Rollout) -> dict[str, Tensor]:
    """Per site name, the strength at each column of the decoder's sequence (B, S), 0 where nothing was edited.

    The last response token is never run, so it has 0. Sites on an encoder give (B, P).
    """
    strengths: dict[str, Tensor] = {}

    def look(_: Active, call: StackCall, stack: str) -> None:
        for site in steering.sites:
            if site.points[0].stack not in (stack, ""):
                continue
            selection = call.selections.get(site.index)
            if selection is None:
                strengths[site.name] = torch.zeros(len(call.rows), call.width)
                continue
            strength_BT = selection.strength_BT1.detach()[..., 0].expand(-1, call.width)
            if selection.mask_BT1 is not None:
                strength_BT = torch.where(selection.mask_BT1[..., 0], strength_BT, 0.0)
            strengths[site.name] = strength_BT.cpu()

    with torch.no_grad(), steering.watched(look):
        teacher_forced(policy, rollout, steering=steering)
    width = rollout.sequences_BS.shape[1]
    on_encoder = {site.name for site in steering.sites if site.points[0].stack == "encoder"}
    return {name: value if name in on_encoder else _aligned(value, rollout, width) for name, value in strengths.items()}


def _aligned(value_BT: Tensor, rollout: Rollout, width: int) -> Tensor:
    """The pass had no last column, and none of the padding that all rows share: put both back, and blank what is not real."""
    left = width - 1 - value_BT.shape[1]
    value_BS = torch.nn.functional.pad(value_BT, (left, 1))
    real_BS = rollout.sequences_mask_BS.cpu()
    return torch.where(real_BS, value_BS, 0.0)


def table(policy: Policy, steering: Steering, rollout: Rollout, row: int = 0) -> str:
    """One row as text: token by site."""
    one = rollout.select([row]).trim()
    strengths = applied(policy, steering, one)
    names = [site.name for site in steering.sites if site.points[0].stack != "encoder"]
    ids, real = one.sequences_BS[0].tolist(), one.sequences_mask_BS[0].tolist()
    index_BS, length_B = one.sequences_mask_BS.cumsum(1) - 1, one.sequences_mask_BS.sum(1) - one.lengths_B
    steps = positions.columns_of(index_BS, length_B, positions.drawn_turns(*given_columns(one))).step_BT[0].tolist()
    wide = max([8, *map(len, names)]) + 2
    lines = [f"{'token':<16}{'position':>9}{'step':>6}" + "".join(f"{name:>{wide}}" for name in names)]
    position = -1
    for column, token in enumerate(ids):
        if not real[column]:
            continue
        position += 1
        text = repr(policy.tokenizer.decode([token]))[1:-1] if policy.tokenizer is not None else str(token)
        values = [float(strengths[name][0, column]) for name in names]
        shown = "".join(f"{value:>{wide}.3f}" if value else f"{'-':>{wide}}" for value in values)
        step = steps[column]
        lines.append(f"{text[:15]:<16}{position:>9}{step if step >= 0 else '':>6}{shown}")
    return "\n".join(lines)


def edits_per_row(steering: Steering, rollout: Rollout) -> Tensor | None:
    """(B,) real tokens at which at least one site edited, without a pass; None where a gate or encoder would have to run."""
    if steering.is_encoder_decoder or any(site.gate is not None for site in steering.sites):
        return None
    call = StackCall(steering.rows_of(rollout), 0, rollout.sequences_BS.shape[1] - 1, rollout.sequences_BS[:, :-1])
    edited_BT = torch.zeros(len(rollout), call.width, dtype=torch.bool, device=rollout.device)
    for site in steering.sites:
        selection = select(site, call)
        if selection is not None and selection.mask_BT1 is not None:
            edited_BT |= selection.mask_BT1[..., 0]
    return (edited_BT & rollout.sequences_mask_BS[:, :-1]).sum(1)
