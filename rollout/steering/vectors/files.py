"""Vector files: one tensor per layer, named by the layer's number, with metadata about how it was made.

    read_tensors(path)               safetensors, a GGUF control vector, or a folder that pyvene saved -> {name: tensor}
    per_layer(tensors, layers, ...)  the tensors of the wanted layers, or one UserError that says what the file holds
    save_vector(path, ...)           safetensors, or GGUF by the name's ending

Layer numbers count from 0; layer 8's vector is what is added to the output of block 8 (direction.8 in GGUF).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import DataError, reading
from steerl.rollout.common.run_folder import written_aside


def fingerprint(model: nn.Module) -> str:
    """Tells one model's width, depth and kind from another's, and roughly its weights: written into vector files."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    parts = [getattr(config, "model_type", type(model).__name__)]
    parts += [str(getattr(text, name, "")) for name in ("hidden_size", "num_hidden_layers", "vocab_size")]
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters())[:4]:
        digest.update(name.encode() + parameter.detach().reshape(-1)[:64].float().cpu().numpy().tobytes())
    return ":".join([*parts, digest.hexdigest()[:12]])


# -- reading --------------------------------------------------------------------------------------------------------------


def read_tensors(path: Path, who: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata). GGUF and pyvene names come back as plain layer numbers where they are vectors."""
    if not path.exists():
        raise DataError(f"{who}: {path} does not exist; give a .safetensors or .gguf file, or a folder saved by pyvene")
    if path.is_dir():
        return _read_pyvene(path, who), {}
    if path.suffix == ".gguf":
        return _read_gguf(path, who)
    from safetensors import safe_open

    with (
        reading(f"{who}: {path} is not a safetensors file (", "); give a .safetensors or .gguf file"),
        safe_open(path, framework="pt") as opened,
    ):
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        return tensors, dict(opened.metadata() or {})


def _read_gguf(path: Path, who: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        import gguf
    except ImportError as error:
        raise DataError(f"{who}: reading {path} needs the gguf package; pip install gguf") from error
    with reading(f"{who}: {path} is not a GGUF file that can be read (", "); make the vector again"):
        reader = gguf.GGUFReader(str(path))
        field = reader.get_field("general.architecture")
        kind = "" if field is None else str(field.contents())
        if kind != "controlvector":
            raise DataError(f"{who}: {path} holds a GGUF of architecture {kind or 'unknown'!r}; expected a control vector")
        tensors = {
            tensor.name.removeprefix("direction."): torch.from_numpy(tensor.data.copy()).float().reshape(-1)
            for tensor in reader.tensors
            if tensor.name.startswith("direction.")
        }
        hint = reader.get_field("controlvector.model_hint")
        return tensors, {} if hint is None else {"model": str(hint.contents())}


class _Rotation(nn.Module):
    """Rebuilds the weight of an orthogonal parametrization from what was saved of it."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(*shape))
        torch.nn.utils.parametrizations.orthogonal(self, "weight")


def _read_pyvene(folder: Path, who: str) -> dict[str, Tensor]:
    if not (folder / "config.json").exists():
        raise DataError(f"{who}: {folder} has no config.json; expected a folder saved by pyvene, or name the vector's file")
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("intkey_*.bin")):
        match = re.search(r"layer_(\d+)_", file.name) or re.search(r"_(\d+)_", file.name)
        layer = match.group(1) if match else ""
        prefix = f"{layer}." if layer else ""
        with reading(f"{who}: {file} is not what pyvene saves (", "); save the intervention again"):
            state = torch.load(file, map_location="cpu", weights_only=True)
            saved = {key.removeprefix("rotate_layer."): value for key, value in state.items()}
            rotation = {k: v for k, v in saved.items() if k.startswith("parametrizations.weight")}
            if rotation:
                module = _Rotation(rotation["parametrizations.weight.original"].shape)
                module.load_state_dict(rotation)
                saved = {k: v for k, v in saved.items() if k not in rotation} | {"rotation": module.weight.detach()}
        for key, value in saved.items():
            name = layer or "vector" if key == "source_representation" else f"{prefix}{key}"
            if isinstance(value, Tensor) and key not in ("embed_dim", "interchange_dim"):
                tensors[name] = value
    if not tensors:
        raise DataError(f"{who}: {folder} holds no intkey_*.bin with a source_representation or parameters")
    return tensors


def per_layer(
    tensors: Mapping[str, Tensor],
    layers: Sequence[int | None],
    widths: Sequence[int | None],
    who: str,
    path: object,
    key: str = "",
) -> list[Tensor]:
    """One vector per layer: the tensor named by its number, else the only one there is (or the one called `key`)."""
    if key and key not in tensors:
        raise DataError(f"{who}.key: {path} has no tensor {key!r}; it holds {', '.join(list(tensors)[:8])}")
    numbered = {int(name): tensor for name, tensor in tensors.items() if name.isdigit()}
    single = tensors[key] if key else None
    if single is None and not numbered and len(tensors) == 1:
        single = next(iter(tensors.values()))
    vectors: list[Tensor] = []
    for layer, width in zip(layers, widths, strict=True):
        vector = single if single is not None else numbered.get(-1 if layer is None else layer)
        if vector is None:
            if layer is None and len(numbered) == 1:
                vector = next(iter(numbered.values()))
            else:
                held = f"layers {sorted(numbered)}" if numbered else f"tensors {', '.join(list(tensors)[:8])}"
                raise DataError(f"{who}: {path} has no vector for layer {layer}; it holds {held}; choose one with key")
        vector = vector.detach().float().squeeze()
        if vector.dim() != 1:
            raise DataError(
                f"{who}: {path} holds a tensor of shape {tuple(vector.shape)} for layer {layer}; expected one vector"
            )
        if width is not None and vector.shape[0] != width:
            raise DataError(
                f"{who}: {path} is {vector.shape[0]} wide, and the model's activation at layer {layer} is {width} wide; "
                "it was made for another model or component"
            )
        if not bool(torch.isfinite(vector).all()):
            raise DataError(f"{who}: {path} holds NaN or infinity for layer {layer}; make the vector again")
        vectors.append(vector)
    return vectors


# -- writing --------------------------------------------------------------------------------------------------------------


def save_vector(
    path: str | Path, tensors: Mapping[int | str, Tensor], metadata: Mapping[str, object], model: nn.Module | None = None
) -> Path:
    """Write a vector file, safetensors or GGUF by its ending. Norms and the model's fingerprint go into the metadata."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    plain = {str(name): tensor.detach().float().cpu().contiguous() for name, tensor in tensors.items()}
    if not plain:
        raise DataError(f"{target}: no vectors to write")
    notes = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    notes.setdefault("norm", json.dumps({name: round(float(t.norm()), 6) for name, t in plain.items()}))
    if model is not None:
        notes.setdefault("model", fingerprint(model))
    if target.suffix == ".gguf":
        _write_gguf(target, plain, notes)
        return target
    from safetensors.torch import save_file

    with written_aside(target) as aside:
        save_file(plain, aside, metadata=notes)
        _order_notes(aside)
    return target


def _order_notes(file: Path) -> None:
    """safetensors writes metadata in an order that differs from process to process: sorted, the same bytes every time."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def _write_gguf(target: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    import gguf

    bad = [name for name, tensor in tensors.items() if not name.isdigit() or tensor.dim() != 1]
    if bad:
        raise DataError(
            f"{target}: a GGUF control vector holds one vector per layer, found {bad[0]!r}; write .safetensors instead"
        )
    with written_aside(target) as aside:
        writer = gguf.GGUFWriter(str(aside), "controlvector")
        writer.add_string("controlvector.model_hint", notes.get("model", "").split(":")[0])
        writer.add_uint32("controlvector.layer_count", len(tensors))
        for name, tensor in sorted(tensors.items(), key=lambda item: int(item[0])):
            writer.add_tensor(f"direction.{name}", tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
