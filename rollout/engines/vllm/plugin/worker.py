"""The methods that the trainer calls in every worker of the server, through `/collective_rpc`: texts in, JSON out.

`--worker-extension-cls steerl.rollout.engines.vllm.plugin.worker.Extension` mixes them into vLLM's own worker.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from steerl.rollout.common.errors import UserError, said
from steerl.rollout.engines.vllm.plugin import weights
from steerl.rollout.engines.vllm.plugin.draws import Draws
from steerl.rollout.engines.vllm.plugin.rows import Rows
from steerl.rollout.engines.vllm.plugin.steer import Steers
from steerl.rollout.engines.vllm.weights.broadcast import received
from steerl.rollout.engines.vllm.wire import VERSION
from steerl.rollout.weights.files import Announced


class Extension:
    """Mixed into the worker, whose `model_runner` it uses. Its names begin with steerl_, so that they meet none of vLLM's."""

    model_runner: Any
    steerl_rows: Rows
    steerl_group: Any
    steerl_steers: Steers

    def steerl_hello(self) -> dict[str, object]:
        """From here on the trainer's requests are drawn by its law. Called once by each rank of each job: asking again changes
        nothing."""
        runner = self.model_runner
        if not isinstance(runner.sampler, Draws):
            self.steerl_rows = Rows(runner)
            self.steerl_steers = Steers(self.steerl_rows)
            runner.sampler = Draws(runner.sampler, self.steerl_rows)
        model = runner.get_model()
        return {"wire": VERSION, "version": self.steerl_rows.version, "model": type(model).__name__}

    def steerl_law(self, text: str) -> dict[str, object]:
        """Whether rows can be drawn by this law: its tokenizer is there, its words can be spelled."""
        try:
            self.steerl_rows.rules_of(text)
        except (UserError, OSError, ValueError, TypeError) as error:
            return {"problem": said(error)}
        return {"problem": ""}

    def steerl_take(self, ids: str) -> dict[str, object]:
        """What is known of these rows, which have ended."""
        return self.steerl_rows.take(json.loads(ids))

    def steerl_load(self, path: str, announced: str) -> dict[str, object]:
        """Weights from a safetensors file."""
        entries = [Announced.read(entry) for entry in json.loads(announced)]
        return self._steerl_taken(weights.of_file(path, entries))

    def steerl_join(self, kind: str, port: str, size: str, timeout: str) -> dict[str, object]:
        """Become one of the group in which the trainer broadcasts its weights."""
        self.steerl_group = weights.join(kind, int(port), int(size), float(timeout))
        return {"problem": ""}

    def steerl_receive(self, announced: str, most: str) -> dict[str, object]:
        """Weights by broadcast."""
        entries = [Announced.read(entry) for entry in json.loads(announced)]
        return self._steerl_taken(received(self.steerl_group, entries, int(most)))

    def steerl_ready(self, version: str) -> dict[str, object]:
        """All that rows depend on is there: from now on they are drawn, and say by which weights. -1: none are drawn."""
        self.steerl_rows.version = int(version)
        return {"problem": ""}

    def _steerl_taken(self, arriving: Iterable[tuple[str, Tensor]]) -> dict[str, object]:
        self.steerl_rows.version = -1
        try:
            weights.load(self.model_runner, arriving)
        except weights.Refused as refused:
            return {"problem": str(refused)}
        return {"problem": ""}

    def steerl_steer(self, path: str, name: str) -> dict[str, object]:
        """A steering from a safetensors file, by the name that rows give."""
        return self.steerl_steers.receive(path, name)
