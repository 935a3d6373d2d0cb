"""Rollouts: prompts in, sampled responses with both log-probs of every token out. Knows nothing of rewards or training."""

if not __name__.startswith("steerl."):
    raise ImportError(f"this folder is imported as steerl.{__name__}; see CHANGELOG.md for what moved")
