"""Sync: the policy's weights to the server, and again to one that was started anew."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any, Protocol

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm import export
from steerl.rollout.model.policy import Policy


class Calls(Protocol):
    """What is needed of the client."""

    def rpc(self, method: str, *args: str, timeout: float = ...) -> list[Any]: ...


class Sync:
    """Every rank has one and calls `send` at the same time; the main process alone talks to the server."""

    def __init__(self, client: Calls, policy: Policy, settings: EngineSettings, folder: Path):
        self.client, self.policy, self.folder = client, policy, folder
        self.kind = "file" if settings.sync == "auto" else settings.sync
        self.model = "policy"
        """The name by which requests ask for these weights."""
        self.version = -1
        """Of the weights that the server has."""
        self.seconds = 0.0
        """That the last sync took."""

    def flags(self) -> list[str]:
        """What the server must be started with."""
        return []

    def send(self, version: int) -> None:
        """The policy's weights as they are, which are from now on called `version`. Collective."""
        begun = time.monotonic()
        self.version = version
        processes.on_main(self._write_and_load)
        self.seconds = time.monotonic() - begun

    def again(self) -> None:
        """A restarted server gets what was sent last. On the main process alone."""
        if self.version < 0:
            raise UserError("engine: nothing was sent to the server yet")
        self._load()

    def close(self) -> None:
        """What was kept is removed."""
        with contextlib.suppress(FileNotFoundError):
            self._file.unlink()

    @property
    def _file(self) -> Path:
        return self.folder / "weights.safetensors"

    def _write_and_load(self) -> None:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in export.weights(self.policy)}, self._file)
        self._load()

    def _load(self) -> None:
        self.client.rpc("steerl_load", str(self._file), str(self.version))
