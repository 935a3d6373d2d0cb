"""Rows with gaps, a whole step of them: every number is that of the rows with their gaps cut out, and of loops over actions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerl.reward.types import Scores
from steerl.rollout.types import Rollout, Texts
from steerl.training.algorithm import kl
from steerl.training.algorithm.experience import credit
from steerl.training.algorithm.importance import Correction
from steerl.training.algorithm.update import learn
from steerl.training.run.metrics import check_gap, kl_per_response, sample_rows, step_metrics, step_stats
from steerl.training.settings import PPOSettings
from steerl.training.types import PolicyOutput, Scored
from tests.ppo_runs import first_scored, job, warm_head

# -- rows by chance ------------------------------------------------------------------------------------------------------


def places_by_chance(draw: random.Random) -> list[tuple[list[int], int]]:
    """(where the actions are, the extent) of each row: runs of both kinds; some rows begin or end with what they were fed, some
    have one action or none."""
    rows = []
    for _ in range(draw.randint(2, 6)):
        flags: list[bool] = []
        acts = draw.random() < 0.6
        while not flags or (len(flags) < 12 and draw.random() < 0.7):
            flags += [acts] * draw.randint(1, 3)
            acts = not acts
        kind = draw.random()
        if kind < 0.1:
            flags = [False] * len(flags)
        elif kind < 0.2:
            flags = [t == len(flags) // 2 for t in range(len(flags))]
        rows.append(([t for t, acts in enumerate(flags) if acts], len(flags)))
    if not any(own for own, _ in rows):
        rows[0] = ([0], 1)
    return rows


def cut_out(value_BR: Tensor, places: list[list[int]]) -> Tensor:
    """(B, most actions): each row's entries at its actions, then 0."""
    width = max(1, *map(len, places))
    rows = [torch.cat([row[own], row.new_zeros(width - len(own))]) for row, own in zip(value_BR, places, strict=True)]
    return torch.stack(rows)


def scored_by_chance(draw: random.Random, with_reference: bool, per_turn: bool):
    """(a step's scored rows with gaps, where their actions are, numbers of the policy that learns). NaN at all else."""
    rows = places_by_chance(draw)
    places, width = [own for own, _ in rows], max(extent for _, extent in rows)

    def numbers(mean: Tensor | float = 0.0, spread: float = 1.0) -> Tensor:
        drawn = [[draw.gauss(0, spread) if t in own else math.nan for t in range(width)] for own in places]
        return torch.tensor(drawn).double() + mean

    old_BR = numbers(-2.0, 0.5)
    ended_B = torch.tensor([bool(own) and own[-1] + 1 == extent and draw.random() < 0.5 for own, extent in rows])
    rollout = Rollout.of_ids(
        [[1] * draw.randint(1, 3) for _ in rows],
        [[draw.randrange(2, 9) for _ in range(extent)] for _, extent in rows],
        action_mask_BR=torch.tensor([[t in own for t in range(width)] for own in places]),
        ended_B=ended_B,
        behaviour_logprobs_BR=numbers(old_BR, 0.3).float(),
        policy_logprobs_BR=numbers(old_BR, 0.01).float(),
        row_B=torch.tensor([i // 3 for i in range(len(rows))]),
        sample_B=torch.tensor([i % 3 for i in range(len(rows))]),
    )
    scores = Scores(torch.tensor([draw.gauss(0, 1) for _ in rows]))
    if per_turn:
        turns_BR = torch.full((len(rows), width), math.nan)
        for i, own in enumerate(places):
            for t in own:
                turns_BR[i, t] = 0.0 if t + 1 in own else draw.gauss(0, 1)
        scores = Scores(torch.where(rollout.action_mask_BR, turns_BR, 0.0).sum(1), tokens_BR=turns_BR)
    scored = Scored(
        rollout=rollout,
        texts=texts_of(len(rows)),
        scores=scores,
        old_logprobs_BR=old_BR,
        reference_logprobs_BR=numbers(old_BR, 0.4) if with_reference else None,
        values_BR=numbers(),
        after_B=torch.where(ended_B, 0.0, torch.tensor([draw.gauss(0, 1) for _ in rows])).double(),
        entropy_BR=numbers(),
        seconds={},
    )
    return scored, places, [numbers(old_BR, 0.3), numbers(scored.values_BR, 0.3), numbers()]


def texts_of(rows: int) -> Texts:
    return Texts(prompts=[""] * rows, prompt_texts=[""] * rows, completions=[""] * rows)


def rows_without_gaps(scored: Scored, places: list[list[int]]) -> Scored:
    """Built anew from each row's actions: one turn, side by side, from the first column on."""
    rollout, short = scored.rollout, {}
    for name in ("old_logprobs_BR", "reference_logprobs_BR", "values_BR", "entropy_BR"):
        value_BR = getattr(scored, name)
        short[name] = None if value_BR is None else cut_out(value_BR, places)
    tokens_BR = scored.scores.tokens_BR
    scores = dataclasses.replace(scored.scores, tokens_BR=None if tokens_BR is None else cut_out(tokens_BR, places))
    prompts = [row[own].tolist() for row, own in zip(rollout.prompt_BP, rollout.prompt_mask_BP, strict=True)]
    width = max(1, *map(len, places))
    own = Rollout.of_ids(
        prompts,
        cut_out(rollout.response_BR, places),
        lengths_B=[len(row) for row in places],
        ended_B=rollout.ended_B,
        behaviour_logprobs_BR=cut_out(rollout.behaviour_logprobs_BR, places),
        policy_logprobs_BR=cut_out(rollout.policy_logprobs_BR, places),
        row_B=rollout.row_B,
        sample_B=rollout.sample_B,
    )
    assert own.response_width == width and own.turns == [[(0, len(row))] if row else [] for row in places]
    return dataclasses.replace(scored, rollout=own, scores=scores, **short)


def settings_by_chance(draw: random.Random) -> PPOSettings:
    kinds = (
        "token_truncate",
        "token_mask",
        "sequence_truncate",
        "sequence_mask",
        "geometric_truncate",
        "geometric_mask",
        "none",
    )
    loss = draw.choice(["ppo", "ppo", "gspo", "cispo", "dppo"])
    reduction = draw.choice(["token", "sequence", "constant"])
    return PPOSettings(
        loss=loss,
        clip=0.2 if loss == "dppo" else draw.choice([0.2, 0.02]),
        dppo_divergence=draw.choice(["tv", "kl"]) if loss == "dppo" else "tv",
        dppo_threshold=0.01 if loss == "dppo" else None,
        response_limit=20 if reduction == "constant" else None,
        credit=draw.choice(["gae", "gae", "rloo", "group", "reinforce_baseline"]),
        gamma=draw.choice([1.0, 0.9]),
        lam=draw.choice([1.0, 0.8]),
        whiten_rewards=draw.random() < 0.3,
        whiten_advantages=draw.choice([None, True, False]),
        kl_as=draw.choice(["reward", "loss"]),
        kl_estimator=draw.choice(["k1", "k2", "k3"]),
        correction=draw.choice([None, *(Correction(kind, high=1.3, low=0.7) for kind in kinds)]),
        missing_stop_penalty=draw.choice([0.0, 0.7]),
        loss_reduction=reduction,
        entropy_coef=draw.choice([0.0, 0.05]),
        value_clip=draw.choice([None, 0.2]),
        dual_clip=draw.choice([None, 1.5]) if loss in ("ppo", "gspo") else None,
        stop_kl=draw.choice([None, 0.04]),
        epochs=1,
        minibatches=draw.randint(1, 2),
        micro_batch_size=draw.randint(2, 4),
        micro_batch_tokens=draw.choice([None, 0]),
        max_grad_norm=draw.choice([0.0, 0.1]),
        steps=100,
    )


# -- a step of a policy that is a table ----------------------------------------------------------------------------------


class Table(nn.Module):
    """A log-prob, a value and an entropy for every action, each a weight by itself: what learns is the update's gradient."""

    recomputing = staticmethod(contextlib.nullcontext)

    def __init__(self, rollout: Rollout, numbers: list[Tensor], with_value: bool):
        super().__init__()
        self.place = {key: i for i, key in enumerate(zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True))}
        self.numbers = nn.ParameterList(value.nan_to_num(0.0).clone() for value in numbers)
        self.with_value = with_value

    def forward(self, rollout: Rollout, *, entropy: bool, **_: Any) -> PolicyOutput:
        index = [self.place[key] for key in zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True)]
        shown = [value[index, : rollout.response_width] for value in self.numbers]
        new_BR, values_BR, entropy_BR = (torch.where(rollout.action_mask_BR, value, 0.0) for value in shown)
        return PolicyOutput(new_BR, entropy_BR if entropy else None, values_BR if self.with_value else None)


def a_step(scored: Scored, numbers: list[Tensor], ppo: PPOSettings) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What credit, metrics and a whole update make of the rows: per token, and in one number."""
    experience, said = credit(scored, ppo, 0.3)
    table = Table(scored.rollout, numbers, ppo.credit == "gae")
    groups = [{"params": list(table.parameters()), "name": "policy", "lr": 0.5, "base_lr": 0.5}]
    accelerator = SimpleNamespace(
        backward=lambda total: total.backward(),
        no_sync=lambda _: contextlib.nullcontext(),
        clip_grad_norm_=nn.utils.clip_grad_norm_,
    )
    state: Any = SimpleNamespace(
        model=table, module=table, step=7, kl=kl.FixedKL(0.3), accelerator=accelerator, optimizer=torch.optim.SGD(groups)
    )
    gap = check_gap(scored, 1e9, 0, corrected=True)
    stats = step_stats(scored, experience, learn(state, experience, ppo, seed=3), gap, None, cut_prompts=0, kl_coef=0.3)
    said = step_metrics(stats, scored, said)
    tokens = {name: getattr(experience, name) for name in ("rewards_BR", "advantages_BR", "returns_BR", "importance_BR")}
    learned = zip(("logprobs", "values", "entropies"), table.numbers, numbers, strict=True)
    tokens |= {f"learned {name}": value.detach() - before.nan_to_num(0.0) for name, value, before in learned}
    tokens = {name: value for name, value in tokens.items() if value is not None}
    rows = kl_per_response(scored, experience.importance_BR)
    return tokens, said | {f"kl of row {i}": float(value) for i, value in enumerate(rows)}


def test_a_step_is_that_of_the_rows_with_their_gaps_cut_out():
    """500 masks, all settings of credit and loss: what the actions get, the gaps nothing, and every number that is told."""
    for seed in range(500):
        draw = random.Random(seed)
        scored, places, numbers = scored_by_chance(draw, draw.random() < 0.7, draw.random() < 0.5)
        ppo = settings_by_chance(draw)
        tokens, said = a_step(scored, numbers, ppo)
        short = rows_without_gaps(scored, places)
        own_tokens, own_said = a_step(short, [cut_out(value, places) for value in numbers], ppo)
        assert tokens.keys() == own_tokens.keys() and said.keys() == own_said.keys()
        for name, value in tokens.items():
            assert value[~scored.rollout.action_mask_BR].eq(0).all(), (seed, name)
            assert torch.allclose(cut_out(value, places), own_tokens[name], rtol=1e-5, atol=1e-6), (seed, name)
        least = tokens["advantages_BR"][scored.rollout.action_mask_BR].abs().min()
        rounding = ppo.credit != "gae" and float(least) < 1e-5  # its sign says whether a ratio counts as clipped
        for name, number in said.items():
            if not (rounding and name == "ppo/clip_fraction"):
                assert number == pytest.approx(own_said[name], rel=1e-5, abs=1e-6), (seed, name)


def test_rows_without_actions_are_as_if_they_were_not_there():
    """But for what counts rows, their lengths and their scores."""
    counts = ("rollout/rows", "rollout/length_mean", "rollout/ended", "reward/mean", "reward/std")
    empty = 0
    for seed in range(100):
        draw = random.Random(seed)
        scored, places, numbers = scored_by_chance(draw, True, False)
        ppo = dataclasses.replace(settings_by_chance(draw), minibatches=1)
        acting = [i for i, own in enumerate(places) if own]
        empty += len(acting) < len(places)
        fields = {name: value[acting] for name, value in vars(scored).items() if isinstance(value, Tensor)}
        less = dataclasses.replace(
            scored,
            rollout=scored.rollout.select(acting),
            texts=scored.texts.select(acting),
            scores=Scores(scored.scores.total_B[acting]),
            **fields,
        )
        tokens, said = a_step(scored, numbers, ppo)
        own_tokens, own_said = a_step(less, [value[acting] for value in numbers], ppo)
        for name, value in tokens.items():
            assert torch.allclose(value[acting], own_tokens[name], rtol=1e-5, atol=1e-6), (seed, name)
        for name, number in own_said.items():
            if name not in counts and not name.startswith("kl of row"):
                assert said[name] == pytest.approx(number, rel=1e-5, abs=1e-6), (seed, name)
    assert empty > 10


def test_rows_for_the_viewer_say_which_tokens_were_fed():
    parts, prompts, ppo = job("gpt2")
    warm_head(parts.actor_critic)
    scored = first_scored(parts, prompts, ppo, gaps=True)
    experience, _ = credit(scored, ppo, 0.05)
    rows = sample_rows(scored, experience, parts.actor_critic, each=4, seed=0, step=1)
    lists = ("policy_logprobs", "gap", "behaviour_logprobs", "reference_logprobs", "entropy", "values", "rewards", "advantages")
    for row in rows:
        acts = row.get("action_mask", [True] * len(row["response_ids"]))
        for name in (*lists, "returns", "ratio"):
            assert [value is not None for value in row[name]] == acts, name
        assert [value for value in row["ratio"] if value is not None] == pytest.approx([1.0] * sum(acts), abs=1e-5)
    assert {all(row.get("action_mask", [True])) for row in rows} == {True, False}
    assert not any(all(row.get("action_mask", [False])) for row in rows)  # only where there are gaps


# -- loops over actions --------------------------------------------------------------------------------------------------


def credit_by_hand(scored: Scored, places: list[list[int]], ppo: PPOSettings, kl_coef: float):
    """{(row, place): (reward, advantage, return)}: each row a list of its actions, in Python's floats."""
    rewards: list[list[float]] = []
    for i, own in enumerate(places):
        task = [0.0] * len(own)
        if scored.scores.tokens_BR is not None:
            task = [float(scored.scores.tokens_BR[i, t]) for t in own]
        elif own:
            task[-1] = float(scored.scores.total_B[i])
        if own and not scored.rollout.ended_B[i]:
            task[-1] -= ppo.missing_stop_penalty
        if scored.reference_logprobs_BR is not None and ppo.kl_as == "reward":
            for k, t in enumerate(own):
                d = float(scored.old_logprobs_BR[i, t] - scored.reference_logprobs_BR[i, t])
                task[k] -= kl_coef * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[ppo.kl_estimator]
        rewards.append(task)
    if ppo.whiten_rewards:
        every = [value for row in rewards for value in row]
        middle = fmean(every)
        spread = math.sqrt(fmean((value - middle) ** 2 for value in every) + 1e-8)
        rewards = [[(value - middle) / spread + middle for value in row] for row in rewards]
    advantages: list[list[float]] = []
    returns: list[list[float]] = []
    totals = [sum(ppo.gamma**k * value for k, value in enumerate(row)) for row in rewards]
    groups = scored.rollout.row_B.tolist()
    for i, own in enumerate(places):
        if ppo.credit == "gae":
            values = [float(scored.values_BR[i, t]) for t in own] + [float(scored.after_B[i])]
            delta = [rewards[i][k] + ppo.gamma * values[k + 1] - values[k] for k in range(len(own))]
            decay = ppo.gamma * ppo.lam
            row = [sum(decay ** (j - k) * delta[j] for j in range(k, len(own))) for k in range(len(own))]
            returns.append([a + v for a, v in zip(row, values, strict=False)])
        else:
            same = [totals[j] for j in range(len(places)) if groups[j] == groups[i] and places[j]]
            centred = totals[i] - fmean(same) if own else 0.0
            if ppo.credit == "rloo":  # less the mean of the others
                centred *= len(same) / (len(same) - 1) if len(same) > 1 else 0.0
            elif ppo.credit == "group" and len(same) > 1:
                centred /= math.sqrt(sum((x - fmean(same)) ** 2 for x in same) / (len(same) - 1)) + 1e-4
            row = [centred] * len(own)
            returns.append([totals[i]] * len(own))
        advantages.append(row)
    if ppo.whiten_advantages or (ppo.whiten_advantages is None and ppo.credit in ("gae", "reinforce_baseline")):
        every = [value for row in advantages for value in row]
        middle = fmean(every)
        spread = math.sqrt(fmean((value - middle) ** 2 for value in every) + 1e-8)
        advantages = [[(value - middle) / spread for value in row] for row in advantages]
    return [(i, t, rewards[i][k], advantages[i][k], returns[i][k]) for i, own in enumerate(places) for k, t in enumerate(own)]


def test_credit_is_a_loop_over_the_actions():
    for seed in range(500):
        draw = random.Random(1000 + seed)
        scored, places, _ = scored_by_chance(draw, draw.random() < 0.7, draw.random() < 0.5)
        ppo = settings_by_chance(draw)
        experience, _ = credit(scored, ppo, 0.3)
        for i, t, *expected in credit_by_hand(scored, places, ppo, 0.3):
            made = (experience.rewards_BR, experience.advantages_BR, experience.returns_BR)
            assert [float(value[i, t]) for value in made] == pytest.approx(expected, rel=2e-5, abs=2e-5), (seed, i, t)


@pytest.mark.parametrize(
    ("gamma", "tokens", "expected"),
    [
        (1.0, None, [1, 1, 0, 0, 1]),
        (0.9, None, [0.81, 0.9, 0, 0, 1]),
        # a reward of each turn, on its last action
        (1.0, [0, 2, 0, 0, 3], [5, 5, 0, 0, 3]),
        # what stands at a token that was fed is nobody's
        (1.0, [0, 2, 7, 0, 3], [5, 5, 0, 0, 3]),
    ],
)
def test_an_episode_of_two_turns(gamma, tokens, expected):
    """The worked row of docs/ppo-details.md."""
    rollout = Rollout.of_ids([[4]], [[5, 6, 7, 8, 9]], action_mask_BR=[[1, 1, 0, 0, 1]])
    zeros = torch.zeros(1, 5)
    scores = Scores(torch.ones(1), tokens_BR=None if tokens is None else torch.tensor([tokens]))
    scored = Scored(
        rollout=rollout, texts=texts_of(1), scores=scores, old_logprobs_BR=zeros, reference_logprobs_BR=None,
        values_BR=zeros, after_B=torch.zeros(1), entropy_BR=zeros, seconds={},
    )  # fmt: skip
    experience, _ = credit(scored, PPOSettings(gamma=gamma, lam=1.0, whiten_advantages=False), 0.0)
    for found_BR in (experience.advantages_BR, experience.returns_BR):
        assert found_BR.tolist() == ([expected] if gamma == 1 else [pytest.approx(expected)])
