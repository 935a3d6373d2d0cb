"""Which positions of a call a site edits, and how strongly: the site's rules over real tokens.

Decoding one token at a time takes a short way: every row is then at the same response step, so whether and how much is
edited is a matter of one integer, and the rows' cache holds the selection from step to step.
"""

from __future__ import annotations

import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.steering.core import positions
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.state import SiteSelection, StackCall, SteeredRows


def select(site: BoundSite, call: StackCall) -> SiteSelection | None:
    """The site's selection in this call; None = nothing here."""
    rows, where = call.rows, site.spec.where
    if not rows.any[site.index]:
        return None
    step = call.step
    if step is not None and site.same_for_all_rows:
        factor = 1.0
        if not site.steady:
            factor = positions.ramp_factor(where.ramp, step) if positions.in_steps(where.steps, step) else 0.0
            if factor == 0.0:
                return None
        key = (site.index, factor)
        try:
            return rows.selections[key]
        except KeyError:
            return rows.selections.setdefault(key, _one_column(site, rows, factor))
    index_BT, real_BT = call.index()
    last = 0 if call.encoder else call.first + call.width - rows.width
    if where.prompt in ("none", ()) and last <= 0 and not (last == 0 and positions.in_steps(where.steps, 0)):
        return None
    step_BT = index_BT - (call.length_B[:, None] - 1)
    mask_BT = positions.select_prompt(where.prompt, index_BT, call.length_B, rows.applied.positions_BKN[:, site.index])
    if not call.encoder:
        mask_BT = mask_BT | positions.select_steps(where.steps, step_BT)
    mask_BT = mask_BT & real_BT
    if where.exclude_positions:
        mask_BT = mask_BT & ~positions.select_listed(index_BT, call.length_B, where.exclude_positions)
    if site.excluded_ids is not None:
        if call.ids is None:
            raise UserError(f"site {site.name!r}: exclude.token_ids needs token ids, and the model was called with embeddings")
        mask_BT = mask_BT & ~torch.isin(call.ids, site.excluded_ids.to(call.ids.device))
    strength_BT = rows.applied.strength_BK[:, site.index, None].expand(-1, call.width)
    if where.ramp is not None:
        strength_BT = strength_BT * positions.ramp_factors(where.ramp, step_BT)
    if site.gate is not None:
        strength_BT = strength_BT * site.gate.openness(call)
    mask_BT = mask_BT & (strength_BT != 0)
    return SiteSelection(strength_BT[..., None], mask_BT[..., None])


def _one_column(site: BoundSite, rows: SteeredRows, factor: float) -> SiteSelection | None:
    strength_B = rows.applied.strength_BK[:, site.index] * factor
    if site.gate is not None:
        strength_B = strength_B * site.gate.of_rows(rows)
    plain = strength_B == 0
    if bool(plain.all()) and not strength_B.requires_grad:
        return None
    mask = None if not bool(plain.any()) else ~plain[:, None, None]
    return SiteSelection(strength_B[:, None, None], mask, unit=bool((strength_B == 1).all()), factor=factor)
