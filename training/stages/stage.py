"""What the supervised stages share: settings of a fit, the trainers' arguments, resume, and what a run leaves behind.

    RUN/config.yaml         the resolved settings and versions
    RUN/metrics.jsonl       an object per log of the trainer
    RUN/checkpoints/        the trainer's own, for --run.resume; begun.json: settings and hashes of the data and weights
    RUN/model/              the model with its tokenizer; the run folder links to its files, so it loads as a model, too
    RUN/adapter/            with model.peft: the adapter by itself (model/ holds the merged model)
    RUN/summary.json        what was measured

The trainers do the training. accelerate starts the processes; rows of a step are counted over all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError

from steerl.rollout.common import processes
from steerl.rollout.common.errors import Stopped, UserError, reading
from steerl.rollout.common.fingerprint import tokenizer_fingerprint, values_fingerprint, weights_fingerprint
from steerl.rollout.common.progress import doing
from steerl.rollout.common.run_folder import RunSettings, begin, disk_trouble, opened, write_json
from steerl.rollout.model.auto_classes import savable
from steerl.training.checks import check_precision
from steerl.training.engine import zero
from steerl.training.run import hub, resume
from steerl.training.run.card import write_card
from steerl.training.run.log import SAMPLES, RunLog, log_line
from steerl.training.stages import models
from steerl.training.stages.data import TableRow
from steerl.training.stages.settings import FitSettings

if TYPE_CHECKING:
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )

Read = TypeVar("Read")
BEGUN = "checkpoints/begun.json"
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """What a supervised stage leaves."""

    model: Path
    metrics: Mapping[str, object]


def trainer_arguments(fit: FitSettings, run: RunSettings, folder: Path, held_out: bool) -> dict[str, object]:
    """The settings in the words of transformers' TrainingArguments."""
    zero.ready()
    world = processes.start().world_size
    rows = fit.batch_size // world
    micro = fit.micro_batch_size or rows
    return {
        "output_dir": str(folder),  # the trainer makes it at once; `train` names the checkpoints'
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
        "use_cpu": processes.without_gpu(),
        "logging_steps": fit.log_every,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if held_out and fit.evaluate_every else "no",
        "eval_steps": fit.evaluate_every or None,
        "save_strategy": "steps" if run.save_every else "no",
        "save_steps": run.save_every or 500,
        "save_total_limit": run.keep,
        "report_to": "none",  # trackers are told by the run's own log
        "seed": run.seed,
        "data_seed": run.seed,
        "disable_tqdm": not sys.stderr.isatty(),  # a bar is hundreds of lines in a file
        "remove_unused_columns": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
    }


def _checkpointing_name() -> str:
    """What TrainingArguments calls it: renamed in transformers 5.2x."""
    import transformers

    fields = transformers.TrainingArguments.__dataclass_fields__
    return "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"


@dataclass(frozen=True)
class StageRun:
    """A run's folder while a stage has it open, and what the run is made from."""

    folder: Path
    run: RunSettings
    resolved: str
    """The settings as YAML."""
    config: dict[str, object]
    content: dict[str, str]
    """Hashes of the data; the model's and the tokenizer's come to them when training begins."""
    stop: processes.Stop


@contextlib.contextmanager
def opened_run(job: Any, resolved: str, rows: Sequence[TableRow], held: Sequence[TableRow]) -> Iterator[StageRun]:
    """The run's folder, held by this job. Nothing in it changes before `train`."""
    content = {"prompts.path": values_fingerprint(rows), "prompts.heldout": values_fingerprint(held)}
    config, run = dataclasses.asdict(job), job.run
    processes.on_main(lambda: hub.check(run))
    with opened(run, config) as folder, processes.stop_signal() as stop:
        yield StageRun(folder, run, resolved, config, content, stop)
    hub.push_run(folder, run)


def on_every_process(read: Callable[[], Read]) -> Read:
    """What `read` returns, on every process. The main one goes first, so that a UserError is told once."""
    kept: list[Read] = []
    processes.on_main(lambda: kept.append(read()))
    return kept[0] if kept else read()


def build_trainer(
    section: str,
    trainer: type[Trainer],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: TrainingArguments,
    rows: Sequence[TableRow],
    held: Sequence[TableRow],
) -> Trainer:
    """One of trl's trainers over the rows; what it refuses while it prepares them is a UserError of the `section`."""
    import datasets

    try:
        return trainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(list(rows)),
            eval_dataset=datasets.Dataset.from_list(list(held)) if held else None,
            processing_class=tokenizer,
        )
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"{section}: {' '.join(str(error).split())}") from error


def check_checkpointing(fit: FitSettings, model: PreTrainedModel, name: str) -> None:
    """Recomputed layers see no cache, so a prefix would silently not be there."""
    config = getattr(model, "active_peft_config", None)
    if fit.checkpointing and config is not None and config.peft_type.value == "PREFIX_TUNING":
        raise UserError(f"{name}.checkpointing: true, but PREFIX_TUNING lives in the cache, which recomputed layers do not see")


def train(trainer: Trainer, where: StageRun) -> RunLog:
    """Run the trainer, from the newest whole checkpoint where the run is resumed. Every log of it is told at once.

    A signal ends it early, with a checkpoint."""
    check_precision(trainer.accelerator)
    run, folder = where.run, where.folder
    trainer.args.output_dir = str(folder / "checkpoints")
    if where.stop.anywhere():
        raise Stopped("stopped before the first step")
    start = processes.on_main(lambda: _begin(trainer, where))
    log = RunLog(folder, trackers=run.trackers)
    log.rewind({})
    save_any_generation_config(trainer)
    trainer.add_callback(telling(log))
    trainer.add_callback(stopping(where.stop))
    with full_disk_told(folder):
        trainer.train(resume_from_checkpoint=start)
    if trainer.state.global_step < trainer.state.max_steps:
        log.close()
        done = f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps} and saved"
        raise Stopped(f"{done}; --run.resume true goes on")
    return log


def _begin(trainer: Trainer, where: StageRun) -> str | None:
    """Write what the run is made from, or compare it with what a resumed one was. The checkpoint to go on from."""
    run, folder = where.run, where.folder
    content = where.content | {
        "model.path": weights_fingerprint(trainer.model),
        "model.tokenizer": tokenizer_fingerprint(trainer.processing_class),
    }
    start = newest_checkpoint(folder / "checkpoints") if run.resume else None
    changed = []
    if start is not None and (folder / BEGUN).is_file():
        with reading(f"{folder / BEGUN}: not what a run writes (", "); --run.overwrite true starts again"):
            begun = json.loads((folder / BEGUN).read_text(encoding="utf-8"))
            saved, made_from = dict(begun["config"]), dict(begun["made_from"])
        free = [*resume.FREE, *(f"{name}.{field}" for name in where.config for field in ("log_every", "evaluate_every"))]
        changed = resume.check(saved, where.config, made_from, content, free, run.allow_changes)
        for line in changed:
            if ".weight_decay:" in line:
                raise UserError(f"{line}; the trainer goes on with its own, start another run with --run.dir")
            _logger.warning("resume from %s: changed, as is allowed: %s", start.name, line)
    begin(folder, run)
    (folder / "checkpoints").mkdir(exist_ok=True)
    resume.write_config(folder, where.resolved, [f"from {start.name}: {line}" for line in changed if start is not None])
    write_json(folder / BEGUN, {"config": where.config, "made_from": content})
    return str(start) if start else None


def save_any_generation_config(trainer: Trainer) -> None:
    """Checkpoints too are saved without what has no effect in it."""
    save_model = trainer.save_model

    def save(*given: object, **named: object) -> None:
        with savable(trainer.accelerator.unwrap_model(trainer.model)):
            save_model(*given, **named)

    trainer.save_model = save


def telling(log: RunLog) -> TrainerCallback:
    """A callback of a trainer that writes its logs into the run's."""
    import transformers

    class Telling(transformers.TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
            for entry in state.log_history:  # what the checkpoint has of a run that is resumed
                log.metrics(entry["step"], entry)
            for group in rest["optimizer"].param_groups:  # a checkpoint brings its own learning rate
                factor = args.learning_rate / (group.get("initial_lr") or args.learning_rate or 1.0)
                if factor != 1:
                    group["lr"], group["initial_lr"] = group["lr"] * factor, args.learning_rate
                    rest["lr_scheduler"].base_lrs = [args.learning_rate] * len(rest["lr_scheduler"].base_lrs)

        def on_log(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            logs: dict[str, Any] | None = None,
            **rest: object,
        ) -> None:
            log.metrics(state.global_step, logs or {})
            loss = (logs or {}).get("loss", 0.0)
            if not math.isfinite(loss):
                raise UserError(f"step {state.global_step}: the loss is {loss}; lower the learning rate, or look at the data")

    return Telling()


def stopping(stop: processes.Stop) -> TrainerCallback:
    """A callback of a trainer that saves and ends after the step in which a signal came."""
    import transformers

    class Stopping(transformers.TrainerCallback):
        def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: object) -> None:
            if stop.anywhere() and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

    return Stopping()


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """What the system refuses while a trainer writes, as a UserError."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := disk_trouble(error)) is None:
            raise
        raise UserError(f"{folder}: cannot be written: {reason}; free some space, then --run.resume true") from error


def finish(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    base: Callable[[], PreTrainedModel],
    folder: Path,
    metrics: Mapping[str, object],
    log: RunLog,
) -> Outcome:
    """Write the model and the summary; every process calls it. `base` loads the model that an adapter sits on."""
    log.close()
    model = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # gathers what DeepSpeed or FSDP have spread
    world = processes.start().world_size
    if trainer.accelerator.is_main_process:
        with doing(f"writing {folder / 'model'}"):
            models.save_model(model, tokenizer, base, folder, state)
        write_card(folder, metrics)
        write_json(folder / "summary.json", {**metrics, "steps": trainer.state.global_step, "world_size": world})
        if not (folder / SAMPLES).stat().st_size:
            (folder / SAMPLES).unlink()
    processes.barrier()
    return Outcome(model=folder / "model", metrics=metrics)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest one that was written to its end: trainer_state.json is what the trainer writes last."""
    checkpoints = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with contextlib.suppress(OSError, ValueError):
            checkpoints.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
    return max(checkpoints)[1] if checkpoints else None


def tell_cut(count: int, rows: int, longest: int | None, done: str = "cut at their end") -> None:
    """How many rows are too long, and what becomes of them; nothing where all fit."""
    if count:
        log_line(
            f"prompts: {count:,} of {rows:,} rows have more than the {longest:,} tokens that prompts.max_tokens or the model's "
            f"context leave; they are {done}"
        )


@contextlib.contextmanager
def bars_on_main(is_main: bool) -> Iterator[None]:
    """Progress bars of datasets and transformers, on the main process only, and in a terminal only."""
    import datasets
    from transformers.utils import logging

    bars, maps = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    if not (is_main and sys.stderr.isatty()):
        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        if maps:
            datasets.enable_progress_bars()
