"""Rows and calls: the per-row facts of a batch at work, and one forward pass of one stack over them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from steerl.rollout.steering.core import positions
from steerl.rollout.steering.strengths import column
from torch import Tensor

if TYPE_CHECKING:
    from steerl.rollout.steering.selection import Selection
    from steerl.rollout.steering.steering import Steering


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
        self.count, self.width = (int(size) for size in self.prompt_mask_BP.shape)
        self.length_B = self.prompt_mask_BP.sum(1)
        self.encoder_length_B = None if self.encoder_mask_BP is None else self.encoder_mask_BP.sum(1)
        self.any = tuple(bool((s != 0).any()) for s in self.strength_B)
        self.lead = int((self.prompt_mask_BP.cumsum(1) == 0).sum(1).min()) if self.count else 0
        """Columns of padding on the left that all rows share."""
        self.kept: dict[Any, Any] = {}

    def __len__(self) -> int:
        return self.count

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

    __slots__ = ("_index", "encoder", "first", "ids", "rows", "selections", "step", "tokens", "edits", "width")

    def __init__(self, rows: Rows, first: int, width: int, ids: Tensor | None, encoder: bool):
        self.rows, self.first, self.width, self.ids, self.encoder = rows, first, width, ids, encoder
        self.step = first - rows.width + 1 if width == 1 and first >= rows.width and not encoder else None
        """The response step, where this call is one column of the response: the same for every row."""
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

    def index(self) -> tuple[Tensor, Tensor]:
        """(real index, real) of this call's columns."""
        if self._index is None:
            self._index = positions.real_index(self.mask_BP, self.first, self.width)
        return self._index


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
            values = column(columns, rule["column"], f"site {site.name!r}: where.prompt")
            on_encoder = site.points[0].stack == "encoder"
            places.append(positions.places_of(values, lengths if on_encoder else prompt_mask_BP.sum(1), rule["column"]))
        else:
            places.append(None)
    return Rows(
        prompt_mask_BP.bool(), row_B, sample_B, tuple(s.to(device) for s in strength_B), tuple(places),
        None if encoder_mask_BP is None else encoder_mask_BP.bool(),
    )  # fmt: skip
