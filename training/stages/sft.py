"""The supervised stage: trl's SFTTrainer for causal models, transformers' Seq2SeqTrainer for encoder-decoders.

    rows ──┬─ text                     the loss is on all of it
           ├─ prompt + completion      the loss is on the completion (texts, or conversations)
           └─ messages                 a conversation; with assistant_only the loss is on the assistant's turns

An encoder-decoder reads `prompt` and writes `completion`. The texts of a row end with the model's stop token.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.stops import turn_end
from steerl.rollout.model.auto_classes import choose_head, load_config
from steerl.rollout.model.language_model import vocabulary_size
from steerl.rollout.model.policy import check_vocabulary
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.prompts.chat import is_conversation
from steerl.rollout.prompts.tables import columns_of
from steerl.training.run.log import log_line
from steerl.training.stages import data, models, stage
from steerl.training.stages.data import TableRow
from steerl.training.stages.seq2seq import fit_encoder_decoder
from steerl.training.stages.settings import SFTJob, SFTSettings, TableSettings, check_fit
from steerl.training.stages.stage import Outcome, StageRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run_sft(job: SFTJob, resolved: str = "") -> Outcome:
    """Train, measure on the held-out rows, and write the run's folder."""
    check_fit(job.sft, "sft")
    kind = _kind(job.model)
    rows, held = stage.on_every_process(lambda: read(job.prompts, job.run.seed, kind, job.sft))
    with stage.opened_run(job, resolved, rows, held) as where, stage.bars_on_main(processes.start().is_main):
        if kind == "seq2seq":
            return fit_encoder_decoder(job, rows, held, where)
        return _fit_causal(job, rows, held, where)


def read(settings: TableSettings, seed: int, kind: str, sft: SFTSettings) -> tuple[list[TableRow], list[TableRow]]:
    """Checked training and held-out rows, with no columns but those that are learned from."""
    if settings.column and kind == "seq2seq":
        raise UserError(f"prompts.column: {settings.column!r}, but an encoder-decoder needs two; name them in prompts.columns")
    rows, held = data.read_rows(settings, lambda table, where: _checked(table, kind, sft, where, bool(settings.column)))
    return data.hold_out(rows, settings, seed, held)


def _checked(rows: list[TableRow], kind: str, sft: SFTSettings, where: str, text_asked: bool) -> list[TableRow]:
    shapes: dict[str, tuple[str, ...]] = {"prompt and completion": ("prompt", "completion")}
    if kind == "causal" and text_asked:
        shapes = {"text": ("text",)}
    elif kind == "causal":
        shapes |= {"messages": ("messages",), "text": ("text",)}
    there = columns_of(rows)
    names = next((names for names in shapes.values() if all(name in there for name in names)), None)
    if names is None:
        raise data.missing_columns(rows, " or ".join(shapes), where)
    talks = data.check_values(rows, names, where)
    if names[-1] == "completion" and not sft.assistant_only:
        _check_speakers(rows, talks, where)
    if talks and kind == "seq2seq":
        raise UserError(f"{where}: the prompts are conversations, but the model is an encoder-decoder; give texts")
    if names == ("messages",) and not talks:
        raise UserError(
            f"{where}: row 1: messages is {type(rows[0].get('messages')).__name__}, expected a list of {{role, content}}"
        )
    if sft.completion_only and "completion" not in names:
        raise UserError(f"sft.completion_only: true, but the rows have {names[0]} and no completion")
    if sft.assistant_only and not talks:
        raise UserError("sft.assistant_only: true, but the rows are texts, not conversations")
    return data.with_template(rows, names, where) if talks else [{name: row[name] for name in names} for row in rows]


def _check_speakers(rows: Sequence[TableRow], talks: bool, where: str) -> None:
    """What a policy was told between its turns, a tool's result, is not its own to learn."""
    if talks:
        others = sum(any(message["role"] != "assistant" for message in row["completion"]) for row in rows)
        told = "hold messages of others (a tool's, a user's), which are learned like the assistant's"
        if others:
            log_line(f"{where}: completions of {others} of {len(rows)} rows {told}; sft.assistant_only true leaves them out")
    elif fed := next((number for number, row in enumerate(rows, 1) if _was_told(row.get("episode"))), 0):
        raise UserError(
            f"{where}: row {fed}: its completion is an episode's, and also holds what the policy was told, which would be "
            "learned as its own; select episodes of conversations, or learn from the dump itself with ppo.replay"
        )


def _was_told(episode: object) -> bool:
    """`episode`: a column that steerl select keeps; of another make it says nothing."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return isinstance(episode, str) and any(turn["answer"] for turn in json.loads(episode)["turns"])
    return False


def _kind(settings: ModelSettings) -> str:
    """causal or seq2seq, without loading the weights."""
    path, _, hub = settings.base()
    return choose_head(load_config(path, hub=hub), "policy", settings.kind, path=path)


def _fit_causal(job: SFTJob, rows: Sequence[TableRow], held: Sequence[TableRow], where: StageRun) -> Outcome:
    import transformers
    import trl

    sft = job.sft
    for name, unset in {"source_prefix": "", "max_target_tokens": 0, "rouge": False, "beams": 1}.items():
        if getattr(sft, name) != unset:
            raise UserError(f"sft.{name}: {getattr(sft, name)!r}, but the model is causal; it is for encoder-decoders")
    transformers.set_seed(job.run.seed)
    tokenizer = models.load_tokenizer(job.model)
    model = models.load_trainable(job.model, "policy", "causal")
    stage.check_checkpointing(sft, model, "sft")
    check_vocabulary(tokenizer, vocabulary_size(model))
    data.check_tokenizer(tokenizer, rows, [("prompt", "completion", "messages")], what="rows", eos="so no text would ever end")
    arguments = trl.SFTConfig(
        **stage.trainer_arguments(sft, job.run, where.folder, bool(held)),
        max_length=job.prompts.max_tokens or models.context_of(model),
        completion_only_loss=sft.completion_only,
        assistant_only_loss=sft.assistant_only,
        packing=sft.packing,
        pad_token=None,
    )
    began = time.monotonic()
    trainer = stage.build_trainer("sft", trl.SFTTrainer, model, tokenizer, arguments, rows, held)
    if not len(trainer.train_dataset):
        raise UserError(f"prompts.max_tokens: every row is cut before its completion at {arguments.max_length}; raise it")
    whole, end = _ends(tokenizer, rows[0])
    # TRL has cut them already; one that only fills its place has its end in it.
    full = [] if sft.packing else [ids for ids in trainer.train_dataset["input_ids"] if len(ids) == arguments.max_length]
    cut = len(rows) - len(trainer.train_dataset) + sum(ids[-1] not in whole for ids in full) if not sft.packing else 0
    stage.tell_cut(cut, len(rows), arguments.max_length)
    log = stage.train(trainer, where)
    models.stop_at(model, end)  # now: the trainer has put the tokenizer's own eos there
    measured = trainer.evaluate() if held and len(trainer.eval_dataset) else {}
    metrics = {
        "rows": len(rows),
        "rows_heldout": len(held),
        "rows_cut": cut,
        "rows_cut_whole": len(rows) - len(trainer.train_dataset) if not sft.packing else 0,
        "heldout_loss": measured.get("eval_loss"),
        "heldout_token_accuracy": measured.get("eval_mean_token_accuracy"),
        "seconds": round(time.monotonic() - began, 1),
    }
    return stage.finish(trainer, tokenizer, lambda: models.load_base(job.model, "policy", "causal"), where.folder, metrics, log)


def _ends(tokenizer: PreTrainedTokenizerBase, row: TableRow) -> tuple[set[int], int | None]:
    """(ids that a whole row may end with, the token after an assistant's turn where the row is a conversation)."""
    messages = next(([*row.get("prompt", []), *value] for value in reversed(row.values()) if is_conversation(value)), None)
    if messages is None:
        return {tokenizer.eos_token_id}, None
    template = {"tools": row.get("tools"), **(row.get("chat_template_kwargs") or {})}
    end = turn_end(tokenizer, messages, **template)
    if end is None:
        log_line(
            "model.path: its chat template ends a turn with no token of its own, so the model learns no end; fix the template"
        )
    return {tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **template)[-1], end}, end
