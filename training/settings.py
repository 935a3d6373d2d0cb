"""PPOSettings: every setting of a PPO run, with its range; settings that contradict each other are refused here, too."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.decoding.settings import MOST_ROWS
from steerl.rollout.steering.spec.spec import Correction


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
    """Tokens in one forward pass, padding counted where there is any; unset = those of micro_batch_size rows, 0 = rows are
    counted instead."""
    packing: bool = False
    """Lay the rows of a forward pass one after another without padding when scoring and learning: the same numbers up to
    rounding, fewer tokens. Refused where the model does not keep rows apart."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time, the same gradient."""
    offload_activations: bool = False
    """Keep what the backward pass needs of the update's forward passes in host memory meanwhile: less GPU memory, more time,
    the same gradient to the bit. Beside checkpointing that is each layer's input alone. GPUs only."""
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
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps AdamW's two moments of a weight in 8 bits each, blocks of them scaled together (bitsandbytes): a quarter
    of their memory, other numbers. Of weights of fewer than 4,096 numbers they stay in float32. GPUs only, one process or
    DDP."""
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
    drop_equal_groups: bool = False
    """Prompts whose samples all score alike, which credit of groups learns nothing from, are dropped from the step, and further
    prompts drawn for them."""
    resample_tries: int = 4
    """How often further prompts are drawn in a step; groups that are missing then are filled up with equal ones."""
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
    """Importance weights for samplers whose distribution is not the policy's (top_p, penalties, older weights, steered
    exploration): of the policy loss, of the KL as a loss, and of kl/ref. The KL in the reward is weighed with the advantage
    it goes into."""
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
        if problems := out_of_range(self):
            raise ConfigError(*problems)


def out_of_range(ppo: PPOSettings) -> list[str]:
    """A line for every field of the section that is out of range by itself."""
    at_least = dict.fromkeys(("steps", "rollouts_per_step", "epochs", "minibatches", "micro_batch_size", "resample_tries"), 1)
    at_least |= dict.fromkeys(("warmup_steps", "value_warmup_steps", "eval_every", "eval_prompts", "samples"), 0)
    zero_or_more = (
        "micro_batch_tokens",
        "learning_rate",
        "value_learning_rate",
        "weight_decay",
        "max_grad_norm",
        "value_coef",
        "kl_coef",
    )
    above_zero = ("clip", "clip_high", "value_clip", "kl_target", "kl_horizon", "stop_kl", "gap_tolerance")
    problems = [
        f"ppo.{name}: {getattr(ppo, name)}, but it must be at least {low}"
        for name, low in at_least.items()
        if getattr(ppo, name) < low
    ]
    for name in (*zero_or_more, *above_zero):
        value = getattr(ppo, name)
        if value is not None and not (math.isfinite(value) and value >= 0 and (value > 0 or name in zero_or_more)):
            problems.append(
                f"ppo.{name}: {value}, but it must be a number {'above 0' if name in above_zero else 'of 0 or more'}"
            )
    for name in ("gamma", "lam"):
        if not 0 <= getattr(ppo, name) <= 1:
            problems.append(f"ppo.{name}: {getattr(ppo, name)}, but it must lie between 0 and 1")
    for name in ("entropy_coef", "missing_stop_penalty"):
        if not math.isfinite(getattr(ppo, name)):
            problems.append(f"ppo.{name}: {getattr(ppo, name)}, but it must be a finite number")
    if ppo.dual_clip is not None and not ppo.dual_clip > 1:
        problems.append(f"ppo.dual_clip: {ppo.dual_clip}, but it must be above 1 (3 is usual), or unset")
    if ppo.rollouts_per_step > MOST_ROWS:
        problems.append(f"ppo.rollouts_per_step: {ppo.rollouts_per_step}, but it must be at most {MOST_ROWS:,}")
    elif ppo.rollouts_per_step >= 1 and ppo.minibatches >= 1 and ppo.rollouts_per_step % ppo.minibatches:
        fit = [m for m in range(1, ppo.rollouts_per_step + 1) if ppo.rollouts_per_step % m == 0]
        near = min(fit, key=lambda m: abs(m - ppo.minibatches))
        problems.append(
            f"ppo.minibatches: {ppo.rollouts_per_step} rollouts_per_step cannot be split into {ppo.minibatches} equal "
            f"minibatches; {near} would do"
        )
    if ppo.kl_target is not None and ppo.kl_coef <= 0:
        problems.append(
            f"ppo.kl_coef: {ppo.kl_coef} cannot be adapted to ppo.kl_target, which multiplies it; begin with 0.05, say"
        )
    if ppo.kl_target is not None and ppo.reference == "none":
        problems.append("ppo.kl_target: there is no reference to measure the KL to; set ppo.reference to auto")
    if ppo.credit != "gae":
        unused = {"value": "separate", "value_warmup_steps": 0, "bootstrap_cut": False}
        problems += [
            f"ppo.{name}: {getattr(ppo, name)!r} has no effect with ppo.credit {ppo.credit}, which has no value; leave it out"
            for name, default in unused.items()
            if getattr(ppo, name) != default
        ]
    if ppo.drop_equal_groups and ppo.credit == "gae":
        problems.append(
            "ppo.drop_equal_groups: true, but ppo.credit gae learns from such groups, too; leave it out, or compare samples "
            "(rloo, group)"
        )
    if ppo.resample_tries != PPOSettings.resample_tries and not ppo.drop_equal_groups:
        problems.append(f"ppo.resample_tries: {ppo.resample_tries} has no effect without ppo.drop_equal_groups; leave it out")
    correction = ppo.correction
    if correction is not None and not (correction.high > 0 and 0 <= correction.low <= correction.high):
        problems.append(f"ppo.correction: low {correction.low} and high {correction.high}, but 0 <= low <= high and high > 0")
    return problems


def with_correction(settings: PPOSettings, steering: Any, ahead: int = 0) -> PPOSettings:
    """Steered exploration says itself how its rollouts are weighed, and rows drawn ahead are weighed by default, unless
    ppo.correction does."""
    given = getattr(steering, "correction", None) or (Correction() if ahead else None)
    if settings.correction is not None or given is None:
        return settings
    return dataclasses.replace(settings, correction=given)
