"""The loop: what a run leaves behind, the gap alarm, bad rewards, and that learning happens."""

from __future__ import annotations

import dataclasses
import json
import math
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerl.reward.build import build_reward
from steerl.reward.types import Scores
from steerl.rollout.common.errors import Stopped, UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding import distribution
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.prompts.prompts import Prompts, PromptSettings
from steerl.rollout.scoring import logprobs
from steerl.training.algorithm.importance import Correction
from steerl.training.ppo import train
from steerl.training.run import checkpoint, resume
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft
from tests.models import tiny_policy
from tests.ppo_runs import LORA, prompts_of, share_of_threes

SMALL = {"steps": 2, "rollouts_per_step": 8, "minibatches": 2, "epochs": 1, "eval_prompts": 4, "learning_rate": 1e-3}
SAMPLING = {"max_new_tokens": 6, "stop_ids": [11, 17]}


def run(
    folder,
    family="gpt2",
    *,
    reward=share_of_threes,
    peft=None,
    sampling=None,
    overrides=None,
    prompts=None,
    engine=None,
    **settings,
):
    policy = with_peft(tiny_policy(family, **(overrides or {})), peft)
    summary = train(
        policy,
        prompts(policy) if prompts else prompts_of(policy),
        reward,
        Sampling(**{**SAMPLING, **(sampling or {})}),
        PPOSettings(**{**SMALL, **settings}),
        RunSettings(dir=str(folder)),
        engine=engine,
    )
    return policy, summary


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


KEYS = [
    "step", "rollout/length_mean", "reward/mean", "reward/std", "kl/ref", "kl/coef", "ppo/ratio_first", "ppo/ratio_mean",
    "ppo/clip_fraction", "ppo/approx_kl", "ppo/policy_loss", "value/loss", "value/explained_variance", "policy/entropy",
    "gap/max", "gap/mean", "time/learn_s", "memory/peak_mb",
]  # fmt: skip


def test_a_run_leaves_its_files(tmp_path):
    policy, summary = run(tmp_path / "run", eval_every=1, samples=1)
    folder = tmp_path / "run"
    metrics = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert not [key for key in KEYS if key not in row]
        assert row["ppo/ratio_first"] == pytest.approx(1, abs=1e-5) and row["gap/max"] < 1e-4
        assert "eval/reward" in row
    saved = json.loads((folder / "summary.json").read_text())
    assert saved == summary
    assert saved["steps"] == 2 and saved["world_size"] == 1 and saved["optimizer_steps"] == 4 and saved["rollouts"] == 16
    assert saved["gap_max"] == max(row["gap/max"] for row in metrics)
    assert saved["reward_after"] == metrics[-1]["eval/reward"] and saved["kl_after"] == metrics[-1]["eval/kl"]
    assert (folder / "config.yaml").is_file() and list((folder / "checkpoints").iterdir())
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    own = policy.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained(folder / "model")) == len(policy.tokenizer)


def test_plain_generate_draws_a_runs_rollouts_as_well(tmp_path):
    found = {}
    for kind in ("stream", "generate"):
        policy, summary = run(tmp_path / kind, engine=EngineSettings(kind), sampling={"n": 2, "temperature": 0.8}, samples=8)
        found[kind] = (
            summary,
            [row["completion"] for row in lines(tmp_path / kind / "samples.jsonl")],
            policy.model.state_dict(),
        )
        assert all(row["gap/max"] < 1e-4 for row in lines(tmp_path / kind / "metrics.jsonl"))
    (stream, said, weights), (plain, same, others) = found.values()
    assert said == same and len(said) > 8
    for name in ("reward_before", "reward_after", "kl_after"):
        assert stream[name] == pytest.approx(plain[name], abs=1e-5), name
    assert all((weights[name] - value).abs().max() < 1e-4 for name, value in others.items())


def test_the_cut_prompts_of_a_step_are_counted(tmp_path):
    policy, _ = run(tmp_path / "run", prompts=lambda policy: prompts_of(policy, most=2), steps=3, eval_prompts=0)
    whole = prompts_of(policy)
    for at, row in enumerate(lines(tmp_path / "run" / "metrics.jsonl")):
        rows = whole.take(0, 8 * at, 8)
        assert row["rollout/cut_prompts"] == sum(len(whole.table[i]["prompt"]) > 2 for i in rows) > 0


def test_samples_say_everything_per_token(tmp_path):
    policy, _ = run(tmp_path / "run", samples=2)
    rows = lines(tmp_path / "run" / "samples.jsonl")
    assert [row["kind"] for row in rows] == 2 * (["best"] * 2 + ["worst"] * 2 + ["random"] * 2)
    first = [row for row in rows if row["step"] == 1]
    assert min(r["reward"] for r in first[:2]) >= max(r["reward"] for r in first[2:4])
    for row in rows:
        n = len(row["response_ids"])
        assert row["response_tokens"] == [policy.tokenizer.decode([i]) for i in row["response_ids"]]
        assert policy.tokenizer.decode(row["prompt_ids"]) == row["prompt_text"]
        for name in (
            "policy_logprobs",
            "behaviour_logprobs",
            "reference_logprobs",
            "values",
            "advantages",
            "rewards",
            "returns",
            "entropy",
        ):
            assert len(row[name]) == n and all(math.isfinite(x) for x in row[name]), name
        assert row["kl"] == pytest.approx(sum(row["policy_logprobs"]) - sum(row["reference_logprobs"]), abs=1e-4)
        assert row["reward"] == pytest.approx(sum(i % 4 == 3 for i in row["response_ids"]) / n)
        assert row["stop_reason"] in ("eos", "stop", "length") and row["ended"] == (row["stop_reason"] != "length")


def test_what_a_reward_function_logs_is_in_the_runs_files(tmp_path):
    lengths = []

    def mine(completions, log_metric, log_extra):
        lengths.append([len(text) for text in completions])
        log_metric("length", sum(lengths[-1]) / len(completions))
        log_extra("length", lengths[-1])
        return [0.1 * length for length in lengths[-1]]

    run(tmp_path / "run", reward=build_reward([mine]), samples=2, eval_every=2, steps=2)
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    trained = [call for call in lengths if len(call) == 8][:2]
    assert [row["reward/mine/length"] for row in metrics] == [pytest.approx(sum(call) / 8) for call in trained]
    assert metrics[1]["eval/mine/length"] > 0 and "eval/mine/length" not in metrics[0]
    for row in lines(tmp_path / "run" / "samples.jsonl"):
        assert row["extra/mine/length"] == len(row["completion"])


def test_an_adapter_run_leaves_an_adapter_or_a_merged_model(tmp_path):
    from peft import AutoPeftModelForCausalLM

    tiny_policy("gpt2").model.save_pretrained(tmp_path / "base")
    for merged in (False, True):
        policy = tiny_policy("gpt2")
        policy.model.name_or_path = str(tmp_path / "base")
        policy = with_peft(policy, LORA)
        folder = tmp_path / f"run{merged}"
        train(
            policy, prompts_of(policy), share_of_threes, Sampling(**SAMPLING),
            PPOSettings(**SMALL, export_merged=merged), RunSettings(dir=str(folder)),
        )  # fmt: skip
        auto = AutoModelForCausalLM if merged else AutoPeftModelForCausalLM
        assert (folder / "model" / "adapter_config.json").exists() != merged
        loaded = auto.from_pretrained(folder / "model").eval()
        ids = torch.tensor([[5, 9, 13, 20]])
        with torch.no_grad():
            assert torch.allclose(loaded(ids).logits, policy.model(ids).logits, atol=1e-5)


def test_a_small_dataset_that_comes_round_within_a_step_is_sampled_anew(tmp_path):
    def three(policy):
        return Prompts([{"prompt": c} for c in "abc"], "prompt", policy, PromptSettings())

    run(tmp_path / "run", prompts=three, samples=4, steps=1)
    rows = lines(tmp_path / "run" / "samples.jsonl")
    named = {(row["row"], row["sample"]): tuple(row["response_ids"]) for row in rows}
    assert len(named) >= 6 and len({(row, ids) for (row, _), ids in named.items()}) > 3


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_learning_rate_of_zero_changes_nothing(tmp_path, family):
    before = {n: p.clone() for n, p in tiny_policy(family).model.named_parameters()}
    policy, _ = run(tmp_path / "run", family, learning_rate=0.0, steps=3, epochs=2)
    assert all(torch.equal(p, before[n]) for n, p in policy.model.named_parameters())
    for row in lines(tmp_path / "run" / "metrics.jsonl"):
        assert row["ppo/ratio_mean"] == pytest.approx(1, abs=1e-6) and row["ppo/clip_fraction"] == 0
        assert abs(row["ppo/approx_kl"]) < 1e-9 and abs(row["kl/ref"]) < 1e-5


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.proofs)])
@pytest.mark.parametrize(
    "settings", [{}, {"credit": "rloo", "sampling": {"n": 4}}, {"value": "shared"}], ids=["gae", "rloo", "shared"]
)
def test_the_reward_rises(tmp_path, seed, settings):
    sampling = {"seed": seed, **settings.get("sampling", {})}
    rest = {name: value for name, value in settings.items() if name != "sampling"}
    run(
        tmp_path / "run",
        sampling=sampling,
        steps=12,
        rollouts_per_step=32,
        epochs=4,
        eval_prompts=0,
        learning_rate=2e-3,
        kl_coef=0.01,
        **rest,
    )
    rewards = [row["reward/mean"] for row in lines(tmp_path / "run" / "metrics.jsonl")]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1, rewards


def test_the_kl_as_a_loss_holds_the_policy_back(tmp_path):
    distances = []
    held = {
        "kl_as": "loss",
        "kl_estimator": "k3",
        "epochs": 4,
        "rollouts_per_step": 32,
        "learning_rate": 2e-3,
        "eval_prompts": 0,
    }
    for coefficient in (0.0, 1.0):
        run(tmp_path / f"run{coefficient}", steps=6, kl_coef=coefficient, **held)
        distances.append(lines(tmp_path / f"run{coefficient}" / "metrics.jsonl")[-1]["kl/ref"])
    assert distances[1] < distances[0] / 3


def test_an_adaptive_weight_is_the_closed_form_over_the_run(tmp_path):
    run(tmp_path / "run", steps=4, kl_coef=0.1, kl_target=0.05, kl_horizon=50.0)
    coefficient = 0.1
    for row in lines(tmp_path / "run" / "metrics.jsonl"):
        assert row["kl/coef"] == pytest.approx(coefficient, rel=1e-12)
        coefficient *= 1 + min(max(row["kl/ref"] / 0.05 - 1, -0.2), 0.2) * 8 / 50


# -- the gap alarm: defects that the harness puts in -------------------------------------------------------------------


def test_the_alarm_fires_when_position_ids_are_withheld(tmp_path, monkeypatch):
    real = logprobs.forward_inputs
    monkeypatch.setattr(logprobs, "aligned", False)  # rows without padding before them need no explicit positions
    monkeypatch.setattr(logprobs, "forward_inputs", lambda *a: {k: v for k, v in real(*a).items() if k != "position_ids"})
    with pytest.raises(UserError, match=r"step 1: the sampler's log-prob .* above ppo.gap_tolerance 0.001. Usual causes"):
        run(tmp_path / "run")


def test_the_alarm_fires_when_dropout_is_on(tmp_path, monkeypatch):
    import contextlib

    monkeypatch.setattr(logprobs, "no_dropout", lambda model: contextlib.nullcontext(model.train()))
    with pytest.raises(UserError, match="dropout left on"):
        run(tmp_path / "run", overrides={"resid_pdrop": 0.3})


def test_the_alarm_fires_when_a_penalty_leaks(tmp_path, monkeypatch):
    real = distribution.Distribution.draw

    def leaking(*arguments, **settings):
        drawn = real(*arguments, **settings)
        return dataclasses.replace(drawn, policy_B=drawn.behaviour_B)

    monkeypatch.setattr(distribution.Distribution, "draw", leaking)
    with pytest.raises(UserError, match="a penalty or a temperature that one side lacks"):
        run(tmp_path / "run", sampling={"repetition_penalty": 1.5}, correction=Correction("token_truncate"))


def test_without_the_defect_the_same_run_is_quiet(tmp_path):
    run(tmp_path / "run", sampling={"repetition_penalty": 1.5}, correction=Correction("token_truncate"))
    row = lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert row["gap/max"] < 1e-4 and row["correction/max"] > 1


# -- rewards that go wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reward, text",
    [
        (lambda rollout, texts: Scores(torch.zeros(3)), "reward: gave 3 scores for 4 rows"),
        (lambda rollout, texts: Scores(torch.full((len(rollout),), math.nan)), r"reward: row \d+ sample 0 scored nan"),
        (lambda rollout, texts: torch.zeros(len(rollout)), "reward: expected Scores, found Tensor"),
    ],
)
def test_a_bad_reward_is_named(tmp_path, reward, text):
    with pytest.raises(UserError, match=text):
        run(tmp_path / "run", reward=reward)


def test_scores_that_blow_up_stop_the_run_with_the_step(tmp_path):
    seen = []

    def exploding(rollout, texts):
        seen.append(len(rollout))
        return Scores(torch.full((len(rollout),), 3e38 if len(seen) > 2 else 0.5) * (1 + rollout.row_B % 2))

    with pytest.raises(UserError, match=r"step 2: .*(loss|norm).* = (nan|inf|-inf)|scored inf"):
        run(tmp_path / "run", reward=exploding, steps=3, whiten_advantages=False)


# -- stopped and resumed -----------------------------------------------------------------------------------------------


def resumable(
    folder, *, reward=share_of_threes, seed=0, prompts=prompts_of, resume=False, config=None, allow=False, **settings
):
    policy = tiny_policy("gpt2", seed)
    given = RunSettings(dir=str(folder), resume=resume, allow_changes=allow)
    train(
        policy,
        prompts(policy),
        reward,
        Sampling(**SAMPLING),
        PPOSettings(**{**SMALL, "steps": 3, **settings}),
        given,
        config=config,
    )


def interrupts(rollout, texts):
    if bool((rollout.policy_step_B == 1).any()):
        signal.raise_signal(signal.SIGINT)
    return share_of_threes(rollout, texts)


def test_what_a_run_is_made_from_is_told_by_content(tmp_path):
    (tmp_path / "mine.py").write_text("def score(completions, **columns):\n    return [0.0] * len(completions)\n")
    reward = build_reward([{"name": "mine", "kind": "function", "function": f"{tmp_path / 'mine.py'}:score"}])

    def changed(policy, prompts=None):
        now = resume.made_from(policy, prompts or prompts_of(policy), prompts_of(policy), reward, PPOSettings())
        return {name for name in was if now[name] != was[name]}

    policy = tiny_policy("llama")
    was = resume.made_from(policy, prompts_of(policy), prompts_of(policy), reward, PPOSettings())
    assert changed(tiny_policy("llama")) == set()
    assert changed(policy, prompts_of(policy, 41)) == {"prompts.path"}
    weight = policy.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[17, 5] = weight[17, 5].nextafter(torch.tensor(9.0))  # the last bit of one of thousands
    assert changed(policy) == {"model.path"}
    (tmp_path / "mine.py").write_text("def score(completions, **columns):\n    return [1.0] * len(completions)\n")
    assert changed(tiny_policy("llama")) == {"reward mine"}
    lora = [
        resume.made_from(with_peft(tiny_policy("llama"), LORA), prompts_of(policy), None, None, PPOSettings()) for _ in "ab"
    ]
    assert lora[0] == lora[1], "a fresh adapter is drawn anew, and comes from the checkpoint"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss": "gspo", "clip": 0.01, "loss_reduction": "sequence"},
        {"loss": "cispo", "clip": 1.0, "clip_high": 0.1},
        {"loss": "dppo", "dppo_divergence": "kl", "loss_reduction": "constant"},
    ],
    ids=["ppo", "gspo", "cispo", "dppo"],
)
def test_ctrl_c_finishes_the_step_saves_and_the_run_goes_on_as_if_undisturbed(tmp_path, settings):
    resumable(tmp_path / "whole", **settings)
    with pytest.raises(Stopped, match="stopped after step 2 of 3 and saved"):
        resumable(tmp_path / "run", reward=interrupts, **settings)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "run" / "model").exists()
    resumable(tmp_path / "run", resume=True, **settings)
    saved = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "run")]
    assert saved[0] == saved[1]


def test_a_resumed_run_names_other_weights_and_prompts_and_takes_another_learning_rate_when_allowed(tmp_path, caplog):
    rates = [{"ppo": {"learning_rate": rate, "eval_every": i}} for i, rate in enumerate((1e-3, 0.0))]
    with pytest.raises(Stopped):
        resumable(tmp_path / "run", reward=interrupts, config=rates[0])
    fewer = {"seed": 1, "prompts": lambda policy: prompts_of(policy, 39), "resume": True}
    with pytest.raises(UserError) as caught:
        resumable(tmp_path / "run", config=rates[0], **fewer)
    assert [line.split(":")[0] for line in caught.value.lines] == ["model.path", "prompts.path"]
    with pytest.raises(UserError) as caught:
        resumable(tmp_path / "run", config=rates[1], resume=True)
    assert [line.split(":")[0] for line in caught.value.lines] == ["ppo.learning_rate"], "eval_every only observes"
    before = checkpoint.read(checkpoint.newest(tmp_path / "run"))["tree"]["weights"]
    zero = {"learning_rate": 0.0, "value_learning_rate": 0.0}
    (tmp_path / "run" / "config.yaml").write_bytes(b"\x80 was damaged")  # it is written anew
    resumable(tmp_path / "run", resume=True, allow=True, config=rates[1], **zero)
    after = checkpoint.read(checkpoint.newest(tmp_path / "run"))["tree"]["weights"]
    assert all(torch.equal(before[name], after[name]) for name in before), "the lower rate is the one that counts"
    assert "ppo.learning_rate: 0.0, but the run to resume has 0.001" in caplog.text
    assert "# from step 2: ppo.learning_rate: 0.0" in (tmp_path / "run" / "config.yaml").read_text()
