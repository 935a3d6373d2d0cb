"""EngineSettings: which engine draws the rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

from steerl.rollout.common.errors import ConfigError


@dataclass(frozen=True)
class EngineSettings:
    """What draws the tokens."""

    kind: Literal["stream", "generate", "vllm"] = "stream"
    """stream: the decode loop, which keeps four numbers of each token. generate: plain generate, whose dictionaries of scores
    and logits are held whole; slow, for comparison: the same tokens, and log-probs to rounding. vllm: a vLLM server, which
    draws the same tokens from weights that it is sent."""
    url: str = ""
    """vllm: a server that runs already, such as http://127.0.0.1:8000; empty = the job starts one and ends it."""
    python: str = ".venv-vllm/bin/python"
    """vllm: the interpreter that has vLLM (`make vllm`)."""
    model_impl: Literal["auto", "transformers", "vllm"] = "auto"
    """vllm: whose modules the server runs: transformers' own, or vLLM's; auto = vLLM's where it has the family."""
    sync: Literal["auto", "file", "gloo", "nccl", "adapter"] = "auto"
    """vllm: how new weights get there: a file in shared memory, a broadcast, or the adapter alone; auto = the adapter where
    only an adapter learns, nccl between GPUs, else a file."""
    check_rows: int = 8
    """vllm: rows that the server scores again after every sync, to be compared with the trainer's own pass; 0 = none."""
    ahead: int = 0
    """vllm: steps that sampling runs ahead of learning, 0 or 1. With 1 the server draws the next step's rows while this one
    learns, with the weights from before: they are recorded as such and weighed by ppo.correction."""
    start_timeout: float = 600.0
    """vllm: seconds in which a started server must answer."""
    arguments: list[str] = field(default_factory=list)
    """vllm: more of the server's own flags, for example [--tensor-parallel-size, "2"]."""

    def __post_init__(self) -> None:
        problems = [
            f"engine.{name}: {getattr(self, name)!r}, but {rule}"
            for name, good, rule in (
                ("check_rows", self.check_rows >= 0, "it must be 0 (none) or more rows"),
                ("ahead", self.ahead in (0, 1), "it must be 0 or 1"),
                ("start_timeout", 0 < self.start_timeout < math.inf, "it must be a positive number of seconds"),
            )
            if not good
        ]
        changed = [spot.name for spot in fields(self) if spot.name != "kind" and getattr(self, spot.name) != _default(spot)]
        if self.kind != "vllm":
            problems += [f"engine.{name}: has no effect with engine.kind {self.kind}; leave it out" for name in changed]
        elif self.url:
            started = [name for name in changed if name in ("python", "model_impl", "start_timeout", "arguments")]
            problems += [f"engine.{name}: has no effect on the server of engine.url, which runs already" for name in started]
        if problems:
            raise ConfigError(*problems)


def _default(spot: object) -> object:
    return getattr(EngineSettings, spot.name, [])  # type: ignore[attr-defined]
