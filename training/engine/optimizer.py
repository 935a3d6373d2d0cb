"""The optimizer of ppo.optimizer, and what each of them can be used with."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from steerl.rollout.common.errors import ConfigError
from steerl.training.engine.engine import is_fsdp2, uses_deepspeed
from steerl.training.settings import PPOSettings

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_optimizer(accelerator: Accelerator, settings: PPOSettings) -> None:
    """Refuse 8-bit states where there is nothing that could compute with them, or bring them together for a checkpoint."""
    if settings.optimizer != "adamw8bit":
        return
    why = None
    if accelerator.device.type != "cuda":
        why = f"its kernels are a GPU's, and the run is on {accelerator.device.type}; set adamw"
    elif uses_deepspeed(accelerator) or is_fsdp2(accelerator):
        name = "DeepSpeed" if uses_deepspeed(accelerator) else "FSDP"
        why = f"{name} spreads an optimizer's states over ranks, which cuts through their blocks; set adamw, or use DDP"
    elif importlib.util.find_spec("bitsandbytes") is None:
        why = "it needs bitsandbytes, which is not installed; pip install 'steerl[bitsandbytes]', or set adamw"
    if why is not None:
        raise ConfigError(f"ppo.optimizer: adamw8bit, but {why}")


def build_optimizer(accelerator: Accelerator, groups: list[dict[str, Any]], settings: PPOSettings) -> torch.optim.Optimizer:
    if settings.optimizer == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        made: torch.optim.Optimizer = AdamW8bit(groups, weight_decay=settings.weight_decay)
        return made
    # One pass over each weight, and no buffers beside it. It walks through memory and looks at no strides.
    fused = all(parameter.is_contiguous() for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=fused)
