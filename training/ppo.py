"""PPO: the settings and the loop. To change the algorithm, edit the loop.

    prompts ──> 1 sample ──> 2 score ──────────> 3 credit ─────────> 4 learn ─────────> 5 record
                rollout,     reward, old and     rewards - KL,       epochs x           metrics, samples,
                texts        reference log-      GAE, whitening,     minibatches of     evaluation,
                  ^          probs, values;      importance          the clipped loss   checkpoint
                  |          gap alarm           weights                 |
                  '-------------------------- new weights ---------------'

The sampler's log-probs and the trainer's own forward pass must agree: the gap is measured in every step and stops the run
above `gap_tolerance`. After the gathering in 2 every rank holds all rows, so every statistic is global (experience.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerl.reward.types import Reward
from steerl.rollout.common import processes
from steerl.rollout.common.errors import Stopped
from steerl.rollout.common.run_folder import RunSettings, begin, opened
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import Prompts
from steerl.training import steering as steered
from steerl.training.algorithm.experience import credit, gather_scored, score
from steerl.training.algorithm.update import learn
from steerl.training.checks import check_job
from steerl.training.replay import Replay
from steerl.training.report.page import report
from steerl.training.run import checkpoint, resume
from steerl.training.run.evaluate import evaluate
from steerl.training.run.export import read_summary, save_model, summarize
from steerl.training.run.log import log_line
from steerl.training.run.metrics import check_gap, cut_prompts, gap_tolerance, kl_metrics, rollout_metrics, sample_rows
from steerl.training.run.timer import Timer
from steerl.training.settings import PPOSettings, with_correction
from steerl.training.setup import open_log, prepare

SAVE_EVERY = 10
"""Steps between checkpoints where run.save_every is 0."""


def train(
    policy: Policy,
    prompts: Prompts,
    reward: Reward,
    sampling: Sampling,
    settings: PPOSettings,
    run: RunSettings,
    *,
    steering: Any = None,
    heldout: Prompts | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `policy` in place; returns what summary.json holds. Stopped where SIGTERM or Ctrl-C ended the run early.

    `config` is the resolved job, for the run's folder; `heldout` are the evaluation's prompts (default: the training's)."""
    check_job(policy, prompts, sampling, settings, steering)
    settings = with_correction(settings, steering)
    given = config or {}
    with opened(run, given) as folder, processes.stop_signal() as stop:
        if run.resume and processes.on_main(lambda: resume.finished(folder, settings.steps, given, run, settings.schedule)):
            log_line(f"{folder}: finished already; more ppo.steps go on with it, --run.overwrite true starts again")
            return read_summary(folder)
        made_from = processes.on_main(lambda: resume.made_from(policy, prompts, heldout, reward, settings))
        parts = prepare(policy, reward, sampling, settings, run, steering)
        made_from |= {"steering": parts.steering.label} if parts.steering is not None else {}
        state = parts.state
        stored = Replay(settings.replay, policy, settings, parts.steering) if settings.replay else None
        source: Any = stored or prompts
        sampler: Any = stored or parts.sampler
        count = settings.rollouts_per_step // (stored.samples if stored else sampling.n)
        tolerance = gap_tolerance(settings, parts.actor_critic.dtype, state.accelerator.mixed_precision)
        processes.on_main(lambda: begin(folder, run))
        log = open_log(folder, run, settings, state, config, made_from)
        examined = heldout if heldout is not None else prompts
        state.before = state.before or evaluate(parts, examined, settings)

        stopped = stop.anywhere()
        while state.step < settings.steps and not stopped:
            timer = Timer()

            # 1 sample: this rank's prompts, `sampling.n` rows each; or the stored rows of a dump
            rows = source.take(run.seed, state.prompt_position, count)
            rollout, texts, real = parts.draw(source, sampler, rows, progress=state.step / settings.steps)
            timer.lap("sample")

            # 2 score: the reward; from here on all rows on every rank; the forward passes before learning
            everything = gather_scored(rollout, texts, reward, real=real)
            timer.lap("reward")
            scored = score(parts.actor_critic, parts.reference, *everything, settings)
            metrics = rollout_metrics(scored) | check_gap(scored, tolerance, state.step) | steered.metrics(parts, scored)
            metrics |= cut_prompts(source, rows)
            timer.lap("score")

            # 3 credit: rewards less KL, advantages, returns, importance weights
            experience, found = credit(scored, settings, state.kl.coefficient)
            metrics |= found | kl_metrics(scored, experience.importance_BR) | {"kl/coef": state.kl.coefficient}

            # 4 learn: epochs x minibatches of the clipped loss; then the weight of the KL moves
            metrics |= learn(state, experience, settings, seed=run.seed)
            state.kl.update(metrics.get("kl/ref", 0.0), len(scored.rollout))
            steered.budget(parts, metrics, state.step)
            timer.lap("learn")

            # 5 record: metrics, samples, evaluation, checkpoint
            state.advance(count, metrics, timer.seconds())
            if settings.eval_every and state.step % settings.eval_every == 0:
                metrics |= evaluate(parts, examined, settings)
                timer.lap("evaluate")
            tokens, kl = metrics["rollout/tokens"], metrics.get("kl/ref", 0.0)
            log.metrics(state.step, metrics | timer.metrics(tokens))
            log.samples(
                state.step, sample_rows(scored, experience, parts, each=settings.samples, seed=run.seed, step=state.step)
            )
            log.progress(state.step, settings.steps, reward=metrics["reward/mean"], kl=kl, tokens=int(tokens))
            stopped = stop.anywhere()
            if stopped or state.step == settings.steps or state.step % (run.save_every or SAVE_EVERY) == 0:
                held = {"config": config, "log": log.position(), "made_from": made_from}
                checkpoint.save(folder, state.step, state, keep=run.keep, **held)

        log.close()
        if state.step < settings.steps:
            raise Stopped(f"stopped after step {state.step} of {settings.steps} and saved; --run.resume true goes on")
        save_model(folder, parts, settings)
        summary = summarize(folder, parts, evaluate(parts, examined, settings))
        processes.on_main(lambda: report([folder]))
    return summary
