"""The summarization command line that transformers' users know, over this project's supervised stage.

    steerl summarize --model_name_or_path DIR --do_train --do_eval --train_file F --validation_file F \\
        --text_column article --summary_column summary --source_prefix "summarize: " --output_dir OUT \\
        --per_device_train_batch_size=4 --per_device_eval_batch_size=4 --num_train_epochs 3 --overwrite_output_dir \\
        --predict_with_generate

All of transformers' Seq2SeqTrainingArguments are flags, too. OUT holds the model with its tokenizer, train_results.json,
eval_results.json (with ROUGE from 0 to 100), predict_results.json, generated_predictions.txt and all_results.json.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import steerl.configs  # noqa: F401  # the environment that torch is loaded in

from steerl.rollout.common import processes
from steerl.rollout.common.errors import Stopped, UserError
from steerl.rollout.common.run_folder import RunSettings, begin, is_run, opened, write_text
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.prompts.tables import columns_of, read_table
from steerl.training.stages.data import TableRow, check_values, missing_columns

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Seq2SeqTrainer, Seq2SeqTrainingArguments

_logger = logging.getLogger(__name__)

# Hub dataset -> its columns, as in the original script.
KNOWN_COLUMNS = {
    "cnn_dailymail": ("article", "highlights"),
    "abisee/cnn_dailymail": ("article", "highlights"),
    "xsum": ("document", "summary"),
    "EdinburghNLP/xsum": ("document", "summary"),
    "samsum": ("dialogue", "summary"),
    "big_patent": ("description", "abstract"),
    "multi_news": ("document", "summary"),
    "billsum": ("text", "summary"),
}


@dataclass
class SummarisationArguments:
    """What is summarized, and with which model; the rest are transformers' training arguments."""

    model_name_or_path: str = field(metadata={"help": "Folder or hub name of an encoder-decoder."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Folder or hub name, where it is not the model's."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset of the hub, or a dataset's folder."})
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Its configuration.", "aliases": ["--dataset_config"]}
    )
    train_file: str | None = field(default=None, metadata={"help": "jsonl, json, csv or parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "jsonl, json, csv or parquet."})
    test_file: str | None = field(default=None, metadata={"help": "jsonl, json, csv or parquet."})
    text_column: str | None = field(default=None, metadata={"help": "Column of the texts; else the first column."})
    summary_column: str | None = field(default=None, metadata={"help": "Column of the summaries; else the second column."})
    source_prefix: str = field(default="", metadata={"help": 'What every text begins with, as "summarize: " for T5.'})
    max_source_length: int = field(default=1024, metadata={"help": "Longest text in tokens."})
    max_target_length: int = field(default=128, metadata={"help": "Longest summary in tokens."})
    val_max_target_length: int | None = field(default=None, metadata={"help": "The same when measuring; else as above."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Only the first rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Only the first rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Only the first rows."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams when generating."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Empty the output folder first, if a job wrote it."})


def parse(argv: Sequence[str]) -> tuple[SummarisationArguments, Seq2SeqTrainingArguments]:
    """The command line as (ours, transformers' Seq2SeqTrainingArguments); a UserError in a line where it is wrong."""
    import transformers

    class Parser(transformers.HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UserError(f"{message}; see --help")

    parser = Parser((SummarisationArguments, transformers.Seq2SeqTrainingArguments))
    parser.set_defaults(report_to="none", use_cpu=processes.without_gpu(), disable_tqdm=not sys.stderr.isatty())
    try:
        ours, training = parser.parse_args_into_dataclasses(args=list(argv))
    except (ValueError, TypeError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return ours, training


def read(ours: SummarisationArguments, part: str, file: str | None, limit: int | None) -> list[TableRow]:
    """The rows of train, validation or test as {prompt, completion}."""
    if file is None and ours.dataset_name is None:
        raise UserError(f"{part}_file: missing; name a jsonl, json, csv or parquet file, or a dataset with --dataset_name")
    if file is not None and ours.dataset_name is not None:
        _logger.warning("dataset_name %s has no effect on %s: %s_file is set", ours.dataset_name, part, part)
    source = file or ours.dataset_name or ""
    rows = list(read_table(source, "" if file else part, ours.dataset_config_name or "", f"{part}_file"))
    if not rows:
        raise UserError(f"{part}_file: {source} has no rows")
    names = columns_of(rows)
    known = KNOWN_COLUMNS.get(ours.dataset_name or "", (names[0], names[1] if len(names) > 1 else "")) if not file else names
    chosen = {"prompt": ours.text_column or known[0], "completion": ours.summary_column or (known[1] if len(known) > 1 else "")}
    for role, flag in (("prompt", "text_column"), ("completion", "summary_column")):
        if chosen[role] not in names:
            raise UserError(f"{flag}: {chosen[role]!r} is no column of {source}; it has: {', '.join(names)}")
    if chosen["prompt"] == chosen["completion"]:
        raise missing_columns(rows, "a column of texts and one of summaries", f"{part}_file")
    # Rows without a text or a summary are left out, as everybody's script for this task does.
    found = [{role: row.get(name) for role, name in chosen.items()} for row in rows]
    whole = [row for row in found if row["prompt"] and row["completion"]]
    if len(whole) < len(found):
        _logger.warning(
            "%s: %d of %d rows have no text or no summary and are left out", part, len(found) - len(whole), len(found)
        )
    if not whole:
        raise UserError(f"{part}_file: no row has both a {chosen['prompt']} and a {chosen['completion']}")
    check_values(whole, ("prompt", "completion"), f"{part}_file")
    return whole[:limit] if limit else whole


def main(ours: SummarisationArguments, training: Seq2SeqTrainingArguments) -> None:
    import transformers

    from steerl.training.stages import models, stage

    if not (training.do_train or training.do_eval or training.do_predict):
        raise UserError("nothing to do: give --do_train, --do_eval or --do_predict")
    if training.do_predict and not training.predict_with_generate:
        raise UserError("do_predict: needs --predict_with_generate; without it there is nothing that could be written")
    rows: dict[str, list[TableRow]] = {}
    if training.do_train:
        rows["train"] = stage.on_every_process(lambda: read(ours, "train", ours.train_file, ours.max_train_samples))
    if training.do_eval:
        rows["validation"] = stage.on_every_process(
            lambda: read(ours, "validation", ours.validation_file, ours.max_eval_samples)
        )
    if training.do_predict:
        rows["test"] = stage.on_every_process(lambda: read(ours, "test", ours.test_file, ours.max_predict_samples))
    transformers.set_seed(training.seed)
    settings = ModelSettings(path=ours.model_name_or_path, tokenizer=ours.tokenizer_name or "")
    model = models.load_trainable(settings, "policy", "seq2seq")
    tokenizer = models.load_tokenizer(settings)
    output = Path(training.output_dir)
    empty = ours.overwrite_output_dir and not training.resume_from_checkpoint
    if empty and output.is_dir() and not is_run(output):
        _logger.warning("overwrite_output_dir: %s holds what no job of ours wrote; it stays, and is written over", output)
    run = RunSettings(
        dir=training.output_dir,
        overwrite=empty and is_run(output),
        resume=not is_run(output) if empty else bool(training.resume_from_checkpoint) or not training.do_train,
    )
    with flags_named(), opened(run, asdict(ours)) as folder, processes.stop_signal() as stop:
        work(ours, training, rows, model, tokenizer, folder, run, stop)


@contextlib.contextmanager
def flags_named() -> Iterator[None]:
    """Problems of the run's folder in the words of this command's flags."""
    words = {"run.dir": "output_dir", "--run.resume true": "--resume_from_checkpoint PATH"}
    words |= {"--run.overwrite true": "--overwrite_output_dir", "run.overwrite": "overwrite_output_dir"}
    try:
        yield
    except UserError as problem:
        lines = list(problem.lines)
        for ours, theirs in words.items():
            lines = [line.replace(ours, theirs) for line in lines]
        raise UserError(*lines) from problem


def work(
    ours: SummarisationArguments,
    training: Seq2SeqTrainingArguments,
    rows: dict[str, list[TableRow]],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    run: RunSettings,
    stop: processes.Stop,
) -> None:
    from steerl.training.stages import models, stage
    from steerl.training.stages.seq2seq import decode, make_trainer, tokenize

    longest = ours.val_max_target_length or ours.max_target_length
    training.generation_max_length = training.generation_max_length or longest
    training.generation_num_beams = ours.num_beams or training.generation_num_beams
    with stage.bars_on_main(processes.start().is_main):
        context = models.context_of(model)
        source = min(ours.max_source_length, context) if context else ours.max_source_length
        data = {
            part: tokenize(found, tokenizer, ours.source_prefix, source, ours.max_target_length if part == "train" else longest)
            for part, found in rows.items()
        }
        trainer = make_trainer(
            model, tokenizer, training, data.get("train"), data.get("validation"), training.predict_with_generate, scale=100
        )
        processes.on_main(lambda: begin(folder, run))
        if training.do_train:
            stage.save_any_generation_config(trainer)
            trainer.add_callback(stage.stopping(stop))
            with stage.full_disk_told(folder):
                trained = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
                if trainer.state.global_step < trainer.state.max_steps:
                    at = f"checkpoint-{trainer.state.global_step}"
                    raise Stopped(f"stopped early and saved; --resume_from_checkpoint {folder / at} goes on")
                trainer.save_model(str(folder))
            keep(trainer, "train", {**trained.metrics, "train_samples": len(rows["train"])})
            trainer.save_state()
        if training.do_eval:
            keep(trainer, "eval", {**trainer.evaluate(), "eval_samples": len(rows["validation"])})
        if training.do_predict:
            trainer.compute_metrics.rows = len(data["test"])
            found = trainer.predict(data["test"], metric_key_prefix="predict")
            keep(trainer, "predict", {**found.metrics, "predict_samples": len(rows["test"])})
            if trainer.is_world_process_zero():
                written = decode(tokenizer, found.predictions)[: len(data["test"])]
                texts = "".join(text.replace("\n", " ") + "\n" for text in written)
                write_text(folder / "generated_predictions.txt", texts)


def keep(trainer: Seq2SeqTrainer, part: str, metrics: dict[str, object]) -> None:
    """Show the metrics, and write them into PART_results.json and all_results.json."""
    trainer.log_metrics(part, metrics)
    trainer.save_metrics(part, metrics)


def run_command(argv: Sequence[str] | None = None) -> None:
    """The flags are transformers' own, so this command reads them with its parser; otherwise as configs.reader.command."""
    failed = 0
    try:
        processes.start()
        main(*parse(sys.argv[1:] if argv is None else argv))
    except UserError as problem:
        failed = 2
        for line in problem.lines:
            print(line, file=sys.stderr)
    except (Stopped, KeyboardInterrupt) as early:
        failed = Stopped.status if isinstance(early, Stopped) else 130
        print(str(early) or "interrupted", file=sys.stderr)
    finally:
        of_several = processes.close()
    if failed:
        raise SystemExit(failed)
    if of_several:
        processes.end()


def cli() -> None:
    run_command()


if __name__ == "__main__":
    cli()
