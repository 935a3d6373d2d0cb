"""Prompts that are read as their turn comes: which row is whose turn, on a resume and on several processes, what is held, what ends."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from steerl.configs.reader import read

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.dumps.store import read_dump
from steerl.rollout.prompts.prompts import Prompts, PromptSettings, load_prompts
from steerl.rollout.prompts.stream import Stream
from steerl.scripts import complete, dump_rollouts, train_ppo
from steerl.scripts.train_ppo import PPOJob
from tests.models import tiny, tiny_policy, tiny_tokenizer


def jsonl(folder: Path, rows: int, **columns: Any) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i}", "n": i, **columns}) + "\n\n" for i in range(rows)))
    return str(file)


def csv(folder: Path, rows: int) -> str:
    file = folder / "rows.csv"
    file.write_text("prompt,n\n" + "".join(f'"p{i}\n",{i}\n' for i in range(rows)))
    return str(file)


def parquet(folder: Path, rows: int) -> str:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": [f"p{i}" for i in range(rows)], "n": list(range(rows))})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=7)
    return str(folder / "rows.parquet")


def folder_of_files(folder: Path, rows: int) -> str:
    (folder / "data").mkdir()
    jsonl(folder, rows)
    (folder / "rows.jsonl").rename(folder / "data" / "train.jsonl")
    return str(folder / "data")


KINDS: list[Callable[[Path, int], str]] = [jsonl, csv, parquet, folder_of_files]


def opened(path: str, **settings: Any) -> Prompts:
    return load_prompts(PromptSettings(path=path, streaming=True, **settings), tiny_policy("gpt2"))


def numbers(prompts: Prompts, seed: int, position: int, count: int) -> list[int]:
    """What a step sees: the rows' own numbers, which are those that the file has them under."""
    rows = prompts.take(seed, position, count)
    found = [int(n) for n in prompts.batch(rows).columns["n"]]  # type: ignore[call-overload]
    assert found == rows
    return found


def by_definition(seed: int, rows: int, buffer: int, count: int) -> list[int]:
    """Epoch after epoch the file's blocks in turn, each shuffled for itself."""
    order: list[int] = []
    epoch = 0
    while len(order) < count:
        for block, begins in enumerate(range(0, rows, buffer)):
            size = min(buffer, rows - begins)
            key = torch.Generator().manual_seed((seed + 7919 * block) * 1_000_003 + epoch)
            order += [begins + int(at) for at in torch.randperm(size, generator=key)]
        epoch += 1
    return order[:count]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffer", [1, 4, 10, 23, 50])
def test_blocks_in_turn_each_shuffled(kind: Callable[[Path, int], str], buffer: int, tmp_path: Path) -> None:
    path = kind(tmp_path, 23)
    assert numbers(opened(path, shuffle_buffer=buffer), 3, 0, 80) == by_definition(3, 23, buffer, 80)


@pytest.mark.parametrize("kind", KINDS)
def test_taken_up_anywhere(kind: Callable[[Path, int], str], tmp_path: Path) -> None:
    path, whole = kind(tmp_path, 23), by_definition(5, 23, 4, 120)
    for position in (0, 3, 4, 21, 22, 23, 24, 45, 46, 91, 100):  # within, at and beyond the ends of blocks and of epochs
        assert numbers(opened(path, shuffle_buffer=4), 5, position, 9) == whole[position : position + 9]
    prompts = opened(path, shuffle_buffer=4)
    for position in (100, 0, 91, 22, 3, 50):  # back and forth in one
        assert numbers(prompts, 5, position, 9) == whole[position : position + 9]


def test_a_buffer_that_holds_all_is_the_plain_order(tmp_path: Path) -> None:
    path = jsonl(tmp_path, 40)
    plain = load_prompts(PromptSettings(path=path), tiny_policy("gpt2"))
    assert opened(path).take(7, 0, 130) == plain.take(7, 0, 130)
    assert opened(path).batch([3, 39, 0]) == plain.batch([3, 39, 0])


@pytest.mark.parametrize("limit", [0, 1, 8, 12, 23, 99])
def test_the_files_order_and_a_limit(limit: int, tmp_path: Path) -> None:
    rows = min(limit or 23, 23)
    prompts = opened(jsonl(tmp_path, 23), shuffle_buffer=0, limit=limit)
    assert numbers(prompts, 1, 0, 60) == [at % rows for at in range(60)]
    assert (len(prompts), prompts.first(10)) == (rows, list(range(min(rows, 10))))
    blocks = opened(str(tmp_path / "rows.jsonl"), shuffle_buffer=4, limit=limit)
    assert numbers(blocks, 1, 0, 60) == by_definition(1, rows, 4, 60)
    with pytest.raises(UserError, match=f"row {rows} is asked for, but there are {rows} rows"):
        prompts.batch([rows])


def test_a_data_set_that_streams_is_taken_as_it_is(tmp_path: Path) -> None:
    import datasets

    given = datasets.load_dataset("json", data_files=jsonl(tmp_path, 23), streaming=True, split="train")
    prompts = Prompts(given, "prompt", tiny_policy("gpt2"), PromptSettings(streaming=True, shuffle_buffer=4))
    assert numbers(prompts, 5, 40, 30) == by_definition(5, 23, 4, 70)[40:]


def test_few_rows_are_held_and_each_is_read_once_an_epoch(tmp_path: Path) -> None:
    read: list[int] = []

    def rows(begin: int) -> Iterator[dict[str, object]]:
        for at in range(begin, 100_000):
            read.append(at)
            yield {"prompt": f"p{at}", "text": "x" * 1000}

    stream = Stream(rows, "rows", buffer=100)
    assert len(read) <= 1100
    read.clear()
    stream.at(0, 0)
    gc.collect()
    tracemalloc.start()
    for step in range(300):
        for at in range(step * 100, step * 100 + 100):
            stream[stream.at(0, at)]
        stream.first(8)  # an evaluation between
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 4 * 100 * 2000 + 2_000_000, held  # of 30 MB that went by
    assert len(read) <= 30_000 + 1000


def test_another_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = jsonl(tmp_path, 2000)
    before = opened(path).fingerprints("prompts.path")
    assert opened(path).fingerprints("prompts.path") == before
    Path(path).write_text(Path(path).read_text() + '{"prompt": "one more", "n": 2000}\n')
    assert opened(path).fingerprints("prompts.path") != before


def refused(**settings: Any) -> str:
    with pytest.raises(UserError) as found:
        load_prompts(PromptSettings(**settings), tiny_policy("gpt2"))
    assert len(found.value.lines) == 1
    return str(found.value)


def test_what_cannot_be_streamed_is_one_line(tmp_path: Path) -> None:
    import datasets

    path = jsonl(tmp_path, 5)
    assert "shuffle_buffer: has no effect" in refused(path=path, shuffle_buffer=5)
    assert "shuffle_buffer: -1" in refused(path=path, shuffle_buffer=-1, streaming=True)
    assert "prompts.path is a list" in refused(path=[path], streaming=True)
    (tmp_path / "whole.json").write_text("[]")
    assert "whole.json cannot be read piece by piece" in refused(path=str(tmp_path / "whole.json"), streaming=True)
    assert "none.jsonl does not exist" in refused(path=str(tmp_path / "none.jsonl"), streaming=True)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "has no rows" in refused(path=str(tmp_path / "empty.jsonl"), streaming=True)
    datasets.Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    assert "read when asked for anyway" in refused(path=str(tmp_path / "saved"), streaming=True)
    assert "neither a file or folder here" in refused(path="nobody/nothing-at-all", streaming=True)
    (tmp_path / "no.parquet").write_text("no parquet")
    assert "cannot be read as parquet" in refused(path=str(tmp_path / "no.parquet"), streaming=True)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("{broken", "line 2003 is not JSON"),
        ('{"prompt": ""}', "row 2002 of .*rows.jsonl: the column 'prompt' is empty"),
        ('{"prompt": "a", "late": 1}', "row 2002 of .*rows.jsonl has a column 'late', which its first 1,000 rows lack"),
        ("\udcff", "cannot be read from row"),
    ],
)
def test_what_is_met_on_the_way_is_one_line(row: str, told: str, tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{i}"}) for i in range(2002)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, row]) + "\n", errors="surrogateescape")
    prompts = opened(str(tmp_path / "rows.jsonl"), shuffle_buffer=0)
    prompts.batch(prompts.take(0, 0, 500))
    with pytest.raises(UserError, match=told) as found:
        prompts.batch(prompts.take(0, 2000, 5))
    assert len(found.value.lines) == 1


def test_a_column_that_comes_late_in_a_large_first_block_is_there(tmp_path: Path) -> None:
    lines = [{"prompt": f"p{i}"} for i in range(1200)] + [{"prompt": "p1200", "late": 7}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = opened(str(tmp_path / "rows.jsonl"), shuffle_buffer=2000).batch([0, 1200])
    assert batch.columns == {"late": [None, 7]}


def test_runs_and_dumps(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    path = jsonl(tmp_path, 10)
    (tmp_path / "own.py").write_text("def even(completions, n):\n    return [float(i % 2) for i in n]\n")
    given = ["--model.path", str(tmp_path / "model"), "--prompts.path", path, "--sampling.max_new_tokens", "3"]
    few = ["--ppo.rollouts_per_step", "4", "--ppo.eval_prompts", "4", "--run.save_every", "1"]
    few += ["--reward", json.dumps([{"kind": "function", "function": f"{tmp_path / 'own.py'}:even"}])]
    streaming = ["--prompts.streaming", "true", "--prompts.shuffle_buffer"]

    def ppo(run: str, steps: int, *flags: str) -> list[dict[str, Any]]:
        flags = ("--ppo.steps", str(steps), "--run.dir", str(tmp_path / run), *flags)
        train_ppo.main(read(PPOJob, [*given, *few, *flags]))
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "memory/"))} for line in lines]

    assert ppo("held", 4) == ppo("stream", 4, *streaming, "10")
    ppo("parts", 2, *streaming, "3")
    parts = ppo("parts", 4, *streaming, "3", "--run.resume", "true")  # over the end of the rows, which begin anew
    assert parts == ppo("whole", 4, *streaming, "3") != ppo("other", 4, *streaming, "4")
    with pytest.raises(UserError, match="prompts.shuffle_buffer: 4, but the run to resume has 3"):
        ppo("parts", 5, *streaming, "4", "--run.resume", "true")

    dumps = []
    for name, more in (("dump", []), ("dump of a stream", [*streaming, "4"])):
        dump_rollouts.main(read(dump_rollouts.DumpJob, [*given, "--run.dir", str(tmp_path / name), *more]))
        dumps.append([row for samples in read_dump(tmp_path / name) for row in samples.rollout.response_BR.tolist()])
    assert dumps[0] == dumps[1] and len(dumps[0]) == 10

    jsonl(tmp_path, 11)
    with pytest.raises(UserError, match="prompts.path: its content is not what the run to resume began with"):
        ppo("parts", 5, *streaming, "3", "--run.resume", "true")
    with pytest.raises(UserError, match="prompts.streaming: has no effect on steerl complete"):
        complete.main(read(complete.CompleteJob, [*given, "--prompts.streaming", "true"]))
