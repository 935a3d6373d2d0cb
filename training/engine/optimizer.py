"""The optimizer of ppo.optimizer, and what each of them can be used with."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from steerl.rollout.common.errors import ConfigError, UserError, said
from steerl.rollout.common.loading import load_function
from steerl.rollout.common.settings_reader import near_name
from steerl.training.engine.engine import holder
from steerl.training.settings import PPOSettings, is_custom

if TYPE_CHECKING:
    from accelerate import Accelerator

OURS = {"params": "", "lr": "ppo.learning_rate", "weight_decay": "ppo.weight_decay"}
"""Arguments that are not for ppo.optimizer_arguments, and the settings that they have."""


def check_optimizer(accelerator: Accelerator, settings: PPOSettings) -> None:
    """Refuse what cannot compute with the states, or bring them together for a checkpoint."""
    if settings.optimizer == "adamw":
        return
    spread = holder(accelerator)
    why = None
    if settings.optimizer != "adamw8bit":
        if spread:
            why = f"{spread} spreads an optimizer's states over ranks, and knows those of adamw alone here; set it, or use DDP"
    elif accelerator.device.type != "cuda":
        why = f"its kernels are a GPU's, and the run is on {accelerator.device.type}; set adamw"
    elif spread:
        why = f"{spread} spreads an optimizer's states over ranks, which cuts through their blocks; set adamw, or use DDP"
    elif importlib.util.find_spec("bitsandbytes") is None:
        why = "it needs bitsandbytes, which is not installed; pip install 'steerl[bitsandbytes]', or set adamw"
    if why is not None:
        raise ConfigError(f"ppo.optimizer: {settings.optimizer}, but {why}")


def build_optimizer(accelerator: Accelerator, groups: list[dict[str, Any]], settings: PPOSettings) -> torch.optim.Optimizer:
    if settings.optimizer != "adamw":
        return _built(settings, groups)
    # One pass over each weight, and no buffers beside it. It walks through memory and looks at no strides.
    fused = all(parameter.is_contiguous() for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, **{"fused": fused, **arguments(settings)})


def _built(settings: PPOSettings, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    make = factory(settings)
    known, takes_any = _takes(make)
    given = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    made = make(groups, **{name: value for name, value in given.items() if takes_any or name in known}, **arguments(settings))
    if not isinstance(made, torch.optim.Optimizer):
        raise ConfigError(f"ppo.optimizer: {settings.optimizer} gave a {type(made).__name__}, not a torch.optim.Optimizer")
    return made


def factory(settings: PPOSettings) -> Callable[..., Any]:
    """What makes it of groups of weights."""
    name = settings.optimizer
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        eight_bits: Callable[..., Any] = AdamW8bit
        return eight_bits
    if is_custom(name):
        own: Callable[..., Any] = load_function(name, "ppo.optimizer")
        return own
    kinds = {key: kind for key, kind in vars(torch.optim).items() if inspect.isclass(kind) and key != "Optimizer"}
    kinds = {key.lower(): kind for key, kind in kinds.items() if issubclass(kind, torch.optim.Optimizer)}
    if name.lower() not in kinds:
        near = near_name(name, ["adamw8bit", *kinds])
        hint = f"did you mean {near}?" if near else "another package's is module:name, such as transformers:Adafactor"
        raise ConfigError(f"ppo.optimizer: torch.optim has no {name!r}; {hint}")
    return kinds[name.lower()]


def _takes(make: Callable[..., Any]) -> tuple[list[str], bool]:
    """The names of its arguments, and whether it takes any other."""
    parameters = inspect.signature(make).parameters
    return list(parameters), any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def arguments(settings: PPOSettings) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in (settings.optimizer_arguments or {}).items()
    }


def try_optimizer(settings: PPOSettings) -> None:
    """Two steps on weights of one and of two dimensions, before anything is loaded."""
    if settings.optimizer == "adamw8bit" or (settings.optimizer == "adamw" and not settings.optimizer_arguments):
        return
    make = factory(settings)
    (known, takes_any), where = _takes(make), "ppo.optimizer_arguments"
    for name in settings.optimizer_arguments or {}:
        if name in OURS:
            told = f"is {OURS[name]}; set it there" if OURS[name] else "is what learns, which is not for a setting"
            raise ConfigError(f"{where}: {name} {told}")
        if name not in known and not takes_any:
            near = near_name(name, known)
            hint = f"did you mean {near}?" if near else f"it takes {', '.join(key for key in known if key not in OURS)}"
            raise ConfigError(f"{where}: {settings.optimizer} takes no {name!r}; {hint}")
    if settings.weight_decay and "weight_decay" not in known and not takes_any:
        raise ConfigError(
            f"ppo.weight_decay: {settings.weight_decay:g}, but ppo.optimizer {settings.optimizer} has none; set 0"
        )
    try:
        _state_bytes.cache_clear()
        still = _tried(settings, (4, 4))[1]
    except UserError:
        raise
    except Exception as error:
        given = f" with {where} {settings.optimizer_arguments}" if settings.optimizer_arguments else ""
        told = f"does not work on weights of one and of two dimensions: {said(error)}"
        raise ConfigError(f"ppo.optimizer: {settings.optimizer}{given} {told}") from error
    if not still:
        told = "moves weights at a learning rate of 0, so ppo.schedule and ppo.value_warmup_steps would have no effect"
        raise ConfigError(f"ppo.optimizer: {settings.optimizer} {told}; choose another")


def _tried(settings: PPOSettings, shape: tuple[int, int]) -> tuple[Mapping[str, Any], bool]:
    """The state of a matrix after two steps, and whether the second, at a rate of 0, left the weights as they were."""
    weights = [torch.nn.Parameter(torch.ones(shape)), torch.nn.Parameter(torch.ones(shape[:1]))]
    groups = [{"params": [weight], "lr": 1e-3, "base_lr": 1e-3, "name": f"{weight.ndim}"} for weight in weights]
    optimizer = build_optimizer(None, groups, settings)  # type: ignore[arg-type] # reads nothing of it
    for rate in (1e-3, 0.0):
        before = [weight.detach().clone() for weight in weights]
        for weight, group in zip(weights, optimizer.param_groups, strict=True):
            group["lr"], weight.grad = rate, torch.full_like(weight, 0.1)
        optimizer.step()
    still = all(bool((weight == was).all()) for weight, was in zip(weights, before, strict=True))
    return optimizer.state[weights[0]], still


def state_bytes(settings: PPOSettings) -> float:
    """Bytes of an optimizer's state for each float32 weight: looked at, on a matrix."""
    known = {"adamw": 8.0, "adamw8bit": 2.0}
    given = settings.optimizer, json.dumps(settings.optimizer_arguments or {}), settings.weight_decay
    return known[settings.optimizer] if settings.optimizer in known else _state_bytes(*given)


@functools.lru_cache(maxsize=8)
def _state_bytes(name: str, given: str, decay: float) -> float:
    state, _ = _tried(PPOSettings(optimizer=name, optimizer_arguments=json.loads(given), weight_decay=decay), (512, 512))
    held = sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, torch.Tensor))
    return held / 512**2
