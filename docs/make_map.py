"""Write the file map into docs/architecture.md: `python docs/make_map.py`. Every line is the first line of a file's own text.

A Python file says what it is for in the first line of its docstring, a YAML file in its first comment. The map stands between
the two markers; tests/test_docs.py compares it with the files.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
ROOMS = ("steerl", "rollout", "reward", "training", "configs", "scripts", "examples")
BEGIN, END = "<!-- map: python docs/make_map.py -->", "<!-- /map -->"
WIDTH = 30
COMMAND = re.compile(r"(?:^|\s)(?:python|accelerate launch) ")


def first_line(path: Path) -> str:
    """What the file says of itself, without a command that stands behind or above it; empty where it says nothing."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").splitlines()[:1]
    else:
        said = [line.lstrip("# ") for line in text.splitlines() if line.startswith("#")]
    return next((kept for line in said if (kept := COMMAND.split(line)[0].strip().rstrip(":"))), "")


def lines(folder: Path, depth: int = 0) -> list[str]:
    """A folder, its own files, then its folders; files of one folder by name."""
    indent = "  " * depth
    package = folder / "__init__.py"
    about = first_line(package) if package.exists() else ""
    drawn = [f"{indent}{folder.name}/".ljust(WIDTH) + f" {about}"]
    entries = sorted(folder.iterdir())
    for path in entries:
        if path.suffix in (".py", ".yaml") and path.name != "__init__.py":
            drawn.append(f"{indent}  {path.name}".ljust(WIDTH) + f" {first_line(path)}")
    for path in entries:
        if path.is_dir() and any(inner.suffix in (".py", ".yaml") for inner in path.iterdir()):
            drawn += lines(path, depth + 1)
    return drawn


def drawing() -> str:
    """The map of every room, a block each."""
    rooms = ["\n".join(line.rstrip() for line in lines(ROOT / room)) for room in ROOMS if (ROOT / room).is_dir()]
    return "\n\n".join(f"```text\n{room}\n```" for room in rooms)


def with_map(page: str) -> str:
    """The page with the map of today."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{drawing()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_map(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
