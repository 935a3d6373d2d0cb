"""Going on with a run: is it finished, which checkpoint, and do config, data and weights fit it.

run.resume true ──> finished?  yes: leave with status 0
                        │ no
                    newest whole checkpoint? ── none ──> start (the logs of a run killed before its first are cut to 0)
                        │
                    config, data and weights as saved? ── no ──> a line for each; with run.allow_changes they are told, and
                        │ yes                                    stand in RUN/config.yaml
                    load, cut the logs to it, go on
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from steerl.reward.types import Reward
from steerl.rollout.common import processes
from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.common.fingerprint import (
    folder_fingerprint,
    source_fingerprint,
    tokenizer_fingerprint,
    values_fingerprint,
    weights_fingerprint,
)
from steerl.rollout.common.loading import load_function
from steerl.rollout.common.run_folder import RunSettings, versions, write_text
from steerl.rollout.common.yaml_files import Dumper
from steerl.rollout.dumps.manifest import finished_shards
from steerl.rollout.environments.settings import BEFORE
from steerl.rollout.model import compat
from steerl.rollout.model.policy import Policy
from steerl.rollout.model.settings import BEFORE as MODEL_BEFORE
from steerl.rollout.prompts.prompts import BEFORE as PROMPTS_BEFORE
from steerl.rollout.prompts.prompts import Prompts
from steerl.training.run import checkpoint
from steerl.training.run.export import read_summary
from steerl.training.run.log import RunLog, log_line
from steerl.training.settings import PPOSettings, is_custom
from steerl.training.types import TrainState

FREE = (
    *("run.dir", "run.resume", "run.overwrite", "run.allow_changes", "run.save_every", "run.keep", "run.trackers"),
    *("run.push_to_hub", "run.hub_private"),
    *("ppo.gap_tolerance", "ppo.samples", "ppo.export_merged", "ppo.gather", "ppo.eval_every", "ppo.eval_prompts"),
    "ppo.offload_activations",
    *(f"engine.{name}" for name in ("kind", "url", "python", "model_impl", "sync", "check_rows", "start_timeout", "arguments")),
    "environment.workers",
)
"""What may differ on a resume, because nothing that is learned depends on it. The number of steps may, too, where no
learning rate falls towards the last one."""

SINCE: dict[str, object] = {
    "engine.ahead": 0,
    "ppo.packing": False,
    "ppo.compile": "off",
    "ppo.offload_activations": False,
    "ppo.optimizer": "adamw",
    "run.push_to_hub": "",
    "run.hub_private": True,
    "ppo.optimizer_arguments": None,
    "ppo.schedule_arguments": None,
    "ppo.loss": "ppo",
    "ppo.dppo_divergence": "tv",
    "ppo.dppo_threshold": None,
    "ppo.group_std": True,
    "ppo.group_parts": False,
    "ppo.response_limit": None,
    "ppo.overlong_buffer": 0,
    "ppo.overlong_penalty": 1.0,
    "ppo.drop_equal_groups": False,
    "ppo.resample_tries": 4,
    **MODEL_BEFORE,
    **PROMPTS_BEFORE,
    **BEFORE,
}
"""What settings are in runs that were begun before there were these."""

_logger = logging.getLogger(__name__)


def made_from(
    policy: Policy, prompts: Prompts, heldout: Prompts | None, reward: Reward, settings: PPOSettings
) -> dict[str, str]:
    """What a run learns from, as hashes: the same paths may lead to other data. Before the policy is trained or spread."""
    hashes = {"model.path": weights_fingerprint(policy.model), **prompts.fingerprints("prompts.path")}
    if policy.hub.revision and (commit := compat.commit(policy.core.config)):
        hashes["model.revision"] = commit
    if policy.tokenizer is not None:
        hashes["model.tokenizer"] = tokenizer_fingerprint(policy.tokenizer)
    if heldout is not None:
        hashes |= heldout.fingerprints("heldout.path")
    for term in getattr(reward, "terms", ()):
        hashes[f"reward {term.name}"] = term.content()
    if settings.replay and Path(settings.replay).is_dir():
        hashes["ppo.replay"] = values_fingerprint(record.sha256 for record in finished_shards(Path(settings.replay)))
    if settings.value not in ("separate", "shared") and Path(settings.value).is_dir():
        hashes["ppo.value"] = folder_fingerprint(Path(settings.value))
    for name in ("loss", "credit", "optimizer", "schedule"):
        if is_custom(spec := getattr(settings, name)):
            hashes[f"ppo.{name}"] = source_fingerprint(load_function(spec, f"ppo.{name}"))
    return hashes


def finished_summary(
    folder: Path, settings: PPOSettings, config: Mapping[str, object], run: RunSettings
) -> dict[str, object] | None:
    """What a run that is to go on has come to, where it came to its end; else None."""
    if not run.resume or not processes.on_main(lambda: finished(folder, settings.steps, config, run, settings.schedule)):
        return None
    log_line(f"{folder}: finished already; more ppo.steps go on with it, --run.overwrite true starts again")
    return read_summary(folder)


def finished(folder: Path, steps: int, config: Mapping[str, object], run: RunSettings, schedule: str = "constant") -> bool:
    """Did the run in `folder` come to its end, with at least `steps` steps and this config? summary.json is the last thing
    that a run writes."""
    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        if max(int(summary["steps"]), int(summary.get("ended_of", 0))) < steps:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if (path := checkpoint.newest(folder)) is not None:
        _compare(path, config, run, schedule)
    return True


def open_log(
    folder: Path,
    run: RunSettings,
    settings: PPOSettings,
    state: TrainState,
    config: Mapping[str, object],
    content: Mapping[str, str],
) -> RunLog:
    """The log of the run and, on a resume, the newest whole checkpoint put into `state`. `content` is what `made_from` gave."""
    path = checkpoint.latest(folder) if run.resume else None
    changed = _compare(path, config, run, settings.schedule, content) if path is not None else []
    if path is not None and processes.start().is_main:
        for line in changed:
            _logger.warning("resume from %s: changed, as is allowed: %s", path.name, line)
    log = RunLog(folder, trackers=run.trackers, config=config)
    log.rewind(checkpoint.load(path, state)["log"] if path is not None else {})
    notes = [f"from step {state.step}: {line}" for line in changed if not line.startswith("run.")]
    if path is None or notes:
        text = yaml.dump(dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True)
        processes.on_main(lambda: write_config(folder, text, notes))
    return log


def write_config(folder: Path, text: str, changed: Sequence[str] = ()) -> None:
    """config.yaml, which --config reads back; in its comments the versions, and what resumed runs changed, step by step."""
    path = folder / "config.yaml"
    notes = [f"{name}: {version}" for name, version in versions().items()]
    if changed:
        before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        notes += [line.removeprefix("# ") for line in before.splitlines() if line.startswith("# from ")]
    write_text(path, "".join(f"# {note}\n" for note in [*notes, *changed]) + text)


def _compare(
    path: Path, config: Mapping[str, object], run: RunSettings, schedule: str, content: Mapping[str, str] | None = None
) -> list[str]:
    free = (*FREE, "ppo.steps") if schedule == "constant" else FREE
    head = checkpoint.read_head(path)
    return check(head["config"], config, head.get("made_from", {}), content or {}, free, run.allow_changes)


def check(
    saved: Mapping[str, object],
    current: Mapping[str, object],
    made_from: Mapping[str, str] | None = None,
    content: Mapping[str, str] | None = None,
    free: Sequence[str] = FREE,
    allow: bool = False,
) -> list[str]:
    """Refuse another config or other content, a line for each; what is `free`, or with `allow` all, is returned as lines."""
    was, now = _dotted(json.loads(json.dumps(saved))), _dotted(json.loads(json.dumps(current)))
    was = {name: value for name, value in SINCE.items() if name in now} | was
    differ = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    changed = {name: f"{now.get(name)!r}, but the run to resume has {was.get(name)!r}" for name in differ}
    fatal = [name for name in changed if not any(name == field or name.startswith(field + ".") for field in free)]
    named = {name.split(".")[0] for name in fatal}  # other content follows from these
    began, here = dict(made_from or {}), dict(content or {})
    for name in sorted(began.keys() & here.keys()):
        if began[name] != here[name] and name.split(" ")[0].split(".")[0] not in named:
            changed[name] = (
                f"its content is not what the run to resume began with (fingerprint {began[name]}, now {here[name]})"
            )
            fatal.append(name)
    if fatal and not allow:
        remedy = "give it back, start another run with --run.dir, or go on all the same with --run.allow_changes true"
        raise CheckpointError(*(f"{name}: {changed[name]}; {remedy}" for name in fatal))
    own = ("run.resume", "run.overwrite", "run.allow_changes")
    return [f"{name}: {told}" for name, told in changed.items() if name not in own]


def _dotted(config: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat: dict[str, object] = {}
    for key, part in config.items():
        flat |= _dotted(part, f"{prefix}.{key}" if prefix else str(key))
    return flat
