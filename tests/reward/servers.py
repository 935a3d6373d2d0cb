"""Small HTTP servers for the tests of remote rewards: well-behaved ones are the real application, bad ones are scripted."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import uvicorn

from steerl.reward.jobs.http_server import Limits, uvicorn_config


@contextmanager
def scripted(
    reply: Callable[[int, dict[str, Any]], tuple[int, Any]], **headers: str
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """`reply(number of the request, question) -> (status, body)`; bytes are sent as they are, an iterator's one after the
    other, without a length. `headers` of every answer. Yields (url, questions)."""
    asked: list[dict[str, Any]] = []
    turn = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with turn:
                number = len(asked)
                asked.append({**question, "headers": dict(self.headers), "path": self.path})
            status, body = reply(number, question)
            if isinstance(body, Iterator):
                self.send_response(status)
                self.end_headers()
                with contextlib.suppress(OSError):  # the asker has had enough
                    for piece in body:
                        self.wfile.write(piece)
                return
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def served(app: Any, limits: Limits | None = None) -> Iterator[str]:
    """The ASGI application on a free port of this machine, in a thread."""
    config = uvicorn_config(app, limits or Limits(1000, 1_000_000), "127.0.0.1", 0)
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        socket.close()
