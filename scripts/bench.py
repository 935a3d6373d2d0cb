"""Measurements against what users know, all in one run.

steerl bench [--out runs/bench]

(no flag)     speed: this project, TRL 1.12's PPOTrainer, the installed TRL's GRPO and RLOO, and plain generate, interleaved, a
              fresh process each; leaves bench.json and bench.md (about 35 minutes on one idle core); --speed.device cuda on
              a GPU; --speed.only NAME some cases alone (" n8": groups)
--quick       the same for the smallest case, once, without TRL
--scaling     rows, prompt, response, vocabulary and samples doubled one at a time; leaves scaling.json and scaling.png
--overhead    what steering costs while sampling (overhead.py)
--engines     tokens per CPU second in process and by a vLLM server, by weights and rows (engines.py; `make vllm` first)
--plain_vllm  the same job by both, and rows of plain vLLM beside ours (plain_vllm.py; `make vllm` first)
--gpu         the tests that need a GPU, then figures of this card with their share of its limits, in ten minutes (`make gpu`);
              leaves gpu.json and gpu.md
--learning    randomwalks beside TRL 1.12's PPOTrainer: reward by samples and by seconds, five seeds each (about an
              hour on one core); leaves learning.json and learning.png, and prints a table
--peers       randomwalks by credit of groups and leave-one-out beside the installed TRL's GRPO and RLOO (peers)
--episodes    tasks with a tool and with an environment, five seeds each: a critic, group credit, and credit that counts what
              was fed as time (episodes.py)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from steerl.configs.reader import run_command

from steerl.scripts.bench_cases import speed
from steerl.scripts.bench_cases.learning import LearningSettings, measure
from steerl.scripts.bench_cases.peers.compare import PeerSettings
from steerl.scripts.bench_cases.peers.compare import measure as measure_peers
from steerl.scripts.gpu.run import GPUSettings
from steerl.scripts.gpu.run import measure as measure_gpu


@dataclass(frozen=True)
class BenchJob:
    """Measurements against what users know."""

    out: str = "runs/bench"
    """Where results are written. Learning runs that are there already are not measured again."""
    learning: bool = False
    """The learning comparison on randomwalks, instead of speed."""
    learn: LearningSettings = field(default_factory=LearningSettings)
    """How it is done."""
    scaling: bool = False
    """Time and memory as the work doubles, instead of speed."""
    overhead: bool = False
    """What steering costs while sampling, instead of speed."""
    engines: bool = False
    """Sampling in process and by a vLLM server, instead of speed."""
    plain_vllm: bool = False
    """One job by both engines, and what plain vLLM's log-probs are worth, instead of speed."""
    gpu: bool = False
    """The tests and figures of a GPU, instead of speed."""
    card: GPUSettings = field(default_factory=GPUSettings)
    """How a GPU is measured."""
    peers: bool = False
    """Group credit beside TRL's, instead of speed."""
    peer: PeerSettings = field(default_factory=PeerSettings)
    """How it is compared."""
    episodes: bool = False
    """Learning over several turns, instead of speed."""
    quick: bool = False
    """Speed, scaling or engines as a trial: the smallest work, once, without TRL."""
    speed: speed.SpeedSettings = field(default_factory=speed.SpeedSettings)
    """How speed is compared."""


def main(job: BenchJob) -> None:
    if job.learning:
        measure(Path(job.out), job.learn)
    elif job.gpu:
        measure_gpu(Path(job.out), job.card)
    elif job.overhead:
        from steerl.scripts.bench_cases import overhead

        overhead.measure(Path(job.out))
    elif job.engines:
        from steerl.scripts.bench_cases import engines

        engines.measure(Path(job.out), *(((engines.SIZES[:1], engines.ROWS[:1], 1)) if job.quick else ()))
    elif job.plain_vllm:
        from steerl.scripts.bench_cases import plain_vllm

        plain_vllm.measure(Path(job.out))
    elif job.peers:
        measure_peers(Path(job.out), job.peer)
    elif job.episodes:
        from steerl.scripts.bench_cases import episodes

        episodes.measure(Path(job.out))
    elif job.scaling:
        from steerl.scripts.bench_cases import scaling

        scaling.measure(Path(job.out), job.speed, job.quick)
    else:
        speed.measure(Path(job.out), job.speed, job.quick)


def cli() -> None:
    run_command(main, BenchJob)


if __name__ == "__main__":
    cli()
