"""CompleteJob: the settings of `steerl complete`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.prompts.prompts import PromptSettings
from steerl.rollout.steering import load_spec


@dataclass(frozen=True)
class CompleteJob:
    """Complete prompts, or chat, and say how sure the model was."""

    prompt: list[str] = field(default_factory=list, metadata={"positional": "texts"})
    """Texts to go on from."""
    model: ModelSettings = field(default_factory=ModelSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    """A file of prompts instead: whatever a dump reads, or a .txt with one on each line."""
    sampling: Sampling = field(default_factory=Sampling)
    engine: EngineSettings = field(default_factory=EngineSettings)
    """What draws; only stream shows a text before it is whole."""
    environment: EnvironmentSettings = field(default_factory=EnvironmentSettings)
    """What the policy talks to between its turns: an episode is shown when it is over."""
    steering: dict[str, object] | str | None = field(default=None, metadata={"check": load_spec})
    """An intervention: completions without and with it stand side by side."""
    chat: bool = False
    """Take each prompt as a user's message, through the chat template."""
    system: str = ""
    """A system message before it."""
    logprobs: bool = False
    """Also every token with its log-prob at temperature 1, and the confidence report."""
    json: bool = False
    """One JSON object per prompt and line, with tokens and log-probs."""
    verify: bool = False
    """Rescore every completion alone, unpadded, in float32, and say how far its log-probs are off."""
    color: Literal["auto", "always", "never"] = "auto"
    """auto: in a terminal, unless NO_COLOR is set."""
    least: int = 5
    """The report names this many of the least certain tokens."""
    below: float = 0.1
    """The report counts the tokens under this probability."""

    def __post_init__(self) -> None:
        if self.prompt and self.prompts.path:
            raise UserError("prompt: given, and prompts.path too; choose one")
        if self.prompts.streaming:
            raise UserError("prompts.streaming: has no effect on steerl complete, which holds all rows; leave it out")
        if self.system and not self.chat and (self.prompt or self.prompts.path):
            raise UserError("system: has no effect on texts; add --chat true")
        if self.least < 1 or not 0 < self.below <= 1:
            raise UserError(f"least, below: {self.least} and {self.below}; give 1 or more, and a probability")
        for name in ("logprobs", "verify") if self.environment.given else ():
            if getattr(self, name):
                raise UserError(f"{name}: has no effect on episodes; leave it out (--json true has every log-prob)")
