"""`kind: model`: a reward model, or an ensemble of them.

rollout, texts -> InputReader (ids or text) -> Classifier (batches) -> logits (B, labels) -> one label -> output
                                          one per member, then `combine`: mean | min | mean_minus_std
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerl.reward.kinds.classifier import Classifier, load_classifier
from steerl.reward.kinds.model_inputs import InputReader, folders_of, load_tokenizer, vocabulary_of
from steerl.reward.settings import Output, RewardModelSettings
from steerl.reward.types import Scores
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.fingerprint import model_fingerprint, tokenizer_fingerprint, values_fingerprint
from steerl.rollout.model.settings import Hub
from steerl.rollout.types import Rollout, Texts, row_name


def build(settings: RewardModelSettings, where: str, around: Any) -> RewardTerm:
    paths = [settings.path] if isinstance(settings.path, str) else list(settings.path)
    members = [load_member(settings, path, "sequence_classification", where, around.device) for path in paths]
    for member in members if settings.position != "last" else ():
        if not member.classifier.at_last or member.classifier.pad_id is None:
            raise UserError(f"{where}.position: {settings.position} is for decoders with a pad id; leave it out")
    reward = ModelReward(settings, members, where)
    return RewardTerm("", where, 1.0, reward.score, content=lambda: content_of(members))


@dataclass(frozen=True)
class Member:
    """One model with its reader, and the label that counts."""

    classifier: Classifier
    reader: InputReader
    label: int


def load_member(settings: Any, path: str, head: str, where: str, device: torch.device | str | None) -> Member:
    """`settings`: those of a model or process part."""
    field = where.split(" ")[0]
    folder, adapter = folders_of(path)
    device = usable_device(settings.device or device or ("cuda" if torch.cuda.is_available() else "cpu"), field)
    hub = Hub(settings.revision, settings.trust_remote_code)
    classifier = load_classifier(
        folder, adapter, head, field, dtype=settings.dtype, attn=settings.attn, fresh=settings.allow_new_head, device=device,
        batch_size=settings.batch_size, hub=hub,
    )  # fmt: skip
    label = choose_label(classifier, settings.label, field, path)
    tokenizer = load_tokenizer(settings.tokenizer, [adapter, folder], field, hub)
    limits = [limit for limit in (classifier.context, settings.max_tokens) if limit is not None]
    reader = InputReader(
        tokenizer=tokenizer,
        vocabulary=None if tokenizer is None else vocabulary_of(tokenizer),
        where=where,
        tokens=settings.tokens,
        reads=getattr(settings, "reads", "both"),
        add_eos=getattr(settings, "add_eos", False),
        too_long=settings.too_long,
        context=min(limits) - classifier.needs_eos if limits else None,
        size=classifier.embedding_size,
    )
    return Member(classifier, reader, label)


def usable_device(name: torch.device | str, field: str) -> torch.device:
    """The device, which this machine has."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        no_cuda = str(name).startswith("cuda") and not torch.cuda.is_available()
        why = "this machine has no CUDA" if no_cuda else (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{field}.device: {str(name)!r} cannot be used: {why:.200}; leave it out, or say cpu") from error
    return device


def content_of(members: Sequence[Member]) -> str:
    prints = ((model_fingerprint(m.classifier.model), m.reader.tokenizer) for m in members)
    return values_fingerprint([weights, tokenizer and tokenizer_fingerprint(tokenizer)] for weights, tokenizer in prints)


def choose_label(classifier: Classifier, label: str | int | None, field: str, path: str) -> int:
    names = {int(i): str(name) for i, name in (classifier.config.id2label or {}).items()}
    known = ", ".join(f"{i} ({names.get(i, '-')})" for i in range(classifier.labels))
    if label is None:
        if classifier.labels != 1:
            raise UserError(f"{field}.label: {path} has {classifier.labels} labels, {known}; choose the one that is the score")
        return 0
    if isinstance(label, int) and 0 <= label < classifier.labels:
        return label
    found = [i for i, name in names.items() if name == label and i < classifier.labels]
    if not found:
        raise UserError(f"{field}.label: {label!r} is no label of {path}; it has {known}")
    return found[0]


def chosen(logits_NL: Tensor, label: int, output: Output) -> Tensor:
    """(N,): one label's logit, probability or log-probability."""
    if output == "logit":
        return logits_NL[:, label]
    logprobs_NL = torch.nn.functional.logsigmoid(logits_NL) if logits_NL.shape[1] == 1 else logits_NL.log_softmax(1)
    return logprobs_NL[:, label] if output == "log_probability" else logprobs_NL[:, label].exp()


@dataclass(frozen=True)
class ModelReward:
    settings: RewardModelSettings
    members: list[Member]
    where: str

    def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        if not len(rollout):
            return Scores(torch.zeros(0))
        empty = [i for i, text in enumerate(texts.completions) if not text] if self.settings.empty is not None else []
        scored = [i for i in range(len(rollout)) if i not in set(empty)]
        columns = (
            [self._member(m, rollout.select(scored), texts.select(scored), vocabulary) for m in self.members] if scored else []
        )
        found_MB = torch.full((len(self.members), len(rollout)), float(self.settings.empty or 0.0))
        if scored:
            found_MB[:, scored] = torch.stack(columns)
        bad = torch.nonzero(~found_MB.isfinite().all(0)).flatten().tolist()
        if bad:
            value = found_MB[:, bad[0]].tolist()
            raise UserError(
                f"{self.where}: {row_name(rollout, bad[0])} scored {value}; the model's weights or dtype overflow, try float32"
            )
        parts = {str(i): column for i, column in enumerate(found_MB)} if len(self.members) > 1 else {}
        return Scores(self._combined(found_MB), parts)

    def _member(self, member: Member, rollout: Rollout, texts: Texts, vocabulary: str | None) -> Tensor:
        rows = member.reader(rollout, texts, vocabulary)
        return chosen(
            member.classifier.per_row(rows, self.settings.position == "last_not_pad"), member.label, self.settings.output
        )

    def _combined(self, found_MB: Tensor) -> Tensor:
        if self.settings.combine == "min":
            return found_MB.min(0).values
        mean_B = found_MB.mean(0)
        if self.settings.combine == "mean":
            return mean_B
        return mean_B - self.settings.k * found_MB.std(0, correction=0)
