"""A site tied to a model: its points, vectors and parameters found and checked, its operation ready to be applied."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rollout.errors import Problem
from rollout.steering import learned, operations, strengths, vectors
from rollout.steering.engine import Active, Call, Rows
from rollout.steering.hooks import Frame
from rollout.steering.spec import DIRECTION, LEARNED, SPACE, WITHOUT_VECTOR, Gate, Site
from rollout.steering.structure import Point, Stack, locate

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x, "relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh,
}  # fmt: skip
_NATIVE = ("add", "subtract", "noise", "ablate", "rotate", "renormalise", "function")
"""Operations whose own formula takes the strength; the others are mixed in: h + a (op(h) - h)."""


@dataclass(eq=False)
class BoundSite:
    """One site of the spec on one model. `at` is the index of a point (a layer) of this site."""

    spec: Site
    index: int
    points: list[Point]
    vectors: list[Tensor] | None
    parameters: list[dict[str, Tensor]] | None
    trained: learned.Parameters | None
    excluded_ids: Tensor | None
    function: Callable[..., Tensor] | None
    gate: BoundGate | None
    seed: int
    _placed: dict[Any, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def additive(self) -> bool:
        """Plainly h + a v: the edit can be scaled once and kept."""
        return self.spec.op.type == "add" and not self.spec.strength.norm_match and self.spec.op.coordinates is None

    @property
    def same_for_all_rows(self) -> bool:
        """In a response column, every row is selected alike (strengths may differ)."""
        where = self.spec.where
        token_gate = self.gate is not None and self.gate.spec.on == "token"
        return not (where.exclude_tokens or where.exclude_positions or token_gate or isinstance(where.prompt, tuple))

    def vector(self, at: int, like: Tensor) -> Tensor:
        """The site's vector at a point, float32 on the activation's device."""
        if self.trained is not None:
            return self.trained.layers[at].vector.to(like.device)  # type: ignore[union-attr, return-value]
        assert self.vectors is not None
        key = (at, like.device)
        if key not in self._placed:
            self._placed[key] = self.vectors[at].to(like.device)
        return self._placed[key]

    def tensors(self, at: int, like: Tensor) -> list[Tensor]:
        """The operation's parameters at a point, in the order in which its function takes them."""
        names = learned.PARAMETERS[self.spec.op.type]
        if self.trained is not None:
            return [t.to(like.device) for t in self.trained.layers[at].tensors(names)]  # type: ignore[union-attr, operator]
        assert self.parameters is not None
        key = ("parameters", at, like.device)
        if key not in self._placed:
            self._placed[key] = [self.parameters[at][name].to(like.device) for name in names]
        return self._placed[key]

    def apply(
        self, at: int, base: Tensor, strength: Tensor, unit: bool, active: Active, call: Call, index_BT: Tensor | None
    ) -> Tensor:
        """The edited activation at every position; the caller keeps it where the site selects."""
        op = self.spec.op
        if op.type == "collect":
            active.collect(self, at, base, call)
            return base
        if op.type in _NATIVE:
            return self._native(at, base, strength, active, call, index_BT)
        new = self._whole(at, base)
        if unit:
            return new
        mixed = operations.wide(base) + strength * (operations.wide(new) - operations.wide(base))
        return torch.where(strength == 1, new, mixed.to(base.dtype))

    def _native(
        self, at: int, base: Tensor, strength: Tensor, active: Active, call: Call, index_BT: Tensor | None
    ) -> Tensor:
        op = self.spec.op
        if op.type == "noise":
            assert index_BT is not None
            rows = call.rows
            drawn = strengths.keyed_normals(
                self.seed, 4096 + 64 * self.index + at, active.policy_step, rows.row_B, rows.sample_B, index_BT, base.shape[-1]
            )
            return operations.noise(base, drawn.to(base.device), strength, op.coordinates)
        if op.type == "function":
            assert self.function is not None
            source = self.vector(at, base) if self.vectors is not None else None
            new = self.function(base, source, strength)
            if not isinstance(new, Tensor) or new.shape != base.shape:
                found = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise Problem(f"site {self.name!r}: {op.function} gave {found}; expected a tensor of shape {tuple(base.shape)}")
            return new.to(base.dtype)
        source = self.vector(at, base)
        self._check_width(source, base)
        if self.spec.strength.norm_match:
            length = operations.wide(base).norm(dim=-1, keepdim=True)
            strength = strength * length / source.norm().clamp_min(torch.finfo(source.dtype).tiny)
        if op.type == "add":
            return operations.add(base, source, strength, op.coordinates)
        if op.type == "subtract":
            return operations.subtract(base, source, strength, op.coordinates)
        return {"ablate": operations.ablate, "rotate": operations.rotate, "renormalise": operations.renormalise}[op.type](
            base, source, strength
        )

    def _whole(self, at: int, base: Tensor) -> Tensor:
        """Operations at full strength."""
        op = self.spec.op
        if op.type == "zero":
            return operations.zero(base, None, op.coordinates)
        if op.type == "scale":
            return operations.scale(base, None, op.factor, op.coordinates)
        if op.type in LEARNED:
            act = {"act": _ACTIVATIONS[op.act]} if op.act else {}
            return getattr(operations, op.type)(base, None, *self.tensors(at, base), **act)
        source = self.vector(at, base)
        self._check_width(source, base)
        if op.type in ("set", "vanilla"):
            return operations.vanilla(base, source, op.coordinates)
        if op.type == "project":
            return operations.project(base, source)
        if op.type == "clamp":
            return operations.clamp(base, source, op.value)
        parameters = self.tensors(at, base)
        if op.type == "boundless":
            return operations.boundless(base, source, *parameters, op.boundary, op.temperature)
        if op.type in ("sigmoid_mask", "sigmoid_mask_rotated"):
            return getattr(operations, op.type)(base, source, *parameters, op.temperature)
        extra = {"residual": op.residual} if op.type in ("autoencoder", "jumprelu") else {}
        return getattr(operations, op.type)(base, source, *parameters, coordinates=op.coordinates, **extra)

    def _check_width(self, source: Tensor, base: Tensor) -> None:
        if source.shape[-1] != base.shape[-1]:
            raise Problem(
                f"site {self.name!r}: its vector is {source.shape[-1]} wide, and the activation at {self.spec.at.module or 'its layer'} "
                f"is {base.shape[-1]} wide; it was made for another model or component"
            )


@dataclass(eq=False)
class BoundGate:
    """Reads an earlier block's output and says how open each row (or token) is: 1 and 0, or between them for sigmoid."""

    spec: Gate
    index: int
    point: Point
    direction: Tensor
    trained: nn.Parameter | None = None

    def score(self, x: Tensor) -> Tensor:
        """How open for activations x (..., D)."""
        u = (self.direction if self.trained is None else self.trained).to(x.device)
        h, u, along = operations._unit(x, u)
        value = along[..., 0]
        if self.spec.type != "projection":
            value = value / h.norm(dim=-1).clamp_min(torch.finfo(h.dtype).tiny)
        if self.spec.type == "sigmoid":
            return torch.sigmoid(self.spec.scale * (value - (self.spec.open_above or 0.0)))
        opened = value > self.spec.open_above if self.spec.open_above is not None else value < self.spec.open_below  # type: ignore[operator]
        return opened.to(torch.float32)

    def read(self, active: Active, frame: Frame, hidden: Tensor) -> None:
        """Called where the gate's block has run: note openness for the sites that come after."""
        call: Call = frame.calls[active, self.point.stack]
        if self.spec.on == "token":
            call.tokens[self.index] = self.score(hidden)
            return
        rows, width = call.rows, int(call.mask_BP.shape[1])
        if call.first >= width:
            return
        inside = call.mask_BP[:, call.first : call.first + call.width]
        part = operations.wide(hidden[:, : inside.shape[1]])
        ends = call.first + call.width >= width
        if self.spec.on == "prompt_last":
            if ends:
                self._settle(rows, self.score(part[:, -1]))
            return
        total = torch.where(inside[..., None].to(part.device), part, torch.zeros_like(part)).sum(1)
        if call.first:
            before, columns = rows.sums.get(self.index, (None, -1))
            if columns != call.first:
                raise Problem("steering: a gate over the prompt's mean missed a part of the prompt; prefill it in order")
            total = total + before
        rows.sums[self.index] = (total, call.first + call.width)
        if ends:
            self._settle(rows, self.score(total / call.length_B.to(total.device)[:, None].clamp_min(1)))

    def _settle(self, rows: Rows, open_B: Tensor) -> None:
        rows.gates[self.index] = open_B
        rows.kept.clear()

    def of_rows(self, rows: Rows, site: BoundSite) -> Tensor:
        if self.index not in rows.gates:
            raise Problem(
                f"site {site.name!r}: its gate is not known yet at this point (it reads the whole prompt first); "
                "prefill the prompt in one piece, or use gate.on: token"
            )
        return rows.gates[self.index].to(rows.row_B.device)

    def openness(self, call: Call, site: BoundSite) -> Tensor:
        """(B, 1) or (B, T)."""
        if self.spec.on == "token":
            return call.tokens[self.index].to(call.rows.row_B.device)
        return self.of_rows(call.rows, site)[:, None]


# -- tying a spec's site to a model ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Binding:
    """What tying needs to know of the model and its surroundings."""

    model: nn.Module
    stacks: dict[str, Stack]
    tokenizer: Any
    folder: str
    seed: int
    trainable: bool


def bind(site: Site, index: int, to: Binding) -> BoundSite:
    who = f"sites[{index}]"
    try:
        points = locate(to.model, site.at, to.stacks)
    except Problem as problem:
        raise Problem(*(f"{who}.{line}" if line.startswith("at.") else line for line in problem.lines)) from problem
    op = site.op
    vectors_found = None
    if site.vector is not None and op.type not in LEARNED:
        vectors_found = read_vectors(site.vector, points, f"{who}.vector", to, site)
        for layer, vector in zip((p.layer for p in points), vectors_found, strict=True):
            needs_length = op.type in DIRECTION or op.type in ("add", "subtract")
            if needs_length and not to.trainable and not bool(vector.any()):
                raise Problem(f"{who}.vector: all zeros at layer {layer}; it would change nothing")
    _check_coordinates(site, points, who, to)
    parameters, trained = _parameters(site, points, who, to), None
    if to.trainable and (op.type in LEARNED or vectors_found is not None):
        per_layer = parameters if op.type in LEARNED else [{"vector": v} for v in vectors_found or []]
        if op.type not in LEARNED and op.type in SPACE:
            raise Problem(f"{who}.op: role trainable trains vectors and learned operations, not the space of {op.type}")
        trained = learned.Parameters(per_layer or [])
    return BoundSite(
        site, index, points, vectors_found, parameters, trained, _excluded(site, who, to), _function(site, who, to),
        bind_gate(site, index, points, to), to.seed,
    )  # fmt: skip


def read_vectors(raw: dict[str, Any], points: list[Point], who: str, to: Binding, site: Site) -> list[Tensor]:
    """The vector of each point, from wherever the spec takes it."""
    widths, layers = [p.width for p in points], [p.layer for p in points]
    if "init" in raw:
        if None in widths:
            raise Problem(f"{who}.init: the width at module {site.at.module!r} cannot be told; give values")
        generator = torch.Generator().manual_seed(to.seed * 1000 + 1)
        if raw["init"] == "zeros":
            return [torch.zeros(int(w or 0)) for w in widths]
        return [float(raw.get("std", 0.02)) * torch.randn(int(w or 0), generator=generator) for w in widths]
    if "values" in raw:
        try:
            values = torch.tensor(raw["values"], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise Problem(f"{who}: expected numbers, or one list of numbers per layer ({error})") from error
        if values.dim() == 2 and values.shape[0] == len(points):
            named = {str(layer if layer is not None else i): v for i, (layer, v) in enumerate(zip(layers, values, strict=True))}
            found = vectors.per_layer(named, layers, widths, who, "values") if None not in layers else list(values)
        else:
            found = vectors.per_layer({"vector": values}, layers, widths, who, "values")
    elif "mean_diff" in raw:
        from rollout.steering.extract import mean_difference_of

        found = mean_difference_of(to.model, to.tokenizer, path_of(raw["mean_diff"], to), points, who)
    else:
        path = path_of(raw.get("file") or raw.get("folder"), to)
        tensors, _ = vectors.read_tensors(path, who)
        found = vectors.per_layer(tensors, layers, widths, who, path, raw.get("key") or "")
    if raw.get("normalise"):
        found = [v / v.norm().clamp_min(torch.finfo(v.dtype).tiny) for v in found]
    return found


def path_of(raw: Any, to: Binding) -> Path:
    """Relative to the spec's file where it came from one and the path is there; else to the current folder."""
    path = Path(str(raw)).expanduser()
    beside = Path(to.folder) / path
    return beside if to.folder and not path.is_absolute() and beside.exists() else path


def _parameters(site: Site, points: list[Point], who: str, to: Binding) -> list[dict[str, Tensor]] | None:
    op = site.op
    if op.type not in learned.PARAMETERS:
        return None
    if any(p.width is None for p in points):
        raise Problem(f"{who}.at: the width at module {site.at.module!r} cannot be told; choose a block or a linear layer")
    widths, layers = [int(p.width or 0) for p in points], [p.layer for p in points]
    raw = {"file": op.params} if op.params else site.vector if op.type in LEARNED else None
    if raw is None or "init" in raw:
        if not to.trainable:
            raise Problem(f"{who}.vector: op {op.type} needs its parameters from a file; only role trainable starts without")
        generator = torch.Generator().manual_seed(to.seed * 1000 + 1)
        return [learned.fresh_parameters(op, width, generator) for width in widths]
    source = raw.get("file") or raw.get("folder")
    if source is None:
        raise Problem(f"{who}.vector: op {op.type} reads its parameters from {{file: ...}}, found {sorted(raw)}")
    path = path_of(source, to)
    tensors, _ = vectors.read_tensors(path, f"{who}.params")
    return learned.read_parameters(op, tensors, layers, widths, f"{who}.params", str(path))


def _check_coordinates(site: Site, points: list[Point], who: str, to: Binding) -> None:
    if site.op.coordinates is None or site.op.type in SPACE:
        return
    for point in points:
        if point.width is not None and max(site.op.coordinates) >= point.width:
            raise Problem(f"{who}.op.coordinates: {max(site.op.coordinates)} is out of range; the activation is {point.width} wide")


def _excluded(site: Site, who: str, to: Binding) -> Tensor | None:
    if not site.where.exclude_tokens:
        return None
    ids: list[int] = []
    generation = getattr(to.model, "generation_config", None)
    for token in site.where.exclude_tokens:
        if isinstance(token, int):
            ids.append(token)
            continue
        known = None
        if token in ("eos", "bos", "pad", "unk", "sep", "cls"):
            for holder in (to.tokenizer, generation, to.model.config):
                known = known if known is not None else getattr(holder, f"{token}_token_id", None)
        elif to.tokenizer is not None:
            known = to.tokenizer.convert_tokens_to_ids(token)
            if known == getattr(to.tokenizer, "unk_token_id", None):
                known = None
        if known is None:
            raise Problem(f"{who}.where.exclude.token_ids: {token!r} is not a token here; give its id")
        ids.extend(known if isinstance(known, list) else [known])
    return torch.tensor(ids, dtype=torch.int64)


def _function(site: Site, who: str, to: Binding) -> Callable[..., Tensor] | None:
    if site.op.type != "function":
        return None
    file, name = site.op.function.rsplit(":", 1)
    path = path_of(file, to)
    if not path.is_file():
        raise Problem(f"{who}.op.function: {path} does not exist; give file.py:name")
    module_spec = importlib.util.spec_from_file_location(f"steering_function_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise Problem(f"{who}.op.function: {path} has no function {name!r}")
    return function


def bind_gate(site: Site, index: int, points: list[Point], to: Binding) -> BoundGate | None:
    if site.gate is None:
        return None
    from rollout.steering.spec import At

    who, gate = f"sites[{index}].gate", site.gate
    on_encoder = "encoder" in to.stacks and gate.on != "token"
    stack = to.stacks["encoder" if on_encoder else points[0].stack or "decoder"]
    try:
        point = locate(to.model, At(layers=(gate.layer,), stack=stack.name), to.stacks)[0]
    except Problem as problem:
        raise Problem(*(f"{who}.{line.removeprefix('at.').replace('layers', 'layer', 1)}" for line in problem.lines)) from problem
    first = min((p.layer for p in points if p.layer is not None), default=None)
    if first is not None and points[0].stack == stack.name:
        after = first >= point.layer if site.at.component == "block_output" and not site.at.head and not site.at.module else first > point.layer  # type: ignore[operator]
        if not after:
            raise Problem(f"{who}.layer: the gate reads block {point.layer}'s output, which comes after the site's layer {first}; choose an earlier one")
    direction = read_vectors(gate.vector, [point], f"{who}.vector", to, site)[0]
    trained = nn.Parameter(direction.clone()) if to.trainable and gate.type == "sigmoid" else None
    if trained is None and not bool(direction.any()):
        raise Problem(f"{who}.vector: all zeros; no activation can be compared with it")
    return BoundGate(gate, index, point, direction, trained)


def needs_vector(site: Site) -> bool:
    return site.op.type not in WITHOUT_VECTOR
