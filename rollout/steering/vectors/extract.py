"""Making vectors: activations of contrastive texts at chosen layers and positions, and the direction between them.

    read_pairs(path)  ->  [Pair(prompt, positive, negative), ...]
    activations(...)  ->  (texts, points, D)      one forward pass per batch, each text as if it were alone
    directions(...)   ->  a unit-free vector per layer: mean_diff · pca (of differences) · probe (logistic regression)

Pairs are JSON lines with `positive` and `negative` (text), and optionally `prompt`, which both follow. Positions: the last
token, or the mean over the tokens of positive or negative (all tokens where there is no prompt). On encoder-decoders the
prompt goes into the encoder and the text into the decoder; without a prompt the text goes into the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError, reading
from steerl.rollout.model import hooks
from steerl.rollout.model.hooks import Frame
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import Speller
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.vectors.probes import fit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

METHODS = ("mean_diff", "pca", "probe")


@dataclass(frozen=True)
class Pair:
    positive: str
    negative: str
    prompt: str = ""


def read_pairs(path: Path, who: str = "pairs") -> list[Pair]:
    """The pairs of a JSON-lines file; a bad line is named by its number."""
    if not path.is_file():
        raise UserError(f"{who}: {path} does not exist; give JSON lines with positive and negative")
    pairs: list[Pair] = []
    with reading(f"{who}: {path} cannot be read: ", "; give JSON lines with positive and negative"):
        lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with reading(f"{who}: {path}:{number} is not JSON: "):
            record = json.loads(line)
        texts = [record.get(k) for k in ("positive", "negative")] if isinstance(record, dict) else []
        if not texts or not all(isinstance(t, str) and t for t in texts):
            raise UserError(f"{who}: {path}:{number} needs positive and negative, both text; found {line[:80]!r}")
        prompt = record.get("prompt", "")
        if not isinstance(prompt, str):
            raise UserError(f"{who}: {path}:{number}: prompt must be text, found {prompt!r}")
        pairs.append(Pair(str(texts[0]), str(texts[1]), prompt))
    if not pairs:
        raise UserError(f"{who}: {path} holds no pairs")
    return pairs


# -- activations --------------------------------------------------------------------------------------------------------


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> tuple[list[int], int]:
    """(ids, where the text begins). Prompt and text are encoded apart, as sampling joins them."""
    start = tokenizer(prompt)["input_ids"] if prompt else []
    rest = Speller(tokenizer).ids(start, text) if prompt else tokenizer(text)["input_ids"]
    return [*start, *rest], len(start)


def activations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[tuple[str, str]],
    points: Sequence[Point],
    position: str,
    batch: int = 16,
) -> Tensor:
    """(texts, points, D) float32: what each (prompt, text) gives at each point, at its last token or over its tokens."""
    if tokenizer is None:
        raise UserError("steering: making a vector from texts needs a tokenizer; pass it to Steering, or give a vector file")
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    device = next(model.parameters()).device
    was_training = [module for module in model.modules() if module.training]
    for point in points:
        hooks.install(point.module, point.io)
    passes: list[Tensor] = []
    order: list[int] = []
    model.eval()
    try:
        # Where a model computes otherwise from some length on, it does so for a whole pass: texts on both sides are kept apart.
        capabilities = Policy.of(model, tokenizer).capabilities
        sides = [capabilities.is_long(len(_ids(tokenizer, *text)[0])) for text in texts]
        for side in dict.fromkeys(sides):
            alike = [number for number, own in enumerate(sides) if own == side]
            order += alike
            for at in range(0, len(alike), batch):
                part = [texts[number] for number in alike[at : at + batch]]
                given, mask, keep = (_encoder_decoder if seq2seq else _causal)(model, tokenizer, part, points, device)
                passes.append(_pass(model, given, points, mask, keep, position))
    finally:
        for module in was_training:
            module.training = True
    return torch.cat(passes)[torch.tensor(order).argsort()]


def _causal(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    points: Sequence[Point],
    device: torch.device,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    rows = [_ids(tokenizer, *pair) for pair in texts]
    width = max(len(ids) for ids, _ in rows)
    ids_BS = torch.zeros(len(rows), width, dtype=torch.int64, device=device)
    mask_BS = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    keep_BS = torch.zeros_like(mask_BS)
    for row, (ids, start) in enumerate(rows):  # padded on the right: nothing real looks that way
        ids_BS[row, : len(ids)] = torch.tensor(ids, device=device)
        mask_BS[row, : len(ids)] = True
        keep_BS[row, start : len(ids)] = True
    return {"input_ids": ids_BS, "attention_mask": mask_BS.long()}, mask_BS, keep_BS


def _encoder_decoder(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[tuple[str, str]],
    points: Sequence[Point],
    device: torch.device,
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    on_encoder = points[0].stack == "encoder"
    given, mask_BP, _ = _causal(model, tokenizer, [("", prompt or text) for prompt, text in texts], points, device)
    config: PretrainedConfig = model.config
    start = int(config.decoder_start_token_id or 0)
    rows = [[start, *(tokenizer(text, add_special_tokens=False)["input_ids"] if prompt else [])] for prompt, text in texts]
    width = max(map(len, rows))
    given["decoder_input_ids"] = torch.tensor([row + [start] * (width - len(row)) for row in rows], device=device)
    if on_encoder:
        return given, mask_BP, mask_BP
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask_BS = torch.arange(width, device=device)[None] < lengths[:, None]
    keep_BS = mask_BS.clone()
    keep_BS[:, 0] = lengths == 1
    return given, mask_BS, keep_BS


def _pass(
    model: nn.Module, given: dict[str, Tensor], points: Sequence[Point], mask: Tensor, keep: Tensor, position: str
) -> Tensor:
    read: dict[int, Tensor] = {}
    frame = Frame(None)
    last = mask.long().cumsum(1).argmax(1)
    for number, point in enumerate(points):

        def edit(_: Frame, hidden: Tensor, number: int = number, point: Point = point) -> Tensor:
            part = hidden.reshape(mask.shape[0], mask.shape[1], -1)
            part = part if point.columns is None else part[..., list(point.columns)]
            part = part.detach().float().cpu()
            if position == "last":
                read[number] = part[torch.arange(part.shape[0]), last.cpu()]
            else:
                chosen = keep.cpu()[..., None]
                read[number] = torch.where(chosen, part, torch.zeros_like(part)).sum(1) / chosen.sum(1).clamp_min(1)
            return hidden

        frame.add(point.module, point.io, edit)
    with torch.no_grad(), hooks.entered(frame):
        model(**given)
    return torch.stack([read[number] for number in range(len(points))], dim=1)


# -- directions ---------------------------------------------------------------------------------------------------------


def direction(positive_ND: Tensor, negative_ND: Tensor, method: str) -> Tensor:
    """The direction from negative to positive at one layer."""
    positive, negative = positive_ND.double(), negative_ND.double()
    mean = (positive - negative).mean(0)
    if method == "mean_diff":
        return mean.float()
    if method == "pca":
        # The first axis of the differences about zero; both signs of each difference give the same axes.
        _, sizes, axes = torch.linalg.svd(positive - negative, full_matrices=False)
        axis = axes[0] * torch.where((axes[0] @ mean) < 0, -1.0, 1.0)
        return (axis * sizes[0] / len(positive) ** 0.5).float()
    if method == "probe":
        return along_means(fit(positive, negative)[0], positive, negative)
    raise UserError(f"method: expected one of {', '.join(METHODS)}, found {method!r}")


def along_means(weight_D: Tensor, positive_ND: Tensor, negative_ND: Tensor) -> Tensor:
    """The direction of a regression's weight, scaled to the distance of the means along it."""
    unit_D = weight_D / weight_D.norm().clamp_min(1e-30)
    return (unit_D * ((positive_ND.double().mean(0) - negative_ND.double().mean(0)) @ unit_D)).float()


def contrast(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Sequence[Pair],
    points: Sequence[Point],
    position: str,
) -> tuple[Tensor, Tensor]:
    """(pairs, points, D) twice: what the positive texts give, and the negative ones."""
    positive = activations(model, tokenizer, [(p.prompt, p.positive) for p in pairs], points, position)
    return positive, activations(model, tokenizer, [(p.prompt, p.negative) for p in pairs], points, position)


def directions(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    pairs: Sequence[Pair],
    points: Sequence[Point],
    method: str,
    position: str,
) -> list[Tensor]:
    """One vector per point."""
    positive, negative = contrast(model, tokenizer, pairs, points, position)
    return [direction(positive[:, i], negative[:, i], method) for i in range(len(points))]


def separation(vector: Tensor, positive_ND: Tensor, negative_ND: Tensor) -> float:
    """Share of pairs whose positive lies further along the vector than its negative: 0.5 = the vector says nothing."""
    return float(((positive_ND.float() @ vector) > (negative_ND.float() @ vector)).float().mean())


def mean_difference_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, path: Path, points: Sequence[Point], who: str
) -> list[Tensor]:
    """What `vector: {mean_diff: pairs.jsonl}` in a spec stands for."""
    return directions(model, tokenizer, read_pairs(path, who), points, "mean_diff", "mean")
