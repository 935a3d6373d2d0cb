"""What a job is at: on a terminal and in a file, with a clock of our own; and that nothing of it stays behind."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
import threading

from steerl.configs.reader import again

import pytest

from steerl.rollout.common import progress
from steerl.rollout.common.progress import Watch, doing


class Screen(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def watch(terminal: bool):
    clock, screen = Clock(), Screen(terminal)
    made = Watch(screen, clock)

    def at(second: float) -> str:
        clock.now = second
        made.look()
        text = screen.getvalue()
        screen.seek(0), screen.truncate()
        return text

    return made, at, screen


def test_on_a_terminal_a_line_rewrites_itself_and_is_gone_in_the_end():
    made, at, screen = watch(True)
    made.begin("reading the weights")
    assert at(1.9) == ""
    assert at(2.0) == "\rreading the weights ... 2 s"
    made.begin("looking at the model \x1b[2J\nof yours")
    assert at(3.0) == ""  # the inner one has its own time
    text = at(75.0)
    assert text.startswith("\rlooking at the model \u241b[2J of yours ... 1 min 13 s") and "\n" not in text
    made.end()
    assert at(76.0).startswith("\r") and "reading the weights ... 1 min 16 s" in screen.getvalue() + at(76.0)
    screen.seek(0), screen.truncate()
    made.end()
    shown = screen.getvalue()
    assert shown.strip("\r ") == "" and shown.endswith("\r")
    screen.seek(0), screen.truncate()
    assert at(99.0) == ""


def test_in_a_file_it_is_a_line_at_ten_seconds_a_minute_two_four_and_the_end():
    made, at, screen = watch(False)
    made.begin("reading the weights")
    told = [(second, text) for second in range(500) if (text := at(float(second)))]
    assert told == [
        (10, "reading the weights, 10 s so far\n"),
        (60, "reading the weights, 1 min 00 s so far\n"),
        (120, "reading the weights, 2 min 00 s so far\n"),
        (240, "reading the weights, 4 min 00 s so far\n"),
        (480, "reading the weights, 8 min 00 s so far\n"),
    ]
    made.end()
    assert screen.getvalue() == "reading the weights: took 8 min 19 s\n"
    made.begin("something quick")
    screen.seek(0), screen.truncate()
    assert at(505.0) == ""
    made.end()
    assert screen.getvalue() == ""


def test_nothing_stays_behind_also_of_what_raises(monkeypatch):
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), doing("a"), doing("b"):
        assert threading.active_count() == before + 1  # one watcher, however deep
        _ = 1 / 0
    assert threading.active_count() == before and progress._watch is None
    monkeypatch.setenv("RANK", "1")
    with doing("another rank's"):
        assert threading.active_count() == before


LONG = """
import sys, time
from steerl.rollout.common import progress
progress.SHOWN_S, progress.TOLD_S = 0.3, 0.3
with progress.doing("loading MODEL"):
    time.sleep(2.2)
print("out")
"""


def test_a_real_terminal_and_a_real_pipe():
    piped = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True)
    assert piped.stdout == "out\n" and piped.stderr.splitlines()[0].startswith("loading MODEL, ")
    assert piped.stderr.splitlines()[-1].startswith("loading MODEL: took ")
    main, side = pty.openpty()
    done = subprocess.run([sys.executable, "-c", LONG], stdout=subprocess.PIPE, stderr=side, text=True)
    os.close(side)
    shown = os.read(main, 10_000).decode()
    os.close(main)
    assert done.stdout == "out\n" and "\rloading MODEL ... " in shown and "\n" not in shown and shown.endswith("\r")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["steerl ppo", "--run.dir", "a b"], "steerl ppo --run.dir 'a b' --run.resume true"),
        (["steerl ppo", "--run.overwrite", "true", "--run.dir=r"], "steerl ppo --run.dir=r --run.resume true"),
        (["steerl sft", "--run.resume=true", "--x", "1"], "steerl sft --x 1 --run.resume true"),
        (["scripts/train_ppo.py", "--x", "1"], "python scripts/train_ppo.py --x 1 --run.resume true"),
    ],
)
def test_the_command_that_goes_on_can_be_pasted(argv, line, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert again(argv) == line
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert again(argv).startswith("accelerate launch ... ")
