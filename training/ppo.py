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

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from steerl.rollout.common import processes
from steerl.rollout.common.errors import Stopped, UserError
from steerl.rollout.common.run_folder import RunSettings, begin, opened
from steerl.training import steering as steered
from steerl.training.algorithm.experience import credit, gather_scored, score
from steerl.training.algorithm.importance import Correction
from steerl.training.algorithm.update import learn
from steerl.training.checks import check_job, settings_problems
from steerl.training.replay import Replay
from steerl.training.report.page import report
from steerl.training.run import checkpoint, resume
from steerl.training.run.evaluate import evaluate
from steerl.training.run.export import read_summary, save_model, summarize
from steerl.training.run.log import log_line
from steerl.training.run.metrics import check_gap, cut_prompts, gap_tolerance, kl_metrics, rollout_metrics, sample_rows
from steerl.training.run.timer import Timer
from steerl.training.setup import open_log, prepare

if TYPE_CHECKING:
    from steerl.reward.types import Reward
    from steerl.rollout.decoding.settings import Sampling
    from steerl.rollout.model.policy import Policy
    from steerl.rollout.prompts.prompts import Prompts

SAVE_EVERY = 10
"""Steps between checkpoints where run.save_every is 0."""


@dataclass(frozen=True)
class PPOSettings:
    """What PPO does with the rollouts."""

    steps: int = 100
    """Steps of training; each samples afresh."""
    rollouts_per_step: int = 64
    """Samples in a step, over all ranks; a multiple of sampling.n and of minibatches."""
    epochs: int = 4
    """Times that every rollout is learned from in its step."""
    minibatches: int = 4
    """Parts of a step's rollouts; one optimizer step for each, in every epoch."""
    micro_batch_size: int = 16
    """Rows of full length in one forward pass, or as many tokens of shorter rows: memory only, the gradient is the same for
    every value."""
    micro_batch_tokens: int | None = None
    """Tokens in one forward pass, padding counted; unset = those of micro_batch_size rows, 0 = rows are counted instead."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same gradient."""
    gather: Literal["phase", "layers"] = "phase"
    """Where weights are spread over ranks (ZeRO-3, FSDP): bring the policy together once per sampling phase (fast, the whole
    policy on every GPU meanwhile), or layer by layer in every forward pass (slow, little memory). The same rollouts."""
    learning_rate: float = 1e-5
    """Of the policy; 0 is legal and leaves it as it is."""
    value_learning_rate: float | None = None
    """Of the value model or head; unset = learning_rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rates over the steps: as they are, or falling to 0 at the end."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise from 0."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """Bound of the gradient's norm, applied once before each optimizer step; 0 = no bound."""
    clip: float = 0.2
    """The ratio new / old counts between 1 - clip and 1 + clip."""
    clip_high: float | None = None
    """Upper half of the clip range; unset = clip."""
    dual_clip: float | None = None
    """Bound, as a multiple of |advantage|, on the loss of tokens with a negative advantage; above 1."""
    loss_reduction: Literal["token", "sequence"] = "token"
    """Mean over all tokens of the minibatch, or over its rows of the mean of each row."""
    value_clip: float | None = 0.2
    """How far a value may move from its old one before its loss stops falling; null = no bound."""
    value_coef: float = 0.1
    """Weight of the value loss beside the policy loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    gamma: float = 1.0
    """Discount per token."""
    lam: float = 0.95
    """GAE's lambda."""
    credit: Literal["gae", "rloo", "group"] = "gae"
    """gae uses a value; rloo and group compare the samples of one prompt (sampling.n of 2 or more) and use none."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance one, keeping their mean."""
    whiten_advantages: bool | None = None
    """Standardize the advantages of a step; unset = only with gae."""
    bootstrap_cut: bool = False
    """Rows cut at the limit go on with the value of the state they were cut at, instead of 0."""
    missing_stop_penalty: float = 0.0
    """Taken off the score of rows that did not stop by themselves."""
    kl_coef: float = 0.05
    """Weight of the KL to the reference; where kl_target is set, the one to begin with."""
    kl_target: float | None = None
    """KL per response (nats, k1, summed over tokens: kl/ref) that an adaptive weight steers towards; unset = kl_coef stays."""
    kl_horizon: float = 10_000.0
    """Rollouts over which the adaptive weight moves."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Of the KL to the reference, per token (see kl.py). In the reward only k1 has the gradient of the KL."""
    kl_as: Literal["reward", "loss"] = "reward"
    """Take the KL off the per-token rewards, or add it to the loss in a form with the right gradient."""
    stop_kl: float | None = None
    """Ends the epochs of a step when ppo/approx_kl of a minibatch exceeds it; unset = never."""
    reference: Literal["auto", "copy", "adapter", "none"] = "auto"
    """What the KL is measured to: a frozen copy of the policy as it starts, the policy with its adapter off, or nothing.
    auto = adapter where model.peft adds one, else copy."""
    value: str = "separate"
    """separate = a model of its own, from the policy's weights; shared = a head on the policy's; or a folder with a
    language model or a reward model to start from."""
    value_warmup_steps: int = 0
    """First steps in which only the value learns."""
    correction: Correction | None = None
    """Importance weights for samplers whose law is not the policy's (top_p, penalties, older weights, steered exploration):
    of the policy loss, of the KL as a loss, and of kl/ref. The KL in the reward is weighed with the advantage it goes into."""
    replay: str | None = None
    """A dump of rollouts to learn from instead of sampling."""
    gap_tolerance: float | None = None
    """Largest difference (nats) allowed between the sampler's log-prob of any token and the trainer's; unset = 0.001 in
    float32, 1 in half precision."""
    eval_every: int = 0
    """Steps between evaluations on held-out prompts; 0 = before the first and after the last step only."""
    eval_prompts: int = 64
    """Prompts of an evaluation, one sample each; 0 = no evaluation."""
    samples: int = 2
    """Rows of each kind (best, worst, random) that a step writes to samples.jsonl; 0 = none."""
    export_merged: bool = False
    """RUN/model is a plain model with the adapter merged in, instead of the adapter."""

    def __post_init__(self) -> None:
        if problems := settings_problems(self):
            raise UserError(*problems)


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


def with_correction(settings: PPOSettings, steering: Any) -> PPOSettings:
    """Steered exploration says itself how its rollouts are weighed, unless ppo.correction does."""
    given = getattr(steering, "correction", None)
    if settings.correction is not None or given is None:
        return settings
    return dataclasses.replace(settings, correction=given)
