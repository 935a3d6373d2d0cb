"""How edits get into a forward pass: permanent hooks that do nothing unless a frame is active in this context.

    stack pre-hook     notes what this call is: rows, columns, cache length        (frame.opened)
      block hooks      hand the activation to the frame's edits at that point      (frame.points)
    stack post-hook    checks that edits ran

The frame is a ContextVar: threads do not see each other's, and leaving the context (by an exception too) leaves nothing
behind. Hooks are installed once per module, in front of other people's, and look themselves up by the module they run
for, so a deepcopy of the model is a plain model. Gradient checkpointing runs parts of a forward again in backward, by
then in another context or thread: the checkpoint function is wrapped so that it carries the frame along.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import compat

Edit = Callable[[Any, Tensor], Tensor]
"""Takes the frame (none in a graph) and the activation at its point, and gives back the edited one (the same object where
nothing is edited)."""


class Reader(Protocol):
    """Who wants to know about the calls of a stack: told before its blocks run, and after."""

    def opened(self, frame: Frame, stack: str, arguments: Arguments) -> None: ...

    def closed(self, frame: Frame, stack: str) -> None: ...

    def goes_on(self, args: tuple[object, ...], kwargs: dict[str, object]) -> bool:
        """Whether a call with these arguments is one that the frame's steady edits were made for."""
        ...


class Frame:
    """What is active in this context: edits by point, readers by stack, and the current call of each reader."""

    __slots__ = ("calls", "entered", "points", "stacks", "steady")

    def __init__(self, outer: Frame | None):
        self.points: dict[tuple[int, str], tuple[Edit, ...]] = dict(outer.points) if outer else {}
        self.stacks: dict[int, tuple[tuple[Reader, str], ...]] = dict(outer.stacks) if outer else {}
        self.calls: dict[object, Any] = dict(outer.calls) if outer else {}
        self.entered: set[int] | None = None
        """Stacks that the model's pass under way has entered; None outside."""
        self.steady: dict[int, tuple[Edit, ...]] | None = None
        """Decoding where every step is edited alike: all that is to be done, by the module whose output it is done to."""

    def add(self, module: nn.Module, io: str, edit: Edit) -> None:
        key = (id(module), io)
        self.points[key] = (*self.points.get(key, ()), edit)

    def read(self, module: nn.Module, reader: Reader, stack: str) -> None:
        self.stacks[id(module)] = (*self.stacks.get(id(module), ()), (reader, stack))

    def frozen(self) -> Frame:
        """A copy whose calls stay as they are now: what a checkpoint needs when it runs again."""
        return Frame(self)


_is_compiling = torch.compiler.is_compiling
_FRAME: ContextVar[Frame | None] = ContextVar("steering_frame", default=None)


def current() -> Frame | None:
    return _FRAME.get()


@contextlib.contextmanager
def entered(frame: Frame | None) -> Iterator[None]:
    token = _FRAME.set(frame)
    try:
        yield
    finally:
        _FRAME.reset(token)


def unsteered() -> contextlib.AbstractContextManager[None]:
    """Inside, every pass is plain, whatever is active outside: reference passes, sources."""
    return entered(None)


# -- the hooks ------------------------------------------------------------------------------------------------------------


class Arguments:
    """The arguments of a stack's forward, looked at by what they are."""

    __slots__ = ("args", "ids", "kwargs")

    def __init__(self, args: tuple[object, ...], kwargs: dict[str, object]):
        self.args, self.kwargs = args, kwargs
        ids = kwargs.get("input_ids")
        if ids is None and args and isinstance(args[0], Tensor) and not args[0].is_floating_point():
            ids = args[0]
        if isinstance(ids, Tensor) and ids.dim() != 2:
            ids = ids.reshape(-1, ids.shape[-1])
        self.ids: Tensor | None = ids if isinstance(ids, Tensor) else None
        """Token ids (B, T), where the stack gets ids and not embeddings."""

    def shape(self) -> tuple[int, int]:
        """(rows, columns) of this call."""
        ids = self.ids
        if ids is None:
            for name in ("inputs_embeds", "hidden_states"):
                if isinstance(given := self.kwargs.get(name), Tensor):
                    ids = given
            if ids is None:
                ids = next((a for a in self.args if isinstance(a, Tensor) and a.dim() >= 2), None)
        if ids is None:
            raise UserError("steering: the model was called without input_ids and without inputs_embeds")
        return int(ids.shape[0]), int(ids.shape[1])

    def cache(self) -> object:
        for name in ("past_key_values", "cache_params"):
            if self.kwargs.get(name) is not None:
                return self.kwargs[name]
        return next((a for a in self.args if hasattr(a, "get_seq_length")), None)

    def mask(self) -> Tensor | None:
        """The attention mask where it is one number per token."""
        mask = self.kwargs.get("attention_mask")
        if mask is None:
            mask = next((a for a in self.args[1:2] if isinstance(a, Tensor)), None)
        return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def seen(self, width: int) -> int:
        """Columns that came before this call: what the cache holds, or what the mask spans beyond this call."""
        cache = self.cache()
        if cache is None:
            return 0
        if hasattr(cache, "get_seq_length"):
            try:
                return int(cache.get_seq_length())
            except ValueError:  # caches of linear attention alone hold states and no length
                pass
        elif isinstance(cache, tuple | list) and cache and isinstance(cache[0], tuple | list):
            return int(cache[0][0].shape[-2])
        return _fed(cache, width, self.mask())


_FED: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()
"""Columns that went into caches which hold a state and no length (linear attention alone): noted on the cache itself."""


def _fed(cache: object, width: int, mask: Tensor | None) -> int:
    if mask is not None:
        _FED[cache] = int(mask.shape[1])
        return int(mask.shape[1]) - width
    before = _FED.get(cache, 0)
    state = getattr(cache, "has_previous_state", None)
    if not before and callable(state) and state():
        raise UserError(
            f"steering: {type(cache).__name__} holds a state from before steering was active, and neither it nor an attention "
            "mask says how many tokens it has seen; start the sequence inside the context, or pass attention_mask"
        )
    if before and callable(state) and not state():
        before = 0  # emptied since
    _FED[cache] = before + width
    return before


def _in_graph(module: nn.Module) -> dict[str, tuple[Edit, ...]] | None:
    """While a graph is made for `fixed`: the edits that it is to have at this module, and no frame is asked."""
    return getattr(module, "steering_fixed", None) if _is_compiling() else None


def _before_stack(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    if _in_graph(module) is not None:
        return
    if module.training and torch.is_grad_enabled():
        _carry_frames(module)
    frame = _FRAME.get()
    if frame is None or (readers := frame.stacks.get(id(module))) is None:
        return
    if frame.entered is not None:
        if id(module) in frame.entered:
            raise UserError(
                f"steering: {type(module).__name__} is run several times in one pass of the model (recurrent depth), so what a "
                "call is to the sequence cannot be told; such models are not steered"
            )
        frame.entered.add(id(module))
    if frame.steady is not None:
        if len(readers) == 1 and readers[0][0].goes_on(args, kwargs):
            return
        frame.steady = None
    for reader, stack in readers:
        reader.opened(frame, stack, Arguments(args, kwargs))


def _before_model(module: nn.Module, args: tuple[object, ...]) -> None:
    if _in_graph(module) is not None:
        return
    if (frame := _FRAME.get()) is not None and frame.stacks:
        frame.entered = set()


def _after_model(module: nn.Module, args: tuple[object, ...], output: object) -> None:
    if _in_graph(module) is not None:
        return
    if (frame := _FRAME.get()) is not None:
        frame.entered = None


def _after_stack(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
    if _in_graph(module) is not None:
        return
    frame = _FRAME.get()
    readers = None if frame is None else frame.stacks.get(id(module))
    if frame is None or readers is None or frame.steady is not None:
        return
    for reader, stack in readers:
        reader.closed(frame, stack)
    made = output.get("cache_params", output.get("past_key_values")) if isinstance(output, dict) else None
    if made is not None and "Linear" in type(next(iter(getattr(made, "layers", ())), None)).__name__:
        arguments = Arguments(args, kwargs)
        if arguments.cache() is None:  # made inside this call, so this call is all it has seen
            _FED[made] = arguments.shape()[1]


def _after_module(module: nn.Module, args: tuple[object, ...], output: object) -> object:
    if (fixed := _in_graph(module)) is not None:
        return _put(None, fixed["output"], output) if "output" in fixed else None
    frame = _FRAME.get()
    if frame is None:
        return None
    edits = frame.points.get((id(module), "output")) if frame.steady is None else frame.steady.get(id(module))
    return None if edits is None else _put(frame, edits, output)


def _put(frame: Frame | None, edits: tuple[Edit, ...], output: Any) -> object:
    """A module's output with its activation edited."""
    if isinstance(output, Tensor):
        return _edited(frame, edits, output)
    if isinstance(output, dict):
        key = next(iter(output))
        changed = copy.copy(output)
        changed[key] = _edited(frame, edits, output[key])
        return changed
    return type(output)((_edited(frame, edits, output[0]), *output[1:]))


def _before_module(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]] | None:
    if (fixed := _in_graph(module)) is not None:
        return _put_in(None, fixed["input"], args, kwargs) if "input" in fixed else None
    frame = _FRAME.get()
    if frame is None:
        return None
    edits = frame.points.get((id(module), "input"))
    return None if edits is None else _put_in(frame, edits, args, kwargs)


def _put_in(
    frame: Frame | None, edits: tuple[Edit, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """A module's arguments with the activation among them edited."""
    if args:
        return (_edited(frame, edits, args[0]), *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(n for n, v in kwargs.items() if isinstance(v, Tensor))
    return args, {**kwargs, name: _edited(frame, edits, kwargs[name])}


def _edited(frame: Frame | None, edits: tuple[Edit, ...], hidden: Tensor) -> Tensor:
    for edit in edits:
        hidden = edit(frame, hidden)
    return hidden


_installing = threading.Lock()
_stacks: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def is_steerable(model: nn.Module) -> bool:
    """Whether a steering has been put on `model`, active or not. A copy of it is a plain model."""
    return bool(_stacks) and any(module in _stacks for module in model.modules())


def install_stack(module: nn.Module) -> None:
    with _installing:
        _stacks.add(module)
        if _before_stack not in compat.forward_hooks(module):
            module.register_forward_pre_hook(_before_stack, prepend=True, with_kwargs=True)
            module.register_forward_hook(_after_stack, prepend=True, with_kwargs=True)


def install_model(module: nn.Module) -> None:
    """Watch a model around its stacks: in one pass each of them runs once."""
    with _installing:
        if module not in _stacks and _before_model not in compat.forward_hooks(module):
            module.register_forward_pre_hook(_before_model, prepend=True)
            module.register_forward_hook(_after_model, prepend=True)


def install(module: nn.Module, io: str) -> None:
    """Put the hook of a point in place, once and in front: what others see is the edited activation."""
    with _installing:
        if io == "output" and _after_module not in compat.forward_hooks(module):
            module.register_forward_hook(_after_module, prepend=True)
        if io == "input" and _before_module not in compat.forward_hooks(module):
            module.register_forward_pre_hook(_before_module, prepend=True, with_kwargs=True)


# -- inside a graph ---------------------------------------------------------------------------------------------------------


def hooked(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that carry hooks of this file."""
    return [m for m in model.modules() if any(hook in _OURS for hook in compat.forward_hooks(m))]


def only_ours(model: nn.Module) -> bool:
    """Whether nobody else has hooks on `model`."""
    return all(hook in _OURS for m in model.modules() for hook in compat.forward_hooks(m))


_OURS = (_before_model, _after_model, _before_stack, _after_stack, _after_module, _before_module)


@contextlib.contextmanager
def fixed(modules: list[nn.Module], edits: dict[nn.Module, dict[str, tuple[Edit, ...]]]) -> Iterator[None]:
    """Inside, a graph of the model is made with these edits and none of a frame; one that was made is run."""
    for module in modules:
        module.__dict__["steering_fixed"] = edits.get(module, _NO_EDITS)
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop("steering_fixed", None)


_NO_EDITS: dict[str, tuple[Edit, ...]] = {}


# -- gradient checkpointing -------------------------------------------------------------------------------------------------


class _Again:
    """A checkpointed function that runs in the frame (or in none) in which it ran first."""

    def __init__(self, function: Callable[..., object], frame: Frame | None):
        self.function, self.frame = function, frame

    def __call__(self, *args: object, **kwargs: object) -> object:
        with entered(self.frame):
            return self.function(*args, **kwargs)


class _Carried:
    """A model's checkpoint function, with the frame of the moment bound into whatever it checkpoints."""

    def __init__(self, checkpoint: Callable[..., object]):
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., object], *args: object, **kwargs: object) -> object:
        frame = _FRAME.get()
        return self.checkpoint(_Again(function, None if frame is None else frame.frozen()), *args, **kwargs)


def _carry_frames(stack: nn.Module) -> None:
    """Wrap the checkpoint functions that transformers hangs on modules when checkpointing is switched on."""
    compat.wrap_checkpointing(stack, lambda function: function if isinstance(function, _Carried) else _Carried(function))
