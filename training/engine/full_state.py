"""Weights and optimizer states whole, in the layout of one process, whatever engine holds them: what a checkpoint is made of.

                      weights                                  moments and steps
    one process, DDP  as they are                              as they are
    ZeRO 1-3          the optimizer's float32 ones, gathered   gathered from the flat parts of all ranks
    FSDP2             gathered                                 gathered

Every function here is called on every rank. Gathered values are kept by the main process alone, one at a time; a load puts the
same whole values, which every rank has read, back into each rank's parts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from steerl.rollout.common import processes
from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.model import compat, sharding
from steerl.training.engine.gradients import is_deepspeed
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.types import TrainState

_MOMENTS = ("exp_avg", "exp_avg_sq")


def weights(state: TrainState) -> dict[str, Tensor]:
    """What is trained, and buffers, by name."""
    zero = is_deepspeed(state.model)
    return {
        name: _kept(_master(value)) if zero and value.requires_grad else gathered(value)
        for name, value in state.trained().items()
    }


def optimizer(state: TrainState) -> dict[str, object]:
    """What state_dict() of one process's AdamW holds."""
    if not is_deepspeed(state.model):
        plain: dict[str, Any] = state.optimizer.state_dict()
        return {
            **plain,
            "state": {
                index: {name: gathered(value) for name, value in moments.items()} for index, moments in plain["state"].items()
            },
        }
    zero = _zero(state)
    compat.link_optimizer_states(zero)
    entries: dict[int, dict[str, object]] = {}
    groups: list[dict[str, object]] = []
    index = 0
    for parameters, group in zip(_groups(state), zero.optimizer.param_groups, strict=True):
        step = _step_of(zero, len(groups))
        indices = list(range(index, index + len(parameters)))
        for place, parameter in zip(indices, parameters, strict=True):
            if step is not None:
                entries[place] = {"step": _kept(step), **{name: _kept(_master(parameter, name)) for name in _MOMENTS}}
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": indices})
        index += len(parameters)
    return {"state": entries, "param_groups": groups}


def kind(state: TrainState) -> str:
    """What holds them, for a checkpoint to say under what it was written."""
    if is_deepspeed(state.model):
        return f"ZeRO-{int(state.model.zero_optimization_stage())}"
    return "FSDP" if any(hasattr(p, "full_tensor") for p in state.model.parameters()) else "whole weights"


def load_weights(state: TrainState, saved: Mapping[str, Tensor]) -> None:
    """In place, so that optimizers and wrappers keep their tensors."""
    own = state.trained()
    if own.keys() != saved.keys():
        odd = sorted(own.keys() ^ saved.keys())
        told = f"{len(odd)} trained tensors are not those that were saved (first: {odd[0]})"
        raise CheckpointError(f"checkpoint: {told}; resume with the same model")
    zero = is_deepspeed(state.model)
    with torch.no_grad():
        for name, value in own.items():
            shape = tuple(getattr(value, "ds_shape", value.shape))
            master = zero and value.requires_grad and saved[name].is_floating_point()
            if shape != tuple(saved[name].shape) or (value.dtype != saved[name].dtype and not master):
                now, was = (f"{size} {v.dtype}" for size, v in ((shape, value), (tuple(saved[name].shape), saved[name])))
                raise CheckpointError(
                    f"checkpoint: {name} is {now}, saved was {was}; resume with the same model and model.dtype"
                )
            if master:
                _set_master(value, saved[name].float())
            else:
                value.copy_(_like(value, saved[name]))
        if zero and hasattr(_zero(state), "update_lp_params"):  # ZeRO-1 and 2: what the forward pass reads, from the masters
            _zero(state).update_lp_params()


def load_optimizer(state: TrainState, saved: Mapping[str, Any]) -> None:
    if not is_deepspeed(state.model):
        _load_plain(state, saved)
        return
    zero = _zero(state)
    steps = [[saved["state"][i]["step"] for i in group["params"] if i in saved["state"]] for group in saved["param_groups"]]
    for number, taken in enumerate(steps):
        for flat in _flats(zero, number) if taken else ():
            moments = {name: torch.zeros_like(flat.data) for name in _MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.stack(taken).amax().clone(), **moments}
    if not any(steps):
        return
    compat.link_optimizer_states(zero)
    parameters = [parameter for group in _groups(state) for parameter in group]
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            # A weight that no rank ever used has none in one process, and zeros here.
            for name in _MOMENTS if index in saved["state"] else ():
                _set_master(parameter, saved["state"][index][name], name)


def _load_plain(state: TrainState, saved: Mapping[str, Any]) -> None:
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    entries = {
        index: {
            name: _like(parameters[index], value) if name != "step" else value for name, value in saved["state"][index].items()
        }
        for index in saved["state"]
    }
    # What is a setting is that of the run that goes on: it may have been changed.
    now = state.optimizer.param_groups
    groups = [
        {**was, **{name: own[name] for name in ("base_lr", "weight_decay") if name in own}}
        for was, own in zip(saved["param_groups"], now, strict=True)
    ]
    state.optimizer.load_state_dict({**saved, "state": entries, "param_groups": groups})


@contextlib.contextmanager
def whole_for_export(actor_critic: ActorCritic) -> Iterator[dict[str, Tensor]]:
    """Inside, the main process can save the policy: its modules hold all weights, or (FSDP) a dict that is yielded does."""
    with sharding.gathered(*actor_critic.policy_modules()) if sharding.by_zero3(actor_critic) else contextlib.nullcontext():
        yield _gathered_state(actor_critic.actor)


def _gathered_state(model: Any) -> dict[str, Tensor]:
    """FSDP's weights whole by name, on every rank at the same time, kept by the main one; empty for other engines."""
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return {}
    state = {name: gathered(value) for name, value in model.state_dict().items()}
    return state if processes.start().is_main else {}


# -- one value -------------------------------------------------------------------------------------------------------


def gathered(value: object) -> Any:
    """A value as it is, or whole where FSDP has spread it."""
    return _kept(value.full_tensor()) if hasattr(value, "full_tensor") else value


def _kept(value: Tensor) -> Tensor:
    """A gathered value on the main process, which writes it; nothing on the others."""
    return value.detach().to("cpu", copy=True) if processes.start().is_main else torch.empty(0)


def _like(own: Any, value: Tensor) -> Any:
    """A whole value as `own` has it: spread over ranks under FSDP."""
    if not hasattr(own, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)


# -- DeepSpeed -------------------------------------------------------------------------------------------------------


def _zero(state: TrainState) -> Any:
    """DeepSpeed's optimizer, which holds the flat float32 parts; its `optimizer` is the AdamW that steps them."""
    return state.model.optimizer


def _groups(state: TrainState) -> list[list[nn.Parameter]]:
    """The parameters of each of the optimizer's groups, in the order that setup.groups gives them."""
    module = state.accelerator.unwrap_model(state.model)
    return [group for group in (module.policy_parameters(), module.value_parameters()) if group]


def _flats(zero: Any, group: int) -> list[Tensor]:
    """This rank's flat parts of a group: one, or several under ZeRO-3."""
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return [zero.single_partition_of_fp32_groups[group]]
    return [flat for i, flat in enumerate(zero.fp32_partitioned_groups_flat) if zero.sub_group_to_group_id[i] == group]


def _step_of(zero: Any, group: int) -> Tensor | None:
    """Optimizer steps that a group has taken; None before the first."""
    entries = [zero.optimizer.state.get(flat) for flat in _flats(zero, group)]
    return next((entry["step"] for entry in entries if entry), None)


def _master(parameter: Tensor, moment: str | None = None) -> Tensor:
    """A float32 weight, or a moment of it, from the parts of all ranks."""
    from deepspeed import utils

    if moment is None:
        return utils.safe_get_full_fp32_param(parameter)
    return utils.safe_get_full_optimizer_state(parameter, moment)


def _set_master(parameter: Any, value: Tensor, moment: str | None = None) -> None:
    """Put this rank's part of a whole value in its place; under ZeRO-3 into what the forward pass gathers, too."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if moment is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        return
    size, process = parameter.ds_tensor.numel(), processes.start()
    padded = pad(value.flatten(), (0, size * process.world_size - value.numel()))
    part = padded.narrow(0, size * process.rank, size).to(parameter.ds_tensor.device)
    if moment is not None:
        utils.safe_set_local_optimizer_state(parameter, part, moment)
        return
    utils.safe_set_local_fp32_param(parameter, part)
    parameter.ds_tensor.data.copy_(part)
    if parameter.ds_persist:  # small weights that DeepSpeed keeps whole on every rank
        parameter.data.copy_(value.view(parameter.ds_shape))
