"""The worlds of the embedded default: each module has `build(folder, seed)`, which fills an empty folder."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

NAMES = ("reviews", "randomwalks", "summaries", "suppressed", "hackable", "calculator", "maze")


def available() -> list[str]:
    return [name for name in NAMES if importlib.util.find_spec(f"{__name__}.{name}") is not None]


def builder(name: str) -> Callable[[Path, int], None]:
    build: Callable[[Path, int], None] = importlib.import_module(f"{__name__}.{name}").build
    return build
