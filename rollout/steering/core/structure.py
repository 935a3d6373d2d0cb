"""Finding blocks and components in any model by how it is built, not by a table of names per family.

    unwrap(model)            DDP, DeepSpeed, FSDP, torch.compile and PEFT taken off: the transformers model inside
    stacks(model)            its decoder (and encoder): the module that runs the blocks, and the blocks
    locate(model, at)        the points of a site: (module, input | output), per layer

The blocks are the outermost list of modules that holds the weights on the way to the output head. Inside a block, the
attention is the child whose name says attention (not cross-attention), the mlp is the other child with matrices, or,
where a block holds its two matrices itself (OPT, BART), the last of them. Wrappers that add the residual themselves
(T5's layers, Bloom's modules) are opened, and what a block still does to their output before it is added (Gemma 2's norms) is
seen in a pass over a few tokens, so that `attn_output` and `mlp_output` are what is added to the stream.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.model import language_model
from steerl.rollout.model.hooks import unsteered
from steerl.rollout.steering.core.places import At

logger = logging.getLogger(__name__)

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encdec|enc_dec|encoder_attn|inter_attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe|dense_?relu|fc|^ff$|^ff_layer$", re.IGNORECASE)


@dataclass(frozen=True)
class Stack:
    """The module whose forward runs a list of blocks, and the blocks."""

    name: str
    module: nn.Module
    blocks: tuple[nn.Module, ...]
    width: int
    heads: int


@dataclass(frozen=True)
class Point:
    """Where an edit is made: the input or output of one module. `columns` limits it to some heads' outputs."""

    module: nn.Module
    io: str
    stack: str
    layer: int | None
    width: int | None
    """Entries of the edited vector; None where only a call can tell (a module path)."""
    columns: tuple[int, ...] | None = None


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside every wrapper; adapters that prepend virtual tokens are refused."""
    inner = language_model.unwrap(model)
    for wrapper in (model, getattr(model, "module", None)):
        for name, config in (getattr(wrapper, "peft_config", None) or {}).items():
            if getattr(config, "num_virtual_tokens", None):
                raise ConfigError(
                    f"steering: adapter {name!r} prepends virtual tokens, and positions would be off; use LoRA, or merge it"
                )
    return inner  # type: ignore[no-any-return]


def matrix_widths(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer of any make (nn.Linear, Conv1D, LoRA-wrapped, quantized); None for anything else."""
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(into, int) and isinstance(out, int):
        return into, out
    into, out = getattr(module, "nx", None), getattr(module, "nf", None)
    if isinstance(into, int) and isinstance(out, int):
        return into, out
    return None


def _matrices(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if matrix_widths(child) is not None]


def _has_matrices(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _outermost_lists(module: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """(owner, list) of the module lists that are not inside another one."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield module, child
        else:
            yield from _outermost_lists(child)


def _stack(name: str, root: nn.Module, config: object) -> Stack:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    if name == "decoder":
        count = getattr(text, "num_decoder_layers", None) or getattr(text, "decoder_layers", None) or count
    lists = list(_outermost_lists(root))
    if not lists:
        raise ConfigError(
            f"steering: found no list of blocks in {type(root).__name__}; name a module instead: at: {{module: PATH}}"
        )
    sized = [pair for pair in lists if len(pair[1]) == count] or lists
    owner, blocks = max(sized, key=lambda pair: sum(p.numel() for p in pair[1].parameters()))
    heads = getattr(text, "num_attention_heads", 0)
    if name == "decoder":
        heads = getattr(text, "decoder_attention_heads", None) or heads
    return Stack(name, owner, tuple(blocks), int(getattr(text, "hidden_size", 0)), int(heads))


def stacks(model: nn.Module) -> dict[str, Stack]:
    """The decoder, and for encoder-decoders the encoder."""
    inner = unwrap(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return {
            "decoder": _stack("decoder", inner.get_decoder(), config),  # type: ignore[operator]
            "encoder": _stack("encoder", inner.get_encoder(), config),  # type: ignore[operator]
        }
    return {"decoder": _stack("decoder", inner, config)}


# -- components of one block --------------------------------------------------------------------------------------------


def _adds_residual(module: nn.Module) -> bool:
    return "residual" in inspect.signature(module.forward).parameters


def _open(module: nn.Module) -> nn.Module:
    """Past wrappers that add the residual: down to the one child with matrices, or the last matrix (Bloom)."""
    while not _matrices(module):
        inner = [child for child in module.children() if _has_matrices(child)]
        if len(inner) != 1 or isinstance(inner[0], nn.ModuleList):
            return module
        module = inner[0]
    return _matrices(module)[-1] if _adds_residual(module) else module


def _children(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """Named children of a block; a list of sub-layers (T5) is opened, each named by its class."""
    children: list[tuple[str, nn.Module]] = []
    for name, child in block.named_children():
        if isinstance(child, nn.ModuleList):
            children.extend((type(inner).__name__, inner) for inner in child)
        else:
            children.append((name, child))
    return [(name, child) for name, child in children if _has_matrices(child)]


def attention_of(block: nn.Module) -> nn.Module | None:
    """The module whose output is the self-attention's part of the stream; None where the block has none."""
    for name, child in _children(block):
        label = f"{name} {type(child).__name__}"
        if _ATTENTION.search(label) and not _CROSS.search(label) and matrix_widths(child) is None:
            return _open(child)
    return None


def mlp_of(block: nn.Module) -> nn.Module | None:
    """The module whose output is the feed-forward's part of the stream."""
    others = [
        (name, child)
        for name, child in _children(block)
        if not _ATTENTION.search(name) and not (_ATTENTION.search(type(child).__name__) and not _MLP.search(name))
    ]
    modules = [(name, child) for name, child in others if matrix_widths(child) is None]
    named = [child for name, child in modules if _MLP.search(f"{name} {type(child).__name__}")]
    if not named and attention_of(block) is None:
        return None  # a state-space mixer is neither
    if named or modules:
        return _open((named or [child for _, child in modules])[-1])
    matrices = [child for _, child in others]
    return matrices[-1] if matrices else None


# -- what is added to the stream ----------------------------------------------------------------------------------------


def _calls(inner: nn.Module, watched: list[nn.Module]) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """(activation in, activation out) of modules in a pass over four tokens."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: Any) -> None:
        into = next((value for value in (*args, kwargs.get("hidden_states")) if isinstance(value, Tensor)), None)
        out = output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))
        if into is not None and isinstance(out, Tensor):
            seen[module] = (
                into.detach().float().flatten().clone(),
                out.detach().float().flatten().clone(),
            )  # adding in place changes them

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in watched]
    device = next(inner.parameters()).device
    ids = torch.arange(3, 7, device=device)[None] % language_model.vocabulary_size(inner)
    given = {"input_ids": ids, **({"decoder_input_ids": ids} if getattr(inner.config, "is_encoder_decoder", False) else {})}
    try:
        with torch.no_grad(), unsteered(), language_model.no_dropout(inner):
            inner(**given)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _added(inner: nn.Module, blocks: list[nn.Module], component: str) -> list[nn.Module]:
    """For each block, the module that gives what the component adds to the stream; UserError where no module does."""
    both = [{"attn_output": attention_of(block), "mlp_output": mlp_of(block)} for block in blocks]
    plain = [found[component] for found in both]
    if any(p.is_meta for p in inner.parameters()):
        return plain  # type: ignore[return-value]
    after = [[m for m in block.modules() if m is not block and not _has_matrices(m)] for block in blocks]
    seen = _calls(inner, [m for k, block in enumerate(blocks) for m in {block, *after[k], *filter(None, both[k].values())}])
    chosen: list[nn.Module] = []
    for block, found, rest in zip(blocks, both, after, strict=True):
        ends: dict[str, nn.Module] = {}
        for name, module in found.items():
            if module is None:
                continue
            inside = set(module.modules())
            while module in seen:
                out = seen[module][1]
                # What reads just this and gives another thing: a norm or a scale behind it, not dropout, which does nothing.
                takes = (m for m in rest if m in seen and m not in inside and torch.equal(seen[m][0], out))
                step = next((m for m in takes if seen[m][1].shape == out.shape and not torch.equal(seen[m][1], out)), None)
                if step is None:
                    break
                inside.add(step)
                module = step
            ends[name] = module
        _check_sum(block, ends, seen, component)
        chosen.append(ends[component])
    return chosen


def _check_sum(block: nn.Module, ends: dict[str, nn.Module], seen: dict[nn.Module, tuple[Tensor, Tensor]], name: str) -> None:
    """Whether the block's output is its input plus both components. A factor on the way is refused, other ways are told."""
    cross = any(_CROSS.search(child_name) for child_name, _ in _children(block))
    if len(ends) < 2 or cross or any(module not in seen for module in (block, *ends.values())):
        return
    (into, out), parts = seen[block], torch.stack([seen[module][1] for module in ends.values()], dim=1)
    slack = 100 * torch.finfo(next(block.parameters()).dtype).eps * float(into.norm() + out.norm())
    if float((out - into - parts.sum(1)).norm()) <= slack:
        return
    factors = torch.linalg.lstsq(parts.double(), (out - into).double()[:, None]).solution[:, 0]
    label = type(block).__name__
    if float((out - into - parts @ factors.float()).norm()) > slack:
        line = f"{label} is not its input plus attn_output plus mlp_output: {name} is what its module gives, before a norm, say"
        if line not in _TOLD:
            _TOLD.add(line)
            logger.warning("steering: %s", line)
        return
    factor = float(factors[list(ends).index(name)])
    if abs(factor - 1.0) > 1e-3:
        raise ConfigError(
            f"at.component: {label} adds {factor:.4g} times what its {type(ends[name]).__name__} gives, and no module gives "
            f"that product; name the module itself, at: {{module: PATH}}, and divide the strength by {factor:.4g}"
        )


_TOLD: set[str] = set()


def _projection(block: nn.Module, stack: Stack) -> tuple[nn.Module, int, int] | None:
    """(output projection, heads, width of a head): the attention's last matrix whose input is made of heads."""
    attention = next(
        (
            child
            for name, child in _children(block)
            if _ATTENTION.search(f"{name} {type(child).__name__}") and not _CROSS.search(f"{name} {type(child).__name__}")
        ),
        None,
    )
    while attention is not None and not _matrices(attention):
        inner = [child for child in attention.children() if _has_matrices(child)]
        attention = inner[0] if len(inner) == 1 else None
    if attention is None:
        return None
    heads = stack.heads
    for name in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        value = getattr(attention, name, None)
        if isinstance(value, int):
            heads = value
            break
    for matrix in reversed(_matrices(attention)):
        into, out = matrix_widths(matrix)  # type: ignore[misc]
        if out == stack.width and heads and into % heads == 0:
            return matrix, heads, into // heads
    return None


# -- points of a site ---------------------------------------------------------------------------------------------------


def _by_path(inner: nn.Module, known: dict[str, Stack], at: At) -> Point:
    modules = dict(inner.named_modules())
    path = next((p for p in (at.module, at.module.removeprefix("base_model.model.")) if p in modules), None)
    if path is None:
        last = at.module.rsplit(".", 1)[-1]
        near = [name for name in modules if name.endswith(f".{last}")][:3]
        hint = (
            f"such modules: {', '.join(near)}" if near else f"its children: {', '.join(n for n, _ in inner.named_children())}"
        )
        raise ConfigError(f"at.module: {type(inner).__name__} has no module {at.module!r}; {hint}")
    module = modules[path]
    home, layer = "", None
    for stack in known.values():
        if any(module is m for m in stack.module.modules()):
            home = stack.name
            layer = next((i for i, block in enumerate(stack.blocks) if any(module is m for m in block.modules())), None)
    if sum(any(module is m for m in stack.module.modules()) for stack in known.values()) > 1:
        home = ""  # shared between encoder and decoder: whichever runs
    widths = matrix_widths(module)
    width = None if widths is None else widths[0 if at.io == "input" else 1]
    if any(module is block for stack in known.values() for block in stack.blocks):
        width = known[home].width if home else None
    return Point(module, at.io, home, layer, width)


def layers_of(stack: Stack, at: At) -> tuple[int, ...]:
    """The block numbers a site names, counted from 0."""
    count = len(stack.blocks)
    if at.layers == "all":
        return tuple(range(count))
    bad = [layer for layer in at.layers if not -count <= int(layer) < count]
    if bad:
        raise ConfigError(f"at.layers: {bad[0]} is out of range; the {stack.name} has {count} blocks, 0 to {count - 1}")
    return tuple(int(layer) % count for layer in at.layers)


def locate(model: nn.Module, at: At, known: dict[str, Stack] | None = None) -> list[Point]:
    """The points of a site, one per layer. What the model does not have is a UserError that says what it has."""
    inner = unwrap(model)
    known = known or stacks(inner)
    if at.module:
        return [_by_path(inner, known, at)]
    if at.stack not in known:
        raise ConfigError(f"at.stack: {type(inner).__name__} has no {at.stack}; it has {', '.join(known)}")
    stack = known[at.stack]
    layers = layers_of(stack, at)
    blocks = [stack.blocks[layer] for layer in layers]
    if at.head:
        return [_heads(block, stack, layer, at) for layer, block in zip(layers, blocks, strict=True)]
    modules = blocks
    if at.component in ("attn_output", "mlp_output"):
        for layer, block in zip(layers, blocks, strict=True):
            if (attention_of if at.component == "attn_output" else mlp_of)(block) is None:
                children = ", ".join(name for name, _ in block.named_children())
                raise ConfigError(
                    f"at.component: block {layer} ({type(block).__name__}: {children}) has no {at.component} that could be "
                    "found; name the module: at: {module: PATH}"
                )
        modules = _added(inner, blocks, at.component)
    io = "input" if at.component == "block_input" else "output"
    return [Point(module, io, stack.name, layer, stack.width) for layer, module in zip(layers, modules, strict=True)]


def _heads(block: nn.Module, stack: Stack, layer: int, at: At) -> Point:
    projection = _projection(block, stack)
    if projection is None:
        raise ConfigError(
            f"at.head: found no attention output projection in block {layer} ({type(block).__name__}); name the module"
        )
    module, heads, size = projection
    bad = [head for head in at.head if not -heads <= head < heads]
    if bad:
        raise ConfigError(f"at.head: {bad[0]} is out of range; block {layer} has {heads} heads, 0 to {heads - 1}")
    columns = tuple(head % heads * size + i for head in at.head for i in range(size))
    return Point(module, "input", stack.name, layer, len(columns), columns)
