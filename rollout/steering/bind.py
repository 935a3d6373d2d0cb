"""Tying a spec's site to a model: points, vectors, parameters, tokens and gates found and checked, before any sampling."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import ConfigError, UserError, said
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import Point, Stack, locate
from steerl.rollout.steering.core.table import TABLE
from steerl.rollout.steering.gates import BoundGate
from steerl.rollout.steering.parameters import Parameters, fresh_parameters, read_parameters
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.spec.spec import Site
from steerl.rollout.steering.vectors.extract import mean_difference_of
from steerl.rollout.steering.vectors.files import per_layer, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Binding:
    """What tying needs to know of the model and its surroundings."""

    model: nn.Module
    stacks: dict[str, Stack]
    tokenizer: PreTrainedTokenizerBase | None
    folder: str
    seed: int
    trainable: bool


def bind(site: Site, index: int, to: Binding) -> BoundSite:
    who = f"sites[{index}]"
    try:
        points = locate(to.model, site.at, to.stacks)
    except UserError as problem:
        raise ConfigError(*(f"{who}.{line}" if line.startswith("at.") else line for line in problem.lines)) from problem
    operation = TABLE[site.op.type]
    held: list[dict[str, Tensor]] = [{} for _ in points]
    if site.vector is not None and operation.family != "learned":
        vectors = read_vectors(site.vector, points, f"{who}.vector", to, site)
        for tensors, point, vector in zip(held, points, vectors, strict=True):
            tensors["vector"] = vector
            if to.trainable or bool(vector.any()) or not (operation.adds or operation.family == "direction"):
                continue
            told = f"{who}.vector: all zeros at layer {point.layer}; it would change nothing"
            if operation.family == "direction" or "file" not in site.vector:
                raise ConfigError(told)
            logger.warning("%s", told)  # a file may be what a training left that never moved this one
    _check_coordinates(site, points, who)
    if operation.tensors:
        held = [had | own for had, own in zip(held, _parameters(site, points, who, to), strict=True)]
    trained = None
    if to.trainable and any(held):
        if operation.family == "space":
            raise ConfigError(
                f"{who}.op: role trainable trains vectors and learned operations, not the space of {site.op.type}"
            )
        trained = Parameters(held)
    function = _users_function(site, who, to) if operation.function is None else operation.function
    excluded, gate = _excluded(site, who, to), bind_gate(site, index, points, to)
    return BoundSite(site, index, points, held, trained, function, excluded, gate)


def read_vectors(raw: dict[str, Any], points: list[Point], who: str, to: Binding, site: Site) -> list[Tensor]:
    """The vector of each point, from wherever the spec takes it."""
    widths, layers = [p.width for p in points], [p.layer for p in points]
    if "init" in raw:
        if None in widths:
            raise ConfigError(f"{who}.init: the width at module {site.at.module!r} cannot be told; give values")
        generator = torch.Generator().manual_seed(to.seed * 1000 + 1)
        if raw["init"] == "zeros":
            return [torch.zeros(int(w or 0)) for w in widths]
        return [float(raw.get("std", 0.02)) * torch.randn(int(w or 0), generator=generator) for w in widths]
    if "values" in raw:
        try:
            values = torch.tensor(raw["values"], dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{who}: expected numbers, or one list of numbers per layer ({error})") from error
        if values.dim() == 2 and values.shape[0] == len(points):
            named = {str(layer if layer is not None else i): v for i, (layer, v) in enumerate(zip(layers, values, strict=True))}
            vectors = per_layer(named, layers, widths, who, "values") if None not in layers else list(values)
        else:
            vectors = per_layer({"vector": values}, layers, widths, who, "values")
    elif "mean_diff" in raw:
        vectors = mean_difference_of(to.model, to.tokenizer, path_of(raw["mean_diff"], to), points, who)
    else:
        path = path_of(raw.get("file") or raw.get("folder"), to)
        tensors, _ = read_tensors(path, who)
        vectors = per_layer(tensors, layers, widths, who, path, raw.get("key") or "")
    if raw.get("normalise"):
        vectors = [v / v.norm().clamp_min(torch.finfo(v.dtype).tiny) for v in vectors]
    return vectors


def path_of(raw: object, to: Binding) -> Path:
    """Relative to the spec's file where it came from one and the path is there; else to the current folder."""
    path = Path(str(raw)).expanduser()
    beside = Path(to.folder) / path
    return beside if to.folder and not path.is_absolute() and beside.exists() else path


def _parameters(site: Site, points: list[Point], who: str, to: Binding) -> list[dict[str, Tensor]]:
    op = site.op
    if any(p.width is None for p in points):
        raise ConfigError(f"{who}.at: the width at module {site.at.module!r} cannot be told; choose a block or a linear layer")
    widths, layers = [int(p.width or 0) for p in points], [p.layer for p in points]
    raw = {"file": op.params} if op.params else site.vector if TABLE[op.type].family == "learned" else None
    if raw is None or "init" in raw:
        if not to.trainable:
            raise ConfigError(
                f"{who}.vector: op {op.type} needs its parameters from a file; only role trainable starts without"
            )
        generator = torch.Generator().manual_seed(to.seed * 1000 + 1)
        return [fresh_parameters(op, width, generator) for width in widths]
    source = raw.get("file") or raw.get("folder")
    if source is None:
        raise ConfigError(f"{who}.vector: op {op.type} reads its parameters from {{file: ...}}, found {sorted(raw)}")
    path = path_of(source, to)
    tensors, _ = read_tensors(path, f"{who}.params")
    return read_parameters(op, tensors, layers, widths, f"{who}.params", str(path))


def _check_coordinates(site: Site, points: list[Point], who: str) -> None:
    if site.op.coordinates is None or TABLE[site.op.type].family == "space":
        return
    for point in points:
        if point.width is not None and max(site.op.coordinates) >= point.width:
            raise ConfigError(
                f"{who}.op.coordinates: {max(site.op.coordinates)} is out of range; the activation is {point.width} wide"
            )


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
            raise ConfigError(f"{who}.where.exclude.token_ids: {token!r} is not a token here; give its id")
        ids.extend(known if isinstance(known, list) else [known])
    return torch.tensor(ids, dtype=torch.int64)


def _users_function(site: Site, who: str, to: Binding) -> Callable[..., Tensor]:
    file, name = site.op.function.rsplit(":", 1)
    path = path_of(file, to)
    if not path.is_file():
        raise ConfigError(f"{who}.op.function: {path} does not exist; give file.py:name")
    module_spec = importlib.util.spec_from_file_location(f"steering_function_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{who}.op.function: {path} cannot be imported: {said(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{who}.op.function: {path} has no function {name!r}")
    return function


def bind_gate(site: Site, index: int, points: list[Point], to: Binding) -> BoundGate | None:
    if site.gate is None:
        return None
    who, gate = f"sites[{index}].gate", site.gate
    on_encoder = "encoder" in to.stacks and gate.on != "token"
    stack = to.stacks["encoder" if on_encoder else points[0].stack or "decoder"]
    try:
        point = locate(to.model, At(layers=(gate.layer,), stack=stack.name), to.stacks)[0]
    except UserError as problem:
        raise ConfigError(
            *(f"{who}.{line.removeprefix('at.').replace('layers', 'layer', 1)}" for line in problem.lines)
        ) from problem
    gate_layer = point.layer or 0
    first = min((p.layer for p in points if p.layer is not None), default=None)
    if first is not None and points[0].stack == stack.name:
        at_the_end = site.at.component == "block_output" and not site.at.head and not site.at.module
        after = first > gate_layer or (first == gate_layer and at_the_end)
        if not after:
            raise ConfigError(
                f"{who}.layer: the gate reads block {point.layer}'s output, which comes after the site's layer {first}; "
                "choose an earlier one"
            )
    direction = read_vectors(gate.vector, [point], f"{who}.vector", to, site)[0]
    trained = nn.Parameter(direction.clone()) if to.trainable and gate.type == "sigmoid" else None
    if trained is None and not bool(direction.any()):
        raise ConfigError(f"{who}.vector: all zeros; no activation can be compared with it")
    return BoundGate(gate, index, site.name, point, direction, trained)
