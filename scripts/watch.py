"""The report of running jobs, which follows them, on this machine's own address.

steerl watch RUN [RUN ...]          or a folder of runs: those that begin later join
ssh -C -N -L 8765:127.0.0.1:8765 HOST  where HOST is the machine it runs on; then the same address here
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from steerl.configs.reader import run_command

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError, visible


@dataclass(frozen=True)
class WatchJob:
    """Curves, rollouts and memory of running jobs in one page that follows them."""

    runs: list[str] = field(metadata={"positional": True})
    """Folders that jobs write, or folders of such folders; several are drawn over each other."""
    port: int = 8765
    """On 127.0.0.1, and nowhere else; 0 = any free one."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise UserError(f"port: {self.port}; give a port, 0 for any free one")


def main(job: WatchJob) -> None:
    from steerl.training.report.follow import Runs
    from steerl.training.report.live import HOST, LiveServer

    if (world := processes.start().world_size) > 1:
        raise UserError(f"watch: started on {world} processes; start one, without accelerate launch")
    with LiveServer(runs := Runs([Path(run) for run in job.runs]), job.port) as server:
        names = ", ".join(run.name for run in runs.now())
        print(f"http://{HOST}:{server.server_port} follows {visible(names)}; Ctrl-C ends it", flush=True)
        server.serve_forever()


def cli() -> None:
    run_command(main, WatchJob)


if __name__ == "__main__":
    cli()
