"""Environment: the tools or the environment of a job, ready for episodes: its processes, and how conversations go on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.environments.conversation.conversation import Conversation
from steerl.rollout.environments.host.pool import Pool
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import Prompts


class Environment:
    """Of one process; what cannot be done is refused here."""

    def __init__(self, settings: EnvironmentSettings, policy: Policy):
        if policy.is_seq2seq:
            raise ConfigError(
                "environment: the model is an encoder-decoder, whose decoder has no place for what it is told; use a decoder"
            )
        self.settings = settings
        self.pool = Pool(settings)
        try:
            self.conversation = Conversation(policy, self.pool.tools, settings)
        except BaseException:
            self.pool.close()
            raise

    def check(self, prompts: Prompts) -> None:
        """Refuse prompts and a chat template that episodes cannot be made of."""
        row = prompts.table[0]
        self.conversation.check(row[prompts.column], row)

    def close(self) -> None:
        self.pool.close()


@contextlib.contextmanager
def environment_of(settings: EnvironmentSettings | None, policy: Policy) -> Iterator[Environment | None]:
    """What a job's episodes are played in, until the block ends; None where it has none."""
    if settings is None or not settings.given:
        yield None
        return
    environment = Environment(settings, policy)
    try:
        yield environment
    finally:
        environment.close()
