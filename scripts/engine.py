"""A vLLM server: a proof that it draws, steers and takes weights rightly here, and one that runs by itself.

steerl engine check --model.path DIR [--steering FILE] [--model.peft MAPPING] [--out FILE.json]    status 1: something is off
steerl engine serve --model.path DIR [--port 8000]                                                 for engine.url

`check` starts a server as a job would, and compares it with the engine in this process: a line each, with the largest error.
"""

from __future__ import annotations

import os
import shlex
import signal
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from steerl.configs.reader import run_command

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import versions, write_json
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.steering import load_spec
from steerl.scripts.train_ppo import learnable

if TYPE_CHECKING:
    from steerl.rollout.model.policy import Policy

_OF_CHECK = {"rows": 8, "tokens": 32, "seed": 0, "out": ""}
_PORT = 8000


@dataclass(frozen=True)
class EngineJob:
    """Check a vLLM server against the engine in this process, or run one."""

    action: Literal["check", "serve"] = field(metadata={"positional": True})
    """check: a proof on this machine and model. serve: a server in the foreground."""
    model: ModelSettings = field(default_factory=ModelSettings)
    """Weights are float32 unless model.dtype says otherwise, as in PPO."""
    engine: EngineSettings = field(default_factory=lambda: EngineSettings(kind="vllm"))
    steering: dict[str, object] | str | None = field(default=None, metadata={"check": load_spec})
    """check: this instead of an add of its own (none at engine.url). serve: what jobs will steer by."""
    rows: int = _OF_CHECK["rows"]  # type: ignore[assignment]
    """check: prompts; two to four rows of each."""
    tokens: int = _OF_CHECK["tokens"]  # type: ignore[assignment]
    """check: most tokens of a row."""
    seed: int = _OF_CHECK["seed"]  # type: ignore[assignment]
    """check: of prompts, draws and changes."""
    out: str = _OF_CHECK["out"]  # type: ignore[assignment]
    """check: a JSON file with every line."""
    port: int = _PORT
    """serve: where it listens, on the loopback interface."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {getattr(self, name)}, but it must be 1 or more" for name in ("rows", "tokens") if getattr(self, name) < 1
        ]
        if self.engine.kind != "vllm":
            problems.append(f"engine.kind: {self.engine.kind}, but it is the vLLM server that is looked at here; leave it out")
        if self.action == "serve":
            problems += [
                f"{name}: has no effect on a server; leave it out"
                for name, value in _OF_CHECK.items()
                if getattr(self, name) != value
            ]
            if self.engine.url:
                problems.append("engine.url: has no effect on a server; --port says where it listens")
        elif self.port != _PORT:
            problems.append("port: has no effect on a check, which takes a free one; leave it out")
        if problems:
            raise UserError(*problems)


def main(job: EngineJob) -> None:
    from steerl.rollout.model.policy import load_policy
    from steerl.training.setup import with_peft

    policy = with_peft(load_policy(learnable(job.model), processes.start().device), job.model.peft)
    if job.action == "serve":
        serve(job, policy)
        return
    with tempfile.TemporaryDirectory(prefix="steerl-engine-") as folder:
        check(job, policy, Path(folder))


def check(job: EngineJob, policy: Policy, folder: Path) -> None:
    from steerl.rollout.analysis import engine_check
    from steerl.rollout.engines.vllm.engine import LOG, VllmEngine
    from steerl.rollout.steering import Steering

    log = Path(job.out).with_suffix(".log").absolute() if job.out else folder / LOG
    spec = load_spec(job.steering) if job.steering else None
    if spec is None and not job.engine.url:  # a server that runs already may not be one that steers
        spec = engine_check.an_add(policy, job.seed)
    steering = Steering(policy.model, spec, policy.tokenizer, job.seed) if spec is not None else None
    engine = VllmEngine(policy, job.engine, log, steering=steering, alone=True)
    lines = []
    try:
        for line in engine_check.checks(engine, steering, job.rows, job.tokens, job.seed):
            print(line.text(), flush=True)
            lines.append(line)
    except UserError as problem:
        lines.append(engine_check.Line("stopped", 0, 0, None, 0.0, False, "; ".join(problem.lines)))
        print(lines[-1].text())
    finally:
        engine.close()
    passed = all(line.passed for line in lines)
    told = f"{job.model.path} in {str(policy.core.dtype).removeprefix('torch.')}"
    print(f"engine check: {told}: {'passed' if passed else 'FAILED'}")
    if job.out:
        about = {"model": job.model.path, "dtype": str(policy.core.dtype), "passed": passed, "versions": versions()}
        write_json(Path(job.out), about | {"lines": [vars(line) for line in lines]})
    if not passed:
        raise SystemExit(1)


def serve(job: EngineJob, policy: Policy) -> None:
    """Until it ends, or this process does."""
    from steerl.rollout.engines.vllm.engine import LOG, VllmEngine
    from steerl.rollout.steering import Steering

    steering = Steering(policy.model, load_spec(job.steering), policy.tokenizer) if job.steering else None
    engine = VllmEngine(policy, job.engine, Path(LOG), steering=steering, alone=True)
    try:
        server = engine.server()
        server.port = job.port
        told = {name: value for name, value in server.environment().items() if os.environ.get(name) != value}
        print(shlex.join([*(f"{name}={value}" for name, value in told.items()), *server.command()]), flush=True)
        print(f"jobs use it with: --engine.kind vllm --engine.url {server.url}", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        running = server.guarded()
        try:
            status = running.wait()
        except KeyboardInterrupt:
            running.terminate()
            running.wait()
            status = 0
        raise SystemExit(status)
    finally:
        engine.close()


def cli() -> None:
    run_command(main, EngineJob)


if __name__ == "__main__":
    cli()
