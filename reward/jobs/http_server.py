"""A local reward over HTTP: the ASGI application that `steerl serve` runs.

    GET  /health   {"status": "ok", "parts": [...]}
    POST /score    see reward.wire; 401 without the token, 408 too slow, 413 over a limit, 415 not JSON, 421 another host's
                   name, 422 with what is wrong with the question, or the id under which the log says what failed here

Rows are scored one request at a time, in a thread, so that /health answers meanwhile. A connection without a request that
is worked on is closed after a while, so that nobody holds them all.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import logging
import secrets
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from steerl.reward.kinds import http_wire
from steerl.reward.kinds.http import LOOPBACK
from steerl.reward.weighted_sum import WeightedSum
from steerl.rollout.common.errors import UserError

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)
AT_ONCE = 8
"""Requests whose bodies are held at once; further ones wait unread."""


@dataclass(frozen=True)
class Limits:
    max_rows: int
    max_bytes: int
    seconds: float = 30.0
    """In which a request's head, and then its body, must arrive, and how long a connection may be idle."""
    connections: int = 256


def make_app(reward: WeightedSum, limits: Limits, token: str | None, hosts: Collection[str] | None = LOOPBACK) -> Starlette:
    """`token` None: nobody is asked for one. `hosts`: the names by which the server may be asked; None: by any.

    A page in somebody's browser can have its own name resolve to a loopback address; its requests still bear that name."""
    turn = threading.Lock()
    seats = asyncio.Semaphore(AT_ONCE)
    serving = dataclasses.replace(reward, leaves_out=True)

    def scored(body: bytes) -> bytes:
        with turn:
            rollout, texts, vocabulary = http_wire.read_question(body, limits.max_rows)
            try:
                scores = dataclasses.replace(serving, vocabulary=vocabulary)(rollout, texts)
            except UserError as problem:
                raise Failed(str(problem)) from problem
            return http_wire.answer(scores, rollout)

    async def score(request: Request) -> Response:
        if refused := _misaddressed(request, hosts):
            return refused
        if token is not None and not _is_known(request.headers, token):
            return _error(401, "bearer token missing or wrong")
        # A page in somebody's browser can send a form to a loopback address, but not this type.
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return _error(415, "expected content-type: application/json")
        try:
            async with seats:
                async with asyncio.timeout(limits.seconds):
                    body = await _body(request, limits.max_bytes)
                return Response(await run_in_threadpool(scored, body), media_type="application/json")
        except TimeoutError:
            return _error(408, f"the request did not arrive within {limits.seconds:g} s")
        except http_wire.TooLarge as error:
            return _error(413, str(error))
        except Failed as failed:
            # What a function or a model raised may hold what is nobody's business; the log has it.
            name = secrets.token_hex(4)
            logger.warning("failure %s: %s", name, failed)
            return _error(422, f"the reward failed on this request; the server's log has the cause, failure {name}")
        except UserError as problem:
            logger.warning("refused: %s", problem)
            return _error(422, str(problem))
        except ClientDisconnect:
            return _error(400, "the client went away")

    async def health(request: Request) -> Response:
        return _misaddressed(request, hosts) or JSONResponse({"status": "ok", "parts": [term.name for term in reward.terms]})

    return Starlette(routes=[Route("/health", health), Route("/score", score, methods=["POST"])])


def uvicorn_config(app: Starlette, limits: Limits, host: str, port: int) -> uvicorn.Config:
    """How the application is served: without websockets, and with `limits` on connections, which uvicorn has not."""
    working: dict[object, float] = {}
    """Connection -> when its last request ended; infinity while one is worked on."""

    async def watched(scope: Scope, receive: Receive, send: Send) -> None:
        clock = asyncio.get_running_loop().time
        working[scope.get("client")] = float("inf")
        try:
            await app(scope, receive, send)
        finally:
            if scope.get("client") in working:  # the connection may be gone
                working[scope.get("client")] = clock()

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                transport.close()
                return
            working[self.client] = self.loop.time()
            self.loop.call_later(limits.seconds, self.look)

        def look(self) -> None:
            if self.client not in working:  # closed meanwhile
                return
            left = working[self.client] + limits.seconds - self.loop.time()
            if left <= 0:
                self.transport.abort()
            else:
                self.loop.call_later(min(left, limits.seconds), self.look)

        def connection_lost(self, exc: Exception | None) -> None:
            working.pop(self.client, None)
            super().connection_lost(exc)

    # Without log_config uvicorn closes every log handler of the process, and with it the streams that some of them hold.
    return uvicorn.Config(
        watched, host=host, port=port, http=Connection, ws="none", lifespan="off", log_level="warning", access_log=False,
        log_config=None,
    )  # fmt: skip


class Failed(Exception):
    """The reward could not score the rows."""


def _misaddressed(request: Request, hosts: Collection[str] | None) -> Response | None:
    host = request.headers.get("host", "")
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if hosts is None or name.lower() in hosts:
        return None
    return _error(421, f"this server is not {name[:100]!r}; a name that it has is added with --serve.allowed_hosts")


async def _body(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise http_wire.TooLarge(f"{declared} bytes; at most {most} in a request")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise http_wire.TooLarge(f"more than {most} bytes in a request")
    return bytes(body)


def _is_known(headers: Mapping[str, str], token: str) -> bool:
    kind, _, given = headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _error(status: int, text: str) -> JSONResponse:
    headers: dict[str, object] = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse({"error": text}, status_code=status, headers=headers)
