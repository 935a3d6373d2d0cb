"""How good the policy is on held-out prompts: one sampled answer each, the task reward and the KL per response."""

from __future__ import annotations

from dataclasses import dataclass

from steerl.reward.types import Reward, mean_metrics
from steerl.rollout.engines.source import RolloutSource
from steerl.rollout.prompts.prompts import Prompts
from steerl.training.algorithm.experience import gather_scored, importance, sample, score
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.model.reference import Reference
from steerl.training.run.metrics import kl_to_reference
from steerl.training.settings import PPOSettings


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Means over the held-out answers."""

    rows: int
    reward: float
    kl: float
    """To the reference, per response; 0 without one."""
    length: float
    others: dict[str, float]
    """Of the reward's parts and of what it logged, as metrics."""

    def metrics(self) -> dict[str, float]:
        own = {"eval/reward": self.reward, "eval/kl": self.kl, "eval/length": self.length, "eval/rows": float(self.rows)}
        return own | self.others


def evaluate(
    prompts: Prompts,
    source: RolloutSource,
    reward: Reward,
    model: ActorCritic,
    reference: Reference | None,
    settings: PPOSettings,
    *,
    step: int,
) -> Evaluation | None:
    """Of the first `eval_prompts` prompts; None where there is no evaluation."""
    rows = prompts.first(settings.eval_prompts)
    if not rows:
        return None
    samples = sample(prompts, source, rows, step=step, progress=step / settings.steps)
    still = getattr(reward, "still", None)  # statistics that the reward keeps are of training rows alone
    scored = score(model, reference, *gather_scored(samples, still() if still else reward), settings)
    kl = kl_to_reference(scored, importance(scored, settings)[0])
    parts = {f"eval/{name}": float(values.double().nanmean()) for name, values in scored.scores.parts.items()}
    return Evaluation(
        rows=len(scored.rollout),
        reward=float(scored.scores.total_B.double().mean()),
        kl=0.0 if kl is None else kl.per_response,
        length=float(scored.rollout.actions_B.double().mean()),
        others=parts | mean_metrics(scored.scores.metrics, "eval"),
    )
