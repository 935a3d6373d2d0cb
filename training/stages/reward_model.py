"""The reward-model stage: preference pairs -> a sequence classifier with one label, by trl's RewardTrainer.

    chosen, rejected (prompt) ── tokens ── loss -log sigmoid(score chosen - score rejected) ── a model folder
    held-out pairs ── gap of each pair ── accuracy, margin, calibration: is a gap of g right in sigmoid(g) of the cases?

Pairs are texts or conversations; the prompt is a column of its own, or the beginning of both.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import write_json
from steerl.rollout.model import adapters
from steerl.rollout.model.language_model import vocabulary_size
from steerl.rollout.model.policy import check_vocabulary
from steerl.rollout.prompts.chat import is_conversation
from steerl.rollout.prompts.tables import columns_of
from steerl.training.stages import data, models, stage
from steerl.training.stages.data import TableRow
from steerl.training.stages.settings import RewardJob, TableSettings, check_fit
from steerl.training.stages.stage import Outcome, StageRun

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

BINS = 10


def run_reward(job: RewardJob, resolved: str = "") -> Outcome:
    """Train, measure on the held-out pairs, and write the run's folder."""
    check_fit(job.reward_model, "reward_model")
    rows, held = stage.on_every_process(lambda: read(job.prompts, job.run.seed))
    with stage.opened_run(job, resolved, rows, held) as where, stage.bars_on_main(processes.start().is_main):
        return _fit(job, rows, held, where)


def read(settings: TableSettings, seed: int) -> tuple[list[TableRow], list[TableRow]]:
    """Checked training and held-out pairs: chosen, rejected and, where it stands apart, prompt."""
    if settings.column:
        raise UserError(f"prompts.column: {settings.column!r} has no effect on pairs; say what is what with prompts.columns")
    rows, held = data.read_rows(settings, _checked)
    return data.hold_out(rows, settings, seed, held)


def _checked(rows: list[TableRow], where: str) -> list[TableRow]:
    there = columns_of(rows)
    if "chosen" not in there or "rejected" not in there:
        raise data.missing_columns(rows, "chosen and rejected (and prompt, unless both begin with it)", where)
    rows = [_with_spoken_prompt(row) for row in rows]
    names: list[str] = [name for name in ("chosen", "rejected", "prompt") if name in columns_of(rows)]
    talks = data.check_values(rows, names, where)
    data.raise_first(
        [
            f"{where}: row {number}: chosen equals rejected, which says nothing about either; remove the row"
            for number, row in enumerate(rows, 1)
            if row["chosen"] == row["rejected"]
        ]
    )
    if "margin" in there:
        names.append("margin")
        short = [number for number, row in enumerate(rows, 1) if not isinstance(row.get("margin"), int | float)]
        data.raise_first([f"{where}: row {number}: margin is no number; give every pair one, or none" for number in short])
    return data.with_template(rows, names, where) if talks else [{name: row[name] for name in names} for row in rows]


def _with_spoken_prompt(row: TableRow) -> TableRow:
    """Beside conversations a prompt that is a text is a user's message; many tables have it a second time in both.

    It then stands before both answers, in every row alike: some of a table's rows may hold it already."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen") or [], row.get("rejected") or []
    if not isinstance(prompt, str) or not is_conversation(chosen) or not is_conversation(rejected):
        return row
    others = {name: value for name, value in row.items() if name != "prompt"}
    if any(message.get("content") == prompt for message in chosen):
        return others
    question = {"role": "user", "content": prompt}
    return {**others, "chosen": [question, *chosen], "rejected": [question, *rejected]}


def _fit(job: RewardJob, rows: Sequence[TableRow], held: Sequence[TableRow], where: StageRun) -> Outcome:
    import transformers
    import trl

    settings = job.reward_model
    if settings.center < 0:
        raise UserError(f"reward_model.center: {settings.center}; give 0 or more")
    transformers.set_seed(job.run.seed)
    tokenizer = models.load_tokenizer(job.model)
    wholes = [("prompt", "chosen"), ("prompt", "rejected")]
    data.check_tokenizer(tokenizer, rows, wholes, what="pairs", eos="which marks a whole answer")
    model = models.load_trainable(job.model, "reward", "sequence_classification", fresh=True, num_labels=1)
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if kind is not None and kind.value in adapters.VIRTUAL_KINDS:
        raise UserError(f"model.peft.peft_type: {kind.value} cannot be merged into a reward model that loads alone; use LORA")
    stage.check_checkpointing(settings, model, "reward_model")
    check_vocabulary(tokenizer, vocabulary_size(model))
    longest = job.prompts.max_tokens or models.context_of(model)
    arguments = trl.RewardConfig(
        **stage.trainer_arguments(settings, job.run, where.folder, bool(held)),
        max_length=longest,
        center_rewards_coefficient=settings.center or None,
        disable_dropout=not settings.dropout,
    )
    began = time.monotonic()
    trainer = stage.build_trainer("reward_model", trl.RewardTrainer, model, tokenizer, arguments, rows, held)
    for name, part, whole in (("training", trainer.train_dataset, rows), ("held-out", trainer.eval_dataset, held)):
        if whole and not len(part):
            raise UserError(f"prompts.max_tokens: every {name} pair is longer than {longest} tokens; raise it")
    stage.tell_cut(len(rows) - len(trainer.train_dataset), len(rows), longest, "left out")
    log = stage.train(trainer, where)
    metrics: dict[str, object] = {
        "rows": len(trainer.train_dataset),
        "rows_heldout": len(trainer.eval_dataset) if held else 0,
        "rows_too_long": len(rows) - len(trainer.train_dataset) + (len(held) - len(trainer.eval_dataset) if held else 0),
    }
    if held:
        gaps_B, scores_B2 = pair_gaps(trainer)
        measured = pair_metrics(gaps_B)
        metrics |= {"accuracy": measured["accuracy"], "margin": measured["margin"], "score_mean": float(scores_B2.mean())}
        metrics |= {"score_std": float(scores_B2.std(correction=0)), "calibration_error": measured["calibration_error"]}
        if trainer.accelerator.is_main_process:
            write_json(where.folder / "calibration.json", measured)
    metrics["seconds"] = round(time.monotonic() - began, 1)

    def base() -> PreTrainedModel:
        return models.load_base(job.model, "reward", "sequence_classification", fresh=True, num_labels=1)

    return stage.finish(trainer, tokenizer, base, where.folder, metrics, log)


@torch.no_grad()
def pair_gaps(trainer: Trainer) -> tuple[Tensor, Tensor]:
    """(score of chosen minus score of rejected, both scores) of every held-out pair, on every process."""
    model = trainer.model
    model.eval()
    process = processes.start()
    scored: list[tuple[int, float, float]] = []
    size = max(trainer.args.per_device_eval_batch_size, 1)
    data = trainer.eval_dataset
    numbers = list(range(process.rank, len(data), process.world_size))
    for begin in range(0, len(numbers), size):
        chosen = numbers[begin : begin + size]
        batch = trainer.data_collator([data[number] for number in chosen])
        inputs = {name: batch[name].to(trainer.args.device) for name in ("input_ids", "attention_mask")}
        scores_2B = model(**inputs).logits[:, 0].float().cpu().chunk(2)
        scored += [(n, float(a), float(b)) for n, a, b in zip(chosen, scores_2B[0], scores_2B[1], strict=True)]
    rows = sorted(processes.gather_objects(scored))
    scores_B2 = torch.tensor([[a, b] for _, a, b in rows], dtype=torch.float64)
    return scores_B2[:, 0] - scores_B2[:, 1], scores_B2


def pair_metrics(gaps_B: Tensor) -> dict[str, object]:
    """Accuracy, mean margin, and calibration: pairs by the size of their gap, the accuracy that it promises and has.

    A gap of g promises that the preferred answer is the better one with probability sigmoid(|g|). Bins hold as many
    pairs each; the calibration error is the mean distance of promise and truth, weighted by pairs. A tie is half right.
    """
    gaps_B = gaps_B.double()
    right_B = torch.where(gaps_B == 0, 0.5, (gaps_B > 0).double())
    promise_B = gaps_B.abs().sigmoid()
    order = gaps_B.abs().argsort(stable=True)
    bins = []
    for part in order.chunk(min(BINS, len(order))):
        bins.append(
            {
                "pairs": len(part),
                "gap_from": float(gaps_B[part].abs().min()),
                "gap_to": float(gaps_B[part].abs().max()),
                "promised": float(promise_B[part].mean()),
                "accuracy": float(right_B[part].mean()),
            }
        )
    error = sum(b["pairs"] * abs(b["promised"] - b["accuracy"]) for b in bins) / len(gaps_B)
    return {
        "accuracy": float(right_B.mean()),
        "margin": float(gaps_B.mean()),
        "calibration_error": float(error),
        "bins": bins,
    }
