"""`steerl ppo --dry_run true`: what is here is opened, what is not is named, what is wrong is told at once, nothing is left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from steerl.configs.reader import read

import pytest
import yaml

from steerl.rollout.common.errors import UserError
from steerl.scripts.train_ppo import PPOJob, main
from tests.models import tiny_tokenizer


def job(tmp_path: Path, world: Path, **changes: Any) -> PPOJob:
    given = {
        "model": {"path": str(world / "base")},
        "prompts": {"path": str(world / "prompts.jsonl")},
        "reward": [{"kind": "length", "max": 9}],
        "run": {"dir": str(tmp_path / "run")},
        "dry_run": True,
        **changes,
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(given))
    return read(PPOJob, ["--config", str(tmp_path / "job.yaml")])


def files(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


@pytest.fixture
def world(tiny_world: Any) -> Path:
    found: Path = tiny_world("randomwalks")
    return found


def test_a_job_that_could_start_is_checked_in_all_its_parts_and_leaves_nothing(world, tmp_path, capsys, monkeypatch):
    spec = {"role": "policy", "sites": [{"at": {"layers": [0]}, "vector": {"init": "normal"}, "strength": 1.0}]}
    one = job(
        tmp_path, world, steering=spec, heldout={"path": str(world / "prompts.jsonl")}, model={"path": str(world / "base"), "peft": {"peft_type": "LORA", "r": 2}}
    )  # fmt: skip
    monkeypatch.setattr("torch.nn.Linear.forward", lambda *_: pytest.fail("a forward pass"))
    before = files(world, tmp_path)
    main(one)
    assert files(world, tmp_path) == before
    said = capsys.readouterr().out.splitlines()
    for part in (
        "run.dir",
        "model.path",
        "prompts.path",
        "heldout.path",
        "reward[0] (length)",
        "steering",
        "launch",
        "settings",
    ):
        assert any(line.startswith(f"checked: {part}") for line in said), part
    assert not any(line.startswith("not checked") for line in said)


def test_names_of_the_hub_are_not_checked_and_the_rest_is(world, tmp_path, capsys):
    reward = [{"kind": "model", "path": "who/reward"}, {"kind": "http", "url": "http://127.0.0.1:9"}]
    main(job(tmp_path, world, model={"path": "who/model-7B"}, prompts={"path": "who/questions"}, reward=reward))
    said = capsys.readouterr().out.splitlines()
    assert {line.split()[2].rstrip(":") for line in said if line.startswith("not checked: ")} >= {"model.path", "prompts.path"}
    assert any(line.startswith("not checked: reward[0] (model): a name of the hub") for line in said)
    assert any(line.startswith("not checked: reward[1] (http): whether http://127.0.0.1:9 answers") for line in said)
    assert any(line.startswith("checked: settings") for line in said)


def test_all_that_is_wrong_is_told_together(world, tmp_path, capsys):
    lost = {"peft_type": "LORA", "target_modules": ["nothing"]}
    with pytest.raises(UserError) as caught:
        main(
            job(
                tmp_path,
                world,
                model={"path": str(world / "base"), "peft": lost},
                prompts={"path": str(world / "none.jsonl")},
                heldout={"path": "a/b/c"},
                reward=[{"kind": "function", "function": "none.py:f"}],
                ppo={"credit": "rloo"},
                engine={"kind": "vllm", "python": "none/python"},
            )
        )
    beginnings = (
        "model.peft.target_modules",
        "prompts.path",
        "heldout.path",
        "reward[0]",
        "engine.python",
        "sampling.n: 1, but",
    )
    assert len(caught.value.lines) == len(beginnings)
    for beginning, line in zip(beginnings, caught.value.lines, strict=True):
        assert line.startswith(beginning)


def test_a_steering_that_does_not_fit_the_model_and_a_folder_that_is_taken(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    with pytest.raises(UserError) as caught:
        main(
            job(tmp_path, world, steering={"role": "policy", "sites": [{"at": {"layers": [99]}, "vector": {"init": "normal"}}]})
        )
    assert [line.split(":")[0] for line in caught.value.lines] == ["run.dir", "sites[0].at.layers"]


def test_the_launch_is_read_from_what_accelerate_hands_on(world, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    half = {"path": str(world / "base"), "dtype": "bfloat16"}
    with pytest.raises(UserError, match="bfloat16, but DeepSpeed without mixed precision takes float32 alone"):
        main(job(tmp_path, world, model=half))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    main(job(tmp_path, world, model=half))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="mixed_precision: fp16"):
        main(job(tmp_path, world))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    kept = {"role": "policy", "on_deploy": "keep", "sites": [{"at": {"layers": [1]}, "vector": {"init": "normal"}}]}
    with pytest.raises(UserError, match=r"steering\.on_deploy: keep, but FSDP"):
        main(job(tmp_path, world, steering=kept))


def test_a_folder_with_a_config_and_no_weights(world, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((world / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match="no tokenizer in"):
        main(job(tmp_path, world, model={"path": str(folder)}))
    tiny_tokenizer().save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer's highest id is 63, but the model's embedding has"):
        main(job(tmp_path, world, model={"path": str(folder)}))
    capsys.readouterr()
    for file in (world / "base").glob("tokenizer*"):
        shutil.copy(file, folder)
    main(job(tmp_path, world, model={"path": str(folder), "kind": "causal"}))
    assert f"not checked: model.path {folder}: its weights" in capsys.readouterr().out
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 0}))
    with pytest.raises(UserError, match="num_hidden_layers 0"):
        main(job(tmp_path, world, model={"path": str(folder)}))


def test_a_plan_has_no_dry_run(world, tmp_path):
    from steerl.scripts import plan

    with pytest.raises(UserError, match="dry_run: true, but a plan starts nothing"):
        plan.main(read(plan.PlanJob, ["--model.path", str(world / "base"), "--dry_run", "true"]))
