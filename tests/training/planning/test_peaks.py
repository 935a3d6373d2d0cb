"""The plan of each phase against the peaks of real ranks on a CPU, and what spreading saves beside one process.

pytest -s -m proofs tests/training/planning/test_peaks.py        244 million weights, some 9 GB, a table for docs/log
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from steerl.configs.reader import read

import pytest
import yaml

from steerl.scripts import plan as plan_door
from steerl.training.planning.memory import Buffers, Engine, memory
from tests import warm
from tests.training.planning import peaks

ROOT = Path(__file__).parents[3]
SHAPE = {"num_hidden_layers": 20, "intermediate_size": 2816, "vocab_size": 4096}
SMALL = {
    "reduce_bucket_size": 20_000_000, "allgather_bucket_size": 20_000_000, "sub_group_size": 50_000_000,
    "stage3_max_live_parameters": 20_000_000, "stage3_max_reuse_distance": 20_000_000, "stage3_prefetch_bucket_size": 10_000_000,
    "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
"""As small beside these models as the defaults are beside those of GPUs."""
CHANGED: dict[str, object] = {}
SAVED = ("load", "score", "learn")


def config_of(engine: str, precision: str, folder: Path) -> Path:
    """The shipped file with a precision; for DeepSpeed with small buffers."""
    given = yaml.safe_load((ROOT / "configs" / "accelerate" / f"{engine}.yaml").read_text())
    given["mixed_precision"] = precision
    if engine.startswith("zero"):
        zero = {"stage": int(engine[-1]), **SMALL}
        sizes = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}}
        (folder / "deepspeed.json").write_text(json.dumps(sizes))
        given["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json")}
        given["deepspeed_config"] |= {"zero3_init_flag": False} if engine == "zero3" else {}
        del given["mixed_precision"]
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(given))
    return folder / "accelerate.yaml"


def measured(engine: str, precision: str, world: Path, out: Path) -> list[dict[str, int]]:
    """Bytes by phase of every rank."""
    out.mkdir()
    program = ["tests/training/planning/peaks.py", str(world), str(out), json.dumps(CHANGED)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if engine == "fsdp2":
        done = warm.run_ranks(*program, "fully_shard", env=environment, timeout=1500)
    else:
        launched = warm.accelerate_launch(config_of(engine, precision, out), *program)
        done = warm.run(launched, env=environment, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(path.read_text()) for path in sorted(out.glob("peaks.*.json"))]


def planned(engine: Engine, ranks: int, precision: str, world: Path, out: Path) -> dict[str, float]:
    words = [
        *peaks.arguments(world, "large", out, CHANGED),
        "--prompt_tokens",
        str(peaks.PROMPT),
        "--mixed_precision",
        precision,
    ]
    work = plan_door.work_of(read(plan_door.PlanJob, words), None)
    return memory(dataclasses.replace(work, buffers=Buffers.of(SMALL)), engine, ranks, device="cpu").phases


def compared(engine: str, precision: str, world: Path, folder: Path) -> dict[str, tuple[float, float]]:
    """(planned, measured) of each phase; of two ranks that of the larger."""
    name, ranks = ("ddp", 1) if engine == "cpu" else (engine, 2)
    found = measured(engine, precision, world, folder / f"{engine}-{precision}")
    assert len(found) == ranks
    said: Any = planned(name, ranks, precision, world, folder)  # type: ignore[arg-type]
    said["learn"] = max(said["learn"], said.pop("update"))  # one call
    found = [{**rank, "save": max(rank["save"], rank["export"])} for rank in found]
    return {phase: (value, max(rank[phase] for rank in found)) for phase, value in said.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return peaks.world(tmp_path_factory.mktemp("world"), **SHAPE)


@pytest.fixture(scope="module")
def alone(large, tmp_path_factory) -> dict[str, dict[str, tuple[float, float]]]:
    folder = tmp_path_factory.mktemp("alone")
    return {precision: compared("cpu", precision, large, folder) for precision in ("no", "bf16")}


@pytest.mark.proofs
@pytest.mark.parametrize(
    ("engine", "precision", "spread"),
    [
        ("cpu", "no", False),
        ("ddp", "no", False),
        ("zero1", "no", False),
        ("zero2", "no", False),
        ("zero3", "no", False),
        ("fsdp2", "no", True),
        ("cpu", "bf16", False),
        ("zero3", "bf16", True),
    ],
)
def test_every_phase_is_planned_within_10_percent(engine, precision, spread, large, alone, tmp_path):
    one = alone[precision]
    found = one if engine == "cpu" else compared(engine, precision, large, tmp_path)
    rows = [
        f"{plan / 1e9:.2f} {peak / 1e9:.2f} {plan / peak:.2f} {peak / one[name][1]:.2f}" for name, (plan, peak) in found.items()
    ]
    print(
        f"\n| {engine} {precision} | " + " | ".join(rows) + " |",
        "   ",
        *found,
        "planned measured planned/measured of-one",
        sep=" ",
    )
    for name, (plan, peak) in found.items():
        assert plan == pytest.approx(peak, rel=0.1), (name, found)
    for name in SAVED if spread else ():
        assert found[name][1] <= 0.65 * one[name][1], (name, found, one)
