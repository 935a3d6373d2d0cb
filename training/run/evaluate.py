"""How good the policy is on held-out prompts: one sampled answer each, the task reward and the KL per response."""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerl.reward.types import mean_metrics
from steerl.rollout.common import processes
from steerl.rollout.prompts.prompts import Prompts
from steerl.training.algorithm.experience import Scored, gather_scored, importance, score
from steerl.training.algorithm.minibatch import share
from steerl.training.run.metrics import kl_metrics
from steerl.training.settings import PPOSettings

if TYPE_CHECKING:
    from steerl.training.setup import Components


def evaluate(parts: Components, heldout: Prompts, settings: PPOSettings) -> dict[str, float]:
    """eval/reward, eval/kl, eval/length, over the first `eval_prompts` prompts; {} where there is no evaluation."""
    scored = examine(parts, heldout, settings)
    if scored is None:
        return {}
    total_B = scored.scores.total_B.double()
    found = {
        "eval/reward": float(total_B.mean()),
        "eval/kl": kl_metrics(scored, importance(scored, settings)[0]).get("kl/ref", 0.0),
        "eval/length": float(scored.rollout.lengths_B.double().mean()),
        "eval/rows": float(len(total_B)),
    } | {f"eval/{name}": float(values.double().nanmean()) for name, values in scored.scores.parts.items()}
    return found | mean_metrics(scored.scores.metrics, "eval")


def examine(parts: Components, heldout: Prompts, settings: PPOSettings) -> Scored | None:
    """The evaluation's rows, of all ranks."""
    ours = processes.start()
    rows = list(range(min(settings.eval_prompts, len(heldout))))
    if not rows:
        return None
    mine = share(rows, ours.rank, ours.world_size)
    rollout, texts = parts.sample(parts.evaluation_sampler, heldout.batch(mine or rows[:1]))
    still = getattr(parts.reward, "still", None)  # statistics that the reward keeps are of training rows alone
    everything = gather_scored(rollout, texts, still() if still else parts.reward, real=bool(mine))
    return score(parts.actor_critic, parts.reference, *everything, settings)
