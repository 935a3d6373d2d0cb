"""Losses and credits of the user's own, optimizers and schedules by name: against ours, and against their own classes by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.training.algorithm import update as learning
from steerl.training.algorithm.custom import compares_samples, uses_value
from steerl.training.algorithm.schedule import share_of_rate
from steerl.training.checks import check_job
from steerl.training.engine.optimizer import build_optimizer, check_optimizer, state_bytes
from steerl.training.ppo import train
from steerl.training.run import resume
from steerl.training.settings import CREDITS, LOSSES, PPOSettings
from tests.models import tiny_policy
from tests.ppo_runs import first_experience, job, prompts_of, share_of_threes
from tests.training.algorithm.test_update import gradients_of, moved

OWN = str(Path(__file__).with_name("users_own.py"))
SMALL = {"steps": 3, "rollouts_per_step": 16, "minibatches": 2, "epochs": 2, "micro_batch_size": 5, "learning_rate": 1e-3}


def run(folder: Path, *, n: int = 1, resumed: bool = False, **settings):
    """(metrics but for times, weights) of a tiny run."""
    policy = tiny_policy("gpt2")
    ppo = PPOSettings(**{**SMALL, "eval_prompts": 0, **settings})
    sampling = Sampling(max_new_tokens=9, stop_ids=[11, 17, 23], n=n)
    config = {"ppo": {name: value for name, value in settings.items() if name != "steps"}}
    where = RunSettings(dir=str(folder), resume=resumed, save_every=1)
    train(policy, prompts_of(policy), share_of_threes, sampling, ppo, where, config=config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "memory/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines], policy.model.state_dict()


def equal(one, other, but=()):
    assert [{k: v for k, v in line.items() if k not in but} for line in other[0]] == one[0]
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())


# -- losses ----------------------------------------------------------------------------------------------------------


def test_gspo_written_by_a_user_is_ours_bit_for_bit(tmp_path):
    same = {"clip": 0.003, "clip_high": 0.004, "loss_reduction": "sequence"}
    own = run(tmp_path / "own", loss=f"{OWN}:gspo", **same)
    assert all("loss/row_ratio" in line and 0.5 < line["loss/row_ratio"] < 2 for line in own[0])
    equal(run(tmp_path / "ours", loss="gspo", **same), own, but=("loss/row_ratio",))


@pytest.mark.parametrize("gaps", [False, True])
def test_a_custom_loss_and_what_it_tells_do_not_hang_on_micro_batches(gaps):
    parts, prompts, ppo = job("gpt2", max_grad_norm=0.0, loss=f"{OWN}:told_by_rows")
    experience = first_experience(parts, prompts, ppo, gaps)
    moved(parts)
    told = []
    real = learning.MinibatchStats
    learning.MinibatchStats = lambda **stats: told.append(stats) or real(**stats)
    try:
        found = [
            gradients_of(parts, experience, list(range(8)), dataclasses.replace(ppo, micro_batch_size=size))
            for size in (8, 1, 3)
        ]
    finally:
        learning.MinibatchStats = real
    for other, own in zip(found[1:], told[1:], strict=True):
        assert all(torch.allclose(other[name], gradient, atol=1e-6) for name, gradient in found[0].items())
        assert own["own"] == pytest.approx(told[0]["own"], abs=1e-6)
    assert told[0]["own"]["loss/all"] == pytest.approx(1.0) and 0 < told[0]["own"]["loss/thirds"] < 1


REFUSED = {
    "mean": "no sum over actions by weights_BR: its loss",
    "unweighted": "no sum over actions by weights_BR: its loss",
    "mean_metric": "no sum over actions by weights_BR: metric 'mean'",
    "strange": "takes 'new_logps', which it is not given; it may take advantages_BR, clip_high",
    "lone": "gave a tensor of \\(\\); expected \\(loss, metrics\\)",
    "cut_off": "expected a scalar tensor that has a gradient to new_BR",
    "product": "no finite gradient",
    "rude": "failed on a trial of a few rows: raised ValueError: no",
    "gone": "users_own.py has no 'gone'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_loss_is_refused_in_one_line_before_anything_is_loaded(name):
    with pytest.raises(UserError, match=REFUSED[name]) as told:
        check_job(None, None, Sampling(), PPOSettings(loss=f"{OWN}:{name}"))
    assert len(told.value.lines) == 1 and told.value.lines[0].startswith("ppo.loss: ") and "\x1b" not in str(told.value)


@pytest.mark.parametrize("spec", ["nowhere.py:loss", "no_module:loss"])
def test_a_loss_that_is_not_there(spec):
    with pytest.raises(UserError, match="ppo.loss: there is no (file|module)"):
        check_job(None, None, Sampling(), PPOSettings(loss=spec))


def test_settings_that_a_function_does_not_look_at():
    ppo = PPOSettings(loss=f"{OWN}:told_by_rows", clip=0.1, dual_clip=3.0)
    with pytest.raises(UserError) as told:
        check_job(None, None, Sampling(), ppo)
    assert [line.split(":")[0] for line in told.value.lines] == ["ppo.clip", "ppo.dual_clip"]
    ppo = PPOSettings(credit=f"{OWN}:centred", lam=0.9, value="shared", bootstrap_cut=True, drop_equal_groups=True)
    with pytest.raises(UserError) as told:
        check_job(None, None, Sampling(n=4), ppo)
    assert [line.split(":")[0] for line in told.value.lines] == ["ppo.lam", "ppo.value", "ppo.bootstrap_cut"]


@pytest.mark.parametrize("name, known", [("loss", LOSSES), ("credit", CREDITS)])
def test_a_name_that_is_neither_ours_nor_a_function(name, known):
    with pytest.raises(
        UserError, match=f"ppo.{name}: expected one of {known[0]}, .*found '{known[1]}x'; did you mean {known[1]}"
    ):
        PPOSettings(**{name: known[1] + "x"})


# -- credits ---------------------------------------------------------------------------------------------------------


def test_credits_written_by_a_user_are_ours_bit_for_bit(tmp_path):
    with_value = {"gamma": 0.9, "lam": 0.7, "bootstrap_cut": True}
    own = run(tmp_path / "own", credit=f"{OWN}:gae", **with_value)
    equal(run(tmp_path / "ours", credit="gae", **with_value), own)
    own = run(tmp_path / "own_groups", credit=f"{OWN}:centred", n=4, drop_equal_groups=True)
    theirs = run(tmp_path / "our_groups", credit="group", group_std=False, n=4, drop_equal_groups=True)
    equal(theirs, own)


def test_what_a_credit_names_decides_what_there_is():
    gae, centred = (PPOSettings(credit=f"{OWN}:{name}") for name in ("gae", "centred"))
    assert uses_value(gae) and not compares_samples(gae)
    assert compares_samples(centred) and not uses_value(centred)
    with pytest.raises(UserError, match="sampling.n: 1, but ppo.credit .*centred compares samples"):
        check_job(None, None, Sampling(), centred)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("wide", r"gave a tensor of \(1, 1\) as advantages_BR; expected a tensor of \(4, 4\)"),
        ("nan_there", "gave (-?inf|nan) as advantages_BR of row 0, token 0"),
        ("alone", r"gave a tensor of \(4, 4\); expected \(advantages_BR, returns_BR\)"),
    ],
)
def test_what_is_no_credit_is_refused(name, told):
    with pytest.raises(UserError, match=told) as caught:
        check_job(None, None, Sampling(n=2), PPOSettings(credit=f"{OWN}:{name}"))
    assert len(caught.value.lines) == 1


# -- optimizers ------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adafactor": (torch.optim.Adafactor, {"eps": [None, 0.01]}),
    "NAdam": (torch.optim.NAdam, {"betas": [0.8, 0.95]}),
    "adamw": (torch.optim.AdamW, {"betas": [0.5, 0.9], "eps": 1e-5}),
    "transformers:Adafactor": (transformers.Adafactor, {"relative_step": False, "scale_parameter": False}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_is_its_class_stepped_by_hand(name):
    kind, given = OPTIMIZERS[name]
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(6, 5, generator=draw), torch.randn(5, generator=draw)]
    gradients = [[torch.randn(w.shape, generator=draw) for w in start] for _ in range(4)]
    ppo = PPOSettings(optimizer=name, optimizer_arguments=given, weight_decay=0.1, learning_rate=0.02)
    check_job(None, None, Sampling(), ppo)
    ours, theirs = ([torch.nn.Parameter(w.clone()) for w in start] for _ in range(2))
    groups = [{"params": [w], "name": str(i), "lr": 0.02, "base_lr": 0.02} for i, w in enumerate(ours)]
    built = build_optimizer(None, groups, ppo)
    by_hand = kind(theirs, lr=0.02, weight_decay=0.1, **given)
    for step in gradients:
        for ours_, theirs_, gradient in zip(ours, theirs, step, strict=True):
            ours_.grad, theirs_.grad = gradient.clone(), gradient.clone()
        built.step(), by_hand.step()
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(ours, theirs, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(ours, start, strict=True))


@pytest.mark.parametrize("name", [*OPTIMIZERS, f"{OWN}:Signs", "RMSprop", "Adagrad"])
def test_a_run_goes_on_bit_for_bit_with_any_optimizer(tmp_path, name):
    settings = {"optimizer": name, "optimizer_arguments": OPTIMIZERS.get(name, (0, None))[1], "schedule": "constant"}
    whole = run(tmp_path / "whole", steps=3, **settings)
    run(tmp_path / "parts", steps=2, **settings)
    equal(whole, run(tmp_path / "parts", steps=3, resumed=True, **settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"optimizer": "sdg"}, "torch.optim has no 'sdg'; did you mean sgd?"),
        ({"optimizer": "LBFGS"}, "LBFGS does not work on weights"),
        ({"optimizer": "Muon"}, "Muon does not work on weights of one"),
        ({"optimizer": "SparseAdam"}, "SparseAdam does not work"),
        ({"optimizer": "ASGD"}, "ASGD moves weights at a learning rate of 0"),
        ({"optimizer": "Rprop"}, "Rprop moves weights at a learning rate of 0"),
        ({"optimizer": "transformers:Adafactor"}, "Cannot combine manual"),
        ({"optimizer": f"{OWN}:no_optimizer"}, "gave a list, not a torch.optim.Optimizer"),
        ({"optimizer": f"{OWN}:Signs", "weight_decay": 0.1}, "weight_decay: 0.1, but ppo.optimizer .*Signs has none; set 0"),
        ({"optimizer": "sgd", "optimizer_arguments": {"momentun": 0.9}}, "sgd takes no 'momentun'; did you mean momentum?"),
        ({"optimizer_arguments": {"lr": 0.1}}, "optimizer_arguments: lr is ppo.learning_rate; set it there"),
        ({"optimizer_arguments": {"betas": [2, 3]}}, "Invalid beta parameter"),
    ],
)
def test_what_cannot_learn_is_refused_in_one_line(settings, told):
    with pytest.raises(UserError, match=told) as caught:
        check_job(None, None, Sampling(), PPOSettings(**settings))
    assert len(caught.value.lines) == 1


def test_other_optimizers_are_refused_where_states_are_spread():
    for spread in ({"deepspeed_plugin": object(), "is_fsdp2": False}, {"deepspeed_plugin": None, "is_fsdp2": True}):
        with pytest.raises(UserError, match="ppo.optimizer: sgd, but (DeepSpeed|FSDP) spreads"):
            check_optimizer(SimpleNamespace(device=torch.device("cpu"), **spread), PPOSettings(optimizer="sgd"))


def test_the_plan_counts_what_an_optimizer_keeps():
    def held(name, **given):
        return state_bytes(PPOSettings(optimizer=name, optimizer_arguments=given or None))

    assert held("adamw") == 8.0 and held("NAdam") == pytest.approx(8.0, abs=1e-3)
    assert held("sgd") == 0.0 and held("sgd", momentum=0.9) == 4.0 and held("adamw8bit") == 2.0
    assert held("Adafactor") == pytest.approx(2 * 4 / 512, rel=0.01)


# -- schedules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "warmup"),
    [
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 3),
        ("cosine_with_restarts", {"num_cycles": 2}, 0),
        ("polynomial", {"power": 2.0, "lr_end": 0.0}, 2),
        ("inverse_sqrt", {"timescale": 4}, 2),
        ("warmup_stable_decay", {"num_decay_steps": 5}, 3),
        ("constant_with_warmup", {}, 4),
    ],
)
def test_a_schedule_of_transformers_is_its_own_stepped_by_hand(name, given, warmup):
    ppo = PPOSettings(steps=12, schedule=name, schedule_arguments=given or None, warmup_steps=warmup)
    check_job(None, None, Sampling(), ppo)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, 12, given)
    for step in range(12):
        # the warm-up is ours: it does not begin at 0
        expected = scheduler.get_last_lr()[0] if step >= warmup else 0.5 * (step + 1) / (warmup + 1)
        assert 0.5 * share_of_rate(ppo, step) == pytest.approx(expected, rel=1e-12), step
        optimizer.step(), scheduler.step()


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("StepLR", {"step_size": 3, "gamma": 0.5}),
        ("CosineAnnealingWarmRestarts", {"T_0": 4, "T_mult": 2}),
        ("MultiStepLR", {"milestones": [2, 5]}),
        ("OneCycleLR", {"max_lr": 2.0, "total_steps": 12, "cycle_momentum": False}),
    ],
)
def test_a_schedule_of_torch_is_its_class_stepped_by_hand(name, given):
    ppo = PPOSettings(steps=10, schedule=name, schedule_arguments=given, warmup_steps=2)
    check_job(None, None, Sampling(), ppo)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.5)
    scheduler = getattr(torch.optim.lr_scheduler, name)(optimizer, **given)
    for step in range(2, 10):
        assert share_of_rate(ppo, step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9), step
        optimizer.step(), scheduler.step()
    assert [share_of_rate(ppo, step) for step in range(2)] == [1 / 3, 2 / 3]


def test_a_schedule_of_the_users_own_is_learned_by_and_told(tmp_path):
    given = {"schedule": f"{OWN}:steps_down", "schedule_arguments": {"floor": 0.3}, "steps": 5}
    rows, _ = run(tmp_path / "run", warmup_steps=1, **given)
    assert [row["ppo/learning_rate"] for row in rows] == pytest.approx([1e-3 * share for share in (0.5, 1.0, 0.5, 0.5, 0.3)])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"schedule": "cosin"}, "there is no 'cosin'; did you mean cosine?"),
        ({"schedule": "reduce_lr_on_plateau"}, "follows a metric"),
        ({"schedule": "ReduceLROnPlateau"}, "follows a metric"),
        ({"schedule": "StepLR"}, "StepLR does not work: raised TypeError"),
        ({"schedule": "OneCycleLR", "schedule_arguments": {"max_lr": 1.0, "total_steps": 200}}, "momentum"),
        ({"schedule": f"{OWN}:below_zero"}, "below_zero gives -1.0 at step 3; it must be a number of 0 or more"),
        ({"schedule_arguments": {"a": 1}}, "schedule_arguments: have no effect with ppo.schedule constant"),
    ],
)
def test_what_is_no_schedule_is_refused_in_one_line(settings, told):
    with pytest.raises(UserError, match=told) as caught:
        check_job(None, None, Sampling(), PPOSettings(**settings))
    assert len(caught.value.lines) == 1


def test_a_run_is_made_from_the_files_that_it_names(tmp_path):
    policy, made = tiny_policy("gpt2"), {}
    for text in ("def f(rewards_BR):\n    return rewards_BR\n", "def f(rewards_BR):\n    return 2 * rewards_BR\n"):
        file = tmp_path / f"credit_{len(made)}.py"
        file.write_text(text)
        settings = PPOSettings(credit=f"{file}:f", optimizer="transformers:Adafactor")
        made[text] = resume.made_from(policy, prompts_of(policy), None, share_of_threes, settings)
    first, second = made.values()
    assert first["ppo.credit"] != second["ppo.credit"] and first["ppo.optimizer"] == second["ppo.optimizer"] != ""
