"""What a job leaves behind: whole files and folders under their final names, whatever happens on the way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket

import pytest

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import LOCK, MARKER, RunSettings, begin, opened, written_aside


def fill(folder, text):
    folder.mkdir()
    (folder / "weights").write_text(text)


def test_a_folder_takes_the_place_of_the_one_before_it(tmp_path):
    for text in ("first", "second"):
        with written_aside(tmp_path / "model") as aside:
            fill(aside, text)
    assert (tmp_path / "model" / "weights").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("error", [RuntimeError("mine"), OSError(28, "No space left on device")])
def test_what_goes_wrong_leaves_what_was_there(tmp_path, error):
    with written_aside(tmp_path / "model") as aside:
        fill(aside, "first")
    with (
        pytest.raises(UserError if isinstance(error, OSError) else RuntimeError) as caught,
        written_aside(tmp_path / "model") as aside,
    ):
        fill(aside, "second")
        raise error
    assert (tmp_path / "model" / "weights").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "mine" in str(caught.value) or "cannot be written: No space left on device" in str(caught.value)


def test_what_a_killed_job_left_is_swept_by_the_next(tmp_path):
    fill(tmp_path / ".model.999999999.tmp", "half")
    (tmp_path / ".summary.json.999999999.tmp").write_text("another's")
    with written_aside(tmp_path / "model") as aside:
        fill(aside, "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".summary.json.999999999.tmp", "model"]


def job(folder, config=None, **settings):
    """A job that writes one file; with `overwrite` it empties the folder first."""
    run = RunSettings(dir=str(folder), **settings)
    with opened(run, config) as found:
        begin(found, run)
        (found / "metrics.jsonl").write_text("{}")
    return found


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_that_holds_something_is_not_written_into_unasked(tmp_path):
    run = tmp_path / "run"
    assert job(run) == run and names(run) == [MARKER, "metrics.jsonl"]
    (run / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--run.resume true or --run.overwrite true"):
        job(run)
    job(run, resume=True)
    assert names(run) == [MARKER, "metrics.jsonl", "mine.txt"]
    job(run, overwrite=True)
    assert names(run) == [MARKER, "metrics.jsonl"]


def test_only_what_jobs_wrote_is_emptied(tmp_path):
    def refused(folder, words, config=None):
        before = sorted(folder.rglob("*"))
        with pytest.raises(UserError, match=words) as caught:
            job(folder, config, overwrite=True)
        assert len(caught.value.lines) == 1 and sorted(folder.rglob("*")) == before

    mine, old, ours, outer = (tmp_path / name for name in ("mine", "old", "ours", "outer"))
    mine.mkdir()
    (mine / "thesis.txt").touch()
    refused(mine, "run.overwrite: .*mine holds what no job of ours wrote .thesis.txt.")
    job(mine, resume=True)  # as before: a log of the scheduler may lie there
    refused(mine, "thesis.txt")
    old.mkdir()  # written before there was a marker
    (old / "config.yaml").touch(), (old / "checkpoints").mkdir()
    job(old, overwrite=True)
    assert names(old) == [MARKER, "metrics.jsonl"]
    job(outer), job(outer / "inner")
    refused(outer, "holds another run, .*inner")
    job(ours)
    (ours / "prompts.jsonl").touch()
    refused(ours, "prompts.path: .*prompts.jsonl lies in run.dir", {"prompts": {"path": str(ours / "prompts.jsonl")}})
    refused(ours, r"reward\[0\].function: ", {"reward": [{"function": f"{ours / 'prompts.jsonl'}:name"}]})
    (tmp_path / "link").symlink_to(ours)
    refused(tmp_path / "link", "lies in run.dir", {"prompts": {"path": str(ours / "prompts.jsonl")}})


def test_a_job_that_fails_before_its_first_write_leaves_all_as_it_was(tmp_path):
    job(tmp_path / "run")
    for folder, settings in ((tmp_path / "run", {"overwrite": True}), (tmp_path / "new" / "run", {})):
        with pytest.raises(KeyError), opened(RunSettings(dir=str(folder), **settings)):
            raise KeyError
    assert names(tmp_path / "run") == [MARKER, "metrics.jsonl"] and not (tmp_path / "new" / "run").exists()


def test_a_second_job_is_told_who_holds_the_folder_and_a_killed_one_holds_it_no_longer(tmp_path):
    """The killed job leaves a child that lives on, as forked workers do."""
    run, (here, there) = tmp_path / "run", os.pipe()
    if not (holder := os.fork()):
        with opened(RunSettings(dir=str(run))):
            child = os.fork()
            if child:
                os.write(there, b"%d\n" % child)
            signal.pause()
        os._exit(0)
    child = int(os.read(here, 20))
    try:
        for settings in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(
                UserError, match=rf"another job is writing .*run .process {holder} on .*; wait for it"
            ) as caught:
                job(run, **settings)
            assert len(caught.value.lines) == 1 and names(run) == [LOCK]
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    try:
        assert job(run, resume=True) and names(run) == [MARKER, "metrics.jsonl"]
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_lock_of_another_host_is_told_and_one_without_system_locks_goes_by_who_is_alive(tmp_path, monkeypatch, caplog):
    (tmp_path / LOCK).write_text("process 1 on elsewhere")
    job(tmp_path)
    assert "process 1 on elsewhere did not end well" in caplog.text

    def without(*given):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", without)
    (tmp_path / LOCK).write_text(f"process {os.getppid()} on {socket.gethostname()}")
    with pytest.raises(UserError, match=f"process {os.getppid()} on"):
        job(tmp_path, resume=True)
    (tmp_path / LOCK).write_text(f"process 999999999 on {socket.gethostname()}")
    job(tmp_path, resume=True)


def test_what_other_processes_write_into_the_folder_meanwhile_is_theirs(tmp_path, monkeypatch):
    """Their temporary files come and go: a rename must not look at them (nor flush every older file once more)."""
    (tmp_path / "older.parquet").write_text("finished")
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: (opened.append(str(path)), real(path, *rest, **more))[1])
    with written_aside(tmp_path / "new.parquet") as aside:
        aside.write_text("new")
        (tmp_path / ".another.parquet.1.tmp").symlink_to(tmp_path / "gone")  # opening it fails, as if it had just been renamed
    assert (tmp_path / "new.parquet").read_text() == "new" and str(tmp_path / "older.parquet") not in opened
