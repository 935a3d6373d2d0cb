"""A vLLM server of the job's own: started on a free port of the loopback interface, ended with the job.

server = Server(settings, model, RUN/engine.log, flags)
server.start()          waits until it answers
Client(server.url)      ...
server.stop()           it and all that it started, in seconds
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm import guard
from steerl.rollout.engines.vllm.client import Client

logger = logging.getLogger(__name__)

EXTENSION = "steerl.rollout.engines.vllm.plugin.worker.Extension"
TELL = 30.0
"""Seconds between two lines that say it is still starting."""


class Server:
    """One server process, and the next ones where it has to be started again."""

    def __init__(
        self, settings: EngineSettings, model: Path, log: Path, flags: Sequence[str] = (), *, context: int | None = None
    ):
        self.settings, self.model, self.log, self.flags = settings, Path(model).resolve(), Path(log).resolve(), tuple(flags)
        self.context = context
        self.port = 0
        self.restarts = 0
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """As it is started."""
        settings = self.settings
        # Not resolved: a virtual environment's interpreter is a link, and is its own by the path it is called by.
        command = [str(Path(settings.python).absolute()), "-P", "-m", "vllm.entrypoints.openai.api_server"]
        command += [
            "--model",
            str(self.model),
            "--served-model-name",
            "policy",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        command += ["--dtype", self._dtype(), "--model-impl", settings.model_impl, "--generation-config", "vllm"]
        command += ["--load-format", "dummy", "--skip-tokenizer-init", "--no-async-scheduling", "--enable-scale-out"]
        command += ["--worker-extension-cls", EXTENSION]
        if self.context is not None:
            command += ["--max-model-len", str(self.context)]
        return [*command, *self.flags, *settings.arguments]

    def environment(self) -> dict[str, str]:
        told = {
            "VLLM_SERVER_DEV_MODE": "1",  # the routes by which weights come
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONSAFEPATH": "1",
        }
        kept = {name: value for name, value in os.environ.items() if name not in _OURS}
        return {"VLLM_CPU_KVCACHE_SPACE": "1", **kept, **told}

    def start(self) -> None:
        self.port = self.port or free_port()
        job = str(os.getpid())
        command = [sys.executable, "-I", guard.__file__, job, *self.command()]
        with self.log.open("ab") as log:
            self._guard = subprocess.Popen(
                command,
                cwd=self.model,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait()

    def _wait(self) -> None:
        client = Client(self.url)
        began = told = time.monotonic()
        while not client.healthy():
            now = time.monotonic()
            if not self.alive():
                raise UserError(f"engine: the server ended while it was starting; see {self.log}")
            if now - began > self.settings.start_timeout:
                self.stop()
                raise UserError(f"engine.start_timeout: no answer within {self.settings.start_timeout:.0f} s; see {self.log}")
            if now - told > TELL:
                told = now
                logger.info("engine: the server is starting, %.0f s", now - began)
            time.sleep(0.2)

    def alive(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def stop(self) -> None:
        """End it and all that it started."""
        if self._guard is None:
            return
        with contextlib.suppress(ProcessLookupError):
            self._guard.send_signal(signal.SIGTERM)
        self._guard.wait()
        self._guard = None

    def restart(self) -> None:
        """Another one in its place, on the same port where that is free."""
        self.stop()
        self.restarts += 1
        self.start()

    def _dtype(self) -> str:
        config = json.loads((self.model / "config.json").read_text(encoding="utf-8"))
        return str(config.get("dtype", "auto"))


_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")
"""Of the trainer's environment and of its launcher: the server has packages of its own and is no rank."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
