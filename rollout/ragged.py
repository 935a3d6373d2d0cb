"""Lists of unequal lengths as tensors: left-padded prompts, right-padded responses, and the ids that could be drawn.

[[5], [4, 5]]  --left_pad-->  . 5      --table-->  5 .       Kept: a list of ids for each token of each row, one after
                              4 5                  4 5             another, and how many of them belong to which token
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from steerl.rollout.common.errors import UserError

Lists = Sequence[Sequence[Any] | Tensor]
"""A list for each row, as long as the row's own tokens."""


def left_pad(ids: Lists, pad_id: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(prompt_BP, prompt_mask_BP) of token lists, whatever side the tokenizer would pad on."""
    prompt_BP = table(ids, torch.int64, "left", pad_id)
    width, lengths_B = prompt_BP.shape[1], torch.tensor([len(row) for row in ids], dtype=torch.int64)
    return prompt_BP.to(device), (torch.arange(width)[None] >= width - lengths_B[:, None]).to(device)


def table(lists: Lists, dtype: torch.dtype, side: str = "right", fill: int = 0) -> Tensor:
    """(B, longest): the lists with `fill` on one side."""
    rows = [torch.as_tensor(row, dtype=dtype) for row in lists]
    return pad_sequence(rows, True, fill, side) if rows else torch.zeros(0, 0, dtype=dtype)


def runs(mask_BT: Tensor) -> list[list[tuple[int, int]]]:
    """Of each row where it is true, as (first, one past the last)."""
    edges = pad(mask_BT.int(), (1, 1)).diff(dim=1).cpu()
    starts, ends = ([row.nonzero()[:, 0].tolist() for row in edges == sign] for sign in (1, -1))
    return [list(zip(*row, strict=True)) for row in zip(starts, ends, strict=True)]


def listed(mask_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The ids of a mask, row after row, and how many each row has; none and 0 for a row of all ids."""
    row, ids = _true(mask_NV)
    counts_N = torch.bincount(row, minlength=len(mask_NV))
    some_N = counts_N < mask_NV.shape[1]
    return ids[some_N[row]].int(), torch.where(some_N, counts_N, 0)


def _true(mask_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is true. On a CPU they are looked for eight at a time where that finds few: most of the time
    is the search."""
    flat, size = mask_NV.flatten(), mask_NV.shape[1]
    if flat.device.type == "cpu" and flat.storage_offset() % 8 == len(flat) % 8 == 0:
        eights = flat.view(torch.int64).nonzero()[:, 0]
        if 64 * len(eights) <= len(flat):
            at, place = flat.view(-1, 8)[eights].nonzero(as_tuple=True)
            found = eights[at] * 8 + place
            return found // size, found % size
    return mask_NV.nonzero(as_tuple=True)  # type: ignore[return-value]


@dataclass(frozen=True)
class Kept:
    """The ids that could be drawn at each action, where the sampler truncates (top-k, top-p, min-p): a ragged list of lists.

    The policy's distribution is then that over these ids: old, new, reference and entropy alike."""

    ids: Tensor
    """int32, row after row and action after action."""
    counts_BR: Tensor
    """How many of them belong to each token of the response; 0 = all of the vocabulary could be drawn, or it is no action."""

    def __post_init__(self) -> None:
        if int(self.counts_BR.sum()) != len(self.ids):
            raise UserError(f"Kept.ids: expected {int(self.counts_BR.sum())} ids as counts_BR says, found {len(self.ids)}")

    @staticmethod
    def of_lists(lists: Sequence[Sequence[Sequence[int]]], device: torch.device | str = "cpu") -> Kept:
        """`lists[row][t]`: the ids that could be drawn there."""
        ids = [i for row in lists for places in row for i in places]
        counts_BR = table([[len(places) for places in row] for row in lists], torch.int64)
        return Kept(torch.tensor(ids, dtype=torch.int32, device=device), counts_BR.to(device))

    @staticmethod
    def of_steps(steps: Sequence[tuple[Tensor, Tensor]], width: int) -> Kept:
        """`steps[t]`: the ids of all rows at token t, row after row, and how many belong to which."""
        ids, counts_RB = torch.cat([ids for ids, _ in steps]), torch.stack([counts_B for _, counts_B in steps])
        place_BR = torch.arange(counts_RB.numel(), device=ids.device).view(counts_RB.shape).T
        by_row = Kept(Kept(ids, counts_RB)._at(place_BR.flatten())[0], counts_RB.T)
        return by_row.widened(width)

    def lists(self) -> list[list[list[int]]]:
        """A list of ids for each token of each row."""
        rows = iter(self.ids.split(self.counts_BR.flatten().tolist()))
        return [[next(rows).tolist() for _ in range(self.counts_BR.shape[1])] for _ in range(len(self.counts_BR))]

    def mask(self, place_N: Tensor, vocabulary: int) -> Tensor:
        """(N, V): what could be drawn at these places of the flattened (B, R)."""
        ids, counts_N = self._at(place_N)
        rows_N = torch.arange(len(place_N), device=place_N.device)
        mask_NV = (counts_N == 0)[:, None].repeat(1, vocabulary)
        mask_NV[rows_N.repeat_interleave(counts_N), ids.long()] = True
        return mask_NV

    def _at(self, place_N: Tensor) -> tuple[Tensor, Tensor]:
        """The ids at these places, one place after another, and how many each has."""
        counts = self.counts_BR.flatten()
        counts_N, first_N = counts[place_N], (counts.cumsum(0) - counts)[place_N]
        offset = torch.arange(int(counts_N.sum()), device=place_N.device)
        return self.ids[offset + (first_N - counts_N.cumsum(0) + counts_N).repeat_interleave(counts_N)], counts_N

    def select(self, index: Tensor) -> Kept:
        width = self.counts_BR.shape[1]
        place_BR = index[:, None] * width + torch.arange(width, device=index.device)
        return Kept(self._at(place_BR.flatten())[0], self.counts_BR[index])

    def widened(self, width: int) -> Kept:
        """To another response width. What is cut off is empty."""
        return Kept(self.ids, pad(self.counts_BR, (0, width - self.counts_BR.shape[1])))

    def to(self, device: torch.device | str) -> Kept:
        return Kept(self.ids.to(device), self.counts_BR.to(device))
