"""Inspection through its command: its counts against plain loops over the rows, and what it finds where something is wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from steerl.configs.reader import run_command

import pytest
import torch

from steerl.rollout.dumps import manifest, store
from steerl.rollout.dumps.manifest import Plan
from steerl.scripts.inspect_rollouts import InspectJob, main
from tests.dumps import episodes, flip_bit, made_dump, made_rows, truncate, write_scores
from tests.episodes import CALCULATOR, samples_of


def inspect(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code: Any = 0
    try:
        run_command(main, InspectJob, list(argv))
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


def test_counts_are_those_of_a_plain_loop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_dump(tmp_path)
    write_scores(tmp_path, {(p, s): {"total": p + 0.5 * s, "length": 1.0} for p in range(10) for s in range(2)})
    code, out, err = inspect(capsys, str(tmp_path), "--json", "true")
    found = json.loads(out)
    rollout, _ = made_rows(range(10))
    lengths = rollout.lengths_B.tolist()
    assert (code, err) == (0, "")
    assert found["whole"] and found["finished"] and (found["rows"], found["missing"], found["doubled"]) == (20, 0, 0)
    assert found["lengths"] == {str(k): v for k, v in sorted(Counter(lengths).items())} and found["tokens"] == sum(lengths)
    assert found["stop_reasons"] == Counter(("length", "eos", "stop")[stop] for stop in rollout.stop_B.tolist())
    gaps = {}
    for i, length in enumerate(lengths):
        for t in range(length):
            gap = abs(float(rollout.behaviour_logprobs_BR[i, t]) - float(rollout.policy_logprobs_BR[i, t]))
            gaps[i // 2, i % 2, t] = gap
    assert found["gap"]["mean"] == pytest.approx(sum(gaps.values()) / len(gaps), rel=1e-6)
    worst = max(gaps, key=lambda key: gaps[key])
    assert found["gap"]["max"] == pytest.approx(gaps[worst], rel=1e-6)
    assert tuple(found["worst"][0][name] for name in ("prompt_index", "sample_index", "position")) == worst
    assert found["scores"]["total"] == {
        "rows": 20,
        "mean": 4.75,
        "std": pytest.approx(2.88314, rel=1e-4),
        "min": 0.0,
        "max": 9.5,
    }


def test_of_episodes_the_policys_tokens_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stray numbers at what was fed are nobody's gap."""
    rollout, _ = episodes(range(10))
    mask = [
        [bool(drawn) for drawn in row[:length]] for row, length in zip(rollout.action_mask_BR, rollout.lengths_B, strict=True)
    ]
    stray = {"behaviour_logprobs_BR": torch.where(rollout.action_mask_BR, rollout.behaviour_logprobs_BR, -9.0)}
    made_dump(
        tmp_path,
        make=lambda call, samples: episodes(range(10), samples, **stray).select([2 * p + s for p in call for s in (0, 1)]),
    )
    _, out, _ = inspect(capsys, str(tmp_path), "--json", "true")
    found = json.loads(out)
    assert found["tokens"] == sum(map(sum, mask)) and found["fed_tokens"] == sum(len(row) - sum(row) for row in mask) > 20
    assert found["turns"] == sum(drawn and not (t and row[t - 1]) for row in mask for t, drawn in enumerate(row))
    assert found["lengths"] == {str(k): v for k, v in sorted(Counter(map(sum, mask)).items())}
    gap_BR = (rollout.behaviour_logprobs_BR - rollout.policy_logprobs_BR).abs()
    gaps = [float(gap_BR[i, t]) for i, row in enumerate(mask) for t, drawn in enumerate(row) if drawn]
    assert found["gap"]["max"] == pytest.approx(max(gaps), rel=1e-6)
    assert found["gap"]["mean"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-6)
    assert found["steered"] == {"cheer#1f": 20}
    kept = manifest.load_manifest(tmp_path)
    assert kept["counts"]["tokens"] == found["tokens"]
    _, page, _ = inspect(capsys, str(tmp_path))
    assert f"beside them {found['fed_tokens']} tokens that rows were fed in between" in page


def test_the_page_is_for_a_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_dump(tmp_path)
    code, out, _ = inspect(capsys, str(tmp_path))
    assert code == 0
    assert "finished, 3 of 3 shards whole, 20 of 20 rows" in out and "stop reasons: " in out and "#" in out
    assert max(len(line) for line in out.splitlines() if not line.startswith(str(tmp_path))) <= 100


def damage_manifest(folder: Path) -> None:
    truncate(folder / "manifest.json")


@pytest.mark.parametrize("how", [flip_bit, truncate, Path.unlink])
def test_a_damaged_shard_is_named_and_the_status_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str], how: Any) -> None:
    made_dump(tmp_path)
    how(tmp_path / "rollouts-00001.parquet")
    code, out, err = inspect(capsys, str(tmp_path))
    assert code == 1
    assert "rollouts-00001.parquet" in err and "rollouts-00001.parquet" in out and "rollouts-00000.parquet" not in out
    assert "missing rows: 8, the first (prompt 4, sample 0), (prompt 4, sample 1)" in out


def test_doubled_and_missing_rows_are_found_inside_whole_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.of(4, 2, 4, 4)
    begun = manifest.start(tmp_path, plan, {}, {})
    store.make_shard(tmp_path, plan, 0, made_rows)
    store.make_shard(tmp_path, plan, 1, lambda call: made_rows([1, 3]))  # prompt 1 again, prompt 2 never
    manifest.finish(tmp_path, begun)
    code, out, _ = inspect(capsys, str(tmp_path))
    assert code == 1
    assert "doubled or unexpected rows: 2, such as (prompt 1, sample 0), (prompt 1, sample 1)" in out
    assert "missing rows: 2, the first (prompt 2, sample 0), (prompt 2, sample 1)" in out


def test_log_probs_that_are_not_finite_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollout, texts = made_rows(range(2))
    rollout.policy_logprobs_BR[int(rollout.lengths_B.argmax()), 0] = torch.nan
    plan = Plan.of(2, 2, 4, 4)
    begun = manifest.start(tmp_path, plan, {}, {})
    store.make_shard(tmp_path, plan, 0, lambda call: (rollout, texts))
    manifest.finish(tmp_path, begun)
    code, out, _ = inspect(capsys, str(tmp_path))
    assert code == 1 and "not finite: 1" in out


def test_a_dump_on_its_way_is_unfinished_not_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.of(10, 2, 4, 8)
    manifest.start(tmp_path, plan, {}, {})
    store.make_shard(tmp_path, plan, 1, made_rows)
    code, out, _ = inspect(capsys, str(tmp_path))
    assert code == 0 and "unfinished, 1 of 3 shards whole, 8 of 20 rows" in out


def test_what_is_no_dump_is_one_line_and_status_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = inspect(capsys, str(tmp_path))
    assert code == 2 and "no manifest.json" in err and len(err.splitlines()) == 1
    made_dump(tmp_path)
    damage_manifest(tmp_path)
    code, _, err = inspect(capsys, str(tmp_path))
    assert code == 2 and "manifest.json: damaged" in err and len(err.splitlines()) == 1


def test_episodes_are_counted_and_shown_turn_by_turn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = samples_of(CALCULATOR, first_row=0)
    made_dump(tmp_path, prompts=4, samples=1, shard_rows=2, make=lambda call, _: samples.select(list(call)))
    found = json.loads(inspect(capsys, str(tmp_path), "--json", "true")[1])
    assert found["environment"] == {
        "episodes": 4, "tool_calls": 4, "tool_errors": 1, "cut_answers": 1, "failures": 1, "rewarded": 3, "ended_policy": 3,
        "ended_failure": 1, "reward": 2.5 + 0.5 + 0.25,
    }  # fmt: skip
    _, page, _ = inspect(capsys, str(tmp_path))
    assert "episodes: 4, ended by policy 3, failure 1; 4 calls, 1 failed; 1 answers cut; 1 lost their environment" in page
    assert "the environment's reward: mean 1.0833 of 3 episodes" in page
    shown = page[page.index("episode of prompt 0") :].splitlines()
    assert (
        shown[0] == "episode of prompt 0 sample 0"
        and shown[1] == "> 2+3?"
        and shown[6] == "  = ended by the policy after 2 turns; reward 2.5"
    )
    first, second = (sum(-0.5 - place / 100 for place in places) for places in (range(9), range(12, 19)))
    assert (
        shown[2] == f"<add 2 3>  (9 tokens, log-prob {first:.2f})" and shown[5] == f"it is 5  (7 tokens, log-prob {second:.2f})"
    )
    assert shown[3:5] == ["  | tool: 5", "  + 0.5"] and shown[8] == "episode of prompt 1 sample 0"
    assert "  ! mul: ValueError: no" in shown and "episode of prompt 2 sample 0" not in shown
    _, page, _ = inspect(capsys, str(tmp_path), "--episodes", "9")
    assert "  | tool: lost...\n  + 0.25\n  = ended by a failure: TimeoutError: 60 s" in page
    made_dump(tmp_path / "plain")
    assert "environment" not in json.loads(inspect(capsys, str(tmp_path / "plain"), "--json", "true")[1])
