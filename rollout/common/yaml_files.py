"""YAML as settings are written in it: 1e-5 is a number, `on` is a word, a key stands once, and what is wrong is said in
one line. For every file of settings that a user writes: --config files, steering specs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES, MOST_VALUES, MOST_DEEP = 1 << 18, 1_000_000, 64
"""Of a text of settings, of what its aliases unfold to, and of its nesting."""


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain scalars are numbers as a person writes them (1e-5 is one, which plain PyYAML reads as text;
    1:30, 0777, 1_000 and 2026-01-01 are text, which it reads as 90, 511, 1000 and a date), bools that are only true and
    false (a steering gate has a key `on`), and without silently repeated keys."""

    repeated: list[str]
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag.rpartition(":")[2] in ("null", "merge")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                mark = key_node.start_mark
                self.repeated.append(f"{mark.name}:{mark.line + 1}: key {key!r} stands twice; keep one")
            seen.add(key)
        return super().construct_mapping(node, deep)


_FLOAT = r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?(?:0|[1-9][0-9]*)$", "-+0123456789"),
    ("float", _FLOAT, "-+0123456789."),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


class Dumper(yaml.SafeDumper):
    """SafeDumper for what `load_yaml` is to read back: a text that looks like one of its numbers is quoted."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_FLOAT), list("-+0123456789."))


def load_yaml(path: Path, problems: list[str], named: str = "--config") -> dict[str, object] | None:
    """The mapping that a YAML file holds ({} for an empty one), or None and a problem."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        problems.append(f"{named}: {path} cannot be read: {error.strerror}; name a YAML file")
        return None
    except UnicodeDecodeError as error:
        problems.append(f"{named}: {path} is not UTF-8 text (byte {error.start}); name a YAML file")
        return None
    tree = load_text(text, str(path), problems)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        problems.append(
            f"{path}: expected settings as a mapping (section: ...), found {type(tree).__name__} {str(tree)[:60]!r}"
        )
        return None
    return tree


def load_text(text: str, name: str, problems: list[str]) -> Any:
    """What a YAML text says; None and a problem where it is not YAML. `name` says whose text it is."""
    if len(text) > MOST_BYTES:
        problems.append(f"{name}: {len(text):,} characters; settings have at most {MOST_BYTES:,}, so give data as files")
        return None
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        what = f"the character {error.character:#06x} at position {error.position:,}"
        problems.append(f"{name}: not valid YAML: {what} is none that a text may hold")
        return None
    loader.name = name
    loader.repeated = []
    try:
        node = loader.get_single_node()
        if node is not None and (reason := _too_much(node, {})):
            problems.append(f"{name}: not valid YAML: {reason}")
            return None
        value = None if node is None else loader.construct_document(node)
    except RecursionError:
        problems.append(f"{name}: not valid YAML: nested more than {MOST_DEEP} deep")
        return None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        spot = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problems.append(f"{name}{spot}: not valid YAML: {' '.join((error.problem or str(error)).split())}")
        return None
    except (yaml.YAMLError, ValueError) as error:
        problems.append(f"{name}: not valid YAML: {' '.join(str(error).split())}")
        return None
    finally:
        loader.dispose()
    problems += loader.repeated[:10]
    if len(loader.repeated) > 10:
        problems.append(f"{name}: {len(loader.repeated) - 10:,} more keys stand twice")
    return value


def _too_much(top: yaml.Node, sizes: dict[int, tuple[int, int]]) -> str:
    """Why a document is refused before it is built, if it is: an alias inside what it stands for, or one of many aliases."""

    def measure(node: yaml.Node) -> tuple[int, int]:
        """(values, depth) that it unfolds to; an alias counts as what it stands for."""
        if id(node) not in sizes:
            sizes[id(node)] = (0, MOST_DEEP + 1)  # while it is open: meeting it again is a circle
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            inner = [part for pair in pairs for part in pair] if pairs else node.value
            found = [measure(part) for part in inner] if isinstance(node, yaml.CollectionNode) else []
            sizes[id(node)] = (1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0))
        return sizes[id(node)]

    count, depth = measure(top)
    if depth > MOST_DEEP:
        return f"nested more than {MOST_DEEP} deep, or an alias stands inside what it names"
    return f"its aliases unfold to {count:.3g} values; write out what is meant" if count > MOST_VALUES else ""
