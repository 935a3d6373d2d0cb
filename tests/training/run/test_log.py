"""Logs: what is written is what was given, trackers hold the same numbers, a rewound log is that of an undisturbed run."""

from __future__ import annotations

import glob
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from google.protobuf.message import DecodeError

from steerl.training.run.log import RunLog
from tests import warm

HOSTILE = 'two | cells\n<script>alert("x")</script> \u202eright to left \x07'


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(log, steps, noise=0):
    for step in steps:
        log.metrics(step, {"reward/mean": torch.tensor(0.25 * step), "kl/ref": 1 / (step + 3), "value/loss": float("nan")})
        log.samples(step, [{"prompt": HOSTILE, "reward": 0.5 * step, "ids": [1, step]}])


def test_lines_are_json_with_exact_numbers_and_null_for_what_json_cannot_say(tmp_path):
    log = RunLog(tmp_path)
    write(log, [1, 2])
    log.metrics(3, {"a": float("inf"), "b": [1.5, float("-inf")], "c": "\ud800 lone"})
    log.close()
    first, second, third = lines(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "reward/mean": 0.25, "kl/ref": 0.25, "value/loss": None} and second["kl/ref"] == 1 / 5
    assert third == {"step": 3, "a": None, "b": [1.5, None], "c": "\ud800 lone"}
    assert lines(tmp_path / "samples.jsonl")[1] == {"step": 2, "prompt": HOSTILE, "reward": 1.0, "ids": [1, 2]}


@pytest.mark.parametrize("torn", [b"", b'{"step": 5, "rew'])
def test_a_rewound_log_goes_on_as_if_nothing_had_been(tmp_path, torn):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    log = RunLog(whole)
    write(log, range(1, 7))
    log.close()
    log = RunLog(cut)
    write(log, range(1, 4))
    position = json.loads(json.dumps(log.position()))
    write(log, range(4, 5))
    log.close()
    with (cut / "metrics.jsonl").open("ab") as file:
        file.write(torn)  # a kill in the middle of a line
    log = RunLog(cut)
    log.rewind(position)
    write(log, range(4, 7))
    log.close()
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_a_start_from_the_beginning_empties_the_logs_of_a_run_killed_before_its_first_checkpoint(tmp_path):
    log = RunLog(tmp_path)
    write(log, [1])
    log.close()
    log = RunLog(tmp_path)
    log.rewind({})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_lost_lines_are_told(tmp_path, caplog):
    log = RunLog(tmp_path)
    log.rewind({"bytes": {"metrics.jsonl": 10}})
    log.close()
    assert "metrics.jsonl: 0 bytes, 10 at the checkpoint" in caplog.text


def test_a_line_that_was_cut_in_two_is_dropped_before_the_next_is_written(tmp_path):
    log = RunLog(tmp_path)
    write(log, [1, 2, 3])
    position = log.position()
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    log = RunLog(tmp_path)
    log.rewind(position)
    write(log, [4])
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 2, 4]


def test_tensorboard_reads_back_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path, trackers=["tensorboard"], config={"ppo": {"clip": 0.2}})
    log.rewind({})
    write(log, [1, 2])
    position = log.position()
    write(log, [3, 4])
    log.close()
    log = RunLog(tmp_path, trackers=["tensorboard"])
    log.rewind(position)
    write(log, [3])
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    scalars = [(e.step, e.value) for e in events.Scalars("reward/mean")]
    assert scalars == [(1, 0.25), (2, 0.5), (3, 0.75)]  # step 4 belonged to the life that was lost
    assert set(events.Tags()["scalars"]) == {"step", "reward/mean", "kl/ref"}  # NaN has no point
    table = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "<script>" not in table and "&lt;script&gt;" in table and "two &#124; cells" in table
    assert '"clip": 0.2' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def records(data: bytes):
    """The records of a wandb file: a 7-byte header, then blocks of 32 KiB of (checksum, length, kind, part)."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


def finished(path, kind):
    """The records of a run's file. wandb's own process writes it, and may come to its end a moment after `finish`."""
    deadline = time.monotonic() + 30
    while True:
        with open(path, "rb") as file:
            data = file.read()
        late = time.monotonic() > deadline
        try:
            found = [kind.FromString(part) for part in records(data)]
        except DecodeError:  # read in the middle of a write
            found = []
            if late:
                raise
        if late or any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        os.sched_yield()


def history(folder):
    from wandb.proto.wandb_internal_pb2 import Record

    rows, names = [], set()
    for path in sorted(glob.glob(f"{folder}/wandb/offline-run-*/*.wandb")):
        for record in finished(path, Record):
            if record.WhichOneof("record_type") == "run":
                names.add(record.run.run_id)
                rows.append(("config", {u.key: json.loads(u.value_json) for u in record.run.config.update}))
            if record.WhichOneof("record_type") == "history":
                items = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
                rows.append((record.history.step.num, items))
    return rows, names


@pytest.mark.slow
def test_wandb_offline_reads_back_the_same_numbers_and_one_id(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log = RunLog(tmp_path, trackers=["wandb"], config={"ppo": {"clip": 0.2}})
    log.rewind({})
    write(log, [1, 2])
    position = json.loads(json.dumps(log.position()))
    log.close()
    # wandb names an offline folder by the second; a resumed run is never that quick after its first start.
    second = int(time.time())
    while int(time.time()) == second:
        os.sched_yield()
    log = RunLog(tmp_path, trackers=["wandb"], config={"ppo": {"clip": 0.2}})
    log.rewind(position)
    write(log, [3])
    log.close()
    rows, names = history(tmp_path)
    assert len(names) == 1 and names == {position["wandb_id"]}
    assert rows[0][1]["ppo"] == {"clip": 0.2}
    steps = {step: items for step, items in rows if step != "config"}
    assert {step: items["reward/mean"] for step, items in steps.items()} == {1: 0.25, 2: 0.5, 3: 0.75}
    assert steps[2]["kl/ref"] == 1 / 5 and steps[2]["step"] == 2 and "value/loss" not in steps[2]
    tables = [json.loads(path.read_text()) for path in tmp_path.glob("wandb/*/files/media/table/samples_*.json")]
    assert {table["data"][0][0]: table["data"][0][1:] for table in tables}[2] == [HOSTILE, 1.0]
    assert tables[0]["columns"] == ["step", "prompt", "reward"]


NO_ACCOUNT = """
import sys, pathlib
from steerl.rollout.common.errors import UserError
from steerl.training.run.log import RunLog
log = RunLog(pathlib.Path(sys.argv[1]), trackers=["wandb"])
try:
    log.rewind({})
except UserError as problem:
    print(problem)
"""


def test_a_tracker_that_cannot_start_says_how_to_go_on(tmp_path):
    environment = {**os.environ, "WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    done = warm.run([sys.executable, "-c", NO_ACCOUNT, tmp_path], env=environment)
    assert "WANDB_MODE=offline needs no account" in done.stdout, done.stderr


FULL = """
import resource, sys, pathlib
from steerl.rollout.common.errors import UserError
from steerl.training.run.log import RunLog

from tests import warm

from tests import warm
log = RunLog(pathlib.Path(sys.argv[1]))
log.metrics(1, {"a": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (20, -1))
try:
    log.metrics(2, {"a": 1})
except UserError as problem:
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    print(problem)
"""


def test_a_full_disk_is_one_line(tmp_path):
    done = warm.run([sys.executable, "-c", FULL, tmp_path])
    assert len(done.stdout.splitlines()) == 1 and "metrics.jsonl: cannot be written" in done.stdout, done.stderr


def test_the_live_line_has_the_figures_and_the_time_left(tmp_path, capsys, monkeypatch):
    ticks = iter([0.0, 5.0, 20.0, 30.0])  # the second line comes too soon to be shown
    monkeypatch.setattr("steerl.training.run.log.time.monotonic", lambda: next(ticks))
    log = RunLog(tmp_path)
    for step in (1, 2, 3, 4):
        log.progress(step, 4, reward=0.5, kl=0.25, tokens=1000)
    log.close()
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].startswith("step 1/4  reward 0.500  kl 0.250")
    # 20 seconds for two steps: 10 a step, 100 tokens/s, one step left
    assert shown[-2] == "step 3/4  reward 0.500  kl 0.250  100 tokens/s  10 s left"
    assert shown[-1].startswith("step 4/4") and len(shown) == 3


TRACKIO = """
import json, os, sys, time
from pathlib import Path
from steerl.training.run.log import RunLog

folder, steps, saved, killed = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4] == "killed"
turn = {"first": 0, "end": 2, "text": "", "answer": [{"role": "tool", "name": "add", "content": "3"}], "calls": 1, "errors": []}
turn |= {"message": {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "add"}}]}}
turn |= {"cut": False, "reward": None}
episode = {"turns": [turn], "ended_by": "policy", "reward": 1.0, "failure": "", "state": {}}
log = RunLog(folder, trackers=["trackio"], config={"ppo": {"clip": 0.2}})
log.rewind(saved)
for step in steps:
    log.metrics(step, {"reward/mean": step / 4, "value/loss": float("nan")})
    plain = {"prompt": "<b>", "prompt_text": "<s><b>", "completion": "half \\ud800", "reward": 0.5, "parts": {"a": 1.0}, "ids": [1]}
    log.samples(step, [plain, {"prompt": [{"role": "user", "content": "1 + 2"}], "episode": episode, "reward": 1.0}])
    if step == 2:
        kept = json.dumps(log.position())
if killed:
    time.sleep(1.5)  # it sends in batches
    os.write(1, kept.encode())
    os._exit(9)
log.close()
"""


@pytest.mark.slow
def test_trackio_has_each_step_once_and_the_conversations_also_of_a_run_that_was_killed(tmp_path):
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}

    def write(steps, saved, how):
        (tmp_path / "run").mkdir(exist_ok=True)
        words = [str(tmp_path / "run"), json.dumps(steps), json.dumps(saved), how]
        return subprocess.run([sys.executable, "-c", TRACKIO, *words], capture_output=True, text=True, env=environment)

    def ask(*words):
        trackio = Path(sys.executable).with_name("trackio")
        done = subprocess.run([trackio, *words, "--json"], capture_output=True, text=True, env=environment)
        return json.loads(done.stdout)

    killed = write([1, 2, 3], {}, "killed")
    assert killed.returncode == 9, killed.stderr
    # and the sender of step 3 was killed before that of another run had a turn: as if trackio lacked nothing but steps 4, 5
    again = write([3, 4, 5], json.loads(killed.stdout), "whole")
    assert again.returncode == 0 and again.stdout == "", (again.stdout, again.stderr)
    (run,) = ask("list", "runs", "--project", "steerl")["runs"]
    assert run.startswith("run-") and run == json.loads(killed.stdout)["trackio_name"]
    values = ask("get", "metric", "--project", "steerl", "--run", run, "--metric", "reward/mean")["values"]
    assert [(one["step"], one["value"]) for one in values] == [(step, step / 4) for step in range(1, 6)]
    traces = ask("list", "traces", "--project", "steerl")["traces"]
    assert sorted((one["step"], one["index"]) for one in traces) == [(step, i) for step in range(1, 6) for i in (0, 1)]
    plain, played = (next(one for one in traces if (one["step"], one["index"]) == (4, i)) for i in (0, 1))
    assert plain["messages"] == [{"role": "user", "content": "<s><b>"}, {"role": "assistant", "content": "half ?"}]
    assert plain["metadata"]["reward"] == 0.5 and plain["metadata"]["parts"] == {"a": 1.0}
    assert [message["role"] for message in played["messages"]] == ["user", "assistant", "tool"]
    assert played["messages"][1]["tool_calls"][0]["function"]["name"] == "add"


def test_trackio_gets_the_steps_that_it_was_killed_with(tmp_path, monkeypatch):
    from steerl.training.run import trackers

    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "a": step}) + "\n" for step in range(1, 5)))
    assert [row["a"] for row in trackers._lines_after(tmp_path / "metrics.jsonl", 2, 4)] == [3, 4]
    assert list(trackers._lines_after(tmp_path / "nowhere", 4, 4)) == []


def test_a_tracker_that_breaks_is_left_and_the_run_goes_on(tmp_path, caplog):
    log = RunLog(tmp_path, trackers=["tensorboard"])
    log.rewind({})
    write(log, [1])
    log._trackers._running["tensorboard"].writer.close()
    log._trackers._running["tensorboard"].log = lambda *_, **__: 1 / 0  # its disk, its network
    write(log, [2, 3])
    log.close()
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert caplog.text.count("tensorboard failed (raised ZeroDivisionError: division by zero") == 1
