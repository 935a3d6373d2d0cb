"""The one reader of settings: YAML files and dotted flags in, one frozen dataclass out, all problems told together.

    --config a.yaml --config b.yaml      flags (--section.field VALUE)
               |                               |
               v                               v
        later file wins, lists replaced;  flags win over files            Job dataclass: types, defaults,
               '------------> check every value <------------------------ docstrings under the fields
                                   |
               problems? a line each: path, value, remedy; status 2
                                   |
                                   v
                              the Job, built

A command is a Job dataclass, a `main(job)` and `run_command(main, Job)`. Fields of the Job are sections (dataclasses beside the
code that reads them) or plain values. A field with `metadata={"positional": True}` is given without a flag; one with
`metadata={"check": function}` is shown to that function as well, whose UserError is told with all the others.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, TypeVar

from steerl.configs import checks, shape, show
from steerl.configs.shape import Path, dotted

from steerl.rollout.common import processes
from steerl.rollout.common.errors import Stopped, UserError, visible
from steerl.rollout.common.yaml_files import load_text, load_yaml

Job = TypeVar("Job")


def run_command(main: Callable[[Job], None], job_type: type[Job], argv: Sequence[str] | None = None) -> None:
    """Read the settings, join the other processes, run `main`. A UserError is a line each on stderr and status 2; a job that a
    signal ended early, and that goes on with --run.resume true, leaves with status 75.

    Of a job's processes the one that fails says why; those that lose it by that say so in a line, with status 1."""
    failed = 0
    logging.setLogRecordFactory(_Record)
    rank = int(os.environ.get("RANK", "0"))
    reading = True
    try:
        job = read(job_type, argv)
        reading = False
        processes.start()
        main(job)
    except UserError as problem:
        failed = 2
        # Every process reads the same settings, so one tells what is wrong with them; later each speaks for itself.
        for line in () if reading and rank else problem.lines:
            print(f"process {rank}: {line}" if rank else line, file=sys.stderr)
    except RuntimeError as error:
        if not processes.lost_peer(error):
            raise
        failed = 1
        print(
            f"process {rank}: ends, because another process of this job did; its own words, or the launcher's, say why",
            file=sys.stderr,
        )
    except Stopped as stopped:
        failed = Stopped.status
        if not rank:
            print(stopped, file=sys.stderr)
    except KeyboardInterrupt:
        failed = 130
        if not rank:
            print("interrupted", file=sys.stderr)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        failed = 2
        print(
            f"{str(error.filename)[:60]}...: {len(str(error.filename))} characters; no file can have this name", file=sys.stderr
        )
    finally:
        of_several = processes.close()
    if of_several and failed in (0, Stopped.status):
        processes.end(failed)
    if failed:
        raise SystemExit(failed)


class _Record(logging.LogRecord):
    """What any library logs while a command runs may quote a stranger's words: they must not steer the terminal."""

    def getMessage(self) -> str:
        return visible(super().getMessage())


def read(job_type: type[Job], argv: Sequence[str] | None = None) -> Job:
    """The settings that `argv` (the command line, unless given) asks for; a UserError with every line that is wrong."""
    command = split(job_type, sys.argv[1:] if argv is None else argv)
    if command.help:
        print(show.help_text(job_type))
        raise SystemExit(0)
    problems = list(command.problems)
    layers = [_file_layer(job_type, name, problems) for name in command.files]
    layers += [_flag_layer(job_type, flag, problems) for flag in command.flags]
    tree: dict[str, Any] = {}
    for path, value in (item for layer in layers for item in layer):
        _put(tree, path, value, problems)
    job = checks.build(job_type, tree, problems, complete=not command.print_config)
    if problems:
        told = list(dict.fromkeys(problems))
        more = [f"{len(told) - checks.MOST:,} more problems of this kind are left for later"] if len(told) > checks.MOST else []
        raise UserError(*told[: checks.MOST], *more)
    if command.print_config:
        print(show.commented_yaml(job_type, job), end="")
        raise SystemExit(0)
    return job  # type: ignore[no-any-return]


def to_mapping(job: Any) -> dict[str, Any]:
    """The resolved settings as plain mappings, lists and scalars."""
    mapping: dict[str, Any] = show.plain(job)
    return mapping


def to_yaml(job: Any) -> str:
    """The resolved settings as YAML that --config reads back."""
    return show.to_yaml(job)


# -- the command line -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    path: Path
    text: str
    plain: list[str] | None = None
    """The values of a setting that is given without a flag; they are not read as YAML."""


@dataclass
class Command:
    """The command line, taken apart; nothing is looked up yet."""

    files: list[str] = field(default_factory=list)
    flags: list[Flag] = field(default_factory=list)
    help: bool = False
    print_config: bool = False
    problems: list[str] = field(default_factory=list)


def split(job_type: type, argv: Sequence[str]) -> Command:
    command = Command()
    plain: list[str] = []
    position = 0
    while position < len(argv):
        token = argv[position]
        position += 1
        if token in ("-h", "--help"):
            command.help = True
        elif token == "--print_config":
            command.print_config = True
        elif not token.startswith("-") or token == "-":
            plain.append(token)
        else:
            name, equals, text = token.lstrip("-").partition("=")
            if not equals and _is_switch(job_type, name, argv[position : position + 1]):
                text = "true"
            elif not equals:
                # What follows is the value, unless it is a flag itself; a value that begins with -- needs --name=value.
                if position < len(argv) and not argv[position].startswith("--"):
                    text = argv[position]
                    position += 1
                else:
                    command.problems.append(_no_value(job_type, token, name))
                    continue
            if not token.startswith("--") or not name:
                command.problems.append(f"{token}: unknown flag (value {text!r}); flags are --section.field VALUE, see --help")
            elif name == "config":
                command.files.append(text)
            else:
                command.flags.append(Flag(tuple(name.split(".")), text))
    _place_plain(job_type, plain, command)
    return command


def _is_switch(job_type: type, name: str, following: Sequence[str]) -> bool:
    """Whether a bool's flag stands alone, at the end or before another flag, and so says true."""
    return shape.type_at(job_type, tuple(name.split("."))) is bool and all(word.startswith("--") for word in following)


def _no_value(job_type: type, token: str, name: str) -> str:
    if name == "config":
        return "--config: no value; name a YAML file, --config FILE"
    wanted = shape.type_at(job_type, tuple(name.split(".")))
    if wanted is None:
        return shape.unknown(job_type, tuple(name.split(".")), "no value", "command line")
    return f"{name}: no value after {token}; give {shape.words(wanted)}, {token} VALUE"


def _place_plain(job_type: type, plain: list[str], command: Command) -> None:
    """Values without a flag go to the fields that take such, in order; a list takes all that is left."""
    for spot in dataclasses.fields(job_type):  # type: ignore[arg-type]
        if spot.metadata.get("positional") and plain:
            wanted = shape.type_at(job_type, (spot.name,))
            count = len(plain) if shape.is_list(wanted) else 1
            command.flags.append(Flag((spot.name,), plain[0], plain[:count]))
            plain = plain[count:]
    for text in plain:
        command.problems.append(f"{text!r}: a value without a flag; write --section.field {text}, see --help for the names")


# -- layers: each file, then each flag, as (path, checked value) ----------------------------------------------------


def _file_layer(job_type: type, name: str, problems: list[str]) -> list[tuple[Path, Any]]:
    file = FilePath(name)
    if not file.exists():
        folder = file.parent if file.parent.is_dir() else FilePath("configs")
        known = [str(f) for f in sorted(folder.glob("*.y*ml"))]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "check the path"
        problems.append(f"--config: {name} does not exist; {hint}")
        return []
    tree = load_yaml(file, problems)
    if tree is None:
        return []
    return checks.check(job_type, (), tree, str(file), problems)


def _flag_layer(job_type: type, flag: Flag, problems: list[str]) -> list[tuple[Path, Any]]:
    wanted = shape.type_at(job_type, flag.path)
    where = "command line"
    if wanted is None:
        problems.append(shape.unknown(job_type, flag.path, repr(flag.text), where))
        return []
    if flag.plain is not None:
        if shape.is_list(wanted):
            return checks.check(wanted, flag.path, flag.plain, where, problems)
        return checks.check(wanted, flag.path, checks.Text(flag.text), where, problems)
    if not (shape.has_parts(wanted) or (shape.may_have_parts(wanted) and flag.text.lstrip()[:1] in ("{", "["))):
        return checks.check(wanted, flag.path, checks.Text(flag.text), where, problems)
    if shape.section_of(wanted) is not None and flag.text.endswith((".yaml", ".yml")):
        tree = load_yaml(FilePath(flag.text), problems, dotted(flag.path))
        return [] if tree is None else checks.check(wanted, flag.path, tree, flag.text, problems)
    value = load_text(flag.text, dotted(flag.path), problems)
    return [] if value is None and problems else checks.check(wanted, flag.path, value, where, problems)


def _put(tree: dict[str, Any], path: Path, value: Any, problems: list[str]) -> None:
    """Set one value; what stands there already, a list or a free mapping too, is replaced."""
    for depth, name in enumerate(path[:-1]):
        inner = tree.get(name)
        if inner is None:
            inner = tree[name] = {}
        elif not isinstance(inner, dict):
            stands = f"{dotted(path[: depth + 1])} is {inner!r} already"
            problems.append(f"{dotted(path)}: cannot be set, {stands}; give the whole of it as a mapping")
            return
        tree = inner
    tree[path[-1]] = value
