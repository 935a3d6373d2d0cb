"""Steering inside the server: rows of several steerings and plain ones in one flat batch, each edited as its spec says.

    before block 0     which tokens each site edits, and how strongly: for every token of every steered row at once
    after a block      those of this layer are edited where they lie
    after the last     what was edited is added to each row's count

A token of the flat batch is to the rules a row of one column, so that what edits here is what edits in process: the same
spec, `selection.ruled`, `BoundSite.apply`. A row that names a steering which is not here is counted as MISSING, and whoever
asked stops.
"""

from __future__ import annotations

import inspect
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.applied import Applied
from steerl.rollout.engines.vllm.plugin import batch
from steerl.rollout.engines.vllm.plugin.rows import Row, Rows
from steerl.rollout.steering.core import positions
from steerl.rollout.steering.core.structure import Point, stacks
from steerl.rollout.steering.core.table import TABLE
from steerl.rollout.steering.selection import ruled
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.spec.parse import load_spec

MOST = 8
"""Steerings that are kept: a trainable one is new after every update, and rows of the last one may be under way."""
MISSING = -1
"""The count of a row that names a steering which the server does not have."""
Member = tuple[batch.Part, Row]


class Steers:
    """What is steered in the forward pass under way, by layer. Its hooks are on the blocks from the first steering on."""

    def __init__(self, rows: Rows):
        self.rows, self.runner = rows, rows.runner
        self.held: OrderedDict[str, tuple[list[BoundSite], int]] = OrderedDict()
        self.under_way: dict[int, list[tuple[Selected, int]]] = {}
        """By layer: what is edited there, as which of its site's points."""
        self.selected: list[Selected] = []
        self.blocks: tuple[nn.Module, ...] = ()

    def receive(self, path: str, name: str) -> dict[str, object]:
        """A steering from the file that the trainer wrote; `refused` says why it cannot act here."""
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["steerl"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        if (refused := self._refused(about)) is not None:
            return {"refused": refused}
        self._install()
        self.held[name] = _sites(about, tensors, self.blocks), about["seed"]
        self.held.move_to_end(name)
        while len(self.held) > MOST:
            self.held.popitem(last=False)
        return {}

    def _refused(self, about: dict[str, Any]) -> str | None:
        config, stack = self.runner.vllm_config, stacks(self.runner.get_model())["decoder"]
        if any(type(block).__name__ == "PPMissingLayer" for block in stack.blocks):
            return "its blocks are spread over a pipeline, where steering does not reach them; use --tensor-parallel-size"
        if config.cache_config.enable_prefix_caching:
            return "it shares prefixes between rows, which a steering tells apart; start it with --no-enable-prefix-caching"
        if not config.model_config.enforce_eager:
            return "its model is compiled, where no hook runs; start it with --enforce-eager"
        if (len(stack.blocks), stack.width) != (about["blocks"], about["width"]):
            here, there = f"{len(stack.blocks)} blocks of width {stack.width}", f"{about['blocks']} of {about['width']}"
            return f"its model has {here}, and the trainer's {there}"
        return None

    def _install(self) -> None:
        if self.blocks:
            return
        self.blocks = stacks(self.runner.get_model())["decoder"].blocks
        self.blocks[0].register_forward_pre_hook(self._begin)
        for layer, block in enumerate(self.blocks):
            block.register_forward_hook(self._hook(layer, _in_two(block)))
        self.blocks[-1].register_forward_hook(self._end)

    # -- a forward pass ----------------------------------------------------------------------------------------------------

    def _begin(self, module: nn.Module, args: object) -> None:
        self.under_way, self.selected = {}, []
        groups: dict[str, list[Member]] = defaultdict(list)
        for part in batch.parts(self.runner):
            row = self.rows.of(part.request)
            if row is not None and row.ask.steering:
                groups[row.ask.steering].append((part, row))
        for name, members in groups.items():
            sites, seed = self.held.get(name, ([], 0))
            for _, row in members:
                if len(row.ask.strengths) != len(sites) or not sites:
                    row.answer.edits = [MISSING]
            members = [(part, row) for part, row in members if row.answer.edits != [MISSING]]
            if members:
                tokens = Tokens(members, self.runner.device, seed)
                self.selected += [chosen for site in sites if (chosen := tokens.select(site)) is not None]
        for chosen in self.selected:
            for at, point in enumerate(chosen.site.points):
                assert point.layer is not None
                self.under_way.setdefault(point.layer, []).append((chosen, at))

    def _hook(self, layer: int, in_two: bool) -> Callable[[nn.Module, object, Any], object]:
        def edit(module: nn.Module, args: object, output: Any) -> object:
            if not self.under_way or (here := self.under_way.get(layer)) is None:
                return None
            hidden, put = _activation(output, in_two)
            flat = hidden.reshape(-1, hidden.shape[-1])
            for chosen, at in here:
                flat = chosen.edited(flat, at)
            return put(flat.view_as(hidden))

        return edit

    def _end(self, module: nn.Module, args: object, output: object) -> None:
        for chosen in self.selected:
            chosen.count()
        for part, row in {id(row): (part, row) for chosen in self.selected for part, row in chosen.tokens.members}.values():
            row.seen = max(row.seen, part.last + 1)
        self.under_way, self.selected = {}, []


def _in_two(block: nn.Module) -> bool:
    """Whether a block gives its activation as (what is to be added, the stream so far), which the next norm adds. Of vLLM's own
    blocks these ask whether there is a stream yet; others hand on one that nobody reads."""
    forward = type(block).forward
    return "residual" in inspect.signature(forward).parameters and "residual is None" in inspect.getsource(forward)


def _activation(output: Any, in_two: bool) -> tuple[Tensor, Callable[[Tensor], object]]:
    """(the activation that a block gives, how another one is put in its place)."""
    if isinstance(output, Tensor):
        return output, lambda new: new
    hidden, *rest = output
    if in_two and isinstance(rest[0], Tensor):
        return hidden + rest[0], lambda new: (new, torch.zeros_like(new), *rest[1:])
    return hidden, lambda new: (new, *rest)


def _sites(about: dict[str, Any], tensors: dict[str, Tensor], blocks: Sequence[nn.Module]) -> list[BoundSite]:
    """The sites of a steering, bound to the server's blocks."""
    sites = []
    for index, site in enumerate(load_spec(about["spec"]).sites):
        points, held = [], []
        for at, layer in enumerate(about["layers"][index]):
            points.append(Point(blocks[layer], "output", "decoder", layer, about["width"]))
            start = f"{index}.{at}."
            held.append({name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)})
        ids, function = about["excluded"][index], TABLE[site.op.type].function
        assert function is not None
        sites.append(BoundSite(site, index, points, held, None, function, None if ids is None else torch.tensor(ids)))
    return sites


class Tokens:
    """The tokens of all rows of one steering in this forward pass, N of B rows: each is a row of width 1."""

    def __init__(self, members: list[Member], device: torch.device, seed: int):
        self.members, self.device, self.seed = members, device, seed
        start_B, count_B, first_B, length_B, seen_B = torch.tensor(
            [(part.start, part.end - part.start, part.first, len(row.prompt), _counted(row)) for part, row in members]
        ).T
        row_N = torch.arange(len(members)).repeat_interleave(count_B)
        offset_N = torch.arange(len(row_N)) - (count_B.cumsum(0) - count_B)[row_N]
        index_N = first_B[row_N] + offset_N
        turns_BU2 = None
        if any(row.ask.turns for _, row in members):
            turns_BU2 = positions.turns_of([row.ask.turns for _, row in members], length_B.tolist())[row_N].to(device)
        self.row_N, self.index_N1 = row_N.to(device), index_N[:, None].to(device)
        self.columns = positions.columns_of(self.index_N1, length_B[row_N].to(device), turns_BU2)
        self.flat_N = (start_B[row_N] + offset_N).to(device)
        self.new_N = (index_N >= seen_B[row_N]).to(device)
        """A preempted row's tokens are read again, and counted once."""
        self.strength_NK = torch.tensor([row.ask.strengths for _, row in members]).to(device)[self.row_N]

    @cached_property
    def ids_N1(self) -> Tensor:
        ids = [i for part, row in self.members for i in (row.prompt + row.answer.ids)[part.first : part.last + 1]]
        return torch.tensor(ids, device=self.device)[:, None]

    def places_NP(self, site: int) -> Tensor | None:
        """The prompt positions that a data column gave the site."""
        listed = [row.ask.positions[site] if row.ask.positions else () for _, row in self.members]
        if not (most := max(map(len, listed))):
            return None
        table = torch.tensor([[*places, *[-1] * (most - len(places))] for places in listed])
        return table.to(self.device)[self.row_N]

    def select(self, site: BoundSite) -> Selected | None:
        """Where the site edits, and how strongly; None = nowhere."""
        ids_N1 = None if site.excluded_ids is None else self.ids_N1
        places_NP = self.places_NP(site.index) if site.positions_column is not None else None
        strength_N = self.strength_NK[:, site.index]
        mask_N1, strength_N1 = ruled(site, self.columns, strength_N, places_NP, ids_N1)
        mask_N1 = mask_N1 & (strength_N1 != 0)
        at_M = mask_N1[:, 0].nonzero()[:, 0]
        return Selected(site, self, at_M, strength_N1[at_M]) if len(at_M) else None

    def keys(self, at_M: Tensor) -> tuple[Applied, Tensor, Tensor]:
        """(how they are steered, row, sample) of tokens, which decide the noise there."""
        key_B3 = torch.tensor(
            [(row.ask.noise_step, row.ask.row, row.ask.sample) for _, row in self.members], device=self.device
        )
        step_M, row_M, sample_M = key_B3[self.row_N[at_M]].T
        return Applied(self.strength_NK[at_M], at_M[:, None, None], step_M, self.seed), row_M, sample_M


@dataclass
class Selected:
    """What one site edits in this forward pass: M of the tokens."""

    site: BoundSite
    tokens: Tokens
    at_M: Tensor
    strength_M1: Tensor
    ran: int = 0
    """Layers at which it did."""

    def edited(self, flat_ND: Tensor, at: int) -> Tensor:
        tokens, site = self.tokens, self.site
        flat_M, everything = tokens.flat_N[self.at_M], len(self.at_M) == len(flat_ND)
        base_MD = flat_ND if everything else flat_ND[flat_M]
        noise = None
        if site.operation.source == "noise":
            index_M1 = tokens.index_N1[self.at_M]
            noise = site.noise(at, *tokens.keys(self.at_M), index_M1, base_MD.shape[-1])[:, 0]
        new_MD = site.apply(at, base_MD, self.strength_M1, noise=noise)
        self.ran += 1
        return new_MD if everything else flat_ND.index_copy(0, flat_M, new_MD)

    def count(self) -> None:
        tokens = self.tokens
        row_M = tokens.row_N[self.at_M[tokens.new_N[self.at_M]]]
        for (_, row), count in zip(tokens.members, row_M.bincount(minlength=len(tokens.members)).tolist(), strict=True):
            row.answer.edits[self.site.index] += count * self.ran


def _counted(row: Row) -> int:
    """Positions before this one are counted already; of a row that has ended none is any more."""
    return 1 << 62 if row.ended else row.seen
