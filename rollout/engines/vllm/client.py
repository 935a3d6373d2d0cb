"""Asking a vLLM server over HTTP: a row to be drawn, a method of its workers. From any number of threads.

    Client(url).generate(ids, law, ask)     blocks until the row has ended; its answer is fetched by rpc("steerl_take", ...)
    Client(url).rpc("steerl_hello")         what every worker says

Nobody there any more is `Gone`, which the engine answers with another server; what a server refuses is a UserError.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from steerl.rollout.common.errors import ConfigError, UserError
from steerl.rollout.engines.vllm.wire import Ask, Law

QUICK = 10.0
"""Seconds in which a live server takes a connection and says how it is."""
LONG = 1800.0
"""Seconds for one call of the workers, such as loading all weights."""
QUIET = 20.0
"""Seconds without any answer after which the engine is asked whether it still works,"""
PATIENCE = 120.0
"""and those it has to say so: it answers between two steps."""
_HELD = 300
"""Characters of a server's own message."""


class Gone(Exception):
    """The server does not answer any more: refused, closed, silent, or its engine has died."""


class Client:
    """One server. A connection for each thread that asks, kept from one question to the next."""

    def __init__(self, url: str):
        self.move(url)
        self._own = threading.local()
        self._asking = threading.Lock()
        self._heard = time.monotonic()

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
            "max_tokens": len(ask.forced) or law.sampling.max_new_tokens,
            "temperature": 1.0,
            "detokenize": False,
            "ignore_eos": True,  # rows end by the law's own rules, which say it by `end_id`
            "stop_token_ids": [] if law.end_id is None else [law.end_id],
            "extra_args": ask.arguments(law),
        }
        self.post("/inference/v1/generate", {"model": model, "token_ids": list(ids), "sampling_params": sampling}, timeout=None)

    def rpc(self, method: str, *args: str, timeout: float = LONG) -> list[Any]:
        """What each worker returns. Arguments are texts."""
        answer = self.post("/collective_rpc", {"method": method, "args": list(args)}, timeout)
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

    # -- the connection -----------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, body: bytes | None, timeout: float | None) -> Any:
        """Over this thread's connection. One that the server had closed meanwhile is opened again, once."""
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is not None:
            try:
                return self._exchange(connection, method, path, body, timeout)
            except _Closed:
                self._drop()
        self._own.connection = connection = http.client.HTTPConnection(*self._place, timeout=QUICK)
        try:
            return self._exchange(connection, method, path, body, timeout)
        except _Closed as error:
            self._drop()
            raise Gone(f"{self.url}{path}: {error}") from error
        except Gone:
            self._drop()
            raise

    def _once(self, method: str, path: str, body: bytes | None, timeout: float) -> Any:
        """Over a connection of its own."""
        connection = http.client.HTTPConnection(*self._place, timeout=QUICK)
        try:
            return self._exchange(connection, method, path, body, timeout)
        except _Closed as error:
            raise Gone(f"{self.url}{path}: {error}") from error
        finally:
            connection.close()

    def _drop(self) -> None:
        connection, self._own.connection = self._own.connection, None
        connection.close()

    def _exchange(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None, timeout: float | None
    ) -> Any:
        try:
            headers = {"content-type": "application/json"} if body else {}
            connection.request(method, self._base + path, body, headers)
            self._wait(connection.sock, path, timeout)
            connection.sock.settimeout(QUICK)
            response = connection.getresponse()
            data = response.read()
        except TimeoutError as error:
            raise Gone(f"{self.url}{path}: no answer within {QUICK:.0f} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise _Closed(" ".join(str(error).split()) or type(error).__name__) from error
        return self._read(path, response.status, data)

    def _wait(self, sock: socket.socket, path: str, timeout: float | None) -> None:
        """Until there is something to read."""
        began = time.monotonic()
        while True:
            left = QUIET if timeout is None else timeout - (time.monotonic() - began)
            if left > 0 and select.select([sock], [], [], left)[0]:
                return
            if timeout is not None:
                raise Gone(f"{self.url}{path}: no answer within {timeout:.0f} s")
            self._still_works()

    def _still_works(self) -> None:
        """Gone where the engine says nothing. One thread asks for all that wait."""
        with self._asking:
            if time.monotonic() - self._heard > QUIET:
                self._once("POST", "/collective_rpc", b'{"method": "check_health"}', PATIENCE)

    def _read(self, path: str, status: int, data: bytes) -> Any:
        said = None
        with contextlib.suppress(ValueError):
            said = json.loads(data) if data else None
        if status == 200:
            self._heard = time.monotonic()
            return said
        message = _message(said, data)
        if status == 503 or "EngineDead" in message or "EngineCore" in message:
            raise Gone(f"{self.url}{path}: {status} {message}")
        raise UserError(f"{self.url}{path}: HTTP {status}: {message}")


class _Closed(Exception):
    """The connection was not there, or ended before an answer had come."""


def _message(said: Any, data: bytes) -> str:
    """The server's own words in a line that is not endless."""
    if isinstance(said, dict):
        error = said.get("error", said)
        said = error.get("message", error.get("detail")) if isinstance(error, dict) else error
    text = " ".join((str(said) if said else data.decode(errors="replace")).split()) or "no message"
    return text if len(text) <= _HELD else f"{text[: _HELD - 3]}..."
