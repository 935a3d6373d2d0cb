"""New weights in the running server. (draft)"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


def of_file(path: str) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, file.get_tensor(name)


def load(runner: Any, weights: Iterator[tuple[str, Tensor]]) -> dict[str, object]:
    runner.reload_weights(weights_iterator=weights)
    model = runner.get_model()
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)
    return {}
