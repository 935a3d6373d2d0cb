"""The one table of Auto classes (six heads), which role may use which, and the one loader of a model folder.

    path ── config ── head (asked for, or read off the checkpoint's architecture) ── role allows it? ── weights ── complete?

A head that a role cannot use is refused by name, and so is a checkpoint that lacks weights which the head needs (transformers
would fill them with random numbers and only warn), or has weights of the trunk that the configuration has no place for.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from steerl.rollout.common.errors import CheckpointError, UserError, reading
from steerl.rollout.model import compat, unread
from steerl.rollout.model.settings import Hub, section

Head = Literal["causal", "seq2seq", "masked", "sequence_classification", "token_classification", "question_answering"]

# In the order in which an architecture is looked up: Bart's conditional generation stands in the masked table, too.
HEADS: dict[str, Any] = {
    "causal": transformers.AutoModelForCausalLM,
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "masked": transformers.AutoModelForMaskedLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
    "token_classification": transformers.AutoModelForTokenClassification,
    "question_answering": transformers.AutoModelForQuestionAnswering,
}
ROLES: dict[str, tuple[str, ...]] = {
    "policy": ("causal", "seq2seq"),
    "value": ("causal", "seq2seq", "sequence_classification", "token_classification"),
    "reward": ("sequence_classification", "token_classification"),
}
_SAMPLING: dict[str, object] = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "top_h": None, "typical_p": 1.0}
_SAMPLING |= {"epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
_BEAMS: dict[str, object] = {"early_stopping": False, "length_penalty": 1.0}
"""Fields of a generation config that only sampling, or only several beams, read; and the values that stand for unset."""
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def _own_code_told(path: str, field: str) -> Iterator[None]:
    try:
        yield
    except UserError as problem:
        if "trust_remote_code" not in str(problem.__cause__):
            raise
        raise CheckpointError(
            f"{field}: {path!r} needs Python code that lies beside it, which is not run unless {section(field)}."
            "trust_remote_code is true; read it first, for it can do whatever you can"
        ) from problem


def load_config(path: str, field: str = "model.path", hub: Hub | None = None) -> PretrainedConfig:
    """The configuration of a model folder or hub name. It names code beside the weights only where that is run."""
    hub = hub or Hub()
    given = hub.arguments(path, field)
    what = "holds no model that transformers can read"
    if not Path(path).exists():
        what = "is neither a folder nor a model of the hub that can be reached"
    remedy = "); name a folder with a config.json or a model of the hub"
    with _own_code_told(path, field), reading(f"{field}: {path!r} {what} (", remedy):
        config = transformers.AutoConfig.from_pretrained(path, **given)
        _check_sizes(config, f"{field}: {path!r}")
    if not hub.trust_remote_code:
        vars(config).pop("auto_map", None)
    return config


def load_tokenizer(path: str, field: str = "model.path", hub: Hub | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name."""
    given = (hub or Hub()).arguments(path, field)
    with _own_code_told(path, field), reading(f"{field}: the tokenizer of {path} cannot be loaded: "):
        return transformers.AutoTokenizer.from_pretrained(path, **given)


def _check_sizes(config: PretrainedConfig, who: str) -> None:
    """The counts that a model is built by. Of layers there may be none in silence, or more than any machine can build."""
    for part in (config, config.get_text_config(decoder=True)):
        for name in (
            "num_hidden_layers",
            "encoder_layers",
            "decoder_layers",
            "num_decoder_layers",
            "hidden_size",
            "vocab_size",
        ):
            value, most = getattr(part, name, None), 1 << (12 if "layers" in name else 31)
            if isinstance(value, int) and not 1 <= value <= most:
                raise CheckpointError(f"{who} has a config.json with {name} {value}, but it must be 1 to {most}; fix it")
        architectures = part.architectures
        if architectures is not None and not (
            isinstance(architectures, list) and all(isinstance(a, str) for a in architectures)
        ):
            raise CheckpointError(
                f"{who} has a config.json with architectures {architectures!r:.60}; give a list of class names"
            )


def head_of(config: PretrainedConfig) -> str | None:
    """The head that the checkpoint was saved with; None for a bare trunk or a class of none of the six tables."""
    for architecture in getattr(config, "architectures", None) or ():
        for head in HEADS:
            if _class_of(head, config) == architecture:
                return head
    return None


def _class_of(head: str, config: PretrainedConfig) -> str | None:
    """The class that has this head for a config: that of the code beside it, or transformers' own."""
    named = (getattr(config, "auto_map", None) or {}).get(HEADS[head].__name__)
    return str(named).rpartition(".")[2] if named else compat.class_name(HEADS[head], config.model_type)


class NoHead(CheckpointError):
    """The checkpoint lacks weights that the head needs."""


def heads_for(config: PretrainedConfig) -> list[str]:
    """The heads that this architecture has."""
    return [head for head in HEADS if _class_of(head, config)]


def choose_head(
    config: PretrainedConfig, role: str, head: str = "auto", *, fresh: bool = False, field: str = "model.path", path: str = ""
) -> str:
    """The head to load for `role`: the one asked for, or with `auto` the one that the checkpoint was saved with."""
    allowed = ROLES[role]
    saved = head_of(config)
    name = f"{path or config.name_or_path!s} is a {config.model_type} model"
    takes = f"the {role} takes {' or '.join(allowed)}"
    if head == "auto":
        generative = "seq2seq" if config.is_encoder_decoder else "causal"
        fitting = generative if generative in allowed else allowed[0]
        head = fitting if saved is None or (fresh and saved not in allowed) else saved
    if head not in HEADS:
        raise CheckpointError(f"{field}: unknown head {head!r}; {takes}")
    if head not in allowed:
        raise CheckpointError(f"{field}: {name} with a {head} head, but {takes}")
    if not _class_of(head, config):
        have = ", ".join(heads_for(config)) or "none"
        raise CheckpointError(f"{field}: {name}, which has no {head} head (it has: {have}); {takes}")
    if role == "policy" and saved not in (head, None):
        raise CheckpointError(f"{field}: {name} saved with a {saved} head, so it cannot be loaded as {head}; {takes}")
    return head


BITS: dict[str, dict[str, object]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}
"""How bitsandbytes keeps the matrices of a base model."""


def quantized(kind: str, dtype: object, field: str) -> dict[str, object]:
    """What from_pretrained is given to load a model in few bits; on this process's GPU, where they are made."""
    why = None
    if not torch.cuda.is_available():
        why = "its kernels are a GPU's, and torch sees none here"
    elif importlib.util.find_spec("bitsandbytes") is None:
        why = "it needs bitsandbytes, which is not installed (pip install 'steerl[bitsandbytes]')"
    if why is not None:
        raise CheckpointError(f"{section(field)}.quantization: {kind}, but {why}; leave it out")
    compute = dtype if dtype in ("float32", "float16") else "bfloat16"
    four: dict[str, object] = {"bnb_4bit_compute_dtype": compute} if kind == "nf4" else {}
    config = transformers.BitsAndBytesConfig(**BITS[kind], **four)
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether it was loaded in few bits, by a setting or because its checkpoint is."""
    return bool(getattr(model, "is_quantized", False))


def load_head(
    path: str,
    role: str,
    head: str = "auto",
    *,
    dtype: str | torch.dtype | None = None,
    attn: str | None = None,
    fresh: bool = False,
    field: str = "model.path",
    read: bool = True,
    hub: Hub | None = None,
    quantization: str = "none",
    **settings: object,
) -> PreTrainedModel:
    """Load `path` with the head that `role` uses, in eval mode. `fresh` lets the head start from new weights, never the trunk.

    `settings` change the configuration (`num_labels=1`). The dtype is the checkpoint's unless given. Without `read` the weights
    of a safetensors checkpoint stay in their files (unread.py), but for those that are quantized while they are loaded.
    """
    hub = hub or Hub()
    config = load_config(path, field, hub)
    head = choose_head(config, role, head, fresh=fresh, field=field, path=path)
    extra: dict[str, object] = {"attn_implementation": attn} if attn else {}
    extra |= {**hub.arguments(path, field), "output_loading_info": True, "ignore_mismatched_sizes": True}
    if quantization != "none":
        extra |= quantized(quantization, dtype, field)
    in_few_bits = quantization != "none" or hasattr(config, "quantization_config")
    opened = contextlib.nullcontext() if read or in_few_bits else compat.loading_from(unread.File)
    # transformers' own table of missing weights: here a missing one is a UserError, or is meant to be new.
    with reading(f"{field}: {path!r} cannot be loaded as {head}: "), compat.without_message("LOAD REPORT"), opened:
        model, info = HEADS[head].from_pretrained(path, dtype=dtype or "auto", **extra, **settings)
    _check_complete(model, info, head, path, field, fresh)
    mend_generation(model)
    _check_all_used(model, info["unexpected_keys"], path, field)
    return model.eval()


def save(model: PreTrainedModel, folder: str | Path, state: Mapping[str, torch.Tensor] | None = None) -> None:
    """The whole model as from_pretrained loads it. `state` stands in for a sharded model's own."""
    with savable(model):
        model.save_pretrained(folder, **({"state_dict": state} if state else {}))


def describe(model: PreTrainedModel, folder: str | Path) -> None:
    """What from_pretrained reads beside the weights."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # it would count no weights
    try:
        with savable(model):
            model.save_pretrained(folder, state_dict={})
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


@contextlib.contextmanager
def savable(model: PreTrainedModel) -> Iterator[None]:
    """Without what has no effect in the model's generation config: transformers loads that, and may refuse to save it."""
    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = copy.deepcopy(own)
        mend_generation(model, _SAMPLING | (_BEAMS if (own.num_beams or 1) == 1 else {}))
    try:
        yield
    finally:
        if own is not None:
            model.generation_config = own


def mend_generation(model: PreTrainedModel, unused: Mapping[str, object] = _SAMPLING) -> None:
    """Leave out of the generation config what has no effect while do_sample is not set, such as Llama-2-chat's temperature."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    names = [name for name in unused if name in _BEAMS or not config.do_sample]
    dropped = [name for name in names if getattr(config, name, None) not in (None, unused[name])]
    if dropped:
        values = ", ".join(f"{name} {getattr(config, name)}" for name in dropped)
        _logger.warning("%s: its generation config has %s without effect; left out", model.name_or_path or "the model", values)
    for name in dropped:
        setattr(config, name, None)


def _check_complete(model: PreTrainedModel, info: dict[str, Any], head: str, path: str, field: str, fresh: bool) -> None:
    shapes = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    lacking = {"no weights for": set(info["missing_keys"]) - shapes, "weights of another shape for": shapes}
    for what, names in lacking.items():
        # A classifier's pooler belongs to its head: checkpoints of language models do not have it.
        trunk = f"{model.base_model_prefix}."
        bad = sorted(key for key in names if not fresh or (key.startswith(trunk) and ".pooler." not in f".{key}"))
        if bad:
            shown = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
            kind = NoHead if what == "no weights for" else UserError
            raise kind(
                f"{field}: {path!r} was not saved with a {head} head: it has {what} {shown}, "
                "which would start as random numbers; name a checkpoint of that kind"
            )


def _check_all_used(model: PreTrainedModel, unexpected: set[str], path: str, field: str) -> None:
    """Weights of layers that the configuration does not have would be left out, and the model would be another one.

    A head of another task and a pooler are left out rightly: the model has no module that they would be part of. So are the
    constants that old checkpoints hold (masks under the names attn.bias and attn.masked_bias, frequencies)."""
    trunk = model.base_model
    weights = {*unexpected, *(name for name, _ in model.named_parameters())}
    left_out = []
    for key in sorted(unexpected):
        name, _, rest = key.removeprefix(f"{model.base_model_prefix}.").partition(".")
        owner, _, kind = key.rpartition(".")
        is_weight = kind == "weight" or (
            kind == "bias" and weights & {f"{owner}.weight", f"{model.base_model_prefix}.{owner}.weight"}
        )
        if rest and is_weight and name != "pooler" and isinstance(getattr(trunk, name, None), torch.nn.Module):
            left_out.append(key)
    if left_out:
        shown = ", ".join(left_out[:3]) + (f" and {len(left_out) - 3} more" if len(left_out) > 3 else "")
        raise CheckpointError(
            f"{field}: {path!r} has weights that its config.json has no place for: {shown}; fix config.json "
            "(num_hidden_layers, say), or save the smaller model with save_pretrained"
        )
