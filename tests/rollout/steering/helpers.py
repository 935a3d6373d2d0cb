"""What the steering tests share: specs of every operation and scope, and definitions that know nothing of the engine."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from steerl.rollout.model.policy import Policy
from steerl.rollout.steering.core.table import TABLE, names
from tests.models import tiny, tiny_policy, tiny_tokenizer

WIDTH, RANK, LATENT = 32, 3, 40
FAMILIES = ("gpt2", "llama", "qwen2", "gpt_neox", "t5", "lora")

DIRECTION, SPACE, LEARNED = names("direction"), names("space"), names("learned")

SCOPES: dict[str, dict[str, Any]] = {
    "all": {"steps": "all"},
    "generated": {"steps": "generated_positions"},
    "window": {"steps": {"window": [1, 3]}},
    "listed": {"steps": [0, 2]},
    "every": {"steps": {"every": 2}},
    "ramp": {"steps": "all", "ramp": {"type": "cosine", "over": 4}},
    "prompt": {"prompt": "all", "steps": "none"},
    "prompt_window": {"prompt": {"window": [-3, -1]}, "steps": "none"},
    "prompt_listed": {"prompt": [0, -2], "steps": [1]},
    "last_and_excluded": {"prompt": "last", "steps": "all", "exclude": {"token_ids": [5, 9, 14, 33, 40], "positions": [1]}},
}
OPERATIONS = ("set", "add", "subtract", "zero", "scale", "noise", *DIRECTION, *SPACE, *LEARNED, "function")


def vector(seed: int = 0, width: int = WIDTH) -> list[float]:
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).tolist()


def parameters_of(kind: str) -> dict[str, Tensor]:
    """Tensors for an operation, of the shapes its formula asks for."""
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=g)

    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g))[0]
    low = {
        "weight": draw(RANK, WIDTH),
        "bias": draw(RANK),
        "rotation": basis[:, :RANK].contiguous(),
        "projection": draw(RANK, WIDTH),
    }
    table: dict[str, dict[str, Tensor]] = {
        "rotated": {"rotation": basis}, "low_rank_rotated": {"weight": basis[:, :RANK].contiguous()},
        "pca": {"components": basis[:20].contiguous(), "mean": draw(WIDTH), "std": 0.5 + draw(WIDTH).abs()},
        "boundless": {"rotation": basis}, "sigmoid_mask": {"mask": draw(WIDTH)}, "sigmoid_mask_rotated": {"rotation": basis, "mask": draw(WIDTH)},
        "autoencoder": {"encoder": draw(LATENT, WIDTH), "encoder_bias": draw(LATENT), "decoder": draw(WIDTH, LATENT), "decoder_bias": draw(WIDTH)},
        "jumprelu": {"W_enc": draw(WIDTH, LATENT), "b_enc": draw(LATENT), "threshold": draw(LATENT).abs(), "W_dec": draw(LATENT, WIDTH), "b_dec": draw(WIDTH)},
        "loreft": {k: low[k] for k in ("weight", "bias", "rotation")}, "noreft": {k: low[k] for k in ("weight", "bias", "projection")},
        "consreft": {"value": draw(RANK), "rotation": low["rotation"]}, "lobireft": {"value": draw(RANK), "rotation": low["rotation"]},
        "direft": {k: low[k] for k in ("weight", "bias", "rotation")}, "nodireft": {k: low[k] for k in ("weight", "bias", "projection")},
        "adapter": {"down": draw(RANK, WIDTH), "down_bias": draw(RANK), "up": draw(WIDTH, RANK), "up_bias": draw(WIDTH)},
    }  # fmt: skip
    return table[kind]


def site(kind: str, folder: Path, **fields: Any) -> dict[str, Any]:
    """A site of the given operation on block 0; files that it needs are written into `folder`."""
    op: dict[str, Any] = {"type": kind}
    found: dict[str, Any] = {"name": kind, "at": {"layers": [0]}, "op": op, "strength": 0.8}
    if kind in SPACE or kind in LEARNED:
        file = folder / f"{kind}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in parameters_of(kind).items()}, file)
        if kind in SPACE:
            op["params"] = str(file)
        else:
            found["vector"] = {"file": str(file)}
    if kind == "function":
        file = folder / "own.py"
        file.write_text("def double(base, source, strength):\n    return base + strength * base.flip(-1)\n")
        op["function"] = f"{file}:double"
    if kind == "scale":
        op["factor"] = 0.5
    if kind == "clamp":
        op["value"] = 3.0
    if kind in ("set", "pca", "rotated"):
        op["coordinates"] = [0, 3, 5]
    if TABLE[kind].needs_vector:
        found["vector"] = vector()
    return {**found, **fields}


@functools.cache
def policy(family: str) -> Policy:
    """A tiny policy; `lora` is a llama whose attention carries an adapter with weights of its own."""
    if family != "lora":
        return tiny_policy(family)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    wrapped = get_peft_model(
        tiny("llama"), LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    )
    return Policy.of(wrapped.eval(), tiny_tokenizer())


def prompts() -> list[list[int]]:
    return [[5, 6, 7, 8], [9, 10, 3], [11, 12, 13, 14, 15, 16]]
