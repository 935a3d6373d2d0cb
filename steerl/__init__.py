"""steerl: rollouts that are exactly right, PPO on plain transformers, and steering of activations while sampling.

The public names are those of the rooms; each is imported when it is first asked for, so `import steerl` is quick.
"""

import os.path
from typing import TYPE_CHECKING

if os.path.isdir(os.path.join(os.path.dirname(__path__[0]), "rollout", "decoding")):
    __path__.append(os.path.dirname(__path__[0]))  # a checkout, installed or not: the rooms stand beside this folder

from steerl import reward, rollout, training
from steerl.rollout.common.front import front

if TYPE_CHECKING:  # for editors and type checkers
    from steerl.reward.build import build_reward as build_reward
    from steerl.reward.types import Scores as Scores
    from steerl.reward.types import TurnRewards as TurnRewards
    from steerl.rollout.common.errors import CheckpointError as CheckpointError
    from steerl.rollout.common.errors import ConfigError as ConfigError
    from steerl.rollout.common.errors import DataError as DataError
    from steerl.rollout.common.errors import UserError as UserError
    from steerl.rollout.common.run_folder import RunSettings as RunSettings
    from steerl.rollout.decoding.settings import Sampling as Sampling
    from steerl.rollout.dumps.store import read_dump as read_dump
    from steerl.rollout.engines.sampler import Sampler as Sampler
    from steerl.rollout.engines.settings import EngineSettings as EngineSettings
    from steerl.rollout.engines.source import RolloutSource as RolloutSource
    from steerl.rollout.environments.environment import Environment as Environment
    from steerl.rollout.environments.sampler import EpisodeSampler as EpisodeSampler
    from steerl.rollout.environments.settings import EnvironmentSettings as EnvironmentSettings
    from steerl.rollout.episodes import Episode as Episode
    from steerl.rollout.episodes import Turn as Turn
    from steerl.rollout.model.hooks import unsteered as unsteered
    from steerl.rollout.model.policy import Policy as Policy
    from steerl.rollout.model.policy import load_policy as load_policy
    from steerl.rollout.model.settings import ModelSettings as ModelSettings
    from steerl.rollout.prompts.prompts import PromptBatch as PromptBatch
    from steerl.rollout.prompts.prompts import Prompts as Prompts
    from steerl.rollout.prompts.prompts import PromptSettings as PromptSettings
    from steerl.rollout.prompts.prompts import load_prompts as load_prompts
    from steerl.rollout.scoring.logprobs import teacher_forced as teacher_forced
    from steerl.rollout.steering import Steering as Steering
    from steerl.rollout.steering import SteeringSpec as SteeringSpec
    from steerl.rollout.steering import load_spec as load_spec
    from steerl.rollout.types import Rollout as Rollout
    from steerl.rollout.types import Samples as Samples
    from steerl.rollout.types import Texts as Texts
    from steerl.training.ppo import train as train
    from steerl.training.settings import PPOSettings as PPOSettings

__version__ = "0.1.0"
__getattr__, __all__ = front(__name__, {"rollout": rollout.__all__, "reward": reward.__all__, "training": training.__all__})


def __dir__() -> list[str]:
    return __all__
