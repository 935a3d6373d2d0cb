"""Probes: a direction read as a number, logit = slope x (h . direction) + bias, and the threshold above which it is a yes.

    fit(positive, negative)      logistic regression (ridge, Newton's method) on activations
    judge(probe, ...)            on held-out activations: AUC, and the threshold for a rate of false positives
    read_probe(path, layer)      from the vector file that `steerl extract --extract.method probe` makes
    hidden_states(...)           the activations of a rollout's tokens at a point, of a frozen model

The file is a vector file like any other: its tensors are what steering adds, and the metadata `probe` has the numbers that make
each layer's vector a probe, so that one file serves both.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from steerl.rollout.common.errors import DataError, UserError, reading
from steerl.rollout.model import hooks
from steerl.rollout.model.hooks import Frame
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.alignment import first_predicting, forward_inputs, predicting
from steerl.rollout.scoring.logprobs import may_begin_at_first, narrowed, row_groups
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import Point, locate
from steerl.rollout.steering.vectors.files import per_layer, read_tensors
from steerl.rollout.types import Rollout, row_name


@dataclass(frozen=True)
class Reading:
    """What makes a layer's vector a probe, and how it does on texts that it was not made from."""

    slope: float
    bias: float
    threshold: float = 0.0
    """A logit: above it, the texts are taken for positive ones."""
    auc: float | None = None
    """Of held-out texts, as the rest. None where there were none: the threshold is then that of the texts it was made from."""
    accuracy: float | None = None
    """Share of both kinds on the right side of 0."""
    false_positives: float | None = None
    """Share of negative texts above the threshold."""
    true_positives: float | None = None
    """Share of positive texts above the threshold."""


@dataclass(frozen=True)
class Probe:
    direction_D: Tensor
    reading: Reading
    at: At
    position: str
    """Which of a text's tokens it was made for: mean or last."""

    def logits(self, hidden: Tensor) -> Tensor:
        direction_D = self.direction_D.to(hidden.device)
        return self.reading.slope * (hidden.float() @ direction_D) + self.reading.bias


# -- making ----------------------------------------------------------------------------------------------------------------


def fit(positive: Tensor, negative: Tensor, penalty: float = 1e-2, rounds: int = 100) -> tuple[Tensor, float]:
    """(weight, bias) of a logistic regression (ridge, Newton's method), of activations as they are."""
    if len(positive) < 2:
        raise UserError(f"method: probe needs at least 2 pairs, found {len(positive)}; use mean_diff")
    positive, negative = positive.double(), negative.double()
    x = torch.cat([positive, negative])
    y = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))]).double()
    centre, spread = x.mean(0), x.std(0).clamp_min(1e-8)
    z = torch.cat([(x - centre) / spread, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    ridge = penalty * len(x) * torch.eye(z.shape[1], dtype=x.dtype)
    ridge[-1, -1] = 1e-9
    weight = torch.zeros(z.shape[1], dtype=x.dtype)
    for _ in range(rounds):
        probability = torch.sigmoid(z @ weight)
        gradient = z.T @ (probability - y) + ridge @ weight
        hessian = (z * (probability * (1 - probability))[:, None]).T @ z + ridge
        step = torch.linalg.solve(hessian, gradient)
        weight = weight - step
        if float(step.norm()) < 1e-9 * (1.0 + float(weight.norm())):
            break
    along = weight[:-1] / spread
    return along, float(weight[-1] - along @ centre)


def reading_of(vector_D: Tensor, weight_D: Tensor, bias: float) -> Reading:
    """The regression, read along the vector that its direction was scaled to."""
    vector_D = vector_D.double()
    return Reading(float(weight_D @ vector_D / (vector_D @ vector_D)), bias)


def auc(positive_N: Tensor, negative_N: Tensor) -> float:
    """Share of (positive, negative) couples in the right order, ties half: 0.5 says nothing."""
    above = (positive_N[:, None] > negative_N[None]).double() + 0.5 * (positive_N[:, None] == negative_N[None]).double()
    return float(above.mean())


def threshold_of(negative_N: Tensor, rate: float) -> float:
    """The lowest of the negatives' values that at most `rate` of them are above."""
    return float(negative_N.sort(descending=True).values[min(int(rate * len(negative_N)), len(negative_N) - 1)])


def judge(probe: Probe, positive_ND: Tensor, negative_ND: Tensor, rate: float, held_out: bool) -> Probe:
    """The probe with its threshold and, of texts that were held out, how well it does."""
    positive_N, negative_N = probe.logits(positive_ND), probe.logits(negative_ND)
    threshold = threshold_of(negative_N, rate)
    if not held_out:
        return replace(probe, reading=replace(probe.reading, threshold=threshold))
    found = replace(
        probe.reading,
        threshold=threshold,
        auc=auc(positive_N, negative_N),
        accuracy=float(torch.cat([positive_N > 0, negative_N <= 0]).double().mean()),
        false_positives=float((negative_N > threshold).double().mean()),
        true_positives=float((positive_N > threshold).double().mean()),
    )
    return replace(probe, reading=found)


def notes_of(probes: list[Probe]) -> dict[str, dict[str, float | None]]:
    """The metadata `probe` of a file: layer -> its numbers."""
    return {str(probe.at.layers[0]): asdict(probe.reading) for probe in probes}


def read_probe(path: Path, layer: int | None, who: str) -> Probe:
    """The probe of a file at a layer, or at the only one that it has."""
    tensors, notes = read_tensors(path, f"{who}.probe")
    if "probe" not in notes:
        raise DataError(
            f"{who}.probe: {path} is a vector without bias and threshold; make it with steerl extract --extract.method probe"
        )
    with reading(f"{who}.probe: {path} has damaged metadata (", "); make it again"):
        readings = {int(number): Reading(**numbers) for number, numbers in json.loads(notes["probe"]).items()}
        at = At(component=notes["component"], stack=notes["stack"])
    held = ", ".join(f"{n}" + ("" if r.auc is None else f" (AUC {r.auc:.3f})") for n, r in sorted(readings.items()))
    if layer is None and len(readings) > 1:
        raise DataError(f"{who}.layer: missing; {path} has probes of layers {held}; choose one")
    layer = next(iter(readings)) if layer is None else layer
    if layer not in readings:
        raise DataError(f"{who}.layer: {layer}, but {path} has probes of layers {held}; choose one of them")
    (direction_D,) = per_layer(tensors, [layer], [None], f"{who}.probe", path)
    return Probe(direction_D, readings[layer], replace(at, layers=(layer,)), notes["position"])


# -- reading ---------------------------------------------------------------------------------------------------------------


def place_of(policy: Policy, at: At, width: int | None, where: str) -> Point:
    """Where a model is read: one point of the decoder, as wide as what reads it."""
    if at.stack != "decoder":
        raise UserError(f"{where}: made at the {at.stack}, which reads no action; make it with --extract.stack decoder")
    try:
        (point,) = locate(policy.model, at)
    except UserError as problem:
        raise UserError(*(f"{where}: {line}" for line in problem.lines)) from problem
    if width is not None and point.width not in (None, width):
        raise UserError(f"{where}: {width} wide, but the model's activation at layer {point.layer} is {point.width} wide")
    return point


class _Read(Exception):
    """What was wanted of a pass is there: the layers above and the head need not run."""


def hidden_states(policy: Policy, rollout: Rollout, point: Point, batch_size: int, who: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, hidden_BRD) of some rows at a time, float32: the activation at each response token, itself read. Nothing steers
    these passes, whatever is active, and each row is as if it were alone."""
    _check_rows(policy, rollout, who)
    hooks.install(point.module, point.io)
    # One token more, which is never read: passes leave out the last.
    longer = replace(
        rollout.pad_to(rollout.prompt_width, rollout.response_width + 1), lengths_B=rollout.lengths_B + 1, kept=None
    )
    padded = policy.capabilities.padding
    for index in row_groups(policy, longer, padded, batch_size):
        part = longer.select(index).trim().to(policy.device)
        hidden_BRD = _one_pass(policy, part if padded else narrowed(part), point)
        yield index, hidden_BRD[:, 1:]


def _check_rows(policy: Policy, rollout: Rollout, who: str) -> None:
    if policy.is_seq2seq != rollout.is_encoder_decoder:
        kinds = ("a decoder alone", "an encoder-decoder")
        raise UserError(f"{who}: the model is {kinds[policy.is_seq2seq]}, the rows are of {kinds[rollout.is_encoder_decoder]}")
    lengths_B = rollout.sequences_mask_BS.sum(1)
    limit = policy.decoder_context if policy.is_seq2seq else policy.token_budget
    if limit is not None and len(over := (lengths_B > limit).nonzero()):
        row = int(over[0])
        found = f"{row_name(rollout, row)} has {int(lengths_B[row])} tokens, and the model reads {limit}"
        raise UserError(f"{who}: {found}; use a model of a longer context")


def _one_pass(policy: Policy, rollout: Rollout, point: Point) -> Tensor:
    first_B = first_predicting(rollout) if may_begin_at_first(policy, want_logprobs=False) else None
    given = forward_inputs(policy, rollout, from_first=first_B is not None)
    shape = given["decoder_input_ids" if policy.is_seq2seq else "input_ids"].shape
    read: list[Tensor] = []

    def edit(_: Frame, hidden: Tensor) -> Tensor:
        read.append(hidden.detach().reshape(*shape, -1))
        raise _Read

    frame = Frame(None)
    frame.add(point.module, point.io, edit)
    with torch.no_grad(), no_dropout(policy.core), hooks.entered(frame), contextlib.suppress(_Read):
        policy.model(**given)
    return predicting(read[0], first_B, rollout.response_width).float()
