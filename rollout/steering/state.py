"""The state of a steered pass, as plain records: the rows at work, a call of a stack over them, where a site edits in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.scoring.alignment import Packing
from steerl.rollout.steering.core import positions


@dataclass(eq=False)
class SteeredRows:
    """The rows of an active context. Gates are filled in by the pass that reads the prompt."""

    prompt_mask_BP: Tensor
    row_B: Tensor
    sample_B: Tensor
    applied: Applied
    encoder_mask_BP: Tensor | None = None
    turns_BU2: Tensor | None = None
    """Where the prompt holds earlier turns: positions.drawn_turns."""
    gates: dict[int, Tensor] = field(default_factory=dict)
    sums: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    """Gates under way: sum of activations over the prompt's columns so far, and how many columns."""

    def __post_init__(self) -> None:
        self.count, self.width = (int(size) for size in self.prompt_mask_BP.shape)
        self.length_B = self.prompt_mask_BP.sum(1) if self.turns_BU2 is None else self.turns_BU2[:, 0, 0]
        """The real tokens of the first prompt."""
        self.encoder_length_B = None if self.encoder_mask_BP is None else self.encoder_mask_BP.sum(1)
        self.any: list[bool] = (self.applied.strength_BK != 0).any(0).tolist()
        """Of each site, whether it acts on any row."""
        self.lead = int((self.prompt_mask_BP.cumsum(1) == 0).sum(1).min()) if self.count else 0
        """Columns of padding on the left that all rows share."""
        # All that holds from call to call while these rows stay: made once, dropped with them and when a gate settles.
        self.made: dict[tuple[str, int], SteeredRows] = {}
        """Rows made of these: ("without", columns), ("times", factor)."""
        self.selections: dict[tuple[int, float], SiteSelection | None] = {}
        """In a response column, by site and factor."""
        self.additions: dict[tuple[int, float | None, int], HeldAddition] = {}
        """What such a selection comes to, by site, factor and point."""

    def forget(self) -> None:
        """All that was held is out of date."""
        self.made.clear()
        self.selections.clear()
        self.additions.clear()

    def __len__(self) -> int:
        return self.count

    def select(self, index: Tensor) -> SteeredRows:
        """The rows of `index`, in its order, with repeats."""
        index = index.to(self.row_B.device)

        def pick(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[index]

        return SteeredRows(
            self.prompt_mask_BP[index], self.row_B[index], self.sample_B[index],
            self.applied.select(index), pick(self.encoder_mask_BP), pick(self.turns_BU2),
            {k: v[index] for k, v in self.gates.items()}, {k: (v[index], n) for k, (v, n) in self.sums.items()},
        )  # fmt: skip

    def without(self, columns: int) -> SteeredRows:
        """The same rows where the caller left away that many columns of padding."""
        if not columns:
            return self
        key = ("without", columns)
        if key not in self.made:
            self.made[key] = dataclasses.replace(self, prompt_mask_BP=self.prompt_mask_BP[:, columns:])
        return self.made[key]

    def times(self, factor: int) -> SteeredRows:
        """Every row `factor` times in a row: beams, return sequences."""
        if factor == 1:
            return self
        key = ("times", factor)
        if key not in self.made:
            index = torch.arange(len(self), device=self.row_B.device).repeat_interleave(factor)
            self.made[key] = self.select(index)
        return self.made[key]


@dataclass(frozen=True)
class SiteSelection:
    """Where and how strongly a site edits in one call. `mask_BT1` None = everywhere."""

    strength_BT1: Tensor
    mask_BT1: Tensor | None
    unit: bool = False
    """Every selected strength is exactly 1."""
    factor: float | None = None
    """Of a response column, which the rows' cache holds it for; None where it holds for this call alone."""


class HeldAddition:
    """An addition that holds from step to step."""

    __slots__ = ("mask_B11", "moved_B1D")

    def __init__(self, moved_B1D: Tensor, mask_B11: Tensor | None):
        self.moved_B1D, self.mask_B11 = moved_B1D, mask_B11

    def __call__(self, frame: object, hidden: Tensor) -> Tensor:
        edited = hidden + self.moved_B1D
        return edited if self.mask_B11 is None else torch.where(self.mask_B11, edited, hidden)


class StackCall:
    """One forward pass of one stack."""

    __slots__ = (
        "_columns",
        "_index",
        "edits",
        "encoder",
        "first",
        "ids",
        "packing",
        "rows",
        "selections",
        "step",
        "token_gates",
        "width",
    )

    def __init__(
        self,
        rows: SteeredRows,
        first: int,
        width: int,
        ids: Tensor | None,
        encoder: bool = False,
        packing: Packing | None = None,
    ):
        self.packing = packing
        """Where its activations have all rows in one."""
        self.rows, self.first, self.width, self.ids, self.encoder = rows, first, width, ids, encoder
        self.step = first - rows.width + 1 if width == 1 and first >= rows.width and not encoder else None
        """The token that is drawn, where this call is one column of the response: the same for every row, and in a row's first
        turn its step."""
        self.edits = 0
        self.selections: dict[int, SiteSelection | None] = {}
        """By site, for all of its layers; None = nothing here."""
        self.token_gates: dict[int, Tensor] = {}
        """Gates on tokens: how open, per gate and position."""
        self._index: tuple[Tensor, Tensor] | None = None
        self._columns: positions.Columns | None = None

    @property
    def mask_BP(self) -> Tensor:
        return self.rows.encoder_mask_BP if self.encoder else self.rows.prompt_mask_BP  # type: ignore[return-value]

    @property
    def length_B(self) -> Tensor:
        return self.rows.encoder_length_B if self.encoder else self.rows.length_B  # type: ignore[return-value]

    @property
    def first_prompt_BP(self) -> Tensor:
        """The mask of what was there before the first action, without the columns after it."""
        if self.encoder or self.rows.turns_BU2 is None:
            return self.mask_BP
        mask_BP = self.mask_BP & (self.mask_BP.cumsum(1) <= self.length_B[:, None])
        return mask_BP[:, : int(mask_BP.any(0).nonzero().max()) + 1]

    def index(self) -> tuple[Tensor, Tensor]:
        """(real index, real) of this call's columns."""
        if self._index is None:
            self._index = positions.real_index(self.mask_BP, self.first, self.width)
        return self._index

    def columns(self) -> positions.Columns:
        """What the sites' rules ask of them."""
        if self._columns is None:
            turns_BU2 = None if self.encoder else self.rows.turns_BU2
            self._columns = positions.columns_of(self.index()[0], self.length_B, turns_BU2)
        return self._columns
