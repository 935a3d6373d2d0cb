"""`steerl engine check` with a real server, and with one that loses a sync."""

from __future__ import annotations

import copy
import json

from steerl.configs.reader import run_command

import pytest

from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.scripts import engine


@pytest.mark.vllm
def test_a_real_server_passes_and_one_that_loses_a_sync_does_not(vllm_server, tmp_path, monkeypatch, capsys):
    policy = copy.deepcopy(vllm_server.policy)
    policy.core.save_pretrained(tmp_path / "model")
    policy.tokenizer.save_pretrained(tmp_path / "model")
    words = ["check", "--model.path", tmp_path / "model", "--engine.kind", "vllm", "--engine.url", vllm_server.url]
    add = {"sites": [{"name": "up", "at": {"layers": [0]}, "op": {"type": "add"}, "vector": [1.0] * 128, "strength": 0.5}]}
    words += ["--steering", json.dumps(add), "--tokens", 12, "--out", tmp_path / "check.json"]
    argv = [str(word) for word in words]
    run_command(engine.main, engine.EngineJob, argv)
    told = json.loads((tmp_path / "check.json").read_text())
    assert told["passed"] and len(told["lines"]) == 14
    assert capsys.readouterr().out.splitlines()[-1].endswith("in float32: passed")
    sync = VllmEngine.sync
    monkeypatch.setattr(VllmEngine, "sync", lambda self, step: sync(self, step) if step == 0 else None)
    with pytest.raises(SystemExit) as left:
        run_command(engine.main, engine.EngineJob, argv)
    assert left.value.code == 1
    told = json.loads((tmp_path / "check.json").read_text())
    assert [line["what"].split(":")[0] for line in told["lines"] if not line["passed"]] in (["sync"], ["stopped"])
