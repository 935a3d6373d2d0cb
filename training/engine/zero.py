"""DeepSpeed's ZeRO: weights to where it holds them, before it wraps a module.

ZeRO-3 keeps on every rank a part of each weight's flat numbers. Here weights go to their parts one after another, as they are
read; DeepSpeed by itself takes models that are whole.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerl.rollout.model import unread
from steerl.training.model.held import Held

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the weights by mixed precision; masters are in float32."""


def place(accelerator: Accelerator, module: Held, *, trained: bool) -> None:
    """Have a module's weights read into what ZeRO keeps of them. One that is not `trained` gets an engine of its own under
    ZeRO-3; elsewhere it is whole."""
    config = _settled(accelerator.deepspeed_plugin.deepspeed_config)
    dtype = DTYPES.get(accelerator.mixed_precision)
    parts = int(config["zero_optimization"]["stage"]) == 3
    if not trained or parts and unread.any_in(module):
        unread.cast(module, dtype)
    if not parts:
        unread.read_in(module)
        return
    _partition(module, config, dtype or torch.float32)
    if not trained:
        _for_passes(module, config)


def _partition(module: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Weight after weight. What is at hand already, such as a fresh adapter, DeepSpeed takes when it wraps."""
    import deepspeed

    deepspeed.init_distributed()  # of the group that stands: a configuration counts its ranks
    first: list[Any] = []

    def parted(weight: unread.Unread) -> Tensor:
        parameter: Any = nn.Parameter(weight.read().contiguous(), weight.requires_grad)
        if first:
            first[0].convert_to_zero_parameters(param_list=[parameter])
        else:
            holder = nn.ParameterList([parameter])
            deepspeed.zero.Init(module=holder, config_dict_or_path=config, dtype=dtype)
            first.append(parameter)
        return parameter

    unread.replace(module, parted)


def _for_passes(module: Held, config: dict[str, Any]) -> None:
    """Bring weights together in its forward passes; there is no optimizer."""
    import deepspeed

    own = copy.deepcopy({key: value for key, value in config.items() if key not in ("optimizer", "scheduler")})
    own["zero_optimization"].pop("offload_optimizer", None)
    deepspeed.initialize(model=module, config=own)[0].eval()


def _settled(config: Any) -> Any:
    """A configuration without what accelerate has yet to fill in."""
    return {key: _settled(value) if isinstance(value, dict) else value for key, value in config.items() if value != "auto"}
