"""Rollouts: prompts in, sampled responses with both log-probs of every token out. Knows nothing of rewards or training."""
