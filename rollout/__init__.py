"""Rollouts: prompts in, sampled responses with both log-probs of every token out. Knows nothing of rewards or training.

The names below are the room's front; each is imported from its file when it is first asked for, so `import rollout` is
quick and needs torch and transformers alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rollout.batch import Rollout as Rollout
    from rollout.batch import Texts as Texts
    from rollout.errors import Problem as Problem
    from rollout.logprobs import teacher_forced as teacher_forced
    from rollout.policy import ModelSettings as ModelSettings
    from rollout.policy import Policy as Policy
    from rollout.policy import load_policy as load_policy
    from rollout.prompts import PromptBatch as PromptBatch
    from rollout.prompts import Prompts as Prompts
    from rollout.prompts import PromptSettings as PromptSettings
    from rollout.prompts import load_prompts as load_prompts
    from rollout.run import RunSettings as RunSettings
    from rollout.sampler import Sampler as Sampler
    from rollout.sampling import Sampling as Sampling
    from rollout.steering import Steering as Steering
    from rollout.steering import load_spec as load_spec
    from rollout.store import read_dump as read_dump

_FILES = {
    "batch": ("Rollout", "Texts"),
    "errors": ("Problem",),
    "logprobs": ("teacher_forced",),
    "policy": ("ModelSettings", "Policy", "load_policy"),
    "prompts": ("PromptBatch", "PromptSettings", "Prompts", "load_prompts"),
    "run": ("RunSettings",),
    "sampler": ("Sampler",),
    "sampling": ("Sampling",),
    "steering": ("Steering", "load_spec"),
    "store": ("read_dump",),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}
__all__ = sorted(_FILE_OF)


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    return getattr(importlib.import_module(f"rollout.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__
