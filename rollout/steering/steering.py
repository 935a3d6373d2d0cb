"""Steering: a spec tied to a model.

    steering = Steering(model, load_spec("cheer.yaml"), tokenizer)
    applied = steering.applied(mask, row_B, sample_B, columns, policy_step=3)          # what a Rollout records
    with steering.active(prompt_mask_BP=mask, row_B=row_B, sample_B=sample_B, applied=applied) as active:
        model.generate(...)          # or a teacher-forced model(...): the same rows, the same real positions, the same edits
        active.select(keep)          # when the decode loop drops or repeats rows

Outside `active` the model is plain: its hooks look at one ContextVar and leave.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import ConfigError, DataError, UserError
from steerl.rollout.model import hooks
from steerl.rollout.model.hooks import unsteered as unsteered
from steerl.rollout.scoring.alignment import Packing
from steerl.rollout.scoring.steered import given_columns
from steerl.rollout.steering.bind import Binding, bind
from steerl.rollout.steering.core import positions
from steerl.rollout.steering.core.structure import stacks, unwrap
from steerl.rollout.steering.engine import Active, Look
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.spec.parse import load_spec
from steerl.rollout.steering.spec.spec import SteeringSpec
from steerl.rollout.steering.state import SteeredRows
from steerl.rollout.steering.strengths import column, schedule_factor, site_strength, steered_rows
from steerl.rollout.types import Rollout

REMEDY = "they were drawn under another steering, or dumped by a version that did not record it: draw them again"
"""What to do where a record lacks something."""


class Steering:
    """A steering spec at work on one model. Everything is found and checked here, before any sampling."""

    def __init__(
        self, model: nn.Module, spec: Mapping[str, object] | str | Path | SteeringSpec, tokenizer: Any = None, seed: int = 0
    ):
        self.spec = load_spec(spec)
        self.model, self.seed = unwrap(model), seed
        self.stacks = stacks(self.model)
        binding = Binding(self.model, self.stacks, tokenizer, self.spec.folder, seed, self.role == "trainable")
        problems: list[str] = []
        self.sites: list[BoundSite] = []
        for index, site_spec in enumerate(self.spec.sites):
            try:
                self.sites.append(bind(site_spec, index, binding))
            except UserError as problem:
                problems.extend(problem.lines)
        if problems:
            raise ConfigError(*problems)
        self._look: Look | None = None
        self._hash = self._digest()
        for stack in self.stacks.values():
            hooks.install_stack(stack.module)
        base: Any = getattr(self.model, "base_model", self.model)
        if all(stack.module is not base for stack in self.stacks.values()):  # a stack lies deeper, and may be run again
            for outer in (self.model, base):  # some heads call the second, some its stack
                hooks.install_model(outer)
        for site in self.sites:
            for point in site.points:
                hooks.install(point.module, point.io)
            if site.gate is not None:
                hooks.install(site.gate.point.module, "output")
        self._parameters = nn.ModuleDict()
        self._parameters.register_buffer("scale", torch.ones((), dtype=torch.float64))
        for site in self.sites:
            if site.trained is not None:
                self._parameters[f"site{site.index}"] = site.trained
            if site.gate is not None and site.gate.trained is not None:
                self._parameters[f"gate{site.index}"] = nn.ParameterList([site.gate.trained])

    # -- what it is ------------------------------------------------------------------------------------------------------

    @property
    def role(self) -> str:
        return self.spec.role

    @property
    def is_encoder_decoder(self) -> bool:
        return "encoder" in self.stacks

    @property
    def name(self) -> str:
        return self.spec.name or "+".join(site.name for site in self.sites)

    @property
    def hash(self) -> str:
        """Of the spec and of the numbers it names: another vector under the same path is another intervention."""
        return self._hash

    @property
    def label(self) -> str:
        return f"{self.name}#{self.hash}"

    @property
    def parameters_module(self) -> nn.ModuleDict:
        """What role trainable trains, as a module for optimizer, DDP and checkpoint; empty for the other roles."""
        return self._parameters

    @property
    def scale(self) -> float:
        """A factor on every strength, kept by the KL budget: a buffer, so that a checkpoint holds it."""
        return float(self._parameters.get_buffer("scale"))

    @scale.setter
    def scale(self, value: float) -> None:
        self._parameters.get_buffer("scale").fill_(value)

    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps(self.spec.mapping(), sort_keys=True, default=str).encode())
        for site in self.sites:
            named = [(name, tensor) for held in site.held for name, tensor in held.items()]
            tensors = [t for name, t in named if name == "vector"] + [t for name, t in named if name != "vector"]
            for tensor in [*tensors, *([site.gate.direction] if site.gate is not None else [])]:
                digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    # -- how strong ------------------------------------------------------------------------------------------------------

    def strengths(
        self,
        row_B: Tensor,
        sample_B: Tensor,
        columns: Mapping[str, Sequence[object]] | None = None,
        *,
        progress: float = 0.0,
        policy_step: int = 0,
    ) -> Tensor:
        """(B, K): the strength of every site on every row. 0 = the site leaves the row alone. `progress`: share of training."""
        steered_B = steered_rows(self.spec, self.seed, policy_step, row_B, sample_B)
        of_sites = []
        for site in self.sites:
            strength_B = site_strength(site.spec, site.index, self.seed, policy_step, row_B, sample_B, columns or {})
            of_sites.append(strength_B * (schedule_factor(site.spec.schedule, progress) * self.scale))
        return torch.where(steered_B[:, None], torch.stack(of_sites, dim=1), 0.0)

    def applied(
        self,
        prompt_mask_BP: Tensor,
        row_B: Tensor,
        sample_B: Tensor,
        columns: Mapping[str, Sequence[object]] | None = None,
        *,
        progress: float = 0.0,
        policy_step: int = 0,
        start_width: int = 1,
    ) -> Applied:
        """What a record has to say of these rows, so that they are steered again as they were. `start_width`: an
        encoder-decoder's decoder start."""
        columns = columns or {}
        strength_BK = self.strengths(row_B, sample_B, columns, progress=progress, policy_step=policy_step)
        listed = [self._positions(site, prompt_mask_BP, columns, start_width) for site in self.sites]
        most = max(places_BN.shape[1] for places_BN in listed)
        positions_BKN = torch.stack([pad(places_BN, (0, most - places_BN.shape[1]), value=-1) for places_BN in listed], dim=1)
        return Applied(strength_BK, positions_BKN.to(row_B.device), torch.full_like(row_B, policy_step), self.seed)

    def _positions(
        self, site: BoundSite, prompt_mask_BP: Tensor, columns: Mapping[str, Sequence[object]], start_width: int
    ) -> Tensor:
        """(B, N): the prompt positions that a data column gives the site; N = 0 where it reads none, and never else."""
        lengths_B = prompt_mask_BP.sum(1)
        if (name := site.positions_column) is None:
            return lengths_B.new_zeros(len(lengths_B), 0)
        if self.is_encoder_decoder and site.points[0].stack != "encoder":
            lengths_B = torch.full_like(lengths_B, start_width)
        return positions.places_of(column(columns, name, f"site {site.name!r}: where.prompt"), lengths_B, name)

    def lacking(self, applied: Applied) -> str | None:
        """What a record of rows does not hold that the sites need; None where they can be steered from it."""
        if (recorded := applied.strength_BK.shape[1]) != len(self.sites):
            return f"the strengths of {recorded} site(s), where {self.label} has {len(self.sites)}"
        for site in self.sites:
            lacks = ""
            if site.positions_column is not None and not applied.positions_BKN.shape[2]:
                lacks = f"no positions of site {site.name!r} (column {site.positions_column!r})"
            elif site.operation.source == "noise" and applied.steering_seed is None:
                lacks = f"no seed of the noise of site {site.name!r}"
            if lacks and bool((applied.strength_BK[:, site.index] != 0).any()):
                return lacks
        return None

    def rows_of(self, rollout: Rollout, drawn_BP: Tensor | None = None) -> SteeredRows:
        """A decoder's rollout as its sites see it. `drawn_BP`: where it is one turn of a row, the earlier ones' actions."""
        mask_BP, drawn_BP = given_columns(rollout) if drawn_BP is None else (rollout.prompt_mask_BP, drawn_BP)
        return self._rows(mask_BP, rollout.row_B, rollout.sample_B, rollout.applied, None, drawn_BP)

    def _rows(
        self,
        prompt_mask_BP: Tensor,
        row_B: Tensor,
        sample_B: Tensor,
        applied: Applied,
        encoder_mask_BP: Tensor | None,
        drawn_BP: Tensor | None,
    ) -> SteeredRows:
        """All that sites ask about the rows of a batch."""
        if (lacking := self.lacking(applied)) is not None:
            raise DataError(f"steering: the record of these rows holds {lacking}; {REMEDY}")
        turns_BU2 = positions.drawn_turns(prompt_mask_BP, drawn_BP)
        return SteeredRows(prompt_mask_BP, row_B, sample_B, applied.to(prompt_mask_BP.device), encoder_mask_BP, turns_BU2)

    # -- at work ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def active(
        self,
        *,
        prompt_mask_BP: Tensor | None = None,
        row_B: Tensor | None = None,
        sample_B: Tensor | None = None,
        columns: Mapping[str, Sequence[Any]] | None = None,
        applied: Applied | None = None,
        start_width: int = 1,
        drawn_BP: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Iterator[Active]:
        """Inside, every forward and generate of the model is steered.

        `prompt_mask_BP` is the left-padded prompt's mask (for encoder-decoders the encoder input's; `start_width` is then
        the width of the decoder's start). Without it the first call's whole input is the prompt, and so is the input of
        every later call that brings an empty cache. `applied` is what a record says of the rows, or what `applied` finds for
        new ones; without it they are steered as at step 0, with the data's `columns` where sites read them. `drawn_BP`: the
        prompt's columns that are the policy's actions of earlier turns; the first prompt is what stands before them.
        `packing`: the model is called with all rows one after another in one.
        """
        if applied is not None and columns is not None:
            raise ConfigError("steering: columns have no effect beside applied, which was made of them; leave one of them out")
        given = None if prompt_mask_BP is None or self.is_encoder_decoder else prompt_mask_BP.shape
        if drawn_BP is not None and drawn_BP.shape != given:
            raise ConfigError(
                f"steering: drawn_BP has shape {tuple(drawn_BP.shape)}; give it beside a decoder's prompt_mask_BP, as wide"
            )

        def make(decoder_mask_BP: Tensor, encoder_mask_BP: Tensor | None) -> SteeredRows:
            rows, device = decoder_mask_BP.shape[0], decoder_mask_BP.device
            rows_B = torch.arange(rows, device=device) if row_B is None else row_B.to(device)
            samples_B = torch.zeros_like(rows_B) if sample_B is None else sample_B.to(device)
            given = applied
            if given is None:
                mask_BP = decoder_mask_BP if encoder_mask_BP is None else encoder_mask_BP
                given = self.applied(mask_BP, rows_B, samples_B, columns, start_width=decoder_mask_BP.shape[1])
            return self._rows(decoder_mask_BP, rows_B, samples_B, given, encoder_mask_BP, drawn_BP)

        rows = None
        if prompt_mask_BP is not None:
            mask = prompt_mask_BP.bool()
            rows = make(mask.new_ones((mask.shape[0], start_width)), mask) if self.is_encoder_decoder else make(mask, None)
        active = Active(self.sites, rows, make, self.is_encoder_decoder, self._look, packing)
        with hooks.entered(active.frame(hooks.current(), self.stacks)):
            yield active
        if not active.calls and (active.rows is None or len(active.rows)):
            raise ConfigError(
                "steering did not run: no forward pass of the steered model was seen; "
                "call the model that Steering was made for, and make Steering before torch.compile"
            )

    @contextlib.contextmanager
    def watched(self, look: Look) -> Iterator[None]:
        """Contexts opened inside show `look(active, call, stack)` every call when its stack has run, with its selections."""
        before, self._look = self._look, look
        try:
            yield
        finally:
            self._look = before

    def generate(self, **kwargs: Any) -> Any:
        """`model.generate` with steering on, positions taken from its attention mask."""
        ids = kwargs.get("input_ids", kwargs.get("inputs"))
        mask = kwargs.get("attention_mask")
        if mask is None and isinstance(ids, Tensor):
            mask = torch.ones_like(ids)
        with self.active(prompt_mask_BP=mask):
            return self.model.generate(**kwargs)  # type: ignore[operator]
