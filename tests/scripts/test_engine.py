"""`steerl engine`: what it refuses, what it sees when a server is off; of a real one see tests/rollout/engines/vllm/test_check.py."""

from __future__ import annotations

import copy
import dataclasses

from steerl.configs.reader import read

import pytest
import torch

from steerl.rollout.analysis import engine_check
from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.steering import Steering
from steerl.scripts import engine
from tests.models import tiny_policy


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chek"], "did you mean check?"),
        (["check", "--port", "9000"], "port: has no effect on a check"),
        (["check", "--rows", "0"], "rows: 0"),
        (["check", "--engine.kind", "stream"], "engine.kind: stream"),
        (["serve", "--out", "a.json"], "out: has no effect on a server"),
        (["serve", "--engine.kind", "vllm", "--engine.url", "http://127.0.0.1:1"], "engine.url: has no effect on a server"),
    ],
)
def test_what_has_no_effect_is_refused(words, told):
    with pytest.raises(UserError, match=told.replace("?", r"\?")):
        read(engine.EngineJob, words)


class Server:
    """In the place of the engine: a second policy in this process, that draws as a server would if nothing were off."""

    class weights:
        kind = "file"

    def __init__(self, policy):
        self.policy, self.served = policy, copy.deepcopy(policy)
        self.loses_sync = False

    def ready(self, step):
        pass

    def metrics(self):
        return {"engine/sync_s": 0.0}

    def sync(self, step):
        if not self.loses_sync:
            self.served = copy.deepcopy(self.policy)


def found_with(monkeypatch, policy, **defects) -> dict[str, bool]:
    """Line -> passed, of a server with a defect."""
    server = Server(policy)
    server.loses_sync = defects.get("loses_sync", False)

    def sampler(engine, sampling, steering=None):
        if steering is not None and not defects.get("unsteered"):
            steering = Steering(engine.served.model, steering.spec, engine.served.tokenizer, steering.seed)
        elif steering is not None:
            steering = None
        changed = {
            name: value for name, value in defects.get("sampling", {}).items() if getattr(sampling, name) not in (0, 1.0)
        }
        drawer = Sampler(engine.served, dataclasses.replace(sampling, **changed), steering)
        if defects.get("one_weight"):
            with torch.no_grad():
                next(engine.served.core.parameters())[3] += 0.01
        return drawer

    monkeypatch.setattr(engine_check, "ServerSampler", sampler)
    steering = Steering(policy.model, engine_check.an_add(policy, 0), policy.tokenizer)
    return {line.what: line.passed for line in engine_check.checks(server, steering, 3, 12, 0)}


@pytest.mark.parametrize(
    ("defects", "failing"),
    [
        ({}, ""),
        ({"sampling": {"top_k": 19}}, "draws: top-k"),
        ({"sampling": {"repetition_penalty": 1.0}}, "draws: repetition"),
        ({"unsteered": True}, "steering"),
        ({"loses_sync": True}, "sync"),
        ({"one_weight": True}, "draws: temperature 1"),
    ],
)
def test_a_defect_fails_its_line(monkeypatch, defects, failing):
    passed = found_with(monkeypatch, tiny_policy("llama"), **defects)
    assert len(passed) == 14
    failed = [what for what, good in passed.items() if not good]
    assert [what for what in failed if not what.startswith(failing)] == [] or defects.get("one_weight")
    assert bool(failed) == bool(defects)
    assert not failing or any(what.startswith(failing) for what in failed)


def test_the_change_that_is_sent_is_of_every_weight_that_learns():
    policy = tiny_policy("llama")
    before = copy.deepcopy(policy.core.state_dict())
    engine_check.change(policy, 0)
    for name, value in policy.core.state_dict().items():
        assert not torch.equal(value, before[name]), name
