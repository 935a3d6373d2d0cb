"""Run by test_shard_kills.py under ZeRO-3: a tiny PPO run that is killed where KILL says, or not at all.

accelerate launch --config_file ENGINE.yaml tests/training/engine/killed.py FOLDER

KILL="EVENT RANK COUNT WHO"     at the COUNT-th EVENT of that rank; WHO: `one` (that rank) or `all` (the launcher and all ranks)

    load     a range of a tensor is read from a checkpoint      export   a tensor of RUN/model is written
    save     a tensor of a checkpoint is written                rename   a checkpoint or RUN/model gets its name
    head     a checkpoint's state.json or manifest is written
"""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from steerl.rollout.common import processes
from steerl.rollout.weights import files
from tests.training.engine import engines

JOB = {"family": "llama", "ppo": {"steps": 4, "micro_batch_size": 6, "eval_prompts": 0}}


class Bomb:
    def __init__(self, event: str, rank: str, count: str, who: str):
        self.event, self.mine, self.left, self.who = event, rank == os.environ["RANK"], int(count), who

    def on(self, event: str) -> None:
        if event != self.event or not self.mine:
            return
        self.left -= 1
        if self.left == 0:
            launcher = psutil.Process(os.getppid())
            for victim in [launcher, *launcher.children(recursive=True)] if self.who == "all" else []:
                if victim.pid != os.getpid():
                    victim.kill()
            os.kill(os.getpid(), signal.SIGKILL)


def laid(bomb: Bomb) -> None:
    """Have the events counted."""
    write, read, replace, text = files.write, files.TensorFile.read_into, os.replace, Path.write_text

    def counted(event: str, tensors: Any) -> Iterator[Any]:
        for entry in tensors:
            bomb.on(event)
            yield entry

    def writes(path: Path, announced: Any, tensors: Any, *more: Any) -> None:
        write(path, announced, counted("export" if ".model." in str(path) else "save", tensors), *more)

    def before(event: str, call: Callable[..., Any], names: str = "") -> Callable[..., Any]:
        def called(*arguments: Any, **settings: Any) -> Any:
            if not names or re.match(names, Path(arguments[0]).name):
                bomb.on(event)
            return call(*arguments, **settings)

        return called

    files.write = writes
    files.TensorFile.read_into = before("load", read)  # type: ignore[method-assign]
    os.replace = before("rename", replace, r"\.(step-|model\.)")
    Path.write_text = before("head", text, r"(state|manifest)\.json")  # type: ignore[method-assign]


def main(folder: Path) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    processes.start()
    if words := os.environ.get("KILL", "").split():
        laid(Bomb(*words))
    torch.manual_seed(0)
    engines.run(JOB, folder, "run", folder, resume=True)
    if processes.close():
        processes.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
