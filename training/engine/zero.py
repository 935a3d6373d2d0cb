"""DeepSpeed's ZeRO: weights to where it holds them, before it wraps a module.

ZeRO-3 keeps on every rank a part of each weight's flat numbers. Here weights go to their parts one after another, as they are
read; DeepSpeed by itself takes models that are whole.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerl.rollout.common import processes
from steerl.rollout.model import unread
from steerl.rollout.model.unread import Unread
from steerl.training.model.held import Held

if TYPE_CHECKING:
    from accelerate import Accelerator

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the weights by mixed precision; masters are in float32."""


def place(accelerator: Accelerator, held: Sequence[Held]) -> None:
    """Have weights read into what ZeRO keeps of them. The first module is trained; another one gets an engine of its own under
    ZeRO-3, and is whole elsewhere."""
    config = _settled(accelerator.deepspeed_plugin.deepspeed_config)
    dtype = DTYPES.get(accelerator.mixed_precision)
    parts = int(config["zero_optimization"]["stage"]) == 3
    for module in held:
        if module is not held[0] or unread.any_in(module):
            unread.cast(module, dtype)
        if parts:
            _partition(module, config, dtype or torch.float32)
            if module is not held[0]:
                _for_passes(module, config)
    if not parts:
        read_whole(held)


def read_whole(held: Sequence[Held]) -> None:
    """Every weight whole. On a CPU the first policy's may stay in the memory that the file is mapped to, which is this
    process's own; all others are read."""
    unread.replace(held[0].policies[0].model, Unread.shown)
    for module in held:
        unread.read_in(module)


def _partition(module: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Weight after weight. What is at hand already, such as a fresh adapter, DeepSpeed takes when it wraps."""
    import deepspeed

    deepspeed.init_distributed()  # of the group that stands: a configuration counts its ranks
    first: list[Any] = []
    reads = processes.start().is_main  # and sends the others each weight

    def parted(weight: Unread) -> Tensor:
        whole = weight.read() if reads else torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        parameter: Any = nn.Parameter(whole.contiguous(), weight.requires_grad)
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
