"""A forward pass whose output embedding gives log-probs and entropies instead of logits.

    model ── hidden (B, T, D) ──> head: the rows that predict a real action ── head_rows.py ──> two numbers each

The head's forward is exchanged for the length of the pass, inside the module: the model, its wrappers and their hooks
(which gather the head's weight, now and on the way back) run as ever. Where anybody is to see the logits themselves, a
user's hook or a steering site on the head, or where rows cannot go through it in chunks, the model keeps its own way.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from steerl.rollout.model import hooks as steering_hooks
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.after_head import AfterHead, after_head
from steerl.rollout.scoring.head_rows import HeadRows
from steerl.rollout.types import Rollout
from torch import Tensor, nn

enabled = True
"""False leaves all logits to the model at once: slower and larger, the same numbers."""


class Readout:
    """What one pass wants of its head, and what it got; None where the head was not called as it was observed to be."""

    def __init__(
        self, core: Any, after: AfterHead, rollout: Rollout, first_B: Tensor | None, temperature: float, want_entropy: bool
    ):
        self.core, self.after, self.temperature, self.want_entropy = core, after, temperature, want_entropy
        self.head: nn.Module = core.get_output_embeddings()
        self.mask_BR, self.response_BR, self.first_B = rollout.mask_BR, rollout.response_BR, first_B
        self.hidden_BTD: Tensor | None = None
        self.numbers: Tensor | None = None
        """(B, R, 2): log-prob and entropy (0 where it is not wanted); masked entries hold 0."""

    def read(self, hidden_BTD: Tensor, forward: Callable[..., Tensor]) -> Tensor:
        """Stands for the head's output. Where the model goes on to do something to its logits, it gets none."""
        rows, width = self.mask_BR.shape
        self.hidden_BTD = hidden_BTD
        device = hidden_BTD.device
        real_N = self.mask_BR.flatten().nonzero()[:, 0].to(device)
        place_N = _places(hidden_BTD, self.first_B, width).flatten()[real_N]
        hidden_ND = hidden_BTD.flatten(0, 1).index_select(0, place_N)
        tokens_N = self.response_BR.flatten().to(device)[real_N]
        head = HeadRows(self.core, self.head, forward, self.after, self.temperature, self.want_entropy, device.type)
        numbers_N2 = head.read(hidden_ND, tokens_N)
        numbers = numbers_N2.new_zeros(rows * width, 2).index_copy(0, real_N, numbers_N2)
        self.numbers = numbers.view(rows, width, 2)
        return self.numbers if not self.after.operations else hidden_BTD.new_empty(rows, 0, head.vocabulary)


def _places(hidden_BTD: Tensor, first_B: Tensor | None, width: int) -> Tensor:
    """(B, R): where, in the states of all rows one after another, that one stands which predicts response token t."""
    rows, total = hidden_BTD.shape[:2]
    device = hidden_BTD.device
    if first_B is None:
        first_B = torch.full((rows,), total - width, device=device)
    column_BR = first_B.to(device)[:, None] + torch.arange(width, device=device)[None]
    return torch.arange(rows, device=device)[:, None] * total + column_BR.clamp(max=total - 1)


def predicting(hidden_BTD: Tensor, first_B: Tensor | None, width: int) -> Tensor:
    """(B, R, D): the states that predict the response. `first_B`: each row's first such column; None = the last R of all."""
    if first_B is None:
        return hidden_BTD[:, -width:]
    return hidden_BTD.flatten(0, 1)[_places(hidden_BTD, first_B, width)]


def readable(policy: Policy) -> AfterHead | None:
    """What comes after the head, or None where rows cannot go through it by themselves, or somebody is to see the logits."""
    core = policy.core
    head = core.get_output_embeddings()
    if not enabled or head is None or _wrapped(head) or _watched(core) or any(_watched(module) for module in head.modules()):
        return None
    after = after_head(policy)
    return None if after is None or (after.operations and _gathered(head)) else after


def _wrapped(head: nn.Module) -> bool:
    """A module whose own forward is the wrapper's work; or parts that gather their weights one by one."""
    return hasattr(head, "_fsdp_wrapped_module") or hasattr(head, "_orig_mod") or (_gathered(head) and any(head.children()))


def _gathered(head: nn.Module) -> bool:
    """Whether an engine puts the weights together when the module is called, and on the way back when its output is met."""
    return any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in head.parameters())


_NOT_USERS = ("torch.", "deepspeed.", "accelerate.", "peft.", "transformers.", "rollout.")
"""Owners of hooks that do their own work and read no logits."""


def _watched(module: nn.Module) -> bool:
    """Whether hooks of a user, or an active steering, are to see what the module gives."""
    frame = steering_hooks.current()
    if frame is not None and any((id(module), io) in frame.points for io in ("input", "output")):
        return True
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        while isinstance(hook, functools.partial):
            hook = hook.func
        owner = str(getattr(hook, "__module__", ""))
        if not owner.startswith(_NOT_USERS):
            return True
    return False


# -- the head's forward, for the length of a pass ------------------------------------------------------------------------

_READOUT: ContextVar[Readout | None] = ContextVar("readout", default=None)
_swapping = threading.Lock()


class _Forward:
    """A head's forward: the readout's where one is active in this context, else the head's own (other threads)."""

    def __init__(self, own: Any):
        self.own, self.users, self.replaced = own, 0, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        readout = _READOUT.get()
        if readout is None or readout.numbers is not None or len(args) != 1 or kwargs or args[0].dim() != 3:
            return self.own(*args, **kwargs)
        return readout.read(args[0], self.own)


@contextlib.contextmanager
def reading(
    core: Any, after: AfterHead, rollout: Rollout, first_B: Tensor | None, temperature: float, want_entropy: bool
) -> Iterator[Readout]:
    """Inside, the model's head gives numbers instead of logits. `first_B` as in `predicting`."""
    readout = Readout(core, after, rollout, first_B, temperature, want_entropy)
    head = readout.head
    with _swapping:
        forward = vars(head).get("forward")
        if not isinstance(forward, _Forward):
            forward = _Forward(head.forward)
            forward.replaced = "forward" in vars(head)
            head.forward = forward
        forward.users += 1
    token = _READOUT.set(readout)
    try:
        yield readout
    finally:
        _READOUT.reset(token)
        with _swapping:
            forward.users -= 1
            if not forward.users and forward.replaced:
                head.forward = forward.own
            elif not forward.users:
                del head.forward
