"""Finding a user's function by `file.py:name` or `module:name`. Light on purpose: worker processes import it."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from steerl.rollout.common.errors import ConfigError, UserError, said

logger = logging.getLogger(__name__)


def load_function(spec: str, where: str, moved: Mapping[str, str] | None = None) -> Any:
    """The callable that `spec` names; a UserError that says which half of it is wrong. `moved`: modules' names of before, taken
    where nothing else has the name."""
    source, _, name = spec.rpartition(":")
    try:
        module = _load_file(Path(source), where) if source.endswith(".py") else _import(source, where, moved or {})
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name != source.split(".")[0] and error.name != source:
            raise ConfigError(f"{where}: {source} cannot be imported: {said(error)}") from error
        raise ConfigError(f"{where}: there is no module {source!r}; a file's name ends in .py, file.py:name") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{where}: {source} cannot be imported: {said(error)}") from error
    found: object = module
    for attribute in name.split("."):
        known = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
        if not hasattr(found, attribute):
            close = difflib.get_close_matches(attribute, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "it has: " + (", ".join(known[:10]) or "nothing")
            raise ConfigError(f"{where}: {source} has no {attribute!r}; {hint}")
        found = getattr(found, attribute)
    if not callable(found):
        raise ConfigError(f"{where}: {spec} is a {type(found).__name__}, not a function")
    return found


def _import(source: str, where: str, moved: Mapping[str, str]) -> ModuleType:
    try:
        return importlib.import_module(source)
    except ImportError as error:
        is_absent = error.name in (source, source.split(".")[0]) or "imported as steerl." in str(error)  # our own folder
        if source not in moved or not is_absent:
            raise
        logger.warning("%s: %s is called %s now; change the name", where, source, moved[source])
        return importlib.import_module(moved[source])


def _load_file(path: Path, where: str) -> ModuleType:
    if not path.is_file():
        raise ConfigError(f"{where}: there is no file {path} (looked in {Path.cwd()}); give its path")
    path = path.resolve()
    # The name tells files of one name in two folders apart, and one file is loaded once however many parts use it.
    name = f"user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # so that the file may import its neighbors
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
