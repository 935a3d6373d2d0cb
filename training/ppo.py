"""PPO: the loop. To change the algorithm, edit it.

    prompts ──> 1 sample ──> 2 score ──────────> 3 credit ─────────> 4 learn ─────────> 5 record
                rollout,     reward, old and     rewards - KL,       epochs x           metrics, samples,
                texts        reference log-      GAE, whitening,     minibatches of     evaluation,
                  ^          probs, values;      importance          the clipped loss   checkpoint
                  |          gap alarm           weights                 |
                  '-------------------------- new weights ---------------'

One step, in ten files:

    ppo.py                         this one
    rollout/engines/sampler.py     1  prompts -> Samples, by transformers' generate with a decode loop of ours
    rollout/decoding/loop.py          its steps: forward, draw, record both log-probs, stop
    rollout/decoding/distribution.py  what a token is drawn from
    algorithm/experience.py        1, 2, 3  sample, score, credit
    model/actor_critic.py          2, 4  the forward pass of policy and value
    rollout/scoring/logprobs.py          log-probs of given tokens
    algorithm/advantages.py        3  GAE, whitening, baselines
    algorithm/update.py            4  epochs, minibatches, micro-batches, optimizer steps
    algorithm/loss.py              4  the clipped losses

Who draws in 1 is a RolloutSource (rollout/engines/source.py): the policy itself, a dump, one of your own. Its log-probs and the
trainer's own forward pass must agree: the gap is measured in every step and stops the run above `gap_tolerance`. From the
gathering in 2 on every rank holds all rows, so every statistic is global; metrics are made of the records (types.py) last.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

from steerl.reward.types import Reward
from steerl.rollout.common import processes
from steerl.rollout.common.errors import Stopped
from steerl.rollout.common.progress import doing
from steerl.rollout.common.run_folder import RunSettings, begin, opened
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.source import RolloutSource
from steerl.rollout.environments.environment import environment_of
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import Prompts
from steerl.rollout.steering import SteeringSpec
from steerl.training.algorithm.experience import credit, gather_scored, sample, score
from steerl.training.algorithm.groups import Groups
from steerl.training.algorithm.update import learn
from steerl.training.checks import check_job, check_objects
from steerl.training.report.page import report
from steerl.training.run import checkpoint, hub, metrics, resume
from steerl.training.run.evaluate import Evaluation, evaluate
from steerl.training.run.export import save_model, summarize
from steerl.training.run.timer import Timer
from steerl.training.settings import PPOSettings, with_correction, with_response_limit
from steerl.training.setup import check_source, longest, prepare, training_rows
from steerl.training.steering import hold_budget, measure


def train(
    policy: Policy,
    prompts: Prompts,
    reward: Reward,
    sampling: Sampling,
    settings: PPOSettings,
    run: RunSettings,
    *,
    steering: SteeringSpec | None = None,
    engine: EngineSettings | None = None,
    environment: EnvironmentSettings | None = None,
    source: RolloutSource | None = None,
    heldout: Prompts | None = None,
    config: Mapping[str, Any] | None = None,
    on_step: Callable[[int, dict[str, Any], list[dict[str, Any]]], object] | None = None,
) -> dict[str, Any]:
    """Train `policy` in place; returns what summary.json holds. Stopped where SIGTERM or Ctrl-C ended the run early.

    `on_step(step, metrics, samples)` is called on the main process after each step with what metrics.jsonl and samples.jsonl
    got; where it returns true, the run ends there as after its last step.
    `source` draws the training's rows in place of the policy, which draws the evaluation's, and is closed whatever happens.
    `config` is the resolved job, for the run's folder; `heldout` are the evaluation's prompts (default: the training's)."""
    with contextlib.ExitStack() as ending:
        check_objects(policy, prompts, reward)
        if source is not None:
            check_source(source, settings, engine, ending)
        processes.on_main(lambda: hub.check(run))
        if (adapter := getattr(policy.model, "active_peft_config", None)) is not None and not settings.export_merged:
            hub.check_base(run, str(adapter.base_model_name_or_path or ""))
        check_job(policy, prompts, sampling, settings, steering, engine, environment)
        settings = with_response_limit(settings, sampling)
        settings = with_correction(settings, steering, engine.ahead if engine is not None else 0)
        config = config or {}
        folder, stop = ending.enter_context(opened(run, config)), ending.enter_context(processes.stop_signal())
        if (summary := resume.finished_summary(folder, settings, config, run)) is not None:
            return summary
        made_from = processes.on_main(lambda: resume.made_from(policy, prompts, heldout, reward, settings))
        played = ending.enter_context(environment_of(environment, policy))
        if played is not None:
            processes.on_main(lambda: played.check(prompts))
            made_from["environment"] = played.settings.content()
        most = longest(prompts, heldout, sampling, environment)
        parts = prepare(policy, reward, sampling, settings, run, steering, engine, most, played)
        if parts.server is not None:
            ending.callback(parts.server.close)
        model, reference, state = parts.actor_critic, parts.reference, parts.state
        made_from |= {"steering": parts.steering.label} if parts.steering is not None else {}
        origin = training_rows(parts, prompts, sampling, settings, run, source, ending)
        count = settings.rollouts_per_step // origin.samples
        tolerance = metrics.gap_tolerance(settings, model.dtype, state.accelerator.mixed_precision)
        processes.on_main(lambda: begin(folder, run))
        log = resume.open_log(folder, run, settings, state, config, made_from)

        def evaluation() -> Evaluation | None:
            asked = prompts if heldout is None else heldout
            with doing(f"evaluating {min(settings.eval_prompts, len(asked))} prompts"):
                return evaluate(asked, parts.evaluation_sampler, reward, model, reference, settings, step=state.step)

        if state.reward_before is None and (before := evaluation()):
            state.reward_before = before.reward
        if state.step:
            origin.source.weights_changed(state.step)
        stopped, ended = stop.anywhere(), False
        while state.step < settings.steps and not stopped and not ended:
            timer = Timer()

            # 1 sample: this rank's prompts, n rows each; their rewards, from which on all rows are on every rank. Once, unless
            # groups that say nothing are drawn again
            groups = Groups(settings, origin.samples, count)
            while groups.missing:
                rows = origin.prompts.take(run.seed, state.prompt_position + len(groups.prompts), groups.missing)
                at, progress = state.step, state.step / settings.steps
                samples = sample(origin.prompts, origin.source, rows, step=at, progress=progress, before=groups.prompts)
                timer.lap("sample")
                groups.add(rows, *gather_scored(samples, reward))
                timer.lap("reward")
            samples, scores = groups.joined()

            # 2 score: the forward passes before learning
            scored = score(model, reference, samples, scores, settings)
            gap = metrics.check_gap(scored, tolerance, state.step, corrected=settings.correction is not None)
            steered, cut = measure(model, scored), sum(metrics.cut_prompts(origin.prompts, rows) for rows in groups.draws)
            timer.lap("score")

            # 3 credit: rewards less KL, advantages, returns, importance weights
            experience, credited = credit(scored, settings, state.kl.coefficient)

            # 4 learn: epochs x minibatches of the clipped loss; then the weight of the KL moves
            update = learn(state, experience, settings, seed=run.seed)
            origin.source.weights_changed(state.step + 1)
            stats = metrics.step_stats(scored, experience, update, gap, steered, cut_prompts=cut, kl_coef=state.kl.coefficient)
            state.kl.update(stats.kl_per_response, stats.rows)
            hold_budget(parts.steering, steered, state.step)
            timer.lap("learn")

            # 5 record: metrics, samples, evaluation, checkpoint
            state.advance(len(groups.prompts), stats, timer.seconds())
            told = metrics.step_metrics(stats, scored, credited) | groups.metrics() | metrics.of_sources(origin.prompts, scored)
            told |= parts.server.metrics() if parts.server is not None else {}
            if settings.eval_every and state.step % settings.eval_every == 0 and (found := evaluation()):
                told |= found.metrics()
                timer.lap("evaluate")
            line = log.metrics(state.step, told | timer.metrics(stats.tokens))
            shown = metrics.sample_rows(scored, experience, model, each=settings.samples, seed=run.seed, step=state.step)
            shown = log.samples(state.step, shown)
            ended = ended_by(on_step, state.step, line, shown)
            log.progress(state.step, settings.steps, reward=stats.reward, kl=stats.kl_per_response, tokens=stats.tokens)
            stopped = stop.anywhere()
            if stopped or ended or state.step == settings.steps or state.step % (run.save_every or checkpoint.SAVE_EVERY) == 0:
                kept = {"config": config, "log": log.position(), "made_from": made_from}
                with doing(f"saving step {state.step}"):
                    checkpoint.save(folder, state.step, state, keep=run.keep, **kept)

        log.close()
        if state.step < settings.steps and not ended:
            raise Stopped(f"stopped after step {state.step} of {settings.steps} and saved; --run.resume true goes on")
        with doing(f"writing {folder / 'model'}"):
            save_model(folder, model, settings)
        summary = summarize(folder, state, evaluation(), ended_of=settings.steps if ended else None)
        with doing("writing the report"):
            processes.on_main(lambda: report([folder]))
    with doing("sending the model"):  # another process may have the folder meanwhile
        hub.push_run(folder, run)
    return summary


def ended_by(on_step: Any, step: int, line: dict[str, Any], rows: list[dict[str, Any]]) -> bool:
    """Whether the program's hook ends the run here: asked on the main process, with copies, known to all."""
    if on_step is None:
        return False
    return bool(processes.on_main(lambda: bool(on_step(step, copy.deepcopy(line), copy.deepcopy(rows)))))
