"""Evaluation: what EleutherAI's lm-evaluation-harness asks of a model, answered by a policy."""
