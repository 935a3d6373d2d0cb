"""The policy's weights on their way to the server: what it cannot hold is refused, a server that is gone told to all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.vllm.client import Gone
from steerl.rollout.model.policy import Policy
from steerl.rollout.weights.blocks import Block, Consume, adapted_tie, each, layer_by_layer, tell

Value = TypeVar("Value")


def blocks(policy: Policy, *, merge: bool = True) -> list[Block]:
    """All weights. A head that is tied to the embedding is one weight in the server."""
    core = policy.core
    embedding, head = core.get_input_embeddings(), core.get_output_embeddings()
    if adapted_tie(policy):
        raise UserError(
            "model.peft: an adapter sits in the embedding or in the head that is tied to it, which a server holds as one "
            "weight; leave them out of the adapter, or use engine.kind stream"
        )
    tied = head is not None and core.config.get_text_config(decoder=True).tie_word_embeddings
    if tied and head.weight is not embedding.weight:
        raise UserError(
            f"model: the config says tie_word_embeddings, but {type(core).__name__} has a head of its own; save it with "
            "tie_word_embeddings false, or use engine.kind stream"
        )
    return layer_by_layer(policy, merge=merge)


def send(parts: Sequence[Block], consume: Consume, *, alone: bool = False) -> None:
    """`consume` reads every (name, value) on the main process; its UserError or Gone is raised on all. Collective."""
    problem = each(parts, consume, main=alone or processes.start().is_main, also=(Gone,))
    on_main(partial(tell, problem), alone=alone)


def on_main(function: Callable[[], Value], *, alone: bool = False) -> Value:
    """As processes.on_main, of what asks the server: Gone is raised everywhere, too. `alone`: here, whatever others do."""

    def asked() -> Value | _Gone:
        try:
            return function()
        except Gone as gone:
            return _Gone(str(gone))

    if isinstance(answer := asked() if alone else processes.on_main(asked), _Gone):
        raise Gone(answer.told)
    return answer


@dataclass(frozen=True)
class _Gone:
    """Gone, on its way to the other ranks."""

    told: str
