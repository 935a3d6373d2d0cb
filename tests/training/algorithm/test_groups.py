"""Groups that say nothing: which prompts are drawn, and which rows a step learns from, against a loop over prompts one by one."""

from __future__ import annotations

import json
import signal
from collections import Counter
from itertools import islice
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from steerl.reward.types import Scores
from steerl.rollout.common.errors import ConfigError, Stopped
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.training import ppo as loop
from steerl.training.checks import check_job
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from tests.models import tiny_policy
from tests.ppo_runs import job, prompts_of

SMALL = {
    "steps": 3, "rollouts_per_step": 12, "minibatches": 2, "epochs": 1, "micro_batch_size": 5, "learning_rate": 1e-3,
    "credit": "group", "drop_equal_groups": True, "resample_tries": 2, "eval_prompts": 0, "samples": 0,
}  # fmt: skip
N = 3


def points(row: int, sample: int) -> float:
    """Two prompts of three give all their samples the same, whichever time they are drawn."""
    return 0.25 * (sample % N) if row % 3 == 0 else float(row % 2)


def scored(rollout, texts):
    pairs = zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True)
    return Scores(torch.tensor([points(row, sample) for row, sample in pairs]))


def played(folder, reward=scored, prompts=40, sampling=None, **settings):
    """(what every step learned from, its metrics): rows as (prompt, sample, tokens)."""
    learned = []
    score = loop.score

    def watched(model, reference, samples, scores, ppo):
        rollout = samples.rollout
        tokens = [row[:length] for row, length in zip(rollout.response_BR.tolist(), rollout.lengths_B.tolist(), strict=True)]
        learned.append(
            list(zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), tokens, scores.total_B.tolist(), strict=True))
        )
        assert samples.texts.prompts == [texts.table[row]["prompt"] for row in rollout.row_B.tolist()]
        return score(model, reference, samples, scores, ppo)

    policy = tiny_policy("gpt2", 0)
    texts = prompts_of(policy, prompts)
    given = {"resume": True} if (folder / "checkpoints").exists() else {}
    with patch.object(loop, "score", watched):
        train(
            policy, texts, reward, Sampling(**{"n": N, "max_new_tokens": 6, "stop_ids": [11, 17, 23], **(sampling or {})}),
            PPOSettings(**{**SMALL, **settings}), RunSettings(dir=str(folder), save_every=1, keep=9, **given),
        )  # fmt: skip
    return learned, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def by_hand(order, steps: int, count: int, tries: int):
    """Prompts one at a time, in the order of the data: the groups that each step learns from, prompts drawn, groups alike."""
    ahead = iter(order)
    for _ in range(steps):
        differ, alike, times = [], [], Counter()
        for _ in range(1 + tries):
            for row in list(islice(ahead, count - len(differ))):
                group = [(row, N * times[row] + sample) for sample in range(N)]
                times[row] += 1
                (differ if len({points(*pair) for pair in group}) > 1 else alike).append(group)
        yield (differ + alike)[:count], len(differ) + len(alike), len(alike), max(count - len(differ), 0)


@pytest.mark.parametrize(("prompts", "tries"), [(40, 2), (40, 9), (5, 3)])
def test_rows_and_counts_are_those_of_prompts_drawn_one_by_one(tmp_path, prompts, tries):
    learned, metrics = played(tmp_path, prompts=prompts, resample_tries=tries)
    order = prompts_of(tiny_policy("gpt2"), prompts).take(0, 0, 500)
    assert len(learned) == SMALL["steps"]
    filled = 0
    for rows, told, (groups, drawn, alike, missing) in zip(learned, metrics, by_hand(order, 3, 4, tries), strict=True):
        assert [row[:2] for row in rows] == [pair for group in groups for pair in group]
        assert len(rows) == told["rollout/rows"] == SMALL["rollouts_per_step"]
        assert [row[3] for row in rows] == [points(*row[:2]) for row in rows]
        assert (told["groups/drawn"], told["groups/equal"], told["groups/filled"]) == (drawn, alike, missing)
        filled += missing
    assert (filled > 0) == (tries < 9), "few tries have to end short, many to find enough"


def test_tokens_hang_on_step_prompt_and_sample_alone(tmp_path):
    """A row is what the same prompt gives by itself, whichever draw of the step it came in."""
    learned, _ = played(tmp_path, prompts=5, steps=1, resample_tries=9)
    parts, prompts, _ = job("gpt2", sampling={"n": N, "max_new_tokens": 6}, credit="group", rollouts_per_step=12)
    prompts = prompts_of(parts.policy, 5)
    seen = {sample // N for _, sample, *_ in learned[0]}
    assert seen - {0}, "a prompt has to come again within the step"
    for row, sample, tokens, _ in learned[0]:
        alone = parts.sampler.draw(prompts.batch([row], [sample // N]), step=0, progress=0.0).rollout
        at = alone.sample_B.tolist().index(sample)
        assert alone.response_BR[at, : int(alone.lengths_B[at])].tolist() == tokens


def test_all_groups_alike_end_the_step_and_leave_the_weights(tmp_path):
    learned, metrics = played(tmp_path, reward=lambda rollout, _: Scores(torch.ones(len(rollout))), steps=2, kl_coef=0.0)
    assert [len(rows) for rows in learned] == [12, 12]
    assert [(m["groups/drawn"], m["groups/draws"], m["groups/filled"]) for m in metrics] == [(12, 3, 4)] * 2
    left = load_file(tmp_path / "model" / "model.safetensors")
    for name, weight in tiny_policy("gpt2", 0).model.named_parameters():
        assert name not in left or torch.equal(left[name], weight)


def test_where_no_group_is_alike_it_is_the_plain_run(tmp_path):
    def unlike(rollout, _):
        return Scores((rollout.row_B * 31 + rollout.sample_B * 7) % 11 / 3.0)

    runs = {name: played(tmp_path / name, unlike, drop_equal_groups=name == "on", resample_tries=4) for name in ("on", "off")}
    assert runs["on"][0] == runs["off"][0]
    for on, off in zip(runs["on"][1], runs["off"][1], strict=True):
        assert {k: v for k, v in on.items() if not k.startswith(("time/", "memory/", "groups/"))} == {
            k: v for k, v in off.items() if not k.startswith(("time/", "memory/"))
        }
    saved = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in runs]
    assert saved[0] == saved[1]


def test_a_resumed_run_goes_on_where_the_prompts_were(tmp_path):
    def stops(rollout, texts):
        if bool((rollout.policy_step_B == 1).any()):
            signal.raise_signal(signal.SIGINT)
        return scored(rollout, texts)

    whole, _ = played(tmp_path / "whole")
    with pytest.raises(Stopped):
        played(tmp_path / "run", reward=stops)
    rest, metrics = played(tmp_path / "run")
    assert rest == whole[2:]
    saved = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert saved[0] == saved[1]
    assert [m["step"] for m in metrics] == [1, 2, 3]


def test_rows_that_are_screened_out_make_no_group_differ(tmp_path):
    """Only the samples that score apart are screened: what is left of every group is alike."""

    def screening(rollout, texts):
        total_B = scored(rollout, texts).total_B
        return Scores(total_B, screened_B=(rollout.row_B % 3 == 0) & (rollout.sample_B % N > 0))

    learned, metrics = played(tmp_path, reward=screening, steps=1)
    assert (metrics[0]["groups/equal"], metrics[0]["groups/filled"]) == (metrics[0]["groups/drawn"], 4)
    assert len(learned[0]) == 12
    assert metrics[0]["reward/screened"] == sum(row % 3 == 0 and s % N > 0 for row, s, *_ in learned[0]) / 12


def test_penalties_are_part_of_a_score(tmp_path):
    """All wrong, but some ran to the limit: they are not alike."""
    learned, metrics = played(
        tmp_path, reward=lambda rollout, _: Scores(torch.zeros(len(rollout))), steps=1, missing_stop_penalty=0.5
    )
    assert metrics[0]["groups/equal"] < metrics[0]["groups/drawn"]
    assert len(learned[0]) == 12


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match=r"ppo.drop_equal_groups: true, but ppo.credit gae"):
        PPOSettings(drop_equal_groups=True)
    with pytest.raises(ConfigError, match=r"ppo.resample_tries: 7 has no effect"):
        PPOSettings(resample_tries=7)
    with pytest.raises(ConfigError, match=r"ppo.resample_tries: 0"):
        PPOSettings(drop_equal_groups=True, credit="group", resample_tries=0)
    settings = PPOSettings(drop_equal_groups=True, credit="group")
    with pytest.raises(ConfigError, match=r"engine.ahead: 1 with ppo.drop_equal_groups"):
        check_job(None, None, Sampling(n=4), settings, engine=EngineSettings(kind="vllm", ahead=1))
