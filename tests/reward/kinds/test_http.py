"""Rewards over HTTP: the same numbers as in process, order kept, and servers that misbehave."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import socket
import threading
import time

import httpx
import pytest
import torch

from steerl.reward.build import build_reward
from steerl.reward.jobs.http_server import Limits, make_app
from steerl.reward.kinds import http as remote
from steerl.reward.kinds import http_wire
from steerl.reward.types import Scores
from steerl.rollout.common.errors import UserError
from tests.episodes import CALCULATOR, samples_of
from tests.models import tiny_tokenizer
from tests.reward.classifiers import saved, tiny_classifier
from tests.reward.rows import episodes, made
from tests.reward.servers import scripted, served

LIMITS = Limits(max_rows=1000, max_bytes=1_000_000)


def http(url: str, **fields) -> list[dict]:
    return [{"kind": "http", "url": url, "backoff": 0.001, **fields}]


def test_scores_through_http_equal_scores_in_process_exactly(tmp_path):
    tokenizer = tiny_tokenizer()
    paths = [saved(tiny_classifier(family), tmp_path / family, tokenizer) for family in ("llama", "bert")]
    parts = [
        {"kind": "model", "path": paths[0], "name": "rm", "weight": 0.7},
        {"kind": "model", "path": paths[1], "name": "text", "tokens": "text", "weight": 1 / 3},
        {"kind": "exact", "column": "reply"},
    ]
    completions = [f"{'very ' * (i % 4)}good film {i}" for i in range(23)]
    rollout, texts = made(
        completions, prompts=[f"prompt {'x' * i}" for i in range(23)], reply=completions[:20] + [None, "no", 3]
    )
    here = build_reward(parts, tokenizer=tokenizer)
    expected = here(rollout, texts)
    with served(make_app(build_reward(parts), LIMITS, None)) as url:
        found = build_reward(http(url), tokenizer=tokenizer)(rollout, texts)
        assert torch.equal(found.total_B, expected.total_B)
        for name in ("rm", "text", "exact"):
            assert torch.equal(found.parts[f"http.{name}"].nan_to_num(9e9), expected.parts[name].nan_to_num(9e9))
        assert httpx.get(f"{url}/health").json() == {"status": "ok", "parts": ["rm", "text", "exact"]}


def test_rewards_per_token_go_through(tmp_path):
    def steps(rollout, texts):
        return Scores(torch.zeros(len(texts)), tokens_BR=torch.where(rollout.mask_BR, rollout.response_BR / 7.0, 0.0))

    rollout, texts = made(["abc", "d", "ef"])
    expected = build_reward([steps])(rollout, texts)
    with served(make_app(build_reward([steps]), LIMITS, None)) as url:
        found = build_reward(http(url, batch_size=2))(rollout, texts)
    assert torch.equal(found.per_token(rollout), expected.per_token(rollout))
    assert torch.equal(found.total_B, expected.total_B)


def test_gaps_go_over_the_wire_and_rows_without_look_as_before(tmp_path):
    tokenizer = tiny_tokenizer()

    def steps(rollout, texts):
        return Scores(torch.zeros(len(texts)), tokens_BR=torch.where(rollout.mask_BR, rollout.response_BR / 7.0, 0.0))

    parts = [
        {"kind": "length", "max": 2, "soft": 10},
        {"kind": "model", "path": saved(tiny_classifier("llama"), tmp_path / "rm", tokenizer), "tokens": "ids"},
        steps,
    ]
    rollout, texts = episodes(["abcde", "d", "efg"], ["11001", "1", "010"])
    expected = build_reward(parts)(rollout, texts)
    with served(make_app(build_reward(parts), LIMITS, None)) as url:
        found = build_reward(http(url, batch_size=2))(rollout, texts)
    assert torch.equal(found.tokens_BR, expected.tokens_BR) and torch.equal(found.total_B, expected.total_B)
    asked = [json.loads(http_wire.ask(*pair, None, "")) for pair in ((rollout, texts), made(["abcde", "d", "efg"]))]
    assert asked[0]["ids"]["action_mask"] == [[1, 1, 0, 0, 1], [1], [0, 1, 0]] and "action_mask" not in asked[1]["ids"]
    assert {**asked[0]["ids"], "action_mask": 0} == {**asked[1]["ids"], "action_mask": 0}
    asked[0]["ids"]["action_mask"][1] = [1, 1]
    with pytest.raises(UserError, match="action_mask: expected as many as the responses' ids"):
        http_wire.read_question(json.dumps(asked[0]).encode(), 10)


def test_a_server_that_rewards_what_was_fed_is_refused():
    rollout, texts = episodes(["abc"], ["101"])
    told = pytest.raises(UserError, match="row 10 sample 0 earns 1 at token 1, which the policy did not draw")
    with scripted(lambda number, question: (200, {"scores": [3.0], "tokens": [[1.0, 1.0, 1.0]]})) as (url, _), told:
        build_reward(http(url))(rollout, texts)


def test_order_is_kept_when_later_requests_are_answered_first():
    gate = threading.Event()

    def reply(number, question):
        if number == 0:
            assert gate.wait(20)
        else:
            gate.set()
        return 200, {"scores": [float(text) for text in question["completions"]]}

    with scripted(reply) as (url, asked):
        rollout, texts = made([str(i) for i in range(7)], genre=["x"] * 7)
        found = build_reward(http(url, batch_size=2, concurrency=2))(rollout, texts)
    assert found.total_B.tolist() == [float(i) for i in range(7)]
    assert sorted(len(question["prompts"]) for question in asked) == [1, 2, 2, 2]
    assert asked[0]["columns"] == {"genre": ["x"] * 2} and asked[0]["path"] == "/score"


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_errors_of_the_server_are_tried_again(status):
    def reply(number, question):
        return (status, {"error": "busy"}) if number < 2 else (200, {"scores": [5.0]})

    with scripted(reply) as (url, asked):
        assert build_reward(http(url, retries=2))(*made(["a"])).total_B.tolist() == [5.0]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("reply", "requests", "message"),
    [
        ((500, {"error": "out of\nmemory"}), 3, "status 500: out of memory, in each of 3 tries"),
        ((422, {"error": "prompts: bad"}), 1, "status 422: prompts: bad"),
        ((401, b"who are you"), 1, r"status 401: who are you; set the token in \$STEERL_REWARD_TOKEN"),
        ((413, b"too much"), 1, "status 413: too much; lower batch_size"),
        ((200, {"scores": [1.0]}), 1, "the answer has 1 scores for 2 rows"),
        ((200, {"scores": [1.0, 2.0, 3.0]}), 1, "the answer has 3 scores for 2 rows"),
        ((200, {"rewards": [1.0, 2.0]}), 1, 'the answer has no list "scores"'),
        ((200, b"<html>"), 1, "Expecting value"),
        ((200, b'{"scores": [1.0, NaN]}'), 1, "row 11 sample 0: gave nan"),
        ((200, b'{"scores": [1e999, 1.0]}'), 1, "row 10 sample 0: gave inf"),
        ((200, {"scores": [1.0, "high"]}), 1, "row 11 sample 0: gave 'high', not a number"),
        (
            (200, {"scores": [1.0, 2.0], "tokens": [[1.0], [2.0, 3.0]]}),
            1,
            "the answer's tokens are not one number per token of the response",
        ),
        ((200, {"scores": [1.0, 2.0], "parts": {"x": [1.0]}}), 1, "the answer's part 'x' has not 2 scores"),
        ((200, {"scores": [1.0, 2.0], "parts": {"x": [1.0, 1e39]}}), 1, "the answer's part 'x' has not 2 scores"),
        ((200, {"scores": [1.0, 2.0], "parts": [1]}), 1, "the answer's parts are no object"),
        ((200, {"scores": [1.0, 2.0], "tokens": 5}), 1, "the answer's tokens are not one number"),
        ((200, {"scores": [1.0, 2.0], "tokens": [[None], [10**400]]}), 1, "the answer's tokens are not one number"),
        ((200, {"scores": [1.0, 2.0], "fallbacks": {"x": "many"}}), 1, "the answer's fallbacks are no counts"),
        ((200, {"scores": [1.0, 2.0], "logs": {"extra": {"x": [1]}}}), 1, "the answer's logs are not numbers and a value per"),
        ((200, {"scores": [10**400, 1.0]}), 1, "row 10 sample 0: gave int, not one number"),
        ((200, b'{"scores": [1' + b"0" * 9000 + b", 2]}"), 1, "Exceeds the limit"),
        ((200, b'{"scores": [' + b"[" * 100_000), 1, "lists in lists too deep"),
        ((200, b'{"scores": [' + b"{}," * 200_000 + b"1]}"), 1, "more than 150,000 lists and objects"),
        ((200, {"scores": [1.0, "[" * 5000]}), 1, r"row 11 sample 0: gave '\[{20,60}...\[*', not a number"),
        ((200, b"\x1f\x8b" + b"\x00" * 100), 1, "invalid start byte|can't decode|Expecting value"),
        ((422, {"error": "\x1b[2J\x9b\ud800 gone"}), 1, "status 422: \u241b.2J\ufffd\ufffd gone"),
        ((422, b'{"error": ' + b"[" * 100_000), 1, r"status 422: {\"error\": \[\["),
    ],
)
def test_bad_answers_name_part_and_row_or_get_the_fallback(reply, requests, message, caplog, monkeypatch):
    monkeypatch.setattr(http_wire, "MOST_LISTS", 150_000)
    with scripted(lambda number, question: reply) as (url, asked):
        with pytest.raises(UserError, match=rf"reward\[0\] \(http\): row 1[01] sample 0: .*{message}|{message}") as told:
            build_reward(http(url, retries=2))(*made(["a", "b"]))
        assert len(told.value.lines) == 1 and len(str(told.value)) < 700 and str(told.value).isprintable()
        assert len(asked) == requests
        with caplog.at_level(logging.WARNING):
            scores = build_reward(http(url, retries=0, fallback=-4.0))(*made(["a", "b"]))
    assert -4.0 in scores.total_B.tolist() and sum(scores.fallbacks.values()) >= 1
    assert "got the fallback -4.0" in caplog.text


@pytest.mark.parametrize(("piece", "pause", "message"), [
    (b" " * 100_000, 0.0, "an answer of more than 1,000,000 bytes"),
    (b" ", 0.05, "no answer after 0.4 s, in each of 1 tries"),
])  # fmt: skip
def test_an_answer_without_an_end(piece, pause, message, monkeypatch):
    monkeypatch.setattr(remote, "MOST_BYTES", 1_000_000)
    over = threading.Event()

    def endless():
        while not over.wait(pause):
            yield piece

    with scripted(lambda number, question: (200, endless())) as (url, _):
        with pytest.raises(UserError, match=message):
            build_reward(http(url, retries=0, timeout=0.4 if pause else 20.0))(*made(["a"]))
        over.set()


def test_a_wait_that_is_no_number():
    with scripted(lambda n, question: (503, {}) if n == 0 else (200, {"scores": [1.0]}), **{"retry-after": "\u00b2"}) as (
        url,
        _,
    ):
        assert build_reward(http(url, retries=1))(*made(["a"])).total_B.tolist() == [1.0]


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://a:99999", "http://a:x", "http://a\nb/", "http://a:0", "ftp://a", "http://"]
)
def test_a_url_that_is_none(url):
    with pytest.raises(UserError, match=r"^reward\[0\].url: expected http://host:port, found"):
        build_reward(http(url))


def test_a_time_limit_that_no_clock_holds():
    with pytest.raises(UserError, match=r"reward\[0\].timeout: expected at most 86,400 s, found 1e\+300"):
        build_reward(http("http://a:1", timeout=1e300))
    with pytest.raises(UserError, match=r"reward\[0\].timeout: expected at most 86,400 s, found 1e\+300"):
        build_reward([{"kind": "function", "function": "math:fsum", "timeout": 1e300}])
    with pytest.raises(UserError, match=r"reward\[0\].timeout: expected at most 86,400 s, found 1e\+300"):
        build_reward([{"kind": "regex", "pattern": "a", "timeout": 1e300}])


def test_a_server_that_answers_late():
    release = threading.Event()

    def reply(number, question):
        release.wait(20)
        return 200, {"scores": [1.0]}

    with scripted(reply) as (url, asked):
        with pytest.raises(UserError, match="no answer after 0.2 s, in each of 2 tries"):
            build_reward(http(url, timeout=0.2, retries=1))(*made(["a"]))
        release.set()
    assert len(asked) == 2


def test_no_server():
    with scripted(lambda number, question: (200, {})) as (url, _):
        pass
    with pytest.raises(UserError, match=r"reward\[0\] \(http\): row 10 sample 0: .*ConnectError.*in each of 2 tries"):
        build_reward(http(url, retries=1))(*made(["a"]))


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "httpx" else own(name, *rest))
    with pytest.raises(UserError, match=r"needs the package httpx; pip install 'steerl\[serve\]'$"):
        build_reward([{"name": "far", "kind": "http", "url": "http://127.0.0.1:1/"}])


def test_null_means_that_the_reward_does_not_apply():
    zero = {"kind": "regex", "pattern": "z"}
    with scripted(lambda number, question: (200, {"scores": [None, 2.0]})) as (url, _):
        scores = build_reward([*http(url), zero])(*made(["a", "b"]))
        assert scores.parts["http"][0].isnan() and scores.total_B.tolist() == [0.0, 2.0]
        with pytest.raises(UserError, match="no part applies to 1 of 2 rows"):
            build_reward(http(url))(*made(["a", "b"]))


def test_a_row_to_which_no_part_of_the_server_applies_is_null_for_the_asker():
    def some(completions):
        return [None if text == "x" else 1.0 for text in completions]

    with served(make_app(build_reward([some]), LIMITS, None)) as url:
        scores = build_reward([*http(url), {"kind": "regex", "pattern": "x"}])(*made(["a", "x"]))
    assert scores.parts["http"].nan_to_num(9.0).tolist() == [1.0, 9.0] and scores.total_B.tolist() == [1.0, 1.0]


def test_what_functions_log_and_broken_text_go_through():
    def logs(completions, log_metric, log_extra):
        log_metric("n", len(completions))
        log_extra("text", completions)
        return [1.0] * len(completions)

    rows = made(["a", "\ud800 b", "c"])
    with served(make_app(build_reward([logs]), LIMITS, None)) as url:
        scores = build_reward(http(url, batch_size=2, concurrency=1))(*rows)
    assert scores.metrics == {"http/logs/n": [2.0, 1.0]} and scores.extra == {"http/logs/text": rows[1].completions}


def test_a_fallback_on_the_servers_side_is_told_here_too(caplog):
    def bad(completions):
        return [float("nan") if text == "x" else 1.0 for text in completions]

    remote = build_reward([{"kind": "function", "function": bad, "fallback": 0.5}])
    with served(make_app(remote, LIMITS, None)) as url, caplog.at_level(logging.WARNING):
        scores = build_reward(http(url))(*made(["a", "x"]))
    assert scores.total_B.tolist() == [1.0, 0.5] and scores.fallbacks == {"http": 1}
    assert "the server gave 1 of 2 rows a fallback" in caplog.text


def test_a_column_that_json_cannot_carry():
    with pytest.raises(UserError, match=r"reward\[0\] \(http\): a column holds bytes"):
        build_reward(http("http://127.0.0.1:9"))(*made(["a"], image=[b"png"]))


# -- the server's side --------------------------------------------------------------------------------------------------


def length(completions):
    return [float(len(text)) for text in completions]


def post(url: str, body, **fields) -> httpx.Response:
    given = (
        {"json": body} if not isinstance(body, bytes) else {"content": body, "headers": {"content-type": "application/json"}}
    )
    return httpx.post(f"{url}/score", **{**given, **fields}, trust_env=False)


def test_the_token(monkeypatch):
    with served(make_app(build_reward([length]), LIMITS, "s3cret")) as url:
        question = {"prompts": ["q"], "completions": ["abc"]}
        assert post(url, question).status_code == 401
        assert post(url, question, headers={"authorization": "Bearer wrong"}).status_code == 401
        assert post(url, question, headers={"authorization": "Bearer s3cret"}).json()["scores"] == [3.0]
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        monkeypatch.setenv("STEERL_REWARD_TOKEN", "s3cret")
        assert build_reward(http(url))(*made(["ab"])).total_B.tolist() == [2.0]


def test_limits_and_bad_questions():
    with served(make_app(build_reward([length]), Limits(max_rows=2, max_bytes=500), None)) as url:
        for body, status, words in [
            ({"prompts": ["q"] * 3, "completions": ["a"] * 3}, 413, "3 rows; at most 2"),
            ({"prompts": ["q"], "completions": ["a" * 600]}, 413, "bytes; at most 500"),
            ({"prompts": ["q"]}, 422, "completions: missing"),
            ({"prompts": ["q", "r"], "completions": ["a"]}, 422, "prompts: expected a list of 1"),
            ({"prompts": ["q"], "completions": [3]}, 422, "completions: expected a list of texts"),
            ({"prompts": ["q"], "completions": ["a"], "columns": {"x": [1, 2]}}, 422, "columns.x: expected a list of 1"),
            (
                {"prompts": ["q"], "completions": ["a"], "ids": {"prompts": [["x"]], "responses": [[1]]}},
                422,
                "ids, ended, rows",
            ),
            ({"prompts": ["q"], "completions": ["a"], "ids": {"prompts": [[1], [2]], "responses": [[1], [2]]}}, 422, "ids"),
            (b"{", 422, "body: not JSON"),
            (b"[]", 422, "completions: missing"),
        ]:
            found = post(url, body)
            assert (found.status_code, words in found.json()["error"]) == (status, True), found.text
        streamed = httpx.post(
            f"{url}/score",
            content=(b"x" * 100 for _ in range(9)),
            headers={"content-type": "application/json"},
            trust_env=False,
        )
        assert streamed.status_code == 413 and "more than 500 bytes" in streamed.json()["error"]
        form = httpx.post(
            f"{url}/score", content=b'{"completions": []}', headers={"content-type": "text/plain"}, trust_env=False
        )
        assert form.status_code == 415
        assert httpx.get(f"{url}/score", trust_env=False).status_code == 405
        assert post(url, {"completions": ["abcd"]}).json() == {
            "scores": [4.0],
            "parts": {"length": [4.0]},
            "tokens": None,
            "fallbacks": {},
        }


def test_questions_that_cost_too_much_are_refused_at_once():
    def pieces(piece: bytes, times: int) -> bytes:
        return b'{"completions": ["a"], "columns": {"x": [[' + piece * times + b"0]]}}"

    padded = {"completions": ["a"] * 1000, "ids": {"responses": [[1] * 140_000] + [[]] * 999}}
    limits = Limits(max_rows=1000, max_bytes=8_000_000)
    with served(make_app(build_reward([length]), limits, None), limits) as url:
        for body, status, words in [
            (pieces(b"[],", 1_100_000), 422, "body: not JSON: more than 1,000,000 lists and objects"),
            (pieces(b"{},", 1_100_000), 422, "body: not JSON: more than 1,000,000 lists and objects"),
            (pieces(b"[" * 100_000, 1), 422, "body: not JSON: lists in lists too deep"),
            (padded, 413, "140,000,000 places for token ids, padded; at most 134,217,728"),
            ({"completions": ["a"], "ids": {"responses": [[-1]]}}, 422, "ids: expected 0 and up"),
            ({"completions": ["a"], "ids": {"responses": [[2**63]]}}, 422, "ids, ended, rows"),
        ]:
            found = post(url, body, timeout=30)
            assert (found.status_code, words in found.json()["error"]) == (status, True), found.text
        # Brackets inside of texts are no lists.
        assert post(url, {"completions": ['[{\\"' * 400_000]}, timeout=30).json()["scores"] == [1_600_000.0]


def test_a_host_of_another_name_is_refused():
    """A page whose name was made to resolve to 127.0.0.1 reaches the server, but still says its own name."""
    question = {"completions": ["abc"]}

    def statuses(url: str, *names: str) -> list[int]:
        asked = [post(url, question, headers={"host": name}).status_code for name in names]
        healthy = [httpx.get(f"{url}/health", headers={"host": name}, trust_env=False).status_code for name in names]
        assert asked == healthy
        return asked

    with served(make_app(build_reward([length]), LIMITS, None)) as url:
        assert statuses(url, "evil.example", "evil.example:8100", "localhost.evil.example", "") == [421] * 4
        assert statuses(url, "localhost", "LOCALHOST:1", "127.0.0.1:8100", "[::1]:8100") == [200] * 4
    with served(make_app(build_reward([length]), LIMITS, None, hosts=("gpu7",))) as url:
        assert statuses(url, "gpu7:80", "localhost") == [200, 421]
    with served(make_app(build_reward([length]), LIMITS, None, hosts=None)) as url:
        assert statuses(url, "evil.example") == [200]


def test_what_a_function_raises_stays_in_the_servers_log(caplog):
    def leaks(completions):
        raise ValueError("password is swordfish")

    with served(make_app(build_reward([leaks]), LIMITS, None)) as url, caplog.at_level(logging.WARNING):
        found = post(url, {"completions": ["a"]})
    name = found.json()["error"].rsplit(" ", 1)[1]
    assert found.status_code == 422 and "the server's log has the cause, failure " in found.text
    assert "swordfish" not in found.text
    assert f"failure {name}: reward[0] (leaks): row 0 sample 0: raised ValueError: password is swordfish" in caplog.text


def test_connections_without_a_request_are_closed_and_no_more_than_a_number_are_held():
    """Half-open, idle and dripping connections: each is gone soon, and a whole request is answered afterwards."""
    limits = Limits(max_rows=10, max_bytes=1000, seconds=0.5, connections=20)
    head = b"POST /score HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    begun = [b"", b"POST /score HT", head, head + b"content-length: 500\r\n\r\n{"]
    with served(make_app(build_reward([length]), limits, None), limits) as url:
        port = int(url.rsplit(":", 1)[1])
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)) for _ in range(40)]
            for number, one in enumerate(held[:20]):
                one.sendall(begun[number % 4])
            for one in held[20:]:
                assert one.recv(100).startswith(b"HTTP/1.1 503") or not one.recv(100)
            began = time.monotonic()
            while time.monotonic() - began < 1.2:  # a byte now and then holds nothing up
                for one in held[1:20:4]:
                    with contextlib.suppress(OSError):
                        one.sendall(b"x")
                time.sleep(0.1)
            answers = []
            for one in held[:20]:
                try:
                    answers.append(one.recv(1000))
                except ConnectionResetError:
                    answers.append(b"")
            assert all(answer == b"" or answer.startswith(b"HTTP/1.1 408") for answer in answers)
            assert sum(bool(answer) for answer in answers) == 5
            assert post(url, {"completions": ["abc"]}).json()["scores"] == [3.0]


def test_a_request_may_take_longer_than_a_connection_may_idle():
    def slow(completions):
        time.sleep(0.6)
        return [1.0]

    limits = Limits(max_rows=10, max_bytes=1000, seconds=0.2)
    with served(make_app(build_reward([slow]), limits, None), limits) as url:
        assert post(url, {"completions": ["a"]}).json()["scores"] == [1.0]


def test_requests_are_scored_one_after_the_other():
    inside, another = threading.Semaphore(1), threading.Event()
    overlaps: list[bool] = []

    def watched(completions):
        overlaps.append(not inside.acquire(blocking=False))
        if overlaps[-1]:
            another.set()
        else:
            another.wait(0.5)  # long enough for a second one to come in, if it may
            inside.release()
        return [1.0] * len(completions)

    with served(make_app(build_reward([watched]), LIMITS, None)) as url:
        asking = [threading.Thread(target=post, args=(url, {"completions": ["a"]})) for _ in range(2)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert overlaps == [False, False]


def test_health_answers_while_a_request_is_scored():
    started, release = threading.Event(), threading.Event()

    def slow(completions):
        started.set()
        assert release.wait(20)
        return [1.0] * len(completions)

    with served(make_app(build_reward([slow]), LIMITS, None)) as url:
        answers: list[httpx.Response] = []
        asking = threading.Thread(target=lambda: answers.append(post(url, {"completions": ["a"]})))
        asking.start()
        assert started.wait(20)
        assert httpx.get(f"{url}/health", trust_env=False).json()["status"] == "ok"
        release.set()
        asking.join()
    assert answers[0].json()["scores"] == [1.0]


def test_episodes_go_over_the_wire():
    """The same numbers as in process: what the environment gave, messages, the policy's last turn."""

    def counted(completions, environments, **columns):
        return [len(messages) + environment.calls for messages, environment in zip(completions, environments, strict=True)]

    parts = [{"kind": "environment"}, counted, {"kind": "numeric"}]
    rollout, texts = samples_of(CALCULATOR[:3], answer=[5, 20, 3])
    expected = build_reward(parts)(rollout, texts)
    with served(make_app(build_reward(parts), LIMITS, None)) as url:
        found = build_reward(http(url, batch_size=2))(rollout, texts)
    assert torch.equal(found.tokens_BR, expected.tokens_BR) and torch.equal(found.total_B, expected.total_B)
    question = json.loads(http_wire.ask(rollout, texts, None, ""))
    assert http_wire.read_question(json.dumps(question).encode(), 10)[1].episodes == texts.episodes
    assert "episodes" not in json.loads(http_wire.ask(*made(["a"]), None, ""))
    turn = question["episodes"][0]["turns"][1]
    for name, wrong in (("end", 99), ("first", "0"), ("text", None), ("answer", [1]), ("message", "hi"), ("odd", 1)):
        broken = {**question, "episodes": [{**question["episodes"][0], "turns": [{**turn, name: wrong}]}] * 3}
        with pytest.raises(UserError, match="episodes: expected one for each row"):
            http_wire.read_question(json.dumps(broken).encode(), 10)
    with pytest.raises(UserError, match="episodes: expected one for each row"):
        http_wire.read_question(json.dumps({**question, "episodes": question["episodes"][:2]}).encode(), 10)
