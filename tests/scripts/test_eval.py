"""The evaluation command: beside the harness's own command line and its Python interface, and what it says of what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from steerl.configs.reader import run_command

import pytest
import torch
import yaml

from steerl.scripts.eval import EvalJob, main
from tests import warm
from tests.models import tiny, tiny_tokenizer

pytest.importorskip("lm_eval")
import lm_eval
from lm_eval.utils import make_table

import steerl.rollout.evaluation.harness  # noqa: F401  registers the model
from steerl.rollout.evaluation.tasks import Tasks

SHIPPED = Path(__file__).parents[1] / "rollout" / "evaluation" / "tasks"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a steering beside it, as a run leaves them, and the tiny tasks."""
    base = tmp_path_factory.mktemp("eval")
    (base / "tasks").mkdir()
    for file in SHIPPED.iterdir():
        (base / "tasks" / file.name).write_text(file.read_text(encoding="utf-8").replace("DATA", str(base / "tasks")))
    tiny("llama").save_pretrained(base / "run" / "model")
    tiny_tokenizer().save_pretrained(base / "run" / "model")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist()
    site = {"at": {"layers": [1], "component": "block_output"}, "op": {"type": "add"}, "strength": 3.0, "vector": vector}
    (base / "run" / "model" / "steering.yaml").write_text(yaml.safe_dump({"steering": {"sites": [site]}}))
    return base


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code: Any = 0
    try:
        run_command(main, EvalJob, argv)
    except SystemExit as left:
        code = left.code
    return code or 0, *capsys.readouterr()


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    return {
        f"{task} {key}": pytest.approx(value, rel=1e-4)
        for task, values in results["results"].items()
        for key, value in values.items()
        if isinstance(value, float)
    }


def flags(place: Path, *more: str) -> list[str]:
    return [
        "--model.path",
        str(place / "run/model"),
        "--eval.tasks",
        "tiny_all",
        "--eval.include_path",
        str(place / "tasks"),
        *more,
    ]


def test_three_ways_give_one_result(place, tmp_path, capsys):
    """The command, the harness's Python interface and the harness's own command line, steered."""
    steering = str(place / "run/model/steering.yaml")
    code, out, err = run(
        capsys,
        *flags(
            place,
            "--steering",
            steering,
            "--run.dir",
            str(tmp_path / "out"),
            "--eval.log_samples",
            "true",
            "--eval.batch_size",
            "3",
        ),
    )
    assert code == 0 and "lies beside" not in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        "results.json", *(f"samples_{name}.jsonl" for name in ("tiny_choice", "tiny_read", "tiny_write")),
    ]  # fmt: skip
    ours = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "tiny_choice" in make_table(ours)
    assert "tiny_choice  acc" in out and "(5 documents, 0-shot)" in out
    assert ours["config"]["model_args"]["path"] == str(place / "run/model") and ours["config"]["steering"]
    asked = Tasks(["tiny_all"], [str(place / "tasks")])
    model = {"pretrained": str(place / "run/model"), "steering": steering}
    by_hand = lm_eval.simple_evaluate("steerl", model, tasks=asked.names, task_manager=asked, batch_size="2", device="cpu")
    assert numbers(by_hand) == numbers(ours)
    harness = [sys.executable, "-m", "steerl.rollout.evaluation", "run", "--model", "steerl", "--model_args"]
    harness += [
        f"path={place / 'run/model'},steering={steering}",
        "--tasks",
        "tiny_all",
        "--include_path",
        str(place / "tasks"),
    ]
    done = warm.run([*harness, "--output_path", str(tmp_path / "theirs")])
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(file.read_text())
    assert numbers(theirs) == numbers(ours) != {}
    # The same keys: whoever reads theirs reads ours.
    assert set(theirs) - set(ours) == set() and set(theirs["config"]) == set(ours["config"])


def test_a_run_by_its_folder(place, capsys):
    """Its model, plain: the steering that lies there is named, and results go beside it."""
    argv = [str(place / "run"), "--eval.tasks", "tiny_choice,tiny_read", "--eval.include_path", str(place / "tasks")]
    code, _, err = run(capsys, *argv, "--eval.limit", "2")
    assert code == 0 and "steering.yaml lies beside the model and is not applied; --steering" in err
    plain = json.loads((place / "run-eval/results.json").read_text())
    assert set(plain["results"]) == {"tiny_choice", "tiny_read"} and plain["n-samples"]["tiny_choice"]["effective"] == 2
    code, _, err = run(capsys, *argv)
    assert code == 2 and "run-eval is not empty; add" in err
    code, _, _ = run(
        capsys, *argv, "--steering", str(place / "run/model/steering.yaml"), "--eval.limit", "2", "--run.overwrite", "true"
    )
    steered = json.loads((place / "run-eval/results.json").read_text())
    key = "byte_perplexity,none"
    assert code == 0 and steered["results"]["tiny_read"][key] != plain["results"]["tiny_read"][key]


def test_two_processes_share_the_documents(place, tmp_path):
    argv = ["-m", "steerl.scripts.eval", *flags(place, "--eval.gen_kwargs", "{do_sample: true, temperature: 1.0}")]
    done = warm.run_ranks(*argv, "--run.dir", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results.json") == 1
    one = warm.run([sys.executable, *argv, "--run.dir", str(tmp_path / "one")])
    assert one.returncode == 0, one.stderr
    two, alone = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert numbers(two) == numbers(alone)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--eval.tasks", "tiny_choise"], "eval.tasks: there is no task 'tiny_choise'; did you mean tiny_choice?"),
        (["--eval.include_path", "nowhere"], "eval.include_path: nowhere is no folder"),
        (["--eval.tasks", ""], "eval.tasks: missing; name what is asked"),
        (["--eval.tasks", "tiny_choice", "--eval.gen_kwargs", "{top_k: 3}"], "eval.gen_kwargs: has no effect, for none of the tasks"),
        (["--eval.apply_chat_template"], "eval.apply_chat_template: the tokenizer has no chat template"),
        (["--eval.fewshot_as_multiturn", "false"], "eval.fewshot_as_multiturn: has no effect without"),
        (["--eval.limit", "0"], "eval.limit: expected more than 0, found 0"),
        (["--model.peft", "{peft_type: LORA}"], "model.peft: says what training adds"),
        (["--model.path", "/nowhere"], "model.path"),
        (["--steering", "{role: preventative, sites: [{at: {layers: [0]}, op: {type: zero}}]}"], "steering.role: preventative acts while PPO learns"),
        (["--run.dir", ""], "run.dir: missing"),
        (["--eval.gen_kwargs", "{num_beams: 4}"], "gen_kwargs: num_beams: not known here"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_line(place, tmp_path, capsys, more, said):
    out = ["--run.dir", str(tmp_path / "out")]
    code, _, err = run(capsys, *flags(place, *out, *more))
    lines = [line for line in err.splitlines() if said in line]
    assert code == 2 and lines, err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists() or not any(path.name[0] != "." for path in (tmp_path / "out").iterdir())


def test_a_task_that_cannot_be_had(place, tmp_path, capsys, monkeypatch):
    (place / "tasks" / "far.yaml").write_text(
        "{task: far, dataset_path: some/where, output_type: generate_until, test_split: test, doc_to_text: x}"
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = run(capsys, *flags(place, "--eval.tasks", "far", "--run.dir", str(tmp_path / "out")))
    assert code == 2 and "eval.tasks: far: " in err and "HF_HUB_OFFLINE is set" in err
    assert len([line for line in err.splitlines() if "eval.tasks" in line]) == 1


def test_results_that_cannot_be_written(place, tmp_path, capsys, monkeypatch):
    """The harness's writer swallows what goes wrong; nothing is left that looks like a result."""

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("lm_eval.loggers.evaluation_tracker.Path.write_text", full)
        from steerl.rollout.common import run_folder

        disk.setattr(run_folder, "write_text", lambda path, text: path.write_bytes(text.encode()))
        code, _, err = run(capsys, *flags(place, "--eval.tasks", "tiny_read", "--run.dir", str(tmp_path / "out")))
    assert code == 2 and "out: the results could not be written" in err
    assert [path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."] == []


def test_without_the_package(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, *flags(place, "--run.dir", str(tmp_path / "out")))
    assert code == 2 and "pip install 'steerl[eval]'" in err
