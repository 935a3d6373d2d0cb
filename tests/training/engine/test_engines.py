"""DDP, DeepSpeed and one process give the same run; what each leaves resumes, loads, and lies in parts where it should."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import adapters
from steerl.rollout.model.policy import Policy
from steerl.training.run.export import check_export
from steerl.training.settings import PPOSettings
from tests import warm
from tests.models import tiny, tiny_policy
from tests.training.engine import engines

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs" / "accelerate"
RUNS = {
    "one": ("one_prompt", "unpadded", "lora_shared", "full", "learned"),
    "one more": ("walks", "pushed"),
    "ddp": ("walks", "lora_shared", "pushed", "learned"),
    "zero1": ("full", "lora_shared", "learned"),
    "zero2": ("full",),
    "zero2 more": ("lora_shared",),
    "zero3": ("one_prompt", "unpadded", "lora_shared", "learned"),
    "zero3 more": ("walks", "full", "pushed"),
    "zero3 alone": ("one_prompt",),
    "zero2 offload": ("full", "lora_shared"),
    "zero3 offload": ("full", "learned"),
    "fsdp2": ("full", "one_prompt", "unpadded"),
    "fsdp2 more": ("walks", "lora_shared"),  # and not learned: steering is not left behind there (check_export)
}
Launched = Callable[[str], Path]


def config_of(engine: str, folder: Path) -> Path:
    """The shipped file; for ZeRO-3 one that cuts the tiniest weight in two, which by default it would keep whole."""
    shipped = CONFIGS / f"{engine.partition(' ')[0]}.yaml"
    offload = engine.endswith(" offload")
    if shipped.stem != "zero3":
        if not offload:
            return shipped
        text = shipped.read_text().replace("  zero_stage: 2", "  zero_stage: 2\n  offload_optimizer_device: cpu")
        (folder / shipped.name).write_text(text)
        return folder / shipped.name
    stage: dict[str, Any] = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    if ranks(engine) == 1:  # and let go of every weight at once, as with a model too large to be kept
        stage |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    if offload:
        stage |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    deepspeed = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": stage}
    (folder / f"{engine}.json").write_text(json.dumps(deepspeed))
    given = yaml.safe_load(shipped.read_text())
    assert given["deepspeed_config"].pop("zero_stage") == 3
    del given["deepspeed_config"]["zero3_save_16bit_model"], given["mixed_precision"]
    given["deepspeed_config"]["deepspeed_config_file"] = str(folder / f"{engine}.json")
    given["num_processes"] = ranks(engine)
    (folder / f"{engine}.yaml").write_text(yaml.safe_dump(given))
    return folder / f"{engine}.yaml"


def ranks(engine: str) -> int:
    return 1 if engine.endswith(" alone") else 2


@pytest.fixture(scope="module")
def launched(made_once: Any, tiny_world: Callable[[str], Path]) -> Launched:
    """`launched("zero3")`: the folder of that engine's runs, made once for all test workers."""

    def make(out: Path, engine: str) -> None:
        program = ["tests/training/engine/engines.py", str(out), str(tiny_world("randomwalks")), ",".join(RUNS[engine])]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if engine.startswith("one"):
            done = warm.run([sys.executable, *program])
        elif engine.startswith("fsdp2"):
            done = warm.run_ranks(*program, "fully_shard")
        else:
            done = warm.run(warm.accelerate_launch(config_of(engine, out), *program), env=environment, timeout=550)
        assert done.returncode == 0, done.stderr[-4000:]

    return lambda engine: made_once(f"engine {engine}", lambda out: make(out, engine))


def measured(run: Path) -> list[dict[str, float]]:
    """The metrics without seconds and memory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines]


def rollouts(out: Path, name: str) -> set[str]:
    """Every row (step, prompt, sample, ids) that a run sampled, on any rank."""
    return {line for file in out.glob(f"{name}.rollouts.*.jsonl") for line in file.read_text().splitlines()}


def check_same(out: Path, one: Path, name: str, engine: str) -> None:
    summary = json.loads((out / name / "summary.json").read_text())
    assert summary["world_size"] == ranks(engine)
    expected, found = measured(one / name), measured(out / name)
    assert len(expected) == len(found) == engines.JOBS[name]["ppo"]["steps"]
    for single, double in zip(expected, found, strict=True):
        assert single.keys() == double.keys()
        for key, value in single.items():
            assert double[key] == pytest.approx(value, abs=1e-4, rel=1e-4), (name, single["step"], key)
    assert rollouts(out, name) == rollouts(one, name) != set()


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """By file and name: what each rank wrote."""
    files = sorted(checkpoint.glob("tensors*.safetensors"))
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def check_resumed(out: Path, name: str) -> None:
    """Bitwise: the metrics and the last checkpoint's every tensor (weights, moments, random states) of the run that went on."""
    whole, again = out / name, out / f"{name}.again"
    assert measured(again) == measured(whole)
    last = [tensors_of(run / "checkpoints/step-000002") for run in (whole, again)]
    assert last[0].keys() == last[1].keys()
    for key, value in last[0].items():
        assert value.dtype == last[1][key].dtype and value.numpy().tobytes() == last[1][key].numpy().tobytes(), key
    assert any("exp_avg_sq" in key for key in last[0]) and (again / "summary.json").exists()


def saved(out: Path, name: str) -> Any:
    """RUN/model, loaded as its users load it."""
    folder = out / name / "model"
    family = engines.JOBS[name]["family"]
    if (folder / "adapter_config.json").exists():
        return adapters.load(tiny(family), folder)
    kind = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    return kind.from_pretrained(folder).eval()


def law(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 9, 13, 20, 3, 7]])
    with torch.no_grad():
        outputs = model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return outputs.logits.log_softmax(-1)


def check_engine(out: Path, name: str, engine: str) -> None:
    found = json.loads((out / f"{name}.engine.json").read_text())
    wrapper = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPActorCritic"}.get(engine.partition(" ")[0], "DeepSpeedEngine")
    assert found["wrapper"] == wrapper and found["weights"] > 20
    engine, _, how = engine.partition(" ")
    if engine.startswith("zero"):
        assert found["optimizer"] == "DeepSpeedZeroOptimizer" + ("_Stage3" if engine == "zero3" else "")
    # This rank has half of every weight; but of the value head, which is one row, all or nothing under FSDP.
    halves, whole = (sum(low < share <= high for share in found["shares"]) for low, high in ((0.3, 0.7), (0.7, 1.0)))
    odd = None if how == "alone" else {"zero3": 1, "fsdp2": 2}.get(engine)
    assert halves >= found["weights"] - odd if odd is not None else whole == found["weights"]
    assert found["empty"] == (found["weights"] if engine == "zero3" else 0)


def check(engine: str, launched: Launched) -> None:
    out = launched(engine)
    for name in RUNS[engine]:
        one = launched("one" if name in RUNS["one"] else "one more")
        check_engine(out, name, engine)
        check_same(out, one, name, engine)
        # Not weight by weight: a key's bias has no gradient but rounding, which Adam blows up to steps that change nothing.
        assert torch.allclose(law(saved(out, name)), law(saved(one, name)), atol=1e-4), name
        if name in engines.RESUMED:
            check_resumed(out, name)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_two_ranks_of_every_engine_equal_one_process_and_resume_bitwise(engine: str, launched: Launched) -> None:
    check(engine, launched)


@pytest.mark.slow
def test_zero_3_with_one_process_leaves_whole_weights_too(launched: Launched) -> None:
    """Its weights are empty outside a forward pass then as well, all their parts on the one rank."""
    check("zero3 alone", launched)


@pytest.mark.proofs
@pytest.mark.parametrize("engine", ["ddp", "zero1", "zero2 more", "zero3 more", "fsdp2 more", "zero2 offload", "zero3 offload"])
def test_other_engines_and_jobs_too(engine: str, launched: Launched) -> None:
    check(engine, launched)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_shared"])
def test_a_checkpoint_of_two_zero3_ranks_goes_on_in_one_process(
    name: str, launched: Launched, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, one = launched("zero3"), launched("one")
    engines.cut(out / name, tmp_path / name)
    with caplog.at_level(logging.WARNING):
        engines.run(engines.JOBS[name], tmp_path, name, tmp_path, resume=True)
    assert "was written by 2 process(es) (ZeRO-3), this run has 1 (whole weights)" in caplog.text
    assert "not bitwise" in caplog.text
    for expected, found in zip(measured(one / name), measured(tmp_path / name), strict=True):
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-4)


def test_every_accelerate_config_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {"cpu": "NO", "ddp": "MULTI_GPU", "zero1": "DEEPSPEED", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    assert {path.stem for path in CONFIGS.iterdir()} == set(kinds)
    for name, kind in kinds.items():
        config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
        assert config.distributed_type == kind and config.num_processes == (1 if name == "cpu" else 2)
        assert config.deepspeed_config.get("zero_stage") == (int(name[-1]) if name.startswith("zero") else None)
    assert config_fsdp()["fsdp_version"] == 2


def test_what_fsdp_cannot_leave_behind_is_said_at_once() -> None:
    fsdp, ddp = SimpleNamespace(distributed_type="DistributedType.FSDP"), SimpleNamespace(distributed_type="DistributedType.NO")
    steering: Any = SimpleNamespace(role="policy", spec=SimpleNamespace(on_deploy="keep"))
    base = tiny_policy("qwen3", tie_word_embeddings=True)
    model = adapters.add(base.model, {"peft_type": "LORA", "r": 2, "target_modules": ["embed_tokens"]})
    steered: Any = SimpleNamespace(steering=steering, actor=model, policy=Policy.of(model, base.tokenizer))
    untied = tiny_policy("qwen3")
    plain: Any = SimpleNamespace(steering=None, actor=untied.model, policy=untied)
    with pytest.raises(UserError) as caught:
        check_export(steered, fsdp, PPOSettings(export_merged=True))
    assert [line.split(":")[0] for line in caught.value.lines] == ["ppo.export_merged", "steering.on_deploy"]
    check_export(plain, fsdp, PPOSettings(export_merged=True))
    check_export(steered, ddp, PPOSettings(export_merged=True))


def config_fsdp() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONFIGS / "fsdp2.yaml").read_text())["fsdp_config"]
    return found
