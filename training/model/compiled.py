"""Layers of actor and critic compiled, in the passes that are learned from (ppo.compile).

    score   old log-probs and values ──┐
                                       ├── ActorCritic.forward ── hooks ── a layer's own forward, compiled ── hooks
    learn   epochs x minibatches ──────┘

Both take the same graph, so the first ratio stays 1. One graph serves all layers of a class, of any number of rows and tokens;
the compiler keeps it on disk (TORCHINDUCTOR_CACHE_DIR), and a later run takes seconds. Sampling, references and evaluations
go by the plain layers.

Hooks around a layer (steering of its output) run as ever. A layer with hooks inside is not compiled: a graph would leave them
out.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.progress import doing
from steerl.rollout.model import compat, language_model, virtual_tokens
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.types import Rollout
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.settings import PPOSettings

logger = logging.getLogger(__name__)
BACKEND = "inductor"
"""Tests that want the path without the compiler's minute take `aot_eager`."""
MOST_GRAPHS = 4
"""That a model's layers may take at one length of rows: kinds of layers, with windows and without, with experts and without."""


_numbers = itertools.count()


class CompiledLayers:
    """Call it around a pass: `with layers(): model(rollout)`."""

    def __init__(self, actor_critic: ActorCritic, backend: str | Callable[..., Any] | None = None):
        from transformers.modeling_layers import GradientCheckpointingLayer

        found = [m for core in actor_critic.cores() for m in core.modules() if isinstance(m, GradientCheckpointingLayer)]
        nested = {id(inner) for layer in found for inner in layer.modules() if inner is not layer}
        self.layers: list[nn.Module] = [layer for layer in found if id(layer) not in nested]
        self.failed = ""
        """What the compiler said when it gave up."""
        self.quiet = False
        """Whoever uses it tells that it failed."""
        self._backend = backend or BACKEND
        self._forwards = {kind: self._compiled(kind) for kind in {type(layer) for layer in self.layers}}

    def _compiled(self, kind: type[nn.Module]) -> Callable[..., Any]:
        own = kind.forward

        def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return own(layer, *args, **kwargs)

        # Under a name of its own: the compiler counts graphs per function and gives up after a few, and transformers' layers of
        # all classes have one.
        code = run.__code__.replace(co_name=f"layer_{next(_numbers)}")
        named = types.FunctionType(code, globals(), closure=run.__closure__)
        compiled = torch.compile(named, fullgraph=True, dynamic=True, backend=self._backend)

        def forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            try:
                return own(layer, *args, **kwargs) if self.failed else compiled(layer, *args, **kwargs)
            except compat.compile_errors() as error:
                # Nothing of the layer has run.
                cause = getattr(error, "inner_exception", error)
                self.failed = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
                if not self.quiet:
                    logger.warning("ppo.compile: %s failed (%s); learning goes on uncompiled", kind.__name__, self.failed)
                return own(layer, *args, **kwargs)

        return forward

    def whole(self) -> list[nn.Module]:
        """Those that nobody looks into."""
        return [
            layer
            for layer in self.layers
            if not any(compat.forward_hooks(inner) for inner in layer.modules() if inner is not layer)
        ]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        taken = self.whole() if torch.is_grad_enabled() and not self.failed else []
        for layer in taken:
            layer.forward = types.MethodType(self._forwards[type(layer)], layer)
        try:
            yield
        finally:
            for layer in taken:
                del layer.forward


def compile_layers(actor_critic: ActorCritic, settings: PPOSettings, held_by: str = "") -> None:
    """As ppo.compile says: `on` refuses what `auto` leaves uncompiled with a line. What a graph gives is compared with the
    plain layers here, before anything is learned. `held_by`: the engine that has the weights in its hands, if one has."""
    if settings.compile == "off":
        return
    layers = CompiledLayers(actor_critic)
    reason, layers.quiet = why_not(actor_critic, layers, settings, held_by), True
    if reason is None:
        with doing(f"compiling the layers of {type(actor_critic.policy.core).__name__}"):
            reason = _takes_many(actor_critic)
            for policy in actor_critic.policies:
                reason = reason or _disagrees(policy, layers, actor_critic.packed, policy is actor_critic.policy)
    reason = next((told for told in processes.gather_objects([reason]) if told), None)  # all ranks, or none
    if reason is None:
        actor_critic.compiled, layers.quiet = layers, False
    elif settings.compile == "on":
        raise ConfigError(f"ppo.compile: on, but {reason}; set it to off")
    elif processes.start().is_main:
        logger.warning("ppo.compile: %s; learning goes on uncompiled", reason)


def why_not(actor_critic: ActorCritic, layers: CompiledLayers, settings: PPOSettings, held_by: str = "") -> str | None:
    """What stands against it; None where nothing does."""
    name = type(actor_critic.policy.core).__name__
    if held_by:
        return f"{held_by} holds the weights; one process or DDP has them as they are"
    for other in ("checkpointing", "offload_activations"):
        if getattr(settings, other):
            return f"ppo.{other} is true, and changes what layers keep, which a graph settles by itself"
    if actor_critic.policy.is_seq2seq:
        return f"{name} is an encoder-decoder, whose layers call each other by their caches"
    if virtual_tokens.count(actor_critic.policy.model):
        return "virtual tokens reach the layers through a cache"
    if not layers.layers:
        return f"{name} has no layers of transformers' kind"
    if any("forward" in vars(layer) for layer in layers.layers):
        return f"something else has put a forward of its own on the layers of {name}"
    return None if layers.whole() else "every layer has hooks inside (steering or others'), which a graph would leave out"


def _takes_many(actor_critic: ActorCritic) -> str | None:
    """Whether layers would be compiled again and again: graphs are counted, without the compiler, at two lengths of rows."""
    graphs: list[object] = []

    def counting(graph: Callable[..., Any], inputs: object) -> Callable[..., Any]:
        graphs.append(graph)
        if len(graphs) > most:
            raise RuntimeError("enough")
        return graph

    traced, packed = CompiledLayers(actor_critic, counting), actor_critic.packed
    traced.quiet = True
    for policy in actor_critic.policies:
        _ = policy.capabilities  # seen by passes of their own
        for length, each in ((8, "layer"), (11, "length of rows")):
            most = len(graphs) + (MOST_GRAPHS if each == "layer" else 0)
            with traced(), torch.enable_grad():
                teacher_forced(policy, _probe(policy, length), want_entropy=False, want_logprobs=False, packed=packed)
            if len(graphs) > most:
                return f"{type(policy.core).__name__} compiles a graph for each {each}"
    return None


def _probe(policy: Policy, length: int) -> Rollout:
    """Two rows, the longer one of so many tokens with its prompt."""
    ids = language_model.probe_row(policy, 3, length)[0].tolist()
    return Rollout.of_ids([ids[:3], ids[:5]], [ids[3:], ids[5:]], pad_id=policy.pad_id, device=policy.device)


def _disagrees(policy: Policy, layers: CompiledLayers, packed: bool, is_actor: bool) -> str | None:
    """What is wrong with the graph's numbers, forward or back; None where they are the plain layers'."""
    rows = _probe(policy, 8)
    first = next(module for module in policy.core.modules() if module in set(layers.layers))
    weights = [p for p in first.parameters() if p.requires_grad]  # where errors of all layers come together

    def numbers() -> list[Tensor]:
        with torch.enable_grad():
            forced = teacher_forced(
                policy, rows, want_hidden=True, want_entropy=False, want_logprobs=is_actor, temperature=1.0, packed=packed
            )
            assert forced.hidden_BRD is not None
            hidden = forced.hidden_BRD
            # Not the squares: a norm before the head has them all but constant, and nothing to give back but rounding.
            loss = hidden.float().abs().mean() + forced.logprobs_BR.sum()
            gradients = torch.autograd.grad(loss, weights, allow_unused=True) if loss.requires_grad else ()
        # All gradients at once: one that is 0 but for rounding says nothing by itself. Under autocast they are as rough as the
        # products.
        gradient = torch.cat([hidden.new_zeros(1), *(given.flatten() for given in gradients if given is not None)])
        return [number.detach().to(hidden.dtype) for number in (hidden, forced.logprobs_BR, gradient)]

    plain = numbers()
    with layers():
        found = numbers()
    name = type(policy.core).__name__
    if layers.failed:
        return f"the layers of {name} cannot be compiled ({layers.failed})"
    same = all(map(language_model.same, found, plain))
    return None if same else f"a graph does not give the numbers of {name}"
