"""The documents are true: links lead somewhere, files and functions that are named exist, commands are read, metrics are explained."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from steerl.cli import COMMANDS
from steerl.cli import main as steerl_main

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TODAY = [page for page in PAGES if page.parent.name != "log" and page.name != "CHANGELOG.md"]
"""Pages that speak of the code as it is; the log and the changes name what was."""
ROOMS = "steerl|rollout|reward|training|configs|scripts|tests|docs|examples"


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The headings of a page as its host turns them into addresses."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else (page.parent / path)
        assert there.exists(), f"{target}: not there"
        assert not anchor or anchor in anchors(there), f"{target}: no such heading"


def defined(path: Path) -> set[str]:
    """Functions, classes, methods (`Class.method`) and constants of a file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


@pytest.mark.parametrize("page", TODAY, ids=names(TODAY))
def test_files_and_functions_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    for path, name in re.findall(rf"(?<![\w./-])((?:{ROOMS})/[\w./-]+\.(?:py|yaml|md))(?::([\w.]*\w))?", text):
        assert (ROOT / path).is_file() or Path(path).stem == "NAME", f"{path}: not there"
        assert not name or name in defined(ROOT / path), f"{path} has no {name}"
    for module, imported in re.findall(r"^(?:from (steerl[\w.]*) import (.+)|import steerl)$", text, flags=re.MULTILINE):
        for name in imported.strip("()").split(", ") if module else ():
            there = hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}")
            assert there, f"{module} has no {name}"


def settings_of(section: str) -> set[str]:
    job = importlib.import_module("steerl.scripts.train_ppo").PPOJob
    hints = {field.name: field for field in dataclasses.fields(job)}
    factory = hints[section].default_factory
    return {field.name for field in dataclasses.fields(factory)}  # type: ignore[arg-type]


@pytest.mark.parametrize("page", TODAY, ids=names(TODAY))
def test_settings_that_are_named_exist(page):
    """`ppo.clip` and the like; `ppo/clip_fraction` is a metric."""
    known = {
        section: settings_of(section) for section in ("ppo", "sampling", "run", "model", "prompts", "engine", "environment")
    }
    pieces = re.split(r"^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    shown = [
        block for block in pieces[1::2] if block.startswith(("bash\n", "yaml\n"))
    ]  # what is printed may be wrong on purpose
    text = "\n".join([*pieces[::2], *shown])
    for section, name in re.findall(r"(?<![\w/.])(?:--)?(ppo|sampling|run|model|prompts|engine|environment)\.([a-z]\w*)", text):
        assert name in known[section] or name in ("py", "yaml", "jsonl", "md", "log"), f"{section}.{name}: no such setting"


@pytest.mark.parametrize(("section", "page"), [("engine", "engines.md"), ("environment", "environments.md")])
def test_every_setting_of_a_section_is_explained(section, page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert [name for name in sorted(settings_of(section)) if f"| `{section}.{name}` |" not in text] == []


def commands(page: Path) -> list[list[str]]:
    joined = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = [re.sub(r"^\$ ", "", line.strip()) for line in joined.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("steerl ", "accelerate launch "))]


DOCUMENTED = [(page, words) for page in TODAY if page.name != "README.md" for words in commands(page)]


@pytest.mark.parametrize(("page", "words"), DOCUMENTED, ids=[f"{p.name}: {shlex.join(w)}" for p, w in DOCUMENTED])
def test_commands_are_read(page, words, tmp_path, monkeypatch, capsys):
    """Flags and values are right; the files that they name need not be there, but for a page's own (`# NAME.yaml`)."""
    for name, text in re.findall(r"```\w+\n# (\w+\.\w+)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    if words[0] == "accelerate":
        at = next(i for i, word in enumerate(words) if Path(word).name.removesuffix(".py") in COMMANDS.values())
        config = words[words.index("--config_file") + 1]
        assert (ROOT / config).is_file() or config == "MINE.yaml", config
        script = Path(words[at]).stem
        words = ["steerl", next(name for name, file in COMMANDS.items() if file == script), *words[at + 1 :]]
    monkeypatch.setattr(sys, "argv", sys.argv)
    if words[1] == "summarize":
        return  # transformers' own reader of flags
    with pytest.raises(SystemExit) as left:
        steerl_main([*words[1:], *([] if "--help" in words else ["--print_config"])])
    assert left.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("page", TODAY, ids=names(TODAY))
def test_python_and_yaml_can_be_read(page):
    for program in blocks(page, "python"):
        compile(program, page.name, "exec")
    for text in blocks(page, "yaml"):
        yaml.safe_load(text)


def test_the_map_is_that_of_the_files():
    spec = importlib.util.spec_from_file_location("make_map", ROOT / "docs" / "make_map.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    page = made.PAGE.read_text(encoding="utf-8")
    assert page.count(made.BEGIN) == page.count(made.END) == 1
    assert page == made.with_map(page), "run: python docs/make_map.py"
    for room in made.ROOMS:
        for path in [*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.yaml")]:
            assert path.name == "__init__.py" or made.first_line(path), f"{path.relative_to(ROOT)} does not say what it is for"


def explained(page: str) -> list[str]:
    """The keys of a page's tables, as patterns: `time/<phase>_s` stands for every phase."""
    rows = re.findall(r"^\| ((?:`[^`]+`(?:, )?)+) \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    keys = [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
    return [re.sub(r"<[^>]+>", "[^/]+", re.escape(key).replace(r"\<", "<").replace(r"\>", ">")) for key in keys]


def test_every_column_of_a_dump_is_explained():
    from steerl.rollout.dumps.store import schema

    known = explained("dumps.md")
    assert [name for name in schema().names if name not in known] == []


def test_every_metric_that_a_run_logs_is_explained(tiny_world, tmp_path):
    """A run with a value, a KL, a correction and an evaluation, and one that is steered."""
    world = tiny_world("reviews")
    sites = [{"name": "s", "at": {"layers": [0]}, "op": {"type": "zero"}, "strength": 0.1}]
    steering = {"role": "behaviour", "correction": {"type": "token_truncate"}, "sites": sites, "fraction": 0.5}
    common = {
        "model.path": world / "sft",
        "prompts.path": world / "prompts.jsonl",
        "sampling.max_new_tokens": 4,
        "sampling.n": 2,
        "ppo.steps": 2,
        "ppo.rollouts_per_step": 8,
        "ppo.eval_every": 1,
        "ppo.eval_prompts": 2,
        "reward": json.dumps([{"kind": "length", "unit": "characters", "max": 8}]),
    }
    known = [re.compile(pattern) for pattern in explained("metrics.md")]
    for name, more in {"plain": {"ppo.kl_as": "loss"}, "steered": {"steering": json.dumps(steering)}}.items():
        flags = [w for key, value in (common | more | {"run.dir": tmp_path / name}).items() for w in (f"--{key}", str(value))]
        train_ppo = importlib.import_module("steerl.scripts.train_ppo")
        train_ppo.main(importlib.import_module("steerl.configs.reader").read(train_ppo.PPOJob, flags))
        logged = {key for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
        assert [key for key in sorted(logged) if not any(pattern.fullmatch(key) for pattern in known)] == []
        if name == "steered":
            assert {"correction/ess", "steering/kl_sequence", "eval/reward"} <= logged
