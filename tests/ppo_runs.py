"""What the tests of the PPO loop share: tiny jobs, and the same quantities by slow, independent definitions.

An independent definition is one row at a time: unpadded, teacher-forced, through the plain transformers forward.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from steerl.reward.build import build_reward
from steerl.reward.types import Reward, Scores
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import Prompts, PromptSettings
from steerl.rollout.types import STOP_LENGTH, Rollout, Texts
from steerl.training.algorithm.experience import credit, gather_scored, score
from steerl.training.model.actor_critic import ActorCritic
from steerl.training.settings import PPOSettings
from steerl.training.setup import Components, prepare, with_peft
from steerl.training.types import Experience
from tests.models import tiny_policy

LORA = {"peft_type": "LORA", "r": 2}


def prompts_of(policy: Policy, count: int = 40, most: int = 0) -> Prompts:
    """Prompts of one to four tokens."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = ["".join(letters[(step * i + step) % 26] for step in (1, 7, 3, 5))[: 1 + i % 4] for i in range(count)]
    return Prompts(
        [{"prompt": text, "place": i} for i, text in enumerate(texts)], "prompt", policy, PromptSettings(max_tokens=most)
    )


def share_of_threes(rollout: Rollout, texts: Texts) -> Scores:
    """A toy reward: the share of a row's ids that leave 3 when divided by 4."""
    hit_BR = (rollout.response_BR % 4 == 3) & rollout.action_mask_BR
    return Scores(hit_BR.sum(1) / rollout.actions_B.clamp(min=1))


def halves(prompts: list[str], completions: list[str], **_: object) -> list[float | None]:
    """A part that does not apply to every row: a function of the text alone, in whichever rank."""
    return [None if len(text) % 4 == 3 else float(len(text) % 3) for text in completions]


def sizes(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    return [float(len(text)) for text in completions]


def two_parts() -> Reward:
    terms = [{"name": "a", "kind": "function", "function": f"{__file__}:halves", "weight": 2.0}]
    return build_reward([*terms, {"name": "b", "kind": "function", "function": f"{__file__}:sizes", "weight": -0.1}])


def job(
    family: str = "gpt2", peft: Any = None, sampling: Any = None, steering: Any = None, overrides: Any = None, **settings: Any
) -> tuple[Components, Prompts, PPOSettings]:
    """(parts, prompts, settings) of a tiny run, ready for its first step."""
    policy = with_peft(tiny_policy(family, **(overrides or {})), peft)
    policy = dataclasses.replace(policy, like=_observed(family, peft, overrides))
    small = {"rollouts_per_step": 16, "minibatches": 2, "epochs": 2, "micro_batch_size": 5, "learning_rate": 1e-3}
    ppo = PPOSettings(**{**small, **settings})
    # Responses that end at different places: three of the ids stop.
    given = Sampling(**{"max_new_tokens": 9, "stop_ids": [11, 17, 23], **(sampling or {})})
    parts = prepare(policy, share_of_threes, given, ppo, RunSettings(), steering)
    return parts, prompts_of(policy), ppo


_OBSERVED: dict[str, Policy] = {}


def _observed(family: str, peft: Any, overrides: dict[str, Any] | None) -> Policy:
    """Its like, on which capabilities are observed once for all jobs."""
    key = repr((family, peft, overrides))
    if key not in _OBSERVED:
        with torch.random.fork_rng():
            _OBSERVED[key] = with_peft(tiny_policy(family, **(overrides or {})), peft)
    return _OBSERVED[key]


def first_scored(parts: Components, prompts: Prompts, ppo: PPOSettings, gaps: bool = False):
    rows = prompts.take(0, 0, ppo.rollouts_per_step // parts.sampler.sampling.n)
    samples = parts.sampler.draw(prompts.batch(rows), step=0)
    samples = samples._replace(rollout=with_gaps(samples.rollout)) if gaps else samples
    return score(parts.actor_critic, parts.reference, *gather_scored(samples, share_of_threes), ppo)


def first_experience(parts: Components, prompts: Prompts, ppo: PPOSettings, gaps: bool = False) -> Experience:
    return credit(first_scored(parts, prompts, ppo, gaps), ppo, ppo.kl_coef)[0]


def with_gaps(rollout: Rollout) -> Rollout:
    """The rows as if some runs of their tokens had been fed: which ones hangs on the row and sample alone. A row that ends in
    such a run is cut there; one in five has no action at all."""
    mask_BR, ended_B = rollout.extent_BR.clone(), rollout.ended_B.clone()
    for i, (row, sample, length) in enumerate(zip(rollout.row_B, rollout.sample_B, rollout.lengths_B, strict=True)):
        draw, t = random.Random(f"{int(row)} {int(sample)}"), 0
        fed = draw.random() < 0.4
        while t < int(length):
            run = draw.randint(1, 3)
            mask_BR[i, t : t + run] &= not fed
            fed, t = not fed, t + run
        if draw.random() < 1 / 5:
            mask_BR[i] = False
        ended_B[i] &= mask_BR[i, int(length) - 1]
    numbers = {
        name: torch.where(mask_BR, getattr(rollout, name), 0.0)
        for name in ("behaviour_logprobs_BR", "policy_logprobs_BR", "entropy_BR")
    }
    stop_B = torch.where(ended_B, rollout.stop_B, STOP_LENGTH)
    return dataclasses.replace(rollout, action_mask_BR=mask_BR, ended_B=ended_B, stop_B=stop_B, **numbers)


def lone_row(policy: Policy, rollout: Rollout, i: int, extra: int = 0) -> tuple[dict[str, Tensor], int]:
    """(the forward's arguments for row i by itself, unpadded; the column whose output predicts its first action)."""
    prompt = rollout.prompt_BP[i][rollout.prompt_mask_BP[i]]
    response = rollout.response_BR[i, : int(rollout.lengths_B[i])]
    if policy.is_seq2seq:
        decoder = torch.cat([torch.tensor(policy.start_ids), response])
        return {"input_ids": prompt[None], "decoder_input_ids": decoder[None]}, len(policy.start_ids) - 1
    return {"input_ids": torch.cat([prompt, response])[None]}, len(prompt) - 1


def lone_logprobs(policy: Policy, rollout: Rollout, i: int) -> Tensor:
    """Log-probs of row i's tokens, differentiable: one row, no padding, softmax of logits / temperature."""
    arguments, first = lone_row(policy, rollout, i)
    length = int(rollout.lengths_B[i])
    logits = policy.model(**arguments).logits[0, first : first + length].double() / rollout.temperature
    response = rollout.response_BR[i, :length]
    return logits.log_softmax(-1)[torch.arange(length), response]


def lone_values(actor_critic: ActorCritic, rollout: Rollout, i: int) -> Tensor:
    """Values of the states of row i before every token of the response and after the last, differentiable."""
    policy = actor_critic.value_model or actor_critic.policy
    arguments, first = lone_row(policy, rollout, i)
    caught: list[Tensor] = []
    handle = policy.core.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    policy.model(**arguments)
    handle.remove()
    hidden = caught[0][0, first : first + int(rollout.lengths_B[i]) + 1]
    return (hidden.double() @ actor_critic.head.weight.double().T + actor_critic.head.bias.double())[:, 0]


def warm_head(actor_critic: ActorCritic) -> None:
    """A head that is not zero, so that a value means something."""
    if actor_critic.head is not None:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            actor_critic.head.weight.normal_(0, 0.3, generator=draw)
            actor_critic.head.bias.fill_(0.1)
