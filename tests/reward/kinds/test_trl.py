"""The same reward functions under TRL's own GRPOTrainer and here: numbers, metrics, extra columns and arguments are the same."""

from __future__ import annotations

import functools
from pathlib import Path

import pandas
import pytest
import torch
from datasets import Dataset
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from steerl.reward.build import build_reward
from steerl.reward.types import metrics as step_metrics
from steerl.rollout.common.errors import UserError
from steerl.rollout.types import Rollout, Texts
from tests.models import tiny, tiny_tokenizer
from tests.reward.rows import made

FUNCTIONS = """
def get_scaled(scale, shift=0.0):
    return lambda completions, **kwargs: [scale * len(text) + shift for text in completions]

class Scaled:
    def __init__(self, scale):
        self.scale = scale
    def __call__(self, completions, **kwargs):
        return [self.scale * len(text) for text in completions]

def get_hinted(scale) -> "Callable[..., list[float]]":
    return Scaled(scale)
"""


def contents(completions: list) -> list[str]:
    return [said if isinstance(said, str) else said[0]["content"] for said in completions]


def length(completions, log_metric=None, log_extra=None, **kwargs):
    lengths = [float(len(said)) for said in contents(completions)]
    log_metric("longest", max(lengths))
    log_extra("half", [number / 2 for number in lengths])
    return lengths


async def judged(prompts, completions, answer, **kwargs):
    """Does not apply to every other answer."""
    return [None if right == "a" else 0.25 for right in answer]


def by_step(completions, trainer_state, **kwargs):
    return [float(trainer_state.global_step + len(said)) for said in contents(completions)]


class Counted:
    async def __call__(self, completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]


def above(completions, least, **kwargs):
    return [float(len(said) > least) for said in contents(completions)]


@pytest.mark.parametrize("talks", [False, True])
def test_rewards_are_those_of_trls_own_trainer(talks: bool, tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    seen: dict = {}

    def spy(prompts, **kwargs):
        seen.update(kwargs, prompts=prompts)
        return [0.0] * len(prompts)

    overlong = get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=6)
    functions = [length, judged, by_step, Counted(), functools.partial(above, least=3), overlong]
    functions += [get_repetition_penalty_reward(ngram_size=1), *([think_format_reward] if talks else []), spy]
    weights = [0.5, 2.0, *[1.0] * (len(functions) - 2)]
    asked = ["ab", "cd"]
    rows = [{"prompt": [{"role": "user", "content": text}] if talks else text} for text in asked]
    data = [{**row, "answer": text[0], "a b": i} for i, (row, text) in enumerate(zip(rows, asked, strict=True))]
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, num_generations=4, per_device_train_batch_size=8, max_completion_length=8,
        reward_weights=weights, logging_steps=1, log_completions=True, report_to=[], use_cpu=True, bf16=False, seed=1,
        save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(chat=talks)
    trainer = GRPOTrainer(
        tiny("llama"), list(functions), config, train_dataset=Dataset.from_list(data), processing_class=tokenizer
    )
    trainer.train()
    theirs = pandas.read_parquet(next(tmp_path.glob("completions/*.parquet")))
    logged = next(line for line in trainer.state.log_history if "reward" in line)

    ids = seen["completion_ids"]
    answers = tokenizer.batch_decode(ids, skip_special_tokens=True)
    rollout = Rollout.of_ids([[5]] * 8, ids, ended_B=[True] * 8, policy_step_B=[0] * 8)
    texts = Texts(
        prompts=seen["prompts"],
        prompt_texts=[""] * 8,
        completions=answers,
        columns={name: seen[name] for name in ("answer", "a b")},
    )
    given, seen = seen, {}  # what ours hands to the spy
    terms = [
        {"kind": "function", "function": f, "weight": w, "name": f"f{i}"}
        for i, (f, w) in enumerate(zip(functions, weights, strict=True))
    ]
    scores = build_reward(terms)(rollout, texts)

    assert not set(given) - set(seen)
    for name in ("prompts", "completions", "completion_ids", "answer", "a b"):
        assert seen[name] == given[name], name
    assert scores.total_B.mean() == pytest.approx(logged["reward"], rel=1e-5)
    for place, name in enumerate(trainer.reward_func_names):
        ours = scores.parts[f"f{place}"]
        assert ours.tolist() == pytest.approx(theirs[name].tolist(), nan_ok=True), name
        assert float(ours.nanmean()) == pytest.approx(logged[f"rewards/{name}/mean"], rel=1e-5)
    assert scores.extra["f0/half"] == theirs["half"].tolist()
    assert step_metrics([scores])["reward/f0/longest"] == logged["longest"]


def test_python_functions_are_named_as_trl_names_them() -> None:
    reward = build_reward([length, Counted(), *(functools.partial(above, least=n) for n in (1, 3))])
    assert [term.name for term in reward.terms] == ["length", "Counted", "above", "function"]
    overlong = get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=6)
    assert [term.name for term in build_reward(overlong).terms] == ["soft_overlong_punishment_reward"]


@pytest.mark.parametrize("limit", [None, 60.0])
@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        ("trl.rewards:get_soft_overlong_punishment", {"max_completion_len": 4, "soft_punish_cache": 2}, [0.0, -0.5]),
        ("trl.rewards:get_repetition_penalty_reward", {"ngram_size": 1}, [-0.5, -1 / 3]),
        ("{file}:Scaled", {"scale": 2}, [4.0, 6.0]),
        ("{file}:get_hinted", {"scale": 3}, [6.0, 9.0]),
    ],
)
def test_what_makes_a_reward_function_is_called_with_the_arguments(function, arguments, expected, limit, tmp_path) -> None:
    file = tmp_path / "made_here.py"
    file.write_text(FUNCTIONS)
    term = {"kind": "function", "function": function.format(file=file), "arguments": arguments, "timeout": limit}
    reward = build_reward([term])
    try:
        assert reward(*made(["aa", "aba"])).total_B.tolist() == pytest.approx(expected)
    finally:
        reward.close()


def test_what_makes_no_reward_function_is_told(tmp_path: Path) -> None:
    file = tmp_path / "made_here.py"
    file.write_text(FUNCTIONS)
    wrong = {
        "trl.rewards:get_repetition_penalty_reward": {"max_penalty": 1.0},
        f"{file}:Scaled": {},
        f"{file}:get_hinted": {"scael": 3},
    }
    for function, arguments in wrong.items():
        with pytest.raises(UserError, match=r"^reward\[0\] \(function\).arguments: \w+ makes no reward function of them: "):
            build_reward([{"kind": "function", "function": function, "arguments": arguments}])
    with pytest.raises(UserError, match=r"gave function; give a list"):
        build_reward([{"kind": "function", "function": f"{file}:get_scaled", "arguments": {"scale": 3}}])(*made(["aa"]))
