"""What a vLLM server reads of a model: its config and its tokenizer. The weights are sent."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steerl.rollout.model.policy import Policy


def write(policy: Policy, folder: Path) -> Path:
    """config.json and the tokenizer's files of `policy`, in `folder`."""
    config = copy.deepcopy(policy.core.config)
    config.architectures = [type(policy.core).__name__]  # a model that was made from a config has none yet
    config.dtype = policy.core.dtype
    config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder
