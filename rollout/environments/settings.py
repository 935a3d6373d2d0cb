"""EnvironmentSettings: what the policy talks to between its turns, and how far."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.fingerprint import sha256_file, values_fingerprint


@dataclass(frozen=True)
class EnvironmentSettings:
    """Tools or an environment of your own; neither: rows have one turn."""

    tools: list[str] = field(default_factory=list)
    """Functions with type hints and a docstring that the policy may call, each `file.py:name` or `module:name`. The turn that
    calls none ends the episode."""
    factory: str = ""
    """`file.py:name` of what makes an environment, one for each episode: an object with `reset(row)` and `step(completion)`, or
    TRL's, whose public methods are tools."""
    max_turns: int = 8
    """Most turns of the policy in an episode."""
    max_tokens: int = 0
    """Most tokens of an episode, all that follows the prompt; 0 = what the model's context leaves."""
    max_tool_tokens: int = 512
    """Most tokens of one answer; what is longer is cut, with a mark where."""
    workers: int = 8
    """Calls of the user's code that run side by side, in processes of their own."""
    timeout: float = 60.0
    """Seconds that one call may take; then its process is killed."""
    earlier_turns: Literal["same", "as_sampled"] = "same"
    """Where the chat template would render earlier turns otherwise than they were sampled (reasoning left out, say): same
    refuses it at the start, as_sampled goes on with the ids as they are."""

    @property
    def given(self) -> bool:
        return bool(self.tools or self.factory)

    def response(self, max_new_tokens: int) -> int:
        """Tokens that a prompt must leave room for."""
        return self.max_tokens or max_new_tokens

    def bound(self, max_new_tokens: int) -> int | None:
        """Most tokens that may follow a prompt; None: what the model's context leaves."""
        return self.max_tokens or None if self.given else max_new_tokens

    def longest(self, max_new_tokens: int) -> int:
        """Most tokens that may follow a prompt, where the model's context leaves as many."""
        if not self.given:
            return max_new_tokens
        return self.max_tokens or self.max_turns * (max_new_tokens + self.max_tool_tokens)

    def content(self) -> str:
        """Of the files that the user's code is in."""
        files = [Path(name.rpartition(":")[0]) for name in [*self.tools, self.factory]]
        return values_fingerprint(sha256_file(file) for file in files if file.suffix == ".py" and file.is_file())

    def __post_init__(self) -> None:
        whole = {"max_turns": 1, "max_tokens": 0, "max_tool_tokens": 1, "workers": 1}
        problems = [
            f"environment.{name}: {getattr(self, name)}, but it must be at least {low}"
            for name, low in whole.items()
            if getattr(self, name) < low
        ]
        if not 0 < self.timeout <= 86_400 or not math.isfinite(self.timeout):
            problems.append(f"environment.timeout: {self.timeout}, but it must be a number of seconds above 0, 86,400 at most")
        if self.tools and self.factory:
            problems.append("environment.factory: has no effect beside environment.tools; leave one of the two out")
        if not self.given:
            named = [spot.name for spot in fields(self) if spot.name != "tools" and getattr(self, spot.name) != spot.default]
            problems += [
                f"environment.{spot}: has no effect without environment.tools or factory; leave it out" for spot in named
            ]
        if problems:
            raise ConfigError(*problems)


BEFORE = {f"environment.{name}": value for name, value in asdict(EnvironmentSettings()).items()}
"""What a job of before there were environments says of them."""
