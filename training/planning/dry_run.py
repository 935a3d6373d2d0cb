"""`steerl ppo --dry_run true`: all of a job that can be checked without its weights and without the network.

    settings, read already --> run folder, model, value, prompts, reward, steering, environment, engine, launch --> together?

What lies on this machine is opened: configs, tokenizers, tables, the user's code. A name of the hub that cannot be reached, and
what only weights can tell, is said not to be checked; all else that fails is an error. Nothing is written.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from steerl.reward.build import Entry, Surroundings, read_terms
from steerl.reward.kinds.activations.frozen import named
from steerl.reward.kinds.model_inputs import folders_of
from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.common.run_folder import check_folder
from steerl.rollout.dumps.manifest import finished_shards
from steerl.rollout.engines.vllm import support
from steerl.rollout.environments.environment import environment_of
from steerl.rollout.model.auto_classes import choose_head, load_config
from steerl.rollout.model.capabilities import Capabilities
from steerl.rollout.model.policy import Policy, load_policy, tokenizer_of
from steerl.rollout.model.settings import Hub, ModelSettings
from steerl.rollout.prompts.prompts import Prompts, PromptSettings, load_prompts
from steerl.rollout.prompts.sources import Source
from steerl.rollout.prompts.tables import may_be_of_hub, read_table
from steerl.rollout.steering import SteeringSpec, load_spec
from steerl.rollout.steering.bind import Binding, bind
from steerl.rollout.steering.core.structure import stacks
from steerl.rollout.steering.vectors.probes import read_probe
from steerl.training.checks import check_job, check_precision
from steerl.training.engine.optimizer import check_optimizer
from steerl.training.engine.zero import check_dtypes
from steerl.training.planning.passes import Blueprint
from steerl.training.run.export import check_export
from steerl.training.run.hub import check as check_hub
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft

Value = TypeVar("Value")
_HEADS = {"model": "sequence_classification", "process": "token_classification"}


class OutOfReach(Exception):
    """Why something cannot be looked at here."""


@dataclass
class Findings:
    """Of a dry run, in the order in which things were looked at."""

    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def look(self, what: str, check: Callable[[], Value]) -> Value | None:
        try:
            found = check()
        except OutOfReach as away:
            self.unchecked.append(f"{what}: {away}")
        except UserError as problem:
            self.problems += problem.lines
        else:
            self.checked.append(what)
            return found
        return None


def dry_run(job: Any, model: ModelSettings, config: dict[str, object]) -> Findings:
    """Of a PPOJob; `model` are its settings as training loads it."""
    found = Findings()
    found.look(f"run.dir {job.run.dir}", lambda: check_folder(job.run, config))
    if job.run.resume:
        found.unchecked.append("run.resume: whether the folder's checkpoint is of this job")
    if job.run.push_to_hub:
        found.look(f"run.push_to_hub {job.run.push_to_hub}", lambda: check_hub(job.run))
    policy = found.look(f"model.path {model.path}", lambda: policy_of(model, found))
    if job.ppo.value not in ("separate", "shared"):
        found.look(f"ppo.value {job.ppo.value}", lambda: _config(job.ppo.value, "ppo.value", "value", job.model.hub.code))
    new = job.environment.response(job.sampling.max_new_tokens)
    prompts = None if job.ppo.replay else found.look(*_table("prompts", job.prompts, policy, new))
    if job.heldout.path:
        found.look(*_table("heldout", job.heldout, policy, new))
    if job.ppo.replay:
        found.look(f"ppo.replay {job.ppo.replay}", lambda: finished_shards(Path(job.ppo.replay)))
    if entries := found.look("reward", lambda: read_terms(job.reward).entries):
        for entry in entries:
            found.look(entry.where, partial(_term, entry, policy, found))
    spec = load_spec(job.steering) if job.steering else None
    if spec is not None:
        found.look("steering", lambda: _steering(spec, policy, job.run.seed, found))
    if job.environment.given:
        found.look("environment", lambda: _environment(job.environment, policy, prompts))
    if job.engine.kind == "vllm":
        found.look("engine", lambda: _engine(job.engine, policy, found))
    found.look("launch", lambda: _launch(policy, job.ppo, spec, found))
    together = (None, job.sampling, job.ppo, spec, job.engine, job.environment)
    found.look("settings, each by itself and together", lambda: check_job(policy, *together))
    return found


# -- models ----------------------------------------------------------------------------------------------------------


def _of_hub(path: str, call: Callable[[], Value]) -> Value:
    """What `call` reads of a path; out of reach where it is a hub name that fails."""
    try:
        return call()
    except UserError:
        if not may_be_of_hub(path):
            raise
    raise OutOfReach("a name of the hub, which cannot be reached from here, or is none")


def _config(path: str, field: str, role: str, hub: Hub, head: str = "auto", fresh: bool = False) -> None:
    """A config that the role can use."""
    base, adapter = folders_of(path)
    config = _of_hub(base, lambda: load_config(base, field, hub))
    choose_head(config, role, head, fresh=fresh, field=field, path=base)


def policy_of(model: ModelSettings, found: Findings) -> Policy:
    """The policy without its numbers: unread where its weights lie in a folder, else on the meta device."""
    base, adapter, hub = model.base() if model.path else ("", "", model.hub)
    if model.quantization != "none":
        found.unchecked.append(f"model.quantization {model.quantization}: the weights in few bits, which are made on a GPU")
    if model.quantization == "none" and any(Path(base).glob("*.safetensors")):
        policy = with_peft(load_policy(model, read=False), model.peft)
    else:
        if model.path:
            _of_hub(base, lambda: load_config(base, hub=hub))
        shape = Blueprint.of(dataclasses.replace(model, path=base)).empty_model()
        tokenizer = _of_hub(model.tokenizer or base, lambda: tokenizer_of(model, [base, adapter or model.adapter]))
        policy = Policy.of(shape, tokenizer, model.kind)
        found.unchecked.append(f"model.path {base}: its weights")
        if adapter or model.adapter:
            found.unchecked.append(f"model.adapter {adapter or model.adapter}: whether it fits the model")
    # Not observed, which takes forward passes.
    return policy.with_model(policy.model, Capabilities(padding=True, caching=True, row_selection=True, pads_in_text=True))


# -- what the model meets --------------------------------------------------------------------------------------------


def _table(section: str, settings: PromptSettings, policy: Policy | None, new: int) -> tuple[str, Callable[[], Prompts | None]]:
    def read() -> Prompts | None:
        given = [settings.path] if isinstance(settings.path, str) else settings.path
        paths = [each.path if isinstance(each, Source) else each for each in given]
        if any(may_be_of_hub(path) for path in paths):
            raise OutOfReach("a data set of the hub")
        if policy is not None or not settings.path:
            return load_prompts(settings, policy, new)  # type: ignore[arg-type]
        for path in paths:
            read_table(path, settings.split, settings.name, section)
        raise OutOfReach("its rows can be read; whether they fit the model is open")

    return f"{section}.path {settings.path if isinstance(settings.path, str) else 'of several sources'}", read


def _term(entry: Entry, policy: Policy | None, found: Findings) -> None:
    own, field = entry.own, entry.where.split(" ")[0]
    if entry.common.kind in _HEADS:
        for path in [own.path] if isinstance(own.path, str) else own.path:
            hub = Hub(own.revision, own.trust_remote_code)
            _config(path, f"{field}.path", "reward", hub, _HEADS[entry.common.kind], own.allow_new_head)
        found.unchecked.append(f"{entry.where}: its weights")
        return
    if entry.common.kind in ("probe", "novelty"):
        found_in = [read_probe(Path(own.probe), own.layer, field)] if entry.common.kind == "probe" else []
        if own.model is not None:
            policy = policy_of(named(own), found)
        if policy is None:
            raise OutOfReach("whether it fits the model is open")
        entry.code.place(own, policy, *found_in, entry.where)
        return
    entry.code.build(own, entry.where, Surroundings(None, None)).close()
    if entry.common.kind == "http":
        found.unchecked.append(f"{entry.where}: whether {own.url} answers")


def _steering(spec: SteeringSpec, policy: Policy | None, seed: int, found: Findings) -> None:
    if policy is None:
        raise OutOfReach("read; whether its sites are in the model is open")
    binding = Binding(policy.core, stacks(policy.core), policy.tokenizer, spec.folder, seed, spec.role == "trainable")
    problems: list[str] = []
    for index, site in enumerate(spec.sites):
        if "mean_diff" in repr(site):
            found.unchecked.append(f"steering.sites[{index}]: a vector that is measured on the weights")
            continue
        try:
            bind(site, index, binding)
        except UserError as problem:
            problems += problem.lines
    if problems:
        raise ConfigError(*problems)


def _environment(settings: Any, policy: Policy | None, prompts: Prompts | None) -> None:
    if policy is None:
        raise OutOfReach("it needs the model's tokenizer")
    with environment_of(settings, policy) as played:
        if played is not None and prompts is not None:
            played.check(prompts)


def _engine(settings: Any, policy: Policy | None, found: Findings) -> None:
    problems = [] if policy is None else support.refusals(policy)
    if problems:
        raise ConfigError(*problems)
    if settings.url:
        found.unchecked.append(f"engine.url: whether {settings.url} answers")
    else:
        support.check_interpreter(settings.python)


def _launch(policy: Policy | None, ppo: PPOSettings, spec: SteeringSpec | None, found: Findings) -> None:
    """What an accelerate config asks for stands in the environment of the processes that it starts."""
    by_deepspeed, by_fsdp = (os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("DEEPSPEED", "FSDP"))
    accelerator: Any = SimpleNamespace(
        mixed_precision=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        device=processes.start().device,
        deepspeed_plugin=by_deepspeed or None,
        is_fsdp2=by_fsdp,
        distributed_type="FSDP" if by_fsdp else "NO",
    )
    check_precision(accelerator)
    if accelerator.device.type == "cuda":
        check_optimizer(accelerator, ppo)
    elif ppo.optimizer == "adamw8bit" or ppo.offload_activations:
        found.unchecked.append("ppo.optimizer, ppo.offload_activations: what is for GPUs alone, and there is none here")
    if policy is None:
        raise OutOfReach("the rest needs the model's config")
    if by_deepspeed:
        check_dtypes(accelerator.mixed_precision, policy.model)
    steering = None if spec is None or spec.on_deploy == "fold" else SimpleNamespace(spec=spec, role=spec.role)
    model: Any = SimpleNamespace(steering=steering, actor=policy.model, policy=policy)
    check_export(model, accelerator, ppo)
