"""New weights in the running server: all of them, or a line that says what is missing and no more rows.

    tensors of a file or a broadcast ── vLLM's layerwise reload ── nothing left unfilled? ── heads that are tied packed again

vLLM itself goes on with what it did not get: of a packed weight (qkv, gate_up) it takes one part for the whole, and a layer
that got nothing keeps what it had. A head that is tied to the embedding gets its new values with it, but on a CPU it computes
with a packed copy of its own, which the reload leaves as it was; and experts are not laid out again for the CPU's kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.weights.files import Announced

_REFUSALS = (ValueError, KeyError, AttributeError, IndexError, AssertionError, RuntimeError, TypeError)
"""What vLLM's loaders raise for a tensor that they cannot take."""


class Refused(Exception):
    """The weights are not all there; says what is missing."""


def of_file(path: str, announced: Sequence[Announced]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, which must be those that were announced."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            for entry in announced:
                if entry.name not in there:
                    raise Refused(f"the server did not get {entry.name}: it is not in {path}")
                if there[entry.name] != entry.shape:
                    raise Refused(f"{entry.name} is {there[entry.name]} in {path}, announced was {entry.shape}")
            if extra := sorted(there.keys() - {entry.name for entry in announced}):
                raise Refused(f"{extra[0]} is in {path} and was not announced")
            for entry in announced:
                yield entry.name, file.get_tensor(entry.name)
    except (SafetensorError, OSError) as error:
        raise Refused(f"the server cannot read {path}: {error}") from error


class _Watched:
    """Tensors on their way into the model: which came, and which one is at it."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]]):
        self.weights, self.names, self.last = iter(weights), set[str](), ""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights:
            self.names.add(name)
            self.last = f"{name} {tuple(tensor.shape)}"
            yield name, tensor

    def drain(self) -> None:
        """What is still sent is received, so that the sender does not wait for this side."""
        for _ in self.weights:
            pass


def load(runner: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    """All weights of the model, or Refused; then the model is whole, but of no use."""
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    model: Any = runner.get_model()
    slots = _slots(model)
    watched = _Watched(weights)
    initialize_layerwise_reload(model)
    try:
        loaded = model.load_weights(watched)
        if missing := _unfilled(model, slots, loaded, watched.names):
            raise Refused(f"the server did not get {missing[0]}{_more(len(missing))}")
    except (Refused, *_REFUSALS) as error:
        _forget(model)
        watched.drain()
        if isinstance(error, Refused):
            raise
        told = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
        raise Refused(f"the server cannot take {watched.last}: {told}") from error
    finally:
        finalize_layerwise_reload(model, runner.vllm_config.model_config)
    _pack_tied(model, slots)
    _pack_experts(model)
    runner.reset_lora_state()
    runner.reset_encoder_cache()
    runner.reset_mm_cache()


def _more(count: int) -> str:
    return f" (and {count - 1} more)" if count > 1 else ""


Slot = tuple[str, str, nn.Module]
"""(whole name, name in its module, module) of one place of a parameter."""


def _slots(model: nn.Module) -> list[list[Slot]]:
    """The places of every parameter: more than one where weights are tied."""
    found: dict[int, list[Slot]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((f"{prefix}.{name}" if prefix else name, name, module))
    return list(found.values())


def _unfilled(model: nn.Module, slots: list[list[Slot]], loaded: set[str] | None, sent: set[str]) -> list[str]:
    """What no tensor filled, or not all of it; asked between vLLM's load and its clean-up, which forgets."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    taken = None if loaded is None else {_plain(name) for name in loaded}
    untaken = [places for places in slots if taken is not None and not taken & {_plain(name) for name, _, _ in places}]
    if not untaken:
        # A layer that had all of its numbers is done, and no longer waits for any.
        def is_filled(layer: nn.Module) -> bool:
            return not (info := get_layerwise_info(layer)).can_load() or info.load_numel >= _numbers(layer)

        untaken = [places for places in slots if not any(is_filled(layer) for _, _, layer in places)]
    missing = []
    for places in untaken:
        name = _plain(places[0][0])
        left_out = [part for part in _parts(model, name) if not any(_ends_alike(part, one) for one in sent)]
        missing += left_out or [f"{name}: it was sent, and its modules do not take it (another engine.model_impl may)"]
    return missing


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")  # where vLLM has put its adapters around a layer


def _numbers(layer: nn.Module) -> int:
    """How many numbers a layer must be given: a vocabulary is padded beyond its own rows."""
    count = 0
    for _, parameter in layer.named_parameters(recurse=False):
        numbers, own = parameter.numel(), getattr(layer, "shard_indices", None)
        if own is not None and len(parameter):
            numbers = numbers // len(parameter) * (own.org_vocab_end_index - own.org_vocab_start_index)
        count += numbers
    return count


def _parts(model: nn.Module, name: str) -> list[str]:
    """The names in a checkpoint of a weight that vLLM has packed of several."""
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    module, _, kind = name.rpartition(".")
    before, _, last = module.rpartition(".")
    return [".".join(filter(None, (before, part, kind))) for part in packed.get(last, [last])]


def _ends_alike(name: str, sent: str) -> bool:
    """The same weight, of the same layer, under a prefix of its own."""
    words = name.split(".")
    first = next((at for at, word in enumerate(words) if word.isdigit()), 0)
    return f".{sent}".endswith("." + ".".join(words[first:]))


def _forget(model: nn.Module) -> None:
    """Nothing of what came is used: vLLM's clean-up then puts each layer's own tensors back."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    for layer in model.modules():
        info = get_layerwise_info(layer)
        info.loaded_weights.clear()
        info.load_numel = 0


def _pack_tied(model: nn.Module, slots: list[list[Slot]]) -> None:
    """Layers whose weight is another's too compute with it as it is now."""
    for places in slots:
        for _, _, layer in places if len(places) > 1 else ():
            if (method := getattr(layer, "quant_method", None)) is not None:
                method.process_weights_after_loading(layer)


def _pack_experts(model: nn.Module) -> None:
    """On a CPU experts are laid out for its kernel when they are loaded first, and left as they come when they are reloaded."""
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        own = next((parameter for name, parameter in layer.named_parameters(recurse=False) if name == "w13_weight"), None)
        if kernel is not None and own is not None and own.device.type == "cpu":
            kernel.fused_experts.process_weights_after_loading(layer)


def join(kind: str, port: int, size: int, timeout: float) -> Any:
    """This worker's end of a group of the trainer's main process and all workers."""
    from steerl.rollout.engines.vllm.weights import broadcast

    rank = 1 + torch.distributed.get_rank()
    return broadcast.Group(kind, broadcast.store(port, size, timeout, main=False), rank, size, timeout)
