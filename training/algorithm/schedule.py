"""The learning rates over a run: a share of what is set, a function of the step alone, so that a resume restores nothing.

    constant, linear, cosine      ours
    cosine_with_min_lr, ...       transformers.get_scheduler, by its names
    StepLR, ...                   torch.optim.lr_scheduler, by the names of its classes; count from the end of the warm-up
    file.py:name                  a function of (step, steps)

The warm-up is ours for all of them: it begins above 0, for a whole step is learned at that rate.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch

from steerl.rollout.common.errors import ConfigError, said
from steerl.rollout.common.loading import load_function
from steerl.rollout.common.settings_reader import near_name
from steerl.training.settings import PPOSettings, is_custom

OURS = ("constant", "linear", "cosine")


def share_of_rate(settings: PPOSettings, step: int) -> float:
    """Share of the learning rates at a step: rising over the warm-up, then as the schedule says."""
    if step < settings.warmup_steps:
        return (step + 1) / (settings.warmup_steps + 1)
    done = (step - settings.warmup_steps) / max(settings.steps - settings.warmup_steps, 1)
    if settings.schedule == "linear":
        return 1.0 - done
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0 if settings.schedule == "constant" else _shares(*_key(settings))[step]


def _key(settings: PPOSettings) -> tuple[str, str, int, int]:
    return settings.schedule, json.dumps(settings.schedule_arguments or {}), settings.steps, settings.warmup_steps


def check_schedule(settings: PPOSettings) -> None:
    """Its name, its arguments and all of its numbers, before anything is loaded."""
    if settings.schedule not in OURS:
        _shares.cache_clear()  # a file may have changed since
        _shares(*_key(settings))
    elif settings.schedule_arguments:
        raise ConfigError(f"ppo.schedule_arguments: have no effect with ppo.schedule {settings.schedule}; leave them out")


@functools.lru_cache(maxsize=8)
def _shares(name: str, arguments: str, steps: int, warmup: int) -> tuple[float, ...]:
    """Of all steps of a run; those of the warm-up are not read."""
    given: dict[str, Any] = json.loads(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of schedulers, on how training loops should step them
            found = _made(name, given, steps, warmup)
    except ConfigError:
        raise
    except Exception as error:
        told = f" with ppo.schedule_arguments {given}" if given else ""
        raise ConfigError(f"ppo.schedule: {name}{told} does not work: {said(error)}") from error
    for step, share in enumerate(found):
        if not (isinstance(share, int | float) and math.isfinite(share) and share >= 0):
            raise ConfigError(f"ppo.schedule: {name} gives {share!r} at step {step + 1}; it must be a number of 0 or more")
    return tuple(map(float, found))


def _made(name: str, given: dict[str, Any], steps: int, warmup: int) -> list[float]:
    if is_custom(name):
        own: Callable[..., Any] = load_function(name, "ppo.schedule")
        if not isinstance(own, type):
            return [own(step, steps, **given) for step in range(steps)]
        return [1.0] * warmup + _followed(lambda optimizer: own(optimizer, **given), steps - warmup)
    from transformers import SchedulerType, get_scheduler

    theirs = [kind.value for kind in SchedulerType if kind.value not in ("reduce_lr_on_plateau", "greedy")]
    if name in theirs:
        return _followed(lambda optimizer: get_scheduler(name, optimizer, warmup, steps, given), steps)
    classes = {key: value for key, value in vars(torch.optim.lr_scheduler).items() if inspect.isclass(value)}
    plain = {key: value for key, value in classes.items() if issubclass(value, torch.optim.lr_scheduler.LRScheduler)}
    plain = {key: value for key, value in plain.items() if "metrics" not in inspect.signature(value.step).parameters}
    if name in plain and name != "LRScheduler":
        return [1.0] * warmup + _followed(lambda optimizer: plain[name](optimizer, **given), steps - warmup)
    if name in classes or name in ("reduce_lr_on_plateau", "greedy"):
        raise ConfigError(
            f"ppo.schedule: {name} follows a metric, not the step; choose another, or write a function of the step"
        )
    near = near_name(name, [*OURS, *theirs]) or near_name(name, plain)
    hint = f"did you mean {near}?" if near else f"there are {', '.join([*OURS, *theirs])}, and torch.optim.lr_scheduler's"
    raise ConfigError(f"ppo.schedule: there is no {name!r}; {hint}")


def _followed(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """What a scheduler makes of a rate of 1. The optimizer has no momentum that could be moved with it: ours would not be."""
    optimizer = torch.optim.Adagrad([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    shares = []
    for _ in range(steps):
        shares.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return shares
