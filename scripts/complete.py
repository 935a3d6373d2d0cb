"""Completions in a terminal.

    steerl complete --model.path DIR "prompt"

A prompt (or several), a file of them (--prompts.path), or, without either, a chat; text from a pipe is one prompt.
With tools or an environment (--environment.tools, --environment.factory) each prompt is an episode, to be watched.
Tokens are colored by their probability in a terminal, plain when piped; --json true is for programs.
"""

from __future__ import annotations

import contextlib
import io
import sys

from steerl.configs.reader import run_command

from steerl.scripts.completing.settings import CompleteJob


def main(job: CompleteJob) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a sign instead
    from steerl.scripts.completing.session import run

    with contextlib.ExitStack() as ending:
        run(job, ending)


def cli() -> None:
    run_command(main, CompleteJob)


if __name__ == "__main__":
    cli()
