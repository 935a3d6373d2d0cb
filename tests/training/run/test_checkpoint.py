"""Checkpoints: bitwise round trips, damage found and named, whole or not there at every instant, no pickle."""

from __future__ import annotations

import json
import logging
import pickle
import random
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.weights import parts
from steerl.rollout.weights.files import TensorFile
from steerl.training.algorithm.kl import AdaptiveKL
from steerl.training.run import checkpoint, resume
from steerl.training.types import TrainState
from tests import warm
from tests.models import tiny


def make_state(seed: int = 0, family: str = "gpt2") -> TrainState:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"policy": tiny(family, seed=seed), "value": nn.Linear(32, 1)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return TrainState(model=model, optimizer=optimizer, accelerator=None, kl=AdaptiveKL(0.1 / 3, 6.0, 10.0), reward=None)


def learn(state: TrainState, steps: int = 1) -> None:
    """Updates that draw from the global generators, so that a lost random state shows."""
    state.model.train()
    for _ in range(steps):
        ids = torch.randint(3, 60, (2, 8 + random.randrange(3)))
        weight = float(numpy.random.rand())
        hidden = state.model["policy"](ids, output_hidden_states=True)
        loss = weight * hidden.logits.square().mean() + state.model["value"](hidden.hidden_states[-1]).square().mean()
        state.optimizer.zero_grad()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        state.kl.update(7.1, 3)


def bits(state: TrainState) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in state.model.state_dict().items()}


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_future_of_a_loaded_state_is_bitwise_that_of_the_saved_one(tmp_path, family):
    state = make_state(0, family)
    random.seed(5), numpy.random.seed(6), torch.manual_seed(7)
    learn(state, 3)
    path = checkpoint.save(tmp_path, 3, state, config={"a": 1})
    learn(state, 3)
    other = make_state(1, family)
    torch.manual_seed(99), random.seed(98), numpy.random.seed(97)
    learn(other, 1)
    assert bits(other) != bits(state)
    head = checkpoint.load(path, other)
    assert head["step"] == 3 and head["config"] == {"a": 1}
    learn(other, 3)
    assert bits(other) == bits(state)
    assert other.kl.coefficient == state.kl.coefficient and other.step == 6
    assert torch.rand(4).tolist() != [0.0] * 4


def test_moments_schedules_and_odd_values_come_back_as_they_were(tmp_path):
    tree = {
        "tuple": (1, 2.5, None, "x"),
        3: {"inf": float("inf"), "tiny": 5e-324, "third": 1 / 3, "flag": True},
        "list": [torch.tensor([1.5, -0.0]), torch.tensor(7, dtype=torch.int64), torch.zeros(0)],
        "bf16": torch.randn(3, 2).to(torch.bfloat16).T,
    }
    held: dict = {}
    text = json.dumps(checkpoint._flatten(tree, "", held))
    parts.write(tmp_path / "file", held)
    stored = parts.stored([TensorFile(tmp_path / "file")])
    back = checkpoint._unflatten(json.loads(text), lambda name: stored[name].whole())
    assert back["tuple"] == tree["tuple"] and back[3] == tree[3]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(back["list"], tree["list"], strict=True))
    assert torch.equal(back["bf16"], tree["bf16"])
    assert str(back["list"][0][1]) == "tensor(-0.)"


def test_tied_and_shared_tensors_are_saved_once_each_and_stay_tied(tmp_path):
    state = make_state(0, "gpt2")
    policy = state.model["policy"]
    assert policy.lm_head.weight is policy.transformer.wte.weight
    path = checkpoint.save(tmp_path, 1, state)
    assert not any("lm_head" in name for name in checkpoint.read(path)["tree"]["weights"])
    other = make_state(1, "gpt2")
    checkpoint.load(path, other)
    assert bits(other) == bits(state)
    assert other.model["policy"].lm_head.weight is other.model["policy"].transformer.wte.weight


def test_only_what_learns_is_saved_with_an_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    def make(seed):
        state = make_state(0, "llama")
        torch.manual_seed(seed)
        wrapped = get_peft_model(
            state.model["policy"], LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
        state.model["policy"] = wrapped
        state.optimizer = torch.optim.AdamW([p for p in state.model.parameters() if p.requires_grad], lr=1e-3)
        return state

    state = make(1)
    learn(state, 2)
    path = checkpoint.save(tmp_path, 2, state)
    names = checkpoint.read(path)["tree"]["weights"]
    assert all("lora_" in name or "value" in name or "inv_freq" in name for name in names)
    other = make(2)
    assert bits(other) != bits(state)
    checkpoint.load(path, other)
    assert bits(other) == bits(state)


def test_the_last_k_are_kept_and_nothing_half_done_stays(tmp_path):
    state = make_state()
    for step in range(1, 5):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / f".step-00000{step}.77.tmp").mkdir()
        checkpoint.save(tmp_path, step, state, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000003", "step-000004"]


def test_a_damaged_newer_one_does_not_push_out_whole_ones(tmp_path):
    state = make_state()
    for step in (10, 20, 30):
        path = checkpoint.save(tmp_path, step, state, keep=3)
    flip(path / "tensors.safetensors")
    assert checkpoint.latest(tmp_path).name == "step-000020"
    checkpoint.save(tmp_path, 24, state, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000024"]


def test_what_moves_from_step_to_step_is_in_the_numbers(tmp_path):
    """A reward's statistics, the KL controller and the scale that a KL budget gives steering."""

    class Counting:
        count = 0

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, saved):
            self.count = saved["count"]

    def make():
        state = make_state()
        state.reward, state.steering = Counting(), SimpleNamespace(scale=1.0)
        return state

    state, other = make(), make()
    state.reward.count, state.steering.scale, state.prompt_position = 7, 1 / 3, 11
    state.totals, state.reward_before = {"tokens": 5.0}, 0.1
    state.kl.update(9.0, 2)
    checkpoint.load(checkpoint.save(tmp_path, 4, state), other)
    assert other.numbers() == state.numbers()
    assert (other.reward.count, other.steering.scale, other.prompt_position) == (7, 1 / 3, 11)


def test_a_fresh_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "checkpoints" / ".step-000001.1.tmp").mkdir(parents=True)
    assert checkpoint.latest(tmp_path) is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda p: p.write_text("{}")])
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, caplog, name, damage):
    state = make_state()
    before = checkpoint.save(tmp_path, 1, state)
    newest = checkpoint.save(tmp_path, 2, state)
    if name == "manifest.json" and damage is flip:
        damage = lambda p: p.write_text(p.read_text().replace('"sha256": "', '"sha256": "0', 1))  # noqa: E731
    damage(newest / name)
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == before
    assert "step-000002" in caplog.text and "step-000001" in caplog.text
    damage(before / name)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        checkpoint.latest(tmp_path)
    checkpoint.save(tmp_path, 2, state)
    assert checkpoint.latest(tmp_path) == newest


def test_a_format_of_the_future_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, make_state())
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.latest(tmp_path)


def test_another_model_is_refused_by_name(tmp_path):
    path = checkpoint.save(tmp_path, 1, make_state(0, "gpt2"))
    with pytest.raises(UserError, match="not those that were saved"):
        checkpoint.load(path, make_state(0, "llama"))
    wide = make_state(0, "gpt2")
    wide.model["value"] = nn.Linear(32, 2)
    with pytest.raises(UserError, match=r"value.*\(2, 32\).*saved was \(1, 32\)"):
        checkpoint.load(path, wide)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_in_a_users_folder_is_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save(tmp_path, 1, make_state())
    for name in ("tensors.safetensors", "state.json", "manifest.json", "pytorch_model.bin", "optimizer.pt"):
        (path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.latest(tmp_path)
    source = Path(checkpoint.__file__).read_text() + Path(resume.__file__).read_text()
    assert "torch.load" not in source and "import pickle" not in source
    assert not (tmp_path / "exploded").exists()


FULL_DISK = """
import resource, sys
from tests.training.run.test_checkpoint import make_state
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.training.run import checkpoint
folder, limit = sys.argv[1], int(sys.argv[2])
state = make_state()
checkpoint.save(folder, 1, state)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))  # a write beyond it fails as on a full disk
try:
    checkpoint.save(folder, 2, state)
except UserError as problem:
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    print(problem)
"""


@pytest.mark.parametrize("limit", [100, 30_000])
def test_a_full_disk_is_one_clear_line_and_leaves_the_one_before_whole(tmp_path, limit):
    done = warm.run([sys.executable, "-c", FULL_DISK, tmp_path, str(limit)])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1 and "step-000002: cannot be written" in done.stdout, done.stdout
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-000001"


SAVE_FOREVER = """
import sys
from tests.training.run.test_checkpoint import make_state
from steerl.training.run import checkpoint
state = make_state()
print("ready", flush=True)
for step in range(1, 100_000):
    state.step = step
    checkpoint.save(sys.argv[1], step, state)
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_instant_leaves_a_whole_checkpoint(tmp_path):
    """The killed process does nothing but save, so that the kill always falls into a save; the lines it prints pace us."""
    for kill in range(5):
        folder = tmp_path / str(kill)
        process = warm.start([sys.executable, "-c", SAVE_FOREVER, folder])
        for _ in range(3 + kill):
            line = process.readline()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        step = int(line)
        path = checkpoint.latest(folder)
        assert path is not None and int(path.name[-6:]) >= step
        state = make_state()
        checkpoint.load(path, state)
        assert state.step == int(path.name[-6:])


# -- going on ----------------------------------------------------------------------------------------------------------------


def test_a_changed_config_names_every_field_and_spares_the_harmless_ones():
    saved = {"run": {"dir": "a", "seed": 0, "resume": False}, "ppo": {"clip": 0.2, "steps": 3}, "reward": [{"name": "x"}]}
    now = {
        "run": {"dir": "b", "seed": 1, "resume": True},
        "ppo": {"clip": 0.3, "steps": 3, "lam": 1.0},
        "reward": ({"name": "x"},),
    }
    with pytest.raises(UserError) as caught:
        resume.check(saved, now)
    assert [line.split(":")[0] for line in caught.value.lines] == ["run.seed", "ppo.clip", "ppo.lam"]
    assert "0.3" in str(caught.value) and "0.2" in str(caught.value)
    now["run"]["seed"], now["ppo"] = 0, {"clip": 0.2, "steps": 5}
    told = resume.check(saved, now, free=(*resume.FREE, "ppo.steps"))
    assert [line.split(":")[0] for line in told] == ["run.dir", "ppo.steps"]


def test_other_content_is_named_once_and_allowed_when_asked():
    was, now = {"model": {"path": "a"}, "prompts": {"path": "b"}}, {"model": {"path": "a"}, "prompts": {"path": "c"}}
    began, here = ({"model.path": x, "prompts.path": x, "reward kind": x} for x in "12")
    with pytest.raises(UserError) as caught:
        resume.check(was, now, began, here)
    assert [line.split(":")[0] for line in caught.value.lines] == ["prompts.path", "model.path", "reward kind"]
    assert all("--run.allow_changes true" in line for line in caught.value.lines)
    assert len(resume.check(was, now, began, here, allow=True)) == 3
    assert resume.check(was, was, {}, here) == [], "written before there were fingerprints"


def test_finished_is_what_the_summary_says_under_the_same_config(tmp_path):
    assert not resume.finished(tmp_path, 3, {}, RunSettings())
    (tmp_path / "summary.json").write_text("{")
    assert not resume.finished(tmp_path, 3, {}, RunSettings())
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    checkpoint.save(tmp_path, 3, make_state(), config={"ppo": {"steps": 3, "clip": 0.2}})
    assert resume.finished(tmp_path, 3, {"ppo": {"steps": 3, "clip": 0.2}}, RunSettings())
    assert not resume.finished(tmp_path, 4, {"ppo": {"steps": 4, "clip": 0.2}}, RunSettings())
    with pytest.raises(UserError, match="ppo.clip: 0.3"):
        resume.finished(tmp_path, 3, {"ppo": {"steps": 3, "clip": 0.3}}, RunSettings())


@pytest.mark.parametrize(
    "change",
    [
        lambda head: head.pop("tree"),
        lambda head: head.update(tree=[]),
        lambda head: head.update(config=5),
        lambda head: head["tree"]["@dict"].pop(0),
        lambda head: head["tree"]["@dict"].append([1]),
        lambda head: head.update(tree={"@dict": [], "@tuple": []}),
    ],
)
def test_a_state_of_another_shape_is_one_line(tmp_path, change):
    """Its checksums are right: nothing was damaged, another program wrote it."""
    checkpoint.save(tmp_path, 1, make_state())
    path = tmp_path / "checkpoints" / "step-000001"
    head = json.loads((path / "state.json").read_text())
    change(head)
    (path / "state.json").write_text(json.dumps(head))
    with pytest.raises(UserError, match="step-000001: not what a run writes .*--run.overwrite true starts again"):
        checkpoint.load(path, make_state())


def test_a_peer_that_is_lost_while_a_checkpoint_is_read_is_no_damage(monkeypatch, tmp_path):
    """Its echo stays what it is; the same words of the file itself are a UserError."""
    lost = RuntimeError("Connection closed by peer [127.0.0.1]:1")
    for known in (True, False):
        monkeypatch.setattr(checkpoint.processes, "lost_peer", lambda error, known=known: known and error is lost)
        with pytest.raises(RuntimeError if known else UserError), checkpoint._written_by_us(tmp_path):
            raise lost


def test_the_module_is_found_in_what_it_is_wrapped_in():
    state = make_state()
    plain, names = state.model, set(state.trained())
    state.model = nn.Module()
    state.model.module = plain  # as DDP and DeepSpeed hold it
    assert state.module is plain and set(state.trained()) == names
