"""The weights of a vocabulary of scores: their sums, the draw from them, and the nucleus that top-p keeps.

    scores ── exp(score - top) ── sums of blocks of 256 ── cumulative sums ──> draw, log-probs, entropy

    nucleus   d = top - score       |0 . . . . . . . . . . . . 32|      up to 2,048 buckets of equal width in score
              mass per bucket       |#####:::::....              |      summed up from the likeliest
              goal p                       ^                            the one bucket in which it is reached
              inside that bucket            sort a handful of tokens    likeliest first, the lower id first among equals

The nucleus takes five passes over the scores and a sort of one bucket, where a sort of 32,000 tokens costs some thirty
times that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BLOCK = 256
_PIECE = 2**17
"""Scores in a piece: with the buffers of its size about a megabyte."""
_GROUP = 32
"""Scores in a group when the k-th largest is looked for."""
_BUCKETS, _RANGE = 2048, 32.0
"""Most buckets of a nucleus; and how many nats below the top the last one begins: what is there weighs 1e-14 of the top."""


class Space:
    """Buffers that are used again at every step: fresh memory of this size costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, int, torch.dtype], Tensor] = {}

    def get(self, name: str, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, columns), zero when new; rows only ever get fewer."""
        buffer = self.buffers.get((name, columns, dtype))
        if buffer is None or len(buffer) < rows or buffer.device != device:
            buffer = self.buffers[name, columns, dtype] = torch.zeros(rows, columns, dtype=dtype, device=device)
        return buffer[:rows]

    def like(self, name: str, tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.get(name, tensor.shape[0], tensor.shape[1], tensor.device, dtype)


class Weights:
    """exp(scores - max) in blocks of 256 with their sums: everything that draws and normalises."""

    shifted_BV: Tensor
    """Scores less the top."""

    def __init__(self, scores_BV: Tensor, space: Space, name: str = "", entropy: bool = False, truncated: bool = True):
        """`entropy`: it will be asked for, and costs least where the weights are at hand. Not `truncated`: nothing will be
        taken out, so the shifted scores are held of one piece at a time, where the products that follow overwrite them."""
        rows, size = scores_BV.shape
        self.scores_BV, self.space, self.blocks = scores_BV, space, -(-size // _BLOCK)
        self.pieces = _pieces(scores_BV)
        self.top_B1 = scores_BV.new_empty(rows, 1)
        if truncated:
            self.shifted_BV = space.like(f"{name} shifted", scores_BV)
        self.padded_BW = space.get(f"{name} weights", rows, self.blocks * _BLOCK, scores_BV.device)
        self.weights_BV = self.padded_BW[:, :size]
        sums_BN = scores_BV.new_empty(rows, self.blocks, dtype=torch.float32)
        products_BN = torch.empty_like(sums_BN) if entropy else None
        for piece in self.pieces:
            torch.amax(scores_BV[piece], dim=1, keepdim=True, out=self.top_B1[piece])
            shifted = self.shifted_BV[piece] if truncated else self._buffer(piece)[:, :size]
            torch.sub(scores_BV[piece], self.top_B1[piece], out=shifted)
            # Scores of -inf become -1e4: their weight is 0 all the same, and 0 x -1e4 is a number.
            torch.exp(shifted.clamp_(min=-1e4), out=self.weights_BV[piece])
            _block_sums(self.padded_BW[piece], out=sums_BN[piece])
            if products_BN is not None:
                self._products(piece, shifted, products_BN)
        self.expected_B = None if products_BN is None else products_BN.double().sum(dim=1)
        self._sum(sums_BN)

    @staticmethod
    def of_some(scores_BV: Tensor, keep_BV: Tensor, space: Space, name: str = "") -> Weights:
        """Of these tokens alone. The others are as good as the best of them until they are taken out: to find that the weight
        of -inf is 0 takes sixty times as long as any other."""
        top_B1 = scores_BV.masked_fill(~keep_BV, float("-inf")).amax(dim=1, keepdim=True)
        weights = Weights(torch.where(keep_BV, scores_BV, top_B1), space, name)
        weights.keep(keep_BV)
        return weights

    def _products(self, piece: slice, shifted: Tensor, products_BN: Tensor) -> None:
        """Sums of weight x score in each block."""
        products = self._buffer(piece)
        torch.mul(self.weights_BV[piece], shifted, out=products[:, : self.weights_BV.shape[1]])
        _block_sums(products, out=products_BN[piece])

    def _buffer(self, piece: slice) -> Tensor:
        """A buffer for a piece, 0 beyond the vocabulary."""
        columns, device = self.padded_BW.shape[1], self.padded_BW.device
        return self.space.get("products", self.pieces[0].stop, columns, device)[: piece.stop - piece.start]

    def _sum(self, sums_BN: Tensor) -> None:
        self.cumulative_BN = sums_BN.double().cumsum(dim=1)
        self.total_B = self.cumulative_BN[:, -1]
        self.bad_B = ~self.total_B.isfinite()  # NaN, +inf, or all of them -inf: shifted by the top, each gives NaN

    def mass_of(self, mask: Tensor, piece: slice) -> Tensor:
        """Weight of the tokens of a mask over the rows of a piece."""
        masses = self._buffer(piece)
        torch.mul(self.weights_BV[piece], mask, out=masses[:, : mask.shape[1]])
        return _block_sums(masses).double().sum(dim=1)

    def keep(self, keep_BV: Tensor) -> None:
        """Weight 0 for all others."""
        sums_BN = torch.empty(len(keep_BV), self.blocks, device=keep_BV.device)
        for piece in self.pieces:
            self.weights_BV[piece].mul_(keep_BV[piece])  # all finite, and a third of the time that `where` takes
            _block_sums(self.padded_BW[piece], out=sums_BN[piece])
        self.expected_B = None
        self._sum(sums_BN)

    def at_least(self, floor_B1: Tensor) -> Tensor:
        """True for scores no further below the top than the floor."""
        return torch.ge(self.shifted_BV, floor_B1, out=self.space.like("kept", self.shifted_BV, torch.bool))

    def draw(self, uniform_B: Tensor) -> Tensor:
        """The first token at which the cumulative weight exceeds uniform x total; one of weight 0 is never it."""
        block_B1 = _exceed(self.cumulative_BN, uniform_B * self.total_B)
        before_B = self.cumulative_BN.gather(1, (block_B1 - 1).clamp(min=0))[:, 0].masked_fill(block_B1[:, 0] == 0, 0.0)
        inside_B = self.cumulative_BN.gather(1, block_B1)[:, 0] - before_B
        blocks_BNK = self.padded_BW.view(len(uniform_B), self.blocks, _BLOCK)
        chosen_BK = blocks_BNK.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(dim=1)
        # The share of the block that is left, not the weight: the block's own sum was taken in float32.
        share_B = (uniform_B * self.total_B - before_B) / inside_B
        token_B1 = block_B1 * _BLOCK + _exceed(chosen_BK, share_B.clamp(0, 1) * chosen_BK[:, -1])
        return token_B1[:, 0].clamp(max=self.weights_BV.shape[1] - 1)  # a row of NaN must still name a token

    def logprobs(self, tokens_B: Tensor, total_B: Tensor) -> Tensor:
        """Log-probs where the weights had this total: before or after some were taken out."""
        chosen_B = self.scores_BV.gather(1, tokens_B[:, None])[:, 0].double() - self.top_B1[:, 0].double()
        return (chosen_B - total_B.log()).float()

    def entropy(self) -> Tensor:
        """log Z - E[score], of what is left."""
        if self.expected_B is None:
            products_BN = torch.empty(len(self.scores_BV), self.blocks, device=self.scores_BV.device)
            for piece in self.pieces:
                self._products(piece, self.shifted_BV[piece], products_BN)
            self.expected_B = products_BN.double().sum(dim=1)
        return (self.total_B.log() - self.expected_B / self.total_B).float()


def _pieces(table_BV: Tensor) -> list[slice]:
    """Rows that are worked on together: on a CPU as many as stay in its cache from one operation to the next."""
    rows, size = table_BV.shape
    step = max(1, rows if table_BV.device.type != "cpu" else _PIECE // size)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _block_sums(padded: Tensor, out: Tensor | None = None) -> Tensor:
    """Sums over blocks, in float32 inside a block; what is summed from there on is float64."""
    return torch.sum(padded.unflatten(1, (-1, _BLOCK)), dim=2, out=out)


def _exceed(cumulative_BN: Tensor, target_B: Tensor) -> Tensor:
    """Index of the first entry above the target, which is kept below the last: rounding never leads past the end."""
    last_B = cumulative_BN[:, -1]
    target_B = torch.minimum(target_B, torch.nextafter(last_B, torch.zeros_like(last_B)))
    return torch.searchsorted(cumulative_BN, target_B[:, None], right=True).clamp(max=cumulative_BN.shape[1] - 1)


def kth_largest(table_BV: Tensor, k: int) -> Tensor:
    """The k-th largest of each row. On a CPU only groups that can hold it are sorted: the k whose largest is largest."""
    size = table_BV.shape[1] // _GROUP
    if table_BV.device.type == "cpu" and 4 * k <= size:
        groups_BGS = table_BV[:, : size * _GROUP].unflatten(1, (_GROUP, size))
        best_BK = groups_BGS.amax(dim=1).topk(k, dim=1).indices
        inside_BGK = groups_BGS.gather(2, best_BK[:, None].expand(-1, _GROUP, -1))
        table_BV = torch.cat([inside_BGK.flatten(1), table_BV[:, size * _GROUP :]], dim=1)
    return table_BV.topk(k, dim=1).values[:, -1:]


def nucleus(weights: Weights, top_p: float) -> Tensor:
    """True for the tokens of the nucleus. Tokens of weight 0 (taken out before) are never in it."""
    keep_BV = weights.space.like("kept", weights.shifted_BV, torch.bool)
    # A mass that equals p up to float32's rounding reaches it: 0.5 + 0.3 + 0.1 of p = 0.9.
    goal_B = top_p * (1 - 1e-6) * weights.total_B
    for piece in weights.pieces:
        _of_rows(weights, piece, goal_B[piece], keep_BV[piece])
    return keep_BV


def _of_rows(weights: Weights, piece: slice, goal_B: Tensor, keep_BV: Tensor) -> None:
    """The nucleus of some rows, written into `keep_BV`."""
    shifted_BV, weights_BV = weights.shifted_BV[piece], weights.weights_BV[piece]
    rows, buckets = len(goal_B), min(_BUCKETS, shifted_BV.shape[1] // 16 + 1)
    depth_BV = torch.mul(shifted_BV, -buckets / _RANGE, out=weights.space.like("depths", shifted_BV))
    bucket_BV = weights.space.like("buckets", depth_BV, torch.int64).copy_(depth_BV).clamp_(0, buckets - 1)
    mass_BK = torch.zeros(rows, buckets, device=goal_B.device).scatter_add_(1, bucket_BV, weights_BV)
    edge_B = (mass_BK.double().cumsum(dim=1) < goal_B[:, None]).sum(dim=1).clamp(max=buckets - 1)
    for _ in range(3):
        torch.lt(bucket_BV, edge_B[:, None], out=keep_BV)
        before_B = weights.mass_of(keep_BV, piece)
        edge_BV = torch.eq(bucket_BV, edge_B[:, None], out=weights.space.like("edge", bucket_BV, torch.bool))
        row, column = edge_BV.nonzero(as_tuple=True)
        left = weights_BV[row, column] > 0
        inside = (row[left], column[left])
        place, ranked = _rank(shifted_BV[inside], inside[0], rows)
        reached_BC = before_B[:, None] + ranked.values.double().exp().cumsum(dim=1)
        # The buckets were summed in float32, one token after the other: the edge may be a bucket off.
        back_B = (before_B >= goal_B) & (edge_B > 0)
        on_B = ~back_B & (reached_BC[:, -1] < goal_B) & (edge_B < buckets - 1)
        if not bool((back_B | on_B).any()):
            break
        edge_B = edge_B - back_B.long() + on_B.long()
    needed_B1 = (reached_BC < goal_B[:, None]).sum(dim=1, keepdim=True) + 1
    width = reached_BC.shape[1]
    chosen_BC = torch.zeros_like(reached_BC, dtype=torch.bool)
    chosen_BC.scatter_(1, ranked.indices, (torch.arange(width, device=goal_B.device) < needed_B1))
    keep_BV[inside] = chosen_BC[inside[0], place]


def _rank(values: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Any]:
    """Each value's place in its row, and the rows sorted: likeliest first, the lower id first among equals."""
    counts_B = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=row.device) - (counts_B.cumsum(0) - counts_B)[row]
    table_BC = torch.full((rows, max(int(counts_B.max()), 1)), float("-inf"), device=row.device)
    table_BC[row, place] = values
    return place, table_BC.sort(dim=1, descending=True, stable=True)
