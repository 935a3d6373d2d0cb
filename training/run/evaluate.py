"""How good the policy is on held-out prompts: one sampled answer each, the task reward and the KL per response."""

from __future__ import annotations

from steerl.reward.types import Reward, mean_metrics
from steerl.rollout.prompts.prompts import Prompts
from steerl.training.algorithm.experience import gather_scored, importance, sample, score
from steerl.training.engine.engine import EngineSampler
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.model.reference import Reference
from steerl.training.run.metrics import kl_metrics
from steerl.training.settings import PPOSettings


def evaluate(
    prompts: Prompts,
    sampler: EngineSampler,
    reward: Reward,
    model: ActorCritic,
    reference: Reference | None,
    settings: PPOSettings,
    *,
    step: int,
    progress: float,
) -> dict[str, float]:
    """eval/reward, eval/kl, eval/length, over the first `eval_prompts` prompts; {} where there is no evaluation."""
    rows = list(range(min(settings.eval_prompts, len(prompts))))
    if not rows:
        return {}
    rollout, texts, real = sample(prompts, sampler, rows, step=step, progress=progress)
    still = getattr(reward, "still", None)  # statistics that the reward keeps are of training rows alone
    scored = score(model, reference, *gather_scored(rollout, texts, still() if still else reward, real=real), settings)
    total_B = scored.scores.total_B.double()
    metrics = {
        "eval/reward": float(total_B.mean()),
        "eval/kl": kl_metrics(scored, importance(scored, settings)[0]).get("kl/ref", 0.0),
        "eval/length": float(scored.rollout.actions_B.double().mean()),
        "eval/rows": float(len(total_B)),
    } | {f"eval/{name}": float(values.double().nanmean()) for name, values in scored.scores.parts.items()}
    return metrics | mean_metrics(scored.scores.metrics, "eval")
