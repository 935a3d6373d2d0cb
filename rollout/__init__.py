"""Rollouts: prompts in, sampled responses with both log-probs of every token out. Knows nothing of rewards or training."""

if not __name__.startswith("steerl."):
    raise ImportError(f"this folder is imported as steerl.{__name__}; see CHANGELOG.md for what moved")

from steerl.rollout.common.front import front

__getattr__, __all__ = front(
    __name__,
    {
        "types": ("Rollout", "Samples", "Texts"),
        "common.errors": ("CheckpointError", "ConfigError", "DataError", "UserError"),
        "common.run_folder": ("RunSettings",),
        "model.hooks": ("unsteered",),
        "model.policy": ("Policy", "load_policy"),
        "model.settings": ("ModelSettings",),
        "prompts.prompts": ("PromptBatch", "PromptSettings", "Prompts", "load_prompts"),
        "decoding.settings": ("Sampling",),
        "engines.sampler": ("Sampler",),
        "engines.settings": ("EngineSettings",),
        "engines.source": ("RolloutSource",),
        "environments.environment": ("Environment",),
        "environments.sampler": ("EpisodeSampler",),
        "environments.settings": ("EnvironmentSettings",),
        "episodes": ("Episode", "Turn"),
        "scoring.logprobs": ("teacher_forced",),
        "steering": ("Steering", "SteeringSpec", "load_spec"),
        "dumps.store": ("read_dump",),
    },
)


def __dir__() -> list[str]:
    return __all__
