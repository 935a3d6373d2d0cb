"""The model of a supervised stage: loaded with its adapter, and left behind as folders that load by themselves.

base ── (+ model.peft, or the adapter of model.adapter / an adapter's folder) ── trained ──┬─ RUN/adapter
                                                                                           └─ RUN/model (merged)
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerl.rollout.common.errors import CheckpointError
from steerl.rollout.common.run_folder import written_aside
from steerl.rollout.model import adapters, auto_classes, virtual_tokens
from steerl.rollout.model.auto_classes import save
from steerl.rollout.model.language_model import unwrap
from steerl.rollout.model.policy import ids_of
from steerl.rollout.model.settings import VIRTUAL_KINDS, ModelSettings, is_adapter_folder
from steerl.training.checks import float16_problems, quantization_problems

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_base(settings: ModelSettings, role: str, head: str = "auto", **loading: Any) -> PreTrainedModel:
    """The model of `settings` without any adapter, and in its own numbers where nothing else is asked for: adapters are merged
    into those."""
    path, _, hub = settings.base()
    attn = None if settings.attn in ("", "auto") else settings.attn
    # Weights that learn are float32 unless asked otherwise: a bfloat16 step of 1e-4 is mostly rounded away.
    in_few_bits = loading.get("quantization", "none") != "none"  # beside which an adapter learns, in float32
    dtype = "float32" if settings.dtype == "auto" and not in_few_bits else settings.dtype
    return auto_classes.load_head(path, role, head, dtype=dtype, attn=attn, hub=hub, **loading)


def load_trainable(settings: ModelSettings, role: str, head: str = "auto", **loading: object) -> PreTrainedModel:
    """The model of `settings` for a stage; its adapter, or a new one of model.peft, is then all that learns."""
    adapter = settings.path if is_adapter_folder(settings.path) else settings.adapter
    if adapter and settings.peft:
        raise CheckpointError(
            "model.peft: the model has an adapter already, which is trained further; leave one of the two out"
        )
    model = load_base(settings, role, head, quantization=settings.quantization, **loading)
    if adapter:
        model = adapters.load(model, adapter, trainable=True)
    if settings.peft:
        model = adapters.add(model, settings.hub.noted(settings.peft))
    if problems := [*float16_problems(model), *quantization_problems(model)]:
        raise CheckpointError(*problems)
    return model


def context_of(model: PreTrainedModel) -> int | None:
    """Most tokens of a row; None where nothing limits it."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit - virtual_tokens.count(model) if isinstance(limit, int) and limit > 0 else None


def stop_at(model: PreTrainedModel, token: int | None) -> None:
    """Let generation end at `token`, too, beside what ends it already."""
    generation = unwrap(model).generation_config
    ends = ids_of(generation.eos_token_id)
    if token is not None and token not in ends:
        generation.eos_token_id = [*ends, token] if ends else token


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, or model.tokenizer."""
    base, adapter, hub = settings.base()
    own = adapter and (Path(adapter) / "tokenizer_config.json").is_file() and adapter == settings.path
    path = settings.tokenizer or (adapter if own else base)
    field = "model.tokenizer" if settings.tokenizer else "model.path"
    return auto_classes.load_tokenizer(path, field, hub if path == base else hub.code)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    base: Callable[[], PreTrainedModel],
    folder: Path,
    state: dict[str, Any],
) -> None:
    """RUN/model, merged where there is an adapter that can be; RUN/adapter; links in RUN to the model's files."""

    def write(target: Path, save_into: Callable[[Path], object]) -> None:
        if target.exists():
            shutil.rmtree(target)
        with written_aside(target) as aside:
            aside.mkdir()
            save_into(aside)
            tokenizer.save_pretrained(aside)

    if hasattr(model, "peft_config"):
        write(folder / "adapter", lambda aside: adapters.save(model, aside, state))
        if model.active_peft_config.peft_type.value in VIRTUAL_KINDS:
            write(folder / "model", lambda aside: adapters.save(model, aside, state))
        else:
            merged = adapters.merge(adapters.load(base(), folder / "adapter"))
            write(folder / "model", lambda aside: save(merged, aside))
    else:
        write(folder / "model", lambda aside: save(model, aside, state))
    with contextlib.suppress(OSError):  # a file system without links: RUN/model is there all the same
        for file in (folder / "model").iterdir():
            link = folder / file.name
            if link.is_symlink() or not link.exists():
                link.unlink(missing_ok=True)
                link.symlink_to(Path("model") / file.name)
