"""The settings of the supervised stages: the rows, the fit, and what is each stage's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.prompts.sources import Source


@dataclass(frozen=True)
class TableSettings:
    """The rows to learn from, and those held out to measure by."""

    path: str | list[str | Source] = ""
    """A jsonl, json, parquet or csv file, a dataset folder, or a hub name; or a list of such, each with its split and name."""
    split: str = ""
    """Split of a dataset with several; train where it is not given."""
    name: str = ""
    """Configuration of a hub dataset that has several."""
    column: str = ""
    """The column of plain texts, where it is not `text` (the supervised stage of causal models)."""
    columns: dict[str, str] = field(default_factory=dict)
    """What the data calls a column, {prompt: question, completion: answer}, where it is not the expected name."""
    limit: int = 0
    """Use only so many rows, the first ones; 0 = all."""
    max_tokens: int = 0
    """Longest row in tokens; 0 = as long as the model can take."""
    heldout: float = 0.1
    """Share of the rows that is held out, drawn by run.seed; 0 = none. Without effect where heldout_path is set."""
    heldout_path: str = ""
    """Held-out rows of their own."""


@dataclass(frozen=True)
class FitSettings:
    """How long, how fast, in which portions."""

    epochs: float = 1.0
    """Passes over the data. Without effect where steps is set."""
    steps: int = 0
    """Optimizer steps; 0 = as many as epochs says."""
    batch_size: int = 16
    """Rows of an optimizer step, over all processes."""
    micro_batch_size: int = 0
    """Rows that one process takes at a time; 0 = its whole share of a step."""
    learning_rate: float = 5e-5
    """The highest rate, reached after the warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    """The rate after the warm-up."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Bound of the gradient's norm; 0 = none."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    bf16: bool = False
    """Mixed precision. The weights that learn are float32 unless model.dtype asks for another dtype."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between two measurements on the held-out rows; 0 = only at the end."""


@dataclass(frozen=True)
class SFTSettings(FitSettings):
    """The supervised stage."""

    completion_only: bool | None = None
    """Loss on the completion alone; null = where the rows have one. For encoder-decoders it always is."""
    assistant_only: bool = False
    """Loss on the assistant's turns of a conversation alone; needs a chat template with generation marks."""
    packing: bool = False
    """Fill rows of max_tokens with several texts (causal models whose attention implementation keeps them apart)."""
    source_prefix: str = ""
    """What an encoder-decoder's inputs begin with, such as 'summarize: '."""
    max_target_tokens: int = 0
    """Longest completion of an encoder-decoder; 0 = as long as the longest one."""
    rouge: bool = False
    """Generate on the held-out rows and report ROUGE (encoder-decoders)."""
    beams: int = 1
    """Beams of that generation."""


@dataclass(frozen=True)
class SFTJob:
    """Train a causal or encoder-decoder model on texts, prompts with completions, or conversations."""

    model: ModelSettings = field(default_factory=ModelSettings)
    """What is trained; with model.peft an adapter on it."""
    prompts: TableSettings = field(default_factory=TableSettings)
    """What it learns from."""
    sft: SFTSettings = field(default_factory=SFTSettings)
    """How it learns."""
    run: RunSettings = field(default_factory=RunSettings)
    """Where it is written, and how it goes on."""


@dataclass(frozen=True)
class RewardStageSettings(FitSettings):
    """The reward-model stage."""

    center: float = 0.0
    """Weight of a term that keeps the mean score of a pair at zero (0.01 is usual); 0 = off."""
    dropout: bool = False
    """Keep the model's own dropout while it learns."""


@dataclass(frozen=True)
class RewardJob:
    """Train a reward model on preference pairs."""

    model: ModelSettings = field(default_factory=ModelSettings)
    """What it starts from: any language model, or a reward model; with model.peft an adapter learns."""
    prompts: TableSettings = field(default_factory=TableSettings)
    """The pairs."""
    reward_model: RewardStageSettings = field(default_factory=RewardStageSettings)
    """How it learns."""
    run: RunSettings = field(default_factory=RunSettings)
    """Where it is written, and how it goes on."""


def check_fit(fit: FitSettings, name: str) -> None:
    """A UserError with every field that makes no sense."""
    problems = []
    for field_name, low in {"epochs": 0, "learning_rate": 0, "batch_size": 1, "log_every": 1}.items():
        value = getattr(fit, field_name)
        if value < low or (field_name == "epochs" and value == 0 and not fit.steps):
            problems.append(f"{name}.{field_name}: {value}; give {'a number above 0' if low == 0 else 'at least 1'}")
    for field_name in ("steps", "micro_batch_size", "evaluate_every", "max_grad_norm", "weight_decay"):
        if getattr(fit, field_name) < 0:
            problems.append(f"{name}.{field_name}: {getattr(fit, field_name)}; give 0 or more")
    if not 0 <= fit.warmup < 1:
        problems.append(f"{name}.warmup: {fit.warmup}; give the share of steps, from 0 to below 1")
    world = processes.start().world_size
    micro = fit.micro_batch_size or max(fit.batch_size // world, 1)
    if fit.batch_size >= 1 and fit.batch_size % (world * micro):
        split = f"{world} process(es) x micro_batch_size {micro}"
        problems.append(f"{name}.batch_size: {fit.batch_size} rows cannot be split evenly into {split}; give a multiple of it")
    if problems:
        raise ConfigError(*problems)
