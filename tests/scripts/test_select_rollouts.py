"""Selection through its command, against sorting written out by hand; the files are what the supervised and reward stages read."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from steerl.configs.reader import run_command

import pyarrow.parquet
import pytest

from steerl.rollout.common.errors import UserError
from steerl.rollout.episodes import Episode
from steerl.rollout.types import Samples
from steerl.scripts.select_rollouts import SelectJob, main
from steerl.training.stages.settings import SFTSettings, TableSettings
from steerl.training.stages.sft import read
from tests.dumps import episodes, made_dump, made_rows, write_scores
from tests.episodes import samples_of, talk

PROMPTS, SAMPLES = 10, 4
KEYS = [(p, s) for p in range(PROMPTS) for s in range(SAMPLES)]
SCORE = {(p, s): float((7 * p + 3 * s) % 5) for p, s in KEYS}
"""Some prompts have ties."""


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    made_dump(tmp_path / "dump", PROMPTS, SAMPLES)
    write_scores(tmp_path / "dump", {key: {"total": score, "minus": -score} for key, score in SCORE.items()})
    return tmp_path / "dump"


def select(dump: Path, *argv: str, out: str = "out.jsonl") -> list[dict[str, Any]]:
    path = dump.parent / out
    run_command(main, SelectJob, [str(dump), "--out", str(path), "--overwrite", "true", *argv])
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        run_command(main, SelectJob, list(argv))
    assert left.value.code == 2
    return capsys.readouterr().err


def test_best_and_worst_of_each_prompt_the_earlier_of_equals(dump: Path) -> None:
    best, worst = select(dump, "--select.mode", "best"), select(dump, "--select.mode", "worst")
    for prompt in range(PROMPTS):
        scores = [SCORE[prompt, s] for s in range(SAMPLES)]
        for rows, extreme in ((best, max(scores)), (worst, min(scores))):
            sample = scores.index(extreme)
            assert rows[prompt] == {
                "prompt": f"frage {prompt} – 質問", "completion": f"answer {prompt}.{sample} 🙂",
                "prompt_index": prompt, "sample_index": sample, "score": extreme,
            }  # fmt: skip


def test_the_best_two_by_a_part(dump: Path) -> None:
    rows = select(dump, "--select.score", "minus", "--select.count", "2")
    for prompt in range(PROMPTS):
        wanted = sorted(range(SAMPLES), key=lambda s: SCORE[prompt, s])[:2]
        assert [row["sample_index"] for row in rows if row["prompt_index"] == prompt] == sorted(wanted)


def test_rejection_keeps_all_at_or_above_the_threshold(dump: Path) -> None:
    rows = select(dump, "--select.mode", "reject", "--select.threshold", "3")
    assert [(row["prompt_index"], row["sample_index"]) for row in rows] == [key for key in KEYS if SCORE[key] >= 3]


def test_only_responses_that_ended(dump: Path) -> None:
    ended = made_rows(range(PROMPTS), SAMPLES)[0].ended_B.tolist()
    rows = select(dump, "--select.mode", "reject", "--select.threshold", "-1", "--select.ended", "true")
    assert [(row["prompt_index"], row["sample_index"]) for row in rows] == [
        key for key, end in zip(KEYS, ended, strict=True) if end
    ]


def test_pairs_are_best_against_worst_where_they_differ_enough(dump: Path) -> None:
    rows = select(dump, "--select.mode", "pairs", "--select.min_gap", "2.5")
    wanted = []
    for prompt in range(PROMPTS):
        scores = [SCORE[prompt, s] for s in range(SAMPLES)]
        if max(scores) - min(scores) > 2.5:
            wanted.append(
                (prompt, f"answer {prompt}.{scores.index(max(scores))} 🙂", f"answer {prompt}.{scores.index(min(scores))} 🙂")
            )
    assert [(row["prompt_index"], row["chosen"], row["rejected"]) for row in rows] == wanted
    assert all(row["chosen_score"] - row["rejected_score"] > 2.5 for row in rows)


def test_equal_responses_are_kept_once_and_never_paired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    import tests.dumps

    rows = made_rows
    monkeypatch.setattr(
        tests.dumps,
        "made_rows",
        lambda *a, **k: (lambda r, t: (r, dataclasses.replace(t, completions=["same"] * len(t))))(*rows(*a, **k)),
    )
    made_dump(tmp_path / "dump", PROMPTS, SAMPLES)
    write_scores(tmp_path / "dump", {key: {"total": score} for key, score in SCORE.items()})
    assert len(select(tmp_path / "dump", "--select.count", "3")) == PROMPTS
    assert len(select(tmp_path / "dump", "--select.count", "3", "--select.unique", "false")) == 3 * PROMPTS
    with pytest.raises(SystemExit):
        select(tmp_path / "dump", "--select.mode", "pairs", "--select.unique", "false")


@pytest.mark.parametrize(
    ("mode", "argv", "wanted"),
    [
        # samples of every prompt: (text, score)
        ("best", [], {("twice", 0.75)}),
        ("best", ["--select.count", "3"], {("twice", 0.75), ("once", 0.5)}),
        ("worst", [], {("twice", 0.125)}),
        ("reject", ["--select.threshold", "0.375"], {("twice", 0.75), ("once", 0.5)}),
        ("pairs", [], {("twice", 0.75, "once", 0.5)}),
    ],
)
def test_of_equal_responses_the_scores_say_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, argv: list[str], wanted: set
) -> None:
    import dataclasses

    import tests.dumps

    samples = [("twice", 0.125), ("once", 0.5), ("twice", 0.75), ("twice", 0.75)]
    monkeypatch.setattr(
        tests.dumps,
        "made_rows",
        lambda *a, **k: (lambda r, t: (r, dataclasses.replace(t, completions=[s for s, _ in samples] * (len(t) // 4))))(
            *made_rows(*a, **k)
        ),
    )
    made_dump(tmp_path / "dump", 3, 4)
    write_scores(tmp_path / "dump", {(p, s): {"total": score} for p in range(3) for s, (_, score) in enumerate(samples)})
    rows = select(tmp_path / "dump", "--select.mode", mode, *argv)
    names = ("chosen", "chosen_score", "rejected", "rejected_score") if mode == "pairs" else ("completion", "score")
    for prompt in range(3):
        found = [row for row in rows if row["prompt_index"] == prompt]
        assert {tuple(row[name] for name in names) for row in found} == wanted and len(found) == len(wanted)
        assert all(row.get("sample_index") != 3 for row in found), "of equal scores the earlier"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_datasets_reads_the_file_and_conversations_stay_conversations(tmp_path: Path, suffix: str) -> None:
    import datasets

    made_dump(tmp_path / "dump", PROMPTS, SAMPLES, chat=True)
    (tmp_path / "scores").mkdir()
    write_scores(tmp_path / "scores", {key: {"total": score} for key, score in SCORE.items()})
    out = tmp_path / f"pairs.{suffix}"
    argv = [str(tmp_path / "dump"), "--scores", str(tmp_path / "scores"), "--out", str(out), "--select.mode", "pairs"]
    run_command(main, SelectJob, argv)
    kind = "json" if suffix == "jsonl" else "parquet"
    table = datasets.load_dataset(kind, data_files=str(out), split="train", cache_dir=str(tmp_path / "cache"))
    row = table[0]
    assert row["prompt"] == [{"role": "user", "content": f"frage {row['prompt_index']} – 質問"}]
    assert [message["role"] for message in row["chosen"] + row["rejected"]] == ["assistant", "assistant"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_turn_that_the_prompt_began_is_whole_in_what_later_stages_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    import dataclasses

    import pyarrow.parquet

    import tests.dumps

    rows, ask, tools = made_rows, {"role": "user", "content": "q"}, [{"name": "look"}]

    def begun(*a: Any, **k: Any) -> Any:
        rollout, texts = rows(*a, **k)
        prompts = [[ask, {"role": "assistant", "content": "well "}] if row % 2 else [ask] for row in rollout.row_B.tolist()]
        return rollout, dataclasses.replace(texts, prompts=prompts, columns={"tools": [tools] * len(texts)})

    monkeypatch.setattr(tests.dumps, "made_rows", begun)
    made_dump(tmp_path / "dump", PROMPTS, SAMPLES)
    write_scores(tmp_path / "dump", {key: {"total": score} for key, score in SCORE.items()})
    out = tmp_path / f"out.{suffix}"
    run_command(main, SelectJob, [str(tmp_path / "dump"), "--out", str(out)])
    found = [json.loads(line) for line in out.read_text().splitlines()] if suffix == "jsonl" else None
    for row in found or pyarrow.parquet.read_table(out).to_pylist():
        before = "well " if row["prompt_index"] % 2 else ""
        answer = f"answer {row['prompt_index']}.{row['sample_index']} 🙂"
        assert row["prompt"] == [ask] and row["completion"] == [{"role": "assistant", "content": before + answer}]
        assert json.loads(row["tools"]) == tools


def test_rows_that_were_fed_something_are_not_taken_for_the_policys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_dump(tmp_path / "dump", PROMPTS, SAMPLES, make=episodes)
    write_scores(tmp_path / "dump", {key: {"total": score} for key, score in SCORE.items()})
    line = refused(capsys, str(tmp_path / "dump"), "--out", str(tmp_path / "a.jsonl"))
    rollout, _ = episodes(range(PROMPTS), SAMPLES)
    first = next(i for i in range(len(rollout)) if rollout.action_mask_BR[i].sum() < rollout.lengths_B[i])
    assert f"row {first // SAMPLES} sample {first % SAMPLES} was fed tokens that the policy did not draw" in line
    assert not (tmp_path / "a.jsonl").exists()


def test_bad_input_is_one_line(dump: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [str(dump), "--out", str(tmp_path / "a.jsonl")]
    assert "--out FILE.jsonl" in refused(capsys, str(dump), "--out", "a.txt")
    assert "is no column of the scores; there are total, minus" in refused(capsys, *good, "--select.score", "other")
    assert "select.threshold: missing" in refused(capsys, *good, "--select.mode", "reject")
    assert "select.min_gap: has no effect" in refused(capsys, *good, "--select.min_gap", "1")
    assert "no row of" in refused(capsys, *good, "--select.mode", "reject", "--select.threshold", "99")
    assert "no scores-*.parquet" in refused(capsys, *good, "--scores", str(tmp_path))
    assert "no manifest.json" in refused(capsys, str(tmp_path), "--out", str(tmp_path / "a.jsonl"))
    write_scores(dump, {key: {"total": 1.0} for key in KEYS[:-3]})
    assert "3 of 40 rows have no score, the first prompt 9 sample 1" in refused(capsys, *good)
    write_scores(dump, {**{key: {"total": 1.0} for key in KEYS}, (10, 0): {"total": 1.0}})
    assert "rows that the dump does not have" in refused(capsys, *good)
    assert not (tmp_path / "a.jsonl").exists()


# -- episodes ---------------------------------------------------------------------------------------------------------


def played(chat: bool) -> Samples:
    """Two prompts, two episodes of each."""
    talks = [
        talk("2+3?", ("<add 2 3>", "5"), ("it is 5", ""), chat=chat),
        talk("2+3?", ("six", ""), chat=chat),
        talk("4*5?", ("<mul 4 5>", "20"), ("twenty", ""), chat=chat),
        talk("4*5?", ("<mul 4 4>", "16"), ("it is 16", ""), chat=chat),
    ]
    return samples_of(talks, samples=2, first_row=0)


def played_dump(folder: Path, chat: bool) -> Path:
    rows = played(chat)
    made_dump(folder, 2, 2, make=lambda call, _: rows.select([2 * p + s for p in call for s in (0, 1)]))
    write_scores(folder, {(0, 0): {"total": 1.0}, (0, 1): {"total": 0.0}, (1, 0): {"total": 0.5}, (1, 1): {"total": 0.75}})
    return folder


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_best_episodes_with_all_that_was_said(suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"best.{suffix}"
    run_command(main, SelectJob, [str(played_dump(tmp_path / "dump", True)), "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()] if suffix == "jsonl" else None
    rows = rows or pyarrow.parquet.read_table(out).to_pylist()
    episodes = [played(True).texts.episodes[i] for i in (0, 3)]
    for row, episode in zip(rows, episodes, strict=True):
        assert Episode.of_json(json.loads(row["episode"])) == episode
        assert [message["role"] for message in row["completion"]] == ["assistant", "tool", "assistant"]
        assert [message["content"] for message in row["completion"]] == ["", *[m["content"] for m in episode.messages[1:]]]
        assert row["completion"][0]["tool_calls"][0]["function"] == episode.messages[0]["tool_calls"][0]["function"]


def test_pairs_of_episodes_and_episodes_of_texts(tmp_path: Path) -> None:
    (first, second) = select(played_dump(tmp_path / "chat", True), "--select.mode", "pairs")
    assert first["chosen"][-1]["content"] == "it is 5" and first["rejected"] == [{"role": "assistant", "content": "six"}]
    for row, turns in ((first, [2, 1]), (second, [2, 2])):
        assert [len(json.loads(row[f"{kind}_episode"])["turns"]) for kind in ("chosen", "rejected")] == turns
    rows = select(played_dump(tmp_path / "text", False))
    assert [row["completion"] for row in rows] == ["<add 2 3>5it is 5", "<mul 4 4>16it is 16"]
    assert json.loads(rows[0]["episode"])["turns"][0]["answer"] == "5"


def test_a_turn_that_the_prompt_had_begun_is_whole_in_the_completion(tmp_path: Path) -> None:
    ask = [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "let me see: "}]
    rows = played(True).select([0])
    rows = rows._replace(texts=dataclasses.replace(rows.texts, prompts=[ask]))
    made_dump(tmp_path / "dump", 1, 1, make=lambda call, _: rows)
    write_scores(tmp_path / "dump", {(0, 0): {"total": 1.0}})
    (row,) = select(tmp_path / "dump")
    assert row["prompt"] == ask[:1] and row["completion"][0]["content"] == "let me see: "
    assert row["completion"][0]["tool_calls"] and row["completion"][1:] == played(True).texts.episodes[0].messages[1:]


def test_supervised_learning_takes_no_answer_for_the_policys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    select(played_dump(tmp_path / "text", False), out="text.jsonl")
    select(played_dump(tmp_path / "chat", True), out="chat.jsonl")
    with pytest.raises(UserError, match="row 1: its completion is an episode's, and also holds what the policy was told"):
        read(TableSettings(path=str(tmp_path / "text.jsonl")), 0, "causal", SFTSettings())
    assert read(TableSettings(path=str(tmp_path / "chat.jsonl")), 0, "causal", SFTSettings())[0]
    assert "completions of 2 of 2 rows hold messages of others" in capsys.readouterr().err
    read(TableSettings(path=str(tmp_path / "chat.jsonl")), 0, "causal", SFTSettings(assistant_only=True))
    assert not capsys.readouterr().err
