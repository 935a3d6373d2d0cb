"""Rows, calls and edits: what one active context holds, and what happens to an activation at a site.

    Rows        per-row facts of the batch: prompt mask, strengths, positions, gates. Replaced, never changed, by select
    Call        one forward pass of one stack: which columns it brings, which real tokens they are
    Active      a Steering at work: makes a Call when a stack is entered, checks it when it is left
    SiteEdit    one site at one layer, handed to the hook of its point

Decoding one token at a time takes a short way: every row is then at the same response step, so whether and how much is
edited is a matter of one integer, and the edit itself is kept from step to step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rollout.errors import Problem
from rollout.steering import operations, positions
from rollout.steering.hooks import Arguments, Frame
from rollout.steering.structure import Point

if TYPE_CHECKING:
    from rollout.steering.steering import BoundSite, Steering


@dataclass(frozen=True)
class Selection:
    """Where and how strongly a site edits in one call. `mask_BT1` None = everywhere."""

    strength_BT1: Tensor
    mask_BT1: Tensor | None
    unit: bool
    """Every selected strength is exactly 1."""
    kept: dict[Any, Tensor] | None = None
    """What may be kept from step to step, where the same selection holds again."""


@dataclass(eq=False)
class Rows:
    """The rows of an active context. Gates are filled in by the pass that reads the prompt."""

    prompt_mask_BP: Tensor
    row_B: Tensor
    sample_B: Tensor
    strength_B: tuple[Tensor, ...]
    """Per site."""
    places_BK: tuple[Tensor | None, ...]
    """Per site: positions from a data column."""
    encoder_mask_BP: Tensor | None = None
    gates: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    """Gates under way: sum of activations over the prompt's columns so far, and how many columns."""

    def __post_init__(self) -> None:
        self.length_B = self.prompt_mask_BP.sum(1)
        self.encoder_length_B = None if self.encoder_mask_BP is None else self.encoder_mask_BP.sum(1)
        self.any = tuple(bool((s != 0).any()) for s in self.strength_B)
        self.lead = int((self.prompt_mask_BP.cumsum(1) == 0).sum(1).min()) if len(self) else 0
        """Columns of padding on the left that all rows share."""
        self.kept: dict[Any, Any] = {}

    def __len__(self) -> int:
        return int(self.prompt_mask_BP.shape[0])

    @property
    def width(self) -> int:
        return int(self.prompt_mask_BP.shape[1])

    def select(self, index: Tensor) -> Rows:
        """The rows of `index`, in its order, with repeats."""
        index = index.to(self.row_B.device)

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return Rows(
            self.prompt_mask_BP[index], self.row_B[index], self.sample_B[index],
            tuple(s[index] for s in self.strength_B), tuple(pick(p) for p in self.places_BK), pick(self.encoder_mask_BP),
            {k: v[index] for k, v in self.gates.items()}, {k: (v[index], n) for k, (v, n) in self.sums.items()},
        )  # fmt: skip

    def without(self, columns: int) -> Rows:
        """The same rows where the caller left away that many columns of padding."""
        if not columns:
            return self
        key = ("without", columns)
        if key not in self.kept:
            self.kept[key] = dataclasses.replace(self, prompt_mask_BP=self.prompt_mask_BP[:, columns:])
        return self.kept[key]

    def times(self, factor: int) -> Rows:
        """Every row `factor` times in a row: beams, return sequences."""
        if factor == 1:
            return self
        key = ("times", factor)
        if key not in self.kept:
            index = torch.arange(len(self), device=self.row_B.device).repeat_interleave(factor)
            self.kept[key] = self.select(index)
        return self.kept[key]


class Call:
    """One forward pass of one stack."""

    __slots__ = ("_index", "encoder", "first", "ids", "rows", "selections", "tokens", "edits", "width")

    def __init__(self, rows: Rows, first: int, width: int, ids: Tensor | None, encoder: bool):
        self.rows, self.first, self.width, self.ids, self.encoder = rows, first, width, ids, encoder
        self.edits = 0
        self.selections: dict[int, Selection | None] = {}
        self.tokens: dict[int, Tensor] = {}
        """Token gates: open or not, per gate and position."""
        self._index: tuple[Tensor, Tensor] | None = None

    @property
    def mask_BP(self) -> Tensor:
        return self.rows.encoder_mask_BP if self.encoder else self.rows.prompt_mask_BP  # type: ignore[return-value]

    @property
    def length_B(self) -> Tensor:
        return self.rows.encoder_length_B if self.encoder else self.rows.length_B  # type: ignore[return-value]

    @property
    def step(self) -> int | None:
        """The response step, where this call is one column of the response: the same for every row."""
        if self.width != 1 or self.encoder or self.first < self.rows.width:
            return None
        return self.first - self.rows.width + 1

    def index(self) -> tuple[Tensor, Tensor]:
        """(real index, real) of this call's columns."""
        if self._index is None:
            self._index = positions.real_index(self.mask_BP, self.first, self.width)
        return self._index


class Active:
    """A Steering at work in one context. `select` keeps it in line with a batch whose rows leave, move or multiply."""

    def __init__(self, steering: Steering, rows: Rows | None, make: Callable[[Tensor, Tensor | None], Rows], policy_step: int):
        self.steering, self.rows, self.policy_step = steering, rows, policy_step
        self._make, self._bare = make, rows is None
        self._left_away = 0
        self.calls = 0
        self.collected: dict[str, list[Collected]] = {}
        """By site: what `collect` sites read, one record per layer and call."""

    def select(self, index: Tensor | Sequence[int]) -> None:
        """Keep the rows of `index`, in its order and with repeats, as the decode loop did with its cache."""
        if self.rows is not None:
            self.rows = self.rows.select(torch.as_tensor(index, dtype=torch.int64, device=self.rows.row_B.device))

    # -- told by the stack's hooks ---------------------------------------------------------------------------------------

    def opened(self, frame: Frame, stack: str, arguments: Arguments) -> None:
        count, width = arguments.shape()
        encoder = stack == "encoder"
        first = 0 if encoder else arguments.seen(width)
        if self._bare:
            self._adopt(stack, arguments, count, width, first)
        rows = self.rows
        assert rows is not None
        if not len(rows) or count % len(rows):
            raise Problem(
                f"steering: the {stack} was called with {count} rows, and steering is active for {len(rows)}; "
                "open the context with the batch's own rows (samples already repeated)"
            )
        if encoder and rows.encoder_mask_BP is not None and rows.encoder_mask_BP.shape[1] != width:
            raise Problem(f"steering: the encoder got {width} columns and the prompt mask has {rows.encoder_mask_BP.shape[1]}")
        if not encoder and first == 0 and rows.lead:
            self._left_away = _left_away(rows, arguments, count)
        rows = rows.without(self._left_away if rows.lead else 0).times(count // len(rows))
        frame.calls[self, stack] = frame.calls[self, ""] = Call(rows, first, width, arguments.ids(), encoder)
        self.calls += 1

    def closed(self, frame: Frame, stack: str) -> None:
        call = frame.calls.get((self, stack))
        if call is not None and not call.edits and self.steering.points_in(stack):
            raise Problem(
                "steering did not run: the model's forward passed its blocks without calling their hooks; a model compiled before "
                "Steering was made ignores them, so make Steering first, or use the model as it was before torch.compile"
            )
        if call is not None and self.steering.look is not None:
            self.steering.look(self, call, stack)

    def _adopt(self, stack: str, arguments: Arguments, count: int, width: int, first: int) -> None:
        """Without a prompt mask: the first call's input is the prompt, and so is that of every call with a fresh cache."""
        fresh = first == 0 and (self.rows is None or arguments.cache() is not None)
        if stack == "decoder" and self.steering.is_encoder_decoder:
            fresh = self.rows is None
        if not fresh and self.rows is not None:
            return
        mask = arguments.mask()
        if mask is None or mask.shape[1] != width:
            if arguments.kwargs.get("attention_mask") is not None and mask is None:
                raise Problem("steering: the attention mask is not one number per token; open the context with prompt_mask_BP")
            device = next(a for a in (*arguments.args, *arguments.kwargs.values()) if isinstance(a, Tensor)).device
            mask = torch.ones((count, width), dtype=torch.bool, device=device)
        if self.steering.is_encoder_decoder:
            self.rows = self._make(mask.new_ones((count, 1)), mask if stack == "encoder" else None)
        else:
            self.rows = self._make(mask, None)


    def collect(self, site: BoundSite, at: int, hidden: Tensor, call: Call) -> None:
        """Note what a collecting site sees at its positions."""
        selection = call.selections[site.index]
        if selection is None:
            return
        mask_BT = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if selection.mask_BT1 is not None:
            mask_BT = selection.mask_BT1[:, -hidden.shape[1] :, 0].to(hidden.device)
        index_BT = call.index()[0][:, -hidden.shape[1] :].to(hidden.device)
        row_N = call.rows.row_B.to(hidden.device)[:, None].expand_as(mask_BT)[mask_BT]
        sample_N = call.rows.sample_B.to(hidden.device)[:, None].expand_as(mask_BT)[mask_BT]
        values = operations.collect(hidden, None, site.spec.op.coordinates)[mask_BT]
        record = Collected(site.points[at].layer, row_N, sample_N, index_BT[mask_BT], values)
        self.collected.setdefault(site.name, []).append(record)


def _left_away(rows: Rows, arguments: Arguments, count: int) -> int:
    """Columns of padding that the call lacks on the left: callers trim what all rows of a part share.

    Read off the attention mask of a call that starts a sequence; a call without one has no padding at all.
    """
    mask = arguments.mask()
    if mask is None and arguments.kwargs.get("attention_mask") is not None:
        return 0  # not one number per token: columns are taken to be the prompt mask's
    theirs = torch.zeros(count, dtype=torch.int64) if mask is None else (mask.cumsum(1) == 0).sum(1).cpu()
    mine = (rows.prompt_mask_BP.cumsum(1) == 0).sum(1).cpu().repeat_interleave(count // len(rows))
    away = mine - theirs
    if bool((away != away[0]).any()) or int(away[0]) < 0:
        raise Problem(
            f"steering: the prompt mask has {mine.tolist()} columns of padding on the left and the call's attention mask "
            f"{theirs.tolist()}; open the context with the mask of the batch that is run"
        )
    return int(away[0])


@dataclass(frozen=True)
class Collected:
    """What a collecting site read in one call: N (row, sample, real position) and their activations."""

    layer: int | None
    row_N: Tensor
    sample_N: Tensor
    position_N: Tensor
    values_ND: Tensor


class SiteEdit:
    """One site at one of its layers: what the hook of that point calls."""

    __slots__ = ("active", "at", "point", "site")

    def __init__(self, active: Active, site: BoundSite, at: int, point: Point):
        self.active, self.site, self.at, self.point = active, site, at, point

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        call: Call | None = frame.calls.get((self.active, self.point.stack))
        if call is None:
            raise Problem(f"steering: site {self.site.name!r} was reached outside its model's forward; call the model, not the module")
        call.edits += 1
        number = self.site.index
        if number in call.selections:
            selection = call.selections[number]
        else:
            selection = call.selections[number] = select(self.site, call)
        if selection is None:
            return hidden
        if selection.kept is not None:
            return self._kept(selection, call, hidden)
        return self._general(selection, call, hidden)

    def _kept(self, selection: Selection, call: Call, hidden: Tensor) -> Tensor:
        """One response column. Adding a fixed vector is one addition of what was scaled before."""
        site = self.site
        if not site.additive or site.trained is not None or self.point.columns is not None or hidden.dim() != 3:
            return self._general(selection, call, hidden)
        key = (self.at, hidden.dtype, hidden.device)
        moved = selection.kept.get(key)  # type: ignore[union-attr]
        if moved is None:
            vector = site.vector(self.at, hidden)
            moved = (selection.strength_BT1.to(hidden.device) * vector).to(hidden.dtype)
            selection.kept[key] = moved  # type: ignore[index]
        edited = hidden + moved
        if selection.mask_BT1 is not None:
            edited = torch.where(selection.mask_BT1.to(hidden.device), edited, hidden)
        return edited

    def _general(self, selection: Selection, call: Call, hidden: Tensor) -> Tensor:
        shape = hidden.shape
        batch = len(call.rows)
        if hidden.dim() == 2 and shape[0] == batch * call.width:
            hidden = hidden.reshape(batch, call.width, -1)
        if hidden.dim() != 3 or hidden.shape[0] != batch or hidden.shape[1] > call.width:
            raise Problem(
                f"site {self.site.name!r}: the activation has shape {tuple(shape)}, expected ({batch}, {call.width}, width); "
                "choose a module that sees every row and position"
            )
        strength, mask = selection.strength_BT1.to(hidden.device), selection.mask_BT1
        index_BT = call.index()[0] if self.site.spec.op.type == "noise" else None
        if hidden.shape[1] < call.width:  # an output head that keeps the last columns only
            cut = hidden.shape[1]
            strength = strength[:, -cut:]
            mask = None if mask is None else mask[:, -cut:]
            index_BT = None if index_BT is None else index_BT[:, -cut:]
        columns = None if self.point.columns is None else torch.tensor(self.point.columns, device=hidden.device)
        part = hidden if columns is None else hidden[..., columns]
        edited = self.site.apply(self.at, part, strength, selection.unit, self.active, call, index_BT)
        if mask is not None:
            edited = torch.where(mask.to(hidden.device), edited, part)
        if columns is not None:
            edited = hidden.index_copy(-1, columns, edited)
        return edited.reshape(shape)


# -- which positions, how strongly ---------------------------------------------------------------------------------------------


def select(site: BoundSite, call: Call) -> Selection | None:
    """The site's selection in this call; None = nothing here."""
    rows, where = call.rows, site.spec.where
    if not rows.any[site.index]:
        return None
    step = call.step
    if step is not None and site.same_for_all_rows:
        factor = positions.ramp_factor(where.ramp, step) if positions.in_steps(where.steps, step) else 0.0
        if factor == 0.0:
            return None
        key = (site.index, factor)
        if key not in rows.kept:
            rows.kept[key] = _one_column(site, rows, factor)
        return rows.kept[key]
    index_BT, real_BT = call.index()
    last = 0 if call.encoder else call.first + call.width - rows.width
    if where.prompt in ("none", ()) and last <= 0 and not (last == 0 and positions.in_steps(where.steps, 0)):
        return None
    step_BT = index_BT - (call.length_B[:, None] - 1)
    mask_BT = positions.select_prompt(where.prompt, index_BT, call.length_B, rows.places_BK[site.index])
    if not call.encoder:
        mask_BT = mask_BT | positions.select_steps(where.steps, step_BT)
    mask_BT = mask_BT & real_BT
    if where.exclude_positions:
        mask_BT = mask_BT & ~positions.select_listed(index_BT, call.length_B, where.exclude_positions)
    if site.excluded_ids is not None:
        if call.ids is None:
            raise Problem(f"site {site.name!r}: exclude.token_ids needs token ids, and the model was called with embeddings")
        mask_BT = mask_BT & ~torch.isin(call.ids, site.excluded_ids.to(call.ids.device))
    strength_BT = rows.strength_B[site.index][:, None].expand(-1, call.width)
    if where.ramp is not None:
        strength_BT = strength_BT * positions.ramp_factors(where.ramp, step_BT)
    if site.gate is not None:
        strength_BT = strength_BT * site.gate.openness(call, site)
    mask_BT = mask_BT & (strength_BT != 0)
    return Selection(strength_BT[..., None], mask_BT[..., None], unit=False)


def _one_column(site: BoundSite, rows: Rows, factor: float) -> Selection | None:
    strength_B = rows.strength_B[site.index] * factor
    if site.gate is not None:
        strength_B = strength_B * site.gate.of_rows(rows, site)
    plain = strength_B == 0
    if bool(plain.all()) and not strength_B.requires_grad:
        return None
    mask = None if not bool(plain.any()) else ~plain[:, None, None]
    return Selection(strength_B[:, None, None], mask, unit=bool((strength_B == 1).all()), kept={})


def rows_of(
    steering: Steering,
    prompt_mask_BP: Tensor,
    encoder_mask_BP: Tensor | None,
    row_B: Tensor | None,
    sample_B: Tensor | None,
    strength_B: Sequence[Tensor],
    columns: Mapping[str, Sequence[Any]],
) -> Rows:
    count, device = prompt_mask_BP.shape[0], prompt_mask_BP.device
    row_B = torch.arange(count, device=device) if row_B is None else row_B.to(device)
    sample_B = torch.zeros_like(row_B) if sample_B is None else sample_B.to(device)
    lengths = (prompt_mask_BP if encoder_mask_BP is None else encoder_mask_BP).sum(1)
    places: list[Tensor | None] = []
    for site in steering.sites:
        rule = site.spec.where.prompt
        if isinstance(rule, dict) and "column" in rule:
            from rollout.steering.strengths import column

            values = column(columns, rule["column"], f"site {site.name!r}: where.prompt")
            on_encoder = site.points[0].stack == "encoder"
            places.append(positions.places_of(values, lengths if on_encoder else prompt_mask_BP.sum(1), rule["column"]))
        else:
            places.append(None)
    return Rows(
        prompt_mask_BP.bool(), row_B, sample_B, tuple(s.to(device) for s in strength_B), tuple(places),
        None if encoder_mask_BP is None else encoder_mask_BP.bool(),
    )  # fmt: skip
