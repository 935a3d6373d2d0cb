"""YAML as settings are written in it: 1e-5 is a number, `on` is a word, a key stands once, and what is wrong is said in
one line. For every file of settings that a user writes: --config files, steering specs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """SafeLoader with floats such as 1e-5 (text in plain PyYAML), bools that are only true and false (a steering gate
    has a key `on`, which plain PyYAML reads as True), and without silently repeated keys."""

    repeated: list[str]
    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:bool"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
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


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_yaml(path: Path, problems: list[str], named: str = "--config") -> dict[str, Any] | None:
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
    loader = _Loader(text)
    loader.name = name
    loader.repeated = []
    try:
        value = loader.get_single_data()
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
    problems += loader.repeated
    return value
