"""A local reward over HTTP: the ASGI application that `scripts/serve_reward.py` runs.

    GET  /health   {"status": "ok", "parts": [...]}
    POST /score    see reward.wire; 401 without the token, 413 over a limit, 415 not JSON, 422 with what is wrong

Rows are scored one request at a time, in a thread, so that /health answers meanwhile.
"""

from __future__ import annotations

import dataclasses
import hmac
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from reward import wire
from reward.mixture import WeightedSum
from rollout.errors import Problem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    max_rows: int
    max_bytes: int


def make_app(reward: WeightedSum, limits: Limits, token: str | None) -> Starlette:
    """`token` None: nobody is asked for one."""
    turn = threading.Lock()

    def scored(body: bytes) -> bytes:
        rollout, texts, vocabulary = wire.read_question(body)
        if len(rollout) > limits.max_rows:
            raise TooLarge(f"{len(rollout)} rows; at most {limits.max_rows} in a request")
        with turn:
            scores = dataclasses.replace(reward, vocabulary=vocabulary)(rollout, texts)
        return wire.answer(scores, rollout)

    async def score(request: Request) -> Response:
        if token is not None and not _is_known(request.headers, token):
            return _error(401, "bearer token missing or wrong")
        # A page in somebody's browser can send a form to a loopback address, but not this type.
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return _error(415, "expected content-type: application/json")
        try:
            body = await _body(request, limits.max_bytes)
            return Response(await run_in_threadpool(scored, body), media_type="application/json")
        except TooLarge as error:
            return _error(413, str(error))
        except Problem as problem:
            logger.warning("refused: %s", problem)
            return _error(422, str(problem))
        except ClientDisconnect:
            return _error(400, "the client went away")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "parts": [part.name for part in reward.parts]})

    return Starlette(routes=[Route("/health", health), Route("/score", score, methods=["POST"])])


class TooLarge(Exception):
    """The question is over a limit."""


async def _body(request: Request, most: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise TooLarge(f"{declared} bytes; at most {most} in a request")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise TooLarge(f"more than {most} bytes in a request")
    return bytes(body)


def _is_known(headers: Mapping[str, str], token: str) -> bool:
    kind, _, given = headers.get("authorization", "").partition(" ")
    return kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _error(status: int, text: str) -> JSONResponse:
    headers: dict[str, Any] = {"www-authenticate": "Bearer"} if status == 401 else {}
    return JSONResponse({"error": text}, status_code=status, headers=headers)
