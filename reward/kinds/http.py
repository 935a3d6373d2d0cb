"""`kind: http`: a reward over HTTP; `steerl serve` is the other end, or any server that speaks reward.wire.

rows --cut into requests--> POST, at most `concurrency` at once --> answers, put back in the order of the rows
                              |  late, refused, 408, 425, 429, 5xx: again, after backoff x 2^attempt
                              '- retries used up, or an answer that is wrong: fallback by row, or a UserError
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import urllib.parse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from steerl.reward.kinds import http_wire
from steerl.reward.settings import HttpSettings
from steerl.reward.types import Failure, Scores, joined_extra, joined_metrics, settle
from steerl.reward.weighted_sum import RewardTerm
from steerl.rollout.common.errors import UserError
from steerl.rollout.types import Rollout, Texts

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)
AGAIN = (408, 425, 429, 500, 502, 503, 504)
MOST_BYTES = 2**26
"""Of an answer; what is longer is not read."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build(settings: HttpSettings, where: str, around: object) -> RewardTerm:
    if importlib.util.find_spec("httpx") is None:
        raise UserError(f"{where}: needs the package httpx; pip install 'steerl[serve]'")
    return RewardTerm("", where, 1.0, HttpReward(settings, where).score, is_async=True)


class NoAnswer(Exception):
    """Why a request has no usable answer."""


@dataclass(frozen=True)
class HttpReward:
    settings: HttpSettings
    where: str

    @property
    def url(self) -> str:
        parsed = urllib.parse.urlsplit(self.settings.url)
        return urllib.parse.urlunsplit(parsed._replace(path="/score" if parsed.path in ("", "/") else parsed.path))

    async def score(self, rollout: Rollout, texts: Texts, vocabulary: str | None = None) -> Scores:
        import httpx

        rows, size = len(rollout), self.settings.batch_size
        chunks = [range(start, min(start + size, rows)) for start in range(0, rows, size)]
        token = os.environ.get(self.settings.token_env)
        headers = {"content-type": "application/json", "accept-encoding": "identity"} | (
            {"authorization": f"Bearer {token}"} if token else {}
        )
        # A proxy of the environment is for other machines.
        outside = urllib.parse.urlsplit(self.url).hostname not in LOOPBACK
        turns = asyncio.Semaphore(self.settings.concurrency)
        async with httpx.AsyncClient(timeout=self.settings.timeout, trust_env=outside, headers=headers) as client:

            async def one(chunk: range) -> dict[str, object]:
                part, said = rollout.select(list(chunk)), texts.select(list(chunk))
                async with turns:
                    try:
                        return await self._ask(client, http_wire.ask(part, said, vocabulary, self.where), part)
                    except NoAnswer as error:
                        return {"scores": [Failure(str(error))] * len(chunk), "parts": {}, "tokens": None}

            answers = await asyncio.gather(*(one(chunk) for chunk in chunks))
        return self._joined(answers, rollout)

    async def _ask(self, client: httpx.AsyncClient, body: bytes, rollout: Rollout) -> dict[str, object]:
        import httpx

        for attempt in range(self.settings.retries + 1):
            wait, reason = self.settings.backoff * 2 ** min(attempt, 30), ""
            try:
                status, headers, content = await asyncio.wait_for(self._post(client, body), self.settings.timeout)
            except (TimeoutError, httpx.TimeoutException):
                reason = f"no answer after {self.settings.timeout} s"
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise NoAnswer(f"{self.url}: {type(error).__name__}: {error}") from error
            else:
                if status == 200:
                    try:
                        return http_wire.read_answer(content, rollout)
                    except (ValueError, UserError) as error:
                        raise NoAnswer(f"{self.url}: {error!s:.300}") from error
                reason = f"status {status}: {http_wire.read_error(content)}"
                if status not in AGAIN:
                    hint = "; lower batch_size" if status == 413 else ""
                    hint = f"; set the token in ${self.settings.token_env}" if status in (401, 403) else hint
                    raise NoAnswer(f"{self.url}: {reason}{hint}")
                after = headers.get("retry-after", "")
                wait = max(wait, float(after)) if after.isascii() and after.isdigit() else wait
            if attempt < self.settings.retries:
                await asyncio.sleep(min(wait, self.settings.timeout))
        raise NoAnswer(f"{self.url}: {reason}, in each of {self.settings.retries + 1} tries")

    async def _post(self, client: httpx.AsyncClient, body: bytes) -> tuple[int, httpx.Headers, bytes]:
        """Status, headers and content of the answer, of which no more is read than an answer may hold."""
        content = bytearray()
        async with client.stream("POST", self.url, content=body) as reply:
            async for chunk in reply.aiter_raw():
                content += chunk
                if len(content) > MOST_BYTES:
                    raise NoAnswer(f"{self.url}: an answer of more than {MOST_BYTES:,} bytes")
        return reply.status_code, reply.headers, bytes(content)

    def _joined(self, answers: list[dict[str, Any]], rollout: Rollout) -> Scores:
        values = [value for answer in answers for value in answer["scores"]]
        settled = settle(values, rollout, self.where, self.settings.fallback)
        counts = [count for answer in answers for count in answer.get("fallbacks", {}).values()]
        if sum(counts):
            logger.warning(
                "%s: the server gave %d of %d rows a fallback; its log says why", self.where, sum(counts), len(rollout)
            )
        fallbacks = {"": sum(counts) + sum(settled.fallbacks.values())}
        names = dict.fromkeys(name for answer in answers for name in answer["parts"])
        sizes = [len(answer["scores"]) for answer in answers]
        parts = {
            name: torch.cat(
                [a["parts"].get(name, torch.full((size,), torch.nan)) for a, size in zip(answers, sizes, strict=True)]
            )
            for name in names
        }
        tokens_BR = None
        if any(answer["tokens"] is not None for answer in answers):
            if settled.fallbacks or any(answer["tokens"] is None for answer in answers):
                raise UserError(
                    f"{self.where}: a reward per token came for some rows only, and `fallback` has none to put in its place"
                )
            tokens_BR = torch.cat([answer["tokens"] for answer in answers])
        metrics = joined_metrics([answer.get("metrics", {}) for answer in answers])
        extra = joined_extra([answer.get("extra", {}) for answer in answers], sizes)
        marks = [answer.get("screened") or [False] * size for answer, size in zip(answers, sizes, strict=True)]
        screened_B = torch.tensor(sum(marks, [])) if any(answer.get("screened") for answer in answers) else None
        return Scores(settled.total_B, parts, tokens_BR, {}, fallbacks, metrics, extra, screened_B=screened_B)
