"""EngineSettings: which engine draws the rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineSettings:
    """What draws the tokens."""

    kind: Literal["stream", "generate"] = "stream"
    """stream: the decode loop, which keeps four numbers of each token. generate: plain generate, whose dictionaries of scores
    and logits are held whole; slow, for comparison: the same tokens, and log-probs to rounding."""
