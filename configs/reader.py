"""The one reader of settings: YAML files and dotted flags in, one frozen dataclass out, all problems told together.

    --config steerl:ppo --config b.yaml  flags (--section.field VALUE)
               |                               |
               v                               v
        later file wins, lists replaced;  flags win over files            Job dataclass: types, defaults,
               '------------> check every value <------------------------ docstrings under the fields
                                   |
               problems? a line each: path, value, remedy; status 2
                                   |
                                   v
                              the Job, built

A command is a Job dataclass, a `main(job)` and `run_command(main, Job)`. Fields of the Job are sections (dataclasses in files
that import no torch) or plain values. A field with `metadata={"positional": True}` is given without a flag ("texts": after a
flag that stands alone, too); what else a field may say is in rollout/common/settings_reader.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, TypeVar

from steerl.configs import show
from steerl.configs.values import Text, ValueReader, leaf, type_at

from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError, Stopped, UserError, visible
from steerl.rollout.common.settings_reader import MOST, Path, Section, dotted, holds, words
from steerl.rollout.common.yaml_files import load_yaml

Job = TypeVar("Job")
SHIPPED = "steerl:"
"""--config steerl:NAME is the file configs/NAME.yaml of the installed package, steerl:recipes/NAME one of its recipes."""


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
            if "--run.resume" in str(stopped):
                print(f"next: {again(sys.argv if argv is None else [sys.argv[0], *argv])}", file=sys.stderr)
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


def again(argv: Sequence[str]) -> str:
    """The command that goes on with a run that was stopped, to be pasted."""
    words: list[str] = []
    dropped = False
    for word in argv[1:]:
        name = word.partition("=")[0]
        if not dropped and name not in ("--run.resume", "--run.overwrite"):
            words.append(word)
        dropped = name == word and name in ("--run.resume", "--run.overwrite")
    program = argv[0].split() if argv[0].startswith("steerl ") else [argv[0] if argv[0].endswith(".py") else "steerl"]
    launch = ["accelerate", "launch", "..."] if int(os.environ.get("WORLD_SIZE", "1")) > 1 else []
    start = [] if program[0] == "steerl" or launch else ["python"]
    return shlex.join([*launch, *start, *program, *words, "--run.resume", "true"]).replace("'...'", "...")


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
    tree: dict[str, object] = {}
    for name in command.files:
        if (layer := _file_layer(job_type, name, problems)) is not None:
            lay_over(tree, layer, problems)
    flags = ValueReader(problems, "command line")
    for flag in command.flags:
        lay_over(tree, flags.section(job_type, (), flag), problems)
    job = flags.build(job_type, tree, complete=not command.print_config)
    if problems:
        told = list(dict.fromkeys(problems))
        more = [f"{len(told) - MOST:,} more problems of this kind are left for later"] if len(told) > MOST else []
        raise ConfigError(*told[:MOST], *more)
    if command.print_config:
        print(show.commented_yaml(job_type, job), end="")
        raise SystemExit(0)
    return job  # type: ignore[no-any-return]


def read_layers(job_type: type[Job], layers: Sequence[tuple[str, str | Mapping[str, object]]]) -> Job:
    """The settings of files and mappings, a later one over an earlier one, as `read` takes files; each with what lines call it.
    A UserError with every line that is wrong."""
    problems: list[str] = []
    tree: dict[str, object] = {}
    for named, layer in layers:
        if isinstance(layer, str):
            checked = _file_layer(job_type, layer, problems, named)
        else:
            checked = ValueReader(problems, named).section(job_type, (), layer)
        if checked is not None:
            lay_over(tree, checked, problems)
    job = ValueReader(problems, "").build(job_type, tree)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return job  # type: ignore[no-any-return]


def to_mapping(job: object) -> dict[str, object]:
    """The resolved settings as plain mappings, lists and scalars."""
    mapping: dict[str, object] = show.plain(job)
    return mapping


def to_yaml(job: object) -> str:
    """The resolved settings as YAML that --config reads back."""
    return show.to_yaml(job)


# -- the command line -----------------------------------------------------------------------------------------------


@dataclass
class Command:
    """The command line, taken apart; nothing is looked up yet."""

    files: list[str] = field(default_factory=list)
    flags: list[Section] = field(default_factory=list)
    """Each as the mapping that says the same: {section: {field: text}}."""
    help: bool = False
    print_config: bool = False
    problems: list[str] = field(default_factory=list)


def split(job_type: type, argv: Sequence[str]) -> Command:
    command = Command()
    plain: list[str] = []
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        name, equals, text = token.lstrip("-").partition("=")
        path = tuple(name.split("."))
        if token in ("-h", "--help"):
            command.help = True
        elif token == "--print_config":
            command.print_config = True
        elif not token.startswith("-") or token == "-":
            plain.append(token)
        else:
            if not equals and _stands_alone(job_type, path, rest):
                text = "true"
            elif not equals and rest and not rest[0].startswith("--"):
                # What follows is the value, unless it is a flag itself; a value that begins with -- needs --name=value.
                text = rest.pop(0)
            elif not equals and name == "config":
                command.problems.append("--config: no value; name a YAML file, --config FILE")
                continue
            elif not equals and (wanted := type_at(job_type, path)) is not None:
                command.problems.append(f"{name}: no value after {token}; give {words(wanted)}, {token} VALUE")
                continue
            if not token.startswith("--") or not name:
                found = f" (value {text!r})" if text else ""
                command.problems.append(f"{token}: unknown flag{found}; flags are --section.field VALUE, see --help")
            elif name == "config":
                command.files.append(text)
            else:
                command.flags.append(_nested(path, Text(text)))
    _place_plain(job_type, plain, command)
    return command


def _stands_alone(job_type: type, path: Path, rest: Sequence[str]) -> bool:
    """Whether a bool's flag says true by itself: at the end, before another flag, and where texts may follow before any word
    that is no bool (`complete --json "a prompt"`)."""
    if type_at(job_type, path) is not bool:
        return False
    before_texts = len(path) == 1 and any(spot.metadata.get("positional") == "texts" for spot in dataclasses.fields(job_type))  # type: ignore[arg-type]
    return not rest or rest[0].startswith("--") or (before_texts and rest[0] not in ("true", "false"))


def _nested(path: Path, value: object) -> Section:
    return Section({path[0]: _nested(path[1:], value) if path[1:] else value})


def _place_plain(job_type: type, plain: list[str], command: Command) -> None:
    """Values without a flag go to the fields that take such, in order, and are not read as YAML; a list takes all that is
    left."""
    for spot in dataclasses.fields(job_type):  # type: ignore[arg-type]
        if spot.metadata.get("positional") and plain:
            takes_all = holds(type_at(job_type, (spot.name,)), list) is not None
            command.flags.append(Section({spot.name: list(plain) if takes_all else Text(plain[0])}))
            plain = [] if takes_all else plain[1:]
    for text in plain:
        command.problems.append(f"{text!r}: a value without a flag; write --section.field {text}, see --help for the names")


# -- files, and what wins -------------------------------------------------------------------------------------------


def _file_layer(job_type: type, name: str, problems: list[str], named: str = "--config") -> Section | None:
    is_shipped, here = name.startswith(SHIPPED), FilePath(__file__).parent
    file = here / f"{name.removeprefix(SHIPPED)}.yaml" if is_shipped else FilePath(name)
    if not file.exists():
        # Shipped names are compared without their prefix, which would make all of them alike.
        folder = file.parent if file.parent.is_dir() else FilePath("configs")
        known = [str(f) for f in sorted(folder.glob("*.y*ml"))]
        if is_shipped:
            files = [*sorted(here.glob("*.yaml")), *sorted(here.glob("recipes/*.yaml")), *sorted(here.glob("studies/*.yaml"))]
            known = [f.relative_to(here).with_suffix("").as_posix() for f in files]
        near = difflib.get_close_matches(name.removeprefix(SHIPPED), known, n=1)
        otherwise = f"there are {', '.join(SHIPPED + stem for stem in known)}" if is_shipped else "check the path"
        hint = f"did you mean {SHIPPED if is_shipped else ''}{near[0]}?" if near else otherwise
        problems.append(f"{named}: {name} does not exist; {hint}")
        return None
    tree = load_yaml(file, problems, named)
    return None if tree is None else ValueReader(problems, name).section(job_type, (), tree)


def lay_over(tree: dict[str, Any], layer: Section, problems: list[str], path: Path = ()) -> None:
    """Set what a layer says; what stands there already, a list or a free mapping too, is replaced."""
    for name, value in layer.items():
        if not isinstance(value, Section):
            tree[name] = value
            continue
        if value and tree.get(name) is None:
            tree[name] = {}
        if isinstance(tree.get(name), dict):
            lay_over(tree[name], value, problems, (*path, name))
        elif value:
            stands = f"{dotted((*path, name))} is {tree[name]!r} already"
            below, _ = leaf((*path, name), value)
            problems.append(f"{dotted(below)}: cannot be set, {stands}; give the whole of it as a mapping")
