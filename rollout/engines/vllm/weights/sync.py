"""Sync: the policy's weights to the server, and again to one that was started anew.

    kind      how they get there                                        kept for `again`
    file      a safetensors file, written layer by layer                the file, until the next sync
    gloo      a broadcast between the main process and the workers      nothing
    nccl      the same between GPUs                                     nothing
    adapter   the base by a file, once; then the adapter's folder       both

    send(version)   every rank: gather in step ── main: write or broadcast ── server: load all, or say what is missing
                                                  ── prefix cache emptied ── steerl_ready(version): rows are drawn again

vLLM does what it is called for between two steps of its loop, so nothing is paused: a row that was under way would be of two
versions, and says so. Until `steerl_ready` the server draws nothing, so that a sync which fails leaves no mixture at work.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError, one_line
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.client import Gone
from steerl.rollout.engines.vllm.weights import broadcast, export
from steerl.rollout.model import adapters, sharding
from steerl.rollout.model.policy import Policy
from steerl.rollout.weights import files
from steerl.rollout.weights.blocks import peft_model
from steerl.rollout.weights.files import Announced

TIMEOUT = 120.0
"""Seconds that one side of a broadcast waits for the other."""
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Largest ranks of adapters with which vLLM can be started."""


class Calls(Protocol):
    """What is needed of the client."""

    def rpc(self, method: str, *args: str) -> list[Any]: ...

    def post(self, path: str, body: object) -> Any: ...


class Sync:
    """Every rank has one and calls `send` at the same time; the main process alone talks to the server."""

    def __init__(self, client: Calls, policy: Policy, settings: EngineSettings, folder: Path, *, alone: bool = False):
        """`alone`: this process has a server of its own, and no call is collective."""
        self.client, self.policy, self.folder = client, policy, folder
        self.kind, self._alone = _kind(policy, settings), alone
        self._version = -1
        self._announced: list[Announced] = []
        self._adapter: Path | None = None
        self._based = False
        """Whether the server has the adapter's base: not one that has died meanwhile."""
        self._group: broadcast.Group | None = None

    @property
    def model(self) -> str:
        """The name by which requests ask for these weights."""
        return "policy-lora" if self.kind == "adapter" else "policy"

    @property
    def keeps(self) -> bool:
        """Whether what was sent is still there for `again`."""
        return self.kind in ("file", "adapter")

    def flags(self) -> list[str]:
        """What the server must be started with."""
        if self.kind != "adapter":
            return []
        rank = adapters.largest_rank(peft_model(self.policy.model))
        return ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(next(r for r in RANKS if r >= rank))]

    def send(self, version: int) -> None:
        """The policy's weights as they are, which are from now on called `version`. Collective; so are its UserError and Gone,
        after which the server draws nothing."""
        self._version = version
        if self.kind == "adapter":
            self._send_adapter()
        elif self.kind == "file":
            self._send_weights(self._write)
            self._on_main(self._load_file)
        else:
            self._send_weights(self._broadcast)
        self._on_main(self._ready)

    def again(self) -> None:
        """A restarted server gets what was sent last. On the main process alone."""
        if self._version < 0:
            raise UserError("engine: nothing was sent to the server yet")
        if not self.keeps:
            self._group = None
            raise UserError(f"engine.sync: {self.kind} keeps no copy of what was sent; it is to be sent again from all ranks")
        if self.kind == "adapter":
            self._load_adapter(based=False)
        else:
            self._load_file()
        self._ready()

    def close(self) -> None:
        """What was kept is removed."""
        self._group = None
        if self._alone or processes.start().is_main:
            self._file.unlink(missing_ok=True)
            for folder in self.folder.glob("adapter-*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _send_weights(self, consume: Any, *, merge: bool = True) -> None:
        blocks = export.blocks(self.policy, merge=merge)
        self._announced = [entry for block in blocks for entry in block.announced()]
        export.send(blocks, consume, alone=self._alone)

    def _on_main(self, call: Callable[[], None]) -> None:
        export.on_main(call, alone=self._alone)

    def _ready(self) -> None:
        """Rows may be drawn: with these weights, and nothing that was computed with others."""
        if not self.client.post("/reset_prefix_cache", {})["success"]:
            raise UserError("engine: the server cannot empty its prefix cache, rows are under way; sync between two draws")
        _check(self.client.rpc("steerl_ready", str(self._version)))

    # -- by a file -----------------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.folder / "weights.safetensors"

    def _write(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """A safetensors file, a tensor at a time: in memory of this process there is never more than a layer of it."""
        path = self._file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            files.write(path, self._announced, weights)
        except OSError as error:
            with contextlib.suppress(OSError):
                path.unlink()
            raise UserError(f"engine.sync: {path} cannot be written: {error.strerror}; free some space there") from error

    def _load_file(self) -> None:
        _check(self.client.rpc("steerl_load", str(self._file), _listed(self._announced)))

    # -- an adapter ----------------------------------------------------------------------------------------------------

    def _send_adapter(self) -> None:
        based, self._based = self._based, False
        if not self._announced:
            self._send_weights(self._write, merge=False)
        self._write_adapter()
        self._on_main(functools.partial(self._load_adapter, based))
        self._based = True

    def _write_adapter(self) -> None:
        """In a folder of its own: what vLLM keeps by an adapter's path is not that of another. Collective."""
        model = peft_model(self.policy.model)
        own = {name: value for name, value in model.state_dict(keep_vars=True).items() if adapters.is_own(model, name)}

        def write() -> None:
            before, self._adapter = self._adapter, self.folder / f"adapter-{self._version}"
            try:
                adapters.save(model, self._adapter, {name: value.cpu() for name, value in values.items()})
            except OSError as error:
                raise UserError(f"engine.sync: {self._adapter} cannot be written: {one_line(error)}") from error
            if before not in (None, self._adapter):
                shutil.rmtree(before)

        with sharding.whole(own) as values:
            self._on_main(write)

    def _load_adapter(self, based: bool) -> None:
        """Beside the base, which the server may have. Out and in again: one that is loaded in place vLLM reads from the disk
        in every step."""
        if based:
            _check(self.client.rpc("steerl_ready", "-1"))
        else:
            self._load_file()
        with contextlib.suppress(UserError):  # the first time there is none
            self.client.post("/v1/unload_lora_adapter", {"lora_name": self.model})
        self.client.post("/v1/load_lora_adapter", {"lora_name": self.model, "lora_path": str(self._adapter)})

    # -- by broadcast --------------------------------------------------------------------------------------------------

    def _broadcast(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """What fails here or there closes the group, which ends the other side's waiting."""
        group, self._group = self._group, None
        try:
            with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as failed:  # a thread waits for the server's answer
                group = group or self._joined(pool)
                failed.callback(group.close)
                told = pool.submit(self.client.rpc, "steerl_receive", _listed(self._announced), str(broadcast.BUCKET))
                sender = broadcast.Sender(group, self._announced, broadcast.BUCKET)
                for name, value in weights:
                    if told.done():
                        break
                    sender.take(name, value)
                _check(told.result())
                failed.pop_all()
        except RuntimeError as error:
            raise Gone(f"engine.sync: the broadcast to the server broke off: {one_line(error)}") from error
        self._group = group

    def _joined(self, pool: ThreadPoolExecutor) -> broadcast.Group:
        size = 1 + len(self.client.rpc("steerl_ready", "-1"))
        store = broadcast.store(0, size, TIMEOUT, main=True)
        told = pool.submit(self.client.rpc, "steerl_join", self.kind, str(store.port), str(size), str(TIMEOUT))
        group = broadcast.Group(self.kind, store, 0, size, TIMEOUT)
        _check(told.result())
        return group


def _listed(announced: Sequence[Announced]) -> str:
    return json.dumps([astuple(entry) for entry in announced])


def _check(answers: Sequence[dict[str, str]]) -> None:
    """What the workers say of a sync."""
    for answer in answers:
        if answer["problem"]:
            raise UserError(f"engine: {answer['problem']}")


def _kind(policy: Policy, settings: EngineSettings) -> str:
    """What `auto` is here; what cannot be is refused."""
    model, kind = peft_model(policy.model), settings.sync
    adapted = hasattr(model, "peft_config")
    if adapted and model.active_peft_config.is_prompt_learning:
        raise UserError("engine.kind: vllm has no virtual tokens, which this adapter adds; use engine.kind stream")
    reason = adapters.not_plain_lora(model, RANKS[-1]) if adapted else "the policy has no adapter"
    gpus = policy.device.type == "cuda"
    if kind == "auto":
        if not reason:
            return "adapter"
        return "nccl" if gpus and torch.cuda.device_count() > processes.start().world_size else "file"
    if kind == "adapter" and reason:
        raise UserError(f"engine.sync: adapter, but {reason}; use auto or file, which send merged weights")
    if kind == "nccl" and not gpus:
        raise UserError("engine.sync: nccl is between GPUs, and the policy is on the CPU; use auto, file or gloo")
    return kind
