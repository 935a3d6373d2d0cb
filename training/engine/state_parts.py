"""Weights and optimizer states in the layout of one process, each rank's own part of them: what a checkpoint is made of.

                      weights                         moments and steps    a rank's part
    one process, DDP  as they are                     as they are          all, which the main process writes
    ZeRO-1, ZeRO-2    the optimizer's float32 ones    in its flat ones     a range, whose borders lie anywhere
    ZeRO-3            the same                        the same             1/N of each, the last one padded
    FSDP2             as they are                     as they are          rows

A part is a range of a tensor's numbers, row after row, so that any number of ranks reads what any other has written: each takes
the ranges that it holds itself. Nothing is brought together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from steerl.rollout.common import processes
from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.model import compat
from steerl.rollout.weights.parts import Part, Stored
from steerl.training.engine.gradients import is_deepspeed
from steerl.training.types import TrainState

_MOMENTS = ("exp_avg", "exp_avg_sq")


def weights(state: TrainState) -> dict[str, Part]:
    """What is trained, and buffers, by name."""
    zero = is_deepspeed(state.model)
    return {
        name: _zero_part(value) if zero and value.requires_grad else _part(value) for name, value in _trained(state).items()
    }


def optimizer(state: TrainState) -> dict[str, object]:
    """What state_dict() of one process's AdamW holds."""
    if not is_deepspeed(state.model):
        plain: dict[str, Any] = state.optimizer.state_dict()
        entries = {i: {n: _part(v) if isinstance(v, Tensor) else v for n, v in of.items()} for i, of in plain["state"].items()}
        return {**plain, "state": entries}
    zero = _zero(state)
    compat.link_optimizer_states(zero)
    moments: dict[int, dict[str, object]] = {}
    groups: list[dict[str, object]] = []
    index = 0
    for parameters, group in zip(_groups(state), zero.optimizer.param_groups, strict=True):
        step = _step_of(zero, len(groups))
        indices = list(range(index, index + len(parameters)))
        for place, parameter in zip(indices, parameters, strict=True):
            if step is not None:
                moments[place] = {"step": _part(step), **{name: _zero_part(parameter, name) for name in _MOMENTS}}
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": indices})
        index += len(parameters)
    return {"state": moments, "param_groups": groups}


def kind(state: TrainState) -> str:
    """What holds them, for a checkpoint to say under what it was written."""
    if is_deepspeed(state.model):
        return f"ZeRO-{int(state.model.zero_optimization_stage())}"
    return "FSDP" if any(hasattr(p, "full_tensor") for p in state.model.parameters()) else "whole weights"


def load_weights(state: TrainState, saved: Mapping[str, Stored]) -> None:
    """In place, so that optimizers and wrappers keep their tensors."""
    own = _trained(state)
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())
        told = f"{len(odd)} trained tensors are not those that were saved (first: {odd[0]})"
        raise CheckpointError(f"checkpoint: {told}; resume with the same model")
    zero = is_deepspeed(state.model)
    with torch.no_grad():
        for name, value in own.items():
            shape, was = tuple(getattr(value, "ds_shape", value.shape)), saved[name]
            master = zero and value.requires_grad and was.dtype.is_floating_point
            if shape != was.shape or (value.dtype != was.dtype and not master):
                raise CheckpointError(
                    f"checkpoint: {name} is {shape} {value.dtype}, saved was {was.shape} {was.dtype}; resume with the same "
                    "model and model.dtype"
                )
            if master:
                _load_master(value, was)
            else:
                _load(value, was)
        if zero and hasattr(_zero(state), "update_lp_params"):  # ZeRO-1 and 2: what the forward pass reads, from the masters
            _zero(state).update_lp_params()


def load_optimizer(state: TrainState, saved: Mapping[str, Any]) -> None:
    """`saved` is what `optimizer` gave, with Stored in the place of each Part."""
    if not is_deepspeed(state.model):
        _load_plain(state, saved)
        return
    zero = _zero(state)
    steps = [
        [saved["state"][i]["step"].whole() for i in group["params"] if i in saved["state"]] for group in saved["param_groups"]
    ]
    for number, taken in enumerate(steps):
        for flat in _flats(zero, number) if taken else ():
            moments = {name: torch.zeros_like(flat.data) for name in _MOMENTS}
            step = torch.stack(taken).amax().clone()
            zero.optimizer.state[flat] = {"step": int(step) if _steps_on_host(zero) else step, **moments}
    if not any(steps):
        return
    compat.link_optimizer_states(zero)
    parameters = [parameter for group in _groups(state) for parameter in group]
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            # A weight that no rank ever used has none in one process, and zeros here.
            for name in _MOMENTS if index in saved["state"] else ():
                _load_master(parameter, saved["state"][index][name], name)


def _load_plain(state: TrainState, saved: Mapping[str, Any]) -> None:
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    entries = {
        index: {name: _as_parameter(parameters[index], value) for name, value in values.items()}
        for index, values in saved["state"].items()
    }
    # What is a setting is that of the run that goes on: it may have been changed.
    now = state.optimizer.param_groups
    groups = [
        {**was, **{name: own[name] for name in ("base_lr", "weight_decay") if name in own}}
        for was, own in zip(saved["param_groups"], now, strict=True)
    ]
    state.optimizer.load_state_dict({**saved, "state": entries, "param_groups": groups})


def _trained(state: TrainState) -> dict[str, Tensor]:
    """FSDP leaves the root's own weights together behind a forward pass: here they are apart, too."""
    if callable(reshard := getattr(state.model, "reshard", None)):
        reshard()
    return state.trained()


# -- one value: whole on every rank, or spread by FSDP ---------------------------------------------------------------


def _part(value: Any) -> Part:
    if not hasattr(value, "full_tensor"):
        return Part.of(value.detach(), here=processes.start().is_main)
    at, count, first = _rows(value)
    return Part(tuple(value.shape), value.dtype, at, count if first else 0, lambda: value.detach().to_local())


def _rows(value: Any) -> tuple[int, int, bool]:
    """Of a weight that FSDP has spread: where this rank's rows begin, how many numbers they are, and whether it is the first of
    the ranks that hold them."""
    mesh, placements = value.device_mesh, value.placements
    (axis,) = (axis for axis, placement in enumerate(placements) if placement.is_shard())
    assert placements[axis].dim == 0
    each = -(-value.shape[0] // mesh.size(axis)) * math.prod(value.shape[1:])
    at = min(each * mesh.get_local_rank(axis), value.numel())
    others = [mesh.get_local_rank(other) for other in range(mesh.ndim) if other != axis]
    return at, min(each, value.numel() - at), not any(others)


def _load(own: Any, saved: Stored) -> None:
    """A value into its place, on each rank what that holds of it."""
    if hasattr(own, "full_tensor"):
        at, count, _ = _rows(own)
        local = own.to_local()
        local.copy_(saved.read(at, count).view(local.shape))
    else:
        own.copy_(saved.whole())


def _as_parameter(parameter: Any, value: object) -> object:
    """A moment as the parameter lies."""
    if not isinstance(value, Stored):
        return value
    if not hasattr(parameter, "full_tensor") or value.shape != tuple(parameter.shape):
        return value.whole()
    moment = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
    _load(moment, value)
    return moment


# -- DeepSpeed -------------------------------------------------------------------------------------------------------


def _zero(state: TrainState) -> Any:
    """DeepSpeed's optimizer, which holds the flat float32 parts; its `optimizer` is the AdamW that steps them."""
    return state.model.optimizer


def _groups(state: TrainState) -> list[list[nn.Parameter]]:
    """The parameters of each of the optimizer's groups, in the order that setup.groups gives them."""
    return [group for group in (state.module.policy_parameters(), state.module.value_parameters()) if group]


def _flats(zero: Any, group: int) -> list[Tensor]:
    """This rank's flat parts of a group: one, or several under ZeRO-3."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return [zero.single_partition_of_fp32_groups[group]]
    return [flat for i, flat in enumerate(zero.fp32_partitioned_groups_flat) if zero.sub_group_to_group_id[i] == group]


def _step_of(zero: Any, group: int) -> Tensor | None:
    """Optimizer steps that a group has taken; None before the first."""
    entries = [zero.optimizer.state.get(flat) for flat in _flats(zero, group)]
    return next((torch.tensor(float(entry["step"])) for entry in entries if entry), None)


def _steps_on_host(zero: Any) -> bool:
    """Whether DeepSpeed's own Adam is at work (offload_optimizer), which counts its steps in an integer."""
    return type(zero.optimizer).__name__ == "DeepSpeedCPUAdam"


def _zero_part(parameter: Any, moment: str | None = None) -> Part:
    """A float32 weight, or a moment of it."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        at, values = compat.zero_fragment(parameter, moment)
        return Part(tuple(parameter.shape), torch.float32, at, values.numel(), lambda: values)
    size = parameter.ds_tensor.numel()
    at = min(size * processes.start().rank, parameter.ds_numel)

    def held() -> Tensor:  # may come from the host or a disk
        if moment is None:
            return utils.safe_get_local_fp32_param(parameter)
        return utils.safe_get_local_optimizer_state(parameter, moment)

    return Part(tuple(parameter.ds_shape), torch.float32, at, min(size, parameter.ds_numel - at), held)


def _load_master(parameter: Any, saved: Stored, moment: str | None = None) -> None:
    """Put this rank's part into its place; under ZeRO-3 into what the forward pass gathers, too."""
    from deepspeed import utils

    part = _zero_part(parameter, moment)
    values = saved.read(part.at, part.count).float()
    if not hasattr(parameter, "ds_id"):
        part.values().copy_(values)
        return
    padded = pad(values, (0, parameter.ds_tensor.numel() - part.count))
    if moment is not None:
        utils.safe_set_local_optimizer_state(parameter, padded, moment)
        return
    utils.safe_set_local_fp32_param(parameter, padded)
    parameter.ds_tensor.data.copy_(padded)
    if parameter.ds_persist:  # small weights that DeepSpeed keeps whole on every rank
        parameter.data.copy_(saved.whole())
