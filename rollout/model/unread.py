"""Weights whose numbers still lie in their file: a model that is whole to look at, and takes no memory until it is read.

    model.safetensors ── mapped, not read ── Unread ── by transformers' own loading ──> a model of unread weights
                                                                                          |
    an operation reads what it is given, for itself alone <───────────────────────────────┤
    a copy shares the file; a slice is a slice of the file <──────────────────────────────┤
    read_in(model): every weight to its place, one after another <────────────────────────┘

An engine that spreads weights takes each rank's share out of the file, and no rank ever holds the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from steerl.rollout.model import compat

_JOINS = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)
"""By which experts that lie apart in a file become one weight."""


class Unread(Tensor):
    """Shows shape, dtype and device of what it is read as. Nothing can be written to it."""

    stored: Callable[[], Tensor]
    """What it is read from: on the CPU, of any dtype, not to be changed."""

    __torch_function__ = compat.NO_TORCH_FUNCTION

    @staticmethod
    def __new__(cls, stored: Callable[[], Tensor], like: Tensor, device: torch.device | str | None = None) -> Unread:
        """`like` says shape, strides, dtype and, if none is given, the device."""
        made: Unread = compat.wrapper_tensor(cls, like, torch.device(device or like.device))
        made.stored = stored
        return made

    def shown(self) -> Tensor:
        """The numbers, to look at: in the file's own memory where they are as they are stored."""
        return self.stored().to(self.device).to(self.dtype)

    def read(self) -> Tensor:
        """The numbers, in a tensor of their own."""
        shown = self.shown()
        own = shown.untyped_storage().data_ptr() != self.stored().untyped_storage().data_ptr()
        return shown if own else shown.clone()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        same = self.detach()
        memo[id(self)] = copied = nn.Parameter(same, self.requires_grad) if isinstance(self, nn.Parameter) else same
        return copied

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Unread({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        first: Any = args[0] if args else None
        if isinstance(first, Unread):
            if compat.is_view(func):
                return first.viewed(func, args[1:], kwargs)
            if compat.is_conversion(func, kwargs):
                return first.converted(kwargs.get("dtype"), kwargs.get("device"))
            if compat.writes_to_first(func):
                raise RuntimeError(f"{func}: the numbers of this weight lie in a file, which is not written to")
        if func in _JOINS and all(isinstance(part, Unread) for part in first):
            like = func([part.empty("meta") for part in first], *args[1:], **kwargs)
            return Unread(lambda: func([part.shown() for part in first], *args[1:], **kwargs), like, first[0].device)
        args, kwargs = compat.map_tensors(Unread, Unread.shown, (args, kwargs))
        return func(*args, **kwargs)

    def viewed(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A view of the same file, or several."""
        like = function(self.empty("meta"), *args, **kwargs)
        if isinstance(like, Tensor):
            return Unread(lambda: function(self.stored(), *args, **kwargs), like, self.device)

        def part(index: int) -> Callable[[], Tensor]:
            return lambda: function(self.stored(), *args, **kwargs)[index]

        return [Unread(part(index), each, self.device) for index, each in enumerate(like)]

    def converted(self, dtype: torch.dtype | None, device: torch.device | None) -> Unread:
        """To be read in another dtype, after its own, which may round; or elsewhere."""
        stored = self.stored if dtype in (None, self.dtype) else lambda: self.stored().to(self.dtype)
        return Unread(stored, self.empty("meta", dtype), device or self.device)

    def empty(self, device: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_strided(self.shape, self.stride(), dtype=dtype or self.dtype, device=device)


class File:
    """A safetensors file as safe_open gives it, whose tensors are unread ones."""

    def __init__(self, path: str, framework: str = "pt", **_: object):
        self._handle = safe_open(path, framework=framework)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        """It stays open as long as a tensor of it is unread."""

    def get_tensor(self, name: str) -> Unread:
        tensor = self._handle.get_tensor(name)  # a view of the mapped file
        return Unread(lambda: tensor, tensor)

    def get_slice(self, name: str) -> Slice:
        return Slice(self, name)


class Slice:
    """One tensor of it, whole or in part."""

    def __init__(self, file: File, name: str):
        self._file, self._name = file, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file._handle.get_slice(self._name), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self._file.get_tensor(self._name)[index]


def unread_in(module: nn.Module) -> Iterator[tuple[nn.Module, str, Unread]]:
    """(part, name, weight or buffer) of all that is unread in a module, under each of its names."""
    for part in module.modules():
        for name, weight in [*part.named_parameters(recurse=False, remove_duplicate=False), *part.named_buffers(recurse=False)]:
            if isinstance(weight, Unread):
                yield part, name, weight


def replace(module: nn.Module, change: Callable[[Unread], Tensor]) -> None:
    """Put what `change` makes of each unread weight and buffer of a module in its place, one after another; what is tied
    stays tied."""
    made: dict[int, tuple[Unread, Tensor]] = {}  # with the weight itself, so that no id is given twice
    for part, name, weight in list(unread_in(module)):
        if id(weight) not in made:
            value = change(weight)
            is_weight = isinstance(weight, nn.Parameter) and not isinstance(value, nn.Parameter)
            made[id(weight)] = weight, nn.Parameter(value, weight.requires_grad) if is_weight else value
        setattr(part, name, made[id(weight)][1])


@contextlib.contextmanager
def layers_read(model: nn.Module, kinds: Collection[str]) -> Iterator[None]:
    """Inside, a layer of one of these classes has its weights read while it runs: some kernels ask where in memory they lie."""
    handles: list[Any] = []
    for layer in (part for part in model.modules() if type(part).__name__ in kinds and any_in(part)):
        left: list[tuple[nn.Module, str, Unread]] = []

        def read(layer: nn.Module, _: object, left: list[tuple[nn.Module, str, Unread]] = left) -> None:
            left.extend(unread_in(layer))
            replace(layer, Unread.shown)

        def let_go(_: nn.Module, __: object, ___: object, left: list[tuple[nn.Module, str, Unread]] = left) -> None:
            while left:
                setattr(*left.pop())

        handles += [layer.register_forward_pre_hook(read), layer.register_forward_hook(let_go, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def any_in(module: nn.Module) -> bool:
    return any(True for _ in unread_in(module))


def cast(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Weights in another dtype, to be read so where they are unread; buffers stay as they are."""
    if dtype is None:
        return
    replace(module, lambda weight: weight.converted(dtype, None) if weight.is_floating_point() else weight)
    for parameter in module.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Unread):
            parameter.data = parameter.data.to(dtype)


def read_in(module: nn.Module) -> None:
    """All that is unread, in its dtype on its device."""
    replace(module, Unread.read)


def to_device(module: nn.Module, device: torch.device | str) -> None:
    """Move what is there, and have the rest read to `device`; unread buffers are read."""

    def moved(weight: Unread) -> Tensor:
        on_device = weight.converted(None, torch.device(device))
        return on_device if isinstance(weight, nn.Parameter) else on_device.read()

    replace(module, moved)
    module.to(device)
