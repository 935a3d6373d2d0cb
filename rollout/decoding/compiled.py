"""The compiled decode step: fixed shapes and addresses, one graph (on a GPU a CUDA graph) instead of a launch per operation.

    prefill            the eager path's own: caches that grow, one for all samples of a prompt
      └─ CompiledSteps   its cache is copied into a static one of (rows, columns)
    step               token and steering are written into fixed tensors ──> the graph of (rows, columns, steering's structure)
                       ended rows stay until half of them have ended, and leave by halves: each number of rows is a graph

Masks and positions are made inside the graph, from a padding mask that holds for the whole batch. A model's caches and
inputs stay where they are from batch to batch, because a CUDA graph reads and writes at the addresses it was recorded with.

It does not fit encoder-decoders, models whose cache is not dense (hybrid, Mamba), hooks of others, edits that are more
than tensors, and weights that are spread over ranks: those take the eager path, and a line says why. Whether a model's
numbers come out of a static cache is not read off its name but seen on it (`_agrees`). The first step at each shape
compiles; more than `MOST` shapes are not.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.progress import doing
from steerl.rollout.model import capabilities, compat, hooks, language_model
from steerl.rollout.model.generation_config import ClosedGenerationConfig
from steerl.rollout.model.generation_state import step_forward
from steerl.rollout.model.policy import Policy
from steerl.rollout.steering import fixed
from steerl.rollout.steering.engine import Active
from steerl.rollout.steering.fixed import FixedSteering, structure

logger = logging.getLogger(__name__)
BACKEND = "inductor"
"""Tests that want the path without the compiler's minute take `eager`."""
MOST = 16
"""Graphs of one model: shapes come and go with `sampling.batch_tokens` and lengths, and each costs a compilation."""
COLUMNS = 64
"""Static caches are a multiple of this long, so that prompts of like lengths share one."""
FEWEST = 16
"""Batches are not cut below so many rows: each cut is another graph."""
_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")


# -- whether ----------------------------------------------------------------------------------------------------------------


def why_not(policy: Policy, steering: Any = None) -> str | None:
    """Why this model cannot be decoded so; None when it can."""
    core = policy.core
    if policy.is_seq2seq:
        return "an encoder-decoder has two caches"
    if not compat.can_compile_fullgraph(core):
        return f"transformers cannot compile {type(core).__name__} as one graph"
    if not (policy.capabilities.caching and policy.capabilities.row_selection and policy.capabilities.pads_in_text):
        return f"the cache of {type(core).__name__} is not a plain one"
    if not hooks.only_ours(core):
        return "hooks of another library on the model would be left out"
    if hooks.current() is not None:
        return "something else acts on the model's activations meanwhile"
    if any(module.training for module in core.modules()):
        return "gradient checkpointing is on"
    if steering is not None and (reason := fixed.why_not(steering, core)):
        return reason
    state = _state_of(core)
    if state.failed:
        return f"{type(core).__name__} could not be compiled before"
    if state.agrees is None:
        state.agrees = _agrees(policy)
    return None if state.agrees else f"a static cache does not give the numbers of {type(core).__name__}"


def fits(policy: Policy, synced: bool, steering: Any = None) -> bool:
    """Whether the compiled path is taken; a reason against it is logged once."""
    reason = "the weights are spread over ranks" if synced else why_not(policy, steering)
    if reason is not None:
        _warn_once(f"{reason}; sampling falls back to the eager path")
    return reason is None


def _warn_once(line: str) -> None:
    if line not in _WARNED:
        _WARNED.add(line)
        logger.warning("sampling.compile: %s", line)


_WARNED: set[str] = set()


def _agrees(policy: Policy) -> bool:
    """Whether steps over a static cache, after a padded prompt, give the logits of a pass over each row by itself."""
    short, long = capabilities.probe_lengths(policy)
    if short < 4:
        return False
    first, device = policy.capabilities.position_offset, policy.device
    rows = [language_model.probe_row(policy, 3, short), language_model.probe_row(policy, 5, long)]
    tail = torch.cat([row[:, -2:] for row in rows])
    fill = torch.full((1, long - short), policy.pad_id, device=device)
    prompt = torch.cat([torch.cat([fill, rows[0][:, :-2]], dim=1), rows[1][:, :-2]])
    mask = torch.ones_like(prompt, dtype=torch.bool)
    mask[0, : long - short] = False
    seen: list[Tensor] = []

    def follow(model: Any, input_ids: Tensor, *_: Any, **kwargs: Any) -> Tensor:
        for unused in ("logits_processor", "stopping_criteria", "generation_config"):
            kwargs.pop(unused, None)
        _, kwargs = step_forward(model, input_ids, kwargs, first=True)
        run, ids = CompiledSteps(policy, _StepParts(_StaticInputs(2, long + 3), _forward), lambda _: None), input_ids
        for k in range(2):
            ids = torch.cat([ids, tail[:, k : k + 1]], dim=1)
            seen.append(run(ids, kwargs))
        return ids

    config = ClosedGenerationConfig.of(policy.pad_id, policy.start_ids, max_new_tokens=3)
    try:
        policy.core.generate(
            **language_model.generate_arguments(policy, prompt, mask, first), generation_config=config, custom_generate=follow
        )
    except (UserError, RuntimeError, ValueError, IndexError, AttributeError, NotImplementedError):
        return False  # what cannot be moved or masked so shows it by an error
    expected = torch.cat([language_model.pass_logits(policy, row, offset=first)[:, -2:] for row in rows])
    return language_model.same(torch.stack(seen, dim=1), expected)


# -- what stays -------------------------------------------------------------------------------------------------------------


class _StaticInputs:
    """Inputs and cache of a step of so many rows and columns, always at the same addresses."""

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns
        self.cache: Any = None
        self.ids = self.mask = self.positions = torch.empty(0)

    def _allocate(self, device: torch.device) -> None:
        if not len(self.ids):
            self.ids, self.positions = (
                compat.mark_static(torch.zeros((self.rows, 1), dtype=torch.int64, device=device)) for _ in range(2)
            )
            self.mask = compat.mark_static(torch.ones((self.rows, self.columns), dtype=torch.int64, device=device))

    def begin(self, ids: Tensor, kwargs: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` of the first step with all that changes copied to fixed addresses; the cache grown so far moves in."""
        seen = ids.shape[1] - 1
        self._allocate(ids.device)
        self.mask.fill_(1)
        if inputs.get("attention_mask") is not None:
            self.mask[:, : seen + 1].copy_(inputs["attention_mask"])
        static: dict[str, Any] = {"input_ids": self.ids, "attention_mask": self.mask}
        if inputs.get("position_ids") is not None:
            self.positions.copy_(inputs["position_ids"])
            static["position_ids"] = self.positions
        self._move_in(kwargs.get("past_key_values"), seen)
        return {**inputs, **static, "past_key_values": self.cache}

    def take(self, other: _StaticInputs, inputs: dict[str, Any], index: Tensor) -> dict[str, Any]:
        """The same for rows of a larger shape, in the middle of a batch."""
        self._allocate(index.device)
        for name in ("mask", "positions"):
            getattr(self, name).copy_(getattr(other, name)[index])
        static = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        selected = {name: static.get(name, value) for name, value in inputs.items()}
        for name, value in selected.items():
            if isinstance(value, Tensor) and name not in static and value.dim() and value.shape[0] == other.rows:
                selected[name] = value[index]
        for static_layer, layer in zip(self._layers(len(other.cache.layers)), other.cache.layers, strict=True):
            _fill(static_layer, layer.keys[index], layer.values[index], int(layer.cumulative_length), 0)
        return {**selected, "past_key_values": self.cache}

    def _move_in(self, grown: Any, seen: int) -> None:
        if not all(type(layer).__name__ in _GROWING for layer in getattr(grown, "layers", [None])):
            raise NotImplementedError(type(grown).__name__)
        for static_layer, layer in zip(self._layers(len(grown.layers)), grown.layers, strict=True):
            _fill(static_layer, layer.keys, layer.values, seen, seen - layer.keys.shape[2])
            layer.keys = layer.values = None  # no two caches longer than for a layer

    def _layers(self, count: int) -> list[Any]:
        from transformers.cache_utils import Cache, StaticLayer

        if self.cache is None:
            # Layers with a sliding window too keep all columns: what lies outside of the window is masked.
            self.cache = Cache(layers=[StaticLayer(max_cache_len=self.columns) for _ in range(count)])
        return self.cache.layers  # type: ignore[no-any-return]


def _fill(layer: Any, keys: Tensor, values: Tensor, seen: int, start: int) -> None:
    """A static layer with the keys and values of columns from `start` on, `seen` of them in all; zeros beside them."""
    if not layer.is_initialized or layer.keys.dtype != keys.dtype or layer.keys.device != keys.device:
        layer.lazy_initialization(keys, values)
    else:
        layer.keys.zero_()
        layer.values.zero_()
    layer.keys[:, :, start : start + keys.shape[2]].copy_(keys)
    layer.values[:, :, start : start + values.shape[2]].copy_(values)
    layer.cumulative_length.fill_(seen)


@dataclass
class _ModelState:
    """What a model keeps between batches."""

    agrees: bool | None = None
    failed: bool = False
    """The compiler gave up on it once."""
    inputs: dict[Any, _StaticInputs] = field(default_factory=dict)
    edits: dict[Any, FixedSteering] = field(default_factory=dict)
    graphs: dict[Any, Callable[..., Tensor]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Of whoever decodes: the tensors are there once."""


_MODELS: weakref.WeakKeyDictionary[nn.Module, _ModelState] = weakref.WeakKeyDictionary()
"""By the model itself: a copy of a model carries its attributes, and a graph among them would be the original's."""


def _state_of(core: nn.Module) -> _ModelState:
    return _MODELS.setdefault(core, _ModelState())


# -- one batch --------------------------------------------------------------------------------------------------------------


def _forward(core: nn.Module, inputs: dict[str, Any]) -> Tensor:
    logits: Tensor = core(**inputs, return_dict=True).logits
    return logits[:, -1]


_numbers = itertools.count()


def _graph(device: torch.device) -> Callable[..., Tensor]:
    """`_forward` compiled, under a name of its own: the compiler counts graphs per function and gives up after a few."""
    code = _forward.__code__.replace(co_name=f"decode_step_{next(_numbers)}")
    mode = "reduce-overhead" if device.type == "cuda" else "default"
    return torch.compile(types.FunctionType(code, globals()), fullgraph=True, dynamic=False, backend=BACKEND, mode=mode)


@dataclass
class _StepParts:
    """What a step of so many rows is made of."""

    static: _StaticInputs
    graph: Callable[..., Tensor]
    edits: FixedSteering | None = None
    ran: bool = False


class CompiledSteps:
    """The steps of one batch after its prefill. Call it with all ids so far; it gives the logits of the last."""

    def __init__(
        self, policy: Policy, parts: _StepParts, parts_for: Callable[[int], _StepParts | None], active: Active | None = None
    ):
        """`parts_for(rows)`: what steps of fewer rows are made of; None where such steps cannot be had."""
        self.core, self.active, self.parts, self._parts_for = policy.core, active, parts, parts_for
        self.hooked = hooks.hooked(policy.core)
        self.inputs: dict[str, Any] | None = None

    def __call__(self, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
        core, parts = self.core, self.parts
        if self.inputs is None:
            inputs = core.prepare_inputs_for_generation(ids, next_sequence_length=1, is_first_iteration=False, **kwargs)
            self.inputs = parts.static.begin(ids, kwargs, inputs)
        elif "position_ids" in self.inputs:
            self.inputs["position_ids"].add_(1)
        self.inputs["input_ids"].copy_(ids[:, -1:])
        if parts.graph is _forward:  # hooks work by themselves
            return _forward(core, self.inputs)
        edits: dict[nn.Module, Any] = {}
        if parts.edits is not None and self.active is not None:
            parts.edits.fill(self.active, ids)
            edits = parts.edits.edits
        torch.compiler.cudagraph_mark_step_begin()
        try:
            first, parts.ran = not parts.ran, True
            compiling = doing(f"compiling the decode step for {parts.static.rows} rows") if first else contextlib.nullcontext()
            with hooks.fixed(self.hooked, edits), compiling:
                return parts.graph(core, self.inputs)
        except compat.compile_errors() as error:
            # Nothing of the step has run. The same step goes on uncompiled, over the same cache.
            cause = getattr(error, "inner_exception", error)
            line = f"{type(cause).__name__}: {cause}".strip().splitlines()[0]
            _warn_once(f"compiling failed ({line}); this batch goes on uncompiled")
            parts.graph, _state_of(core).failed = _forward, True
            return _forward(core, self.inputs)

    def shrink(self, ended: Tensor, left: int) -> Tensor | None:
        """Which rows to go on with, now that `left` have not ended: half of them (or a quarter, ...), each count with a graph
        of its own, filled up with rows that have ended. None = all of them."""
        rows = self.parts.static.rows
        if self.inputs is None or _state_of(self.core).failed:
            return None
        wanted = rows
        while wanted % 2 == 0 and wanted // 2 >= max(left, FEWEST):
            wanted //= 2
        if wanted == rows or (parts := self._parts_for(wanted)) is None:
            return None
        going, gone = (~ended).nonzero()[:, 0], ended.nonzero()[:, 0]
        index = torch.cat([going, gone[: wanted - left]]).sort().values
        self.inputs = parts.static.take(self.parts.static, self.inputs, index)
        self.parts = parts
        return index


@contextlib.contextmanager
def compiled_steps(
    policy: Policy, rows: int, columns: int, steering: Any = None, active: Any = None
) -> Iterator[CompiledSteps | None]:
    """The steps of a batch of so many rows and at most so many columns; None where they cannot be had now."""
    state, device = _state_of(policy.core), policy.device
    built = () if steering is None else structure(steering)
    width, kind = _rounded(columns, policy.context), (str(device), policy.core.dtype)

    def parts_for(rows: int) -> _StepParts | None:
        key = (rows, width, kind, built)
        if key not in state.graphs:
            if len(state.graphs) >= MOST:
                _warn_once(f"{MOST} graphs were made for this model; batches of other shapes do without")
                return None
            state.graphs[key] = _graph(device)
        static = state.inputs.setdefault((rows, width, kind), _StaticInputs(rows, width))
        edits = None
        if steering is not None:
            if (rows, kind, built) not in state.edits:
                state.edits[rows, kind, built] = FixedSteering(steering, rows, device)
            edits = state.edits[rows, kind, built]
            edits.load(steering)
        return _StepParts(static, state.graphs[key], edits)

    if not state.lock.acquire(blocking=False):
        _warn_once("the model decodes in another thread, or further up; sampling falls back to the eager path")
        yield None
        return
    try:
        first = parts_for(rows)
        yield None if first is None else CompiledSteps(policy, first, parts_for, active)
    finally:
        state.lock.release()


def _rounded(columns: int, context: int | None) -> int:
    """Up to a multiple of COLUMNS, within the context where that is enough."""
    rounded = -(-columns // COLUMNS) * COLUMNS
    return max(columns, min(rounded, context)) if context else rounded
