"""What is hostile: values that suit no setting, trees with one place changed, bytes with a piece lost, pickles that would run.

The same random generator draws the same damage.
"""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

ESCAPE, LONE, LONG = "\x1b]0;pwned\x07\x1b[2J\x1b[31m", "\ud800", "n" * 300
NUMBERS = [
    -1,
    0,
    2**31,
    2**63,
    -(2**63) - 1,
    10**15,
    10**400,
    1e300,
    -1e300,
    1e-320,
    float("inf"),
    float("-inf"),
    float("nan"),
    0.5,
]
OTHERS = [
    "",
    " ",
    "x",
    "..",
    "/",
    LONG,
    ESCAPE,
    LONE,
    "\x00",
    "\u202e",
    "🙂",
    "a\nb",
    True,
    False,
    None,
    [],
    {},
    [[]],
    {"a": 1},
    [None],
]
TEXTS = [
    *[
        "5",
        "-1",
        "0",
        "1:30",
        "0777",
        "1_000",
        "0x1F",
        "1e5",
        "1e400",
        ".inf",
        "-.inf",
        ".nan",
        "inf",
        "nan",
        "2026-01-01",
        "~",
        "",
    ],
    *[
        "null",
        "yes",
        "on",
        "[",
        "{",
        "]",
        "[[[[]]]]",
        "{a: {b: {c: 1}}}",
        "*a",
        "&a [*a]",
        "!!python/object:os.system",
        "!x y",
        "-",
    ],
    *[
        "%",
        "@",
        "`",
        "'",
        '"',
        "\t",
        "a: b: c",
        str(2**63),
        "9" * 400,
        str(10**15),
        "1e300",
        "-1e300",
        ESCAPE,
        LONE,
        "\x00",
        LONG,
    ],
]


def deep(count: int) -> Any:
    value: Any = 1
    for _ in range(count):
        value = [value]
    return value


def value(draw: random.Random) -> Any:
    return draw.choice([draw.choice(NUMBERS), draw.choice(OTHERS), deep(60)])


def damaged_tree(draw: random.Random, tree: Any) -> Any:
    """The same tree with one place changed, removed or added."""
    if draw.random() < 0.08 or not isinstance(tree, dict | list) or not tree:
        return value(draw)
    if isinstance(tree, dict):
        key = draw.choice(list(tree))
        kind = draw.random()
        if kind < 0.1:
            return {name: inner for name, inner in tree.items() if name != key}
        if kind < 0.15:
            return {**tree, str(draw.choice(OTHERS)): value(draw)}
        return {**tree, key: damaged_tree(draw, tree[key])}
    at = draw.randrange(len(tree))
    return [*tree[:at], *([] if draw.random() < 0.1 else [damaged_tree(draw, tree[at])]), *tree[at + 1 :]]


def damaged_bytes(draw: random.Random, content: bytes) -> bytes:
    at = draw.randrange(len(content) or 1)
    kind = draw.randrange(7)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return b""
    if kind == 2:
        return content[:at] + bytes(draw.randrange(256) for _ in range(16)) + content[at + 16 :]
    if kind == 3:
        return content[:at] + content[at : at + 1 + draw.randrange(64)] + content[at:]
    if kind == 4:
        head = min(at, draw.choice([8, 64, 512]))
        return content[:head] + bytes(draw.randrange(256) for _ in range(8)) + content[head + 8 :]
    if kind == 5:
        return struct.pack("<Q", draw.choice([0, 2**63, 2**40, 10, len(content)])) + content[8:]
    return bytes(draw.randrange(256) for _ in range(len(content) and min(len(content), 4096)))


def dumps(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def damage(draw: random.Random, path: Path) -> str:
    """Something else in the file: another tree where it is JSON, other bytes, another file, or none."""
    kind = draw.random()
    if kind < 0.7 and path.suffix == ".json":
        path.write_bytes(dumps(damaged_tree(draw, json.loads(path.read_text()))))
        return f"{path.name}, another tree"
    if kind < 0.7 and path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_bytes(b"\n".join(dumps(row) for row in [damaged_tree(draw, rows[0]), *rows[1:]]))
        return f"{path.name}, another first row"
    if kind < 0.76:
        path.unlink()
        return f"{path.name}, missing"
    if kind < 0.82:
        path.write_text(draw.choice(["[]", "{}", "null", "[" * 100_000, '{"a":' * 50_000, '"\\ud800"', "NaN", ESCAPE]))
        return f"{path.name}, other JSON"
    path.write_bytes(damaged_bytes(draw, path.read_bytes()))
    return f"{path.name}, other bytes"


class Bomb:
    """A pickle of one of these makes the file PWNED where it is run."""

    def __reduce__(self) -> Any:
        return (open, ("PWNED", "w"))
