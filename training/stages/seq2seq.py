"""Encoder-decoders in the supervised stage: transformers' Seq2SeqTrainer over rows of {prompt, completion}.

prefix + prompt ── encoder ids          completion ── label ids, its stop token last, padded with -100
held-out rows: loss; with generation also ROUGE and the mean length of what was written
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from steerl.reward.kinds.rouge import rouge
from steerl.rollout.common.errors import UserError
from steerl.rollout.model.language_model import vocabulary_size
from steerl.rollout.model.policy import check_vocabulary
from steerl.training.stages import models, stage
from steerl.training.stages.data import TableRow
from steerl.training.stages.settings import SFTJob
from steerl.training.stages.stage import Outcome, StageRun

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import (
        BatchEncoding,
        EvalPrediction,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
    )
    from transformers.modeling_outputs import Seq2SeqLMOutput

IGNORED = -100
"""What the loss leaves out."""


def tokenize(
    rows: Sequence[TableRow], tokenizer: PreTrainedTokenizerBase, prefix: str = "", longest: int = 0, longest_target: int = 0
) -> Dataset:
    """The rows as a dataset of input_ids, attention_mask and labels; longer ones are cut at their end."""
    import datasets

    def encode(texts: list[str], length: int, **how: object) -> BatchEncoding:
        return tokenizer(texts, **how, truncation=bool(length), max_length=length or None)

    def cut(batch: dict[str, list[str]]) -> dict[str, object]:
        encoded = encode([prefix + text for text in batch["prompt"]], longest)
        targets = tokenizer(text_target=batch["completion"], truncation=bool(longest_target), max_length=longest_target or None)
        # A tokenizer that ends no text by itself would teach a model that never stops.
        labels = [ids if tokenizer.eos_token_id in ids else [*ids, tokenizer.eos_token_id] for ids in targets["input_ids"]]
        over = [bool(one.overflowing) for one in encoded.encodings or ()] or [False] * len(labels)  # slow tokenizers do not say
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels, "over": over}

    whole = datasets.Dataset.from_list([{"prompt": row["prompt"], "completion": row["completion"]} for row in rows])
    dataset = whole.map(cut, batched=True, remove_columns=["prompt", "completion"], desc="Tokenizing")
    stage.tell_cut(sum(dataset["over"]), len(dataset), longest)
    return dataset.remove_columns("over")


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    arguments: Seq2SeqTrainingArguments,
    training: Dataset,
    held_out: Dataset | None,
    generates: bool,
    scale: float = 1,
) -> Seq2SeqTrainer:
    """A Seq2SeqTrainer; where it generates, its evaluation reports ROUGE (times `scale`) and lengths."""
    import transformers

    if tokenizer.eos_token_id is None:
        raise UserError("model.path: the tokenizer has no eos token, so no text would ever end; set one and save the tokenizer")
    check_vocabulary(tokenizer, vocabulary_size(model))
    # Learned positions of an encoder count from the left edge, whatever side the tokenizer pads for a decoder.
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return transformers.Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=training,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model, label_pad_token_id=IGNORED),
        compute_loss_func=None if arguments.label_smoothing_factor else token_mean,
        compute_metrics=GenerationMetrics(tokenizer, scale, len(held_out or ())) if generates else None,
    )


def token_mean(outputs: Seq2SeqLMOutput, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy over one count of learned tokens, that of the whole step.

    T5 takes the count as an argument and ignores it, so its own means would be summed over the portions of a step: four
    portions, four times the gradient.
    """
    total = torch.nn.functional.cross_entropy(
        outputs.logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (num_items_in_batch if num_items_in_batch is not None else (labels != IGNORED).sum())


class GenerationMetrics:
    """ROUGE and mean length of generated ids against label ids, of the first `rows` rows.

    With several processes the last batches are filled up with rows from the beginning, and Seq2SeqTrainer keeps those.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, scale: float, rows: int):
        self.tokenizer, self.scale, self.rows = tokenizer, scale, rows

    def __call__(self, result: EvalPrediction) -> dict[str, float]:
        predicted, references = (_ids(ids)[: self.rows] for ids in (result.predictions, result.label_ids))
        scores = rouge(decode(self.tokenizer, predicted), decode(self.tokenizer, references))
        special = [token for token in (self.tokenizer.pad_token_id, IGNORED) if token is not None]
        length = float((~np.isin(predicted, special)).sum(1).mean())
        return {**{kind: self.scale * value for kind, value in scores.items()}, "gen_len": length}


def decode(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray | tuple[np.ndarray, ...]) -> list[str]:
    """Texts of label or generated ids, without what only pads."""
    ids = _ids(ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return [text.strip() for text in tokenizer.batch_decode(np.where(ids == IGNORED, pad, ids), skip_special_tokens=True)]


def _ids(ids: np.ndarray | tuple[np.ndarray, ...]) -> np.ndarray:
    return np.asarray(ids[0] if isinstance(ids, tuple) else ids)


def fit_encoder_decoder(job: SFTJob, rows: Sequence[TableRow], held: Sequence[TableRow], where: StageRun) -> Outcome:
    """The supervised stage of train_sft.py for an encoder-decoder."""
    import transformers

    sft = job.sft
    for name in ("packing", "assistant_only"):
        if getattr(sft, name):
            raise UserError(f"sft.{name}: true, but the model is an encoder-decoder; it is for causal models")
    if sft.completion_only is False:
        raise UserError("sft.completion_only: false, but an encoder-decoder learns its completions only; leave it out")
    if sft.rouge and not held:
        raise UserError("sft.rouge: true, but there are no held-out rows to generate for; set prompts.heldout")
    if sft.beams < 1 or (sft.beams > 1 and not sft.rouge):
        raise UserError(f"sft.beams: {sft.beams}; give at least 1, and more than one only with sft.rouge, which generates")
    transformers.set_seed(job.run.seed)
    tokenizer = models.load_tokenizer(job.model)
    model = models.load_trainable(job.model, "policy", "seq2seq")
    stage.check_checkpointing(sft, model, "sft")
    longest = job.prompts.max_tokens or models.context_of(model) or 0
    training, held_out = (
        tokenize(part, tokenizer, sft.source_prefix, longest, sft.max_target_tokens) if part else None for part in (rows, held)
    )
    target = sft.max_target_tokens or max(len(row["labels"]) for part in (training, held_out) if part for row in part)
    arguments = transformers.Seq2SeqTrainingArguments(
        **stage.trainer_arguments(sft, job.run, where.folder, bool(held)),
        predict_with_generate=sft.rouge,
        generation_max_length=target + 1,
        generation_num_beams=sft.beams,
    )
    began = time.monotonic()
    trainer = make_trainer(model, tokenizer, arguments, training, held_out, sft.rouge)
    log = stage.train(trainer, where)
    measured = trainer.evaluate() if held else {}
    metrics = {"rows": len(rows), "rows_heldout": len(held), "heldout_loss": measured.get("eval_loss")}
    metrics |= {name: measured[f"eval_{name}"] for name in ("rouge1", "rouge2", "rougeL", "rougeLsum", "gen_len") if sft.rouge}
    metrics["seconds"] = round(time.monotonic() - began, 1)
    return stage.finish(
        trainer, tokenizer, lambda: models.load_base(job.model, "policy", "seq2seq"), where.folder, metrics, log
    )
