"""The elliptical bonus against its definition in float64, row by row; what it remembers; what refuses it."""

from __future__ import annotations

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.reward.jobs.scoring import check_order
from steerl.rollout.common.errors import DataError
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import locate
from tests.models import tiny_policy
from tests.reward.kinds.test_probe import READ, rows_of, texts_of


def features(policy, rollout, dimensions: int, seed: int, position: str) -> list[torch.Tensor | None]:
    found: list[torch.Tensor | None] = []
    matrix = torch.randn(32, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for i, places in enumerate(READ[: len(rollout)]):
        prompt = rollout.prompt_ids[i]
        seen: list[torch.Tensor] = []
        (point,) = locate(policy.core, At(layers=(1,)))
        handle = point.module.register_forward_hook(
            lambda _, __, out, seen=seen: seen.append(out if torch.is_tensor(out) else out[0])
        )
        with torch.no_grad():
            policy.core(input_ids=torch.tensor([prompt + rollout.response_ids[i]]))
        handle.remove()
        states = [seen[-1][0, len(prompt) + t].double() for t in places]
        if not states:
            found.append(None)
            continue
        x = states[-1] if position == "last" else sum(states) / len(states)
        found.append(x @ matrix / (x @ matrix).norm())
    return found


def bonus(own, others, ridge: float) -> float:
    whole = ridge * torch.eye(len(own), dtype=torch.float64)
    for other in others:
        whole = whole + torch.outer(other, other)
    return float(own @ torch.linalg.inv(whole) @ own) ** 0.5


@pytest.mark.parametrize("position", ["mean", "last"])
def test_the_bonus_is_its_definition_over_a_step_and_over_a_run(position):
    policy = tiny_policy("llama")
    rollout = rows_of(policy)
    rows = features(policy, rollout, 6, 3, position)
    real = [row for row in rows if row is not None]
    part = {"kind": "novelty", "dimensions": 6, "ridge": 0.5, "seed": 3, "position": position, "batch_size": 2}
    others = {"kind": "length", "max": 3, "unit": "tokens"}
    step = build_reward([part, others], policy)
    run = build_reward([{**part, "history": "run"}, others], policy)
    for times in (1, 2, 3):
        found = {
            "step": step(rollout, texts_of(rollout)).parts["novelty"],
            "run": run(rollout, texts_of(rollout)).parts["novelty"],
        }
        for name, seen in (("step", real), ("run", real * times)):
            for value, row in zip(found[name].tolist(), rows, strict=True):
                assert (value != value) if row is None else value == pytest.approx(bonus(row, seen, 0.5), abs=1e-5), (
                    name,
                    times,
                )


def test_what_a_run_has_seen_is_kept_and_evaluation_adds_nothing():
    policy = tiny_policy("llama")
    rollout = rows_of(policy).select([0, 1])
    part = {"kind": "novelty", "history": "run", "normalise": "running"}
    reward, again = build_reward([part], policy), build_reward([part], policy)
    assert reward.is_collective and set(reward.state_dict()) == {"novelty", "novelty.memory"}
    said = texts_of(rollout)
    reward(rollout, said)
    state = reward.state_dict()
    assert reward.still()(rollout, said).total_B.isfinite().all()
    assert reward.state_dict() == state, "looking changes nothing"
    again.load_state_dict(state)
    assert torch.equal(again(rollout, said).total_B, reward(rollout, said).total_B)
    assert reward.state_dict() == again.state_dict() != state
    assert len(reward(rollout.select([]), said.select([]))) == 0, "a rank without rows"


def test_without_a_step_it_is_refused():
    with pytest.raises(DataError, match="compares the rows of a training step"):
        check_order(build_reward([{"kind": "novelty"}], tiny_policy("llama")))
