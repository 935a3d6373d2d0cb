"""Rewards: rollouts and texts in, scores out."""

if not __name__.startswith("steerl."):
    raise ImportError(f"this folder is imported as steerl.{__name__}; see CHANGELOG.md for what moved")

from steerl.rollout.common.front import front

__getattr__, __all__ = front(
    __name__,
    {
        "types": ("Scores", "TurnRewards"),
        "build": ("build_reward",),
    },
)


def __dir__() -> list[str]:
    return __all__
