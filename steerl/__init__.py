"""steerl: rollouts that are exactly right, PPO on plain transformers, and steering of activations while sampling.

The names below are the public face; each is imported from its file when it is first asked for, so `import steerl` is quick.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
_FILES = {
    "rollout.types": ("Rollout", "Texts"),
    "rollout.common.errors": ("CheckpointError", "ConfigError", "DataError", "UserError"),
    "rollout.common.run_folder": ("RunSettings",),
    "rollout.model.policy": ("ModelSettings", "Policy", "load_policy"),
    "rollout.prompts.prompts": ("PromptBatch", "PromptSettings", "Prompts", "load_prompts"),
    "rollout.decoding.settings": ("Sampling",),
    "rollout.engines.sampler": ("Sampler",),
    "rollout.scoring.logprobs": ("teacher_forced",),
    "rollout.steering": ("Steering", "SteeringSpec", "load_spec", "unsteered"),
    "rollout.dumps.store": ("read_dump",),
    "reward.build": ("build_reward",),
    "reward.types": ("Scores",),
    "training.ppo": ("train",),
    "training.settings": ("PPOSettings",),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}
__all__ = sorted([*_FILE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module 'steerl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"steerl.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
