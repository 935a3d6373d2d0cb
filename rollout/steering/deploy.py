"""What a steered run leaves behind: nothing but the model (strip), the steering beside it (keep), or in it (fold).

    save(steering, folder)     steering.yaml and its files: `load_spec(folder / "steering.yaml")` is what was trained
    fold(steering, model)      an all-positions add becomes the bias of the linear layer that writes there
    check_fold(steering)       says at once what cannot be folded

Adding v to the output of a block is adding it to the output of the block's last matrix, wherever the block's residual
stream is a plain sum; `fold` compares the folded model with the steered one before it is believed.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.run_folder import write_text
from steerl.rollout.common.yaml_files import Dumper
from steerl.rollout.model import policy
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.steering.core.structure import Point, attention_of, matrix_widths, mlp_of
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.spec.spec import Site, Strength
from steerl.rollout.steering.steering import Steering
from steerl.rollout.steering.strengths import schedule_factor
from steerl.rollout.steering.vectors.files import save_vector

_FLAGS = {"mlp": "mlp_bias", "attn": "attention_bias"}


def save(steering: Steering, folder: Path) -> Path:
    """The steering as it is now, with every number it needs, as `steering.yaml` and vector files in `folder`."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    sites = []
    for site in steering.sites:
        spec = dataclasses.replace(site.spec, schedule=None, strength=_final(site.spec, steering.scale))
        tensors = _tensors(site)
        if tensors:
            name = f"{_safe(site.name)}.safetensors"
            notes = {
                "op": site.spec.op.type,
                "component": site.spec.at.module or site.spec.at.component,
                "made_by": f"role {steering.role}",
            }
            save_vector(folder / name, tensors, notes, steering.model)
            spec = dataclasses.replace(spec, vector={"file": name})
        if site.gate is not None and spec.gate is not None:
            name = f"{_safe(site.name)}.gate.safetensors"
            held = site.gate.direction if site.gate.trained is None else site.gate.trained
            save_vector(folder / name, {site.gate.point.layer or 0: held}, {"op": "gate"}, steering.model)
            spec = dataclasses.replace(spec, gate=dataclasses.replace(spec.gate, vector={"file": name}))
        sites.append(spec)
    whole = dataclasses.replace(
        steering.spec, sites=tuple(sites), role="policy", correction=None, kl_budget=None, on_deploy="keep", folder=str(folder)
    )
    path = folder / "steering.yaml"
    write_text(path, yaml.dump({"steering": whole.mapping()}, Dumper=Dumper, sort_keys=False, allow_unicode=True))
    return path


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "_" for c in name)


def _final(site: Site, scale: float) -> Strength:
    """The strength at the end of training: schedule and budget worked in."""
    factor = schedule_factor(site.schedule, 1.0) * scale
    s = site.strength
    scaled = {name: getattr(s, name) * factor for name in ("value", "low", "high", "mean")}
    return dataclasses.replace(s, **scaled, std=s.std * abs(factor), samples=tuple(one * factor for one in s.samples))


def _tensors(site: BoundSite) -> dict[int | str, Tensor]:
    """The numbers of a site by layer: what the spec's `vector: {file: ...}` reads back."""
    numbers: dict[int | str, Tensor] = {}
    for at, point in enumerate(site.points):
        for name, tensor in site.tensors(at, torch.device("cpu")).items():
            if site.operation.family == "learned":
                numbers[f"{point.layer}.{name}"] = tensor
            elif name == "vector":
                numbers[point.layer if point.layer is not None else "vector"] = tensor
    return numbers


# -- folding ----------------------------------------------------------------------------------------------------------------


def check_fold(steering: Steering) -> None:
    """A line for every site that no bias can stand for."""
    problems = []
    if steering.spec.fraction < 1.0:
        problems.append(
            f"on_deploy: fold steers every sample, and fraction is {steering.spec.fraction:g}; use keep, or fraction 1"
        )
    for site in steering.sites:
        who, spec = f"on_deploy: fold needs an add at all positions with one strength, and site {site.name!r}", site.spec
        if not site.operation.adds or spec.op.coordinates is not None:
            problems.append(f"{who} has op {spec.op.type}; use keep")
        elif (
            spec.where.prompt != "all"
            or spec.where.steps != "all"
            or spec.where.exclude_tokens
            or spec.where.exclude_positions
            or spec.where.ramp
        ):
            problems.append(f"{who} acts at some positions; write where: {{prompt: all, steps: all}}, or use keep")
        elif spec.gate is not None or spec.strength != Strength(spec.strength.value):
            problems.append(f"{who} differs between rows or tokens; use keep")
        elif spec.at.head or spec.at.io == "input" or spec.at.component == "block_input":
            problems.append(f"{who} acts on an input; use keep")
    if problems:
        raise ConfigError(*problems)


def fold(steering: Steering, model: nn.Module) -> None:
    """Write the steering into `model`, a copy of the steered model, as biases, and see that both give the same numbers."""
    check_fold(steering)
    with torch.no_grad():
        for site in steering.sites:
            strength = _final(site.spec, steering.scale).value * site.operation.adds
            for at, point in enumerate(site.points):
                twin = _twin(steering.model, model, point.module)
                matrix = _writer(twin, point)
                bias = _bias(model, matrix, site, point)
                bias.add_((strength * site.tensors(at, bias.device)["vector"]).to(bias.dtype))
        _compare(steering, model)


def _twin(original: nn.Module, copied: nn.Module, module: nn.Module) -> nn.Module:
    name = next(name for name, candidate in original.named_modules() if candidate is module)
    return copied.get_submodule(name)


def _writer(module: nn.Module, point: Point) -> nn.Module:
    """The matrix whose output is added to the stream at this point."""
    if matrix_widths(module) is not None:
        return module
    inside = mlp_of(module) or attention_of(module)
    if inside is not None and matrix_widths(inside) is not None:
        return inside
    within = [m for m in (inside or module).modules() if matrix_widths(m) is not None and matrix_widths(m)[1] == point.width]  # type: ignore[index]
    if not within:
        raise ConfigError(f"on_deploy: fold found no linear layer that writes at layer {point.layer}; use keep")
    return within[-1]


def _bias(model: nn.Module, matrix: nn.Module, site: BoundSite, point: Point) -> Tensor:
    """The matrix's bias; where the family has an option for biases it is switched on, with zeros everywhere else."""
    if isinstance(getattr(matrix, "bias", None), Tensor):
        return matrix.bias  # type: ignore[return-value]
    name = next(name for name, candidate in model.named_modules() if candidate is matrix)
    group = "attn" if "attn" in name or "attention" in name else "mlp"
    flag = _FLAGS[group]
    if not hasattr(model.config, flag):
        raise ConfigError(
            f"on_deploy: fold cannot write site {site.name!r}: {type(model).__name__} has no bias at {name} "
            f"(layer {point.layer}) and no option for one; use keep"
        )
    setattr(model.config, flag, True)
    for path, module in model.named_modules():
        inside = ("attn" in path or "attention" in path) if group == "attn" else "mlp" in path
        if inside and isinstance(module, nn.Linear) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=module.weight.dtype, device=module.weight.device))
    return matrix.bias  # type: ignore[return-value]


def _compare(steering: Steering, model: nn.Module) -> None:
    """Folded against steered on a few tokens: what no bias can do shows here, not at the user's."""
    device = next(model.parameters()).device
    ids = torch.arange(3, 11, device=device)[None] % policy.vocabulary_size(model)
    given: dict[str, object] = {"input_ids": ids}
    if steering.is_encoder_decoder:
        given["decoder_input_ids"] = ids[:, :4]
    modes = [(m, m.training) for net in (steering.model, model) for m in net.modules()]
    steering.model.eval()
    model.eval()
    zero_B = ids.new_zeros(1)
    with steering.active(applied=steering.applied(torch.ones_like(ids), zero_B, zero_B, progress=1.0)):
        steered = steering.model(**given).logits
    with unsteered():
        folded, plain = model(**given).logits, steering.model(**given).logits
    for module, was in modes:
        module.training = was
    moved, off = float((steered - plain).abs().max()), float((folded - steered).abs().max())
    tolerance = 1e-4 if steered.dtype in (torch.float32, torch.float64) else 0.05
    if off > tolerance * max(1.0, moved, float(steered.abs().max())):
        raise ConfigError(
            f"on_deploy: fold: the folded model is off by {off:.3g} (the steering moves logits by {moved:.3g}): "
            f"{type(model).__name__} does not add its parts up plainly there; use keep"
        )
