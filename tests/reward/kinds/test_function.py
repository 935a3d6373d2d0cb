"""Rewards of the user's own: TRL's signature and ours, what goes wrong in them, and time limits with real processes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
import torch

from steerl.reward.build import build_reward
from steerl.reward.types import Scores, TurnRewards, metrics
from steerl.rollout.common.errors import UserError
from tests import warm
from tests.reward.rows import episodes, made

FILE = """
import os, sys, time
from helper_beside import BONUS

print("imported")          # a worker's own pipe must not mind

def lengths(prompts, completions, **columns):
    return [float(len(text)) + BONUS for text in completions]

def answers(completions, answer):
    return [1.0 if text == right else 0.0 for text, right in zip(completions, answer)]

def hangs(completions, **columns):
    print("working")
    while any("x" in text for text in completions):
        pass
    return [1.0 for _ in completions]

def hangs_in_c(completions, **columns):
    import re
    return [float(bool(re.match("(a|aa)+$", text))) for text in completions]

def dies(completions, **columns):
    if "x" in completions:
        os._exit(3)
    return [1.0 for _ in completions]

def raises(completions, **columns):
    if "x" in completions:
        raise KeyError("no such genre")
    return [1.0 for _ in completions]

async def waits(completions, **columns):
    import asyncio
    if "x" in completions:
        await asyncio.sleep(3600)
    return [2.0 for _ in completions]

not_a_function = 3
"""


def deep(levels: int) -> list:
    """[[[...]], 1.0]: a score that is a list of many levels."""
    value: list = []
    for _ in range(levels):
        value = [value]
    return [value, 1.0]


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "rewards_here.py").write_text(FILE)
    (tmp_path / "helper_beside.py").write_text("BONUS = 0.5\n")
    return str(tmp_path / "rewards_here.py")


def part(file: str, name: str, **fields) -> list[dict]:
    return [{"kind": "function", "function": f"{file}:{name}", **fields}]


def test_a_function_of_a_file(file):
    assert build_reward(part(file, "lengths"))(*made(["a", "abc"])).total_B.tolist() == [1.5, 3.5]


def test_what_a_function_is_given():
    seen = {}

    def everything(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.0] * len(prompts)

    chat = [{"role": "user", "content": "hi"}]
    rollout, texts = made(["ab", "c"], prompts=["ask", chat], genre=["x", "y"])
    build_reward([everything])(rollout, texts)
    assert seen["prompts"] == ["ask", chat]
    assert seen["completions"] == ["ab", [{"role": "assistant", "content": "c"}]]
    assert seen["completion_ids"] == [rollout.response_BR[0, :2].tolist(), rollout.response_BR[1, :1].tolist()]
    assert seen["genre"] == ["x", "y"]


def test_a_function_is_told_which_tokens_are_the_policys():
    seen = {}

    def mine(completion_ids, action_mask, turns, **others):
        seen.update(completion_ids=completion_ids, action_mask=action_mask, turns=turns)
        return [0.0] * len(turns)

    rollout, texts = episodes(["abcde", "ab"], ["11001", "11"])
    build_reward([mine])(rollout, texts)
    assert seen["completion_ids"] == [rollout.response_BR[0].tolist(), rollout.response_BR[1, :2].tolist()]
    assert seen["action_mask"] == [[True, True, False, False, True], [True, True]]
    assert seen["turns"] == [[(0, 2), (4, 5)], [(0, 2)]]


def test_rewards_of_turns():
    """By hand: numbers on the last actions of turns, weighted, beside a term that sits on the last action."""

    def each(turns, **others):
        return TurnRewards([[1.0 + place for place in range(len(row))] if len(row) != 1 else None for row in turns])

    def whole(rollout, texts):
        return [10.0] * len(texts)

    rollout, texts = episodes(["abcde", "ab", "abc"], ["11001", "11", "101"])
    scores = build_reward([{"kind": "function", "function": each, "name": "each", "weight": 0.5}, whole])(rollout, texts)
    assert scores.tokens_BR.tolist() == [[0, 0.5, 0, 0, 11.0], [0, 10.0, 0, 0, 0], [0.5, 0, 11.0, 0, 0]]
    assert scores.total_B.tolist() == [11.5, 10.0, 11.5]
    assert scores.parts["each"].nan_to_num(nan=-9).tolist() == [3.0, -9.0, 3.0]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_turn_without_a_number_gets_the_row_the_fallback(tmp_path, timeout):
    (tmp_path / "turns.py").write_text(
        "from steerl.reward import TurnRewards\n"
        "def each(completions, turns):\n"
        "    return TurnRewards([[float(c) for c in text[::2]] if text != 'bad' else [1.0, None] for text in completions])\n"
    )
    rollout, texts = episodes(["1f2", "bad"], ["101", "101"])
    part = {"kind": "function", "function": f"{tmp_path / 'turns.py'}:each", "timeout": timeout}
    scores = build_reward([{**part, "fallback": -5.0}])(rollout, texts)
    assert scores.tokens_BR.tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, -5.0]] and scores.fallbacks == {"function": 1}
    with pytest.raises(UserError, match="row 11 sample 0: gave None for a turn"):
        build_reward([part])(rollout, texts)


def test_a_function_gets_the_columns_it_names(file):
    reward = build_reward(part(file, "answers"))
    assert reward(*made(["4", "5"], answer=["4", "4"], other=[1, 2])).total_B.tolist() == [1.0, 0.0]
    with pytest.raises(
        UserError, match=r"here.py:answers asks for 'answer', which is no column of the data \(columns: reply\)"
    ):
        reward(*made(["4"], reply=["4"]))


def test_a_missing_column_is_told_of_a_function_that_takes_everything_else_too():
    def mine(completions, answer, **columns):
        return [1.0] * len(completions)

    with pytest.raises(UserError) as told:
        build_reward([mine])(*made(["4"], reply=["4"], genre=["x"]))
    line = "reward[0] (mine): mine asks for 'answer', which is no column of the data (columns: reply, genre)"
    assert told.value.lines == (line,)


def test_functions_of_trl_run_as_they_are():
    from trl.rewards import think_format_reward

    good = "<think>\nbecause\n</think>\nyes"
    chat = [{"role": "user", "content": "?"}]
    assert build_reward([think_format_reward])(*made([good, "yes"], prompts=[chat, chat])).total_B.tolist() == [1.0, 0.0]


def test_arguments_of_the_settings():
    def scaled(completions, scale, **columns):
        return [scale * len(text) for text in completions]

    reward = build_reward([{"kind": "function", "function": scaled, "arguments": {"scale": 3}}])
    assert reward(*made(["ab"])).total_B.tolist() == [6.0]
    assert reward(*made(["ab"], scale=[5])).total_B.tolist() == [6.0]  # as in a worker: the settings win over a column


def test_arguments_that_do_not_fit_the_function():
    def plain(completions):
        return [0.0]

    def native(rollout, texts, scale):
        return Scores(scale * rollout.lengths_B.float())

    with pytest.raises(UserError, match=r"reward\[0\] \(function\).arguments: plain takes no 'scale'; it takes: completions"):
        build_reward([{"kind": "function", "function": plain, "arguments": {"scale": 3}}])
    with pytest.raises(UserError, match=r"arguments: native needs 'scale' beside rollout and texts"):
        build_reward([native])
    scaled = build_reward([{"kind": "function", "function": native, "arguments": {"scale": 2.0}}])
    assert scaled(*made(["abc"])).total_B.tolist() == [6.0]


@pytest.mark.parametrize("result", [torch.tensor([1.0, 2.0]), (1, True + 1), iter([1.0, 2.0]), [torch.tensor(1.0), 2]])
def test_lists_tensors_and_numbers_of_any_kind(result):
    reward = build_reward([lambda completions: result])
    assert reward(*made(["a", "b"])).total_B.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "gave 1 scores for 2 rows"),
        ([1.0] * 5, "gave more scores than one per row for 2 rows"),
        (itertools.count(), "gave more scores than one per row for 2 rows"),  # without an end
        (deep(100_000), r"row 10 sample 0: gave \[\[\[.*\], not a number"),
        ([1.0, ["x" * 10**7] * 9], "row 11 sample 0: gave .{0,400}, not a number"),
        ([1.0, float("nan")], "row 11 sample 0: gave nan"),
        ([float("-inf"), 1.0], "row 10 sample 0: gave -inf"),
        ([1e39, 1.0], "row 10 sample 0: gave 1e"),
        ([1.0, "2"], "row 11 sample 0: gave '2', not a number"),
        ([1.0, [2.0]], r"row 11 sample 0: gave \[2.0\], not a number"),
        (3.0, "gave float; give a list with one number per row"),
        ("ab", "gave str; give a list"),
        (None, "gave NoneType; give a list"),
    ],
)
def test_bad_results_name_part_and_row(result, message):
    reward = build_reward([{"kind": "function", "function": lambda completions: result, "name": "mine"}])
    with pytest.raises(UserError, match=rf"reward\[0\] \(mine\): {message}"):
        reward(*made(["a", "b"]))


def test_a_row_without_a_number_gets_the_fallback_told_and_counted(caplog):
    def bad(completions, **columns):
        return [1.0, float("nan"), None]

    zero = {"kind": "regex", "pattern": "z"}  # a row to which no part applies is refused
    reward = build_reward([{"kind": "function", "function": bad, "fallback": -3.0}, zero])
    with caplog.at_level(logging.WARNING):
        scores = reward(*made(["a", "b", "c"]))
    assert scores.total_B.tolist() == [1.0, -3.0, 0.0]  # None does not apply: no fallback
    assert scores.fallbacks == {"function": 1}
    assert "reward[0] (function): 1 of 3 rows got the fallback -3.0: row 11 sample 0: gave nan" in caplog.text


def test_a_function_that_raises_names_the_row_and_the_line(file, caplog):
    with pytest.raises(UserError, match=r"row 11 sample 0: raised KeyError: 'no such genre' \(line \d+ of rewards_here.py\)"):
        build_reward(part(file, "raises"))(*made(["a", "x"]))
    with caplog.at_level(logging.WARNING):
        scores = build_reward(part(file, "raises", fallback=0.25))(*made(["a", "x", "b"]))
    assert scores.total_B.tolist() == [1.0, 0.25, 1.0]
    assert "1 of 3 rows got the fallback 0.25" in caplog.text


@pytest.mark.parametrize("name", ["hangs", "hangs_in_c", "dies", "raises", "waits"])
def test_hanging_dying_and_raising_under_a_time_limit(file, name, caplog):
    bad = "a" * 60 + "b" if name == "hangs_in_c" else "x"
    reward = build_reward(part(file, name, timeout=1.0, fallback=-1.0))
    try:
        with caplog.at_level(logging.WARNING):
            totals = reward(*made(["a", bad, "aa"])).total_B.tolist()
        assert totals[1] == -1.0 and totals[0] == totals[2] > 0
        assert "row 11 sample 0" in caplog.text
        assert reward(*made(["a"])).total_B.tolist() == [totals[0]]  # and it goes on
    finally:
        reward.close()


def test_a_hanging_worker_ends_with_the_job_that_was_killed(tmp_path):
    """The job is killed while the function hangs in C code, where nothing but a signal reaches it."""
    (tmp_path / "mine.py").write_text(
        "import os, re\n"
        "def hangs(completions, **columns):\n"
        "    print(os.getpid(), flush=True)\n"
        "    return [float(bool(re.match('(a|aa)+$', text))) for text in completions]\n"
    )
    job = f"""
        from steerl.reward.build import build_reward
        from tests.reward.rows import made
        build_reward([{{"kind": "function", "function": "{tmp_path}/mine.py:hangs", "timeout": 60.0}}])(*made(["a" * 60 + "b"]))
    """
    command = [sys.executable, "-c", textwrap.dedent(job)]
    process = warm.start(command)
    worker = psutil.Process(int(process.readline()))
    process.kill()
    process.wait()
    gone, _ = psutil.wait_procs([worker], timeout=30)
    assert gone == [worker]


def test_a_hang_without_a_fallback_is_an_error(file):
    reward = build_reward(part(file, "hangs", timeout=0.5))
    try:
        with pytest.raises(UserError, match=r"row 11 sample 0: not done after 0.5 s"):
            reward(*made(["a", "x"]))
    finally:
        reward.close()


def test_a_worker_gives_what_the_function_gives_here(file):
    rows = made(["a", "abcd", ""], answer=["a", "b", ""])
    for name in ("lengths", "answers"):
        worker = build_reward(part(file, name, timeout=60.0))
        try:
            assert worker(*rows).total_B.tolist() == build_reward(part(file, name))(*rows).total_B.tolist()
        finally:
            worker.close()


def test_our_own_signature_sync_and_async_and_inside_a_running_loop():
    def native(rollout, texts):
        return Scores(rollout.lengths_B.float(), {"half": rollout.lengths_B / 2})

    async def later(rollout, texts):
        await asyncio.sleep(0)
        return rollout.lengths_B * 10.0

    class Callable:
        async def __call__(self, completions, **columns):
            return [100.0 for _ in completions]

    reward = build_reward([native, later, Callable()])

    async def inside():
        return reward(*made(["a", "bc"]))

    for scores in (reward(*made(["a", "bc"])), asyncio.run(inside())):
        assert scores.total_B.tolist() == [111.0, 122.0]
        assert scores.parts["native.half"].tolist() == [0.5, 1.0]


def test_asynchronous_parts_run_together():
    arrived = asyncio.Barrier(2)

    async def first(completions):
        await arrived.wait()  # passes when the other one has come too
        return [1.0]

    async def second(completions):
        await arrived.wait()
        return [2.0]

    assert build_reward([first, second])(*made(["a"])).total_B.tolist() == [3.0]


@pytest.mark.parametrize("form", ["plain", "worker", "async", "async_limited", "generator"])
def test_a_function_that_leaves_python_does_not_end_the_job(form, tmp_path):
    """sys.exit(0) in the user's file would end a job with status 0 and no result."""
    (tmp_path / "leaves.py").write_text(
        "import sys\n"
        "def plain(completions):\n    sys.exit(0)\n"
        "async def later(completions):\n    sys.exit(0)\n"
        "def generator(completions):\n    yield 1.0\n    sys.exit(0)\n"
    )
    name = {"async": "later", "async_limited": "later", "generator": "generator"}.get(form, "plain")
    limit = {"timeout": 60.0} if form in ("worker", "async_limited") else {}
    reward = build_reward(part(f"{tmp_path}/leaves.py", name, **limit))
    try:
        with pytest.raises(UserError, match=r"row 10 sample 0.*: raised SystemExit: 0 \(line \d of leaves.py\)"):
            reward(*made(["a", "b"]))
    finally:
        reward.close()


def test_a_file_that_leaves_python_when_imported(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match=r"leaves.py cannot be imported: raised SystemExit: 0 \(line 2 of leaves.py\)"):
        build_reward(part(str(tmp_path / "leaves.py"), "f"))


def test_a_worker_imports_nothing_from_the_folder_that_it_is_started_in(tmp_path, monkeypatch):
    """Strangers of the names that the worker needs: none of them is run, and the user's own file keeps its neighbors."""
    stranger, own = tmp_path / "stranger", tmp_path / "own"
    own.mkdir()
    (stranger / "rollout").mkdir(parents=True)
    for name in ("reward", "rollout/__init__", "ctypes", "json", "pickle", "numbers"):
        (stranger / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    (own / "beside.py").write_text("BONUS = 0.25\n")
    (own / "json.py").write_text("raise RuntimeError('not the library')\n")
    (own / "mine.py").write_text(
        "import json\nfrom beside import BONUS\ndef score(completions):\n    return [len(json.dumps(t)) + BONUS for t in completions]\n"
    )
    monkeypatch.chdir(stranger)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    reward = build_reward(part(f"{own}/mine.py", "score", timeout=60.0, fallback=0.0))
    try:
        assert reward(*made(["a", "bcd"])).total_B.tolist() == [3.25, 5.25]
    finally:
        reward.close()
    assert not (tmp_path / "ran").exists()


def test_a_worker_that_does_not_start_is_an_error_whatever_the_fallback(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, sys\n"
        "if sys.argv[0].endswith('worker.py'):\n    os._exit(7)\n"
        "def f(completions):\n    return [1.0 for _ in completions]\n"
    )
    reward = build_reward(part(f"{tmp_path}/mine.py", "f", timeout=60.0, fallback=0.0))
    with pytest.raises(
        UserError, match=r"^reward\[0\] \(function\): the process for .*mine.py:f ended while it started .*status 7"
    ):
        reward(*made(["a", "b"]))


# -- what TRL's functions may log ----------------------------------------------------------------------------------------

LOGGING = """
def logs(completions, log_metric=None, log_extra=None):
    log_metric("share", sum("a" in text for text in completions) / len(completions))
    log_extra("first", [text[:1] for text in completions])
    if "!" in completions and len(completions) > 1:
        raise ValueError("not together")
    return [float(len(text)) for text in completions]
"""


@pytest.mark.parametrize("limit", [None, 60.0])
def test_log_metric_and_log_extra(limit, tmp_path):
    (tmp_path / "logging_reward.py").write_text(LOGGING)
    reward = build_reward([{**part(f"{tmp_path}/logging_reward.py", "logs", timeout=limit)[0], "name": "mine"}])
    try:
        scores = reward(*made(["ab", "c", "da", "a"]))
        assert scores.metrics == {"mine/share": [0.75]} and scores.extra == {"mine/first": ["a", "c", "d", "a"]}
        assert metrics([scores])["reward/mine/share"] == 0.75
        alone = reward(*made(["ab", "!", "c"]))  # the call with all rows failed: what it logged counts no more
        assert alone.metrics == {"mine/share": [1.0, 0.0, 0.0]} and alone.extra == {"mine/first": ["a", "!", "c"]}
    finally:
        reward.close()


def test_logged_by_functions_that_take_everything_and_by_asynchronous_ones():
    async def later(prompts, completions, **kwargs):
        kwargs["log_metric"]("n", len(completions))
        kwargs["log_metric"]("n", torch.tensor(4.0))
        kwargs["log_extra"]("ids", kwargs["completion_ids"])
        return [0.0] * len(completions)

    scores = build_reward([later])(*made(["a", "bc"]))
    assert scores.metrics == {"later/n": [2.0, 4.0]}
    assert scores.extra["later/ids"] == [str(ids) for ids in ([4 + ord("a") % 50], [4 + ord(c) % 50 for c in "bc"])]
    logged = metrics([scores, build_reward([later])(*made(["a"]))])  # of two ranks: the mean of all four numbers
    assert logged["reward/later/n"] == (2 + 4 + 1 + 4) / 4


def test_log_extra_wants_a_value_per_row():
    def short(completions, log_extra):
        log_extra("note\x1b[2J", ["x"])
        return [0.0] * len(completions)

    with pytest.raises(UserError, match=r"reward\[0\] \(short\): log_extra\('note\u241b\[2J'\) got 1 values for 2 rows"):
        build_reward([short])(*made(["a", "b"]))


def test_a_file_that_cannot_be_imported(tmp_path):
    (tmp_path / "broken.py").write_text("import steerl\nraise RuntimeError('half done')\n")
    with pytest.raises(
        UserError, match=r"broken.py cannot be imported: raised RuntimeError: half done \(line 2 of broken.py\)"
    ):
        build_reward(part(str(tmp_path / "broken.py"), "f"))


def test_a_dense_native_reward_that_fails_on_one_row():
    def steps(rollout, texts):
        if "x" in texts.completions:
            raise ValueError("no steps")
        return Scores(torch.zeros(len(texts)), tokens_BR=torch.ones(rollout.response_BR.shape))

    rollout, texts = made(["ab", "x", "c"])
    scores = build_reward([{"kind": "function", "function": steps, "fallback": -1.0}])(rollout, texts)
    assert scores.per_token(rollout).tolist() == [[1.0, 1.0], [-1.0, 0.0], [1.0, 0.0]]
    assert scores.total_B.tolist() == [2.0, -1.0, 1.0]


def test_the_users_own_line_is_named_where_a_tracker_has_put_a_function_in_sys_exits_place(tmp_path, monkeypatch):
    own = sys.exit

    def exit(code: object = 0) -> None:
        own(code)

    monkeypatch.setattr(sys, "exit", exit)
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match=r"raised SystemExit: 0 \(line 2 of leaves.py\)"):
        build_reward([{"kind": "function", "function": f"{tmp_path / 'leaves.py'}:f"}])


def test_the_name_of_before_is_taken_with_a_warning(caplog):
    """Configs of before say `reward.rouge:rouge_l`; a stranger's module of that name would come first."""
    rows = made(["the cat sat", "a dog"], summary=["the cat sat", "one bird"])
    old, new = (
        build_reward([{"kind": "function", "function": f"{module}:rouge_l"}])(*rows).total_B.tolist()
        for module in ("reward.rouge", "steerl.reward.kinds.rouge")
    )
    assert old == new == [1.0, 0.0]
    assert [r.getMessage() for r in caplog.records if "called steerl.reward.kinds.rouge now" in r.getMessage()]
