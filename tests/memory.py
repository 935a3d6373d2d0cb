"""Memory of this process in bytes, as Linux tells it: what stands, and the most since `begin`, or since it was started."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path


def standing() -> int:
    return _status("VmRSS")


def highest() -> int:
    """Not ru_maxrss, which begins with what the starting process took."""
    return _status("VmHWM")


def begin() -> None:
    """From here on `highest` counts anew; what is freed goes back to the system."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024
