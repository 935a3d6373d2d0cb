"""The report over HTTP, for runs that go on: what `steerl watch` serves, on loopback alone.

    GET /                       the page, without data     GET /style.css, /page.js
    GET /data?at=RUN.PLACE&...  what is new of each run since its place, at once or when something is (follow.py)
    GET /row?run=RUN&at=BYTE    a sample, whole

No part of a request names a file: runs have numbers, and what stands in a run's folder is read under fixed names. Whoever
asks by another host's name is refused (a page in somebody's browser can have its own name resolve to a loopback address).
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from steerl.rollout.common.errors import UserError
from steerl.training.report.follow import Place, Runs
from steerl.training.report.page import filled, panels, script, stylesheet
from steerl.training.report.run_data import ReportRun

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")
"""By which it may be asked, with any port: the other end of a tunnel has its own."""
WAIT_S, LOOK_S = 15.0, 0.25
"""How long a question waits for news, and how often it looks."""
ANSWER = 6 << 20
"""Bytes of files in an answer after which the other runs wait for the next one."""
CONNECTIONS = 64
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'"
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class LiveServer(ThreadingHTTPServer):
    """Serves until `shutdown`; port 0 is any free one."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, runs: Runs, port: int):
        self.runs, self.id, self.closing = runs, secrets.token_hex(8), threading.Event()
        self.looking = threading.Lock()
        self.free = threading.BoundedSemaphore(CONNECTIONS)
        try:
            super().__init__((HOST, port), Asked)
        except OSError as error:
            raise UserError(
                f"port: {port} on {HOST} cannot be had ({error.strerror}); name another with --port, 0 for any"
            ) from error

    def process_request(self, request: Any, client_address: Any) -> None:
        if self.free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Somebody who went away amid an answer is no news; a defect of ours is."""
        import sys

        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        self.closing.set()
        super().server_close()

    def data(self, places: dict[int, Place]) -> dict[str, object]:
        until = time.monotonic() + WAIT_S
        while True:
            with self.looking:  # several pages do not read the same files at once
                found, told = self.look(places)
            if found or time.monotonic() >= until or self.closing.wait(LOOK_S):
                return {"id": self.id, "runs": found, "panels": panels(told)}

    def look(self, places: dict[int, Place]) -> tuple[list[dict[str, Any]], list[ReportRun]]:
        found: list[dict[str, Any]] = []
        told, size = [], 0
        for number, run in enumerate(self.runs.now()):
            place = places.get(number, Place())
            later: dict[str, Any] = {"place": str(place), "more": True}
            news = run.news(place) if size < ANSWER else later
            given = news or {}
            size += given.pop("bytes", 0)
            metrics, ends = given.get("metrics", {}).get("columns", {}), given.get("about", {}).get("ends", {})
            told.append(ReportRun(name="", metrics=metrics, ends=ends, kl_target=run.kl_target))
            if news is not None:
                found.append({"run": number, **news})
        return found, told


class Asked(BaseHTTPRequestHandler):
    """One request."""

    server: LiveServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "steerl", ""
    timeout = 60
    """Seconds that a connection may be idle, or an answer unread."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):  # any other method
            return lambda: self.refuse(405, "only GET")
        raise AttributeError(name)

    def do_GET(self) -> None:
        host = re.sub(r":\d*$", "", self.headers.get("Host", "")).lower()
        if host not in NAMES:
            return self.refuse(421, f"asked as {host[:100]!r}; this page is {HOST}'s or localhost's")
        if self.headers.get("Content-Length", "0") != "0" or "Transfer-Encoding" in self.headers:
            return self.refuse(400, "a body")
        try:
            path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query, max_num_fields=200)
        except ValueError:
            return self.refuse(400, "no address")
        answers = {"/": self.page, "/style.css": self.style, "/page.js": self.code, "/data": self.data, "/row": self.row}
        if path not in answers:
            return self.refuse(404, "no such page")
        self.close_connection |= self.server.closing.is_set()
        answers[path](query)

    def page(self, _: object) -> None:
        head = '<link rel="stylesheet" href="style.css">'
        text = filled(policy=POLICY, title="steerl watch", head=head, foot='<script src="page.js"></script>')
        self.send("text/html; charset=utf-8", text)

    def style(self, _: object) -> None:
        self.send("text/css; charset=utf-8", stylesheet())

    def code(self, _: object) -> None:
        self.send("text/javascript; charset=utf-8", script())

    def data(self, query: dict[str, list[str]]) -> None:
        places = {}
        for text in query.get("at", []):
            if not re.fullmatch(r"\d{1,4}(\.\d{1,18}){5}", text, re.ASCII):
                return self.refuse(400, "at: no place")
            number, _, place = text.partition(".")
            places[int(number)] = Place.of(place)
        # A page that was open before the server was started again begins anew.
        same = query.get("id", [""])[0] in ("", self.server.id)
        self.send("application/json", json.dumps(self.server.data(places if same else {}), allow_nan=False))

    def row(self, query: dict[str, list[str]]) -> None:
        number, at = query.get("run", [""])[0], query.get("at", [""])[0]
        runs = self.server.runs.now()
        if not all(re.fullmatch(r"\d{1,18}", text, re.ASCII) for text in (number, at)) or int(number) >= len(runs):
            return self.refuse(404, "no such run")
        found = runs[int(number)].row(int(at))
        if found is None:
            return self.refuse(404, "no sample there")
        self.send("application/json", json.dumps(found, allow_nan=False))

    def refuse(self, status: int, text: str) -> None:
        self.close_connection = True
        self.send("text/plain; charset=utf-8", text + "\n", status)

    def send(self, kind: str, text: str, status: int = 200) -> None:
        body = text.encode("utf-8", "replace")
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        if status == 405:
            self.send_header("Allow", "GET")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the library refuses (a line too long, another version) in plain text, and without what was asked."""
        self.headers = getattr(self, "headers", None) or {}  # type: ignore[assignment]
        self.refuse(code, "refused")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks every few seconds."""
