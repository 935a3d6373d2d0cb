"""What the supervised stages share: settings of a fit, the trainers' arguments, resume, and what a run leaves behind.

    RUN/config.yaml         the resolved settings and versions
    RUN/metrics.jsonl       an object per log of the trainer
    RUN/checkpoints/        the trainer's own, for --run.resume
    RUN/model/              the model with its tokenizer; the run folder links to its files, so it loads as a model, too
    RUN/adapter/            with model.peft: the adapter by itself (model/ holds the merged model)
    RUN/summary.json        what was measured

The trainers do the training. accelerate starts the processes; rows of a step are counted over all of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from rollout import adapters, processes, virtual_tokens
from rollout.errors import Problem
from rollout.heads import load_head
from rollout.policy import ModelSettings
from rollout.run import RunSettings, open_folder, versions, write_json, write_text, written_aside

Read = TypeVar("Read")


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
    """Mixed precision; the weights keep the dtype of model.dtype."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = 0
    """Steps between two measurements on the held-out rows; 0 = only at the end."""


@dataclass(frozen=True)
class Outcome:
    """What a supervised stage leaves."""

    model: Path
    metrics: dict[str, Any]


def check_fit(fit: FitSettings, name: str) -> None:
    """A Problem with every field that makes no sense."""
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
        raise Problem(*problems)


def trainer_arguments(fit: FitSettings, run: RunSettings, folder: Path, held_out: bool) -> dict[str, Any]:
    """The settings in the words of transformers' TrainingArguments."""
    world = processes.start().world_size
    rows = fit.batch_size // world
    micro = fit.micro_batch_size or rows
    return {
        "output_dir": str(folder / "checkpoints"),
        "num_train_epochs": fit.epochs,
        "max_steps": fit.steps or -1,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": rows // micro,
        "learning_rate": fit.learning_rate,
        "lr_scheduler_type": fit.schedule,
        # Below 1 a share of the steps, as everywhere in these settings.
        "warmup_steps": fit.warmup,
        "weight_decay": fit.weight_decay,
        "max_grad_norm": fit.max_grad_norm,
        _checkpointing_name(): fit.checkpointing,
        "bf16": fit.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": fit.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if held_out and fit.evaluate_every else "no",
        "eval_steps": fit.evaluate_every or None,
        "save_strategy": "steps" if run.save_every else "no",
        "save_steps": run.save_every or 500,
        "save_total_limit": run.keep,
        "report_to": list(run.trackers) or "none",
        "seed": run.seed,
        "data_seed": run.seed,
        "remove_unused_columns": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }


def _checkpointing_name() -> str:
    """What TrainingArguments calls it: renamed in transformers 5.2x."""
    import transformers

    fields = transformers.TrainingArguments.__dataclass_fields__
    return "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"


def open_run(run: RunSettings, resolved: str) -> Path:
    """The run's folder with the resolved settings and versions in it; made by the main process, known to all."""

    def make() -> Path:
        folder = open_folder(run)
        notes = "".join(f"# {name}: {version}\n" for name, version in versions().items())
        write_text(folder / "config.yaml", notes + resolved)
        return folder

    return processes.on_main(make)


def on_every_process(read: Callable[[], Read]) -> Read:
    """What `read` returns, on every process. The main one goes first, so that a Problem is told once."""
    kept: list[Read] = []
    processes.on_main(lambda: kept.append(read()))
    return kept[0] if kept else read()


@contextlib.contextmanager
def problems_of(name: str) -> Iterator[None]:
    """What a trainer refuses when it is built or prepares the rows, as a Problem of the section `name`."""
    try:
        yield
    except (ValueError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, Problem):
            raise
        raise Problem(f"{name}: {' '.join(str(error).split())}") from error


def load_base(settings: ModelSettings, role: str, head: str = "auto", **loading: Any) -> Any:
    """The model of `settings` without any adapter."""
    path = base_path(settings)
    attn = None if settings.attn in ("", "auto") else settings.attn
    # Weights that learn are float32 unless asked otherwise: a bfloat16 step of 1e-4 is mostly rounded away.
    dtype = "float32" if settings.dtype == "auto" else settings.dtype
    return load_head(path, role, head, dtype=dtype, attn=attn, **loading)


def base_path(settings: ModelSettings) -> str:
    """model.path, or the base of the adapter that lies there."""
    if not settings.path:
        raise Problem("model.path: missing; name a model folder or hub name, --model.path DIR")
    if not adapters.is_adapter_folder(settings.path):
        return settings.path
    if settings.adapter:
        raise Problem(f"model.path: {settings.path} is an adapter and model.adapter is set too; name the base in model.path")
    return adapters.base_of(settings.path)


def load_trainable(settings: ModelSettings, role: str, head: str = "auto", **loading: Any) -> Any:
    """The model of `settings` for a stage; its adapter, or a new one of model.peft, is then all that learns."""
    adapter = settings.path if adapters.is_adapter_folder(settings.path) else settings.adapter
    if adapter and settings.peft:
        raise Problem("model.peft: the model has an adapter already, which is trained further; leave one of the two out")
    model = load_base(settings, role, head, **loading)
    if adapter:
        model = adapters.load(model, adapter, trainable=True)
    if settings.peft:
        model = adapters.add(model, settings.peft)
    return model


def context_of(model: Any) -> int | None:
    """Most tokens of a row; None where nothing limits it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit - virtual_tokens.count(model) if isinstance(limit, int) and limit > 0 else None


def load_tokenizer(settings: ModelSettings) -> Any:
    """The tokenizer beside the model, or model.tokenizer."""
    import transformers

    path = settings.tokenizer or settings.path
    if not settings.tokenizer and adapters.is_adapter_folder(path) and not (Path(path) / "tokenizer_config.json").is_file():
        path = adapters.base_of(path)
    try:
        return transformers.AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Problem(f"model.path: no tokenizer in {path} ({what}); save one there or name it in model.tokenizer") from error


def check_checkpointing(fit: FitSettings, model: Any, name: str) -> None:
    """Recomputed layers see no cache, so a prefix would silently not be there."""
    config = getattr(model, "active_peft_config", None)
    if fit.checkpointing and config is not None and config.peft_type.value == "PREFIX_TUNING":
        raise Problem(f"{name}.checkpointing: true, but PREFIX_TUNING lives in the cache, which recomputed layers do not see")


def train(trainer: Any, run: RunSettings, folder: Path) -> None:
    """Run the trainer, from the newest whole checkpoint where the run is resumed."""
    start = newest_checkpoint(folder / "checkpoints") if run.resume else None
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    for entry in trainer.state.log_history:
        if not math.isfinite(entry.get("loss", 0.0)):
            raise Problem(f"step {entry['step']}: the loss is {entry['loss']}; lower the learning rate, or look at the data")


def finish(trainer: Any, tokenizer: Any, base: Callable[[], Any], folder: Path, metrics: dict[str, Any]) -> Outcome:
    """Write the model, the log and the summary; every process calls it. `base` loads the model that an adapter sits on."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what DeepSpeed or FSDP have spread
    world = processes.start().world_size
    if trainer.accelerator.is_main_process:
        save_model(model, tokenizer, base, folder, state)
        lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in trainer.state.log_history]
        write_text(folder / "metrics.jsonl", "".join(lines))
        write_json(folder / "summary.json", {**metrics, "steps": trainer.state.global_step, "world_size": world})
    processes.barrier()
    return Outcome(model=folder / "model", metrics=metrics)


def save_model(model: Any, tokenizer: Any, base: Callable[[], Any], folder: Path, state: dict[str, Any]) -> None:
    """RUN/model, merged where there is an adapter that can be; RUN/adapter; links in RUN to the model's files."""

    def write(target: Path, save: Callable[[Path], Any]) -> None:
        if target.exists():
            shutil.rmtree(target)
        with written_aside(target) as aside:
            aside.mkdir()
            save(aside)
            tokenizer.save_pretrained(aside)

    if hasattr(model, "peft_config"):
        write(folder / "adapter", lambda aside: adapters.save(model, aside, state))
        if model.active_peft_config.peft_type.value in adapters.VIRTUAL_KINDS:
            write(folder / "model", lambda aside: adapters.save(model, aside, state))
        else:
            merged = adapters.merge(adapters.load(base(), folder / "adapter"))
            write(folder / "model", lambda aside: merged.save_pretrained(aside))
    else:
        write(folder / "model", lambda aside: model.save_pretrained(aside, state_dict=state))
    with contextlib.suppress(OSError):  # a file system without links: RUN/model is there all the same
        for file in (folder / "model").iterdir():
            link = folder / file.name
            if link.is_symlink() or not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(Path("model") / file.name)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest one that was written to its end: trainer_state.json is what the trainer writes last."""
    found = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(OSError, ValueError):
            found.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
    return max(found)[1] if found else None


@contextlib.contextmanager
def bars_on_main(is_main: bool) -> Iterator[None]:
    """Progress bars of datasets and transformers, on the main process only."""
    import datasets
    from transformers.utils import logging

    bars, maps = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    if not is_main:
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        if maps:
            datasets.enable_progress_bars()
