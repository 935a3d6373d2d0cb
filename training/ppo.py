"""PPO: the loop. To change the algorithm, edit it.

    prompts ──> 1 sample ──> 2 score ──────────> 3 credit ─────────> 4 learn ─────────> 5 record
                rollout,     reward, old and     rewards - KL,       epochs x           metrics, samples,
                texts        reference log-      GAE, whitening,     minibatches of     evaluation,
                  ^          probs, values;      importance          the clipped loss   checkpoint
                  |          gap alarm           weights                 |
                  '-------------------------- new weights ---------------'

One step, in ten files:

    ppo.py                         this one
    rollout/engines/sampler.py     1  prompts -> Rollout, by transformers' generate with a decode loop of ours
    rollout/decoding/loop.py          its steps: forward, draw, record both log-probs, stop
    rollout/decoding/distribution.py  what a token is drawn from
    algorithm/experience.py        1, 2, 3  sample, score, credit
    model/actor_critic.py          2, 4  the forward pass of policy and value
    rollout/scoring/logprobs.py          log-probs of given tokens
    algorithm/advantages.py        3  GAE, whitening, baselines
    algorithm/update.py            4  epochs, minibatches, micro-batches, optimizer steps
    algorithm/loss.py              4  the clipped losses

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
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import Prompts
from steerl.rollout.steering import SteeringSpec
from steerl.training import steering as steered
from steerl.training.algorithm.experience import credit, gather_scored, sample, score
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
from steerl.training.setup import prepare

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
    steering: SteeringSpec | None = None,
    engine: EngineSettings | None = None,
    heldout: Prompts | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train `policy` in place; returns what summary.json holds. Stopped where SIGTERM or Ctrl-C ended the run early.

    `config` is the resolved job, for the run's folder; `heldout` are the evaluation's prompts (default: the training's)."""
    check_job(policy, prompts, sampling, settings, steering)
    settings, config = with_correction(settings, steering), config or {}
    with opened(run, config) as folder, processes.stop_signal() as stop:
        if run.resume and processes.on_main(lambda: resume.finished(folder, settings.steps, config, run, settings.schedule)):
            log_line(f"{folder}: finished already; more ppo.steps go on with it, --run.overwrite true starts again")
            return read_summary(folder)
        made_from = processes.on_main(lambda: resume.made_from(policy, prompts, heldout, reward, settings))
        parts = prepare(policy, reward, sampling, settings, run, steering, engine)
        model, reference, state = parts.actor_critic, parts.reference, parts.state
        made_from |= {"steering": parts.steering.label} if parts.steering is not None else {}
        stored = Replay(settings.replay, policy, settings, parts.steering) if settings.replay else None
        source: Any = stored or prompts
        sampler: Any = stored or parts.sampler
        count = settings.rollouts_per_step // (stored.samples if stored else sampling.n)
        tolerance = gap_tolerance(settings, model.dtype, state.accelerator.mixed_precision)
        processes.on_main(lambda: begin(folder, run))
        log = resume.open_log(folder, run, settings, state, config, made_from)
        examined = heldout if heldout is not None else prompts

        def evaluation() -> dict[str, float]:
            sampler, progress = parts.evaluation_sampler, state.step / settings.steps
            return evaluate(examined, sampler, reward, model, reference, settings, step=state.step, progress=progress)

        state.before = state.before or evaluation()

        stopped = stop.anywhere()
        while state.step < settings.steps and not stopped:
            timer = Timer()

            # 1 sample: this rank's prompts, `sampling.n` rows each; or the stored rows of a dump
            progress = state.step / settings.steps
            rows = source.take(run.seed, state.prompt_position, count)
            rollout, texts, real = sample(source, sampler, rows, step=state.step, progress=progress)
            timer.lap("sample")

            # 2 score: the reward; from here on all rows on every rank; the forward passes before learning
            rollout, texts, scores = gather_scored(rollout, texts, reward, real=real)
            timer.lap("reward")
            scored = score(model, reference, rollout, texts, scores, settings)
            metrics = rollout_metrics(scored) | check_gap(scored, tolerance, state.step) | steered.metrics(model, scored)
            metrics |= cut_prompts(source, rows)
            timer.lap("score")

            # 3 credit: rewards less KL, advantages, returns, importance weights
            experience, credit_metrics = credit(scored, settings, state.kl.coefficient)
            metrics |= credit_metrics | kl_metrics(scored, experience.importance_BR) | {"kl/coef": state.kl.coefficient}

            # 4 learn: epochs x minibatches of the clipped loss; then the weight of the KL moves
            metrics |= learn(state, experience, settings, seed=run.seed)
            state.kl.update(metrics.get("kl/ref", 0.0), len(scored.rollout))
            steered.hold_budget(parts.steering, metrics.get("steering/kl_sequence"), state.step)
            timer.lap("learn")

            # 5 record: metrics, samples, evaluation, checkpoint
            state.advance(count, metrics, timer.seconds())
            if settings.eval_every and state.step % settings.eval_every == 0:
                metrics |= evaluation()
                timer.lap("evaluate")
            tokens, kl = metrics["rollout/tokens"], metrics.get("kl/ref", 0.0)
            log.metrics(state.step, metrics | timer.metrics(tokens))
            shown = sample_rows(scored, experience, model, each=settings.samples, seed=run.seed, step=state.step)
            log.samples(state.step, shown)
            log.progress(state.step, settings.steps, reward=metrics["reward/mean"], kl=kl, tokens=int(tokens))
            stopped = stop.anywhere()
            if stopped or state.step == settings.steps or state.step % (run.save_every or SAVE_EVERY) == 0:
                checkpoint.save(
                    folder, state.step, state, keep=run.keep, config=config, log=log.position(), made_from=made_from
                )

        log.close()
        if state.step < settings.steps:
            raise Stopped(f"stopped after step {state.step} of {settings.steps} and saved; --run.resume true goes on")
        save_model(folder, model, settings)
        summary = summarize(folder, state, evaluation())
        processes.on_main(lambda: report([folder]))
    return summary
