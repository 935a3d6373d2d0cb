"""Rows of several ranks: what every rank holds is what one process makes of all their parts; what they say, the main one's."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from steerl.reward.types import Scores
from steerl.rollout.types import _SHARED, Rollout, Samples
from steerl.training.algorithm.experience import gather_scored
from tests import warm
from tests.training.algorithm.rows_of_ranks import CASES, rows, scores_of


def bits(value: torch.Tensor) -> tuple[object, ...]:
    """-0.0 is not 0.0, and NaN is itself."""
    return value.dtype, tuple(value.shape), value.contiguous().flatten().view(torch.uint8).tolist()


def whole(rollout: Rollout) -> dict[str, object]:
    kept = None if rollout.kept is None else (bits(rollout.kept.ids), bits(rollout.kept.counts_BR))
    shared = {name: getattr(rollout, name) for name in _SHARED}
    return {name: bits(value) for name, value in rollout.tensors().items()} | shared | {"kept": kept}


def numbers(scores: Scores) -> dict[str, object]:
    parts = {name: bits(values) for name, values in scores.parts.items()}
    tokens = None if scores.tokens_BR is None else bits(scores.tokens_BR)
    return {**vars(scores), "total_B": bits(scores.total_B), "parts": parts, "tokens_BR": tokens, "extra": None}


@pytest.mark.slow
def test_every_rank_holds_the_rows_of_all_and_the_main_one_what_they_say(tmp_path):
    ran = warm.run_ranks("tests/training/algorithm/rows_of_ranks.py", str(tmp_path))
    assert ran.returncode == 0, ran.stderr[-3000:]
    held = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    assert held[0].keys() == held[1].keys() and len(held[0]) == 2 * len(CASES)
    for name, dense in held[0]:
        parts = [samples for samples in CASES[name]() if len(samples.rollout)]
        expected, scores = Samples.join(parts), Scores.join([scores_of(samples, dense) for samples in parts])
        for samples, scored in (ranks[name, dense] for ranks in held):
            assert whole(samples.rollout) == whole(expected.rollout), name
            assert numbers(scored) == numbers(scores), name
        (main, main_scores), (other, other_scores) = (ranks[name, dense] for ranks in held)
        assert main.texts == expected.texts and main_scores.extra == scores.extra
        assert len(other.texts) == 0 and not other.texts.columns and other_scores.extra == {}


def test_one_process_holds_its_own():
    samples = rows(1, 3, 4, 5)
    gathered, scores = gather_scored(samples, lambda *given: scores_of(Samples(*given), True))
    assert whole(gathered.rollout) == whole(samples.rollout) and gathered.texts == samples.texts
    assert numbers(scores) == numbers(scores_of(samples, True))


def test_the_record_has_no_field_that_is_left_behind():
    """What is gathered is: tensors of rows, what all rows share, and the ids that could be drawn."""
    fields = {field.name for field in dataclasses.fields(Rollout)}
    assert fields == {*rows(1, 1, 2, 2).rollout.tensors(), *_SHARED, "kept"}


@pytest.mark.proofs
def test_what_gathering_costs_a_rank_of_64():
    """8,192 rows of 512 + 4,096 tokens: `make proofs` prints the table."""
    found = {}
    for rank in ("main", "other"):
        for way in ("objects", "tensors"):
            command = [sys.executable, "tests/training/algorithm/rows_cost.py", way, rank]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=warm.ROOT)
            found[rank, way] = json.loads(ran.stdout)
            costs = found[rank, way]
            sizes = "  ".join(f"{name} {costs[name] / 1e6:,.0f} MB" for name in ("received", "largest", "memory"))
            print(f"\n{way} on the {rank} rank{'s' * (rank == 'other')}: {costs['seconds']:.2f} s  {sizes}", end="")
    for rank in ("main", "other"):
        old, new = found[rank, "objects"], found[rank, "tensors"]
        assert new["received"] < 0.75 * old["received"] and new["memory"] < 0.7 * old["memory"]
        assert new["largest"] < 0.4 * old["largest"]
