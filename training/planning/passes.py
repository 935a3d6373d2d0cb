"""What one pass through a model costs in bytes and operations, found out without its weights.

    config.json ── model on the meta device (counts) ── the same at two depths as fake tensors ── a pass of it: what stays for
                                                                 the backward pass, the most at once, operations

The model's own forward runs, with shapes alone, so every architecture, adapter, precision and recomputation that the model
has is in the figures. Everything grows linearly with rows and with layers: a pass with one and with two rows, through two
and through three layers, gives the figures of any number of either. The vocabulary is left out (see plan_memory).
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import adapters, compat
from steerl.rollout.model.auto_classes import HEADS, choose_head, load_config
from steerl.rollout.model.language_model import forward_arguments
from steerl.rollout.model.settings import ModelSettings
from steerl.training.model import value_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WIDTHS = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Bytes of a weight in few bits. nf4 has a scale of a byte for each 64, and one in float32 for 256 of those."""
_DEPTHS = (2, 3)
_ROWS = (1, 2)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class PassCost:
    """Bytes and floating-point operations of one pass of some rows."""

    saved: float
    """Bytes that stand between the forward and the backward pass."""
    peak: float
    """Most bytes at any moment of the pass."""
    operations: float
    """Of the forward pass, and of the backward pass where there is one; counted without autocast only."""


@dataclass(frozen=True, eq=False)
class Blueprint:
    """A model as its config says it is: everything but the numbers in its weights."""

    config: PretrainedConfig
    kind: str
    dtype: torch.dtype
    """Of its weights; adapters are float32."""
    attn: str = "auto"
    peft: tuple[tuple[str, object], ...] = ()
    """The adapter's mapping, as pairs."""
    quantization: str = "none"
    """Of the matrices in its layers that do not learn."""

    @staticmethod
    def of(settings: ModelSettings, field: str = "model.path", like: Blueprint | None = None) -> Blueprint:
        """From a folder with a config.json, or a hub name; no weights are read. A value is of the kind that its policy is."""
        if not settings.path:
            raise UserError(f"{field}: missing; name a folder with a config.json or a hub name, --{field} DIR")
        config = load_config(settings.path, field, settings.hub)
        kind = like.kind if like else choose_head(config, "policy", settings.kind, field=field, path=settings.path)
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
        dtype = DTYPES.get(settings.dtype, stored)
        return Blueprint(config, kind, dtype, settings.attn, _frozen(settings.peft), settings.quantization)

    def with_peft(self, peft: dict[str, object] | None) -> Blueprint:
        return dataclasses.replace(self, peft=_frozen(peft))

    def empty_model(self, depth: int | None = None) -> PreTrainedModel:
        """The model on the meta device, of its own depth or of fewer layers."""
        config = copy.deepcopy(self.config)
        config.name_or_path = ""  # peft compares paths, and warns
        if depth is not None:
            config = _of_depth(config, depth)
        attn = {} if self.attn in ("", "auto") or self.attn.startswith("flash") else {"attn_implementation": self.attn}
        with torch.device("meta"):
            auto: Any = HEADS[self.kind]
            # A config names code of its own only where that is to be run.
            model = auto.from_config(config, dtype=self.dtype, trust_remote_code=hasattr(config, "auto_map"), **attn).eval()
            return adapters.add(model, _thawed(self.peft)) if self.peft else model

    @cached_property
    def key(self) -> str:
        """All of it in words: what was found out about one blueprint holds for its like."""
        return repr((self.config.to_json_string(), self.kind, self.dtype, self.attn, self.peft, self.quantization))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blueprint) and self.key == other.key


@dataclass(frozen=True)
class Counts:
    """Numbers in a model's weights."""

    all: int
    trained: int
    head: int
    """In the output embedding's own weight; 0 where it is the input embedding's."""
    head_trained: int
    trains_head: bool
    """Whether the output embedding learns, its own weight or the input embedding's."""
    tied: bool
    """Whether the two are one weight."""
    largest: int
    """In the largest weight."""
    vocabulary: int
    width: int
    """Of what the output embedding reads."""
    bytes: float
    trained_bytes: float
    value_bytes: float
    """Of the same model without its output embedding: a value's trunk."""
    half_bytes: float
    """Of the weights that autocast casts, as it casts them: two bytes each."""


@lru_cache(maxsize=32)
def count(blueprint: Blueprint) -> Counts:
    """From the model's own parameters, on the meta device."""
    model = blueprint.empty_model()
    core = model.get_base_model() if blueprint.peft else model
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    output, embedding = core.get_output_embeddings(), core.get_input_embeddings()
    weight = getattr(output, "weight", None)
    if weight is None:
        raise UserError(f"model.path: {type(core).__name__} has no output embedding, so it cannot be planned for")
    own = [p for p in output.parameters() if p is not getattr(embedding, "weight", None)]
    few = {id(m.weight) for m in core.modules() if isinstance(m, nn.Linear) and m is not output and not m.weight.requires_grad}

    def size(weights: list[nn.Parameter]) -> float:
        width = _WIDTHS.get(blueprint.quantization, 0.0)
        return float(sum(width * p.numel() if width and id(p) in few else p.nbytes for p in weights))

    matrices = [p for p in {id(p): p for m in model.modules() for p in m.parameters(recurse=False)}.values() if p.dim() > 1]
    return Counts(
        all=sum(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        head=sum(p.numel() for p in own),
        head_trained=sum(p.numel() for p in own if p.requires_grad),
        trains_head=any(p.requires_grad for p in output.parameters()),
        tied=weight is embedding.weight,
        largest=max(p.numel() for p in parameters),
        vocabulary=int(weight.shape[0]),
        width=int(weight.shape[-1]),
        bytes=size(parameters),
        trained_bytes=float(sum(p.nbytes for p in trained)),
        value_bytes=size(parameters) - size(own),
        half_bytes=2.0 * sum(p.numel() for p in matrices if p.requires_grad and p.dtype == torch.float32),
    )


# -- passes ----------------------------------------------------------------------------------------------------------


def training_pass(
    blueprint: Blueprint, rows: int, prompt: int, response: int, *, checkpointing: bool = False, autocast: bool = False
) -> PassCost:
    """Forward and backward of `rows` rows, up to what the output embedding reads."""
    whole = _scaled(blueprint, rows, (prompt, response, "train", autocast))
    if not checkpointing:
        return whole
    # Each layer's input stays; in the backward pass one layer after the other is whole again.
    kept = _scaled(blueprint, rows, (prompt, response, "kept", autocast)).saved
    again = plain_pass(blueprint, rows, prompt, response, autocast=autocast).operations
    layer = whole.saved / layers_of(blueprint.config)
    return PassCost(kept, kept + layer + whole.peak - whole.saved, whole.operations + again)


def plain_pass(blueprint: Blueprint, rows: int, prompt: int, response: int, *, autocast: bool = False) -> PassCost:
    """A forward pass without gradients."""
    return _scaled(blueprint, rows, (prompt, response, "plain", autocast))


def cache_bytes(blueprint: Blueprint, rows: int, prompt: int, response: int) -> float:
    """What decoding keeps of `rows` whole rows: keys, values, states."""
    return _scaled(blueprint, rows, (prompt, response, "cache", False)).saved


@lru_cache(maxsize=4096)
def _scaled(blueprint: Blueprint, rows: int, kind: tuple[object, ...]) -> PassCost:
    """From the four passes that were seen: a + b rows + c layers + d rows x layers."""
    layers = layers_of(blueprint.config)

    def at(depth: int | None) -> PassCost:
        few, more = (_seen(blueprint, kind, depth, count) for count in _ROWS)
        return _line(few, more, rows - _ROWS[0])

    if not _is_uniform(blueprint.config) or layers <= _DEPTHS[1]:
        return at(None)
    return _line(at(_DEPTHS[0]), at(_DEPTHS[1]), layers - _DEPTHS[0])


def _line(first: PassCost, second: PassCost, steps: float) -> PassCost:
    """Through two neighbors, and on."""
    pairs = zip(dataclasses.astuple(first), dataclasses.astuple(second), strict=True)
    return PassCost(*(max(a + (b - a) * steps, 0.0) for a, b in pairs))


@lru_cache(maxsize=256)
def _seen(blueprint: Blueprint, kind: tuple[Any, ...], depth: int | None, rows: int) -> PassCost:
    # Experts' grouped products are for bfloat16 alone where nothing is computed; twice that is float32.
    factor = 2.0 if _has_experts(blueprint.config) and blueprint.dtype == torch.float32 and not kind[3] else 1.0
    planned = dataclasses.replace(blueprint, dtype=torch.bfloat16) if factor == 2.0 else blueprint
    model = planned.empty_model(depth)
    try:
        with compat.fake_tensors():
            cost = _run(model, planned, rows, *kind)
    except compat.fake_tensor_errors() as error:
        raise UserError(
            f"model.path: {type(model).__name__} decides by numbers what it computes, so its passes cannot be planned from its "
            "config; measure one step (memory/peak_mb and memory/gpu_peak_mb of metrics.jsonl)"
        ) from error
    return PassCost(cost.saved * factor, cost.peak * factor, cost.operations)


def _run(
    model: PreTrainedModel, blueprint: Blueprint, rows: int, prompt: int, response: int, what: str, autocast: bool
) -> PassCost:
    from torch.utils.flop_counter import FlopCounterMode

    model.to_empty(device="cpu")
    core = model.get_base_model() if blueprint.peft else model
    _without_vocabulary(core)
    if what == "kept":
        getattr(core, "activation_checkpointing_enable", core.gradient_checkpointing_enable)()
        for module in core.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget)
    given = _inputs(core, blueprint.kind == "seq2seq", rows, prompt, response, cached=what == "cache")
    live = Live([*model.parameters(), *model.buffers(), *(value for value in given.values() if isinstance(value, Tensor))])
    # Operations are the same in every precision; counting them takes as long as all the rest.
    counts = what in ("train", "plain") and not autocast
    counter: Any = FlopCounterMode(display=False, custom_mapping=_attention()) if counts else contextlib.nullcontext()
    with (
        counter,
        live,
        torch.set_grad_enabled(what in ("train", "kept")),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        out = model(**given)
        if what == "cache":
            kept = {  # keys, values, states; not the counters beside them
                compat.storage_key(tensor): tensor.untyped_storage().nbytes()
                for tensor in tensors_in({**out, "logits": None})
                if tensor.is_floating_point()
            }
            return PassCost(float(sum(kept.values())), float(live.peak), 0.0)
        hidden = out.logits
        del out
        saved = live.now
        if what == "train":
            hidden.float().sum().backward()
    return PassCost(float(saved), float(live.peak), float(counter.get_total_flops()) if counts else 0.0)


def _forget(parameter: Tensor) -> None:
    """Gradients are counted by themselves."""
    parameter.grad = None


def _without_vocabulary(core: PreTrainedModel) -> None:
    """No output embedding and an input embedding of few rows: what a vocabulary costs is added by name."""
    value_model.strip(core)
    embedding = core.get_input_embeddings()
    trained = embedding.weight.requires_grad
    for module in core.modules():
        if isinstance(module, nn.Embedding) and module.weight.shape == embedding.weight.shape:
            module.weight, module.padding_idx = nn.Parameter(module.weight.detach()[:8].clone(), trained), None


def _inputs(
    core: PreTrainedModel, is_seq2seq: bool, rows: int, prompt: int, response: int, *, cached: bool
) -> dict[str, object]:
    """Padded rows, as a forward pass in training gets them: the last column predicts nothing."""
    takes = forward_arguments(core)
    width = prompt if is_seq2seq else max(prompt + response - 1, 1)
    ids = torch.zeros(rows, width, dtype=torch.long)
    given: dict[str, object] = {"input_ids": ids}
    if "attention_mask" in takes:
        given["attention_mask"] = torch.ones_like(ids)
    if is_seq2seq:
        given["decoder_input_ids"] = torch.zeros(rows, response, dtype=torch.long)
    if "use_cache" in takes:
        given["use_cache"] = cached
    return given


class Live(compat.TorchDispatchMode):
    """Bytes of the tensors that were made inside the block and are alive: now, and at most."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {compat.storage_key(tensor) for tensor in known}

    def __torch_dispatch__(self, function: Any, types: object, args: Any = (), kwargs: Any = None) -> object:
        out = function(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            storage, key = tensor.untyped_storage(), compat.storage_key(tensor)
            if key not in self.seen:
                self.seen.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def tensors_in(value: object) -> Iterator[Tensor]:
    """The tensors in lists, mappings and objects such as caches."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from tensors_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors_in(inner)
    elif hasattr(value, "__dict__") and "ache" in type(value).__name__ + type(value).__module__.rpartition(".")[2]:
        yield from tensors_in(vars(value))


def _attention() -> dict[object, object]:
    """Operations of the attention kernel that the CPU takes, which torch's counter does not know: half of the square."""

    def forward(query: Any, key: Any, value: Any, *_: object, out_shape: object = None, **__: object) -> int:
        rows, heads, queries, width = query
        return 2 * rows * heads * queries * key[-2] * (width + value[-1]) // 2

    def backward(
        grad: object, query: object, key: object, value: object, *_: object, out_shape: object = None, **__: object
    ) -> int:
        return int(2.5 * forward(query, key, value))

    return dict(zip(compat.cpu_attention_operations(), (forward, backward), strict=True))


# -- configs -----------------------------------------------------------------------------------------------------------


def _is_uniform(config: PretrainedConfig) -> bool:
    """Whether every layer is like every other, so that a few show what all of them cost."""
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or ["same"]
    mixed = any(getattr(text, name, None) for name in ("mlp_only_layers", "first_k_dense_replace", "attn_layer_indices"))
    periodic = hasattr(text, "attn_layer_period") or hasattr(text, "block_types") or hasattr(text, "attention_types")
    return len(set(kinds)) == 1 and not (mixed or periodic or config.is_encoder_decoder)


def layers_of(config: PretrainedConfig) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def _of_depth(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    return config


def _has_experts(config: PretrainedConfig) -> bool:
    text = config.get_text_config(decoder=True)
    return any((getattr(text, name, None) or 0) > 1 for name in _EXPERTS)


def _frozen(peft: dict[str, object] | None) -> tuple[tuple[str, object], ...]:
    return tuple((peft or {}).items())


def _thawed(peft: tuple[tuple[str, object], ...]) -> dict[str, object]:
    return dict(peft)
