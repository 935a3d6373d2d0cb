"""What a run leaves for its users: RUN/model, which from_pretrained loads, with its tokenizer; and summary.json.

The model is brought together and written layer by layer, also with an adapter merged in; the few that are so no more (see
`_save_whole`) at once, under ZeRO-3 on every rank.

Steering that belongs to the policy goes with the model as its `on_deploy` says: strip (a plain model), keep (steering.yaml
beside it), fold (in its biases).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.common.run_folder import folder_aside, told_of_disk, write_json
from steerl.rollout.model import adapters, auto_classes, sharding
from steerl.rollout.model.policy import Policy
from steerl.rollout.steering import Steering, deploy
from steerl.rollout.steering.spec.spec import ROLES
from steerl.rollout.weights import blocks, files
from steerl.rollout.weights.files import Announced
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.run.card import write_card
from steerl.training.run.evaluate import Evaluation
from steerl.training.settings import PPOSettings
from steerl.training.types import TrainState

if TYPE_CHECKING:
    from accelerate import Accelerator

SHARD = 2_000_000_000
"""Bytes of weights in a file of RUN/model, but for a tensor that is larger."""


def deployed(steering: Steering | None) -> str:
    """What becomes of the steering when the policy is saved: strip, keep or fold. Without a part in the policy it is left."""
    return steering.spec.on_deploy if steering is not None and ROLES[steering.role].stays else "strip"


def check_export(model: ActorCritic, accelerator: Accelerator, settings: PPOSettings) -> None:
    """What cannot be left behind as asked is said before the first step."""
    steering, how = model.steering, deployed(model.steering)
    if settings.export_merged and hasattr(model.actor, "peft_config"):
        adapters.check_merge(model.actor)
    if steering is not None and steering.spec.on_deploy == "fold" and how != "fold":
        raise CheckpointError(
            f"steering.on_deploy: fold leaves the steering in the model, and role {steering.role} leaves a plain one; use strip"
        )
    if steering is not None and how == "fold":
        if hasattr(model.actor, "peft_config") and not settings.export_merged:
            raise CheckpointError(
                "steering.on_deploy: fold writes into the model, and the run saves an adapter alone; "
                "set ppo.export_merged true, or use keep"
            )
        deploy.check_fold(steering)
    if str(getattr(accelerator, "distributed_type", "")).rpartition(".")[2] != "FSDP":
        return
    problems = []
    if settings.export_merged and blocks.adapted_tie(model.policy):
        problems.append(
            "ppo.export_merged: true, but the adapter sits in the embedding or in the head that is tied to it, which FSDP's "
            "weights cannot be merged into; leave the adapter as it is, or use ZeRO-3"
        )
    if how != "strip":
        problems.append(
            f"steering.on_deploy: {how}, but FSDP's weights cannot be saved with their steering; use strip, or ZeRO-3"
        )
    if problems:
        raise CheckpointError(*problems)


def save_model(folder: Path, model: ActorCritic, settings: PPOSettings) -> None:
    """The policy in `folder`/model: the adapter alone where there is one, or the whole model with it merged in. Collective."""
    path, how = folder / "model", deployed(model.steering)
    adapted, tied = hasattr(model.actor, "peft_config"), blocks.adapted_tie(model.policy)

    def beside(aside: Path) -> None:
        with told_of_disk(path):
            if how == "keep" and model.steering is not None:
                deploy.save(model.steering, aside)
            model.policy.tokenizer.save_pretrained(aside)

    with folder_aside(path) as aside:
        if how == "fold" or (settings.export_merged and tied):
            _save_whole(path, aside, model)
        elif adapted and not settings.export_merged:
            _save_adapter(path, aside, model.policy)
        else:
            _save_layers(path, aside, model.policy)
        with sharding.gathered(*([model.vectors] if how == "keep" and model.vectors is not None else [])):
            processes.on_main(lambda: beside(aside))


def _save_whole(path: Path, aside: Path, model: ActorCritic) -> None:
    """Folded steering is compared with the steered model, and an adapter that is merged into a tied weight makes two of it."""

    def save() -> None:
        with told_of_disk(path):
            copied = copy.deepcopy(model.actor)
            plain = adapters.merge(copied) if hasattr(copied, "peft_config") else copied
            if deployed(model.steering) == "fold":
                assert model.steering is not None
                deploy.fold(model.steering, plain)
            auto_classes.save(plain, aside)

    with sharding.gathered(*model.policy_modules()):
        processes.on_main(save)


def _save_adapter(path: Path, aside: Path, policy: Policy) -> None:
    adapted = blocks.peft_model(policy.model)
    virtual = adapted.active_peft_config.is_prompt_learning
    own = _kept(adapted) if sharding.is_sharded(adapted) and not virtual else {}

    def save() -> None:
        with told_of_disk(path):
            adapters.save(adapted, aside, {name: value.cpu() for name, value in values.items()})

    # Virtual tokens are read by running their module.
    with sharding.gathered(*([adapted.prompt_encoder] if virtual else [])), sharding.whole(own) as values:
        processes.on_main(save)


def _kept(model: Any) -> dict[str, Tensor]:
    """What peft may keep of an adapter: its own weights, those of the base that learn beside it, and the embeddings, where an
    adapter sits in them or tokens were added."""
    base = model.get_base_model()
    ends = {id(p) for layer in (base.get_input_embeddings(), base.get_output_embeddings()) if layer for p in layer.parameters()}
    return {
        name: value
        for name, value in model.state_dict(keep_vars=True).items()
        if value.requires_grad or id(value) in ends or model.active_adapter in name.split(".")
    }


def _save_layers(path: Path, aside: Path, policy: Policy) -> None:
    """As save_pretrained would, in files of at most SHARD bytes, with a layer's worth of memory."""
    layers = blocks.layer_by_layer(policy)
    shards = _shards([entry for layer in layers for entry in layer.announced()])

    def write(weights: Iterator[tuple[str, Tensor]]) -> None:
        with told_of_disk(path):
            auto_classes.describe(policy.core, aside)  # first: it would take files of weights away
            for name, entries in shards.items():
                files.write(aside / name, entries, islice(weights, len(entries)), {"format": "pt"})
            if len(shards) > 1:
                write_json(aside / "model.safetensors.index.json", _index(shards))

    problem = blocks.each(layers, write)
    processes.on_main(partial(blocks.tell, problem))


def _index(shards: Mapping[str, Sequence[Announced]]) -> dict[str, object]:
    entries = [entry for shard in shards.values() for entry in shard]
    total = {"total_parameters": sum(entry.count for entry in entries), "total_size": sum(entry.bytes for entry in entries)}
    return {"metadata": total, "weight_map": {entry.name: name for name, shard in shards.items() for entry in shard}}


def _shards(entries: Sequence[Announced]) -> dict[str, list[Announced]]:
    """By the names of the files."""
    shards: list[list[Announced]] = [[]]
    for entry in entries:
        if shards[-1] and sum(e.bytes for e in shards[-1]) + entry.bytes > SHARD:
            shards.append([])
        shards[-1].append(entry)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def summarize(folder: Path, state: TrainState, after: Evaluation | None, ended_of: int | None = None) -> dict[str, Any]:
    """Write summary.json, the last file of a run, and return what it holds. `ended_of`: steps of a run that a hook ended."""
    summary = {
        "reward_before": state.reward_before,
        "reward_after": after and after.reward,
        "kl_after": after and after.kl,
        "gap_max": state.totals.get("gap_max", 0.0),
        "steps": state.step,
        "optimizer_steps": int(state.totals.get("optimizer_steps", 0)),
        "rollouts": int(state.totals.get("rollouts", 0)),
        "tokens": int(state.totals.get("tokens", 0)),
        "seconds": state.totals.get("seconds", 0.0),
        "world_size": processes.start().world_size,
        **({} if ended_of is None else {"ended_of": ended_of}),
    }

    def write() -> None:
        write_card(folder, summary)
        write_json(folder / "summary.json", summary)

    processes.on_main(write)
    return summary


def read_summary(folder: Path) -> dict[str, object]:
    summary: dict[str, object] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary
