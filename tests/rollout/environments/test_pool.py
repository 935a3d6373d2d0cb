"""The user's tools and environments in processes of their own: whatever they do, an episode gets an answer."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import numpy
import psutil
import pytest
import torch

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.environments.host.hosted import seed_all
from steerl.rollout.environments.host.pool import CLOSED, Child, Pool
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.environments.types import Answer, Call, Ending, Opening, Said
from tests import warm

TOOLS = '''
import asyncio, os, re, subprocess, sys, threading, time

STATE = []

def multiply(a: int, b: int) -> int:
    """
    Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product of the two integers.
    """
    return a * b

async def async_add(a: int, b: int) -> int:
    """
    Asynchronously adds two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The sum of the two integers.
    """
    await asyncio.sleep(0.01)
    return a + b

def does(what: str):
    """Does something that a tool should not.

    Args:
        what: which of the things
    """
    return globals()[what]()

def raises():
    raise ValueError("no such\\nthing")

def raises_badly():
    class Odd(Exception):
        def __str__(self):
            raise RuntimeError
    raise Odd

def sleeps():
    time.sleep(60)

def hangs_in_c():
    return re.match("(a|aa)+$", "a" * 60 + "b")

def exits():
    sys.exit(3)

def leaves():
    os._exit(7)

def kills_itself():
    os.kill(os.getpid(), 9)

def interrupts():
    raise KeyboardInterrupt

def prints():
    for stream in (sys.stdout, sys.stderr):
        stream.write("x" * 5_000_000)
    os.write(1, b"y" * 1_000_000)
    subprocess.run(["echo", "z" * 1000], check=True)
    return "printed"

def bytes_():
    return b"\\xff\\x00"

def none():
    return None

def much():
    return "é" * 5_000_000

def table():
    return {"rows": [1, 2.5, None], "name": "ü"}

def thing():
    return threading.Lock()

def surrogate():
    return "a\\ud800b"

def endless():
    return (n for n in iter(int, 1))

def forks():
    return f"forked {os.fork() == 0}"

def threads():
    threading.Thread(target=time.sleep, args=(60,)).start()
    return "started"

def closes():
    os.closerange(3, 100)
    return "closed"

def counts():
    STATE.append(1)
    return len(STATE)

def kills_parent():
    os.kill(os.getppid(), 9)
    time.sleep(60)

def process():
    return os.getpid()

def daemon():
    """A child in a session of its own, which keeps what it inherited."""
    if (pid := os.fork()) == 0:
        os.setsid()
        time.sleep(600)
    return pid
'''

EPISODES = '''
import os, random, time
import numpy

class IncrementEnv:
    def __init__(self):
        self._counter = 0

    def reset(self) -> None:
        self._counter = 0

    def increment(self, a: int) -> int:
        """
        Increment the integer by a specified value

        Args:
            a: The value to increment by

        Returns:
            The incremented integer.
        """
        self._counter += a
        return self._counter

class Client:
    def reset(self):
        return ["Guess a word."]
    def step(self, guess):
        return guess[::-1], 1.0 if guess == "[level]" else 0.25, guess == "[level]"

class WordleEnv:
    def __init__(self):
        self.client = Client()

    def reset(self, **kwargs) -> str | None:
        self.columns = sorted(kwargs)
        self.reward = 0.0
        self.done = False
        self.best = float("-inf")
        return self.client.reset()[0]

    def guess(self, guess: str) -> str:
        """
        Make a guess in the Wordle environment.

        Args:
            guess: The guessed word, formatted as '[abcde]'

        Returns:
            The feedback message from the environment.
        """
        if self.done:
            raise ValueError("Game over.")
        feedback, self.reward, self.done = self.client.step(guess)
        return feedback

    async def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: how long
        """
        time.sleep(seconds)
        return "waited"

    async def get_reward(self) -> float:
        return self.reward * 2

    @property
    def wins(self):
        return int(self.done)

    @property
    def broken(self):
        raise RuntimeError

class StepIsATool:
    def reset(self, **kwargs) -> None:
        self._reward = None

    def step(self, message: str) -> str:
        """
        Echo the message back from the environment.

        Args:
            message: The message to echo

        Returns:
            The echoed message.
        """
        return message

class Gym:
    """Gives, and does, what the row says."""
    def reset(self, row):
        self.answers = list(row.get("answers", []))
        if row.get("reset") == "hang":
            time.sleep(60)
        return eval(row["reset"]) if "reset" in row else row["prompt"]
    def step(self, completion):
        return eval(self.answers.pop(0)) if self.answers else (completion.upper(), 0.5, completion == "end")

class Gymnasium:
    def reset(self, *, seed=None, options=None):
        return f"begin {options['prompt']}", {"info": 1}
    def step(self, action):
        return action[::-1], numpy.float32(0.5), numpy.bool_(action == "end"), action == "long", {}

class Draws:
    def reset(self, row):
        self.numbers = [random.random(), float(numpy.random.rand())]
        self.order = hash('a')
    def step(self, completion):
        return None, None, True
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "tools.py").write_text(TOOLS)
    (folder / "episodes.py").write_text(EPISODES)
    return folder


@pytest.fixture
def make(folder):
    made = []

    def make(name: str, **settings) -> Pool:
        made.append(Pool(EnvironmentSettings(factory=f"{folder}/episodes.py:{name}", **settings)))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


@pytest.fixture(scope="module")
def tools(folder):
    names = [f"{folder}/tools.py:{name}" for name in ("multiply", "async_add", "does")]
    pool = Pool(EnvironmentSettings(tools=names, timeout=1.0))
    yield pool
    pool.close()


def calls(*made: Call) -> Said:
    return Said("", calls=made)


def does(*what: str) -> Said:
    return calls(*(Call("does", {"what": one}) for one in what))


def told(answer: Answer) -> list[str]:
    assert isinstance(answer.content, list) and {one["role"] for one in answer.content} <= {"tool"}
    return [one["content"] for one in answer.content]


def below(process: int) -> set[int]:
    return {one.pid for one in psutil.Process(process).children(recursive=True)}


def wait_until_gone(processes: set[int]) -> set[int]:
    until = time.monotonic() + 20
    while (left := {one for one in processes if psutil.pid_exists(one)}) and time.monotonic() < until:
        time.sleep(0.02)
    return left


# -- tools ------------------------------------------------------------------------------------------------------------


def test_trls_example_of_tools(tools):
    """Of its documentation, by signature: one is plain, one asynchronous."""
    assert tools.kind == "tools"
    schema = tools.tools[0]
    assert [one["function"]["name"] for one in tools.tools] == ["multiply", "async_add", "does"]
    assert schema["function"]["description"] == "Multiplies two integers."
    assert schema["function"]["parameters"]["properties"]["b"] == {"type": "integer", "description": "The second integer."}
    session = tools.session()
    assert session.reset({"prompt": "What is 6 * 7?"}).result() == Opening()
    answer = session.step(calls(Call("multiply", {"a": 6, "b": 7}), Call("async_add", {"a": 6, "b": 7}))).result()
    assert answer == Answer(
        [
            {"role": "tool", "name": "multiply", "content": "42"},
            {"role": "tool", "name": "async_add", "content": "13"},
        ]
    )
    assert session.end().result() == Ending()


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("raises", "error: ValueError: no such thing"),
        ("sleeps", "error: not done after 1 s"),
        ("hangs_in_c", "error: not done after 1 s"),
        ("exits", "error: SystemExit: 3"),
        ("leaves", "error: its process ended (exit status 7)"),
        ("kills_itself", "error: its process ended (exit status -9)"),
        ("interrupts", "error: KeyboardInterrupt: no message"),
        ("raises_badly", "error: its process ended (exit status 0)"),
        ("closes", "error: its process ended (exit status"),
        ("kills_parent", "error: the process that started it ended (exit status -9)"),
        ("nowhere", "error: KeyError: 'nowhere'"),
    ],
)
def test_a_tool_that_fails_is_told_counted_and_not_the_end(tools, what, content):
    session = tools.session()
    answer = session.step(does("process", what, "process")).result()
    first, said, after = told(answer)
    assert said.startswith(content)
    assert len(answer.errors) == 1 and answer.errors[0].startswith("does: ") and "\n" not in answer.errors[0]
    assert not answer.failure and not answer.done
    lives = what in ("raises", "exits", "interrupts", "nowhere")
    assert (first == after) == lives  # what is gone was replaced
    assert session.end().result() == Ending()


@pytest.mark.parametrize(
    ("what", "content"),
    [
        ("prints", "printed"),
        ("bytes_", str(b"\xff\x00")),
        ("none", "null"),
        ("table", '{"rows": [1, 2.5, null], "name": "ü"}'),
        ("surrogate", "a?b"),
        ("forks", "forked False"),
        ("threads", "started"),
    ],
)
def test_what_a_tool_may_do_and_give(tools, what, content, capfd):
    session = tools.session()
    answer = session.step(does(what, what)).result()
    assert told(answer) == [content, content] and not answer.errors
    session.end().result()
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_objects_are_told_as_text_and_long_texts_are_cut(tools):
    answer = tools.session().step(does("thing", "endless", "much")).result()
    thing, endless, much = told(answer)
    assert thing.startswith("<unlocked _thread.lock") and endless.startswith("<generator object")
    assert much.startswith("é" * 1_000_000 + " [cut here: 5,000,000") and len(much) < 1_000_100


def test_calls_that_cannot_be_made_are_told(tools):
    wrong = [
        Call("search", {"what": "x"}),
        Call("", problem="wrong JSON:\nline 1"),
        Call("multiply", {"a": 6}),
        Call("multiply", {"a": 6, "b": 7, "c": 8}),
        Call("multiply", {"a": [], "b": {}}),
        Call("x\n" * 1000),
    ]
    answer = tools.session().step(calls(*wrong)).result()
    unknown, problem, few, many, types, long = told(answer)
    assert unknown == "error: there is no tool 'search'; there are: multiply, async_add, does"
    assert problem == "error: wrong JSON:\nline 1"
    assert "missing 1 required positional argument: 'b'" in few and "unexpected keyword argument 'c'" in many
    assert types == "error: TypeError: can't multiply sequence by non-int of type 'dict'"
    assert len(long) < 300
    assert len(answer.errors) == 6 and all("\n" not in line and len(line) < 500 for line in answer.errors)
    assert "(line 17 of tools.py)" in answer.errors[4] and "hosted.py" not in answer.errors[2]


def test_fifty_calls_in_a_turn_and_no_state_between_episodes(tools):
    sessions = [tools.session() for _ in range(3)]
    futures = [session.step(does(*["counts"] * 50)) for session in sessions]
    for future in futures:
        assert told(future.result()) == [str(n) for n in range(1, 51)]
    for session in sessions:
        session.end().result()


def test_a_call_that_hangs_holds_up_nobody_else(tools):
    slow, quick = tools.session(), tools.session()
    begun = time.monotonic()
    hanging = slow.step(does("sleeps", "hangs_in_c"))
    assert told(quick.step(does("none")).result()) == ["null"]
    assert not hanging.done()
    assert len(hanging.result().errors) == 2 and 2.0 <= time.monotonic() - begun < 20
    slow.end().result()
    quick.end().result()


def test_processes_go_with_their_episode(tools):
    """What it started too; a daemon that holds its socket open keeps nobody waiting."""
    job = os.getpid()
    session = tools.session()
    before = below(job)
    daemon = int(told(session.step(does("daemon", "forks", "leaves")).result())[0])
    assert told(session.step(does("threads")).result()) == ["started"]
    started = below(job) - before - {daemon}
    assert len(started) == 1
    session.end().result()
    assert not wait_until_gone(started)
    psutil.Process(daemon).kill()
    for _ in range(100):  # whenever an episode ends, the zygote looks through what it took in
        if psutil.pid_exists(daemon):
            tools.session().step(does("leaves")).result()
    assert not psutil.pid_exists(daemon)


# -- TRL's environments -------------------------------------------------------------------------------------------------


def test_trls_increment_example(make):
    pool = make("IncrementEnv")
    assert (pool.kind, [tool["function"]["name"] for tool in pool.tools]) == ("trl", ["increment"])
    first, second = pool.session(), pool.session()
    row = {"prompt": [{"role": "user", "content": "Increment by one."}]}
    assert first.reset(row).result() == second.reset(row).result() == Opening()
    assert told(first.step(calls(Call("increment", {"a": 2}), Call("increment", {"a": 3}))).result()) == ["2", "5"]
    assert told(second.step(calls(Call("increment", {"a": 1}))).result()) == ["1"]
    assert told(first.step(calls(Call("increment", {"a": 1}))).result()) == ["6"]
    assert first.end().result() == second.end().result() == Ending()


def test_trls_wordle_example(make):
    """Reset's text, a game over told by an exception, a reward of its own, attributes for reward functions."""
    pool = make("WordleEnv", timeout=1.0)
    assert [tool["function"]["name"] for tool in pool.tools] == ["guess", "wait"]
    session = pool.session()
    assert session.reset({"prompt": "Play.", "answer": "level"}).result() == Opening("Guess a word.")
    assert told(session.step(calls(Call("guess", {"guess": "[abcde]"}))).result()) == ["]edcba["]
    assert told(session.step(calls(Call("guess", {"guess": "[level]"}))).result()) == ["]level["]
    answer = session.step(calls(Call("guess", {"guess": "again"}), Call("wait", {"seconds": 0}), Call("client"))).result()
    assert told(answer) == [
        "error: ValueError: Game over.",
        "waited",
        "error: there is no tool 'client'; there are: guess, wait",
    ]
    assert len(answer.errors) == 2 and not answer.failure
    state = {"columns": ["answer", "prompt"], "reward": 1.0, "done": True, "wins": 1}
    assert session.end().result() == Ending(2.0, state)

    lost = pool.session()
    lost.reset({"prompt": "Play."}).result()
    answer = lost.step(
        calls(Call("guess", {"guess": "a"}), Call("wait", {"seconds": 60}), Call("guess", {"guess": "b"}))
    ).result()
    assert answer.failure == "wait: not done after 1 s" == answer.errors[0]
    assert told(answer) == ["a", "error: not done after 1 s"]
    assert lost.step(calls(Call("guess", {"guess": "b"}))).result() == Answer(failure=answer.failure)
    assert lost.end().result() == Ending(failure=answer.failure)


def test_a_step_that_returns_a_text_is_a_tool(make):
    pool = make("StepIsATool")
    assert (pool.kind, [tool["function"]["name"] for tool in pool.tools]) == ("trl", ["step"])


# -- Gym ------------------------------------------------------------------------------------------------------------------


def test_a_gym_episode(make):
    pool = make("Gym")
    assert (pool.kind, pool.tools) == ("gym", [])
    session = pool.session()
    assert session.reset(
        {"prompt": "begin", "answers": ["([{'role': 'user', 'content': 'a'}], None, False)"]}
    ).result() == Opening("begin")
    assert session.step(Said("one")).result() == Answer([{"role": "user", "content": "a"}])
    assert session.step(Said("two")).result() == Answer("TWO", 0.5)
    assert session.step(Said("end")).result() == Answer("END", 0.5, done=True)
    assert session.end().result() == Ending(None, {"answers": []})


def test_what_an_episode_prints_and_signals_to_the_job_stay_outside(make, capfd):
    """A terminal's Ctrl-C and a scheduler's SIGTERM mean the job, which finishes the step."""
    before = below(os.getpid())
    session = make("Gym").session()
    code = "(os.write(1, b'x' * 100_000), os.write(2, b'y' * 100_000), print('z', flush=True), ('told', 0, False))[-1]"
    session.reset({"prompt": "", "answers": [code]}).result()
    started = below(os.getpid()) - before
    assert len(started) == 2 and os.getpgid(0) not in {os.getpgid(one) for one in started}
    for one in started:
        os.kill(one, signal.SIGTERM)
        os.kill(one, signal.SIGINT)
    assert session.step(Said("")).result() == Answer("told", 0.0)
    assert session.end().result() == Ending(None, {"answers": []})
    said = capfd.readouterr()
    assert said.out == said.err == ""


def test_a_child_is_ended_once(make, monkeypatch):
    """Another one may have its number by then."""
    pool = make("Gym")
    child = Child(pool, None)
    assert child.close().startswith("its process ended (exit status")  # by itself, where it sees the end first
    monkeypatch.setattr(pool, "end", None)
    assert child.close() == CLOSED


def test_gymnasiums_form(make):
    session = make("Gymnasium").session()
    assert session.reset({"prompt": "now"}).result() == Opening("begin now")
    assert session.step(Said("one")).result() == Answer("eno", 0.5)
    assert session.step(Said("end")).result() == Answer("dne", 0.5, done=True)
    assert session.step(Said("long")).result() == Answer("gnol", 0.5, done=True)


@pytest.mark.parametrize(
    ("gives", "failure"),
    [
        ("([{'role': 'user', 'content': 5}], 0, False)", "step: gave [{'content': 5, 'role': 'user'}] (list); expected a text, messages (role, content) or None"),
        ("None", "step: gave None, not (text or messages or None, reward, done)"),
        ("('a', 1.0)", "step: gave ('a', 1.0) (tuple), not (text or messages or None, reward, done)"),
        ("(b'a', 1.0, False)", "step: gave b'a' (bytes); expected a text, messages (role, content) or None"),
        ("([1], 1.0, False)", "step: gave [1] (list); expected a text, messages (role, content) or None"),
        ("([{'role': 'user', 'content': '', 'more': {1}}], 1.0, False)", "step: gave messages that are no JSON: 'set' object has no attribute 'item'"),
        ("('a', float('nan'), False)", "step: gave nan (float) for its reward; expected a number"),
        ("('a', '1.0', False)", "step: gave '1.0' (str) for its reward; expected a number"),
        ("('a', numpy.ones(2), False)", "step: gave array([1., 1.]) (ndarray) for its reward; expected a number"),
        ("('a', 1.0, 'no')", "step: gave 'no' (str) for done; expected true or false"),
        ("('a', 1.0, None)", "step: gave None for done; expected true or false"),
        ("1 / 0", r"step: raised ZeroDivisionError: division by zero \(line 1 of <string>\)"),
        ("os._exit(3)", "step: its process ended (exit status 3)"),
        ("time.sleep(60)", "step: not done after 1 s"),
        ("os.write(max(map(int, os.listdir('/proc/self/fd'))[:-1]), b'')", None),
        ("[os.write(n, b'[]\\n') for n in range(3, 9) if os.path.exists(f'/proc/self/fd/{n}') and 'socket' in os.readlink(f'/proc/self/fd/{n}')]", None),
    ],
)  # fmt: skip
def test_what_a_gym_step_may_not_do(make, gives, failure):
    session = make("Gym", timeout=1.0).session()
    session.reset({"prompt": "", "answers": [gives]}).result()
    answer = session.step(Said("")).result()
    assert answer == Answer(failure=answer.failure) and answer.failure.startswith("step: ") and "\n" not in answer.failure
    assert failure is None or answer.failure == failure.replace("\\", "")
    assert session.end().result() == Ending(failure=answer.failure)


@pytest.mark.parametrize(
    ("reset", "failure"),
    [
        ("hang", "reset: not done after 1 s"),
        ("7", "reset: gave 7 (int); expected a text, messages (role, content) or None"),
        ("exit()", "reset: raised SystemExit: None"),
        ("[{'type': 'text', 'text': 'x'}]", "reset: gave [{'text': 'x', 'type': 'text'}] (list); expected a text"),
        ("[{'role': 'user', 'content': 'x' * 900_000}] * 20", "reset: gave 18,000,"),
    ],
)
def test_what_a_gym_reset_may_not_do(make, reset, failure):
    session = make("Gym", timeout=1.0 if reset == "hang" else 60.0).session()
    opening = session.reset({"reset": reset}).result()
    assert opening == Opening(failure=opening.failure) and opening.failure.startswith(failure)
    assert session.step(Said("")).result() == Answer(failure=opening.failure)


def test_episodes_draw_numbers_of_their_own_or_by_a_seed(make, monkeypatch):
    """The generators that every fork copies: without a seed all episodes would draw the same."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    pool, again = make("Draws"), make("Draws")

    def numbers(seed: int | None, pool: Pool = pool) -> list[float]:
        session = pool.session(seed)
        session.reset({}).result()
        state = session.end().result().state
        return [*state["numbers"], state["order"]]

    drawn = [numbers(seed) for seed in (None, None, 1, 2**40 + 2)]
    assert len({number for three in drawn for number in three[:2]}) == 8
    assert numbers(1, again) == drawn[2] and numbers(2**40 + 2, again) == drawn[3]


def test_torch_is_seeded_where_it_is_imported():
    states = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng():
            seed_all(2**40 + 7)
            assert torch.initial_seed() == 7 and random.random() == random.Random(7).random()
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])


def test_an_episode_without_a_process_has_failed(make, monkeypatch):
    def none():
        raise OSError(24, "Too many open files")

    pool = make("Gym")
    monkeypatch.setattr(socket, "socketpair", none)
    session = pool.session()
    failure = "reset: no process can be started for it: [Errno 24] Too many open files"
    assert session.reset({}).result() == Opening(failure=failure) and session.end().result() == Ending(failure=failure)


# -- at the start -----------------------------------------------------------------------------------------------------------

WRONG = '''
import time, os, functools

def undocumented(a: int):
    return a

def untyped(a):
    """Takes it.

    Args:
        a: a number
    """

def fine(a: int):
    """Takes it.

    Args:
        a: a number
    """

partial = functools.partial(fine, a=1)
also_fine = fine
ENVIRONMENTS = {"a": fine}

def hangs():
    time.sleep(60)

def fails():
    raise RuntimeError("no server")

def dies():
    os._exit(4)

class Nothing:
    pass

class NoTools:
    def reset(self, **columns):
        pass

class NoRow:
    def reset(self):
        pass
    def step(self, action):
        pass

class NoDocstring:
    def reset(self):
        pass
    def play(self, a: int):
        return a
'''


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (
            ["undocumented", "untyped", "fine", "partial", "also_fine", "Nothing"],
            [
                r"environment.tools\[3\]: .*wrong.py:partial is a partial; name a function",
                r"environment.tools\[5\]: .*wrong.py:Nothing is a type; name a function",
                r"environment.tools\[0\]: .*wrong.py:undocumented: no schema can be made of it: .*it has no docstring!",
                r"environment.tools\[1\]: .*wrong.py:untyped: no schema can be made of it: .*missing a type hint.*",
            ],
        ),
        (["absent", "fin"], [r"environment.tools\[0\]: .*wrong.py has no 'absent'; .*", r"environment.tools\[1\]: .*wrong.py has no 'fin'; did you mean fine\?"]),
        ("hangs", [r"environment.factory: .*wrong.py:hangs: not done after 1 s"]),
        ("fails", [r"environment.factory: .*wrong.py:fails: raised RuntimeError: no server \(line \d+ of wrong.py\)"]),
        ("dies", [r"environment.factory: .*wrong.py:dies: its process ended \(exit status 4\)"]),
        ("ENVIRONMENTS", [r"environment.factory: .*wrong.py:ENVIRONMENTS is a dict, not a function"]),
        ("Nothing", [r"environment.factory: .*wrong.py:Nothing makes a Nothing, which has no reset\(\); give .*"]),
        ("NoTools", [r"environment.factory: .*wrong.py:NoTools makes a NoTools, which has neither step\(\) nor .*"]),
        ("NoRow", [r"environment.factory: .*wrong.py:NoRow makes a NoRow, whose reset\(\) takes no row; give it one: reset\(row\)"]),
        ("NoDocstring", [r"environment.factory: NoDocstring.play: no schema can be made of it: .*no docstring!"]),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_at_the_start(tmp_path, names, lines):
    (tmp_path / "wrong.py").write_text(WRONG)
    before = below(os.getpid())
    given = (
        {"factory": f"{tmp_path}/wrong.py:{names}"}
        if isinstance(names, str)
        else {"tools": [f"{tmp_path}/wrong.py:{n}" for n in names]}
    )
    with pytest.raises(ConfigError) as caught:
        Pool(EnvironmentSettings(**given, timeout=1.0))
    assert len(caught.value.lines) == len(lines)
    for line, expected in zip(caught.value.lines, lines, strict=True):
        assert re.fullmatch(expected, line), line
    assert not wait_until_gone(below(os.getpid()) - before)


def test_a_file_that_ends_its_process(tmp_path):
    (tmp_path / "ends.py").write_text("import os\nos._exit(5)\n")
    with pytest.raises(
        ConfigError, match=r"environment.factory: the process for .*ends.py:f ended while it started .*status 5"
    ):
        Pool(EnvironmentSettings(factory=f"{tmp_path}/ends.py:f"))


# -- at the end ---------------------------------------------------------------------------------------------------------------


def test_closing_ends_everything_at_once(folder):
    before = below(os.getpid())
    pool = Pool(EnvironmentSettings(factory=f"{folder}/episodes.py:Gym", workers=2))
    sessions = [pool.session() for _ in range(6)]
    opening = [session.reset({"prompt": "", "answers": ["time.sleep(60)"]}) for session in sessions]
    assert [future.result() for future in opening] == [Opening("")] * 6
    steps = [session.step(Said("")) for session in sessions]  # two hang, four wait for a worker
    begun = time.monotonic()
    pool.close()
    assert [future.result() for future in steps] == [Answer(failure=f"step: {CLOSED}")] * 6
    assert time.monotonic() - begun < 10
    assert sessions[0].reset({}).result() == Opening(failure=CLOSED) and sessions[0].end().result() == Ending(failure=CLOSED)
    pool.close()
    assert not wait_until_gone(below(os.getpid()) - before)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_job_that_is_killed(folder, number):
    """While episodes hang in C, one with a child of its own and one with a daemon."""
    job = f"""
        from steerl.rollout.environments.host.pool import Pool
        from steerl.rollout.environments.settings import EnvironmentSettings
        from steerl.rollout.environments.types import Said
        pool = Pool(EnvironmentSettings(factory="{folder}/episodes.py:Gym"))
        sessions = [pool.session() for _ in range(3)]
        code = "(lambda os, sub: (sub.Popen(['sleep', '600']), sub.Popen(['sleep', '600'], start_new_session=True), os.fork(), ('', 0, False))[-1])(os, __import__('subprocess'))"
        for session in sessions:
            session.reset({{"prompt": "", "answers": [code, "time.sleep(60)"]}}).result()
            assert not session.step(Said("")).result().failure
        futures = [session.step(Said("")) for session in sessions]
        print("hanging", flush=True)
        futures[0].result()
    """
    process = warm.start([sys.executable, "-c", textwrap.dedent(job)])
    assert process.readline().strip() == "hanging", process.communicate()
    started = below(process.pid)
    assert len(started) >= 1 + 3 + 3 * 2  # the zygote, the episodes, and the sleepers
    process.send_signal(number)
    process.wait()
    assert not wait_until_gone(started)
