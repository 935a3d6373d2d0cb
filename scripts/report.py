"""One HTML page of a run, of several runs over each other, or of a dump.

    steerl report RUN [RUN ...]

The page is RUN/report.html unless --out says otherwise; it needs no network. --png FILE draws the main curves too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from steerl.configs.reader import run_command

from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError, visible


@dataclass(frozen=True)
class ReportJob:
    """Curves, results, settings and a token-level rollout viewer in one HTML page."""

    runs: list[str] = field(metadata={"positional": True})
    """Folders that train_ppo.py or dump_rollouts.py wrote; several are drawn over each other."""
    out: str | None = None
    """The page; none: report.html in the first folder."""
    png: str | None = None
    """Also the main curves as a picture, for a README or a paper."""
    rows: int = 2000
    """Rows of a dump that the viewer holds, spread evenly over it."""

    def __post_init__(self) -> None:
        if self.rows < 0:
            raise UserError(f"rows: {self.rows}, but it must be 0 or more")


def main(job: ReportJob) -> None:
    from steerl.training.report.page import figure, report

    if not processes.start().is_main:
        return
    folders = [Path(run) for run in job.runs]
    print(visible(str(report(folders, Path(job.out) if job.out else None, rows=job.rows))))
    if job.png:
        print(visible(str(figure(folders, Path(job.png)))))


def cli() -> None:
    run_command(main, ReportJob)


if __name__ == "__main__":
    cli()
