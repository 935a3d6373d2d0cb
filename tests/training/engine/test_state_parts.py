"""Checkpoints between engines and numbers of ranks, and what each leaves as RUN/model: every number as one process has it."""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.fingerprint import sha256_file
from steerl.rollout.model import adapters
from steerl.rollout.weights import parts
from steerl.rollout.weights.files import TensorFile
from steerl.training.run import checkpoint
from steerl.training.setup import Components
from tests import warm
from tests.training.engine import resaved
from tests.training.engine.test_engines import ROOT, config_of


def bits(tree: Any, name: str = "") -> dict[str, bytes]:
    """Every tensor under a node of a checkpoint, by its path."""
    if isinstance(tree, torch.Tensor):
        return {f"{name} {tree.dtype} {tuple(tree.shape)}": tree.contiguous().view(-1).view(torch.uint8).numpy().tobytes()}
    if isinstance(tree, dict):
        return {key: value for part, of in tree.items() for key, value in bits(of, f"{name}/{part}").items()}
    return {}


def state_of(path: Path) -> dict[str, bytes]:
    tree = checkpoint.read(path)["tree"]
    return bits({"weights": tree["weights"], "moments": tree["optimizer"]["state"]})


@pytest.fixture(scope="module")
def trained(made_once: Any) -> Path:
    """Of each job: a checkpoint in one process, of weights that have moved and whose moments are all their own."""

    def make(out: Path) -> None:
        for name in resaved.JOBS:
            parts = resaved.built(name)
            for step in range(2):
                draw = torch.Generator().manual_seed(step)
                for parameter in parts.actor_critic.parameters():
                    if parameter.requires_grad:
                        parameter.grad = torch.randn(parameter.shape, generator=draw)
                for group in parts.state.optimizer.param_groups:
                    group["lr"] = 0.1
                parts.state.optimizer.step()
            checkpoint.save(out / name, 2, parts.state)

    found: Path = made_once("trained states", make)
    return found


def resave(engine: str, source: Path, out: Path) -> None:
    program = ["tests/training/engine/resaved.py", str(source), str(out)]
    out.mkdir()
    if engine == "fsdp2":
        done = warm.run_ranks(*program, "fully_shard")
    elif engine == "one":
        done = warm.run([sys.executable, *program])
    else:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = warm.run(warm.accelerate_launch(config_of(engine, out), *program), env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


def check_export(folder: Path, parts: Components) -> None:
    """Against transformers' and peft's own saving of a model that is whole."""
    model = parts.actor_critic.actor
    expected = folder / "expected"
    adapted = hasattr(model, "peft_config")
    if adapted:
        adapters.save(model, expected / "adapter")
        found, own = (load_file(path / "adapter_model.safetensors") for path in (folder / "model", expected / "adapter"))
        assert found.keys() == own.keys() and all(torch.equal(found[name], own[name]) for name in own)
        assert any("embed_tokens.base_layer" in name or name.endswith("bias") for name in own)
    plain = adapters.merge(copy.deepcopy(model)) if adapted else model
    plain.save_pretrained(expected)
    made = folder / "merged/model" if adapted else folder / "model"
    index = json.loads((made / "model.safetensors.index.json").read_text())
    files = sorted(made.glob("model-*.safetensors"))
    assert len(files) > 1 and {file.name for file in files} == set(index["weight_map"].values())
    assert all(len(load_file(file)) == 1 or file.stat().st_size < 20_000 + 4000 for file in files)
    found = {name: value for file in files for name, value in load_file(file).items()}
    own = load_file(expected / "model.safetensors")
    assert found.keys() == own.keys() == index["weight_map"].keys()
    assert all(torch.equal(found[name], own[name]) for name in own)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in own.values())
    assert (made / "config.json").read_text() == (expected / "config.json").read_text()
    loaded, again = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (made, expected))
    assert all(torch.equal(loaded[name], again[name]) for name in again) and (made / "tokenizer.json").exists()


def check(engines: list[str], trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From one process through the engines, one after the other, and back."""
    source = trained
    for engine in engines:
        resave(engine, source, tmp_path / engine)
        source = tmp_path / engine
    for name in resaved.JOBS:
        expected = state_of(trained / name / resaved.STEP)
        assert any("exp_avg_sq" in tensor for tensor in expected)
        for engine in engines:
            path = tmp_path / engine / name / resaved.STEP
            spread = engine not in ("one", "ddp", "zero3 alone")
            assert len(list(path.glob("tensors-*-of-00002.safetensors"))) == (2 if spread else 0)
            assert checkpoint.damaged(path) is None and state_of(path) == expected, (engine, name)
        parts = resaved.built(name)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            checkpoint.load(path, parts.state)
        assert ("not bitwise" in caplog.text) == (engine != "one")
        assert state_of(checkpoint.save(tmp_path / "back" / name, 2, parts.state)) == expected
        for engine in engines:
            check_export(tmp_path / engine / name, parts)
    check_damage(tmp_path / engines[0] / name)


def check_damage(folder: Path) -> None:
    """A file of the other rank that is changed, cut or gone is named; also where ranks share the work."""
    path = folder / resaved.STEP
    file = path / "tensors-00001-of-00002.safetensors"
    data = file.read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-1], None):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        assert file.name in str(checkpoint.damaged(path))
        assert [checkpoint.damaged(path, rank, 3) is None for rank in range(3)].count(False) == 1
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.latest(folder)
    with pytest.raises(UserError, match=r"not what a run writes .*numbers of .* are in no file"):
        checkpoint.read(path)


@pytest.mark.slow
def test_a_checkpoint_goes_from_one_process_to_zero3_to_fsdp2_and_back(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check(["zero3", "fsdp2"], trained, tmp_path, caplog)


@pytest.mark.proofs
def test_and_through_the_others(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(["fsdp2", "zero1", "zero3 alone", "ddp", "zero2", "one"], trained, tmp_path, caplog)


def test_a_checkpoint_of_format_1_is_read(trained: Path, tmp_path: Path) -> None:
    """As versions before ranks wrote their own: every tensor whole, by safetensors itself."""
    for name in resaved.JOBS:
        path, old = trained / name / resaved.STEP, tmp_path / name / resaved.STEP
        old.mkdir(parents=True)
        save_file(load_file(path / "tensors.safetensors"), old / "tensors.safetensors")
        (old / "state.json").write_text((path / "state.json").read_text().replace('"format": 2', '"format": 1'))
        files = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in old.iterdir()}
        (old / "manifest.json").write_text(json.dumps({"format": 1, "step": 2, "files": files}))
        assert checkpoint.latest(tmp_path / name) == old
        parts = resaved.built(name)
        checkpoint.load(old, parts.state)
        assert state_of(checkpoint.save(tmp_path / "new" / name, 2, parts.state)) == state_of(path)


def test_ranks_write_one_part_each_and_any_others_read(tmp_path: Path) -> None:
    """By cutting a tensor's numbers everywhere, one file a range; then what any range of it is."""
    whole = {"a": torch.randn(5, 3), "b": torch.arange(7).to(torch.bfloat16), "none": torch.zeros(0, 2), "one": torch.tensor(3)}
    cuts = [0, 2, 2, 7, 15]
    for rank in range(4):
        held = {}
        for name, value in whole.items():
            low, high = (min(cut, value.numel()) for cut in cuts[rank : rank + 2])
            if high > low or rank == 0:
                values = partial(value.flatten().narrow, 0, low, high - low)
                held[name] = parts.Part(tuple(value.shape), value.dtype, low, high - low, values)
        parts.write(tmp_path / f"{rank}", held)
    files = [TensorFile(tmp_path / f"{rank}") for rank in range(4)]
    found = parts.stored(reversed(files))
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype
        assert torch.equal(found[name].whole(), value)
        for low in range(value.numel()):
            for high in range(low, value.numel() + 1):
                assert torch.equal(found[name].read(low, high - low), value.flatten()[low:high])
    assert load_file(tmp_path / "3").keys() == {"a"}, "safetensors reads them, too"
    with pytest.raises(ValueError, match="5 numbers of b are in no file"):
        parts.stored([files[0]])["b"].whole()


TWO = """
import os, sys, torch
from pathlib import Path
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import folder_aside
from steerl.rollout.weights.parts import Part
from steerl.training.run import checkpoint

os.chdir(sys.argv[1])
rank = processes.start().rank
parts = {"a": Part((4,), torch.float32, 2 * rank, 2, lambda: torch.full((2,), float(rank)))}

def save(path):
    with folder_aside(path) as aside:
        print(sorted(checkpoint._write_tensors(path, aside, parts)))

save(Path("checkpoints/step-000001"))
os.chdir(sys.argv[1] if rank == 0 else "/")  # on another machine
try:
    save(Path("checkpoints/step-000002"))
except UserError as problem:
    print("told:", problem)
processes.close()
processes.end()
"""


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_folder_is_named_in_one_line(tmp_path: Path) -> None:
    done = warm.run_ranks("-c", TWO, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    names = str([f"tensors-{rank:05d}-of-00002.safetensors" for rank in range(2)])
    written, told, other, empty = done.stdout.splitlines()
    assert written == other == names and empty == "told: "
    assert told.startswith("told: run.dir: process 1 on ") and "does not see checkpoints/.step-000002" in told
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    files = [TensorFile(file) for file in sorted((tmp_path / "checkpoints/step-000001").iterdir())]
    assert parts.stored(files)["a"].whole().tolist() == [0, 0, 1, 1]
