"""The recipes: each passes a dry run, fits the machine that it names, and says what the plan says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from steerl.configs.reader import read

import pytest
import yaml

from steerl.rollout.engines.vllm import support
from steerl.rollout.model.policy import ModelSettings
from steerl.scripts import plan, train_ppo
from steerl.training.planning.passes import Blueprint, count
from tests.recipes import MODELS, RECIPES, ROOT, WEIGHTS, Launch, folder_of, model_of, planned, table_line

by_name = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("model", MODELS)
def test_the_facts_of_a_model_give_the_weights_that_its_makers_count(model, models):
    assert count(Blueprint.of(ModelSettings(path=str(folder_of(model, models))))).all == WEIGHTS[model]


@by_name
def test_a_recipe_passes_a_dry_run(recipe, models, tmp_path, monkeypatch, capsys):
    """From any folder, by its name; of the hub's names only the model is here, as a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(support, "check_interpreter", lambda python: None)  # make vllm builds it
    argv = ["--config", f"steerl:recipes/{recipe.stem}", "--run.dir", "run", "--dry_run", "true"]
    train_ppo.main(read(train_ppo.PPOJob, [*argv, "--model.path", str(folder_of(model_of(recipe), models))]))
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("checked: model.path") for line in said)
    assert "checked: settings, each by itself and together" in said
    open_ = {line.split()[2].rstrip(":") for line in said if line.startswith("not checked: ")}
    assert (
        {"prompts.path", "heldout.path"}
        <= open_
        <= {"prompts.path", "heldout.path", "model.path", "reward[0]", "engine.url", "model.quantization"}
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@by_name
def test_a_recipe_fits_and_says_the_plans_memory(recipe, models):
    """Within a percent: `python -m tests.recipes` writes it anew."""
    row, launch = planned(recipe, models), Launch.of(recipe)
    assert row.fits
    written, now = ((text, float(re.findall(r"[\d.]+(?= GB)", text)[0])) for text in (launch.planned, row.said))
    assert written[0].replace(f"{written[1]}", f"{now[1]}") == now[0]
    assert written[1] == pytest.approx(now[1], rel=0.01)
    assert table_line(recipe, row).rpartition("| ")[0] in (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")


@by_name
def test_the_two_commands_of_a_recipe_speak_of_the_same_machines(recipe):
    launch, name = Launch.of(recipe), f"steerl:recipes/{recipe.stem}"
    flags = dict(zip(launch.plan[::2], launch.plan[1::2], strict=True))
    assert (ROOT / launch.flag("--config_file")).is_file()
    assert int(launch.flag("--num_processes")) == int(flags["--gpus"]) * int(flags.get("--nodes", "1"))
    assert launch.flag("--num_machines") == flags.get("--nodes", "1")
    assert launch.flag("--mixed_precision") == "bf16"
    assert flags["--config"] == launch.flag("--config") == name
    prompt = yaml.safe_load(recipe.read_text())["prompts"]["max_tokens"]
    assert int(flags.get("--prompt_tokens", "256")) == prompt


@pytest.mark.slow
def test_the_plan_itself_takes_the_job_that_all_start_with(models, capsys):
    recipe = ROOT / "configs" / "recipes" / "llama-3-8b-helpful.yaml"
    argv = [*Launch.of(recipe).plan, "--model.path", str(folder_of(model_of(recipe), models)), "--json", "true"]
    plan.main(read(plan.PlanJob, argv))
    told = json.loads(capsys.readouterr().out)
    assert told["advice"] and {told["advice"]["engine"], *told["engines"]} >= {"zero3", "fsdp2"}
