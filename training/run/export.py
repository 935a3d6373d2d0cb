"""What a run leaves for its users: RUN/model, which from_pretrained loads, with its tokenizer; and summary.json."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.rollout.common import processes
from steerl.rollout.common.run_folder import write_json, written_aside
from steerl.rollout.model import adapters, auto_classes
from steerl.training import steering
from steerl.training.engine import engine
from steerl.training.settings import PPOSettings

if TYPE_CHECKING:
    from steerl.training.setup import Components


def save_model(folder: Path, parts: Components, settings: PPOSettings) -> None:
    """The policy in `folder`/model: the adapter alone where there is one, or the whole model with it merged in.

    Steering is left away, kept beside it or folded into it, as its `on_deploy` says."""

    def save() -> None:
        with written_aside(folder / "model") as aside:
            aside.mkdir()
            model = steering.to_save(parts)
            if not hasattr(model, "peft_config"):
                auto_classes.save(model, aside, state)
            elif settings.export_merged:
                auto_classes.save(adapters.merge(copy.deepcopy(model)), aside)
            else:
                adapters.save(model, aside, state)
            steering.save_beside(parts, aside)
            parts.policy.tokenizer.save_pretrained(aside)

    # Under ZeRO-3 the modules themselves hold all weights meanwhile; FSDP's never do, so a dict stands in for them.
    with engine.whole_for_export(parts.actor_critic) as state:
        processes.on_main(save)


def summarize(folder: Path, parts: Components, after: dict[str, float]) -> dict[str, Any]:
    """Write summary.json, the last file of a run, and return what it holds."""
    state = parts.state
    summary = {
        "reward_before": state.before.get("eval/reward"),
        "reward_after": after.get("eval/reward"),
        "kl_after": after.get("eval/kl"),
        "gap_max": state.totals.get("gap_max", 0.0),
        "steps": state.step,
        "optimizer_steps": int(state.totals.get("optimizer_steps", 0)),
        "rollouts": int(state.totals.get("rollouts", 0)),
        "tokens": int(state.totals.get("tokens", 0)),
        "seconds": state.totals.get("seconds", 0.0),
        "world_size": processes.start().world_size,
    }
    processes.on_main(lambda: write_json(folder / "summary.json", summary))
    return summary


def read_summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found
