"""Whoever draws: the loop's calls of a source, what a source may not give, and that no metric's name leads a run."""

from __future__ import annotations

import dataclasses
import json
import runpy
import signal
from pathlib import Path

import pytest
import torch

from steerl.rollout.common.errors import Stopped, UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.source import checked
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import load_spec
from steerl.rollout.types import Samples
from steerl.training import ppo
from steerl.training.algorithm.importance import Correction
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from tests.models import tiny_policy
from tests.ppo_runs import prompts_of, share_of_threes

TABLE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "toy_engine.py"))
SAMPLING = Sampling(max_new_tokens=6, n=2)
SETTINGS = PPOSettings(steps=3, rollouts_per_step=8, minibatches=2, epochs=1, eval_prompts=4, learning_rate=1e-3, samples=0)
TOKEN = Correction("token_truncate")


class Noted:
    """A Sampler of the policy itself, its calls written down, its answers changed by `change`."""

    def __init__(self, policy, sampling=SAMPLING, change=lambda samples: samples):
        self.sampler, self.change, self.calls = Sampler(policy, sampling), change, []

    def draw(self, prompts, /, *, step, progress):
        self.calls.append(("draw", step, round(progress, 3), len(prompts)))
        return self.change(self.sampler.sample(prompts, step=step, progress=progress))

    def weights_changed(self, step):
        self.calls.append(("weights_changed", step))

    def close(self):
        self.calls.append(("close",))


def run(
    folder,
    source=None,
    policy=None,
    reward=share_of_threes,
    resume=False,
    engine=None,
    sampling=SAMPLING,
    steering=None,
    **settings,
):
    policy = policy or tiny_policy("gpt2")
    ready = source(policy) if callable(source) else source
    where = RunSettings(dir=str(folder), resume=resume, save_every=1)
    settings = dataclasses.replace(SETTINGS, **settings)
    train(policy, prompts_of(policy), reward, sampling, settings, where, engine=engine, source=ready, steering=steering)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


# -- the calls -------------------------------------------------------------------------------------------------------


def test_a_source_is_asked_each_step_told_of_each_update_and_closed_once(tmp_path):
    made = []
    run(tmp_path / "own", lambda policy: made.append(Noted(policy)) or made[0])
    steps = [[("draw", step, round(step / 3, 3), 4), ("weights_changed", step + 1)] for step in range(3)]
    assert made[0].calls == [*steps[0], *steps[1], *steps[2], ("close",)]
    run(tmp_path / "plain")
    assert weights(tmp_path / "own") == weights(tmp_path / "plain"), "it draws what the policy draws"


def test_a_resumed_run_tells_its_source_of_the_weights_before_it_asks(tmp_path):
    def interrupted(rollout, texts):
        if bool((rollout.policy_step_B == 1).any()) and len(rollout) == 8:
            signal.raise_signal(signal.SIGINT)
        return share_of_threes(rollout, texts)

    made = []
    note = lambda policy: made.append(Noted(policy)) or made[-1]  # noqa: E731
    with pytest.raises(Stopped):
        run(tmp_path / "run", note, reward=interrupted)
    assert made[0].calls[-2:] == [("weights_changed", 2), ("close",)]
    run(tmp_path / "run", note, resume=True)
    assert made[1].calls == [("weights_changed", 2), ("draw", 2, 0.667, 4), ("weights_changed", 3), ("close",)]
    run(tmp_path / "run", note, resume=True)
    assert made[2].calls == [("close",)], "it was finished"


def test_a_source_is_closed_whatever_ends_the_run(tmp_path):
    def broken(rollout, texts):
        raise ZeroDivisionError

    def gone(samples):
        raise ConnectionError

    cases = (
        ({"reward": broken}, ZeroDivisionError),
        ({"source": lambda policy: Noted(policy, change=gone)}, ConnectionError),
        ({"rollouts_per_step": 9, "minibatches": 3}, UserError),
        ({"engine": EngineSettings("generate")}, UserError),
        ({"replay": "somewhere", "correction": TOKEN}, UserError),
    )
    for i, (changes, error) in enumerate(cases):
        made = []
        source = changes.pop("source", Noted)
        with pytest.raises(error):
            run(tmp_path / str(i), lambda policy, source=source: made.append(source(policy)) or made[-1], **changes)
        assert made[0].calls.count(("close",)) == 1, changes


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"replay": "somewhere", "correction": TOKEN}, "ppo.replay: the run has a source of its own"),
        ({"engine": EngineSettings("generate")}, "engine.kind: generate, but the run has a source of its own"),
    ],
)
def test_nothing_else_may_say_who_draws(tmp_path, changes, told):
    with pytest.raises(UserError, match=told):
        run(tmp_path / "run", Noted, **changes)


def test_a_source_has_three_calls(tmp_path):
    with pytest.raises(
        UserError, match="source: Sampling lacks draw, weights_changed, close; steerl.RolloutSource has all three"
    ):
        run(tmp_path / "run", SAMPLING)


PROMPTS = PromptBatch([[5, 6, 7], [8, 9], [5]], [3, 1, 3], ["a", "b", "c"], ["a", "b", "c"], occurrences=[0, 0, 1])


@pytest.fixture(scope="module")
def drawn():
    policy = tiny_policy("llama")
    return policy, Sampler(policy, SAMPLING).sample(PROMPTS)


def changed(samples: Samples, **fields) -> Samples:
    return samples._replace(rollout=dataclasses.replace(samples.rollout, **fields))


def put(value_BR, row, token, value):
    value_BR = value_BR.clone()
    value_BR[row, token] = value
    return value_BR


def test_any_order_of_the_rows_is_put_right(drawn):
    policy, samples = drawn
    assert samples.rollout.sample_B.tolist() == [0, 1, 0, 1, 2, 3], "a prompt that comes again has other samples"
    for order in ([5, 4, 3, 2, 1, 0], [2, 0, 4, 5, 1, 3], [0, 1, 2, 3, 4, 5]):
        found = checked(samples.select(order), PROMPTS, policy, SAMPLING)
        assert found.texts == samples.texts
        for name, value in samples.rollout.tensors().items():
            assert torch.equal(found.rollout.tensors()[name], value), name
    nothing = samples.select([])
    assert checked(nothing, PROMPTS.select([]), policy, SAMPLING) is nothing


@pytest.mark.parametrize(
    "change, told",
    [
        (lambda s: s.rollout, r"draw gave Rollout; give Samples\(rollout, texts\)"),
        (lambda s: tuple(s), "draw gave tuple"),
        (lambda s: Samples(s.texts, s.rollout), r"draw gave Samples\(Texts, Rollout\)"),
        (lambda s: s._replace(texts=s.texts.select([0])), "6 rows, but texts of 1"),
        (lambda s: s.select([0, 1, 2, 3, 4]), "row 3 sample 3 is missing among the 5 rows"),
        (lambda s: s.select([0, 1, 2, 3, 4, 4]), "row 3 sample 3 is missing among the 6 rows"),
        (lambda s: s.select([0, 1, 2, 3, 4, 5, 0]), "row 3 sample 0 was not asked for"),
        (lambda s: s.select([]), "row 3 sample 0 is missing among the 0 rows"),
        (lambda s: changed(s, row_B=s.rollout.row_B + 1), "row 3 sample 0 is missing"),
        (
            lambda s: changed(s, prompt_BP=s.rollout.prompt_BP + 1),
            r"row 3 sample 0 answers a prompt of 3 ids \[6, 7, 8\], asked",
        ),
        (
            lambda s: changed(s, response_BR=put(s.rollout.response_BR, 2, 0, 64)),
            "row 1 sample 0, token 0, is 64; ids go from 0",
        ),
        (lambda s: changed(s, response_BR=put(s.rollout.response_BR, 2, 0, -1)), "row 1 sample 0, token 0, is -1"),
        (lambda s: changed(s, start_ids=(2,)), r"Rollout.start_ids is \(2,\), expected \(\)"),
        (lambda s: changed(s, temperature=0.7), "Rollout.temperature is 0.7, expected 1.0"),
        (lambda s: changed(s, steering="push#1"), "Rollout.steering is 'push#1', expected ''; steer the rows"),
        (lambda s: changed(s, greedy=True), "Rollout.greedy is True, expected False"),
        (
            lambda s: changed(s, behaviour_logprobs_BR=put(s.rollout.behaviour_logprobs_BR, 4, 0, -torch.inf)),
            "behaviour_logprobs_BR of row 3 sample 2, token 0, is -inf; a log-prob is finite, and 0 or less",
        ),
        (lambda s: changed(s, policy_logprobs_BR=s.rollout.policy_logprobs_BR.exp()), "policy_logprobs_BR of row 3 sample 0"),
        (lambda s: changed(s, policy_logprobs_BR=s.rollout.policy_logprobs_BR * torch.nan), "is nan"),
    ],
)
def test_what_a_source_may_not_give(drawn, change, told):
    policy, samples = drawn
    with pytest.raises(UserError, match=f"^source: .*{told}"):
        checked(change(samples), PROMPTS, policy, SAMPLING)


def test_rows_are_as_long_as_the_settings_allow(drawn):
    policy, samples = drawn
    with pytest.raises(UserError, match="has 6 actions in a turn, sampling.max_new_tokens is 5; stop there, or set more"):
        checked(samples, PROMPTS, policy, dataclasses.replace(SAMPLING, max_new_tokens=5))


@pytest.mark.parametrize(
    "change, told",
    [
        (
            lambda s: changed(s, policy_step_B=s.rollout.policy_step_B + 4),
            r"step 1: row \d+ sample 0 was drawn by the weights of step 4, not by those that learn",
        ),
        (
            lambda s: changed(s, behaviour_logprobs_BR=put(s.rollout.behaviour_logprobs_BR, 3, 2, -0.5)),
            r"step 1: token 2 of row \d+ sample 1 was drawn with log-prob -0.5000, where the policy gives -.*ppo.correction is",
        ),
    ],
)
def test_rows_that_need_a_correction_are_refused_without(tmp_path, change, told):
    with pytest.raises(UserError, match=told):
        run(tmp_path / "run", lambda policy: Noted(policy, change=change))
    run(tmp_path / "weighed", lambda policy: Noted(policy, change=change), correction=TOKEN)


def test_rows_that_do_not_say_whose_they_are_need_none_where_their_numbers_are_the_policys(tmp_path):
    run(
        tmp_path / "run",
        lambda policy: Noted(policy, change=lambda s: changed(s, policy_step_B=s.rollout.policy_step_B * 0 - 1)),
    )


# -- an engine that is no model -----------------------------------------------------------------------------------------


def test_a_policy_learns_from_a_table_that_knows_nothing_of_it(tmp_path):
    """The reward rises, and the weights at the first step are the policy's by the table's, token by token."""
    policy, sampling = tiny_policy("gpt2", scale=0.02), Sampling(max_new_tokens=6, n=4)
    odds = torch.linspace(1, 3, policy.vocab_size)
    table = TABLE["Table"](odds, policy, sampling)
    seen = []

    def reward(rollout, texts):
        seen.append(rollout)
        return share_of_threes(rollout, texts)

    more = {"steps": 8, "rollouts_per_step": 64, "credit": "rloo", "learning_rate": 1e-2, "eval_prompts": 40, "epochs": 2}
    lines = run(tmp_path / "run", table, policy, reward, sampling=sampling, correction=TOKEN, **more)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["reward_before"] < 0.4 and summary["reward_after"] > summary["reward_before"] + 0.3
    assert (table.updates, table.closed) == (8, True)
    assert not any("gap/max" in line for line in lines), "no row is of the policy's own weights"
    first = seen[1]  # after the evaluation's
    drawn = first.response_BR[first.action_mask_BR]
    shares = torch.bincount(drawn, minlength=64).double() / len(drawn)
    assert (shares[32:].sum() - odds[32:].sum() / odds.sum()).abs() < 0.08
    fresh = tiny_policy("gpt2", scale=0.02)
    differences = []
    for i in range(len(first)):
        prompt = first.prompt_BP[i][first.prompt_mask_BP[i]]
        logits = fresh.model(torch.cat([prompt, first.response_BR[i]])[None]).logits[0, len(prompt) - 1 : -1].double()
        ours = logits.log_softmax(-1).gather(-1, first.response_BR[i][:, None])[:, 0]
        differences += ((odds.double() / odds.sum()).log()[first.response_BR[i]] - ours).tolist()
    assert lines[0]["correction/kl_token"] == pytest.approx(sum(differences) / len(differences), abs=1e-5)


def test_a_table_without_a_correction_is_refused(tmp_path):
    policy = tiny_policy("gpt2")
    table = TABLE["Table"](torch.ones(policy.vocab_size), policy, SAMPLING)
    with pytest.raises(UserError, match="drawn with log-prob -.*, where the policy gives .*ppo.correction is missing"):
        run(tmp_path / "run", table, policy)
    assert table.closed and table.updates == 0


# -- metrics are told, and read by nobody -------------------------------------------------------------------------------


def test_a_metric_may_have_any_name(tmp_path, monkeypatch, capfd):
    """Early stop, the KL's controller, a budget's steps, totals, the live line: all the same where every key is another."""
    site = {"at": {"layers": [1]}, "vector": [0.5 - i % 3 for i in range(32)], "strength": 2.0}
    pushed = load_spec({"role": "policy", "sites": [site], "kl_budget": {"nats_per_sequence": 0.01, "action": "rescale"}})
    more = {
        "steering": pushed,
        "kl_target": 0.01,
        "kl_horizon": 20.0,
        "stop_kl": 1e-3,
        "epochs": 3,
        "eval_every": 2,
        "learning_rate": 1e-2,
    }
    plain = run(tmp_path / "plain", **more)
    lines = capfd.readouterr().err
    named, evaluated = ppo.metrics.step_metrics, ppo.Evaluation.metrics
    with monkeypatch.context() as patch:
        patch.setattr(ppo.metrics, "step_metrics", lambda *given: {f"other {key}": v for key, v in named(*given).items()})
        patch.setattr(ppo.Evaluation, "metrics", lambda self: {f"other {key}": v for key, v in evaluated(self).items()})
        other = run(tmp_path / "other", **more)
    assert weights(tmp_path / "plain") == weights(tmp_path / "other")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("plain", "other"))
    assert {**one, "seconds": 0} == {**two, "seconds": 0} and one["reward_before"] is not None
    assert len({line["steering/scale"] for line in plain}) > 1, "the budget moved the strength"
    assert plain[0]["kl/coef"] != plain[-1]["kl/coef"] and plain[0]["ppo/optimizer_steps"] < 6, "the KL's weight moved; stopped"
    for before, after in zip(plain, other, strict=True):
        told = {key: value for key, value in before.items() if not key.startswith(("time/", "memory/")) and key != "step"}
        assert told == {key: after[f"other {key}"] for key in told}
    assert [line.split("tokens")[0][:30] for line in lines.splitlines()] == [
        line.split("tokens")[0][:30] for line in capfd.readouterr().err.splitlines()
    ]
