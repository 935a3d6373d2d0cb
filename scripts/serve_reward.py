"""A reward over HTTP.

    steerl serve --config steerl:serve [--serve.port 8100]

`{kind: http, url: http://127.0.0.1:8100}` in another job's reward asks it. On loopback unless --serve.host says
otherwise, and then only with a bearer token in the environment.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field

from steerl.configs.reader import run_command

from steerl.reward.build import build_reward, read_terms
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError

LARGEST = {"max_rows": 2**31, "max_megabytes": 4096.0, "seconds": 86_400.0, "connections": 65_536}


@dataclass(frozen=True)
class ServeSettings:
    """Where the reward is offered, and what it takes."""

    host: str = "127.0.0.1"
    """Anything but loopback needs a bearer token."""
    port: int = 8100
    """0 = any free one; the first line of the output names it."""
    token_env: str = "STEERL_REWARD_TOKEN"
    """The environment variable that holds the bearer token."""
    max_rows: int = 4096
    """Rows in a request."""
    max_megabytes: float = 64.0
    """Size of a request."""
    seconds: float = 30.0
    """In which a request's head, and then its body, must arrive; an idle connection is closed after as long."""
    connections: int = 256
    """At once; further ones are refused."""
    allowed_hosts: list[str] = field(default_factory=list)
    """Names (a request's Host) by which the server may be asked, beside those of loopback and its own address. On
    another address than loopback, where the token protects it, every name is allowed unless some are given."""


@dataclass(frozen=True)
class ServeJob:
    """Offer a reward over HTTP."""

    reward: list[dict[str, object]] = field(default_factory=list, metadata={"check": read_terms})
    """The parts of the reward."""
    serve: ServeSettings = field(default_factory=ServeSettings)


def main(job: ServeJob) -> None:
    from steerl.reward.jobs.scoring import check_order
    from steerl.reward.kinds.http import LOOPBACK

    me, serve = processes.start(), job.serve
    wrong = [
        f"serve.{n}: {getattr(serve, n)}; give more than 0, and at most {most:g}"
        for n, most in LARGEST.items()
        if not 0 < getattr(serve, n) <= most
    ]
    if not 0 <= serve.port < 65536:
        wrong.append(f"serve.port: {serve.port}; give a port, 0 for any free one")
    token = os.environ.get(serve.token_env) or None
    if serve.host not in LOOPBACK and token is None:
        wrong.append(
            f"serve.host: {serve.host} can be reached from outside; put a bearer token into ${serve.token_env} or use 127.0.0.1"
        )
    if me.world_size > 1:
        wrong.append(f"serve: started on {me.world_size} processes; start one, without accelerate launch")
    missing = [package for package in ("uvicorn", "starlette") if importlib.util.find_spec(package) is None]
    if missing:
        wrong.append(f"serve: needs the package(s) {' and '.join(missing)}; pip install 'steerl[serve]'")
    if wrong:
        raise UserError(*wrong)
    import uvicorn

    from steerl.reward.jobs.http_server import Limits, make_app, uvicorn_config

    reward = build_reward(job.reward, device=me.device)
    check_order(reward)
    limits = Limits(serve.max_rows, int(serve.max_megabytes * 2**20), serve.seconds, serve.connections)
    names = {*LOOPBACK, serve.host, *serve.allowed_hosts} if serve.host in LOOPBACK or serve.allowed_hosts else None
    config = uvicorn_config(make_app(reward, limits, token, names), limits, serve.host, serve.port)
    try:
        socket = config.bind_socket()
    except SystemExit as error:  # uvicorn logs why, and would leave with its own status
        raise UserError(
            f"serve.port: {serve.host}:{serve.port} cannot be bound; choose another, or 0 for any free one"
        ) from error
    host = f"[{serve.host}]" if ":" in serve.host else serve.host
    print(f"serving http://{host}:{socket.getsockname()[1]} ({', '.join(term.name for term in reward.terms)})", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[socket])
    finally:
        socket.close()
        reward.close()


def cli() -> None:
    run_command(main, ServeJob)


if __name__ == "__main__":
    cli()
