"""PPOSettings: every setting of a PPO run, with its range; settings that contradict each other are refused here, too."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.settings_reader import near_name
from steerl.rollout.decoding.settings import MOST_ROWS, Sampling
from steerl.rollout.steering.spec.spec import Correction

LOSSES = ("ppo", "gspo", "cispo", "dppo")
CREDITS = ("gae", "rloo", "group", "reinforce_baseline")


def is_custom(name: str) -> bool:
    """Whether a setting names a function of the user's own: file.py:name or module:name."""
    return ":" in name


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
    compile: Literal["off", "auto", "on"] = "off"
    """Score and learn through compiled layers: the same numbers up to rounding, a graph instead of a launch for each operation.
    A minute at the first start, seconds later on. on refuses what cannot be compiled; auto leaves it as it is and says so."""
    gather: Literal["phase", "layers"] = "phase"
    """Where weights are spread over ranks (ZeRO-3, FSDP): bring the policy together once per sampling phase (fast, the whole
    policy on every GPU meanwhile), or layer by layer in every forward pass (slow, little memory). The same rollouts."""
    learning_rate: float = 1e-5
    """Of the policy; 0 is legal and leaves it as it is."""
    value_learning_rate: float | None = None
    """Of the value model or head; unset = learning_rate."""
    schedule: str = "constant"
    """Learning rates over the steps: constant, or falling to 0 at the end (linear, cosine); a schedule of transformers
    (cosine_with_min_lr, warmup_stable_decay, ...) or of torch.optim.lr_scheduler (StepLR, ...); or file.py:name, a function
    of (step, steps) that gives the share of the learning rates."""
    schedule_arguments: dict[str, object] | None = None
    """Further arguments of a schedule of transformers, of torch or of yours."""
    warmup_steps: int = 0
    """Steps over which the learning rates rise from 0."""
    weight_decay: float = 0.0
    """The optimizer's."""
    optimizer: str = "adamw"
    """adamw; another of torch.optim (SGD, Adafactor, ...); or module:name, such as transformers:Adafactor, or file.py:name. All
    but adamw: one process or DDP. adamw8bit keeps AdamW's two moments of a weight in 8 bits each, blocks of them scaled
    together (bitsandbytes): a quarter of their memory, other numbers. Of weights of fewer than 4,096 numbers they stay in
    float32. GPUs only."""
    optimizer_arguments: dict[str, object] | None = None
    """Further arguments of the optimizer, such as {betas: [0.9, 0.95]}."""
    max_grad_norm: float = 1.0
    """Bound of the gradient's norm, applied once before each optimizer step; 0 = no bound."""
    loss: str = "ppo"
    """Of the policy. ppo clips the ratio of each token, gspo that of the whole row; cispo bounds it as a weight and takes no
    gradient away; dppo masks tokens whose probability has moved too far. file.py:name is a function of yours."""
    clip: float = 0.2
    """The ratio new / old counts between 1 - clip and 1 + clip. With gspo it is a row's, which moves far less than a token's:
    3e-4 is usual for long rows. With cispo 1 opens the lower end, as its paper does."""
    clip_high: float | None = None
    """Upper half of the clip range; unset = clip."""
    dual_clip: float | None = None
    """Bound, as a multiple of |advantage|, on the loss of tokens with a negative advantage; above 1."""
    dppo_divergence: Literal["tv", "kl"] = "tv"
    """How dppo measures the move, of two outcomes, this token or another: the change of its probability, or KL(old || new)."""
    dppo_threshold: float | None = None
    """The move beyond which dppo masks a token that would move on; unset = 0.15 with tv, 0.05 with kl."""
    loss_reduction: Literal["token", "sequence", "constant"] = "token"
    """Mean over all tokens of the minibatch, or over its rows of the mean of each row; constant = the sum over its tokens by
    response_limit x its rows (those with actions)."""
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
    credit: str = "gae"
    """gae uses a value; the others compare the samples of one prompt (sampling.n of 2 or more) and use none: less the mean of
    the other samples (rloo), standardized among all (group), or less their mean and whitened over the step
    (reinforce_baseline). file.py:name is a function of yours, which uses what it names."""
    group_std: bool = True
    """credit group: divide by the deviation of the group's returns, or (false) take off their mean alone."""
    group_parts: bool = False
    """credit group or reinforce_baseline: standardize each part of the reward in its group before they are summed by their
    weights; the penalties for length are parts, too, their sizes the weights."""
    drop_equal_groups: bool = False
    """Prompts whose samples all score alike, which credit of groups learns nothing from, are dropped from the step, and further
    prompts drawn for them."""
    resample_tries: int = 4
    """How often further prompts are drawn in a step; groups that are missing then are filled up with equal ones."""
    whiten_rewards: bool = False
    """Scale per-token rewards to variance one, keeping their mean."""
    whiten_advantages: bool | None = None
    """Standardize the advantages of a step; unset = only with gae, reinforce_baseline and a function of yours that uses
    values."""
    bootstrap_cut: bool = False
    """Rows cut at the limit go on with the value of the state they were cut at, instead of 0."""
    missing_stop_penalty: float = 0.0
    """Taken off the score of rows that did not stop by themselves."""
    response_limit: int | None = None
    """Actions that a response may have: what loss_reduction constant divides by (x rows), and overlong_buffer counts up to;
    unset = sampling.max_new_tokens."""
    overlong_buffer: int = 0
    """Actions before response_limit over which a penalty rises from 0 to overlong_penalty, taken off the score; 0 = none."""
    overlong_penalty: float = 1.0
    """What overlong_buffer takes off a row of response_limit actions or more."""
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

    @property
    def counts_to_limit(self) -> bool:
        """Whether anything reads response_limit."""
        return self.overlong_buffer > 0 or self.loss_reduction == "constant"

    @property
    def dppo_bound(self) -> float:
        """dppo_threshold, or what is usual for the divergence."""
        usual = {"tv": 0.15, "kl": 0.05}[self.dppo_divergence]
        return usual if self.dppo_threshold is None else self.dppo_threshold


def out_of_range(ppo: PPOSettings) -> list[str]:
    """A line for every field of the section that is out of range by itself."""
    at_least = dict.fromkeys(("steps", "rollouts_per_step", "epochs", "minibatches", "micro_batch_size", "resample_tries"), 1)
    at_least |= dict.fromkeys(
        ("warmup_steps", "value_warmup_steps", "eval_every", "eval_prompts", "samples", "overlong_buffer"), 0
    )
    zero_or_more = (
        "micro_batch_tokens",
        "learning_rate",
        "value_learning_rate",
        "weight_decay",
        "max_grad_norm",
        "value_coef",
        "kl_coef",
    )
    above_zero = (
        "clip",
        "clip_high",
        "value_clip",
        "kl_target",
        "kl_horizon",
        "stop_kl",
        "gap_tolerance",
        "overlong_penalty",
        "dppo_threshold",
    )
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
    for name, choices in {"loss": LOSSES, "credit": CREDITS}.items():
        if (given := getattr(ppo, name)) not in choices and not is_custom(given):
            meant = near_name(given, choices)
            hint = f"did you mean {meant}?" if meant else "or a function of yours, file.py:name"
            problems.append(f"ppo.{name}: expected one of {', '.join(choices)}, found {given!r}; {hint}")
    if ppo.credit != "gae" and not is_custom(ppo.credit):
        unused = {"value": "separate", "value_warmup_steps": 0, "bootstrap_cut": False}
        problems += [
            f"ppo.{name}: {getattr(ppo, name)!r} has no effect with ppo.credit {ppo.credit}, which has no value; leave it out"
            for name, default in unused.items()
            if getattr(ppo, name) != default
        ]
    problems += limit_problems(ppo) + group_problems(ppo) + loss_problems(ppo)
    correction = ppo.correction
    if correction is not None and not (correction.high > 0 and 0 <= correction.low <= correction.high):
        problems.append(f"ppo.correction: low {correction.low} and high {correction.high}, but 0 <= low <= high and high > 0")
    return problems


def group_problems(ppo: PPOSettings) -> list[str]:
    """What is done within the samples of a prompt."""
    problems = []
    if ppo.drop_equal_groups and ppo.credit == "gae":
        problems.append(
            "ppo.drop_equal_groups: true, but ppo.credit gae learns from such groups, too; leave it out, or compare samples "
            "(rloo, group, reinforce_baseline)"
        )
    if ppo.resample_tries != PPOSettings.resample_tries and not ppo.drop_equal_groups:
        problems.append(f"ppo.resample_tries: {ppo.resample_tries} has no effect without ppo.drop_equal_groups; leave it out")
    if not ppo.group_std and ppo.credit != "group":
        told = f"false has no effect with ppo.credit {ppo.credit}, which has no deviation of a group; leave it out"
        problems.append(f"ppo.group_std: {told}")
    if not ppo.group_parts:
        return problems
    if ppo.credit not in ("group", "reinforce_baseline"):
        problems.append(f"ppo.group_parts: true has no effect with ppo.credit {ppo.credit}; set group or reinforce_baseline")
    if not ppo.group_std:
        problems.append("ppo.group_parts: true, but without deviations (ppo.group_std) the parts are their sum; leave one out")
    if ppo.gamma != 1:
        problems.append(f"ppo.gamma: {ppo.gamma:g}, but ppo.group_parts compares what rows earned in all; set it to 1")
    if ppo.whiten_rewards:
        problems.append("ppo.whiten_rewards: true has no effect with ppo.group_parts, which scales each part; leave it out")
    if ppo.kl_as == "reward" and ppo.kl_coef and ppo.reference != "none":
        problems.append("ppo.kl_as: reward, but with ppo.group_parts a KL is no part of the reward; set loss, or ppo.kl_coef 0")
    return problems


def limit_problems(ppo: PPOSettings) -> list[str]:
    """What counts actions up to a limit."""
    problems = []
    if ppo.overlong_penalty != PPOSettings.overlong_penalty and not ppo.overlong_buffer:
        problems.append(
            f"ppo.overlong_penalty: {ppo.overlong_penalty:g} has no effect without ppo.overlong_buffer; leave it out"
        )
    if ppo.response_limit is None:
        return problems
    if ppo.response_limit < 1:
        problems.append(f"ppo.response_limit: {ppo.response_limit}, but it must be at least 1")
    elif not ppo.counts_to_limit:
        readers = "ppo.overlong_buffer or ppo.loss_reduction constant"
        problems.append(f"ppo.response_limit: {ppo.response_limit} has no effect without {readers}; leave it out")
    elif ppo.overlong_buffer > ppo.response_limit:
        told = f"{ppo.overlong_buffer} actions do not fit before the limit of {ppo.response_limit} (ppo.response_limit)"
        problems.append(f"ppo.overlong_buffer: {told}; lower it")
    return problems


def loss_problems(ppo: PPOSettings) -> list[str]:
    """Settings of another loss than the one that is chosen."""
    unused = {
        "ppo": ("dppo_divergence", "dppo_threshold"),
        "gspo": ("dppo_divergence", "dppo_threshold"),
        "cispo": ("dppo_divergence", "dppo_threshold", "dual_clip"),
        "dppo": ("clip", "clip_high", "dual_clip"),
    }.get(ppo.loss, ())
    return [
        f"ppo.{name}: {getattr(ppo, name)!r} has no effect with ppo.loss {ppo.loss}; leave it out"
        for name in unused
        if getattr(ppo, name) != getattr(PPOSettings, name)
    ]


def with_response_limit(settings: PPOSettings, sampling: Sampling) -> PPOSettings:
    """A response may be as long as it is drawn at most, where something counts up to its limit and none was given."""
    if settings.response_limit is not None or not settings.counts_to_limit:
        return settings
    return dataclasses.replace(settings, response_limit=sampling.max_new_tokens)


def with_correction(settings: PPOSettings, steering: Any, ahead: int = 0) -> PPOSettings:
    """Steered exploration says itself how its rollouts are weighed, and rows drawn ahead are weighed by default, unless
    ppo.correction does."""
    given = getattr(steering, "correction", None) or (Correction() if ahead else None)
    if settings.correction is not None or given is None:
        return settings
    return dataclasses.replace(settings, correction=given)
