"""Training: PPO from rollouts and scores, the stages before it, checkpoints, reports and plans."""

if not __name__.startswith("steerl."):
    raise ImportError(f"this folder is imported as steerl.{__name__}; see CHANGELOG.md for what moved")
