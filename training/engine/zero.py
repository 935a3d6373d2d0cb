"""DeepSpeed: made ready, weights put to where ZeRO holds them, then the module wrapped.

ZeRO-3 keeps on every rank a part of each weight's flat numbers. Here weights go to their parts one after another, as they are
read; DeepSpeed by itself takes models that are whole.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.model import unread
from steerl.rollout.model.sharding import is_sharded
from steerl.rollout.model.unread import Unread
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.model.held import Held, read_whole
from steerl.training.settings import PPOSettings

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

DTYPES = {"bf16": torch.bfloat16}
"""Of the weights by mixed precision; masters are in float32. fp16 is refused (checks.py)."""


def ready() -> None:
    """Where the accelerate config asks for DeepSpeed: have it tell warnings alone, not its whole configuration; and on a CPU
    leave out an operation that it would compile for minutes at its first start and that only its inference engine calls."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # calls that torch has renamed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["shm_comm"] = deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def models_stay_whole() -> None:
    """Under ZeRO-3 transformers cuts every model that it loads once there is an Accelerator: here models are cut when they are
    wrapped."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def place(accelerator: Accelerator, held: Sequence[Held], settings: PPOSettings) -> None:
    """Have weights read into what ZeRO keeps of them. The first module is trained; another one gets an engine of its own under
    ZeRO-3, and is whole elsewhere."""
    check_dtypes(accelerator.mixed_precision, held[0])
    _set_batches(accelerator, settings)
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


def _set_batches(accelerator: Accelerator, settings: PPOSettings) -> None:
    """The update accumulates and bounds gradients by PPO's own settings, whatever the config file says."""
    rows = settings.micro_batch_size
    accelerator.deepspeed_plugin.deepspeed_config |= {
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": rows,
        "train_batch_size": rows * processes.start().world_size,
        "gradient_clipping": settings.max_grad_norm,
    }


def wrap(
    accelerator: Accelerator, actor_critic: ActorCritic, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, AcceleratedOptimizer]:
    """(engine, optimizer)."""
    import deepspeed

    for parameter in actor_critic.parameters():
        parameter.data = parameter.data.contiguous()  # DeepSpeed sends them as flat bytes
    try:
        model, prepared = accelerator.prepare(actor_critic, optimizer)
    except RuntimeError as error:
        if "cpu_adam" not in str(error):
            raise
        raise UserError(
            "deepspeed_config: offload_optimizer steps with DeepSpeed's CPU Adam, which cannot be compiled here; install g++ "
            "and ninja, or have torch's step on the CPU: \"zero_force_ds_cpu_optimizer\": false in DeepSpeed's own config file"
        ) from error
    if is_sharded(actor_critic) and actor_critic.vectors is not None:
        # Hooks on layers read the steering's parameters: they are at hand as long as the whole forward pass runs.
        for parameter in actor_critic.vectors.parameters():
            deepspeed.zero.register_external_parameter(actor_critic, parameter)
    return model, prepared


def check_dtypes(mixed_precision: str, model: nn.Module) -> None:
    """What DeepSpeed takes."""
    if mixed_precision != "no":
        return
    odd = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.float32}
    if odd:
        dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in sorted(odd, key=str))
        raise UserError(
            f"model.dtype: {dtypes}, but DeepSpeed without mixed precision takes float32 alone; set model.dtype float32, or "
            'mixed_precision: "bf16" in the accelerate config'
        )
