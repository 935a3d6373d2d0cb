"""A self-check on the user's own model: score every row again by itself and say how far the recorded numbers are off.

rollout ── each row alone, unpadded, teacher-forced, float32 ──┬─ largest and mean gap, worst token
                                                               └─ above tolerance: the known mistakes are made on
                                                                  purpose, and the one that gives the recorded
                                                                  numbers is named
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from steerl.rollout.decoding.distribution import Distribution, History
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model import compat
from steerl.rollout.model.language_model import no_dropout
from steerl.rollout.model.policy import Policy
from steerl.rollout.scoring.alignment import forward_inputs, response_logits
from steerl.rollout.scoring.logprobs import teacher_forced, token_logprobs
from steerl.rollout.scoring.steered import Steers
from steerl.rollout.steering.spec.spec import ROLES
from steerl.rollout.types import Rollout

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Nats that one token may be off before a cause is looked for, by the model's dtype: below it is rounding."""

_EXPLAINED = 0.2
"""A mistake is named when making it leaves less than this share of the mean gap."""
_LIKE = 0.25
"""Noise (of a dtype, of dropout) is named when it is at least this share of the mean gap."""


@dataclass(frozen=True)
class Report:
    """What the check found."""

    largest: float
    mean: float
    rows: int
    tokens: int
    worst_row: int
    worst_sample: int
    worst_token: int
    tolerance: float
    cause: str
    """The most likely reason of a gap above the tolerance; empty below it."""

    @property
    def passed(self) -> bool:
        return self.largest <= self.tolerance

    def lines(self) -> list[str]:
        """For the user: one line, and a second with the cause where something is wrong."""
        worst = f"row {self.worst_row} sample {self.worst_sample} token {self.worst_token}"
        line = f"verify: {self.rows} rows, {self.tokens} tokens scored alone in float32: "
        line += f"gap at most {self.largest:.2e} nats ({worst}), mean {self.mean:.2e}, "
        line += f"tolerance {self.tolerance:.0e}: {'passed' if self.passed else 'FAILED'}"
        return [line] if self.passed else [line, f"verify: most likely cause: {self.cause}"]


def verify(
    policy: Policy,
    rollout: Rollout,
    sampling: Sampling | None = None,
    tolerance: float | None = None,
    steering: Steers | None = None,
) -> Report:
    """Score `rollout` again, row by row. With `sampling` the behaviour's log-probs are checked too.

    Recorded policy log-probs are steered ones where `steering`'s role says so; it must then be given.
    """
    tolerance = TOLERANCE.get(policy.core.dtype, 1e-4) if tolerance is None else tolerance
    steered = steering if steering is not None and ROLES[steering.role].learns else None
    with torch.no_grad(), no_dropout(policy.core):
        with _in_float32(policy.core):
            alone_BR = _each_alone(policy, rollout, steered)
            gap_BR = (rollout.policy_logprobs_BR - alone_BR).abs()
            if sampling is not None and not rollout.greedy and steering is None:
                gap_BR = torch.maximum(
                    gap_BR, (rollout.behaviour_logprobs_BR - _behaviour_alone(policy, rollout, sampling)).abs()
                )
        mask_BR = rollout.action_mask_BR
        gap_BR = torch.where(mask_BR, gap_BR.nan_to_num(nan=float("inf")), torch.zeros_like(gap_BR))
        if not bool(mask_BR.any()):
            return Report(0.0, 0.0, len(rollout), 0, 0, 0, 0, tolerance, "")
        worst = int(gap_BR.argmax())
        row, token = divmod(worst, rollout.response_width)
        largest = float(gap_BR.flatten()[worst])
        cause = _cause(policy, rollout, alone_BR, gap_BR, steering) if largest > tolerance else ""
    return Report(
        largest=largest,
        mean=float(gap_BR.sum() / mask_BR.sum()),
        rows=len(rollout),
        tokens=int(mask_BR.sum()),
        worst_row=int(rollout.row_B[row]),
        worst_sample=int(rollout.sample_B[row]),
        worst_token=token,
        tolerance=tolerance,
        cause=cause,
    )


def _each_alone(policy: Policy, rollout: Rollout, steering: Steers | None = None) -> Tensor:
    """Policy log-probs of every row by itself, without a single padded column."""
    alone_BR = torch.zeros_like(rollout.policy_logprobs_BR)
    for row in range(len(rollout)):
        one = rollout.select([row]).trim()
        alone_BR[row, : one.response_width] = teacher_forced(policy, one, steering=steering).logprobs_BR[0]
    return alone_BR


def _behaviour_alone(policy: Policy, rollout: Rollout, sampling: Sampling) -> Tensor:
    """Behaviour log-probs of every row by itself: the processors applied step by step to its own raw logits."""
    distribution, alone_BR = Distribution(sampling, policy), torch.zeros_like(rollout.behaviour_logprobs_BR)
    for row in range(len(rollout)):
        one = rollout.select([row]).trim()
        logits_RV = response_logits(policy, one)[0]
        start_1P = one.start_BK if one.is_encoder_decoder else one.prompt_BP
        history = History(start_1P, torch.ones_like(start_1P, dtype=torch.bool), distribution)
        for t in range(int(one.lengths_B[0])):
            scores_1V = distribution.behaviour_scores(logits_RV[t : t + 1], history)
            alone_BR[row, t] = token_logprobs(scores_1V, one.response_BR[:, t])[0]
            history.append(one.response_BR[:, t])
    return alone_BR


def _cause(policy: Policy, rollout: Rollout, alone_BR: Tensor, gap_BR: Tensor, steering: Steers | None) -> str:
    """The mistake that, made on purpose, gives the recorded numbers. The worst rows are tried; the best fit is named."""
    worst = gap_BR.sum(1).argsort(descending=True)[:8]
    part, alone_BR = rollout.select(worst), alone_BR[worst]
    recorded_BR, mask_BR = part.policy_logprobs_BR, part.action_mask_BR

    def distance(one_BR: Tensor, two_BR: Tensor) -> float:
        # Two equal -inf are no distance apart; one of them counts much, but not so much that nothing else counts.
        apart_BR = torch.where(one_BR == two_BR, torch.zeros_like(one_BR), (one_BR - two_BR).abs())
        return float(apart_BR[mask_BR].nan_to_num(nan=100.0).clamp(max=100.0).mean())

    before = distance(recorded_BR, alone_BR)
    if before <= 1e-6:
        return (
            "behaviour: the tokens come from another distribution than these sampling settings say; "
            "give verify those that were used"
        )
    distances = {}
    for text, score in _mistakes(policy, part).items():
        scores_BR = score()
        if scores_BR is not None:
            distances[text] = distance(recorded_BR, scores_BR)
    best = min(distances, key=lambda text: distances[text])
    if distances[best] <= _EXPLAINED * before:
        return best
    label = steering.label if steering is not None else "none"
    if rollout.steering and label != rollout.steering:
        return (
            f"steering: the rollout was taken under {rollout.steering}, and this pass under {label}; give verify the steering"
        )
    if policy.core.dtype != torch.float32 and distance(_each_alone(policy, part), alone_BR) > _LIKE * before:
        name = str(policy.core.dtype).removeprefix("torch.")
        return f"dtype: {name} alone rounds this much; load the model in float32, or accept the gap"
    if _dropout_noise(policy, part) > _LIKE * before:
        return "dropout: the model has dropout, and passes in training mode differ as much; call model.eval() before sampling"
    return "other weights: none of the known mistakes gives these numbers; the model may have changed since they were recorded"


def _mistakes(policy: Policy, part: Rollout) -> dict[str, Callable[[], Tensor | None]]:
    """What usually goes wrong -> the log-probs that it would have recorded, or None where it cannot be made."""

    def scored(*drop: str, shift: int = 0, temperature: float | None = None) -> Tensor | None:
        given = forward_inputs(policy, part)
        if drop and drop[0] not in given:
            return None
        logits_BSV = policy.core(**{k: v for k, v in given.items() if k not in (*drop, "logits_to_keep")}).logits
        width, end = part.response_width, logits_BSV.shape[1] - shift
        if end - width < 0:
            return None
        temperature = part.temperature if temperature is None else temperature
        return token_logprobs(logits_BSV[:, end - width : end], part.response_BR, temperature, part.kept)

    return {
        "positions: without explicit position ids padded rows count their padding; pass cumsum(mask) - 1": lambda: scored(
            "position_ids"
        ),
        "padding: without an attention mask the padding is read as text; pass the mask": lambda: scored(
            "attention_mask", "position_ids"
        ),
        "alignment: the logits are one position off; position P + t - 1 predicts response token t": lambda: scored(shift=1),
        "temperature: the recorded numbers are those of temperature 1": lambda: scored(temperature=1.0),
        "a leaking generation config: the recorded numbers went through the checkpoint's own processors; close the config": (
            lambda: _leaked(policy, part)
        ),
    }


def _leaked(policy: Policy, part: Rollout) -> Tensor | None:
    """Log-probs after the processors that the checkpoint's own generation config asks for, temperature of the rollout kept."""
    config = copy.deepcopy(policy.core.generation_config)
    config.do_sample, config.temperature = True, part.temperature
    if config.top_k is None:
        config.top_k = 50  # what generate fills in
    start = part.start_BK if part.is_encoder_decoder else part.prompt_BP
    config.max_length = start.shape[1] + part.response_width
    processors = compat.logits_processors(policy.core, config, start.shape[1], part.prompt_BP)
    logits_BRV = response_logits(policy, part).float()
    steps = [
        token_logprobs(processors(part.sequences_BS[:, : start.shape[1] + t], logits_BRV[:, t].clone()), part.response_BR[:, t])
        for t in range(part.response_width)
    ]
    return torch.stack(steps, dim=1)


def _dropout_noise(policy: Policy, part: Rollout) -> float:
    """How far two passes in training mode are apart."""
    policy.core.train()  # the caller's block puts every module's mode back
    state = torch.random.get_rng_state()
    one, two = (token_logprobs(response_logits(policy, part), part.response_BR) for _ in range(2))
    torch.random.set_rng_state(state)
    policy.core.eval()
    return float((one - two).abs()[part.action_mask_BR].mean())


@contextlib.contextmanager
def _in_float32(core: torch.nn.Module) -> Iterator[None]:
    """The model in float32 inside the block; going up and back again loses nothing."""
    before = [(tensor, tensor.dtype) for tensor in [*core.parameters(), *core.buffers()] if tensor.is_floating_point()]
    for tensor, _ in before:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)
