"""ModelSettings: which model, and how it is loaded; and what an adapter's mapping and folder say, without loading anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from steerl.rollout.common.errors import CheckpointError, one_line, reading

if TYPE_CHECKING:
    from peft import PeftConfig

WEIGHT_KINDS = ("LORA", "DORA", "IA3", "LOHA", "LOKR", "OFT", "VERA", "LN_TUNING")
VIRTUAL_KINDS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")
# These start by changing the base's own weights, so the policy with its adapter off would not be the policy it came from.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga")


def section(field: str) -> str:
    return field.rpartition(".")[0] or field


@dataclass(frozen=True)
class Hub:
    """How a model's files are taken: config, tokenizer and weights alike."""

    revision: str = ""
    """A branch, tag or commit of the hub; empty = its newest."""
    trust_remote_code: bool = False
    """Run the Python code that lies beside the weights."""

    def arguments(self, path: str, field: str) -> dict[str, object]:
        """Of from_pretrained."""
        if self.revision and Path(path).exists():
            told = f"{self.revision!r} has no effect on {path}, which is no name of the hub; leave it out"
            raise CheckpointError(f"{section(field)}.revision: {told}")
        return {"trust_remote_code": self.trust_remote_code, **({"revision": self.revision} if self.revision else {})}

    def noted(self, peft: Mapping[str, object]) -> Mapping[str, object]:
        """An adapter's mapping, which says of what revision its base is."""
        return {"revision": self.revision, **peft} if self.revision else peft

    @property
    def code(self) -> Hub:
        """For what lies elsewhere."""
        return Hub(trust_remote_code=self.trust_remote_code)


def adapter_config(mapping: Mapping[str, object], task: str | None = None, field: str = "model.peft") -> PeftConfig:
    """The peft configuration of a mapping such as {peft_type: LORA, r: 8}. DORA stands for LORA with use_dora."""
    given = {key: value for key, value in dict(mapping).items() if key != "name"}
    kind = str(given.pop("peft_type", "")).upper()
    if kind not in (*WEIGHT_KINDS, *VIRTUAL_KINDS):
        found = f"unknown value {kind!r}" if kind else "missing"
        raise CheckpointError(f"{field}.peft_type: {found}; choose one of {', '.join((*WEIGHT_KINDS, *VIRTUAL_KINDS))}")
    if kind == "DORA":
        kind, given = "LORA", {**given, "use_dora": True}
    import peft  # with torch and transformers: it knows the fields of each kind

    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    known = {entry.name for entry in dataclasses.fields(config_class) if entry.init}
    unknown = sorted(set(given) - known)
    if unknown:
        raise CheckpointError(
            *(f"{field}.{key}: {kind} has no such field; it has: {', '.join(sorted(known))}" for key in unknown)
        )
    wanted = given.pop("task_type", None)
    if wanted is not None and task is not None and wanted != task:
        raise CheckpointError(f"{field}.task_type: {wanted!r}, but the model's task is {task}; leave the field out")
    start = given.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        raise CheckpointError(
            f"{field}.init_lora_weights: {start!r} changes the base's own weights, so the adapter switched off would not be "
            "the base; use true, false, gaussian or orthogonal"
        )
    if given.get("alora_invocation_tokens"):
        raise CheckpointError(
            f"{field}.alora_invocation_tokens: activated LoRA depends on the prompt's tokens and is not supported"
        )
    if kind in VIRTUAL_KINDS and not given.get("num_virtual_tokens"):
        raise CheckpointError(f"{field}.num_virtual_tokens: missing; {kind} needs the number of virtual tokens")
    try:
        return config_class(task_type=task or wanted, **given)
    except (TypeError, ValueError, ImportError) as error:
        raise CheckpointError(f"{field}: {one_line(error)}") from error


def is_adapter_folder(path: str | Path) -> bool:
    """Whether `path` holds an adapter and no whole model."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def base_of(folder: str | Path, field: str = "model.path") -> str:
    """The base model that an adapter's folder was trained on: a path (also relative to the folder), or a hub name."""
    config = read_adapter(folder, field)
    base = config.get("base_model_name_or_path")
    if not base:
        raise CheckpointError(
            f"{field}: {folder} does not say what its base is (adapter_config.json); give the base as model.path"
        )
    for candidate in (Path(base), Path(folder) / base):
        if candidate.is_dir():
            return str(candidate)
    if Path(base).is_absolute() or base.startswith("."):
        raise CheckpointError(
            f"{field}: the base of {folder}, {base}, is missing; give the base as model.path, the folder as model.adapter"
        )
    return str(base)


def revision_of(folder: str | Path, field: str = "model.path") -> str:
    """The base's revision on the hub that an adapter was trained on, where it says one."""
    return str(read_adapter(folder, field).get("revision") or "")


def read_adapter(folder: str | Path, field: str) -> dict[str, Any]:
    file = Path(folder) / "adapter_config.json"
    if not file.is_file():
        raise CheckpointError(f"{field}: {folder} is not an adapter's folder (it has no adapter_config.json)")
    with reading(f"{field}: {file} cannot be read: "):
        config = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise CheckpointError(f"{field}: {file} holds no mapping")
    if not any((Path(folder) / weights).is_file() for weights in ("adapter_model.safetensors", "adapter_model.bin")):
        raise CheckpointError(f"{field}: {folder} has no weights (adapter_model.safetensors)")
    return config


@dataclass(frozen=True)
class ModelSettings:
    """Which model is the policy, and how it is loaded."""

    path: str = ""
    """A folder or a hub name; an adapter's folder loads its base model with it."""
    adapter: str = ""
    """A peft adapter's folder or hub name, put on the model of `path`."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto = as the checkpoint was saved."""
    attn: str = "auto"
    """Attention implementation (sdpa, eager, flash_attention_2, ...); auto leaves the choice to transformers."""
    kind: Literal["auto", "causal", "seq2seq"] = "auto"
    """auto = as the checkpoint's config says."""
    tokenizer: str = ""
    """A folder or hub name when the tokenizer does not lie beside the model."""
    peft: dict[str, object] | None = field(default=None, metadata={"check": adapter_config})
    """A peft config as a mapping, {peft_type: LORA, r: 8, ...}: what training adds to the model."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Keep the matrices of the base model in 4 or 8 bits (bitsandbytes, GPUs only): for an adapter that learns on it (QLoRA),
    or to sample."""
    revision: str = ""
    """Branch, tag or commit of the hub for config, tokenizer and weights of the (base) model; empty = the newest."""
    trust_remote_code: bool = False
    """Run Python code that lies beside the model, with all rights of whoever starts the job: for models that transformers does
    not have. Read it first, and name a revision, or a folder, which nobody else can change."""

    @property
    def hub(self) -> Hub:
        return Hub(self.revision, self.trust_remote_code)

    def base(self) -> tuple[str, str, Hub]:
        """(base model, adapter or nothing, how the base is taken). An adapter's folder names its base, maybe of a revision."""
        if not self.path:
            raise CheckpointError("model.path: missing; name a model folder or hub name, --model.path DIR")
        if not is_adapter_folder(self.path):
            return self.path, self.adapter, self.hub
        if self.adapter:
            raise CheckpointError(
                f"model.path: {self.path} is an adapter and model.adapter is set too; name the base model in model.path"
            )
        base, revision = base_of(self.path), self.revision
        if not revision and not Path(base).exists():
            revision = revision_of(self.path)
        return base, self.path, Hub(revision, self.trust_remote_code)


BEFORE: dict[str, object] = {"model.quantization": "none", "model.revision": "", "model.trust_remote_code": False}
"""What settings are in jobs of before there were these."""
