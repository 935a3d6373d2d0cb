"""Prompts of several data sets: whose rows are drawn when, what their columns are, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

from steerl.configs.reader import read, to_yaml

import pytest

from steerl.rollout.common.errors import UserError
from steerl.rollout.dumps.store import read_dump
from steerl.rollout.prompts.prompts import Prompts, PromptSettings, load_prompts
from steerl.rollout.prompts.sources import Source
from steerl.scripts import dump_rollouts, train_ppo, train_sft
from steerl.scripts.train_ppo import PPOJob
from steerl.training.run.resume import made_from
from steerl.training.settings import PPOSettings
from tests.models import tiny, tiny_policy, tiny_tokenizer


def written(folder: Path, name: str, rows: int, **columns: Any) -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    table = [{"prompt": f"{file.stem[0]}{i}", **columns} for i in range(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(file)


def loaded(*sources: Any, **settings: Any) -> Prompts:
    return load_prompts(PromptSettings(path=list(sources), **settings), tiny_policy("gpt2"))


def drawn(prompts: Prompts, seed: int, position: int, count: int) -> list[str]:
    return [str(prompts.table[row]["prompt"]) for row in prompts.take(seed, position, count)]


def test_without_weights_every_row_comes_once_an_epoch(tmp_path: Path) -> None:
    prompts = loaded(written(tmp_path, "a.jsonl", 5), written(tmp_path, "b.jsonl", 2))
    assert len(prompts) == 7
    for epoch in range(3):
        assert sorted(prompts.take(3, epoch * 7, 7)) == list(range(7))
    whole = written(tmp_path, "c.jsonl", 7)
    assert prompts.take(3, 0, 20) == load_prompts(PromptSettings(path=whole), tiny_policy("gpt2")).take(3, 0, 20)


@pytest.mark.parametrize("weights", [(1, 2), (3.5, 0.5, 1), (0.7, 0.3), (5, 5, 5, 1)])
def test_weights_hold_exactly_over_a_period_and_nearly_everywhere(weights: tuple[float, ...], tmp_path: Path) -> None:
    files = [written(tmp_path, f"{name}.jsonl", 3) for name in "abcd"]
    prompts = loaded(*(Source(path=path, weight=weight) for path, weight in zip(files, weights, strict=False)))
    order = [text[0] for text in drawn(prompts, 5, 0, 400)]
    shares = [Fraction(str(w)) / sum(Fraction(str(v)) for v in weights) for w in weights]
    period = max(share.denominator for share in shares)
    for name, share in zip("abcd", shares, strict=False):
        assert all(order[at : at + period].count(name) == share * period for at in range(0, 400 - period, period))
        counts = itertools.accumulate(letter == name for letter in order)
        assert max(abs(count - share * n) for n, count in enumerate(counts, 1)) < 1.5


def test_a_weighted_order_is_a_function_of_seed_and_position(tmp_path: Path) -> None:
    sources = (Source(path=written(tmp_path, "a.jsonl", 40)), Source(path=written(tmp_path, "b.jsonl", 3), weight=2))
    whole = drawn(loaded(*sources), 7, 0, 120)
    for position, count in ((0, 1), (1, 5), (59, 61), (119, 1)):
        assert drawn(loaded(*sources), 7, position, count) == whole[position : position + count]
    assert drawn(loaded(*sources), 8, 0, 120) != whole
    of_a = [text for text in whole if text[0] == "a"]
    assert len(of_a) == 40 == len(set(of_a))  # each row once, before any comes again
    assert set(Counter(text for text in whole if text[0] == "b").values()) <= {26, 27}


def test_rows_know_their_source_and_columns_are_united(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a.jsonl", 2, answer="x"), written(tmp_path, "b.jsonl", 1, level=3, source="mine")
    c = tmp_path / "c.jsonl"
    c.write_text(json.dumps({"question": "c?", "answer": None}) + "\n")
    prompts = loaded(a, b, Source(path=str(c), source="third"))
    batch = prompts.batch(range(4))
    assert batch.prompts == ["a0", "a1", "b0", "c?"] and batch.column == "prompt"
    assert batch.columns == {
        "source": ["a", "a", "mine", "third"],
        "answer": ["x", "x", None, None],
        "level": [None, None, 3, None],
    }


def test_texts_and_conversations_may_be_mixed(tmp_path: Path) -> None:
    talk = tmp_path / "talk.jsonl"
    talk.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}) + "\n")
    policy = tiny_policy("gpt2").with_model(tiny("gpt2"))
    policy = dataclasses.replace(policy, tokenizer=tiny_tokenizer(chat=True))
    prompts = load_prompts(PromptSettings(path=[written(tmp_path, "a.jsonl", 1), str(talk)]), policy)
    assert prompts.batch([0, 1]).prompts == ["a0", [{"role": "user", "content": "hi"}]]


def test_the_first_rows_are_of_all_sources_in_proportion(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a.jsonl", 8), written(tmp_path, "b.jsonl", 4)
    texts = [loaded(a, b).table[row]["prompt"] for row in loaded(a, b).first(6)]
    assert Counter(text[0] for text in texts) == {"a": 4, "b": 2} and {"a0", "b0"} < set(texts)
    weighted = loaded(a, Source(path=b, weight=2))
    assert [weighted.table[row]["prompt"] for row in weighted.first(3)] == ["b0", "a0", "b1"]
    assert sorted(weighted.first(99)) == list(range(12))
    one = load_prompts(PromptSettings(path=a), tiny_policy("gpt2"))
    assert one.first(3) == [0, 1, 2] and one.first(99) == list(range(8))


def test_limit_is_each_sources(tmp_path: Path) -> None:
    prompts = loaded(written(tmp_path, "a.jsonl", 9), written(tmp_path, "b.jsonl", 2), limit=3)
    assert [row["prompt"] for row in prompts.table] == ["a0", "a1", "a2", "b0", "b1"]


def test_from_the_command_line_and_back(tmp_path: Path) -> None:
    argv = ["--prompts.path", "[a.jsonl, {path: b.jsonl, weight: 2, source: bees}]", "--model.path", "m", "--run.dir", "r"]
    argv += ["--reward", "[{kind: length, max: 3}]"]
    job = read(PPOJob, argv)
    assert job.prompts.path == ["a.jsonl", Source(path="b.jsonl", weight=2.0, source="bees")]
    (tmp_path / "again.yaml").write_text(to_yaml(job))
    assert read(PPOJob, ["--config", str(tmp_path / "again.yaml")]) == job
    with pytest.raises(UserError, match=r"prompts.path\[1\].wieght: unknown .* did you mean prompts.path\[1\].weight|weight"):
        read(PPOJob, ["--prompts.path", "[a.jsonl, {path: b.jsonl, wieght: 2}]", *argv[2:]])


def test_what_is_refused_in_one_line(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a.jsonl", 2, answer="x"), written(tmp_path, "b.jsonl", 2, answer=3)
    (tmp_path / "empty.jsonl").write_text("")
    cases: list[tuple[list[Any], str]] = [
        ([], "prompts.path: missing; name a file"),
        ([a, b], "prompts.path: the column 'answer' is text in a and a number in b; make them alike"),
        ([a, a], "prompts.path: two sources are called '.*a.jsonl'; give each a name of its own"),
        ([a, str(tmp_path / "empty.jsonl")], "prompts.path: .*empty.jsonl has no rows"),
        ([Source(path=a, column="ask")], "prompts.column: 'ask' is not a column; .*a.jsonl has: prompt, answer"),
        (
            [a, Source(path=written(tmp_path, "c.jsonl", 1, ask="?"), column="ask")],
            "prompts in 'ask' and a column 'prompt' beside",
        ),
    ]
    for paths, message in cases:
        with pytest.raises(UserError, match=message) as told:
            loaded(*paths)
        assert len(told.value.lines) == 1
    for weight in (0, -1):
        with pytest.raises(UserError, match="weight: expected more than 0"):
            Source(path=a, weight=weight)
    odd = loaded(Source(path=a, weight=0.123457), Source(path=written(tmp_path, "d.jsonl", 1), weight=1))
    with pytest.raises(UserError, match="the weights 0.123457:1 are exact over .* draws; choose rounder ones"):
        odd.take(0, 0, 1)


def test_fingerprints_name_every_source(tmp_path: Path) -> None:
    a, b = written(tmp_path, "a.jsonl", 2), written(tmp_path, "b.jsonl", 2)
    policy = tiny_policy("gpt2")
    before = loaded(a, b).fingerprints("prompts.path")
    written(tmp_path, "b.jsonl", 2, note="another")
    after = loaded(a, b).fingerprints("prompts.path")
    assert list(before) == ["prompts.path a", "prompts.path b"]
    assert before["prompts.path a"] == after["prompts.path a"] and before["prompts.path b"] != after["prompts.path b"]
    assert not set(after.values()) & set(loaded(b, a).fingerprints("prompts.path").values())
    assert set(after) < set(made_from(policy, loaded(a, b), None, lambda rollout, texts: None, PPOSettings()))


def test_runs_dumps_and_stages_of_several_sources(tmp_path: Path) -> None:
    tiny("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    a, b = (written(tmp_path, f"{name}.jsonl", rows, completion="xyz") for name, rows in (("a", 9), ("b", 2)))
    (tmp_path / "own.py").write_text("def of_b(completions, source):\n    return [float(name == 'b') for name in source]\n")
    model = ["--model.path", str(tmp_path / "model")]
    both = ["--prompts.path", f"[{a}, {{path: {b}, weight: 3}}]"]
    few = ["--sampling.max_new_tokens", "3", "--ppo.rollouts_per_step", "8", "--ppo.eval_prompts", "4", "--run.save_every", "1"]
    few += ["--reward", json.dumps([{"kind": "function", "function": f"{tmp_path / 'own.py'}:of_b"}])]

    def ppo(run: str, steps: int, *flags: str) -> list[dict[str, Any]]:
        flags = ("--ppo.steps", str(steps), "--run.dir", str(tmp_path / run), *flags)
        train_ppo.main(read(PPOJob, [*model, *both, *few, *flags]))
        lines = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if not k.startswith(("time/", "memory/"))} for line in lines]

    whole = ppo("whole", 3)
    ppo("parts", 1)
    assert ppo("parts", 3, "--run.resume", "true") == whole
    for line in whole:
        assert (line["reward/source/a"], line["reward/source/b"]) == (0.0, 1.0)
        assert (line["rollout/source/a"], line["rollout/source/b"]) == (0.25, 0.75) and line["reward/mean"] == 0.75
    written(tmp_path, "b.jsonl", 3, completion="xyz")
    with pytest.raises(UserError, match="prompts.path b: its content is not what the run to resume began with"):
        ppo("parts", 4, "--run.resume", "true")

    dump = [*model, "--sampling.max_new_tokens", "3", "--run.dir", str(tmp_path / "dump"), "--prompts.path"]
    with pytest.raises(UserError, match="the weight of .*b.jsonl has no effect, for a dump has every row once"):
        dump_rollouts.main(read(dump_rollouts.DumpJob, [*dump, both[1]]))
    dump_rollouts.main(read(dump_rollouts.DumpJob, [*dump, f"[{a}, {b}]"]))
    rows = [name for samples in read_dump(tmp_path / "dump") for name in samples.texts.columns["source"]]
    assert rows == ["a"] * 9 + ["b"] * 3

    sft = [*model, "--sft.steps", "1", "--run.dir", str(tmp_path / "sft"), "--prompts.path"]
    with pytest.raises(UserError, match="the weight of .*b.jsonl has no effect, for an epoch has every row once"):
        train_sft.main(read(train_sft.SFTJob, [*sft, both[1]]))
    train_sft.main(read(train_sft.SFTJob, [*sft, f"[{a}, {b}]", "--prompts.heldout", "0.5"]))
    assert (tmp_path / "sft" / "summary.json").is_file()
