"""What a job leaves behind: whole files and folders under their final names, whatever happens on the way."""

from __future__ import annotations

import os

import pytest

from rollout.errors import Problem
from rollout.run import RunSettings, open_folder, written_aside


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
        pytest.raises(Problem if isinstance(error, OSError) else RuntimeError) as caught,
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


def test_a_folder_that_holds_something_is_not_written_into_unasked(tmp_path):
    (tmp_path / "run").mkdir()
    assert open_folder(RunSettings(dir=str(tmp_path / "run"))) == tmp_path / "run"
    (tmp_path / "run" / "mine.txt").write_text("keep")
    with pytest.raises(Problem, match="--run.resume true or --run.overwrite true"):
        open_folder(RunSettings(dir=str(tmp_path / "run")))
    assert open_folder(RunSettings(dir=str(tmp_path / "run"), resume=True)) and (tmp_path / "run" / "mine.txt").exists()
    open_folder(RunSettings(dir=str(tmp_path / "run"), overwrite=True))
    assert list((tmp_path / "run").iterdir()) == []


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
