"""A run's model to the hub: what would be sent, the sending in one commit, and what goes wrong in one line.

Only RUN/model goes: weights (safetensors), settings, tokenizer, the card. A new repository is private unless told otherwise.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerl.rollout.common import processes
from steerl.rollout.common.errors import CheckpointError, ConfigError, UserError, said
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.prompts.tables import may_be_of_hub
from steerl.training.run import card
from steerl.training.run.export import read_summary
from steerl.training.run.log import log_line

PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".joblib")
"""What may run code where it is loaded, which these models do not need."""
WEIGHTS = ("model.safetensors", "model-", "adapter_model.", "pytorch_model", "steering.yaml")
"""How files of weights, and what belongs to them alone, begin."""


@dataclass(frozen=True)
class Push:
    """A model's folder, and where it is to go."""

    folder: Path
    repo: str
    private: bool
    files: dict[str, Path | bytes]
    """Name in the repository -> a file, or what stands in for it."""
    skipped: list[str]

    @property
    def lines(self) -> list[str]:
        """What would be sent."""
        sizes = {name: len(it) if isinstance(it, bytes) else it.stat().st_size for name, it in sorted(self.files.items())}
        shown = [f"  {name}  {size:,} bytes" for name, size in sizes.items()]
        new = "private" if self.private else "public"
        where = f"{self.folder} -> {self.repo} ({new}, if it is new): {len(sizes)} files, {sum(sizes.values()):,} bytes"
        return [where, *shown, *(f"  {name}  is left out: pickled" for name in self.skipped)]


def check(run: RunSettings) -> None:
    """Before the first step: a name that can be, and somebody who may write there."""
    if not run.push_to_hub:
        return
    check_name(run.push_to_hub, "run.push_to_hub")
    if offline():
        log_line("run.push_to_hub: offline (HF_HUB_OFFLINE); the run will say what it would send, and steerl push sends it")
        return
    from huggingface_hub import HfApi

    who = with_hub(lambda: HfApi().whoami(), "run.push_to_hub", run.push_to_hub)
    if ((who.get("auth") or {}).get("accessToken") or {}).get("role") == "read":
        raise ConfigError(f"run.push_to_hub: {run.push_to_hub}: the token may only read; use one that may write")


def check_base(run: RunSettings, base: str) -> None:
    """Before the first step: others can load an adapter, too."""
    if run.push_to_hub and not may_be_of_hub(card.hub_name(base)):
        raise ConfigError(
            f"run.push_to_hub: {run.push_to_hub}: the run leaves an adapter of {base or 'a base without a name'}, which others "
            "do not have; set ppo.export_merged true, or send it later: steerl push RUN --base_model OWNER/NAME"
        )


def push_run(folder: Path, run: RunSettings) -> None:
    """At the end of a run, when all is written: on the main process alone, others need not wait."""
    if not run.push_to_hub or not processes.start().is_main:
        return
    try:
        push = prepare(folder, run.push_to_hub, private=run.hub_private)
        if offline():
            for line in ["offline: not sent", *push.lines, f"next: steerl push {folder}"]:
                log_line(line)
            return
        log_line(f"sent: {send(push, 'run.push_to_hub')}")
    except UserError as problem:
        raise ConfigError(*problem.lines, f"{folder}: all is written; steerl push {folder} sends the model") from problem


def prepare(folder: Path, repo: str, *, private: bool = True, base: str = "") -> Push:
    """`folder` is a run's, or a model's own. `base` is the hub's name of an adapter's base that the run knows by a folder."""
    model = folder / "model" if (folder / "model").is_dir() else folder
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; name a run's, or a model's")
    if model is folder and not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        told = "has no model yet; let the run come to its end (--run.resume true)" if card.read_config(folder) else "is no run"
        raise CheckpointError(f"{folder}: {told}")
    if model is not folder and not (folder / "summary.json").is_file():
        raise CheckpointError(f"{folder}: not finished (no summary.json); --run.resume true goes on with it")
    found = {str(path.relative_to(model)): path for path in sorted(model.rglob("*")) if path.is_file()}
    found = {name: path for name, path in found.items() if not any(part.startswith(".") for part in Path(name).parts)}
    skipped = [name for name, path in found.items() if _pickled(path)]
    files: dict[str, Path | bytes] = {name: path for name, path in found.items() if name not in skipped}
    if not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{model}: no weights as safetensors; load the model and save_pretrained it anew")
    adapter = files.get("adapter_config.json")
    if isinstance(adapter, Path):
        files["adapter_config.json"] = _with_base(adapter, base)
    elif base:
        raise ConfigError(f"base_model: {base}, but {model} is a whole model; leave it out")
    if isinstance(own := files.get(card.CARD), Path):
        files[card.CARD] = card.addressed(own.read_text(encoding="utf-8"), repo, base).encode("utf-8")
    elif model is not folder:
        files[card.CARD] = card.card(folder, read_summary(folder), card.read_config(folder), repo, base or None).encode("utf-8")
    return Push(model, repo, private, files, skipped)


def _pickled(path: Path) -> bool:
    """By its name, or as torch.save begins a file: a zip with a pickle in it, or a pickle."""
    if path.suffix.lower() in PICKLED:
        return True
    with path.open("rb") as file:
        start = file.read(64)
    return start[:2] == b"\x80\x02" or (start[:4] == b"PK\x03\x04" and b"data.pkl" in start)


def _with_base(path: Path, base: str) -> bytes:
    """adapter_config.json as others can use it."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    known = card.hub_name(str(config.get("base_model_name_or_path") or ""))
    if base or known != config.get("base_model_name_or_path"):
        base = base or known
        check_name(base, "base_model")
        config["base_model_name_or_path"] = base
    elif not may_be_of_hub(known):
        whose = f"of {Path(known).name}, a folder here" if known else "that does not name its base"
        remedy = "say what it is called on the hub, --base_model OWNER/NAME, or merge the adapter (ppo.export_merged true)"
        raise ConfigError(f"{path.parent}: an adapter {whose}, which others do not have; {remedy}")
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode("utf-8")


def send(push: Push, where: str = "repo") -> str:
    """The commit's address. Weights that lie there under other names go: they would be read in place of these."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations: list[Any] = [
        CommitOperationAdd(name, it if isinstance(it, bytes) else str(it)) for name, it in push.files.items()
    ]

    def sent() -> str:
        api = HfApi()
        repo = api.create_repo(push.repo, private=push.private, exist_ok=True).repo_id
        there = api.model_info(repo)
        if push.private and there.private is False:
            told = "is public, and the model was to be private"
            raise ConfigError(f"{where}: {repo} {told}; say --private false (run.hub_private false), or give another name")
        names = [file.rfilename for file in there.siblings or []]
        old = [name for name in names if name not in push.files and Path(name).name.startswith(WEIGHTS)]
        operations.extend(CommitOperationDelete(name) for name in old)
        done = api.create_commit(repo, operations, commit_message="A model trained with steerl")
        return str(done.commit_url)

    return with_hub(sent, where, push.repo)


def with_hub(call: Any, where: str, repo: str) -> Any:
    """What the hub, the network or the disk answer, as one line."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        return call()
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise ConfigError(f"{where}: {repo}: there is no token; hf auth login, or HF_TOKEN") from error
    except HfHubHTTPError as error:
        status = int(getattr(error.response, "status_code", 0))
        known = {
            401: "the token is not valid; hf auth login, or HF_TOKEN",
            403: "the token may not write there; use one that may, or another name",
            404: "there is no such owner, or the token does not see it; look at the name",
        }
        raise ConfigError(f"{where}: {repo}: {known.get(status, f'the hub answered {said(error)}; try again')}") from error
    except Exception as error:
        raise ConfigError(f"{where}: {repo}: the hub cannot be reached ({said(error)}); try again") from error


def check_name(repo: str, where: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{where}: {repo!r} is no name of the hub; give OWNER/NAME") from error


def offline() -> bool:
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())
