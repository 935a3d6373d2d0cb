"""PPO on a GPU: what a step measures, one engine's run against a plain one, memory that stays, settings that save some."""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.model.policy import Policy
from steerl.rollout.types import Rollout, Texts
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from tests.gpu.bounds import MEAN, WIDE, WORST, exact, policy_on
from tests.gpu.conftest import only_cuda
from tests.models import tiny
from tests.ppo_runs import prompts_of, share_of_threes

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def ran(folder: Path, policy: Policy, reward: Any = share_of_threes, sampling: Any = None, engine: Any = None, **settings: Any):
    """The run's folder, with all rows of all steps in samples.jsonl."""
    small = {"steps": 2, "rollouts_per_step": 16, "minibatches": 2, "epochs": 2, "micro_batch_size": 4, "learning_rate": 1e-4,
             "eval_prompts": 0, "samples": 16}  # fmt: skip
    drawn = Sampling(**{"max_new_tokens": 12, "stop_ids": [11, 17, 23], **(sampling or {})})
    ppo = PPOSettings(**{**small, **settings})
    train(policy, prompts_of(policy), reward, drawn, ppo, RunSettings(dir=str(folder), save_every=10**6), engine=engine)
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def law(model: torch.nn.Module) -> torch.Tensor:
    """What the weights say, on the CPU in float32."""
    ids = torch.tensor([[5, 9, 13, 20, 31, 7, 40, 41]])
    with torch.no_grad():
        logprobs: torch.Tensor = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    return logprobs


def test_a_step_in_half_precision_measures_what_it_should(device, tmp_path, record_property):
    """With a learning rate of 0 the ratio of new and old is 1 but for the rounding of two passes of other shapes; old log-probs
    are the exact ones, and the gap is the difference of two numbers that are each as near."""
    policy = policy_on(device, torch.bfloat16)
    model = exact(policy)
    folder = ran(tmp_path, policy, learning_rate=0.0, steps=1)
    rows, (metrics,) = lines(folder / "samples.jsonl"), lines(folder / "metrics.jsonl")
    far: list[float] = []
    for row in rows:
        ids, first = torch.tensor([row["prompt_ids"] + row["response_ids"]]), len(row["prompt_ids"])
        with torch.no_grad():
            right = model(input_ids=ids, use_cache=False).logits[0, first - 1 : -1].double().log_softmax(-1)
        right = right.gather(1, ids[0, first:, None])[:, 0]
        old, gap = (torch.tensor(row[key], dtype=torch.float64) for key in ("policy_logprobs", "gap"))
        far += [*(old - right).abs().tolist(), *(old + gap - right).abs().tolist()]
        assert all(abs(ratio - 1) < WORST for ratio in row["ratio"])
    found = {"gap_mean": metrics["gap/mean"], "gap_max": metrics["gap/max"], "ratio_mean": metrics["ppo/ratio_mean"]}
    for name, value in found.items():
        record_property(name, value)
    assert sum(far) / len(far) < MEAN and max(far) < WORST
    assert found["gap_max"] < 2 * WORST and found["gap_mean"] < 2 * MEAN and abs(found["ratio_mean"] - 1) < MEAN


# -- FSDP2 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_fsdp2_by_accelerate_on_one_gpu_is_one_process(device, tmp_path, precision, record_property):
    """The shipped configuration, one process, four steps. In float32 both do the same sums, and Adam's steps of 1e-3 blow up
    what rounding there is to a few 1e-5 of a log-prob. In bfloat16 FSDP casts weights and autocast casts products: a draw differs
    now and then, and from there on the runs are two; so it is the first step that is compared, to what one row in ten moves."""
    program = ["tests/training/engine/engines.py", str(tmp_path / "fsdp"), str(tmp_path), "full"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--num_processes", "1"]
    launch += ["--mixed_precision", precision, "--config_file", "configs/accelerate/fsdp2.yaml"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    outside["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    one = {**outside, "ACCELERATE_MIXED_PRECISION": precision}
    commands = [(launch + program, outside), ([sys.executable, program[0], str(tmp_path / "one"), *program[2:]], one)]
    started = [
        subprocess.Popen(command, cwd=ROOT, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command, given in commands
    ]  # at once: each is mostly its start
    said = [process.communicate(timeout=240)[1] for process in started]
    for process, words in zip(started, said, strict=True):
        assert process.returncode == 0, words[-2000:]
    if device.type == "cuda":
        engine = json.loads((tmp_path / "fsdp" / "full.engine.json").read_text())
        assert engine["wrapper"].startswith("FSDP") and engine["weights"] > 20, engine
    laws = [law(saved(tmp_path / name / "full" / "model")) for name in ("fsdp", "one")]
    first = [lines(tmp_path / name / "full" / "metrics.jsonl")[0] for name in ("fsdp", "one")]
    apart, moved = (laws[0] - laws[1]).abs().amax(), (laws[1] - law(tiny("gpt2"))).abs().amax()
    entropies = abs(first[0]["policy/entropy"] - first[1]["policy/entropy"])
    for name, value in (("apart", apart), ("moved", moved), ("entropies", entropies), ("gap_mean", first[0]["gap/mean"])):
        record_property(name, float(value))
    assert moved > 0.3, "nothing was learned that could differ"
    assert entropies < (1e-4 if precision == "no" else 0.1) and first[0]["gap/mean"] < (1e-4 if precision == "no" else 0.1)
    assert precision == "bf16" or apart < 1e-3


def saved(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


# -- memory -----------------------------------------------------------------------------------------------------------


def held(device: torch.device) -> tuple[int, int]:
    """(bytes in use now, the most so far): on a GPU the allocator's, on a CPU those of all tensors that are alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values()), 0


@pytest.mark.parametrize("compiles", [False, True])
def test_memory_is_flat_over_fifty_steps(device, tmp_path, compiles, record_property):
    """Every step has rows of the same lengths, so it takes the same memory: in use after step 5 and step 50, and the most up to
    them, are equal but for a block or two of the allocator (2 MB)."""
    steps, early = (50, 5) if device.type == "cuda" else (8, 3)
    policy = dataclasses.replace(policy_on(device, torch.bfloat16), eos_ids=())
    seen: list[tuple[int, int]] = []

    def reward(rollout: Rollout, texts: Texts) -> Any:
        seen.append(held(device))
        return share_of_threes(rollout, texts)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    sampling = {"stop_ids": [], "compile": compiles}
    ran(tmp_path, policy, reward, sampling, steps=steps, rollouts_per_step=8, epochs=1, samples=0)
    (now, most), (later, later_most) = seen[early], seen[-1]
    for name, value in (("mb_early", now), ("mb_late", later), ("peak_mb_early", most), ("peak_mb_late", later_most)):
        record_property(name, value / 2**20)
    assert len(seen) == steps
    assert later - now <= 2 * 2**21 and later_most - most <= 2 * 2**21


# -- settings that save memory or time --------------------------------------------------------------------------------


def with_setting(name: str, value: Any) -> dict[str, Any]:
    if name not in {field.name for field in dataclasses.fields(PPOSettings)}:
        pytest.skip(f"there is no setting ppo.{name}")
    return {name: value}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_learn_what_rows_alone_learn(device, tmp_path, dtype, record_property):
    """The same rows, packed and not: after a step the old log-probs are within rounding, and so is what was learned."""
    packing = with_setting("packing", True)
    found = {}
    for name, settings in (("packed", packing), ("padded", {})):
        policy = policy_on(device, dtype)
        before = law(exact(policy))
        try:
            folder = ran(tmp_path / name, policy, steps=1, learning_rate=1e-3, **settings)
        except UserError as problem:
            if "ppo.packing" not in problem.lines[0]:
                raise
            pytest.skip(f"refused: {problem.lines[0]}")
        rows = lines(folder / "samples.jsonl")
        found[name] = ({(row["row"], row["kind"]): row["policy_logprobs"] for row in rows}, law(exact(policy)), before)
    (packed, learned, before), (padded, expected, _) = found["packed"], found["padded"]
    mean, worst = (1e-4, 1e-4) if dtype == torch.float32 else (MEAN, WORST)
    far = [abs(a - b) for key in padded for a, b in zip(packed[key], padded[key], strict=True)]
    record_property("worst", max(far))
    assert sum(far) / len(far) < mean and max(far) < worst
    apart, moved = (learned - expected).abs().mean(), (expected - before).abs().mean()
    record_property("apart_of_moved", float(apart / moved))
    assert apart < (0.02 if dtype == torch.float32 else 0.5) * moved


def test_offloaded_activations_learn_what_kept_ones_learn(device, tmp_path, record_property):
    """Rows long enough to be worth a copy. The sums are the same; kernels that add in no fixed order may move a few digits."""
    offload = with_setting("offload_activations", True)
    only_cuda(device, "a host beside the device")
    laws = {}
    for name, settings in (("offloaded", offload), ("kept", {})):
        policy = policy_on(device, torch.float32)
        before = law(exact(policy))
        torch.cuda.reset_peak_memory_stats()
        long = {"max_new_tokens": 100, "stop_ids": []}
        ran(tmp_path / name, policy, sampling=long, steps=1, micro_batch_size=16, minibatches=1, learning_rate=1e-3, **settings)
        laws[name] = law(exact(policy))
        record_property(f"{name}_peak_mb", torch.cuda.max_memory_allocated() / 2**20)
    apart, moved = (laws["offloaded"] - laws["kept"]).abs().mean(), (laws["kept"] - before).abs().mean()
    record_property("apart_of_moved", float(apart / moved))
    assert apart < 0.02 * moved


# -- vLLM -------------------------------------------------------------------------------------------------------------


def test_rows_of_a_vllm_server_on_the_gpu_are_the_policys(device, tmp_path, record_property):
    """Two steps with rows of a server in bfloat16: the gap is that of two passes in half precision, before and after the
    server got new weights."""
    own = ROOT / ".venv-vllm" / "bin" / "python"
    python = str(own) if own.exists() else sys.executable if importlib.util.find_spec("vllm") else None
    if python is None:
        pytest.skip("vllm is not installed")
    only_cuda(device, "this (tests marked vllm have a CPU's)")
    policy = policy_on(device, torch.bfloat16, **{**WIDE, "hidden_size": 256, "head_dim": 64})
    engine = EngineSettings(kind="vllm", python=python)
    folder = ran(tmp_path, policy, engine=engine, gap_tolerance=2 * WORST, learning_rate=1e-3)
    for step, metrics in enumerate(lines(folder / "metrics.jsonl")):
        record_property(f"gap_mean_{step}", metrics["gap/mean"])
        assert metrics["gap/mean"] < 2 * MEAN
