"""PPO on a real vLLM server is PPO in process: ten steps end with the same weights. What is put wrong stops the run by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.distribution import Distribution
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.decoding.weights import Weights, nucleus
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.weights.sync import Sync
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import load_spec
from steerl.rollout.types import Samples
from steerl.training.algorithm.importance import Correction
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from steerl.training.setup import with_peft
from tests.ppo_runs import prompts_of, share_of_threes
from tests.vllm_server import LORA, STEERED, VllmServer

pytestmark = pytest.mark.vllm

LEARNED = {"role": "trainable", "sites": [{"name": "learned", "at": {"layers": [0, 1]}, "vector": {"init": "zeros"}}]}
EXPLORES = {**STEERED, "role": "behaviour", "correction": {"type": "token_truncate"}}


def ran(
    folder: Path, server: VllmServer, engine: dict[str, Any] | None, *, sampling: Any = None, steering: Any = None,
    peft: Any = None, source: Any = None, run: Any = None, **settings: Any,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """A run's trained weights, by the names of its exported files."""
    torch.manual_seed(0)
    policy = with_peft(server.policy.with_model(copy.deepcopy(server.policy.model)), peft)
    prompts = prompts_of(policy, 30)
    given = Sampling(**{"max_new_tokens": 9, "stop_ids": [11, 17], "seed": 4, **(sampling or {})})
    small = {"steps": 10, "rollouts_per_step": 16, "minibatches": 2, "epochs": 2, "learning_rate": 2e-3, "eval_every": 5,
             "eval_prompts": 4, "reference": "adapter" if peft else "copy"}  # fmt: skip
    ppo = PPOSettings(**{**small, **settings})
    on = None if engine is None else EngineSettings(kind="vllm", url=server.url, **engine)
    train(
        policy, prompts, share_of_threes, given, ppo, RunSettings(str(folder), **(run or {})),
        steering=load_spec(steering) if steering else None, engine=on, source=source(policy, prompts, ppo, given) if source else None,
    )  # fmt: skip
    return {
        f"{path.name} {name}": value for path in folder.glob("model/*.safetensors") for name, value in load_file(path).items()
    }


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys() and found
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= tolerance, name


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "truncated": {"sampling": {"top_p": 0.8, "top_k": 20, "n": 2}, "credit": "rloo"},
    "lora": {"peft": LORA, "learning_rate": 2e-2},
    "lora merged": {"peft": LORA, "learning_rate": 2e-2, "engine": {"sync": "file"}},
    "gloo": {"engine": {"sync": "gloo"}},
    "steered": {"steering": STEERED},
    "learned": {"steering": LEARNED, "learning_rate": 2e-2},
    "explores": {"steering": EXPLORES},
}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_end_with_the_weights_of_ten_in_process(vllm_server: VllmServer, tmp_path: Path, case: str):
    how = dict(CASES[case])
    engine = how.pop("engine", {})
    wanted = ran(tmp_path / "in", vllm_server, None, **how)
    found = ran(tmp_path / "out", vllm_server, engine, **how)
    # A correction's weights hang on the server's own log-probs, which ten steps of Adam make more of.
    assert_near(found, wanted, 1e-4 if case == "explores" else 1e-5)
    told = metrics(tmp_path / "out")
    assert len(told) == 10 and all(step["engine/gap_max"] < 2e-5 and step["engine/restarts"] == 0 for step in told)
    moved = ran(tmp_path / "one", vllm_server, None, **{**how, "steps": 1})
    assert max(float((wanted[name] - moved[name]).abs().max()) for name in wanted) > 1e-3  # else nothing is shown


# -- one step ahead --------------------------------------------------------------------------------------------------


class Lagging:
    """Ahead, written out: draws every step but the first with a copy of the policy as it was one step before."""

    def __init__(self, policy: Any, prompts: Any, settings: PPOSettings, sampling: Sampling):
        self.policy, self.sampling = policy, sampling
        self.copies = {0: copy.deepcopy(policy.model)}

    def draw(self, prompts: PromptBatch, /, *, step: int, progress: float) -> Samples:
        before = max(step - 1, 0)
        samples = Sampler(self.policy.with_model(self.copies[before]), self.sampling).sample(prompts, step=step)
        rollout = samples.rollout
        object.__setattr__(rollout, "policy_step_B", torch.full_like(rollout.row_B, before))
        return samples

    def weights_changed(self, step: int) -> None:
        self.copies[step] = copy.deepcopy(self.policy.model)

    def close(self) -> None: ...


def test_ahead_learns_from_the_rows_of_the_step_before(vllm_server: VllmServer, tmp_path: Path):
    weighed = {"correction": Correction("token_truncate"), "steps": 6}
    wanted = ran(tmp_path / "in", vllm_server, None, source=Lagging, **weighed)
    found = ran(tmp_path / "out", vllm_server, {"ahead": 1}, steps=6)  # the correction is on by itself
    assert_near(found, wanted, 1e-4)
    told = metrics(tmp_path / "out")
    assert "gap/max" in told[0] and all("gap/max" not in step and step["correction/ess"] < 16 for step in told[1:])


def test_ahead_resumes_to_the_last_bit(vllm_server: VllmServer, tmp_path: Path):
    whole = ran(tmp_path / "whole", vllm_server, {"ahead": 1}, steps=6, run={"save_every": 3})
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for path in ("checkpoints/step-000006", "model"):
        shutil.rmtree(tmp_path / "cut" / path)
    (tmp_path / "cut" / "summary.json").unlink()
    resumed = ran(tmp_path / "cut", vllm_server, {"ahead": 1}, steps=6, run={"save_every": 3, "resume": True})
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    same = [
        {k: v for k, v in step.items() if not k.startswith(("time/", "memory/", "engine/"))}
        for step in metrics(tmp_path / "whole")
    ]
    assert same == [{k: step[k] for k in keys} for step, keys in zip(metrics(tmp_path / "cut"), same, strict=True)]


def test_ahead_refuses_what_it_cannot_weigh(vllm_server: VllmServer, tmp_path: Path):
    with pytest.raises(UserError, match=r"engine.ahead: 1 with steering.role behaviour"):
        ran(tmp_path / "run", vllm_server, {"ahead": 1}, steering=EXPLORES)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# -- defects -----------------------------------------------------------------------------------------------------------


def test_a_sync_left_out_is_named(vllm_server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    send = Sync.send
    monkeypatch.setattr(Sync, "send", lambda self, version: send(self, version) if version != 2 else None)
    with pytest.raises(UserError, match=r"the weights of step 1, where those of step 2 were sent; the sync was lost"):
        ran(tmp_path / "run", vllm_server, {}, steps=4)


def test_a_row_that_was_not_steered_is_named(vllm_server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    steered = VllmEngine.steered
    monkeypatch.setattr(VllmEngine, "steered", lambda self, applied, b: {} if b == 5 else steered(self, applied, b))
    with pytest.raises(UserError, match=r"row \d+.* was drawn without steering"):
        ran(tmp_path / "run", vllm_server, {}, steering={**STEERED, "fraction": 1.0}, eval_prompts=0)


@pytest.mark.parametrize("law, cause", [
    ({"top_p": 0.6, "temperature": 1.0}, "draws by another law than sampling says"),
    ({"top_p": 1.0, "replay_mask": None}, "draws by another law than sampling says"),
    ({"seed": 5}, "draws other tokens than the settings of sampling"),
], ids=["other settings", "one left out", "other random numbers"])  # fmt: skip
def test_another_law_is_named(
    vllm_server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, law: dict[str, Any], cause: str
):
    """As a server would draw that has the law wrong: it agrees with itself in all that it records."""
    made = VllmEngine.law

    def wrong(self: VllmEngine, sampling: Sampling) -> Any:
        return dataclasses.replace(made(self, sampling), sampling=dataclasses.replace(sampling, **law))

    monkeypatch.setattr(VllmEngine, "law", wrong)
    with pytest.raises(UserError, match=cause):
        ran(tmp_path / "run", vllm_server, {}, sampling={"top_p": 0.8, "temperature": 1.4}, eval_prompts=0)


def test_another_order_of_processors_is_named(vllm_server: VllmServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """vLLM's own order, min-p before top-p, on one of the two sides: here the trainer's."""

    def swapped(self: Distribution, weights: Weights) -> None:
        weights.keep(weights.at_least(torch.full_like(weights.top_B1, math.log(self.sampling.min_p))))
        weights.keep(nucleus(weights, self.sampling.top_p))

    monkeypatch.setattr(Distribution, "truncate", swapped)
    with pytest.raises(UserError, match="draws by another law than sampling says"):
        ran(tmp_path / "run", vllm_server, {}, sampling={"top_p": 0.8, "min_p": 0.1, "temperature": 1.5}, eval_prompts=0)
