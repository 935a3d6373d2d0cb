"""The live page: what it is sent of folders that change, whom the server answers, and both in a real browser."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import LOCK
from steerl.training.report.follow import Place, Runs, runs_in
from steerl.training.report.live import LiveServer
from steerl.training.report.page import report
from tests.browser import Browser

EVIL = "</script><img src=x onerror='window.hacked=1'>\"'\u2028\u202e\x1b[2J\x00<script>window.hacked=2</script>"


def metric_line(step, **more):
    return json.dumps({"step": step, "reward/mean": step / 10, "kl/ref": 0.5, "time/learn_s": 0.25 + random.random()} | more)


def sample_line(step, row, text="fine", **more):
    ids = [7, 8, 9]
    line = {
        "step": step, "kind": "random", "row": row, "sample": 0, "prompt": "say", "prompt_text": "say", "completion": text,
        "reward": row / 7, "kl": 0.1, "prompt_ids": [1], "prompt_tokens": ["say"], "response_ids": ids,
        "response_tokens": [text, " b", " c"], "policy_logprobs": [-0.5, -1.0, -1.5], "advantages": [0.1, -0.2, 0.3],
    }  # fmt: skip
    return json.dumps(line | more, ensure_ascii=False)


def add(folder, name, *lines):
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a", encoding="utf-8", errors="surrogatepass") as file:
        file.write("".join(line + "\n" for line in lines))


def written(folder, steps=3, **more):
    add(folder, "metrics.jsonl", *(metric_line(step, **more) for step in range(1, steps + 1)))
    add(folder, "samples.jsonl", *(sample_line(step, 10 * step + i) for step in range(1, steps + 1) for i in range(2)))
    (folder / "config.yaml").write_text(f"ppo:\n  steps: {steps}\n  kl_target: 2.5\n")
    return folder


class Reader:
    """Somebody who follows one run, and what he holds."""

    def __init__(self, folder):
        self.runs, self.place = Runs([folder]), Place()
        self.steps, self.rows, self.rewards = [], [], []

    def read(self):
        while news := self.runs.now()[0].news(self.place):
            if news.get("again"):
                self.steps, self.rows, self.rewards = [], [], []
            self.rewards += news.get("metrics", {}).get("columns", {}).get("reward/mean", [])
            self.steps += news.get("metrics", {}).get("step", [])
            self.rows += news.get("heads", {}).get("row", [])
            self.place = Place.of(news["place"])
            self.last = news
        return self.steps, self.rows


def test_only_what_is_new_is_sent_and_a_torn_line_waits(tmp_path):
    reader = Reader(written(tmp_path / "run"))
    assert reader.read() == ([1, 2, 3], [10, 11, 20, 21, 30, 31])
    assert reader.runs.now()[0].news(reader.place) is None
    line = metric_line(4)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(line[:20])
        file.flush()
        assert reader.read()[0] == [1, 2, 3]
        file.write(line[20:] + "\n")
    reader.read()
    assert reader.steps == [1, 2, 3, 4] and reader.last["metrics"]["step"] == [4]


def test_a_run_that_goes_on_from_a_checkpoint_begins_anew(tmp_path):
    """Cut back and grown again, to fewer and to more bytes than before, and to none."""
    folder = written(tmp_path / "run", 5)
    reader = Reader(folder)
    reader.read()
    text = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(text[:2]))
    assert reader.read()[0] == [1, 2]
    (folder / "metrics.jsonl").write_text("".join(text[:1]))
    add(
        folder, "metrics.jsonl", *(metric_line(step, more=1.0, **{"reward/mean": step / 100}) for step in (2, 3, 4, 5, 6, 7, 8))
    )
    assert reader.read()[0] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert reader.rewards == [0.1, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]
    (folder / "metrics.jsonl").write_text("")
    (folder / "samples.jsonl").write_text("")
    assert reader.read() == ([], [])
    (folder / "metrics.jsonl").unlink()
    add(folder, "metrics.jsonl", metric_line(1))
    assert reader.read()[0] == [1]


def test_large_files_come_in_parts_and_of_samples_the_newest(tmp_path):
    folder = tmp_path / "run"
    add(
        folder,
        "metrics.jsonl",
        *(metric_line(step, **{f"m/{i}": step / (i + 3) for i in range(90)}) for step in range(1, 2501)),
    )
    add(folder, "samples.jsonl", *(sample_line(step, step, "word " * 400) for step in range(1, 1001)))
    add(folder, "samples.jsonl", sample_line(1001, 1001, "x" * 1_200_000))  # longer than what a page begins with
    reader = Reader(folder)
    first = reader.runs.now()[0].news(Place())
    assert first["more"] and len(first["metrics"]["step"]) < 2500
    steps, rows = reader.read()
    assert steps == list(range(1, 2501))
    assert 1 < len(rows) < 900 and rows == list(range(rows[0], 1002))
    add(folder, "samples.jsonl", sample_line(1002, 1002))
    assert reader.read()[1][-2:] == [1001, 1002]
    at = reader.last["heads"]["at"][0]
    assert reader.runs.now()[0].row(at)["facts"]["row"] == 1002 and reader.runs.now()[0].row(at + 1) is None


def test_lines_that_no_run_writes_are_passed_over(tmp_path):
    folder = written(tmp_path / "run", 2)
    add(folder, "metrics.jsonl", "nonsense", "[" * 100_000, '{"step": "x"}', '{"step": 3, "reward/mean": NaN}', metric_line(4))
    bad = [
        sample_line(3, 30, episode={"turns": 3}),
        sample_line(3, 31, response_ids=5),
        '{"step": 3, "reward": "<b>"}',
        "\udcff",
    ]
    add(folder, "samples.jsonl", *bad[:3], sample_line(4, 40))
    assert Reader(folder).read() == ([1, 2, 3, 4], [10, 11, 20, 21, None, 40])


def state(folder):
    return Runs([folder]).now()[0].state()


def test_the_state_of_a_run_is_that_of_its_lock(tmp_path):
    """A real process holds the lock, ends by itself, or is killed."""
    folder = written(tmp_path / "run")
    program = "import sys; from pathlib import Path; from steerl.rollout.common.run_folder import RunSettings, opened\n"
    program += f"with opened(RunSettings(dir={str(folder)!r}, resume=True)): print('held', flush=True); sys.stdin.read()"
    assert state(folder) == "stopped"
    for kill in (False, True):
        with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
            job.stdout.readline()
            assert state(folder) == "running"
            if kill:
                job.kill()
        assert state(folder) == ("died" if kill else "stopped")
    (folder / LOCK).write_text("process 1 on elsewhere")
    assert state(folder) == "running on elsewhere, or died there"
    (folder / LOCK).unlink()
    (folder / "summary.json").write_text('{"steps": 3, "reward_before": 0.1, "reward_after": 0.9, "kl_after": 2.0}')
    assert state(folder) == "finished"
    about = Runs([folder]).now()[0].news(Place())["about"]
    assert about["ends"] == {"eval/kl": [(0, 0.0), (3, 2.0)], "eval/reward": [(0, 0.1), (3, 0.9)]} and about["total"] == 3


def test_links_are_not_followed(tmp_path):
    folder, secret = written(tmp_path / "runs" / "run"), tmp_path / "secret"
    add(secret, "metrics.jsonl", metric_line(99))
    (secret / "text").write_text("SECRET")
    (folder / "samples.jsonl").unlink()
    (folder / "samples.jsonl").symlink_to(secret / "metrics.jsonl")
    (folder / "config.yaml").unlink()
    (folder / "config.yaml").symlink_to(secret / "text")
    os.mkfifo(folder / "versions.json")
    (tmp_path / "runs" / "link").symlink_to(secret)
    assert runs_in(tmp_path / "runs") == [folder]
    followed = Runs([tmp_path / "runs"]).now()[0]
    news = followed.news(Place())
    assert "heads" not in news and "SECRET" not in json.dumps(news) and followed.row(0) is None
    assert any("samples.jsonl is a link" in note for note in news["about"]["notes"])


def test_runs_that_begin_later_join_under_numbers_that_stay(tmp_path):
    written(tmp_path / "m")
    runs = Runs([tmp_path])
    assert [run.name for run in runs.now()] == ["m"]
    written(tmp_path / "study" / "a")
    runs._looked = 0.0
    assert [run.name for run in runs.now()] == ["m", "a"]
    assert [run.folder.name for run in Runs([tmp_path / "m", tmp_path]).now()] == ["m", "a"]


# -- the server ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(*folders, port=0):
    with LiveServer(Runs([Path(folder) for folder in folders]), port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server, path, method="GET", host=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host or f"127.0.0.1:{server.server_port}", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_the_server_listens_on_loopback_alone(tmp_path):
    with serving(written(tmp_path / "run")) as server:
        assert server.server_address[0] == "127.0.0.1"
        others = {about[4][0] for about in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
        for address in others:
            if address.startswith("127."):
                continue
            with pytest.raises(OSError):
                socket.create_connection((address, server.server_port), timeout=2).close()


def test_only_its_own_names_only_get_and_only_its_own_pages(tmp_path):
    folder = written(tmp_path / "run")
    (folder / "secret.txt").write_text("SECRET")
    with serving(folder) as server:
        for host in ("127.0.0.1", "localhost:9999", "LOCALHOST", f"[::1]:{server.server_port}"):
            assert asked(server, "/", host=host)[0].status == 200
        for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "0.0.0.0", "", "127.0.0.1:80@evil"):
            answer, body = asked(server, "/data", host=host or " ")
            assert answer.status == 421 and b"reward" not in body, host
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "<script>"):
            answer, body = asked(server, "/", method)
            assert answer.status in (400, 405) and b"<" not in body, method
        for path in (
            "/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "//etc/passwd", "/run/metrics.jsonl", "/data/../secret.txt",
            "/row?run=0&at=../secret.txt", "/row?run=1&at=0", "/row?run=-1&at=0", "/row?run=0&at=1", "/row?run=0&at=99999999999",
            "/row?run=%D9%A0&at=0", "/row", "/assets/page.js", "/%00", "http://evil/data/x",
        ):  # fmt: skip
            answer, body = asked(server, path)
            assert answer.status in (400, 404) and b"SECRET" not in body and b"root:" not in body, path
        assert asked(server, "/data?at=0.1.2.3")[0].status == 400 and asked(server, "/data?at=0.1.2.3.4.x")[0].status == 400
        answer, _ = asked(server, "/")
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert "Access-Control-Allow-Origin" not in answer.headers and answer.headers["X-Content-Type-Options"] == "nosniff"


def test_a_place_that_was_never_given_is_answered_from_the_beginning(tmp_path):
    with serving(written(tmp_path / "run")) as server:
        told = json.loads(asked(server, "/data?at=0.10.5.3.99.1")[1])
        assert told["runs"][0]["again"] and told["runs"][0]["metrics"]["step"] == [1, 2, 3]
        assert {panel["title"] for panel in told["panels"]} >= {"reward", "seconds of each phase"}
        assert [panel["target"] for panel in told["panels"] if "kl/ref" in panel["keys"]] == [2.5]
        place = told["runs"][0]["place"]
        began = time.monotonic()
        threading.Timer(0.3, lambda: add(tmp_path / "run", "metrics.jsonl", metric_line(4))).start()
        told = json.loads(asked(server, f"/data?id={server.id}&at=0.{place}")[1])
        assert told["runs"][0]["metrics"]["step"] == [4] and 0.2 < time.monotonic() - began < 10
        again = json.loads(asked(server, f"/data?id=another&at=0.{place}")[1])
        assert again["runs"][0]["metrics"]["step"] == [1, 2, 3, 4]


# -- the command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "holds no run yet"),
        (lambda folder: folder.write_text("x"), "is not a folder"),
        (lambda folder: add(folder, "manifest.json", "{}"), "is a dump"),
    ],
)
def test_what_is_no_run_is_named(tmp_path, make, told):
    make(tmp_path / "x\x1b[2J")
    with pytest.raises(UserError, match=told) as caught:
        Runs([tmp_path / "x\x1b[2J"])
    assert "\x1b" not in str(caught.value) and len(caught.value.lines) == 1


def test_a_port_that_is_taken_is_named(tmp_path):
    with serving(written(tmp_path / "run")) as server, pytest.raises(UserError, match=f"port: {server.server_port} ") as caught:
        LiveServer(server.runs, server.server_port)
    assert len(caught.value.lines) == 1


def test_the_command_says_where_and_ends_by_ctrl_c(tmp_path):
    folder = written(tmp_path / "evil\x1b]0;x\x07")
    command = [sys.executable, "-P", "-m", "steerl", "watch", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        line = job.stdout.readline()
        assert line.startswith(b"http://127.0.0.1:") and b"\x1b" not in line and b"\x07" not in line
        port = int(line.split()[0].rpartition(b":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", "/data")
        assert json.loads(connection.getresponse().read())["runs"][0]["metrics"]["step"] == [1, 2, 3]
        job.send_signal(signal.SIGINT)
        out, err = job.communicate(timeout=20)
        assert job.returncode == 130 and out == b"" and err == b"interrupted\n"


# -- in a browser -------------------------------------------------------------------------------------------------------


def until(browser, expression, seconds=30.0):
    """Wait for an expression of the page to hold."""
    end = time.monotonic() + seconds
    while not (value := browser.run(expression)):
        assert time.monotonic() < end, (expression, browser.run("document.body.innerText")[:2000], browser.problems)
        time.sleep(0.05)
    return value


def address(server):
    return f"http://127.0.0.1:{server.server_port}/"


CURVE = "document.querySelector('path[data-label=\"reward/mean\"]').getAttribute('d').match(/[ML]/g).length"
STATE = "document.querySelectorAll('.state')[{}].textContent"
OPTIONS = "[...document.getElementById('step').options].map(option => option.value).join()"


@pytest.mark.browser
def test_the_page_follows_a_run_that_is_stopped_goes_on_and_ends(tmp_path):
    folder = written(tmp_path / "run", 3)
    with serving(folder) as server, Browser() as browser:
        browser.open(address(server))
        assert browser.run(CURVE) == 3 and "stopped, step 3 of 3" in browser.run(STATE.format(0))
        assert browser.run(OPTIONS) == "newest,,1,2,3" and "row 30" in browser.run("document.querySelector('.facts').innerText")
        add(folder, "metrics.jsonl", metric_line(4), metric_line(5))
        add(folder, "samples.jsonl", sample_line(5, 50))
        until(browser, f"{CURVE} === 5 && document.querySelector('.facts').innerText.includes('row 50')")
        browser.key("n")  # whoever moves holds the step
        add(folder, "samples.jsonl", sample_line(5, 51), sample_line(6, 61))
        until(browser, f"{OPTIONS}.endsWith('5,6')")
        assert browser.run("document.getElementById('count').textContent") == "1 of 2 samples"
        assert browser.run("document.querySelector('.facts').innerText").startswith("step 5")
        browser.run("document.getElementById('step').value = '2'; document.getElementById('step').onchange()")
        until(browser, "document.querySelector('.facts').innerText.includes('row 20')")
        browser.key("j")
        until(browser, "document.querySelector('.facts').innerText.includes('row 21')")
        add(folder, "samples.jsonl", sample_line(7, 60))  # what is looked at stays
        until(browser, f"{OPTIONS} === 'newest,,1,2,3,5,6,7'")
        assert "row 21" in browser.run("document.querySelector('.facts').innerText")
        assert browser.run("document.getElementById('count').textContent") == "2 of 2 samples"
        kept = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:2]
        (folder / "metrics.jsonl").write_text("".join(kept))
        until(browser, f"{CURVE} === 2")
        add(folder, "metrics.jsonl", *(metric_line(step) for step in (3, 4)))
        (folder / "summary.json").write_text('{"steps": 4, "reward_before": 0.05, "reward_after": 0.5, "kl_after": 1.0}')
        until(browser, f"{CURVE} === 4 && {STATE.format(0)}.startsWith('finished, step 4')")
        rings = browser.run("document.querySelector('path[data-of=\"eval/reward\"]').getAttribute('d').match(/M/g).length")
        assert rings == 2 and browser.problems == []
    # every request went to the server itself
    assert {url.split("/")[2] for url in browser.requests if url.startswith("http")} == {address(server).split("/")[2]}


@pytest.mark.browser
def test_several_runs_one_that_begins_later_and_a_server_that_goes_away(tmp_path):
    written(tmp_path / "a"), written(tmp_path / "b", 5)
    with Browser() as browser:
        with serving(tmp_path) as server:
            browser.open(address(server))
            labels = "[...document.querySelectorAll('path[data-label^=\"reward/mean\"]')].map(p => p.dataset.label).join()"
            assert browser.run(labels) == "reward/mean \u00b7 a,reward/mean \u00b7 b"
            written(tmp_path / "c", 2)
            until(browser, f"{labels}.endsWith('reward/mean \u00b7 c')")
            browser.mouse("#legend button", "click")
            assert browser.run(labels) == "reward/mean \u00b7 b,reward/mean \u00b7 c"
            assert browser.run("document.querySelectorAll('.state').length") == 3 and browser.problems == []
        until(browser, "!document.getElementById('link').hidden")
        with serving(tmp_path, port=server.server_port):  # another one, by another name
            until(browser, "document.getElementById('link')?.hidden && document.querySelectorAll('.state').length === 3")


def hostile_run(folder):
    """Markup, quotes, escapes and halves of characters in all that a run names."""
    line = {EVIL: 0.5, "__proto__": 1.0, "constructor": 2.0, f"reward/{EVIL}": 0.25, "toString/x": 1.0}
    add(folder, "metrics.jsonl", *(metric_line(step, **line) for step in (1, 2, 3)))
    episode = {
        "turns": [{"first": 0, "end": 2, "message": {"role": "assistant", "content": EVIL, "tool_calls": [{"function": {"name": EVIL, "arguments": {EVIL: EVIL}}}]},
                   "reward": 0.5, "errors": [EVIL], "cut": False}],
        "ended_by": EVIL, "rewards": None, "failure": EVIL, "state": {EVIL: EVIL, "__proto__": "x"},
    }  # fmt: skip
    plain = {
        "prompt_text": EVIL,
        "prompt": EVIL,
        "kind": EVIL,
        "parts": {EVIL: 1.0, "__proto__": 2.0},
        EVIL: EVIL,
        "stop_reason": EVIL,
    }
    tokens = {"response_tokens": [EVIL, "\ud83d", "\udc69"], "prompt_tokens": [EVIL], EVIL + "s": [1.0, 2.0, 3.0]}
    add(folder, "samples.jsonl", sample_line(1, 1, EVIL, **plain, **tokens), sample_line(2, 2, EVIL, **plain, **tokens))
    (folder / "samples.jsonl").open("a").write(
        json.dumps(json.loads(sample_line(3, 3, EVIL, **plain, **tokens)) | {"half": "\ud800"}) + "\n"
    )
    (folder / "config.yaml").write_text(f"ppo:\n  note: {json.dumps(EVIL)}\n# {EVIL}\n")
    (folder / "versions.json").write_text(json.dumps({EVIL: EVIL}))
    (folder / "summary.json").write_text(json.dumps({EVIL: EVIL, "steps": 3, f"{EVIL}_before": 0.5, f"{EVIL}_after": 0.75}))
    return episode


@pytest.mark.browser
@pytest.mark.parametrize("live", [True, False])
def test_nothing_of_a_run_is_markup(tmp_path, live):
    folder = tmp_path / "<img src=x onerror='window.hacked=3'>{{foot}}\x1b[2J\u2028"
    folder.mkdir()
    hostile_run(folder)
    written(tmp_path / "plain")
    with contextlib.ExitStack() as held:
        if live:
            page = address(held.enter_context(serving(folder, tmp_path / "plain")))
        else:
            page = report([folder, tmp_path / "plain"], tmp_path / "page.html")
        browser = held.enter_context(Browser())
        browser.open(page)
        elements = "document.querySelectorAll('main img, main script, main iframe, main a, dialog img').length"
        for key in ("o", "j", "j", "c", "c", "ArrowRight", "?", "Escape", "/", "Escape"):
            browser.key(key)
            assert browser.run(elements) == 0, key
        for _ in range(3):
            browser.key("[")
            browser.key("ArrowRight")
        text = browser.run("document.body.innerText")
        assert "window.hacked=2" in text and "\u27e8U+001B\u27e9" in text and "__proto__" in text
        assert browser.run("typeof window.hacked") == "undefined" and browser.run("typeof ({}).x") == "undefined"
        assert [text[max(0, i - 60) : i] for i, character in enumerate(text) if character in "\x1b\x00\u202e\u2028"] == []
        assert [problem for problem in browser.problems if "favicon" not in problem] == []


@pytest.mark.browser
def test_a_long_run_is_thinned_without_losing_its_spikes(tmp_path):
    """30,000 steps of noise with a few spikes: the page holds some thousand points, each as it was written, all spikes among them."""
    draw = random.Random(0)
    values = [draw.random() for _ in range(30_000)]
    spikes = {7: 50.0, 4_321: -40.0, 17_001: 60.0, 29_998: 70.0}
    for step, value in spikes.items():
        values[step - 1] = value
    lines = [
        {"step": step, "reward/mean": value, "kl/ref": value if step % 50 else None} for step, value in enumerate(values, 1)
    ]
    add(tmp_path / "run", "metrics.jsonl", *map(json.dumps, lines))
    with serving(tmp_path / "run") as server, Browser() as browser:
        browser.open(address(server))
        until(browser, "page.runs[0].last === 30000")
        browser.run("page.update()")  # what was read is drawn
        for key in ("reward/mean", "kl/ref"):
            steps, held = browser.run(f"(s => [s.steps, s.values])(page.runs[0].series.get({key!r}))")
            assert 1000 < len(steps) <= 4000 and steps == sorted(steps)
            kept = {step: value for step, value in zip(steps, held, strict=True) if value is not None}
            assert all(values[step - 1] == value for step, value in kept.items())
            assert {step: kept.get(step) for step in spikes} == spikes
        path = browser.run("document.querySelector('path[data-label=\"reward/mean\"]').getAttribute('d')")
        heights = [float(y) for y in re.findall(r"[ML][-.0-9]+ ([-.0-9]+)", path)]
        assert len(heights) < 2500
        top, bottom, middle = min(heights), max(heights), sum(heights) / len(heights)
        assert [top, bottom] == [pytest.approx(8, abs=0.1), pytest.approx(168, abs=0.1)] and abs(middle - 110) < 20
        assert sum(height < middle - 40 for height in heights) == 3 and sum(height > middle + 40 for height in heights) == 1
