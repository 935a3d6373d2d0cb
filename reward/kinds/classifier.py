"""A sequence- or token-classification model of any architecture, ready to score rows of any length in batches.

    ids of rows --by length--> right-padded batches --model--> logits per row (or per token) in the order of the rows

Which position counts is not left to the model: transformers looks for the last token that is not the pad id, so a
response that ends with it (pad equal to eos) would be read one token early, and a model without a pad id takes no batch.
Decoders score every position with their head; what the head gave at the last real token is taken. Encoders pool by
themselves. How a model takes padding is seen on the model, with a few short rows, when it is loaded:

    no eos       refused? it pools at the last eos (T5, Bart): rows end with one, batches hold rows with equally many
    last         logits = head at the last token? then the position is ours to choose
    padded       a padded row scores as alone? if not, only rows of one length share a batch
    company      is it the same beside a row that ends the context? if not, rows on both sides of a length are kept apart
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerl.reward.kinds.model_inputs import ModelInputs
from steerl.rollout.common.errors import UserError
from steerl.rollout.model import adapters, capabilities, compat
from steerl.rollout.model.auto_classes import NoHead, head_of, load_config, load_head
from steerl.rollout.model.settings import Hub

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Classifier:
    """The model, and what was seen of its ways."""

    def __init__(self, model: PreTrainedModel, where: str, batch_size: int):
        self.model, self.where, self.batch_size = model, where, batch_size
        self.core = model.get_base_model() if hasattr(model, "peft_config") else model
        self.config = self.core.config
        self.labels = int(self.config.num_labels)
        self.takes = set(inspect.signature(self.core.forward).parameters)
        text = self.config.get_text_config()
        self.eos_id: int | None = _single(text.eos_token_id)
        self.pad_id = pad = _single(text.pad_token_id)
        if pad is None:
            text.pad_token_id = 0  # without one transformers refuses batches; what it would do with it is not used
        self.fill_id = pad if pad is not None else 0
        self.is_per_token = "ForTokenClassification" in type(self.core).__name__
        self.needs_eos = self.pads = False
        self.at_last = self.is_per_token
        self.pads = True
        self.boundary: int | None = None
        """Rows of more tokens than this are scored otherwise, and so is what shares their batch."""
        self._observe()

    @property
    def device(self) -> torch.device:
        return next(self.core.parameters()).device

    @property
    def embedding_size(self) -> int:
        return int(self.core.get_input_embeddings().weight.shape[0])

    @property
    def context(self) -> int | None:
        """Most tokens that the model has positions for."""
        for name, module in self.core.named_modules():
            if (
                name.endswith("position_embeddings")
                and isinstance(module, torch.nn.Embedding)
                and module.padding_idx is not None
            ):
                return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts positions from after its pad id
        text = self.config.get_text_config()
        for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
            limit = getattr(text, name, None)
            if isinstance(limit, int) and limit > 0 and text.model_type not in ("t5", "mt5", "umt5", "bloom"):
                return limit
        return None

    # -- scoring -------------------------------------------------------------------------------------------------

    def per_row(self, rows: ModelInputs, before_pads: bool = False) -> Tensor:
        """(B, labels) float32: each row's logits, at its last real token where the model scores every position.

        `before_pads`: at the last token that is not the pad id, which is where transformers looks.
        """
        if self.needs_eos and self.eos_id is not None:
            rows = _with_eos(rows, self.eos_id)
        found = torch.zeros(len(rows.ids), self.labels)
        for index in self._batches(rows):
            logits_BL, logits_BSL = self._forward(rows, index)
            if self.at_last and logits_BSL is not None:
                last_B = torch.tensor([self._last(rows.ids[i], before_pads) for i in index], device=logits_BSL.device)
                logits_BL = logits_BSL[torch.arange(len(index), device=logits_BSL.device), last_B]
            found[index] = logits_BL.float().cpu()
        return found

    def _last(self, ids: Sequence[int], before_pads: bool) -> int:
        last = len(ids) - 1
        while before_pads and last > 0 and ids[last] == self.pad_id:
            last -= 1
        return last

    def per_token(self, rows: ModelInputs) -> list[Tensor]:
        """(tokens of the row, labels) float32 for every row."""
        found: list[Any] = [None] * len(rows.ids)
        for index in self._batches(rows):
            logits_BSL, _ = self._forward(rows, index)
            for row, logits_SL in zip(index, logits_BSL.float().cpu(), strict=True):
                found[row] = logits_SL[: len(rows.ids[row])]
        return found

    def _batches(self, rows: ModelInputs) -> Iterator[list[int]]:
        """Rows of like length together, longest first: a batch that does not fit memory shows at once."""

        def kind(index: int) -> tuple[int, ...]:
            ids = rows.ids[index]
            is_long = self.boundary is not None and len(ids) > self.boundary
            ends = ids.count(self.eos_id) if self.needs_eos else 0  # type: ignore[arg-type]
            return (ends, int(is_long) if self.pads else len(ids))

        order = sorted(range(len(rows.ids)), key=lambda i: (kind(i), -len(rows.ids[i]), i))
        batch: list[int] = []
        for index in order:
            if batch and (len(batch) == self.batch_size or kind(batch[0]) != kind(index)):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _forward(self, rows: ModelInputs, index: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(the model's own logits, what its head gave at every position where it did)."""
        width = max(len(rows.ids[i]) for i in index)
        fill = self.fill_id if not (self.needs_eos and self.fill_id == self.eos_id) else int(self.fill_id == 0)
        ids_BS = torch.tensor([rows.ids[i] + [fill] * (width - len(rows.ids[i])) for i in index], device=self.device)
        mask_BS = torch.tensor([[1] * len(rows.ids[i]) + [0] * (width - len(rows.ids[i])) for i in index], device=self.device)
        extra: dict[str, object] = {"use_cache": False} if "use_cache" in self.takes else {}
        if "attention_mask" in self.takes:
            extra["attention_mask"] = mask_BS
        if rows.types is not None and "token_type_ids" in self.takes and getattr(self.config, "type_vocab_size", 0) > 1:
            padded = [rows.types[i] + [0] * (width - len(rows.types[i])) for i in index]
            extra["token_type_ids"] = torch.tensor(padded, device=self.device)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False), self._watched() as seen:
            logits = self.model(input_ids=ids_BS, **extra).logits
        fitting = [s for s in seen if s.shape == (len(index), width, self.labels)]
        return logits, fitting[-1] if fitting else None

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """What the modules outside the trunk give, the outermost last: the score head is among them."""
        seen: list[Tensor] = []
        trunk = getattr(self.core, self.core.base_model_prefix, None)
        within = set(trunk.modules()) if trunk is not None else set()

        def keep(module: object, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and output.dim() == 3:
                seen.append(output)

        modules = [m for m in self.core.modules() if m is not self.core and m not in within]
        handles = [module.register_forward_hook(keep) for module in modules]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    # -- seeing how the model takes padding -------------------------------------------------------------------------

    def _observe(self) -> None:
        special = {self.fill_id, self.eos_id, _single(self.config.get_text_config().bos_token_id)}
        plain = [i for i in range(min(self.embedding_size, 512)) if i not in special] or [0]
        width = min(9, self.context or 9)
        long = [plain[(7 * k + 3) % len(plain)] for k in range(width)]
        short = [plain[(5 * k + 1) % len(plain)] for k in range(max(width // 3, 1))]
        try:
            self._forward(ModelInputs([long]), [0])
        except (ValueError, RuntimeError, IndexError):
            if self.eos_id is None:
                raise
            self.needs_eos = True  # or it fails with an eos, too: below, with its own words
            long, short = [*long[:-1], self.eos_id], [*short[: max(len(short) - 1, 0)], self.eos_id]
        logits, every = self._forward(ModelInputs([long]), [0])
        if not self.is_per_token:
            self.at_last = every is not None and bool(torch.equal(every[:, -1], logits))
        rows = ModelInputs([long, short])
        together = self.per_token(rows)[1] if self.is_per_token else self.per_row(rows)[1]
        alone = self.per_token(ModelInputs([short]))[0] if self.is_per_token else self.per_row(ModelInputs([short]))[0]
        slack = 1e-4 if next(self.core.parameters()).dtype == torch.float32 else 5e-2
        if "position_ids" in self.takes and "attention_mask" in self.takes:
            row = torch.tensor([[plain[(7 * k + 3) % len(plain)] for k in range(capabilities.SPREAD)]] * 2, device=self.device)

            def company(position_2T: Tensor) -> Tensor:
                with torch.no_grad():
                    states = self.core.base_model(row, attention_mask=torch.ones_like(row), position_ids=position_2T)[0]
                return states[0]  # type: ignore[no-any-return]

            config = self.config.get_text_config()
            self.boundary = capabilities.boundary(company, config, self.context, 0, self.device)
        if len(long) > len(short) and not torch.allclose(together, alone, rtol=slack, atol=slack):
            self.pads = False
            logger.info(
                "%s: %s scores padded rows otherwise; rows of one length are batched", self.where, type(self.core).__name__
            )


def load_classifier(
    path: str,
    adapter: str,
    head: str,
    where: str,
    *,
    dtype: str,
    attn: str | None,
    fresh: bool,
    device: torch.device,
    batch_size: int,
    hub: Hub,
) -> Classifier:
    """The model of `path` with its adapter, in eval mode and without gradients."""
    # Allowed to start anew is only a head that is not there: a reward model's own is always read.
    fresh = fresh and head_of(load_config(path, f"{where}.path", hub)) != head
    settings: dict[str, Any] = {}
    head_in_adapter = _head_labels(adapter) if adapter else None
    if head_in_adapter is not None:
        settings["num_labels"] = head_in_adapter
    elif fresh:
        settings["num_labels"] = 1
    with _whole_weights():
        try:
            model: PreTrainedModel = load_head(
                path, "reward", head, dtype=dtype, attn=attn, fresh=fresh or head_in_adapter is not None,
                field=f"{where}.path", hub=hub, **settings,
            )  # fmt: skip
        except NoHead as problem:
            if fresh:  # it is the trunk that lacks weights
                raise
            raise UserError(f"{problem}, or set allow_new_head: true") from problem
        if adapter:
            model = adapters.load(model, adapter, field=f"{where}.path")
    model = model.to(device).eval().requires_grad_(False)
    return Classifier(model, where, batch_size)


@contextlib.contextmanager
def _whole_weights() -> Iterator[None]:
    """A reward model stays whole on every rank, whatever becomes of the policy.

    Under ZeRO-3 transformers cuts every model that it loads into shards; under FSDP it may load weights on the first rank
    alone, and leaves the others to be filled by a wrapping that a reward model never gets.
    """
    from transformers.integrations import deepspeed

    sharded = compat.active_deepspeed_config()
    efficient = os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    if sharded is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharded is not None:
            deepspeed.set_hf_deepspeed_config(sharded)
        if efficient is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = efficient


def _head_labels(adapter: str) -> int | None:
    """Labels of the head that is saved with the adapter; None where the adapter has no head of its own."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
    from peft.utils.save_and_load import load_peft_weights

    added = tuple(prefix for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values() if prefix)
    weights = load_peft_weights(adapter, device="cpu").items()
    whole = [w for name, w in weights if w.dim() == 2 and not any(prefix in name for prefix in added)]
    return min((int(w.shape[0]) for w in whole), default=None)


def _with_eos(rows: ModelInputs, eos_id: int) -> ModelInputs:
    ids = [row if row[-1] == eos_id else [*row, eos_id] for row in rows.ids]
    return ModelInputs(ids, None, rows.responses)


def _single(value: Any) -> int | None:
    return (value[0] if value else None) if isinstance(value, list | tuple) else value
