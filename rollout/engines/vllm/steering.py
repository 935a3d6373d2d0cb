"""ServerSteering: the job's steering in a vLLM server. Its numbers go over once (a trainable one's after every update), and
each row says which steering it is under, how strongly, and at which positions where a column says so.

    Steering ── spec, tensors of each site and layer ── safetensors ── /collective_rpc steerl_steer ──> plugin/steer.py
    Answer.edits ── how many activations were edited ── against what the spec selects of the row ──> check_edits

What the server cannot do is told by name before it starts. Nothing is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.vllm.plugin.steer import MISSING
from steerl.rollout.engines.vllm.wire import Answer
from steerl.rollout.model.sharding import gathered
from steerl.rollout.steering.core import operations
from steerl.rollout.steering.selection import select
from steerl.rollout.steering.sites import BoundSite
from steerl.rollout.steering.state import StackCall
from steerl.rollout.steering.steering import Steering
from steerl.rollout.types import Rollout, row_name


class Calls(Protocol):
    """What is asked of the client."""

    def rpc(self, method: str, *args: str, timeout: float = ...) -> list[Any]: ...


class ServerSteering:
    """A steering of the trainer's model, and what the server knows of it."""

    def __init__(self, steering: Steering):
        self.steering = steering
        self.version = 0
        self._tensors: dict[str, Tensor] = {}

    @property
    def name(self) -> str:
        """What requests call it: the label, and of one that is trained the version."""
        label = self.steering.label
        return f"{label}@{self.version}" if self.steering.role == "trainable" else label

    def flags(self) -> list[str]:
        """What the server must be started with: no part of a prompt shared between rows, and a model whose hooks run."""
        return ["--no-enable-prefix-caching", "--enforce-eager"]

    def refusals(self) -> list[str]:
        """What this steering asks that the server cannot do, a line each."""
        return [f"steering.sites[{site.index}].{line}" for site in self.steering.sites for line in _refused(site)]

    # -- its numbers -------------------------------------------------------------------------------------------------------

    def take(self, version: int) -> None:
        """Its numbers as they are now, which are from now on called `version`. Collective."""
        with gathered(self.steering.parameters_module), torch.no_grad():
            if self.steering.role == "trainable" or not self._tensors:  # other numbers never change
                self._tensors = {
                    f"{site.index}.{at}.{name}": _whole(tensor)
                    for site in self.steering.sites
                    for at in range(len(site.points))
                    for name, tensor in site.tensors(at, torch.device("cpu")).items()
                }
        self.version = version

    def send(self, client: Calls, folder: Path) -> None:
        """What was taken last, to the server: after every sync, and to one that was started anew. On the main process alone;
        through a file in `folder`."""
        path = folder / "steering.safetensors"
        self._write(path)
        for told in client.rpc("steerl_steer", str(path), self.name):
            if "refused" in told:
                raise UserError(f"engine: the vLLM server does not steer ({self.name}): {told['refused']}")

    def _write(self, path: Path) -> None:
        from safetensors.torch import save_file

        steering, stack = self.steering, self.steering.stacks["decoder"]
        excluded = [None if site.excluded_ids is None else site.excluded_ids.tolist() for site in steering.sites]
        about = {
            "spec": steering.spec.mapping(),
            "layers": [[point.layer for point in site.points] for site in steering.sites],
            "excluded": excluded,
            "seed": steering.seed,
            "blocks": len(stack.blocks),
            "width": stack.width,
        }
        save_file(self._tensors, path, {"steerl": json.dumps(about)})

    # -- a row -------------------------------------------------------------------------------------------------------------

    def of_row(self, applied: Applied, row: int) -> dict[str, Any]:
        """How a row is steered, as fields of its `wire.Ask`."""
        return {
            "steering": self.name,
            "strengths": tuple(applied.strength_BK[row].tolist()),
            "positions": tuple(tuple(p for p in places if p >= 0) for places in applied.positions_BKN[row].tolist()),
            "noise_step": int(applied.policy_step_B[row]),
        }

    def check_edits(self, rollout: Rollout, answers: Sequence[Answer], drawn_BP: Tensor | None = None) -> None:
        """Whether every row was edited at as many places as the spec selects of it; UserError for the first that was not. The
        prompts of a later turn are all of the row so far, and `drawn_BP` says what the policy drew of them."""
        for row, (wanted, answer) in enumerate(zip(self.selected(rollout, drawn_BP), answers, strict=True)):
            if answer.edits == wanted:
                continue
            who = f"engine: {row_name(rollout, row)}"
            if MISSING in answer.edits:
                raise UserError(f"{who} was drawn by a vLLM server that was never sent the steering {self.name}")
            if not answer.edits:
                raise UserError(f"{who} was drawn without steering, and {self.name} was to act on it")
            counts = zip(self.steering.sites, wanted, answer.edits, strict=True)
            name, want, have = next((site.name, w, h) for site, w, h in counts if w != h)
            raise UserError(f"{who}: site {name!r} of {self.name} edited {have} activations in the vLLM server, not {want}")

    def selected(self, rollout: Rollout, drawn_BP: Tensor | None = None) -> list[list[int]]:
        """For each row and site, the activations that the spec selects: of all tokens that are fed (the last one is not), at
        all of the site's layers."""
        rows = self.steering.rows_of(rollout, drawn_BP)
        fed_BR = torch.arange(rollout.response_width, device=rollout.device) < rollout.lengths_B[:, None] - 1
        fed_BS = torch.cat([rollout.prompt_mask_BP, fed_BR], dim=1)
        call = StackCall(rows, 0, fed_BS.shape[1], torch.cat([rollout.prompt_BP, rollout.response_BR], dim=1))
        counts = []
        for site in self.steering.sites:
            selection = select(site, call)
            count_B = torch.zeros_like(rollout.lengths_B)
            if selection is not None:
                chosen_BS = fed_BS if selection.mask_BT1 is None else fed_BS & selection.mask_BT1[..., 0]
                count_B = chosen_BS.sum(1) * len(site.points)
            counts.append(count_B)
        return torch.stack(counts, dim=1).tolist()


def _whole(tensor: Tensor) -> Tensor:
    tensor = getattr(tensor, "full_tensor", lambda: tensor)()
    return tensor.detach().cpu().contiguous().clone()


def _refused(site: BoundSite) -> Iterator[str]:
    at, operation = site.spec.at, site.operation
    instead = "; the vLLM server steers at block outputs: use the engine stream"
    if at.module:
        yield f"at.module: {at.module}{instead}"
    elif at.head:
        yield f"at.head: {list(at.head)}{instead}"
    elif at.stack != "decoder":
        yield f"at.stack: {at.stack}; the vLLM server has none: use the engine stream"
    elif at.component != "block_output":
        yield f"at.component: {at.component}{instead}"
    if site.gate is not None:
        yield "gate: the vLLM server steers without gates; use the engine stream"
    if operation.collects or operation.family == "function":
        yield f"op: {site.spec.op.type} runs in the trainer's process alone; use the engine stream"
    elif getattr(operation.function, "__module__", "") != operations.__name__:
        yield f"op: {site.spec.op.type} is an operation of your own program, not of the server's; use the engine stream"
