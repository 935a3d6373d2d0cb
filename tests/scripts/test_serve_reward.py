"""The server's command as a process of its own: another job's `kind: http` asks it; bad settings are a line each."""

from __future__ import annotations

import json
import signal
import sys

from steerl.configs.reader import run_command

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.scripts.serve_reward import ServeJob, main
from tests import warm
from tests.models import tiny_tokenizer
from tests.reward.classifiers import saved, tiny_classifier
from tests.reward.rows import made


def test_another_process_asks_it(tmp_path):
    tokenizer = tiny_tokenizer()
    parts = [
        {"kind": "model", "path": saved(tiny_classifier("gpt2"), tmp_path / "rm", tokenizer)},
        {"kind": "length", "max": 9, "weight": 0.1},
    ]
    command = [sys.executable, "scripts/serve_reward.py", "--serve.port", "0", "--reward", json.dumps(parts)]
    server = warm.start(command)
    try:
        first = server.readline()
        assert first.startswith("serving http://127.0.0.1:") and first.endswith(" (model, length)\n")
        rollout, texts = made(["good film", "a", "the plot was very long", "bad film!"])
        here = build_reward(parts, tokenizer=tokenizer)(rollout, texts)
        there = build_reward([{"kind": "http", "url": first.split()[1]}], tokenizer=tokenizer)(rollout, texts)
        assert torch.equal(here.total_B, there.total_B)
        server.send_signal(signal.SIGINT)
        assert server.wait(30) in (0, -signal.SIGINT, 130)
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            ["--serve.host", "0.0.0.0"],
            "serve.host: 0.0.0.0 can be reached from outside; put a bearer token into $STEERL",
        ),
        (["--serve.port", "70000"], "serve.port: 70000; give a port"),
        (["--serve.max_rows", "0"], "serve.max_rows: 0; give more than 0"),
        (["--serve.host", "192.0.2.1", "--serve.token_env", "HOME"], "serve.port: 192.0.2.1:8100 cannot be bound"),
        (["--reward", "[{kind: lenght}]"], "reward[0].kind: unknown value 'lenght'; did you mean length?"),
    ],
)
def test_bad_settings(changes, line, capsys, monkeypatch):
    monkeypatch.delenv("STEERL_REWARD_TOKEN", raising=False)
    with pytest.raises(SystemExit) as left:
        run_command(main, ServeJob, ["--reward", "[{kind: length, max: 3}]", *changes])
    assert left.value.code == 2
    assert line in capsys.readouterr().err
