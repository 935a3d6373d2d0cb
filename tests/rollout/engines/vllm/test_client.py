"""Client: what goes over the wire, what is refused, and how it is noticed that nobody answers any more."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.vllm import client as client_module
from steerl.rollout.engines.vllm.client import Client, Gone
from steerl.rollout.engines.vllm.wire import Ask, Law
from tests.rollout.engines.vllm.scripted import Scripted

LAW = Law(Sampling(max_new_tokens=7), 64, (2,))


@pytest.fixture
def server():
    with Scripted() as server:
        yield server


@pytest.fixture
def hasty(monkeypatch):
    """Tenths of seconds in the place of seconds."""
    for name, seconds in {"QUICK": 0.3, "BEAT": 0.05, "QUIET": 0.1, "PATIENCE": 0.3}.items():
        monkeypatch.setattr(client_module, name, seconds)


def test_a_row_is_asked_for_as_vllm_takes_it(server):
    ask = Ask("a", 1, 2, 3)
    Client(server.url).generate((4, 5), LAW, ask, model="adapter-1")
    ((path, body),) = server.calls
    given = body["sampling_params"].pop("extra_args")
    assert Ask.read(given) == (LAW.text, ask)
    assert (path, body) == (
        "/inference/v1/generate",
        {
            "model": "adapter-1",
            "token_ids": [4, 5],
            "sampling_params": {
                "max_tokens": 7, "temperature": 1.0, "detokenize": False, "ignore_eos": True, "stop_token_ids": [2],
            },
        },
    )  # fmt: skip


def test_a_forced_row_is_as_long_as_what_is_forced_and_a_law_may_have_no_end(server):
    Client(server.url).generate((4, 5), Law(Sampling(max_new_tokens=7), 64, ()), Ask("a", 1, 2, 3, forced=(9, 8)))
    sampling = server.calls[0][1]["sampling_params"]
    assert (sampling["max_tokens"], sampling["stop_token_ids"]) == (2, [])


def test_a_method_is_called_with_texts_and_answers_for_every_worker(server):
    server.methods["steerl_echo"] = lambda *words: {"words": words}
    assert Client(server.url).rpc("steerl_echo", "a", "b") == [{"words": ["a", "b"]}]
    assert server.calls == [("/collective_rpc", {"method": "steerl_echo", "args": ["a", "b"]})]


def test_a_thread_keeps_its_connection_and_threads_share_none(server):
    client = Client(server.url)
    for _ in range(3):
        client.rpc("check_health")
    assert server.connections == 1
    at_once = threading.Barrier(4)
    server.on_generate = lambda body: at_once.wait(10) and None
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: client.generate((4,), LAW, Ask(str(i), 0, 0, i)), range(4)))
    assert server.connections == 5


def test_a_connection_that_the_server_has_closed_meanwhile_is_opened_again(server):
    client = Client(server.url)
    server.faults["check_health"] = "close after"
    for _ in range(3):
        assert client.rpc("check_health") == [None]
    assert server.connections == 3 and len(server.calls) == 3


def test_another_server_in_its_place(server):
    client = Client(server.url)
    client.rpc("check_health")
    with Scripted() as other:
        client.move(other.url + "/")
        client.rpc("check_health")
        assert len(other.calls) == len(server.calls) == 1


@pytest.mark.parametrize("fault", ["half", "close", "dead", "503", "cancelled"])
def test_a_server_that_dies_in_mid_answer_is_gone(server, fault):
    client = Client(server.url)
    client.rpc("check_health")  # over a kept connection, too
    path = "/health" if fault == "503" else "/inference/v1/generate"
    server.faults[path] = fault
    with pytest.raises(Gone, match=path):
        client.get(path) if fault == "503" else client.generate((4,), LAW, Ask("a", 0, 0, 0))
    assert not (client.healthy() and fault == "503")


def test_nobody_there_is_gone():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = Client(f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(Gone, match=r"steerl_hello|collective_rpc.*refused"):
            client.rpc("steerl_hello")
        assert not client.healthy()


def test_a_row_may_take_as_long_as_it_takes(server, hasty):
    server.faults["/inference/v1/generate"] = "hang"
    client = Client(server.url)
    with ThreadPoolExecutor(1) as pool:
        row = pool.submit(client.generate, (4,), LAW, Ask("a", 0, 0, 0))
        while sum(body == {"method": "check_health"} for _, body in list(server.calls)) < 3:  # it was asked, and answered
            time.sleep(0.01)
        server.release()
        assert row.result(10) is None


@pytest.mark.parametrize("silent", ["/health", "check_health"])
def test_a_server_or_an_engine_that_does_nothing_any_more_is_gone_for_all_that_wait(server, hasty, silent):
    server.faults = {"/inference/v1/generate": "hang", silent: "hang"}
    client, rows = Client(server.url), 40
    began = time.monotonic()
    with ThreadPoolExecutor(rows) as pool:
        asked = [pool.submit(client.generate, (4,), LAW, Ask(str(i), 0, 0, i)) for i in range(rows)]
        for row in asked:
            with pytest.raises(Gone, match="no answer within"):
                row.result(30)
    assert time.monotonic() - began < rows * 0.3 / 2  # one asks for all: not one after the other


def test_a_call_has_its_own_limit(server):
    server.faults["check_health"] = "hang"
    with pytest.raises(Gone, match=r"collective_rpc: no answer within 0 s"):
        Client(server.url).rpc("check_health", timeout=0.1)


def test_a_call_of_a_server_that_has_gone_does_not_wait_for_its_limit(server, hasty):
    server.faults = {"steerl_load": "hang", "/health": "503"}
    with pytest.raises(Gone, match="503"):
        Client(server.url).rpc("steerl_load", "file", "3")


def test_closing_lets_go_who_waits(server):
    server.faults["/inference/v1/generate"] = "hang"
    client = Client(server.url)
    with ThreadPoolExecutor(1) as pool:
        row = pool.submit(client.generate, (4,), LAW, Ask("a", 0, 0, 0))
        assert server.waiting.acquire(timeout=10)
        server.listener.shutdown()
        server.listener.server_close()
        client.close()
        with pytest.raises(Gone):
            row.result(10)


def test_what_the_server_refuses_is_one_line_with_its_words(server):
    server.faults["/inference/v1/generate"] = "500"
    with pytest.raises(UserError, match=r"^http://127.*/inference/v1/generate: HTTP 500: it went wrong$"):
        Client(server.url).generate((4,), LAW, Ask("a", 0, 0, 0))
    with pytest.raises(UserError, match=r"/nope: HTTP 404: Not Found$"):
        Client(server.url).get("/nope")


def test_a_server_without_the_plugin_is_told_how_to_start_it(server):
    with pytest.raises(UserError, match=r"not started for steerl \(it does not know steerl_hello\); `steerl engine serve`"):
        Client(server.url).rpc("steerl_hello")
    with pytest.raises(UserError, match="`steerl engine serve`"):
        Client(server.url + "/elsewhere").rpc("steerl_hello")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "https://127.0.0.1", "http://"])
def test_a_url_is_that_of_a_plain_http_server(url):
    with pytest.raises(ConfigError, match=r"engine.url: .*http://127.0.0.1:8000"):
        Client(url)


def test_messages_are_cut_short(server):
    assert json.loads(json.dumps(client_module._message({"error": {"message": "a" * 999}}, b""))) == "a" * 297 + "..."
