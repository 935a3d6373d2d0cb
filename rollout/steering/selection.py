"""Which positions of a call a site edits, and how strongly: the site's rules over real tokens.

Decoding one token at a time takes a short way: every row is then at the same response step, so whether and how much is
edited is a matter of one integer, and the rows' cache holds the selection from step to step. Rows at different turns are at
steps of their own: there it holds where every step is edited alike.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
    if step is not None and site.same_for_all_rows and (site.steady or rows.turns_BU2 is None):
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
    real_BT = call.index()[1]
    last = 0 if call.encoder else call.first + call.width - rows.width
    one_turn = call.encoder or rows.turns_BU2 is None
    if one_turn and where.prompt in ("none", ()) and last <= 0 and not (last == 0 and positions.in_steps(where.steps, 0)):
        return None
    strength_B, places_BN = rows.applied.strength_BK[:, site.index], rows.applied.positions_BKN[:, site.index]
    mask_BT, strength_BT = ruled(site, call.columns(), strength_B, places_BN, call.ids, in_encoder=call.encoder)
    mask_BT = mask_BT & real_BT
    if site.gate is not None:
        strength_BT = strength_BT * site.gate.openness(call)
    mask_BT = mask_BT & (strength_BT != 0)
    return SiteSelection(strength_BT[..., None], mask_BT[..., None])


def ruled(
    site: BoundSite,
    columns: positions.Columns,
    strength_B: Tensor,
    places_BN: Tensor | None = None,
    ids_BT: Tensor | None = None,
    *,
    in_encoder: bool = False,
) -> tuple[Tensor, Tensor]:
    """(which columns the site's rules select, its strength there), before gates. `places_BN`: prompt positions that a data
    column gives."""
    where, (index_BT, length_B, step_BT, next_BT, fed_BT) = site.spec.where, columns
    mask_BT = positions.select_prompt(where.prompt, index_BT, length_B, places_BN)
    if fed_BT is not None and where.prompt == "all":  # with all steps: what ends a turn, too, from which nothing is drawn
        mask_BT = mask_BT | (fed_BT if where.steps != "all" else torch.ones_like(fed_BT))
    if not in_encoder:
        mask_BT = mask_BT | positions.select_steps(where.steps, step_BT)
    if where.exclude_positions:
        mask_BT = mask_BT & ~positions.select_listed(index_BT, length_B, where.exclude_positions)
    if site.excluded_ids is not None:
        if ids_BT is None:
            raise UserError(f"site {site.name!r}: exclude.token_ids needs token ids, and the model was called with embeddings")
        mask_BT = mask_BT & ~torch.isin(ids_BT, site.excluded_ids.to(ids_BT.device))
    strength_BT = strength_B[:, None].expand_as(index_BT)
    if where.ramp is not None:
        strength_BT = strength_BT * positions.ramp_factors(where.ramp, next_BT)
    return mask_BT, strength_BT


def _one_column(site: BoundSite, rows: SteeredRows, factor: float) -> SiteSelection | None:
    strength_B = rows.applied.strength_BK[:, site.index] * factor
    if site.gate is not None:
        strength_B = strength_B * site.gate.of_rows(rows)
    plain = strength_B == 0
    if bool(plain.all()) and not strength_B.requires_grad:
        return None
    mask = None if not bool(plain.any()) else ~plain[:, None, None]
    return SiteSelection(strength_B[:, None, None], mask, unit=bool((strength_B == 1).all()), factor=factor)
