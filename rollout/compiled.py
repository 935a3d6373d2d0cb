"""The compiled decode step: fixed shapes, a static cache, one graph (on a GPU a CUDA graph) instead of a launch per operation.

    sampling.compile ── does it fit? ─┬─ yes: static cache, every step through the compiled model, ended rows stay
                                      └─ no:  the plain path, said once

It does not fit encoder-decoders, models whose cache is not dense (hybrid, Mamba), models that keep hooks, and weights that
are spread over ranks. Rows cannot leave a static cache and prompts cannot be copied into one: for many samples of a prompt,
or lengths that differ a lot, the plain path may be the faster one. The first step at each batch size compiles.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout.policy import Policy

logger = logging.getLogger(__name__)
BACKEND = "inductor"
"""Tests that want the path without the compiler's minute take `eager`."""


def why_not(policy: Policy) -> str | None:
    """Why this model cannot be decoded so; None when it can."""
    core = policy.core
    if policy.is_seq2seq:
        return "an encoder-decoder has two caches"
    if not getattr(core, "_can_compile_fullgraph", False):
        return f"transformers cannot compile {type(core).__name__} as one graph"
    if not (policy.habits.caching and policy.habits.picking and policy.habits.pads_in_text):
        return f"the cache of {type(core).__name__} is not a plain one"
    if any(module._forward_hooks or module._forward_pre_hooks for module in core.modules()):
        return "hooks on the model (steering, or another library's) would be left out"
    return None


def fits(policy: Policy, synced: bool) -> bool:
    """Whether the compiled path is taken; a reason against it is told once."""
    reason = "the weights are spread over ranks" if synced else why_not(policy)
    if reason is not None and reason not in _TOLD:
        _TOLD.add(reason)
        logger.warning("sampling.compile: %s; sampling goes the plain way", reason)
    return reason is None


_TOLD: set[str] = set()


def forward_of(policy: Policy) -> Any:
    """The model as a compiled call; the same one every time, so that a batch of a known shape compiles nothing."""
    from transformers import CompileConfig

    mode = "reduce-overhead" if policy.device.type == "cuda" else "default"
    return policy.core.get_compiled_call(CompileConfig(fullgraph=False, dynamic=None, backend=BACKEND, mode=mode))


def is_static(kwargs: dict[str, Any]) -> bool:
    """Whether generate did prepare a static cache, in every layer: hybrids get others beside it."""
    layers = getattr(kwargs.get("past_key_values"), "layers", [])
    return bool(layers) and all(type(layer).__name__.startswith("Static") for layer in layers)
