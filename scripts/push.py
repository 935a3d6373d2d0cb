"""Send a run's model to the hub, with its card: steerl push RUN --repo OWNER/NAME

An adapter whose base is a folder here needs the base's name on the hub: --base_model OWNER/NAME.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from steerl.configs.reader import run_command

from steerl.rollout.common.errors import ConfigError, visible
from steerl.training.run.card import read_config


@dataclass(frozen=True)
class PushJob:
    """RUN/model (weights as safetensors, settings, tokenizer, card) in one commit. Nothing else of the run goes."""

    run: str = field(metadata={"positional": True})
    """A run's folder, or a model's own."""
    repo: str = ""
    """OWNER/NAME; unset = the run's push_to_hub."""
    private: bool = True
    """Of a repository that is new; one that is there stays as it is."""
    base_model: str = ""
    """What an adapter's base is called on the hub, where the run knows it by a folder."""
    dry_run: bool = False
    """Say what would be sent, and stop."""


def main(job: PushJob) -> None:
    from steerl.training.run import hub

    folder = Path(job.run)
    settings = read_config(folder).get("run") or {}
    repo = job.repo or str(settings.get("push_to_hub") or "")
    if not repo:
        raise ConfigError("repo: missing; say where the model is to go, --repo OWNER/NAME")
    hub.check_name(repo, "repo")
    push = hub.prepare(folder, repo, private=job.private, base=job.base_model)
    for line in push.lines:
        print(visible(line))
    if job.dry_run or hub.offline():
        print("not sent: a dry run" if job.dry_run else "not sent: offline (HF_HUB_OFFLINE)")
    else:
        print(visible(f"sent: {hub.send(push)}"))


def cli() -> None:
    run_command(main, PushJob)


if __name__ == "__main__":
    cli()
