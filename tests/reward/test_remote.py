"""Rewards over HTTP: the same numbers as in process, order kept, and servers that misbehave."""

from __future__ import annotations

import importlib.util
import logging
import threading

import httpx
import pytest
import torch

from reward.base import Scores, build_reward
from reward.server import Limits, make_app
from rollout.errors import Problem
from tests.models import tiny_tokenizer
from tests.reward.classifiers import saved, tiny_classifier
from tests.reward.rows import made
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
            "the answer's tokens are not one number per sampled token",
        ),
        ((200, {"scores": [1.0, 2.0], "parts": {"x": [1.0]}}), 1, "the answer's part 'x' has not 2 scores"),
    ],
)
def test_bad_answers_name_part_and_row_or_get_the_fallback(reply, requests, message, caplog):
    with scripted(lambda number, question: reply) as (url, asked):
        with pytest.raises(Problem, match=rf"reward\[0\] \(http\): row 1[01] sample 0: .*{message}|{message}"):
            build_reward(http(url, retries=2))(*made(["a", "b"]))
        assert len(asked) == requests
        with caplog.at_level(logging.WARNING):
            scores = build_reward(http(url, retries=0, fallback=-4.0))(*made(["a", "b"]))
    assert -4.0 in scores.total_B.tolist() and sum(scores.fallbacks.values()) >= 1
    assert "got the fallback -4.0" in caplog.text


def test_a_server_that_answers_late():
    release = threading.Event()

    def reply(number, question):
        release.wait(20)
        return 200, {"scores": [1.0]}

    with scripted(reply) as (url, asked):
        with pytest.raises(Problem, match="no answer after 0.2 s, in each of 2 tries"):
            build_reward(http(url, timeout=0.2, retries=1))(*made(["a"]))
        release.set()
    assert len(asked) == 2


def test_no_server():
    with scripted(lambda number, question: (200, {})) as (url, _):
        pass
    with pytest.raises(Problem, match=r"reward\[0\] \(http\): row 10 sample 0: .*ConnectError.*in each of 2 tries"):
        build_reward(http(url, retries=1))(*made(["a"]))


def test_a_missing_package_is_one_line_that_names_the_extra(monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "httpx" else own(name, *rest))
    with pytest.raises(Problem, match=r"needs the package httpx; pip install 'steerl\[serve\]'$"):
        build_reward([{"name": "far", "kind": "http", "url": "http://127.0.0.1:1/"}])


def test_null_means_that_the_reward_does_not_apply():
    with scripted(lambda number, question: (200, {"scores": [None, 2.0]})) as (url, _):
        scores = build_reward(http(url))(*made(["a", "b"]))
    assert scores.parts["http"][0].isnan() and scores.total_B.tolist() == [0.0, 2.0]


def test_a_fallback_on_the_servers_side_is_told_here_too(caplog):
    def bad(completions):
        return [float("nan") if text == "x" else 1.0 for text in completions]

    remote = build_reward([{"kind": "function", "function": bad, "fallback": 0.5}])
    with served(make_app(remote, LIMITS, None)) as url, caplog.at_level(logging.WARNING):
        scores = build_reward(http(url))(*made(["a", "x"]))
    assert scores.total_B.tolist() == [1.0, 0.5] and scores.fallbacks == {"http": 1}
    assert "the server gave 1 of 2 rows a fallback" in caplog.text


def test_a_column_that_json_cannot_carry():
    with pytest.raises(Problem, match=r"reward\[0\] \(http\): a column holds bytes"):
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
