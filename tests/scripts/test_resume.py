"""Runs that are killed and go on: bitwise the weights, metrics and samples of a run that nobody disturbed. Real processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerl.rollout.common.fingerprint import sha256_file
from steerl.rollout.common.run_folder import LOCK
from steerl.training.run import checkpoint
from tests import warm
from tests.models import tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = 30
REWARD = """
def vowels(prompts, completions, **columns):
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]
"""
TINY = """
sampling: {max_new_tokens: 6, batch_size: 8}
ppo: {rollouts_per_step: 8, epochs: 2, minibatches: 2, micro_batch_size: 4, learning_rate: 0.003, kl_target: 0.5,
      kl_horizon: 100, eval_prompts: 2, schedule: linear, whiten_rewards: true}
run: {save_every: 4}
"""


SMALL_FILES = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (60 * 1024, 60 * 1024))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Everything that a run reads."""
    folder = tmp_path_factory.mktemp("job")
    for family in ("gpt2", "llama"):
        tiny(family, 0).save_pretrained(folder / family)
        tiny_tokenizer(64).save_pretrained(folder / family)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in "abcdefg"))
    (folder / "reward.py").write_text(REWARD)
    (folder / "job.yaml").write_text(TINY)
    return folder


def command(job, run, *flags, steps=STEPS, family="gpt2"):
    reward = json.dumps([{"name": "vowels", "kind": "function", "function": f"{job / 'reward.py'}:vowels"}])
    return [
        "scripts/train_ppo.py", "--config", str(job / "job.yaml"), "--model.path", str(job / family), "--reward", reward,
        "--prompts.path", str(job / "prompts.jsonl"), "--ppo.steps", str(steps), "--run.dir", str(run), *flags,
    ]  # fmt: skip


def start(*arguments, launcher=(sys.executable,), **options):
    return warm.start([*launcher, *arguments], **options)


def finish(*arguments, status=0, **options):
    process = start(*arguments, **options)
    out, err = process.communicate()
    assert process.returncode == status, err[-3000:]
    return out + err


def size(run):
    """How far a run has come, in bytes of its log."""
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def kill_at(process, run, wanted, number=signal.SIGKILL):
    """Send the signal as soon as the log has grown to `wanted` bytes, whatever the run is at just then."""
    waiting = threading.Event()
    while process.poll() is None and size(run) < wanted:
        waiting.wait(0.001)
    process.send_signal(number)
    return process.communicate()


def lines(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def measured(run):
    """The metrics without seconds and memory, which no two runs share."""
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines(run)]


def weights(run):
    """Every tensor of the model by file and name. Not the files' bytes: the order of their metadata is left to chance."""
    files = sorted((run / "model").glob("*.safetensors"))
    return {f"{path.name}/{name}": value.numpy().tobytes() for path in files for name, value in load_file(path).items()}


def last_tensors(run):
    return sha256_file(max((run / "checkpoints").iterdir()) / "tensors.safetensors")


def assert_same(run, whole):
    """Bitwise: what was measured and said, the weights, every tensor of the last checkpoint (moments, random states)."""
    assert measured(run) == measured(whole)
    assert (run / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert weights(run) == weights(whole) and weights(run)
    assert last_tensors(run) == last_tensors(whole)
    for name, value in json.loads((whole / "summary.json").read_text()).items():
        if name != "seconds":
            assert json.loads((run / "summary.json").read_text())[name] == value


@pytest.fixture(scope="module")
def whole(job):
    """The undisturbed run."""
    finish(*command(job, job / "whole"))
    assert [line["step"] for line in lines(job / "whole")] == list(range(1, STEPS + 1))
    return job / "whole"


def disturbed(job, whole, run, seed, kills):
    """A run killed `kills` times, each time at a random place of what is left, and finished."""
    draw = random.Random(seed)
    places = sorted(draw.uniform(0, size(whole)) for _ in range(kills))
    for place in places:
        process = start(*command(job, run, "--run.resume", "true"))
        kill_at(process, run, place)
        assert process.returncode == -signal.SIGKILL
    finish(*command(job, run, "--run.resume", "true"))
    assert_same(run, whole)


@pytest.mark.slow
def test_five_kills_at_random_instants_leave_no_trace(job, whole, tmp_path):
    disturbed(job, whole, tmp_path / "run", seed=0, kills=5)


@pytest.mark.proofs
@pytest.mark.parametrize("seed", range(1, 5))
def test_twenty_more_kills_leave_no_trace(job, whole, tmp_path, seed):
    disturbed(job, whole, tmp_path / "run", seed, kills=5)


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGTERM, marks=pytest.mark.proofs)]
)
def test_a_signal_saves_and_leaves_with_status_75(job, whole, tmp_path, number):
    run = tmp_path / "run"
    process = start(*command(job, run))
    out, err = kill_at(process, run, size(whole) * 0.3, number)
    assert process.returncode == 75, err
    done = len(lines(run))
    assert max((run / "checkpoints").iterdir()).name == f"step-{done:06d}" and done < STEPS
    assert "--run.resume true" in err and not (run / "summary.json").exists()
    finish(*command(job, run, "--run.resume", "true"))
    assert_same(run, whole)


@pytest.mark.slow
def test_a_finished_run_is_left_alone_and_a_changed_config_named(job, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert "finished" in finish(*command(job, run, "--run.resume", "true"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    flags = ("--run.resume", "true", "--ppo.clip", "0.3", "--sampling.seed", "5", "--run.keep", "7")
    for steps in (STEPS, STEPS + 1):
        told = finish(*command(job, run, *flags, steps=steps), status=2)
        named = {line.split(":")[0] for line in told.splitlines() if "run to resume" in line}
        # The schedule is linear, so that the number of steps matters.
        assert named == {"ppo.clip", "sampling.seed"} | ({"ppo.steps"} if steps > STEPS else set()), told
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_run(job, whole, tmp_path):
    run = tmp_path / "run"
    process = start(*command(job, run))
    kill_at(process, run, size(whole) * 0.6)
    newest = max((run / "checkpoints").glob("step-*"))
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1])
    told = finish(*command(job, run, "--run.resume", "true"))
    assert newest.name in told and "damaged" in told
    assert_same(run, whole)


@pytest.mark.slow
def test_a_full_disk_while_saving_is_one_line_and_the_run_goes_on_later(job, whole, tmp_path):
    run = tmp_path / "run"
    small = (sys.executable, "-c", SMALL_FILES)
    told = finish(*command(job, run), launcher=small, status=2)
    problem = [line for line in told.splitlines() if "cannot be written" in line]
    assert len(problem) == 1 and "step-000004" in problem[0] and "Traceback" not in told
    assert list((run / "checkpoints").iterdir()) == []
    finish(*command(job, run, "--run.resume", "true"))
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.proofs
@pytest.mark.parametrize("value", ["separate", "shared"])
def test_with_an_adapter_only_it_is_saved_and_the_run_is_the_same(job, tmp_path, value):
    peft = json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1})
    flags = ("--model.peft", peft, "--ppo.value", value)
    finish(*command(job, tmp_path / "whole", *flags, steps=8, family="llama"))
    process = start(*command(job, tmp_path / "run", *flags, steps=8, family="llama"))
    kill_at(process, tmp_path / "run", size(tmp_path / "whole") * 0.7)
    finish(*command(job, tmp_path / "run", *flags, "--run.resume", "true", steps=8, family="llama"))
    assert_same(tmp_path / "run", tmp_path / "whole")
    from safetensors import safe_open

    with safe_open(max((tmp_path / "run" / "checkpoints").iterdir()) / "tensors.safetensors", "pt") as file:
        policy = [name for name in file.keys() if name.startswith(("weights/actor", "weights/critic"))]  # noqa: SIM118
    assert any("lora_" in name for name in policy)
    assert all("lora_" in name or "inv_freq" in name for name in policy), policy


@pytest.mark.proofs
def test_steering_under_a_kl_budget_goes_on_with_its_scale(job, tmp_path):
    vector = {"0": torch.randn(32, generator=torch.Generator().manual_seed(0))}
    save_file(vector, job / "vector.safetensors")
    site = {"name": "push", "at": {"layers": [0]}, "op": {"type": "add"}, "vector": {"file": str(job / "vector.safetensors")}}
    spec = {
        "role": "policy",
        "sites": [site | {"strength": 0.5}],
        "kl_budget": {"nats_per_sequence": 0.05, "action": "rescale"},
    }
    flags = ("--steering", json.dumps(spec))
    finish(*command(job, tmp_path / "whole", *flags, steps=10))
    process = start(*command(job, tmp_path / "run", *flags, steps=10))
    kill_at(process, tmp_path / "run", size(tmp_path / "whole") * 0.7)
    finish(*command(job, tmp_path / "run", *flags, "--run.resume", "true", steps=10))
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert lines(tmp_path / "run")[-1]["steering/scale"] < 1


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), pytest.param(signal.SIGKILL, marks=pytest.mark.proofs)]
)
def test_two_processes_go_on_as_two_would_have(job, tmp_path, number):
    """The launcher and both ranks get the signal at once: a kill, or Ctrl-C, which the launcher passes on once more."""

    def run_two(run, *more):
        done = warm.run_ranks(*command(job, run, *more, steps=8))
        assert done.returncode == 0, done.stderr[-3000:]

    run_two(tmp_path / "whole")
    process = start(*command(job, tmp_path / "run", steps=8), launcher=warm.accelerate_launch("ddp"), start_new_session=True)
    waiting = threading.Event()
    while process.poll() is None and size(tmp_path / "run") < 0.7 * size(tmp_path / "whole"):
        waiting.wait(0.001)
    os.killpg(process.pid, number)
    out, err = process.communicate()
    if number == signal.SIGINT:
        done = len(lines(tmp_path / "run"))
        assert process.returncode and f"stopped after step {done} of 8 and saved" in err, err
        assert max((tmp_path / "run" / "checkpoints").iterdir()).name == f"step-{done:06d}"
        written = checkpoint.read(tmp_path / "run" / "checkpoints" / f"step-{done:06d}")
        assert len(written["tree"]["random"]) == 2, "as many processes as the launcher was to start"
    assert not (tmp_path / "run" / LOCK).exists() or number == signal.SIGKILL
    run_two(tmp_path / "run", "--run.resume", "true")
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
