"""`steerl export`: its files read by datasets and TRL here, by the other projects' own readers in .venv-tools (readers.py); what
is to come out is written down by hand or read out of the dump."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

from steerl.configs.reader import run_command

import pytest
import torch

from steerl.rollout.dumps.store import read_dump
from steerl.rollout.types import Samples
from steerl.scripts import dump_rollouts
from steerl.scripts import export as command
from steerl.scripts.dump_rollouts import DumpJob
from steerl.scripts.export import ExportJob
from steerl.training.formats.messages import linked
from tests.conftest import TOOLS
from tests.dumps import episodes, flip_bit, made_dump, made_rows, write_scores
from tests.episodes import samples_of, talk

OUT = {"trl": "rows.parquet", "verifiers": "traces.jsonl", "sts": "sessions", "inspect": "log.eval", "openai": "messages.jsonl"}
HOSTILE = "</script>\x00\x1b[31m\u2028 שלום 👩‍🚀"
HALF = "\ud83d"
ADD = {"type": "function", "function": {"name": "add", "description": "The sum.", "parameters": {"type": "object"}}}


def export(source: Path, to: str, *argv: str, out: str = "") -> Path:
    path = source.parent / (out or f"{source.name}-{OUT[to]}")
    run_command(command.main, ExportJob, [str(source), str(path), "--to", to, *argv])
    return path


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    with pytest.raises(SystemExit) as left:
        run_command(command.main, ExportJob, list(map(str, argv)))
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.count("\n") == 1, told
    return told


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def asked_twice(call: range, samples: int, **columns: Any) -> Samples:
    """A tool that answers, one that fails, a call that cannot be read, and what the policy says then."""
    talks = [
        talk(
            f"{p}+{s}?", ("<add 2 3>", "5"), ("<add 1>", "Error: one number"), ("{hm", "no call"), (f"it is {p}", ""),
            rewards=[0.5, None, None, 1.0 + p], state={"said": HALF + HOSTILE},
        )
        for p in call for s in range(samples)
    ]  # fmt: skip
    found = samples_of(talks, samples, first_row=call[0], **{n: list(v) * len(talks) for n, v in columns.items()})
    for episode in found.texts.episodes or []:
        episode.turns[2].answer[0] |= {"role": "tool", "name": ""}  # type: ignore[index, operator]
    return found


def hostile(call: range, samples: int) -> Samples:
    """A prompt of several messages, of which the last is begun for the policy; texts of all kinds; an empty response."""
    rollout, texts = made_rows(call, samples, chat=True)
    for i, prompt in enumerate(texts.prompts):
        prompt[:0] = [{"role": "system", "content": HOSTILE}, {"role": "assistant", "content": "earlier"}]
        prompt.append({"role": "assistant", "content": "So "})
        texts.completions[i] = ["", HOSTILE, "x" * 100_000][i % 3]
    texts.columns["tools"] = [[ADD]] * len(texts)
    texts.columns["reward"] = ["42", 'a "name" of ours'] * (len(texts) // 2)
    texts.columns["mixed"] = ["42", 7, None, {"a": [1.5]}, "[1]", True][: len(texts)]
    return Samples(rollout, texts)


@pytest.fixture
def dump(tmp_path: Path) -> Path:
    """Texts, scored by two parts, one of which does not apply to all rows."""
    made_dump(tmp_path / "dump", 3, 2)
    keys = list(itertools.product(range(3), range(2)))
    write_scores(tmp_path / "dump", {(p, s): {"total": p + s / 3, "short": math.nan if s else -p} for p, s in keys})
    return tmp_path / "dump"


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    made_dump(tmp_path / "talks", 2, 2, make=asked_twice)
    manifest = tmp_path / "talks" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"tools": [ADD]}))
    return tmp_path / "talks"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    made_dump(tmp_path / "chats", 3, 2, make=hostile)
    write_scores(tmp_path / "chats", {(p, s): {"total": p - s} for p in range(3) for s in range(2)})
    return tmp_path / "chats"


SAMPLE = {
    "step": 4, "kind": "best", "row": 7, "sample": 1, "prompt": "say it", "prompt_text": "<s>say it", "completion": HOSTILE,
    "reward": 0.75, "parts": {"kind": 0.5, "not here": None}, "kl": 0.25, "ended": True, "stop_reason": "eos",
    "steering": "cheer#1f", "strength": 2.5, "prompt_ids": [1, 5], "prompt_tokens": ["<s>", "say"], "response_ids": [9, 8, 2],
    "response_tokens": ["a", "b", "</s>"], "action_mask": [True, False, True], "policy_logprobs": [-0.1, None, -0.25],
    "behaviour_logprobs": [-0.125, None, -0.3], "reference_logprobs": [-1.0, None, -2.0], "entropy": [0.5, None, 0.75],
    "values": [0.1, None, 0.2], "rewards": [0.0, None, 0.75], "advantages": [0.5, None, 1.5], "returns": [0.6, None, 1.7],
    "extra/kind/note": "a note", "gap": [0.0, None, 0.0], "importance": None, "ratio": [1.0, None, 1.25],
}  # fmt: skip
"""A line of samples.jsonl, as docs/metrics.md describes it."""


@pytest.fixture
def gone(tmp_path: Path) -> Path:
    """Texts with an environment that fails: after a turn, and before the first one."""

    def make(call: range, samples: int) -> Samples:
        said = talk("go", ("left", " wall"), chat=False, ended_by="failure", failure="it raised", rewards=[0.25])
        return samples_of([said, talk("go", chat=False, ended_by="failure", failure="no reset")], first_row=0)

    made_dump(tmp_path / "gone", 2, 1, make=make)
    return tmp_path / "gone"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two lines are of one row: it was the best, and a random one, too."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text('{"step": 4}\n')
    (folder / "config.yaml").write_text("model: {path: someone/small-model}\nprompts: {path: prompts.jsonl}\n")
    rows = [SAMPLE, {**SAMPLE, "kind": "random"}, {**SAMPLE, "step": 5, "advantages": [0.25, None, 0.25], "reward": -1.0}]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# -- messages: openai, sts ------------------------------------------------------------------------------------------------


def call(name: str, function: str, arguments: str) -> dict[str, Any]:
    return {"id": name, "type": "function", "function": {"name": function, "arguments": arguments}}


def test_an_episode_as_openais_messages(talks: Path) -> None:
    found = lines(export(talks, "openai"))
    assert len(found) == 4 and found[1] == {
        "messages": [
            {"role": "user", "content": "0+1?"},
            {"role": "assistant", "content": "", "tool_calls": [call("call_1", "add", '{"of": ["2", "3"]}')]},
            {"role": "tool", "tool_call_id": "call_1", "content": "5"},
            {"role": "assistant", "content": "", "tool_calls": [call("call_2", "add", '{"of": ["1"]}')]},
            {"role": "tool", "tool_call_id": "call_2", "content": "Error: one number"},
            {"role": "assistant", "content": "{hm"},
            {"role": "user", "content": "no call"},
            {"role": "assistant", "content": "it is 0"},
        ],
        "tools": [ADD],
    }


def test_a_begun_turn_goes_on_and_the_prompts_turns_weigh_nothing(chats: Path) -> None:
    found = lines(export(chats, "openai"))
    assert [row["messages"][-1] for row in found[:3]] == [
        {"role": "assistant", "content": f"So {text}"} for text in ("", HOSTILE, "x" * 100_000)
    ]
    assert found[0]["messages"][:3] == [
        {"role": "system", "content": HOSTILE},
        {"role": "assistant", "content": "earlier", "weight": 0},
        {"role": "user", "content": "frage 0 – 質問"},
    ]
    assert found[0]["tools"] == [ADD]


def test_each_result_is_linked_to_its_own_call() -> None:
    """Two calls at once, of which the first could not be read; two of one tool; ids that are there already."""
    two = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in ("add", "add", "sub")]
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "{hm", "tool_calls": two},
        *({"role": "tool", "name": name, "content": "..."} for name in ("", "add", "sub", "add")),
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": {"name": "add", "arguments": "{oh"}}]},
        {"role": "tool", "tool_call_id": "x", "content": "..."},
    ]
    found = linked(messages)
    assert [call["id"] for call in found[1]["tool_calls"]] == ["call_1", "call_2", "call_3"]
    assert [message["tool_call_id"] for message in found if message["role"] == "tool"] == [
        "",
        "call_1",
        "call_3",
        "call_2",
        "x",
    ]
    assert found[6]["tool_calls"][0]["function"]["arguments"] == "{oh" and "tool_call_id" not in messages[2]


def test_what_follows_the_last_turn_is_not_learned_from(tmp_path: Path) -> None:
    def cut(rows: range, samples: int) -> Samples:
        return samples_of([talk("?", ("one", "more"), ("two", "and more"), ended_by="tokens", reward=1.0)], first_row=0)

    made_dump(tmp_path / "dump", 1, 1, make=cut)
    said = [(message["role"], message["content"]) for message in lines(export(tmp_path / "dump", "openai"))[0]["messages"]]
    assert said == [("user", "?"), ("assistant", "one"), ("user", "more"), ("assistant", "two")]


def check_session(path: Path) -> list[dict[str, Any]]:
    """The rules of the hub's page on session traces, one by one; the messages."""
    header, *rest = lines(path)
    assert header["type"] == "session"
    assert all(isinstance(header[name], str) and header[name] for name in ("harness", "id"))
    assert isinstance(header.get("name", ""), str)
    asked: set[str] = set()
    for line in rest:
        message = line["message"]
        assert line.keys() == {"type", "message"} and line["type"] == "message"
        assert message["role"] in ("user", "assistant", "system", "tool") and isinstance(message["content"], str)
        assert message.keys() <= {
            *("role", "content", "reasoningContent", "toolCalls", "toolCallId", "timestamp", "model"),
        }
        for made in message.get("toolCalls", []):
            assert message["role"] == "assistant" and made.keys() == {"id", "function"}
            assert isinstance(json.loads(made["function"]["arguments"]), dict) and made["function"]["name"]
            asked.add(made["id"])
        if "toolCallId" in message:
            assert message["role"] == "tool" and message["toolCallId"] in asked
    return [line["message"] for line in rest]


def test_sessions_keep_to_the_rules_of_the_hub(talks: Path, chats: Path, gone: Path, dump: Path, run: Path) -> None:
    for source, rows in ((talks, 4), (chats, 6), (gone, 2), (dump, 6), (run, 3)):
        folder = export(source, "sts")
        found = {path.name: check_session(path) for path in folder.iterdir()}
        assert len(found) == rows
        ids = {json.loads(path.read_text().partition("\n")[0])["id"] for path in folder.iterdir()}
        assert len(ids) == rows
    assert found["step4-2.jsonl"] == [
        {"role": "user", "content": "say it"},
        {"role": "assistant", "content": HOSTILE, "model": "someone/small-model"},
    ]
    talked = check_session(talks.parent / "talks-sessions" / "1-0.jsonl")
    assert talked[1]["toolCalls"] == [{"id": "call_1", "function": {"name": "add", "arguments": '{"of": ["2", "3"]}'}}]
    assert [message.get("toolCallId") for message in talked] == [None, None, "call_1", None, "call_2", None, None, None]
    header = lines(talks.parent / "talks-sessions" / "1-0.jsonl")[0]["metadata"]
    assert header["reward"] == 2.5 and header["prompt_index"] == 1


# -- trl ------------------------------------------------------------------------------------------------------------------


def table(path: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))


def test_the_numbers_of_a_dump_come_back_bit_by_bit(tmp_path: Path) -> None:
    made_dump(tmp_path / "dump", 5, 2, make=episodes)
    rows = table(export(tmp_path / "dump", "trl", "--scores", "none"))
    at = 0
    for rollout, texts in read_dump(tmp_path / "dump"):
        for i in range(len(rollout)):
            row, length, mask = rows[at], int(rollout.lengths_B[i]), rollout.action_mask_BR[i]
            assert row["prompt_ids"] == rollout.prompt_ids[i] and row["completion_ids"] == rollout.response_ids[i]
            assert row["tool_mask"] == mask[:length].int().tolist()
            for name, values_BR in (
                ("logprobs", rollout.behaviour_logprobs_BR),
                ("policy_logprobs", rollout.policy_logprobs_BR),
            ):
                assert [v is not None for v in row[name]] == mask[:length].tolist()
                found = torch.tensor([v for v in row[name] if v is not None], dtype=torch.float32)
                assert torch.equal(found, values_BR[i][mask])
            assert (row["prompt"], row["completion"]) == (texts.prompts[i], texts.completions[i])
            assert row["strengths"] == rollout.strength_BK[i].tolist() and row["steering"] == "cheer#1f"
            assert row["step"] == int(rollout.policy_step_B[i]) and row["tags"] == ["a", None]
            at += 1
    assert at == len(rows) == 10 and "reward" not in rows.column_names


def test_a_scored_dump_is_a_flat_table(dump: Path) -> None:
    rows = table(export(dump, "trl"))
    assert rows["reward"] == [pytest.approx(p + s / 3) for p in range(3) for s in range(2)]
    assert rows["short"] == [0.0, None, -1.0, None, -2.0, None] and rows["answer"] == [0, 0, 2, 2, 4, 4]
    assert {name: rows.features[name].dtype for name in ("prompt", "completion", "reward", "answer")} == {
        "prompt": "string", "completion": "string", "reward": "float64", "answer": "int64",
    }  # fmt: skip
    assert "episode" not in rows.column_names and "advantage" not in rows.column_names


def test_conversations_and_columns_are_what_they_were(chats: Path, talks: Path) -> None:
    rows = table(export(chats, "trl"))
    assert rows[1]["completion"] == [{"role": "assistant", "content": f"So {HOSTILE}"}]
    assert rows[0]["prompt"][0] == {"role": "system", "content": HOSTILE} and len(rows[0]["prompt"]) == 3
    assert rows["columns/reward"] == ["42", 'a "name" of ours'] * 3 and rows["reward"] == [0.0, -1.0, 1.0, 0.0, 2.0, 1.0]
    assert rows[0]["tools"] == [ADD]
    assert rows["mixed"] == ["42", 7, None, {"a": [1.5]}, "[1]", True]
    rows = table(export(talks, "trl"))
    assert rows[2]["completion"][0]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"of": ["2", "3"]}}}
    ]
    assert [message["role"] for message in rows[2]["completion"]] == ["assistant", "tool"] * 3 + ["assistant"]
    assert rows[2]["tools"] == [ADD]
    assert rows[2]["reward"] == 2.5 and rows[2]["episode"]["state"]["said"] == "\ufffd" + HOSTILE


def test_a_runs_samples_with_advantages_and_all_their_numbers(run: Path) -> None:
    rows = table(export(run, "trl"))
    assert rows["advantage"] == [1.0, 1.0, 0.25] and rows["kind"] == ["best", "random", "best"]
    first = rows[0]
    assert first["logprobs"] == SAMPLE["behaviour_logprobs"] and first["tool_mask"] == [1, 0, 1]
    for name in ("policy_logprobs", "reference_logprobs", "entropy", "values", "rewards", "advantages", "returns", "ratio"):
        assert first[name] == SAMPLE[name], name
    assert first["rewards/kind"] == 0.5 and "not here" not in rows.column_names and "prompt_tokens" not in rows.column_names
    assert (first["extra/kind/note"], first["strength"], first["step"]) == ("a note", 2.5, 4)


def test_trl_trains_on_it(tmp_path: Path, dump: Path, tiny_world: Any) -> None:
    """Texts by their tokens; conversations by the template, the prompts' tokens left out of the loss."""
    from trl import SFTConfig, SFTTrainer

    def trained(model: Path, path: Path) -> Any:
        rows = table(path)
        args = SFTConfig(
            str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False
        )
        trainer = SFTTrainer(str(model), args=args, train_dataset=rows)
        assert trainer.train().global_step == 2
        return trainer

    trained(tiny_world("reviews") / "base", export(dump, "trl"))
    made_dump(tmp_path / "tools", 2, 2, make=asked_twice)
    trainer = trained(tiny_world("calculator") / "base", export(tmp_path / "tools", "trl"))
    row = trainer.train_dataset[0]
    learned = trainer.processing_class.decode([token for token in row["labels"] if token != -100])
    whole = trainer.processing_class.decode(row["input_ids"])
    assert "it is 0" in learned and "0+0?" in whole and "0+0?" not in learned


def test_a_dump_with_tools_keeps_their_schemas(tmp_path: Path, tiny_world: Any) -> None:
    """A real one, of a policy that was taught to call them."""
    world = tiny_world("calculator")
    flags = {
        "model.path": world / "base", "prompts.path": world / "prompts.jsonl", "prompts.limit": 4, "run.dir": tmp_path / "dump",
        "environment.tools": f"[{world / 'tools.py'}:add, {world / 'tools.py'}:multiply]", "sampling.max_new_tokens": 32,
    }  # fmt: skip
    run_command(dump_rollouts.main, DumpJob, [word for name, value in flags.items() for word in (f"--{name}", str(value))])
    for row in lines(export(tmp_path / "dump", "openai")):
        assert [tool["function"]["name"] for tool in row["tools"]] == ["add", "multiply"]
        assert row["tools"][0]["function"]["parameters"]["properties"].keys() == {"a", "b"}


# -- what is refused, and what is left then --------------------------------------------------------------------------------


def test_refusals_are_one_line(tmp_path: Path, dump: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_dump(tmp_path / "bare", 3, 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "there.jsonl").write_text("mine")
    new = tmp_path / "new.jsonl"
    to = ("--to", "openai")
    assert "score it with steerl score" in refused(capsys, tmp_path / "bare", tmp_path / "n.eval", "--to", "inspect")
    assert "no scores-*.parquet" in refused(capsys, tmp_path / "bare", new, *to, "--scores", tmp_path / "empty")
    assert "holds neither" in refused(capsys, tmp_path / "empty", new, *to)
    assert "is not a folder" in refused(capsys, tmp_path / "nowhere", new, *to)
    assert "a run, whose samples have their rewards" in refused(capsys, run, new, *to, "--scores", dump)
    assert "is there already" in refused(capsys, dump, tmp_path / "there.jsonl", *to)
    assert "holds more than an export (thesis.tex)" in refused(
        capsys, dump, tmp_path / "full", "--to", "sts", "--overwrite", "true"
    )
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.jsonl").write_text("mine")
    data = refused(capsys, dump, tmp_path / "data", "--to", "sts", "--overwrite", "true")
    assert "holds more than an export (prompts.jsonl)" in data
    own = refused(capsys, run, run / "samples.jsonl", *to, "--overwrite", "true")
    assert "lies in" in own and "nothing is replaced" in own
    assert "openai is FILE.jsonl" in refused(capsys, dump, tmp_path / "x.csv", *to)
    assert "..; sts is a folder" in refused(capsys, dump, "..", "--to", "sts", "--overwrite", "true")
    assert "missing; trl is FILE.parquet" in refused(capsys, dump, "--to", "trl")
    assert "does not exist" in refused(capsys, dump, tmp_path / "no" / "x.jsonl", *to)
    assert "'csv'" in refused(capsys, dump, new, "--to", "csv")
    assert "to: missing" in refused(capsys, dump, new)
    (run / "samples.jsonl").write_text("")
    assert "no sample in it" in refused(capsys, run, new, *to)
    write_scores(dump, {(0, 0): {"total": 1.0}})
    assert "5 of 6 rows have no score" in refused(capsys, dump, new, *to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare", "data", "dump", "empty", "full", "run", "there.jsonl"]
    assert (tmp_path / "there.jsonl").read_text() == "mine" and (tmp_path / "full" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("to", OUT)
def test_a_damaged_shard_leaves_what_was_there(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    made_dump(tmp_path / "dump", 8, 2, shard_rows=4)
    path = export(tmp_path / "dump", to, "--scores", "none")
    before = sorted((entry.name, entry.stat().st_size) for entry in (path.iterdir() if path.is_dir() else [path]))
    flip_bit(tmp_path / "dump" / "rollouts-00002.parquet")
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        export(tmp_path / "dump", to, "--scores", "none", "--overwrite", "true")
    assert left.value.code == 2
    assert "rollouts-00002.parquet: is damaged: its checksum is not the recorded one" in capsys.readouterr().err
    assert sorted((entry.name, entry.stat().st_size) for entry in (path.iterdir() if path.is_dir() else [path])) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(["dump", path.name])


def test_an_interrupt_and_a_full_disk_leave_nothing(
    dump: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, status, told in (
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(28, "No space left on device"), 2, "cannot be written: No space left on device"),
    ):

        def third(*_: Any, error: BaseException = error, **__: Any) -> Any:
            raise error

        for to, what in (("openai", "openai.line"), ("sts", "sts.lines"), ("inspect", "inspect.sample"), ("trl", "trl._value")):
            with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
                patch.setattr(f"steerl.training.formats.{what}", third)
                export(dump, to)
            assert left.value.code == status and told in capsys.readouterr().err
            assert [entry.name for entry in dump.parent.iterdir()] == ["dump"]


# -- other projects' readers -----------------------------------------------------------------------------------------------


def read_by(tool: str, *paths: Path) -> list[Any]:
    """What readers.py says of each of the files (verifiers: of a file and a folder each)."""
    script = Path(__file__).with_name("readers.py")
    quiet = {**os.environ, "INSPECT_LOG_LEVEL": "error", "HOME": str(paths[0].parent)}
    done = subprocess.run(
        [str(TOOLS), str(script), tool, *map(str, paths)], capture_output=True, text=True, env=quiet, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.tools
def test_verifiers_reads_its_traces(tmp_path: Path, talks: Path, chats: Path, gone: Path, run: Path) -> None:
    """The ids, masks and log-probs of a branch are the dump's, bit by bit; what was said, by whom, and why it ended."""
    made_dump(tmp_path / "steered", 4, 2, make=episodes)
    sources = (talks, chats, tmp_path / "steered", gone, run)
    files = []
    for source in sources:
        scores = ("--scores", "none") if source.name == "steered" else ()
        files += [export(source, "verifiers", *scores, out=f"{source.name}{end}") for end in (".jsonl", "-traces")]
    talked, chatted, steered, failed, ran = (one["rows"] for one in read_by("verifiers", *files))
    check_credit(ran)
    for source, found in zip(sources[:4], (talked, chatted, steered, failed), strict=True):
        rows = iter(found)
        for rollout, _ in read_dump(source):
            for i in range(len(rollout)):
                row, prompt, length = next(rows), rollout.prompt_ids[i], int(rollout.lengths_B[i])
                assert row["ids"] == prompt + rollout.response_ids[i]
                assert row["mask"] == [False] * len(prompt) + rollout.action_mask_BR[i, :length].tolist()
                for name, values_BR in (
                    ("logprobs", rollout.behaviour_logprobs_BR),
                    ("trainer_logprobs", rollout.policy_logprobs_BR),
                ):
                    assert row[name] == [0.0] * len(prompt) + values_BR[i, :length].tolist()
                assert row["output_tokens"] == int(rollout.actions_B[i])
        assert next(rows, None) is None
    assert [(row["ok"], row["stop"], row["errors"], row["reward"]) for row in failed] == [
        (False, "env_error", ["it raised"], 0.25), (False, "env_error", ["no reset"], 0),
    ]  # fmt: skip
    assert [message["content"] for message in failed[0]["messages"]] == ["go", "left", " wall"]
    assert steered[0]["info"]["steering"] == "cheer#1f" and len(steered[0]["info"]["strengths"]) == 2
    first = talked[0]
    turns = talk(
        "0+0?", ("<add 2 3>", "5"), ("<add 1>", "Error: one number"), ("{hm", "no call"), ("it is 0", "")
    ).episode.turns
    fed = [len("[5]"), len("[Error: one number]"), len("[no call]")]
    drawn = [turn.end - turn.first for turn in turns]
    assert first["tokens"] == [len("0+0?"), *(n for pair in zip(drawn, [*fed, 0], strict=True) for n in pair)][:8]
    assert first["sampled"] == [False, True, False, True, False, True, False, True]
    assert (first["reward"], first["stop"], first["reply"]) == (1.5, "agent_completed", "it is 0")
    assert first["messages"][1]["tool_calls"][0] | {"type": "function"} == {
        "id": "call_1", "type": "function", "name": "add", "arguments": '{"of": ["2", "3"]}',
    }  # fmt: skip
    assert [message.get("tool_call_id") for message in first["messages"]] == [
        None,
        None,
        "call_1",
        None,
        "call_2",
        None,
        "",
        None,
    ]
    assert first["tools"] == ["add"]
    assert first["info"]["turn_rewards"] == [0.5, None, None, 1.0] and first["info"]["tool_errors"][1] == ["add: one number"]


def check_credit(rows: list[dict[str, Any]]) -> None:
    """What a run recorded, token by token."""
    first, _, last = rows
    assert first["mask"] == [False, False, True, False, True] and first["ids"] == [1, 5, 9, 8, 2]
    for name, ours in (
        *(("logprobs", "behaviour_logprobs"), ("trainer_logprobs", "policy_logprobs"), ("entropies", "entropy")),
        *(("reference_logprobs", "reference_logprobs"), ("advantages", "advantages")),
    ):
        assert first[name] == [0.0, 0.0, *(value or 0.0 for value in SAMPLE[ours])], name
    assert first["reward"] == 0.75 and first["metrics"] == {"kind": 0.5} and last["reward"] == -1.0
    assert first["info"]["step"] == 4 and first["info"]["strength"] == 2.5 and first["info"]["extra/kind/note"] == "a note"


@pytest.mark.tools
def test_inspect_reads_its_log(dump: Path, talks: Path, chats: Path, gone: Path, run: Path) -> None:
    paths = [export(source, "inspect") for source in (dump, talks, chats, gone, run)]
    found, talked, chatted, failed, ran = read_by("inspect", *paths)
    assert found["status"] == "success" and found["evals"] == 1
    assert [(one["id"], one["epoch"]) for one in found["samples"]] == [(p, s + 1) for s in range(2) for p in range(3)]
    assert found["rewards"] == [pytest.approx(p + s / 3) for p in range(3) for s in range(2)]
    mean = sum(found["rewards"]) / 6
    assert found["means"] == {"reward": pytest.approx(mean), "short": -1.0}
    spread = math.sqrt(sum((value - mean) ** 2 for value in found["rewards"]) / 5 / 6)
    assert found["stderrs"]["reward"] == pytest.approx(spread)
    assert [(one["target"], one["scores"]["reward"]["answer"]) for one in found["samples"][1:3]] == [
        ("2", "answer 1.0 🙂"), ("4", "answer 2.0 🙂"),
    ]  # fmt: skip
    assert found["said"][:2] == ["frage 0 – 質問", "answer 0.0 🙂"]

    shown = subprocess.run([str(TOOLS.with_name("inspect")), "log", "dump", str(paths[1])], capture_output=True, check=True)
    assert json.loads(shown.stdout)["samples"] == talked["samples"]
    one = talked["samples"][1]
    assert (one["id"], one["epoch"]) == (1, 1)
    assert [message["role"] for message in one["messages"]] == ["user", *["assistant", "tool"] * 3, "assistant"]
    made = one["messages"][1]["tool_calls"][0]
    assert (made["function"], made["arguments"]) == ("add", {"of": ["2", "3"]})
    assert one["messages"][2]["tool_call_id"] == made["id"] and "tool_call_id" not in one["messages"][6]
    assert len([event for event in one["events"] if event["event"] == "model"]) == 4
    assert one["scores"]["reward"]["value"] == 2.5 and one["output"]["completion"] == "it is 1"
    assert len(talked["said"]) == 4 * 8  # each message once, in the data frame

    said = [one["output"]["completion"] for one in chatted["samples"][:3]]
    assert said == [f"So {text}" for text in ("", "x" * 100_000, HOSTILE)]
    assert chatted["samples"][0]["metadata"]["columns"]["reward"] == "42"
    assert [one["error"]["message"] for one in failed["samples"]] == ["it raised", "no reset"]
    assert "reward" not in failed["samples"][1]["scores"] and failed["means"] == {"reward": 0.25}
    assert ran["model"] == "steerl/someone/small-model" and len(ran["samples"]) == 3
    assert ran["samples"][0]["metadata"]["steering"] == "cheer#1f"


@pytest.mark.tools
def test_openai_and_datasets_take_the_messages(talks: Path, chats: Path, gone: Path, dump: Path) -> None:
    from datasets import load_dataset

    paths = [export(source, "openai") for source in (talks, chats, gone, dump)]
    for path, found in zip(paths, read_by("openai", *paths), strict=True):
        written = [row["messages"] for row in lines(path)]
        unweighted = [[{n: v for n, v in message.items() if n != "weight"} for message in row] for row in written]
        assert found["rows"] == unweighted
        loaded = load_dataset("json", data_files=str(path), split="train", cache_dir=str(path.parent / "cache"))
        again = [[{n: v for n, v in message.items() if v is not None} for message in row] for row in loaded["messages"]]
        assert again == written
