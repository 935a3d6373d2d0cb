"""The policy's weights as a checkpoint has them, brought together layer by layer: what a server is sent, what a run leaves.

    layer_by_layer(policy)  a block for each layer, one for each weight outside of them
    block.whole()           on every rank: its weights together (ZeRO-3, FSDP2); a layer's worth of memory
    block.saved(values)     on the main one: adapters merged, names and layout of save_pretrained
    each(blocks, consume)   all of it, in step on all ranks, whatever the main one meets

A weight that is tied to another is sent once, under the name that comes first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.model import adapters, compat, sharding
from steerl.rollout.model.policy import Policy
from steerl.rollout.weights.files import Announced

Consume = Callable[[Iterator[tuple[str, Tensor]]], None]


@dataclass(frozen=True)
class Block:
    """Weights that are brought together at the same time."""

    core: Any
    tensors: Mapping[str, Tensor]
    """As the engine holds them, in parts or whole, by the core's names."""
    adapted: Mapping[str, nn.Module]
    """The layers among them in which an adapter sits."""
    merge: bool
    """With the adapter in them; without, they are the base's."""

    @contextlib.contextmanager
    def whole(self) -> Iterator[dict[str, Tensor]]:
        with sharding.whole(self.tensors) as values:
            yield values

    def saved(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        plain = {name: value for name, value in values.items() if not self._layer_of(name)}
        by_id = {id(tensor): values[name] for name, tensor in self.tensors.items()}
        for prefix, layer in self.adapted.items():
            if self.merge:
                state = adapters.merged_layer(layer, by_id)
            else:
                state = {n: by_id[id(v)] for n, v in base_of(layer).state_dict(keep_vars=True).items()}
            plain |= {f"{prefix}.{name}": value for name, value in state.items()}
        return compat.as_saved(self.core, {name: value.detach() for name, value in plain.items()})

    def announced(self) -> list[Announced]:
        """What `saved` gives, without its numbers."""
        bare = {name: torch.empty(_shape(t), dtype=t.dtype, device="meta") for name, t in self.tensors.items()}
        plain = {name: value for name, value in bare.items() if not self._layer_of(name)}
        names = {id(tensor): name for name, tensor in self.tensors.items()}
        for prefix, layer in self.adapted.items():
            state = base_of(layer).state_dict(keep_vars=True)
            plain |= {f"{prefix}.{name}": bare[names[id(value)]] for name, value in state.items()}
        return [Announced.of(name, value) for name, value in compat.as_saved(self.core, plain).items()]

    def _layer_of(self, name: str) -> str:
        return next((layer for layer in self.adapted if name.startswith(f"{layer}.")), "")


def base_of(layer: Any) -> nn.Module:
    """The plain layer inside an adapted one."""
    inside: nn.Module = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.original_module
    return inside


def layer_by_layer(policy: Policy, *, merge: bool = True) -> list[Block]:
    """All weights, and buffers that a checkpoint keeps, in the core's order."""
    core = policy.core
    adapted = adapters.adapted_layers(core) if _has_adapter(policy) else {}
    first = {id(tensor): name for name, tensor in reversed(core.state_dict(keep_vars=True).items())}
    tensors = {name: tensor for name, tensor in core.state_dict(keep_vars=True).items() if first[id(tensor)] == name}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer = next((layer for layer in adapted if name.startswith(f"{layer}.")), name)
        groups.setdefault(_block_of(layer), {})[name] = tensor
    return [
        Block(core, group, {name: m for name, m in adapted.items() if _block_of(name) == key}, merge)
        for key, group in groups.items()
    ]


def _block_of(name: str) -> str:
    """model.layers.3 of model.layers.3.mlp.up_proj.weight; a name without a number stands for itself."""
    words = name.split(".")
    first = next((at for at, word in enumerate(words) if word.isdigit()), len(words))
    return ".".join(words[: first + 1])


def each(
    parts: Sequence[Block], consume: Consume, *, main: bool | None = None, also: tuple[type[Exception], ...] = ()
) -> Exception | None:
    """`consume` reads every (name, value) on the main process. Collective: where it gives up, all ranks gather on to the end,
    and its UserError, or one of `also`, is given back there, to be told to all."""
    left = iter(parts)
    stops: tuple[type[Exception], ...] = (UserError, *also)

    def saved() -> Generator[tuple[str, Tensor]]:
        for block in left:
            with block.whole() as values, torch.no_grad():
                yield from block.saved(values).items() if main else ()

    main, weights, problem = processes.start().is_main if main is None else main, saved(), None
    if main:
        try:
            consume(weights)
        except stops as error:
            problem = error
            weights.close()
    for _ in weights:
        pass
    for block in left:
        with block.whole():
            pass
    return problem


def tell(problem: Exception | None) -> None:
    if problem is not None:
        raise problem


def peft_model(model: Any) -> Any:
    """The innermost of wrappers: the PeftModel where there is one. Some wrappers pass its attributes on as their own."""
    model = compat.uncompiled(model)
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = compat.uncompiled(inner)
    return model


def _shape(tensor: Any) -> torch.Size:
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def adapted_tie(policy: Policy) -> bool:
    """Whether an adapter sits in the embedding or in the head that is tied to it: merged, they are two weights."""
    core = policy.core
    embedding, head = core.get_input_embeddings(), core.get_output_embeddings()
    tied = head is not None and core.config.get_text_config(decoder=True).tie_word_embeddings
    adapted = adapters.adapted_layers(core).values() if tied and _has_adapter(policy) else ()
    return any(layer in (embedding, head) for layer in adapted)


def _has_adapter(policy: Policy) -> bool:
    return hasattr(peft_model(policy.model), "peft_config")
