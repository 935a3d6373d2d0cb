"""A loss or a credit of the user's own, `file.py:name` or `module:name`: found, tried on a few rows, and called.

    ppo.loss     as those of loss.py:       (new_BR, old_BR, advantages_BR, mask_BR, weights_BR, ...) -> (loss, metrics)
    ppo.credit   as those of advantages.py: (rewards_BR, values_BR, mask_BR, ...) -> (advantages_BR, returns_BR)

A function gets, by name, those of the inputs that it names. A credit that names `values_BR` has a value model beside the
policy, one that names `group_B` compares the samples of a prompt. `check` tries both before a run begins, on rows with gaps and
without actions: what would differ from one micro-batch size to the next is refused there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common.errors import ConfigError, UserError, said, visible
from steerl.rollout.common.loading import load_function
from steerl.training.algorithm import loss
from steerl.training.algorithm.advantages import Credit
from steerl.training.settings import PPOSettings, is_custom

OWN = "loss/"
"""What stands before the names of a custom loss's metrics."""
RATIO = ("new_BR", "old_BR", "advantages_BR", "mask_BR", "weights_BR", "importance_BR")
BOUNDS = {
    "clip_low": "clip",
    "clip_high": "clip_high",
    "dual_clip": "dual_clip",
    "divergence": "dppo_divergence",
    "threshold": "dppo_threshold",
}
"""Inputs of a loss that are settings, by the setting's name."""
ROWS = ("rewards_BR", "values_BR", "mask_BR", "group_B", "bootstrap_B")
DISCOUNTS = {"gamma": "gamma", "lam": "lam"}


class Custom:
    """The user's function of one setting."""

    def __init__(self, settings: PPOSettings, name: str):
        self.spec, self.where = getattr(settings, name), f"ppo.{name}"
        self.function: Callable[..., Any] = load_function(self.spec, self.where)
        given = {*RATIO, *BOUNDS} if name == "loss" else {*ROWS, *DISCOUNTS}
        parameters = inspect.signature(self.function).parameters.values()
        self.takes = {p.name for p in parameters} & given
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            self.takes = given
        needs = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if odd := [need for need in needs if need not in given]:
            raise ConfigError(
                f"{self.where}: {self.spec} takes {odd[0]!r}, which it is not given; it may take {', '.join(sorted(given))}"
            )

    def __call__(self, **inputs: Any) -> Any:
        return self.function(**{name: value for name, value in inputs.items() if name in self.takes})

    def wrong(self, told: str) -> UserError:
        return UserError(f"{self.where}: {self.spec} {told}")


# -- what it is ------------------------------------------------------------------------------------------------------


def uses_value(settings: PPOSettings) -> bool:
    """Whether credit is given by a value, so that a value model learns beside the policy."""
    return "values_BR" in Custom(settings, "credit").takes if is_custom(settings.credit) else settings.credit == "gae"


def compares_samples(settings: PPOSettings) -> bool:
    """Whether credit is given by comparing the samples of a prompt."""
    return "group_B" in Custom(settings, "credit").takes if is_custom(settings.credit) else settings.credit != "gae"


def whitens(settings: PPOSettings) -> bool:
    """Whether the step's advantages are standardized."""
    unset = settings.whiten_advantages is None
    return settings.credit == "reinforce_baseline" or uses_value(settings) if unset else bool(settings.whiten_advantages)


# -- called ----------------------------------------------------------------------------------------------------------


def custom_loss(settings: PPOSettings) -> Callable[..., tuple[Tensor, loss.Metrics]]:
    """The function of `ppo.loss` in the form of ours. Its metrics get names of their own beside those of every loss."""
    custom = Custom(settings, "loss")
    high = settings.clip if settings.clip_high is None else settings.clip_high
    bounds = {
        "clip_low": settings.clip,
        "clip_high": high,
        "dual_clip": settings.dual_clip,
        "divergence": settings.dppo_divergence,
        "threshold": settings.dppo_bound,
    }

    def call(
        new_BR: Tensor,
        old_BR: Tensor,
        advantages_BR: Tensor,
        mask_BR: Tensor,
        weights_BR: Tensor,
        *,
        importance_BR: Tensor | None = None,
    ) -> tuple[Tensor, loss.Metrics]:
        rows = dict(zip(RATIO, (new_BR, old_BR, advantages_BR, mask_BR, weights_BR, importance_BR), strict=True))
        found = custom(**rows, **bounds)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            raise custom.wrong(f"gave {_kind(found)}; expected (loss, metrics), a scalar tensor and a dictionary of such")
        total, told = found
        if not (isinstance(total, Tensor) and total.ndim == 0 and total.is_floating_point() and total.requires_grad):
            raise custom.wrong(f"gave {_kind(total)} as its loss; expected a scalar tensor that has a gradient to new_BR")
        log_ratio_BR = torch.where(mask_BR, new_BR - old_BR, 0.0)
        metrics = loss.moved(total, log_ratio_BR, mask_BR, weights_BR)
        for name, value in told.items():
            number = torch.as_tensor(value, device=total.device) if isinstance(value, int | float) else value
            if not (isinstance(number, Tensor) and number.ndim == 0):
                raise custom.wrong(f"gave {_kind(value)} as its metric {visible(str(name))!r}; expected a scalar tensor")
            if name not in metrics:
                metrics[name if name == "clip_fraction" else OWN + visible(str(name))] = number.detach()
        return total, metrics

    return call


def custom_credit(settings: PPOSettings) -> Callable[..., Credit]:
    """The function of `ppo.credit`, whose numbers are looked at."""
    custom = Custom(settings, "credit")

    def call(*, mask_BR: Tensor, **rows: Any) -> Credit:
        found = custom(mask_BR=mask_BR, **rows, gamma=settings.gamma, lam=settings.lam)
        if isinstance(found, Tensor) and "values_BR" not in custom.takes:
            found = (found, torch.zeros_like(found))  # nothing learns towards returns
        if not (isinstance(found, tuple) and len(found) == 2):
            raise custom.wrong(f"gave {_kind(found)}; expected (advantages_BR, returns_BR)")
        for name, value in zip(("advantages_BR", "returns_BR"), found, strict=True):
            if not isinstance(value, Tensor) or value.shape != mask_BR.shape:
                raise custom.wrong(f"gave {_kind(value)} as {name}; expected a tensor of {tuple(mask_BR.shape)}")
            bad = torch.nonzero(mask_BR & ~value.isfinite()).tolist()
            if bad:
                raise custom.wrong(f"gave {value[tuple(bad[0])].item()} as {name} of row {bad[0][0]}, token {bad[0][1]}")
        return Credit(*(torch.where(mask_BR, value, 0.0).float() for value in found))

    return call


def _kind(value: object) -> str:
    return f"a tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


# -- tried -----------------------------------------------------------------------------------------------------------


def check(settings: PPOSettings) -> list[str]:
    """A line for everything that is wrong with the functions, and for settings that they do not look at."""
    problems: list[str] = []
    for name, settled in (("loss", BOUNDS), ("credit", DISCOUNTS)):
        if not is_custom(getattr(settings, name)):
            continue
        try:
            custom = Custom(settings, name)
            problems += [
                f"ppo.{setting}: {getattr(settings, setting)!r} has no effect with {custom.spec}, which takes no {taken}; "
                "leave it out"
                for taken, setting in settled.items()
                if taken not in custom.takes and getattr(settings, setting) != getattr(PPOSettings, setting)
            ]
            problems += _of_loss(settings, custom) if name == "loss" else _of_credit(settings, custom)
            try_it = _try_loss if name == "loss" else _try_credit
            try_it(settings, custom)
        except UserError as problem:
            problems += problem.lines
        except Exception as error:  # noqa: BLE001 - code of the user's
            problems.append(f"ppo.{name}: {getattr(settings, name)} failed on a trial of a few rows: {said(error)}")
    return problems


def _of_loss(settings: PPOSettings, custom: Custom) -> list[str]:
    if settings.correction is None or settings.correction.type == "none" or "importance_BR" in custom.takes:
        return []
    return [f"ppo.correction: its weights have no effect with {custom.spec}, which takes no importance_BR; let it take them"]


def _of_credit(settings: PPOSettings, custom: Custom) -> list[str]:
    unused = {} if "values_BR" in custom.takes else {"value": "separate", "value_warmup_steps": 0}
    unused |= {} if "bootstrap_B" in custom.takes else {"bootstrap_cut": False}
    problems = [
        f"ppo.{name}: {getattr(settings, name)!r} has no effect with {custom.spec}, which takes no "
        f"{'bootstrap_B' if name == 'bootstrap_cut' else 'values_BR'}; leave it out"
        for name, default in unused.items()
        if getattr(settings, name) != default
    ]
    if settings.drop_equal_groups and "group_B" not in custom.takes:
        problems.append(f"ppo.drop_equal_groups: true, but {custom.spec} takes no group_B; leave it out")
    return problems


def _try_loss(settings: PPOSettings, custom: Custom) -> None:
    """Rows together are the sum of each alone, half the weights are half of it, and a row without actions is nothing."""
    draw = torch.Generator().manual_seed(0)
    mask_BR = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    old_BR = torch.where(mask_BR, -torch.rand(3, 4, generator=draw) - 0.1, 0.0)
    moves_BR = torch.where(mask_BR, 0.02 * torch.randn(3, 4, generator=draw), 0.0)
    advantages_BR = torch.where(mask_BR, torch.randn(3, 4, generator=draw), 0.0)
    weights_BR = loss.token_weights(mask_BR, tokens=4, rows=2, reduction=settings.loss_reduction)
    importance_BR = torch.ones(3, 4) if settings.correction is not None else None
    call = custom_loss(settings)

    def told(rows: list[int], share: float = 1.0) -> dict[str, float]:
        new_BR = (old_BR + moves_BR)[rows].requires_grad_()
        total, metrics = call(
            new_BR,
            old_BR[rows],
            advantages_BR[rows],
            mask_BR[rows],
            share * weights_BR[rows],
            importance_BR=None if importance_BR is None else importance_BR[rows],
        )
        (gradient_BR,) = torch.autograd.grad(total, new_BR, allow_unused=True)
        if gradient_BR is None or not bool(gradient_BR.isfinite().all()):
            raise custom.wrong(
                "has no finite gradient to new_BR on a trial of three rows; mask with torch.where, not by a product"
            )
        return {"its loss": float(total.detach()), **{name: float(value) for name, value in metrics.items()}}

    whole, halved = told([0, 1, 2]), told([0, 1, 2], 0.5)
    alone = [told([row]) for row in range(3)]
    for name, value in whole.items():
        apart = sum(one.get(name, 0.0) for one in alone)
        near = 1e-5 * (1.0 + abs(value))
        if not abs(value - apart) <= near or not abs(value - 2 * halved[name]) <= near:
            which = name if name == "its loss" else f"metric {name.removeprefix(OWN)!r}"
            raise custom.wrong(
                f"is no sum over actions by weights_BR: {which} of three rows is {value:.6g}, of each alone {apart:.6g} in "
                f"all, by half the weights {halved[name]:.6g}; micro-batches would not add up: take the sum of weights_BR x ..."
            )


def _try_credit(settings: PPOSettings, custom: Custom) -> None:
    draw = torch.Generator().manual_seed(0)
    mask_BR = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    rewards_BR, values_BR = (torch.where(mask_BR, torch.randn(4, 4, generator=draw), 0.0) for _ in range(2))
    group_B = torch.tensor([7, 7, 3, 3])
    call = custom_credit(settings)
    call(rewards_BR=rewards_BR, values_BR=values_BR, mask_BR=mask_BR, group_B=group_B, bootstrap_B=torch.zeros(4))
