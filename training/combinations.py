"""Settings of a PPO job that do not go together, as far as they show without a model, data and torch: told at once."""

from __future__ import annotations

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.steering.core.table import TABLE
from steerl.rollout.steering.spec.spec import ROLES, SteeringSpec
from steerl.training.settings import PPOSettings, is_custom


def combination_problems(
    sampling: Sampling,
    ppo: PPOSettings,
    steering: SteeringSpec | None = None,
    engine: EngineSettings | None = None,
    environment: EnvironmentSettings | None = None,
) -> list[str]:
    """A line for each; checks.py knows the others."""
    engine, environment, problems = engine or EngineSettings(), environment or EnvironmentSettings(), []
    if ppo.rollouts_per_step % sampling.n:
        problems.append(
            f"ppo.rollouts_per_step: {ppo.rollouts_per_step} cannot be split into groups of sampling.n = {sampling.n} samples "
            f"per prompt; {ppo.rollouts_per_step // sampling.n * sampling.n or sampling.n} would do"
        )
    if not is_custom(ppo.credit) and ppo.credit != "gae":
        problems += group_problems(sampling, ppo)
    problems += sampling_problems(sampling, ppo, steering)
    problems += length_problems(sampling, ppo, environment)
    problems += engine_problems(engine, ppo, steering)
    problems += environment_problems(environment, engine, ppo)
    if ppo.kl_target is not None and unweighed(sampling, ppo, steering):
        problems.append(
            "ppo.kl_target: with a correction of type none the KL that is measured is the sampler's, not the policy's; "
            "set the type to token_truncate, or leave kl_target out"
        )
    if ppo.weight_decay and steering is not None and steering.role == "trainable":
        turned = [site.name for site in steering.sites if "rotation" in TABLE[site.op.type].tensors]
        problems += [
            f"ppo.weight_decay: {ppo.weight_decay:g}, but site {name!r} trains a rotation, of which decay leaves nothing after "
            "one step (torch keeps its signs as weights that no gradient reaches); set it to 0"
            for name in turned
        ]
    return problems


def group_problems(sampling: Sampling, ppo: PPOSettings) -> list[str]:
    """Of a credit that compares the samples of a prompt."""
    told = f"sampling.n: {sampling.n}, but ppo.credit {ppo.credit} compares samples of one prompt; set 2 or more"
    return [told] if sampling.n < 2 else []


def length_problems(sampling: Sampling, ppo: PPOSettings, environment: EnvironmentSettings) -> list[str]:
    """What counts the actions of a response, beside what bounds them."""
    if not ppo.counts_to_limit:
        return []
    elsewhere = "environment" if environment.given else "ppo.replay" if ppo.replay else ""
    if elsewhere:
        missing = ppo.response_limit is None
        told = f"missing; with {elsewhere} sampling.max_new_tokens does not bound a row; set the most actions of one"
        return [f"ppo.response_limit: {told}"] if missing else []
    limit = sampling.max_new_tokens if ppo.response_limit is None else ppo.response_limit
    if ppo.overlong_buffer > limit:
        told = f"{ppo.overlong_buffer} actions do not fit before the limit of {limit} (sampling.max_new_tokens)"
        return [f"ppo.overlong_buffer: {told}; lower it"]
    if ppo.overlong_buffer and limit - ppo.overlong_buffer >= sampling.max_new_tokens:
        told = f"begins after {limit - ppo.overlong_buffer} actions, which sampling.max_new_tokens {sampling.max_new_tokens}"
        return [f"ppo.overlong_buffer: {told} never passes, so it has no effect; lower ppo.response_limit"]
    return []


def engine_problems(engine: EngineSettings, ppo: PPOSettings, steering: SteeringSpec | None) -> list[str]:
    """What a server cannot do for a run."""
    if engine.kind != "vllm":
        return []
    if ppo.replay:
        return ["engine.kind: vllm, but ppo.replay reads rows where others draw; leave one of the two out"]
    if engine.ahead and ppo.drop_equal_groups:
        return [
            "engine.ahead: 1 with ppo.drop_equal_groups, which knows the step's prompts only when all is scored; set it to 0"
        ]
    if engine.ahead and steering is not None and not ROLES[steering.role].one_law:
        return [
            f"engine.ahead: 1 with steering.role {steering.role}, whose rows need a pass of the weights that drew them, gone "
            "by then; set it to 0"
        ]
    return []


def environment_problems(environment: EnvironmentSettings, engine: EngineSettings, ppo: PPOSettings) -> list[str]:
    """What does not go together with episodes."""
    if not environment.given:
        return []
    problems = []
    if ppo.replay and not ppo.eval_prompts:
        told = "has no effect with ppo.replay, whose episodes were played already, and without evaluations; leave it out"
        problems.append(f"environment: {told}")
    if engine.ahead:
        problems.append("engine.ahead: 1, but episodes are not played ahead of learning; set it to 0")
    return problems


def unweighed(sampling: Sampling, ppo: PPOSettings, steering: SteeringSpec | None) -> bool:
    """Whether rows of another distribution than the policy's count as if they were the policy's."""
    correction = ppo.correction or getattr(steering, "correction", None)
    other = ppo.replay or not sampling.is_policy or getattr(steering, "role", "") == "behaviour"
    return bool(other) and correction is not None and correction.type == "none"


def sampling_problems(sampling: Sampling, ppo: PPOSettings, steering: SteeringSpec | None = None) -> list[str]:
    """Samplers whose distribution is not the policy's need importance weights, or are refused."""
    if steering is not None and steering.role == "preventative":
        if ppo.replay:
            return [
                "steering.role: preventative learns from rows that the plain policy of today draws, and ppo.replay reads those "
                "of a dump; leave one of the two out"
            ]
        if ppo.kl_as == "loss" and ppo.reference != "none":
            return [
                "ppo.kl_as: loss has the gradient of the steered policy's KL, and steering.role preventative leaves the plain "
                "one; set it to reward, or ppo.reference to none"
            ]
    if ppo.replay:
        if ppo.correction is None:
            return [
                "ppo.correction: missing; stored rollouts come from other weights than those that learn, so the clipped ratio "
                "is off; set ppo.correction.type, for example token_truncate (none accepts the bias)"
            ]
        return []
    if sampling.greedy:
        return [
            "sampling.greedy: greedy rollouts have no distribution to weigh by, so PPO cannot learn from them; set it to false"
        ]
    if steering is not None and steering.role == "data":
        return [
            "steering.role: data is for dumps that the supervised stage clones; PPO learns with role policy, trainable, "
            "behaviour or preventative"
        ]
    weighed = steering is not None and not ROLES[steering.role].one_law
    role = "" if steering is None else steering.role
    if weighed and sampling.truncates:
        return [
            f"sampling: top_k, top_p or min_p together with steering.role {role} leaves tokens of the policy that are never "
            "drawn, so weights pi / mu are wrong; sample with the temperature alone"
        ]
    if role == "preventative" and not sampling.is_policy:
        return [
            "sampling: penalties and bans together with steering.role preventative, whose rows and KL are to be those of the "
            "plain policy that is left; sample without them"
        ]
    if not sampling.is_policy and ppo.correction is None:
        cut = sampling.truncates and not sampling.replays_mask
        what = "top_k, top_p and min_p with replay_mask false" if cut else "penalties and bans"
        remedy = "leave replay_mask out" if cut else "sample without them"
        return [
            f"sampling: {what} draw from another distribution than the policy's, so the clipped ratio would be off; {remedy}, "
            "or set ppo.correction.type, for example token_truncate (none accepts the bias)"
        ]
    if weighed and ppo.correction is None and getattr(steering, "correction", None) is None:
        return [
            f"steering.correction: missing; rollouts of steering.role {role} come from another distribution than the "
            "policy's; set its type, for example token_truncate (none accepts the bias)"
        ]
    return []
