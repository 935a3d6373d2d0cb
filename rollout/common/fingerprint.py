"""What a dump was made from, as short hashes: weights, tokenizer, files. Equal content, equal hash, wherever it lies."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SHORT = 16
"""Hex digits kept of a fingerprint; checksums of files are kept whole."""


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_fingerprint(model: torch.nn.Module) -> str:
    """Of the config and every parameter and buffer that is saved: the same for another path, device or file layout."""
    import torch

    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        settings = config.to_dict()
        for name in ("_name_or_path", "transformers_version"):
            settings.pop(name, None)
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        for part in flat.split(1 << 26):
            digest.update(part.cpu().numpy())
    return digest.hexdigest()[:SHORT]


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Of all weights in seconds: each tensor's exact sum as integers, and a thousand of its entries. With an adapter, of what
    it leaves as it is: its own weights begin anew or come from a checkpoint."""
    import torch

    trained = {name for name, p in model.named_parameters() if p.requires_grad} if hasattr(model, "peft_config") else set()
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in trained or not isinstance(tensor, torch.Tensor):
            continue
        kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.uint8)
        whole = tensor.detach().reshape(-1).contiguous().view(kind)
        total = sum(int(part.sum(dtype=torch.int64)) for part in whole.split(1 << 24))
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {total}".encode())
        digest.update(whole[:: max(len(whole) // 1000, 1)].cpu().numpy().tobytes())
    return digest.hexdigest()[:SHORT]


def source_fingerprint(function: Callable[..., object]) -> str:
    """Of the file that a function, a class or an object's class is written in; empty where there is none."""
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object, a builtin
        try:
            file = inspect.getsourcefile(type(function))
        except TypeError:
            file = None
    return sha256_file(Path(file))[:SHORT] if file and Path(file).is_file() else ""


def folder_fingerprint(folder: Path) -> str:
    """Of the names, sizes and both ends of a folder's files."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size, end = path.stat().st_size, 1 << 20
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {size}".encode() + file.read(end))
            file.seek(max(size - end, 0))
            digest.update(file.read(end))
    return digest.hexdigest()[:SHORT]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what turns text into ids and back: vocabulary, rules, special tokens, chat template."""
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        for name in ("truncation", "padding"):  # what the last call asked for, not what the tokenizer is
            rules.pop(name, None)
        digest.update(json.dumps(rules, sort_keys=True).encode())
    else:
        digest.update(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps([special, getattr(tokenizer, "chat_template", None)], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:SHORT]


def values_fingerprint(values: Iterable[object]) -> str:
    """Of a stream of plain values, in their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:SHORT]
