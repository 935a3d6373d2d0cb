"""Every command on two ranks, under DDP and under ZeRO-3: what it leaves is whole, and loads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from steerl.rollout.model import adapters
from tests import warm
from tests.models import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=pytest.mark.proofs), "zero3"])
def test_every_door_runs_on_two_ranks(engine: str, tmp_path: Path) -> None:
    tiny("llama", scale=0.1).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{word} is ", "completion": f"{word[::-1]}."} for word in ("film", "plot", "end", "a", "one") * 2]
    preferred = [{"prompt": row["prompt"], "chosen": "good.", "rejected": "bad"} for row in rows]
    for name, table in {"prompts": rows[:7], "sft": rows, "pairs": preferred}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    launch = warm.accelerate_launch(engine, "tests/scripts/commands.py", str(tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = warm.run(launch, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, file in {
        "dump": "manifest",
        "score": "manifest",
        "sft": "summary",
        "reward": "summary",
        "ppo": "summary",
    }.items():
        assert json.loads((tmp_path / name / f"{file}.json").read_text())["world_size"] == 2, name
    dumped = [parquet.read_table(path) for path in sorted((tmp_path / "dump").glob("rollouts-*.parquet"))]
    assert sorted(index for table in dumped for index in table["prompt_index"].to_pylist()) == list(range(7))
    scored = [parquet.read_table(path) for path in sorted((tmp_path / "score").glob("scores-*.parquet"))]
    assert sum(table.num_rows for table in scored) == 7
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "model")
    assert any(not value.equal(tiny("llama", scale=0.1).state_dict()[name]) for name, value in tuned.state_dict().items())
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward" / "model").num_labels == 1
    learned = adapters.load(tiny("llama"), tmp_path / "ppo" / "model")
    assert any(value.abs().sum() > 0 for name, value in learned.state_dict().items() if "lora_B" in name)
