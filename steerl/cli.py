"""The command line: `steerl ppo ...` runs scripts/train_ppo.py, and so on; `steerl` alone lists them.

Several processes start as ever: `accelerate launch -m steerl.scripts.train_ppo ...` (in a checkout also scripts/train_ppo.py).
"""

from __future__ import annotations

import ast
import difflib
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import steerl

COMMANDS = {
    "quickstart": "quickstart",
    "tiny": "make_tiny",
    "sft": "train_sft",
    "reward": "train_reward",
    "ppo": "train_ppo",
    "dump": "dump_rollouts",
    "inspect": "inspect_rollouts",
    "score": "score_rollouts",
    "select": "select_rollouts",
    "export": "export",
    "report": "report",
    "watch": "watch",
    "push": "push",
    "complete": "complete",
    "eval": "eval",
    "extract": "extract_steering",
    "serve": "serve_reward",
    "plan": "plan",
    "bench": "bench",
    "engine": "engine",
    "study": "study",
    "summarize": "run_summarization",
}
"""Name -> file in scripts/."""


def main(argv: Sequence[str] | None = None) -> None:
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print("\n".join(["usage: steerl COMMAND [--config FILE] [--section.field VALUE ...]", "", *_table()]))
        print("\nsteerl COMMAND --help lists its settings; --config steerl:ppo names a YAML file that comes with steerl.")
    elif name == "--version":
        print(steerl.__version__)
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(COMMANDS)}"
        print(f"steerl: {name!r} is no command; {hint}", file=sys.stderr)
        raise SystemExit(2)
    else:
        sys.argv = [f"steerl {name}", *rest]
        importlib.import_module(f"steerl.scripts.{COMMANDS[name]}").cli()


def _table() -> list[str]:
    """A line per command: what the first line of its file says."""
    folder = Path(importlib.import_module("steerl.scripts").__path__[0])
    files = {name: ast.parse((folder / f"{file}.py").read_text(encoding="utf-8")) for name, file in COMMANDS.items()}
    return [f"  {name:<12}{(ast.get_docstring(tree) or '').splitlines()[0]}" for name, tree in files.items()]
