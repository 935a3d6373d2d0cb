"""Dumps: rows come back as they went in, damage is found, plans depend on data and settings alone, changes are refused."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.fingerprint import model_fingerprint, tokenizer_fingerprint
from steerl.rollout.common.progress import Progress, duration
from steerl.rollout.dumps import manifest, store
from steerl.rollout.dumps.dump import left_to_do
from steerl.rollout.dumps.manifest import Plan
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.scoring.logprobs import teacher_forced
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout, Samples, Texts
from tests.dumps import WIDTH_P, WIDTH_R, episodes, flip_bit, made_dump, made_rows, truncate
from tests.episodes import CALCULATOR, samples_of, talk
from tests.models import tiny, tiny_policy, tiny_tokenizer


def equal(left: Rollout, right: Rollout) -> None:
    for name, value in left.pad_to(WIDTH_P, WIDTH_R).tensors().items():
        assert torch.equal(value, right.pad_to(WIDTH_P, WIDTH_R).tensors()[name]), name
    assert (left.kept is None) == (right.kept is None)
    if left.kept and right.kept:
        lists = [[row[: int(n)] for row, n in zip(r.kept.lists(), r.lengths_B, strict=True)] for r in (left, right)]
        assert lists[0] == lists[1]
    for name in ("temperature", "steering", "steering_seed", "start_ids", "greedy"):
        assert getattr(left, name) == getattr(right, name), name


# -- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_rows_come_back_bit_for_bit(tmp_path: Path, chat: bool, rows: int) -> None:
    made_dump(tmp_path, chat=chat, start_ids=(2, 7), greedy=True)
    pairs = list(store.read_dump(tmp_path, rows=rows))
    rollout, texts = Rollout.join([r for r, _ in pairs]), Texts.join([t for _, t in pairs])
    wanted, wanted_texts = made_rows(range(10), chat=chat, start_ids=(2, 7), greedy=True)
    assert all(len(r) <= rows for r, _ in pairs)
    equal(rollout, wanted)
    assert texts == wanted_texts


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_all_that_a_row_records_comes_back_bit_for_bit(tmp_path: Path, rows: int) -> None:
    """Gaps, sites, positions, steps, kept ids: a later reader finds what the sampler had. Shards of one step hold several."""
    made_dump(tmp_path, make=episodes)
    parts = list(store.read_dump(tmp_path, rows=rows))
    rollout, _ = Samples.join(parts)
    wanted, _ = episodes(range(10))
    assert not torch.equal(wanted.action_mask_BR, wanted.extent_BR) and (wanted.lengths_B == 0).any()
    assert (
        wanted.kept and len(wanted.kept.ids) and (wanted.positions_BKN >= 0).any() and wanted.policy_step_B.unique().numel() > 1
    )
    equal(rollout, wanted)


def test_the_columns_of_an_episode_are_plain_lists(tmp_path: Path) -> None:
    """What pandas and datasets see, against the record read entry by entry."""
    import datasets
    import pandas

    made_dump(tmp_path / "dump", make=episodes)
    files = [str(path) for path in sorted((tmp_path / "dump").glob("*.parquet"))]
    frame = pandas.concat([pandas.read_parquet(file) for file in files], ignore_index=True)
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    rollout, _ = episodes(range(10))
    columns = set(store.schema().names) - {"episode"}  # no environment took part
    assert set(frame.columns) == columns == set(table.column_names)
    assert rollout.kept is not None
    kept = rollout.kept.lists()
    for i in range(20):
        length = int(rollout.lengths_B[i])
        mask = [bool(drawn) for drawn in rollout.action_mask_BR[i, :length]]
        starts = [t for t in range(length) if mask[t] and not (t and mask[t - 1])]
        ends = [t + 1 for t in range(length) if mask[t] and not (t + 1 < length and mask[t + 1])]
        for row in (frame.iloc[i], table[i]):
            assert [bool(drawn) for drawn in row["action_mask"]] == mask and len(row["response_ids"]) == length
            assert json.loads(row["turns"]) == [list(turn) for turn in zip(starts, ends, strict=True)]
            assert np.array_equal(np.float32(row["steering_strengths"]), rollout.strength_BK[i].numpy())
            assert np.float32(row["steering_strength"]) == rollout.strength_BK[i, 0].numpy()
            places = [[int(at) for at in site if at >= 0] for site in rollout.positions_BKN[i]]
            assert [[int(at) for at in site] for site in row["steering_positions"]] == places
            assert [[int(token) for token in tokens] for tokens in row["kept"]] == kept[i][:length]
            assert row["policy_step"] == int(rollout.policy_step_B[i])
            assert all(row["policy_logprobs"][t] == 0 for t in range(length) if not mask[t])


def test_calls_of_a_shard_may_differ_in_what_they_record(tmp_path: Path) -> None:
    plan = Plan.of(8, 2, batch_size=1, shard_rows=16)
    begun = manifest.start(tmp_path, plan, {}, {})
    made = [episodes(range(4), kept=None), episodes(range(4, 8), positions_BKN=torch.zeros(8, 2, 0, dtype=torch.int64))]
    store.make_shard(
        tmp_path, plan, 0, lambda call: made[call.start // 4].select([2 * (p % 4) + s for p in call for s in (0, 1)])
    )
    manifest.finish(tmp_path, begun)
    for found, wanted in zip(store.read_dump(tmp_path), made, strict=True):
        equal(found.rollout, wanted.rollout)


def test_rows_that_no_site_touches_come_back() -> None:
    """A sampler without steering, and one whose sites read no position in these rows."""
    rows = len(made_rows([0]).rollout)
    for sites in (0, 2):
        applied = Applied.nothing(torch.arange(rows), 0, sites)
        rollout, texts = made_rows(
            [0], steering="x" * sites, strength_BK=applied.strength_BK, positions_BKN=applied.positions_BKN
        )
        [(back, _)] = store.from_table(store.to_table(rollout, texts))
        assert torch.equal(back.strength_BK, rollout.strength_BK)
        assert back.positions_BKN.tolist() == [[[-1]] * sites] * rows and bool(back.positions_BKN.shape[2]) == bool(sites)


# -- schema 1 ---------------------------------------------------------------------------------------------------------

OLD = Path(__file__).parent / "schema_1"
"""Dumps of 4 prompts with 2 samples each that version 4024743 wrote: not steered, steered at one site, and at two with noise."""


@pytest.mark.parametrize("name", ["plain", "steered", "two"])
def test_a_dump_from_before_is_read(name: str) -> None:
    """Column by column as the file has it; every token was drawn; of the steering only the first site's strength is known."""
    import pyarrow.parquet as pq

    file = pq.read_table(OLD / name / "rollouts-00000.parquet")
    assert len(file.column_names) == 16 and "action_mask" not in file.column_names
    rows = file.to_pylist()
    [(rollout, texts)] = store.read_dump(OLD / name)
    assert rollout.temperature == 0.8 and rollout.kept is None and not rollout.greedy
    assert torch.equal(rollout.action_mask_BR, rollout.extent_BR) and rollout.positions_BKN.shape[2] == 0
    sites = 0 if name == "plain" else 1
    assert rollout.strength_BK.tolist() == [[row["steering_strength"]] * sites for row in rows]
    assert rollout.steering_seed == (0 if name == "plain" else None)
    assert rollout.policy_step_B.tolist() == [row["policy_step"] for row in rows]
    for i, row in enumerate(rows):
        ids = rollout.response_BR[i, : rollout.lengths_B[i]].tolist()
        assert ids == row["response_ids"] and rollout.turns[i] == [(0, len(ids))]
        assert rollout.policy_logprobs_BR[i, : len(ids)].tolist() == row["policy_logprobs"]
        assert (rollout.row_B[i], rollout.sample_B[i], texts.completions[i]) == (i // 2, i % 2, row["response_text"])


def test_rows_from_before_are_scored_again_where_their_steering_is_known() -> None:
    """The stored log-probs are those of the model that drew them (they were over the whole vocabulary then)."""
    policy = tiny_policy("llama", seed=1)
    for name in ("plain", "steered", "two"):
        [(rollout, _)] = store.read_dump(OLD / name)
        spec = manifest.load_manifest(OLD / name)["config"]["steering"]
        steering = Steering(policy.model, spec, policy.tokenizer) if spec else None
        assert rollout.steering == (steering.label if steering else "")
        if name == "two":
            with pytest.raises(UserError, match="the strengths of 1 site"):
                teacher_forced(policy, rollout, steering=steering)
            more = {
                "strength_BK": torch.tensor([[1.5, 0.5]] * len(rollout)),
                "positions_BKN": rollout.positions_BKN.repeat(1, 2, 1),
            }
            guessed = dataclasses.replace(rollout, **more)
            with pytest.raises(UserError, match="seed"):
                teacher_forced(policy, guessed, steering=steering)
        else:
            with torch.no_grad():
                found = teacher_forced(policy, rollout, steering=steering)
            assert (found.logprobs_BR - rollout.policy_logprobs_BR).abs().max() < 1e-4


def test_a_dump_from_before_is_not_gone_on_with(tmp_path: Path) -> None:
    """One dump never holds two schemas: unfinished or damaged it is refused with the remedy, finished it stays as it is."""
    shutil.copytree(OLD / "plain", tmp_path, dirs_exist_ok=True)
    begun = manifest.load_manifest(tmp_path)
    plan = manifest.plan_of(begun)
    config = {**begun["config"], "sampling": {**begun["config"]["sampling"], "a_setting_that_came_later": True}}
    assert manifest.start(tmp_path, plan, config, begun["fingerprints"]) == begun
    assert left_to_do(tmp_path, begun).todo == []
    changed = {**config, "sampling": {**config["sampling"], "temperature": 0.5}}
    with pytest.raises(UserError, match="sampling.temperature: this dump was begun with 0.8"):
        manifest.start(tmp_path, plan, changed, begun["fingerprints"])
    flip_bit(tmp_path / "rollouts-00000.parquet")
    with pytest.raises(UserError, match="earlier version.*--run.overwrite true"):
        left_to_do(tmp_path, begun)
    (tmp_path / "manifest.json").write_text(json.dumps({**begun, "finished": False, "shards": []}))
    with pytest.raises(UserError, match="earlier version.*--run.overwrite true"):
        manifest.start(tmp_path, plan, config, begun["fingerprints"])


def test_a_file_of_a_later_version_is_not_guessed_at() -> None:
    table = store.to_table(*made_rows([0]))
    later = table.replace_schema_metadata({b"steerl": table.schema.metadata[b"steerl"].replace(b'"schema": 2', b'"schema": 3')})
    with pytest.raises(UserError, match="schema 3, this version reads 1 and 2"):
        next(store.from_table(later))


def test_columns_are_the_documented_ones_for_pandas_and_datasets(tmp_path: Path) -> None:
    import datasets
    import pandas

    made_dump(tmp_path / "dump", prompts=10, samples=2)
    files = [str(path) for path in sorted((tmp_path / "dump").glob("*.parquet"))]
    frame = pandas.concat([pandas.read_parquet(file) for file in files], ignore_index=True)
    table = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    rollout, texts = made_rows(range(10))
    kinds = {
        "prompt_index": "int64", "sample_index": "int32", "prompt_ids": "list<int32>", "response_ids": "list<int32>",
        "prompt_text": "string", "response_text": "string", "behaviour_logprobs": "list<float>",
        "policy_logprobs": "list<float>",
        "ended": "bool", "stop_reason": "string", "greedy": "bool", "policy_step": "int64", "steering": "string",
        "steering_strength": "float", "prompt": "string", "columns": "string", "action_mask": "list<bool>", "turns": "string",
        "steering_strengths": "list<float>",
    }  # fmt: skip
    found = {field.name: str(field.type).replace("element: ", "").replace("item: ", "") for field in table.data.schema}
    assert found == kinds
    assert list(frame.columns) == list(kinds)
    for i in range(20):
        length = int(rollout.lengths_B[i])
        for row in (frame.iloc[i], table[i]):
            assert (row["prompt_index"], row["sample_index"]) == (i // 2, i % 2)
            assert list(row["response_ids"]) == rollout.response_BR[i, :length].tolist()
            assert list(row["prompt_ids"]) == rollout.prompt_BP[i][rollout.prompt_mask_BP[i]].tolist()
            assert np.array_equal(np.float32(row["policy_logprobs"]), rollout.policy_logprobs_BR[i, :length].numpy())
            assert np.array_equal(np.float32(row["behaviour_logprobs"]), rollout.behaviour_logprobs_BR[i, :length].numpy())
            assert row["stop_reason"] == ("length", "eos", "stop")[int(rollout.stop_B[i])]
            assert bool(row["ended"]) == (row["stop_reason"] != "length")
            assert json.loads(row["prompt"]) == texts.prompts[i] and row["response_text"] == texts.completions[i]
            assert json.loads(row["columns"]) == {"answer": i // 2 * 2, "tags": ["a", None]}


def test_values_that_json_lacks_are_kept_as_text_or_refused_by_name() -> None:
    rollout, texts = made_rows([0], 1)
    day = Texts(**{**vars(texts), "columns": {"day": [datetime.date(2024, 2, 29)], "count": [np.int64(3)]}})
    [(_, back)] = store.from_table(store.to_table(rollout, day))
    assert back.columns == {"day": ["2024-02-29"], "count": [3]}
    with pytest.raises(UserError, match="bytes"):
        store.to_table(rollout, Texts(**{**vars(texts), "columns": {"image": [b"\0"]}}))


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0.0, 0.01, 0.3, 0.5, 0.9, 1.0])
def test_a_flipped_bit_anywhere_is_found_before_a_row_is_read(tmp_path: Path, at: float) -> None:
    made_dump(tmp_path)
    flip_bit(tmp_path / "rollouts-00001.parquet", at)
    read = store.read_dump(tmp_path)
    equal(next(read)[0], made_rows(range(4))[0])
    with pytest.raises(UserError, match="rollouts-00001.parquet: is damaged"):
        next(read)


def test_truncated_and_lost_shards_are_named(tmp_path: Path) -> None:
    made_dump(tmp_path)
    truncate(tmp_path / "rollouts-00000.parquet")
    (tmp_path / "rollouts-00002.parquet").unlink()
    found = manifest.standing(tmp_path, manifest.load_manifest(tmp_path))
    assert list(found.whole) == [1]
    assert "bytes, expected" in found.damaged[0] and found.damaged[2] == "is missing"


def test_an_unfinished_dump_is_not_read_as_if_it_were_whole(tmp_path: Path) -> None:
    plan = Plan.of(10, 2, 4, 8)
    manifest.start(tmp_path, plan, {}, {})
    store.make_shard(tmp_path, plan, 0, made_rows)
    with pytest.raises(UserError, match="unfinished, 1 of 3 shards"):
        next(store.read_dump(tmp_path))
    with pytest.raises(UserError, match="no manifest.json"):
        next(store.read_dump(tmp_path / "elsewhere"))


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    made_dump(tmp_path)
    kept = json.loads((tmp_path / "manifest.json").read_text())
    rollout, _ = made_rows(range(10))
    assert kept["finished"] and kept["counts"]["rows"] == 20 and kept["counts"]["tokens"] == int(rollout.lengths_B.sum())
    assert sum(kept["counts"]["stop_reasons"].values()) == 20
    for shard in kept["shards"]:
        assert hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        *(f"rollouts-0000{i}.parquet" for i in range(3)),
    ]


# -- plans and resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompts,samples,batch,shard_rows",
    [(1, 1, 8, 0), (10, 3, 4, 0), (250, 8, 32, 0), (7, 2, 64, 5), (5000, 4, 32, 0), (9, 100, 8, 1)],
)
def test_a_plan_holds_every_prompt_once(prompts: int, samples: int, batch: int, shard_rows: int) -> None:
    plan = Plan.of(prompts, samples, batch, shard_rows)
    calls = [prompt for index in range(len(plan)) for call in plan.calls(index) for prompt in call]
    assert calls == list(range(prompts)) == [prompt for index in range(len(plan)) for prompt in plan.shard(index)]
    for index in range(len(plan)):
        assert all(len(call) * samples <= max(manifest.CALL_BATCHES * batch, samples) for call in plan.calls(index))


def test_default_shards_give_work_to_several_processes() -> None:
    assert len(Plan.of(250, 8, 32)) >= 8
    assert Plan.of(1_000_000, 1, 32).shard_prompts == manifest.SHARD_ROWS


def test_changed_settings_are_refused_by_name(tmp_path: Path) -> None:
    plan = Plan.of(10, 2, 4, 8)
    config = {
        "sampling": {"temperature": 0.7, "stop": ["a"]},
        "run": {"dir": "a", "resume": False, "save_every": 8},
        "verify": False,
    }
    manifest.start(tmp_path, plan, config, {"model.path": "aa"})
    other = {
        "sampling": {"temperature": 0.8, "stop": ["b"]},
        "run": {"dir": "b", "resume": True, "save_every": 8},
        "verify": True,
    }
    with pytest.raises(UserError) as refused:
        manifest.start(tmp_path, plan, other, {"model.path": "bb"})
    assert [line.split(":")[0] for line in refused.value.lines] == ["sampling.stop", "sampling.temperature", "model.path"]
    assert "0.7" in refused.value.lines[1] and "0.8" in refused.value.lines[1]
    same = {**other, "sampling": config["sampling"]}
    assert not manifest.start(tmp_path, plan, same, {"model.path": "aa"})["finished"]
    with pytest.raises(UserError, match="run.save_every"):
        manifest.start(tmp_path, plan, {**same, "run": {**same["run"], "save_every": 4}}, {"model.path": "aa"})
    with pytest.raises(UserError, match="run.save_every"):
        manifest.start(tmp_path, Plan.of(11, 2, 4, 8), same, {"model.path": "aa"})


def test_start_clears_what_a_kill_left_and_refuses_shards_without_a_manifest(tmp_path: Path) -> None:
    (tmp_path / ".rollouts-00000.parquet.999999999.tmp").write_text("half")
    (tmp_path / ".tokenizer.999999999.tmp").mkdir()
    alive = tmp_path / f".rollouts-00001.parquet.{os.getppid()}.tmp"
    alive.write_text("another process is writing this")
    manifest.start(tmp_path, Plan.of(1, 1, 1), {}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [alive.name, "manifest.json"]
    alive.unlink()
    (tmp_path / "manifest.json").rename(tmp_path / "rollouts-00000.parquet")
    with pytest.raises(UserError, match="no manifest.json"):
        manifest.start(tmp_path, Plan.of(1, 1, 1), {}, {})


def test_a_damaged_manifest_or_record_is_never_trusted(tmp_path: Path) -> None:
    plan = Plan.of(10, 2, 4, 8)
    begun = manifest.start(tmp_path, plan, {}, {})
    store.make_shard(tmp_path, plan, 0, made_rows)
    truncate(tmp_path / "records" / "00000.json")
    assert manifest.standing(tmp_path, begun).absent == [0, 1, 2]
    truncate(tmp_path / "manifest.json")
    with pytest.raises(UserError, match="manifest.json: damaged"):
        manifest.load_manifest(tmp_path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("instant", range(9))
def test_a_kill_between_any_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instant: int) -> None:
    """Every change of the folder is a rename or a removal; the job dies just before the one numbered `instant`."""
    plan = Plan.of(10, 2, 4, 8)

    def job(folder: Path) -> None:
        begun = manifest.start(folder, plan, {}, {})
        state = manifest.standing(folder, begun)
        for index in sorted([*state.absent, *state.damaged]):
            store.make_shard(folder, plan, index, made_rows)
        manifest.finish(folder, begun, world_size=1)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    job(whole)
    left, replace = [instant], os.replace

    def dying(source: Path, target: Path) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        try:
            job(killed)
        except Killed:
            assert not (killed / "manifest.json").exists() or not manifest.load_manifest(killed)["finished"]
    job(killed)
    files = {folder: {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (whole, killed)}
    assert files[whole] == files[killed]


def test_a_full_disk_is_one_clear_problem_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.of(10, 2, 4, 8)
    manifest.start(tmp_path, plan, {}, {})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="rollouts-00000.parquet.*No space left on device.*free some space"):
        store.make_shard(tmp_path, plan, 0, made_rows)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


# -- fingerprints and progress ------------------------------------------------------------------------------------------


def test_fingerprints_follow_content_alone(tmp_path: Path) -> None:
    model = tiny("gpt2")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert model_fingerprint(model) == model_fingerprint(again) != model_fingerprint(tiny("gpt2", seed=1))
    with torch.no_grad():
        again.transformer.h[1].mlp.c_fc.bias[3] += 1e-6
    assert model_fingerprint(model) != model_fingerprint(again)
    assert len(model_fingerprint(model.to(torch.bfloat16))) == 16
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("abc", truncation=True, max_length=2, padding="max_length")
    assert before == tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(tiny_tokenizer(chat=True))


def test_progress_counts_what_this_run_did() -> None:
    import io

    times = iter([0.0, 1.0, 1.0, 10.0, 10.0])
    stream = io.StringIO()
    progress = Progress("rollouts", 1000, stream, already=500, clock=lambda: next(times))
    progress.add(100, 2000)
    progress.add(400, 3000)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "rollouts: 600 of 1,000 rows (60 %), 2,000 tokens/s, 4 s left"
    assert lines[1] == "rollouts: 1,000 of 1,000 rows (100 %), 500 tokens/s, took 10 s"
    assert [duration(s) for s in (3, 60, 3599, 7260)] == ["3 s", "1 min 00 s", "59 min 59 s", "2 h 01 min"]
    assert not math.isnan(progress.tokens)


def test_progress_on_a_terminal_is_one_line_no_wider_than_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress("rollouts", 1000, stream, clock=iter(range(100)).__next__)
    for _ in range(10):
        progress.add(100, 5000)
    progress.close()
    shown = stream.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n") and shown.count("\r") == 10
    assert all(len(line) < 40 for line in shown.strip("\n").split("\r"))
    Progress("rollouts", 10, None).add(10, 5)


def test_what_was_said_turn_by_turn_comes_back(tmp_path: Path) -> None:
    """Half of a surrogate pair too, which a call's JSON may hold; and no column where no environment took part."""
    odd = talk("odd", ("<say it>", "Error: no \u2028 such"), ("", ""), state={"of": [1, {"two": None}], "said": "\ud800"})
    talks = [*CALCULATOR, odd, talk("text", ("go", " on"), (" there", ""), chat=False, ended_by="turns")]
    samples = samples_of(talks, first_row=0)
    made_dump(tmp_path / "dump", prompts=6, samples=1, shard_rows=4, make=lambda call, _: samples.select(list(call)))
    back = Samples.join(list(store.read_dump(tmp_path / "dump")))
    assert back.texts == samples.texts and back.rollout.turns == samples.rollout.turns
    assert back.texts.episodes[0].messages[1] == {"role": "tool", "content": "5"}
    made_dump(tmp_path / "plain")
    assert [t.episodes for _, t in store.read_dump(tmp_path / "plain")] == [None] * 3


def test_a_dump_begun_before_there_were_environments_goes_on(tmp_path: Path) -> None:
    """One that has an environment does not go on with another; how many calls run side by side is free."""
    plan = Plan.of(4, 1, batch_size=4, shard_rows=2)
    settings = {"sampling": {"n": 1}}
    without = dataclasses.asdict(EnvironmentSettings())
    (tmp_path / "old").mkdir()
    manifest.start(tmp_path / "old", plan, settings, {})
    assert manifest.start(tmp_path / "old", plan, {**settings, "environment": without}, {})["config"] == settings
    search = dataclasses.asdict(EnvironmentSettings(tools=["file.py:search"]))
    with pytest.raises(UserError, match=r"environment.tools: this dump was begun with \[\], and is now asked to go on with"):
        manifest.start(tmp_path / "old", plan, {**settings, "environment": search}, {})
    (tmp_path / "new").mkdir()
    manifest.start(tmp_path / "new", plan, {**settings, "environment": search}, {})
    manifest.start(tmp_path / "new", plan, {**settings, "environment": {**search, "workers": 2}}, {})
    with pytest.raises(UserError, match="environment.max_turns: this dump was begun with 8, and is now asked to go on with 3"):
        manifest.start(tmp_path / "new", plan, {**settings, "environment": {**search, "max_turns": 3}}, {})
