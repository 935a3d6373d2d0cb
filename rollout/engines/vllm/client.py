"""Asking a vLLM server over HTTP: a row to be drawn, a method of its workers. From any number of threads.

    Client(url).generate(ids, law, ask)     blocks until the row has ended; its answer is fetched by rpc("steerl_take", ...)
    Client(url).rpc("steerl_hello")         what every worker says

Nobody there any more is `Gone`, which the engine answers with another server; what a server refuses is a UserError.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import select
import socket
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.engines.vllm.wire import Ask, Law

QUICK = 10.0
"""Seconds in which a live server takes a connection and says how it is."""
LONG = 1800.0
"""Seconds for one call of the workers, such as loading all weights."""
BEAT = 5.0
"""Seconds of waiting after which the server is asked how it is, again and again:"""
QUIET = 20.0
"""those without any answer, after which the engine itself has to say that it works,"""
PATIENCE = 120.0
"""and those it has to say so: it answers between two steps."""
_HELD = 300
"""Characters of a server's own message."""
_DEAD = ("EngineCore encountered an issue", "method failed: cancelled", "Executor failed.")
"""Said by a server whose engine, or a worker of it, has died under it."""


class Gone(Exception):
    """The server does not answer any more: refused, closed, silent, or its engine has died."""


class Client:
    """One server. A connection for each thread that asks, kept from one question to the next."""

    def __init__(self, url: str):
        self.move(url)
        self._own = threading.local()
        self._open: weakref.WeakSet[http.client.HTTPConnection] = weakref.WeakSet()
        self._asking = threading.Lock()
        self._heard = self._beat = time.monotonic()
        self._lost, self._why = -math.inf, ""  # when it was last found to be gone

    def move(self, url: str) -> None:
        """Ask there from now on."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ConfigError(f"engine.url: {url}, but it must be like http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._place, self._base = (parts.hostname, parts.port or 80), parts.path.rstrip("/")

    # -- what is asked ------------------------------------------------------------------------------------------------

    def generate(self, ids: Sequence[int], law: Law, ask: Ask, model: str = "policy") -> None:
        """Have a row drawn; returns when it has ended. However long it takes, as long as the engine works."""
        sampling = {
            "max_tokens": len(ask.forced) or ask.most(law),
            "temperature": 1.0,
            "detokenize": False,
            "ignore_eos": True,  # rows end by the law's own rules, which say it by `end_id`
            "stop_token_ids": [] if law.end_id is None else [law.end_id],
            "extra_args": ask.arguments(law),
        }
        self.post("/inference/v1/generate", {"model": model, "token_ids": list(ids), "sampling_params": sampling}, timeout=None)

    def rpc(self, method: str, *args: str, timeout: float = LONG) -> list[Any]:
        """What each worker returns. Arguments are texts."""
        try:
            answer = self.post("/collective_rpc", {"method": method, "args": list(args)}, timeout)
        except UserError as error:
            unknown = (f"has no attribute '{method}'", f"Method '{method}' is not implemented", "/collective_rpc: HTTP 404")
            if any(words in str(error) for words in unknown):
                raise UserError(
                    f"engine.url: the server at {self.url} was not started for steerl (it does not know {method}); "
                    "`steerl engine serve` prints the command"
                ) from error
            raise
        return list((answer or {}).get("results", []))

    def healthy(self) -> bool:
        """Whether it answers and its engine has not failed."""
        try:
            self._once("GET", "/health", None, QUICK)
        except (Gone, UserError):
            return False
        return True

    def get(self, path: str, timeout: float = QUICK) -> Any:
        return self._ask("GET", path, None, timeout)

    def post(self, path: str, body: object, timeout: float | None = LONG) -> Any:
        """`timeout` None: as long as the engine works."""
        return self._ask("POST", path, json.dumps(body).encode(), timeout)

    def close(self) -> None:
        """End all connections: whoever waits for an answer gets Gone."""
        for connection in list(self._open):
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    # -- the connection -----------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float | None) -> Any:
        """Over this thread's connection. One that the server had closed meanwhile is opened again, once."""
        place, connection = getattr(self._own, "kept", (None, None))
        if connection is not None and place == self._place:
            try:
                return self._exchange(connection, method, path, body, timeout)
            except _Closed:
                connection.close()
            except Gone:
                self._own.kept = (None, None)
                connection.close()
                raise
        connection = http.client.HTTPConnection(*self._place, timeout=QUICK)
        self._open.add(connection)
        self._own.kept = self._place, connection
        try:
            return self._exchange(connection, method, path, body, timeout)
        except (_Closed, Gone) as error:
            self._own.kept = (None, None)
            connection.close()
            raise Gone(str(error)) from error

    def _once(self, method: str, path: str, body: bytes | None, timeout: float) -> Any:
        """Over a connection of its own."""
        with contextlib.closing(http.client.HTTPConnection(*self._place, timeout=QUICK)) as connection:
            try:
                return self._exchange(connection, method, path, body, timeout, watched=False)
            except _Closed as error:
                raise Gone(str(error)) from error

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes | None,
        timeout: float | None,
        watched: bool = True,
    ) -> Any:
        where = f"{self.url}{path}"
        try:
            connection.request(method, self._base + path, body, {"content-type": "application/json"} if body else {})
            self._wait(connection.sock, where, timeout, watched)
            response = connection.getresponse()
            data = response.read()
        except TimeoutError as error:
            raise Gone(f"{where}: no answer within {QUICK:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Closed(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error
        return self._read(where, response.status, data)

    def _wait(self, sock: socket.socket, where: str, timeout: float | None, watched: bool) -> None:
        """Until there is something to read, which a server that has died, or does nothing any more, never sends."""
        readable = select.poll()  # not select(): there may be more than a thousand files
        readable.register(sock, select.POLLIN)
        began = time.monotonic()
        until = None if timeout is None else began + timeout
        while True:
            left = BEAT if until is None else max(until - time.monotonic(), 0.0)
            if readable.poll(1000 * (min(left, BEAT) if watched else left)):
                return
            if until is not None and time.monotonic() >= until:
                raise Gone(f"{where}: no answer within {timeout:.0f} s")
            self._still_there(began, engine=timeout is None)

    def _still_there(self, began: float, engine: bool) -> None:
        """Gone where the server says nothing any more, or its `engine`. One thread asks for all that wait."""
        with self._asking:
            if self._lost > began:
                raise Gone(self._why)
            try:
                if time.monotonic() - self._beat >= BEAT:
                    self._once("GET", "/health", None, QUICK)
                    self._beat = time.monotonic()
                if engine and time.monotonic() - self._heard >= QUIET:
                    self._once("POST", "/collective_rpc", b'{"method": "check_health"}', PATIENCE)
            except Gone as error:
                self._lost, self._why = time.monotonic(), str(error)
                raise

    def _read(self, where: str, status: int, data: bytes) -> Any:
        said = None
        with contextlib.suppress(ValueError):
            said = json.loads(data) if data else None
        if status == 200:
            if not where.endswith("/health"):
                self._heard = time.monotonic()
            return said
        message = _message(said, data)
        if status == 503 or any(words in message for words in _DEAD):
            raise Gone(f"{where}: HTTP {status}: {message}")
        raise UserError(f"{where}: HTTP {status}: {message}")


class _Closed(Exception):
    """The connection was not there, or ended before an answer had come."""


def _message(said: Any, data: bytes) -> str:
    """The server's own words in a line that is not endless."""
    if isinstance(said, dict):
        error = said.get("error", said)
        said = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    text = " ".join((str(said) if said else data.decode(errors="replace")).split()) or "no message"
    return text if len(text) <= _HELD else f"{text[: _HELD - 3]}..."
