"""Normalisation and clipping against formulas written out."""

from __future__ import annotations

import json
import math
import textwrap

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.reward.normalize import Running
from steerl.rollout.common.errors import UserError
from tests import warm
from tests.reward.rows import made


def lengths(completions, **columns):
    return [None if text == "-" else float(len(text)) for text in completions]


ZERO = {"kind": "regex", "pattern": "z"}
"""A part that applies to every row: a row without any is refused."""


def part(**fields) -> list[dict]:
    return [{"kind": "function", "function": lengths, "name": "len", **fields}]


def test_off_by_default():
    assert build_reward(part())(*made(["a", "bbb"])).total_B.tolist() == [1.0, 3.0]


def test_fixed_mean_std_and_clip_come_before_the_weight():
    reward = build_reward([*part(normalise={"mean": 2.0, "std": 0.5}, clip=[-1.5, 1.0], weight=10.0), ZERO])
    scores = reward(*made(["a", "bb", "ccc", "-"]))
    assert scores.parts["len"][:3].tolist() == [-1.5, 0.0, 1.0] and scores.parts["len"][3].isnan()
    assert scores.total_B.tolist() == [-15.0, 0.0, 10.0, 0.0]
    assert scores.parts["len.raw"][:3].tolist() == [1.0, 2.0, 3.0]


def test_measured_on_reference_responses(tmp_path):
    texts = ["a", "bbbb", "cc", "ddddddd"]
    (tmp_path / "reference.jsonl").write_text("".join(json.dumps({"prompt": "q", "completion": t}) + "\n" for t in texts))
    values = [len(t) for t in texts]
    mean = sum(values) / 4
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / 4)
    reward = build_reward(part(normalise={"reference": str(tmp_path / "reference.jsonl")}))
    found = reward(*made(texts)).total_B
    assert found.tolist() == pytest.approx([(v - mean) / std for v in values], abs=1e-6)


def test_references_without_spread_are_refused(tmp_path):
    (tmp_path / "reference.jsonl").write_text(json.dumps({"prompt": "q", "completion": "a"}) + "\n")
    with pytest.raises(UserError, match=r"reward\[0\].*normalise.reference: 1 scored row\(s\) with standard deviation 0"):
        build_reward(part(normalise={"reference": str(tmp_path / "reference.jsonl")}))


def test_running_is_the_mean_and_std_of_everything_so_far():
    reward = build_reward([*part(normalise="running"), ZERO])
    batches, seen = [["a", "bbbb"], ["-", "-"], [], ["cc", "ddddddd", "e"]], []
    for texts in batches:
        scores = reward(*made(texts))
        seen += [float(len(t)) for t in texts if t != "-"]
        mean = sum(seen) / len(seen)
        std = math.sqrt(sum((v - mean) ** 2 for v in seen) / len(seen))
        expected = [0.0 if t == "-" else (len(t) - mean) / std for t in texts]
        assert scores.total_B.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_running_state_goes_through_a_checkpoint():
    first, second = build_reward(part(normalise="running")), build_reward(part(normalise="running"))
    first(*made(["a", "bbbb", "cc"]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    rows = made(["dd", "eeeeee"])
    assert torch.equal(first(*rows).total_B, second(*rows).total_B)
    assert build_reward(part()).state_dict() == {}
    with pytest.raises(UserError, match=r"the saved state and this job differ in the normalised part\(s\) len"):
        build_reward(part()).load_state_dict(first.state_dict())


@pytest.mark.slow
def test_running_counts_the_rows_of_all_ranks_and_a_rank_without_rows_keeps_step(tmp_path):
    job = """
        import json, sys
        from pathlib import Path
        from steerl.reward.build import build_reward
        from steerl.rollout.common import processes
        from tests.reward.rows import made

        def lengths(completions, **columns):
            return [float(len(text)) for text in completions]

        me = processes.start()
        assert me.world_size == 2
        reward = build_reward([{"kind": "function", "function": lengths, "normalise": "running"}])
        assert reward.is_collective
        mine = [["a", "bbb"], ["cc"]] if me.rank == 0 else [["dddd"], []]
        found = [reward(*made(texts)).total_B.tolist() for texts in mine]
        Path(sys.argv[1], f"{me.rank}.json").write_text(json.dumps(found))
        if processes.close():
            processes.end()
    """
    (tmp_path / "job.py").write_text(textwrap.dedent(job))
    done = warm.run_ranks(str(tmp_path / "job.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))

    def scaled(value, seen):
        mean = sum(seen) / len(seen)
        return (value - mean) / math.sqrt(sum((v - mean) ** 2 for v in seen) / len(seen))

    assert first[0] == pytest.approx([scaled(1, [1, 3, 4]), scaled(3, [1, 3, 4])], abs=1e-6)
    assert second[0] == pytest.approx([scaled(4, [1, 3, 4])], abs=1e-6)
    assert first[1] == pytest.approx([scaled(2, [1, 3, 4, 2])], abs=1e-6) and second[1] == []


def test_running_statistics_do_not_lose_precision_far_from_zero():
    state = Running()
    values = 1e7 + torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], dtype=torch.float64)
    for row in values:
        state.add(row)
    assert state.mean == pytest.approx(1e7 + 2.5) and state.std == pytest.approx(math.sqrt(35 / 12), rel=1e-9)


def test_evaluation_uses_the_statistics_and_does_not_change_them():
    reward = build_reward(part(normalise="running", clip=[-1.0, 0.9]))
    assert reward.still()(*made(["abc"])).total_B.tolist() == [pytest.approx(0.9)]  # nothing seen yet: as it is, clipped
    reward(*made(["a", "bbb"]))
    before = reward.state_dict()
    looked = reward.still()
    assert looked(*made(["bb", "ccccc"])).total_B.tolist() == pytest.approx([0.0, 0.9]) and not looked.is_collective
    assert reward.state_dict() == before


def test_equal_values_are_centred_and_not_blown_up():
    assert build_reward(part(normalise="running"))(*made(["a", "b"])).total_B.tolist() == [0.0, 0.0]


def test_rewards_per_token_are_not_normalised():
    from steerl.reward.types import Scores

    def steps(rollout, texts):
        return Scores(torch.zeros(1), tokens_BR=torch.ones(1, 2))

    with pytest.raises(UserError, match="gives a reward per token, which `normalise` and `clip` do not change"):
        build_reward([{"kind": "function", "function": steps, "clip": [0, 1]}])(*made(["ab"]))
