"""Rewards: rollouts and texts in, scores out."""

if not __name__.startswith("steerl."):
    raise ImportError(f"this folder is imported as steerl.{__name__}; see CHANGELOG.md for what moved")
