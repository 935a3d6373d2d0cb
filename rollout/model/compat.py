"""Every private name of a library that is used here, behind a function with a test (tests/rollout/model/test_compat.py).

What a release of a library may change without a word is looked up here and nowhere else; pyproject.toml has an upper bound
for each of them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
    from transformers.integrations import HfDeepSpeedConfig
    from transformers.utils import ModelOutput

# -- torch -----------------------------------------------------------------------------------------------------------


def forward_hooks(module: nn.Module) -> list[Callable[..., object]]:
    """The hooks around a module's forward, after it and before it."""
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def modules(model: nn.Module) -> list[nn.Module]:
    """Those of `model.modules()`, one that is in two places twice: a fifth of its time, where it is asked in every pass."""
    found = [model]
    for module in found:
        found.extend([child for child in module._modules.values() if child is not None])
    return found


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module's own forward is the work of FSDP's first form, or of torch.compile."""
    return hasattr(module, "_fsdp_wrapped_module") or hasattr(module, "_orig_mod")


def uncompiled(module: nn.Module) -> nn.Module:
    """The module that torch.compile wraps; one that it does not wrap is given back."""
    return getattr(module, "_orig_mod", module)


def without_torch_function() -> contextlib.AbstractContextManager[None]:
    """Inside, subclasses of Tensor are plain tensors."""
    off: contextlib.AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return off


def mark_static(tensor: Tensor) -> Tensor:
    """Marked as staying where it is: a CUDA graph reads it there, other inputs it copies each time."""
    torch._dynamo.mark_static_address(tensor)
    return tensor


def compile_errors() -> tuple[type[Exception], ...]:
    """What a compiled function raises, when it is called, for what cannot be compiled."""
    return torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit


def viewed(tensor: Tensor) -> Tensor | None:
    """What a view is of."""
    return tensor._base


def storage_key(tensor: Tensor) -> int:
    """Names a tensor's storage while it lives, one without memory too."""
    key: int = tensor.untyped_storage()._cdata
    return key


# What is looked up on a tensor of a class of its own goes to its dispatch alone.
NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl
_VIEWS = frozenset(
    (
        "alias", "detach", "view", "_unsafe_view", "slice", "select", "narrow", "chunk", "split", "split_with_sizes", "unbind",
        "t", "transpose", "permute", "squeeze", "unsqueeze", "expand",
    )
)  # fmt: skip


def wrapper_tensor(cls: type[Tensor], like: Tensor, device: torch.device) -> Any:
    """A tensor of a class of its own, with the shape, strides and dtype of another, and without memory."""
    return Tensor._make_wrapper_subclass(cls, like.shape, strides=like.stride(), dtype=like.dtype, device=device)


def is_view(operation: Any) -> bool:
    """Whether an operation of torch's dispatch looks at a part of its first argument, or at all of it in another shape."""
    return operation.overloadpacket.__name__ in _VIEWS and "dtype" not in operation._overloadname


def is_conversion(operation: Any, keywords: dict[str, object]) -> bool:
    """Whether it does nothing but to give its first argument in another dtype, or on another device."""
    if operation is torch.ops.aten.clone.default:
        return True
    plain = keywords.get("layout") in (None, torch.strided) and not keywords.get("pin_memory")
    return operation is torch.ops.aten._to_copy.default and plain


def writes_to_first(operation: Any) -> bool:
    """Whether it changes its first argument."""
    return any(argument.is_write for argument in operation._schema.arguments[:1])


def map_tensors(kind: type[Tensor], change: Callable[[Any], Tensor], tree: Any) -> Any:
    """`change` done to all tensors of a class in nested arguments."""
    from torch.utils import _pytree

    return _pytree.tree_map_only(kind, change, tree)


def fake_tensors() -> contextlib.AbstractContextManager[object]:
    """Inside, operations give tensors of the right shape and dtype, and compute nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode: contextlib.AbstractContextManager[object] = FakeTensorMode(allow_non_fake_inputs=True)
    return mode


def fake_tensor_errors() -> tuple[type[Exception], ...]:
    """What is raised inside `fake_tensors` where numbers decide what is computed."""
    from torch._subclasses import fake_tensor as fake

    return fake.DataDependentOutputException, fake.DynamicOutputShapeException, fake.UnsupportedOperatorException


def cpu_attention_operations() -> tuple[object, object]:
    """(forward, backward) of the attention kernel that the CPU takes."""
    aten = torch.ops.aten
    return aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward


# -- transformers ------------------------------------------------------------------------------------------------------


def update_generation_kwargs(model: PreTrainedModel, outputs: ModelOutput, kwargs: dict[str, object]) -> dict[str, object]:
    """generate's keyword arguments after a step: the caches of `outputs`, masks and positions one column wider."""
    updated: dict[str, object] = model._update_model_kwargs_for_generation(
        outputs, kwargs, is_encoder_decoder=model.config.is_encoder_decoder
    )
    return updated


def logits_processors(
    model: PreTrainedModel, config: GenerationConfig, prompt_width: int, encoder_ids: Tensor
) -> LogitsProcessorList:
    """The processors that generate would make of a generation config; its special tokens become tensors."""
    device = encoder_ids.device
    model._prepare_special_tokens(config, True, device=device)
    return model._get_logits_processor(
        config, input_ids_seq_length=prompt_width, encoder_input_ids=encoder_ids, device=device, model_kwargs={}
    )


def commit(config: Any) -> str:
    """Of the hub, that a model was loaded from; empty where it was a folder."""
    return getattr(config, "_commit_hash", None) or ""


def class_name(auto: Any, model_type: str) -> str | None:
    """The name of the class that an Auto class builds for a type of model. Looking it up imports no modelling file."""
    name = auto._model_mapping._model_mapping.get(model_type)
    return name[0] if isinstance(name, tuple | list) else name


def wrap_checkpointing(module: nn.Module, wrap: Callable[[Callable[..., object]], Callable[..., object]]) -> None:
    """Put `wrap(function)` in the place of the checkpoint functions that transformers hangs on a module and those inside it
    when gradient checkpointing is switched on."""
    for part in module.modules():
        checkpoint = vars(part).get("_gradient_checkpointing_func")
        if checkpoint is not None:
            vars(part)["_gradient_checkpointing_func"] = wrap(checkpoint)


def can_compile_fullgraph(model: PreTrainedModel) -> bool:
    """Whether transformers can compile a model's forward as one graph."""
    return bool(getattr(model, "_can_compile_fullgraph", False))


def unsplit_layers(models: Sequence[nn.Module]) -> list[str]:
    """Names of the classes of layers that are not to be split over devices."""
    return sorted({name for model in models for name in getattr(model, "_no_split_modules", None) or ()})


def active_deepspeed_config() -> HfDeepSpeedConfig | None:
    """The DeepSpeed configuration by which transformers cuts every model that it loads; None without ZeRO-3."""
    from transformers.integrations import deepspeed

    return deepspeed._hf_deepspeed_config_weak_ref() if deepspeed.is_deepspeed_zero3_enabled() else None


def as_saved(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names and in the layout of a checkpoint: what save_pretrained makes of a state dict, or of all of a
    layer's."""
    from transformers.core_model_loading import revert_weight_conversion

    left_out = model._keys_to_ignore_on_save or ()
    kept = {name: value for name, value in state.items() if name not in left_out}
    saved: dict[str, Tensor] = revert_weight_conversion(model, kept)
    return saved


@contextlib.contextmanager
def without_message(text: str) -> Iterator[None]:
    """Inside, transformers logs nothing of loading and of models that has `text` in it."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return text not in record.getMessage()

    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)


@contextlib.contextmanager
def loading_from(opener: Callable[..., object]) -> Iterator[None]:
    """Inside, from_pretrained opens safetensors files by `opener` instead of safe_open."""
    from transformers import modeling_utils

    before = modeling_utils.safe_open
    modeling_utils.safe_open = opener
    try:
        yield
    finally:
        modeling_utils.safe_open = before


# -- peft ----------------------------------------------------------------------------------------------------------------


def adapters_are_off(model: nn.Module) -> bool:
    """Whether this is inside `model.disable_adapter()`."""
    return bool(getattr(model, "_adapters_disabled", False))


# -- deepspeed -----------------------------------------------------------------------------------------------------------


def zero3_hooks(parameter: nn.Parameter) -> list[Any]:
    """Handles of the hooks by which ZeRO-3 brings the weights together, those of all modules, found by one parameter."""
    offload = parameter._z3_optimizer.parameter_offload  # type: ignore[attr-defined]
    return [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]


def link_optimizer_states(zero: Any) -> None:
    """ZeRO-1 and 2 reach moments through links, which DeepSpeed makes after the first group's first step, too early for the
    second group's."""
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def zero_fragment(parameter: nn.Parameter, moment: str | None = None) -> tuple[int, Tensor]:
    """What this rank has under ZeRO-1 and 2 of a float32 weight, or of a moment of it: where its numbers begin in the whole,
    row after row, and they themselves, to be read and written."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return 0, torch.empty(0, device=parameter.device)
    return mapping.lp_fragment_address.start, mapping.get_hp_fragment(moment)
