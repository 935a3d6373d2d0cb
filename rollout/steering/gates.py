"""Gates: an earlier block's output says how open each row (or token) is for the sites that come after."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.steering.core import operations
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.spec.spec import Gate
from steerl.rollout.steering.state import StackCall, SteeredRows


@dataclass(eq=False)
class BoundGate:
    """Reads an earlier block's output and says how open each row (or token) is: 1 and 0, or between them for sigmoid."""

    spec: Gate
    index: int
    """Of its site, as is the name."""
    name: str
    point: Point
    direction: Tensor
    trained: nn.Parameter | None = None

    def score(self, x: Tensor) -> Tensor:
        """How open for activations x (..., D)."""
        u = (self.direction if self.trained is None else self.trained).to(x.device)
        h, u, along = operations.along_unit(x, u)
        value = along[..., 0]
        if self.spec.type != "projection":
            value = value / h.norm(dim=-1).clamp_min(torch.finfo(h.dtype).tiny)
        if self.spec.type == "sigmoid":
            return torch.sigmoid(self.spec.scale * (value - (self.spec.open_above or 0.0)))
        opened = value > self.spec.open_above if self.spec.open_above is not None else value < self.spec.open_below  # type: ignore[operator]
        return opened.to(torch.float32)

    def read(self, call: StackCall, hidden: Tensor) -> None:
        """Called where the gate's block has run: note openness for the sites that come after."""
        if self.spec.on == "token":
            call.token_gates[self.index] = self.score(hidden)
            return
        rows, prompt_BP, length_B = call.rows, call.first_prompt_BP, call.length_B
        width = int(prompt_BP.shape[1])
        if call.first >= width:
            return
        part = operations.wide(hidden[:, : width - call.first])
        ends = call.first + call.width >= width
        if self.spec.on == "prompt_last":
            if rows.turns_BU2 is None:
                if ends:
                    self._settle(rows, self.score(part[:, -1]))
                return
            prompt_BP = prompt_BP & (prompt_BP.cumsum(1) == length_B[:, None])  # first prompts end in columns of their own
            length_B = torch.ones_like(length_B)
        inside = prompt_BP[:, call.first : call.first + call.width]
        total = torch.where(inside[..., None].to(part.device), part, torch.zeros_like(part)).sum(1)
        if call.first:
            before, columns = rows.sums.get(self.index, (total, -1))
            if columns != call.first:
                raise ConfigError("steering: a gate over the prompt's mean missed a part of the prompt; prefill it in order")
            total = total + before
        rows.sums[self.index] = (total, call.first + call.width)
        if ends:
            self._settle(rows, self.score(total / length_B.to(total.device)[:, None].clamp_min(1)))

    def _settle(self, rows: SteeredRows, open_B: Tensor) -> None:
        rows.gates[self.index] = open_B
        rows.forget()

    def of_rows(self, rows: SteeredRows) -> Tensor:
        """(B,), once the prompt has been read."""
        if self.index not in rows.gates:
            raise ConfigError(
                f"site {self.name!r}: its gate is not known yet at this point (it reads the whole prompt first); "
                "prefill the prompt in one piece, or use gate.on: token"
            )
        return rows.gates[self.index].to(rows.row_B.device)

    def openness(self, call: StackCall) -> Tensor:
        """(B, 1) or (B, T)."""
        if self.spec.on == "token":
            return call.token_gates[self.index].to(call.rows.row_B.device)
        return self.of_rows(call.rows)[:, None]
