"""The reader: what is read, what wins, and that every problem of a command is told in a line of its own."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steerl.configs.reader import read, run_command, to_yaml

import pytest
import yaml

from steerl.rollout.common.errors import UserError
from steerl.scripts.dump_rollouts import DumpJob


@dataclass(frozen=True)
class Model:
    path: str
    kind: Literal["auto", "causal", "seq2seq"] = "auto"
    """Which Auto class loads it."""
    peft: dict[str, Any] | None = None


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """What divides the logits."""
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    stop_ids: list[int] = field(default_factory=list)
    greedy: bool = False
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"sampling.temperature: expected above 0, found {self.temperature}; such as 0.7")


@dataclass(frozen=True)
class Part:
    name: str
    weight: float = 1.0


def sites_only(spec: Any) -> None:
    if isinstance(spec, dict) and "sights" in spec:
        raise UserError("sights: unknown; did you mean sites?", "steering.role: missing", "nothing is steered")


@dataclass(frozen=True)
class Job:
    """A job of a test."""

    model: Model
    sampling: Sampling = field(default_factory=Sampling)
    other: Sampling | None = None
    steering: dict[str, Any] | str | None = field(default=None, metadata={"check": sites_only})
    reward: list[dict[str, Any]] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    words: list[str] = field(default_factory=list, metadata={"positional": True})
    verify: bool = False


@pytest.fixture
def file(tmp_path: Path):
    count = 0

    def write(text: str) -> str:
        nonlocal count
        count += 1
        path = tmp_path / f"config{count}.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def lines(*argv: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        read(Job, argv)
    return list(caught.value.lines)


MODEL = ("--model.path", "m")


def test_defaults_and_flags():
    job = read(Job, [*MODEL, "--sampling.temperature=1e-1", "--sampling.top_k", "5", "--sampling.greedy", "true"])
    assert job == Job(model=Model("m"), sampling=Sampling(temperature=0.1, top_k=5, greedy=True))
    assert isinstance(read(Job, [*MODEL, "--sampling.temperature", "1"]).sampling.temperature, float)


def test_later_files_replace_lists_and_flags_win_wherever_they_stand(file):
    first = file("model: {path: a}\nsampling: {stop: [x, y], stop_ids: [1], temperature: 0.5}\nreward: [{name: one}]")
    second = file("sampling: {stop: [z], temperature: 0.6}\nreward: [{name: two}, {name: three}]")
    job = read(Job, ["--sampling.temperature", "0.7", "--config", first, "--config", second])
    assert job.sampling == Sampling(stop=["z"], stop_ids=[1], temperature=0.7)
    assert [part["name"] for part in job.reward] == ["two", "three"]
    assert job.model.path == "a"


def test_free_mappings_and_flags_into_them(file):
    config = file("model: {path: m, peft: {peft_type: LORA, r: 4}}\nsteering: {role: policy, sites: [{at: {layers: [1]}}]}")
    job = read(
        Job, ["--config", config, "--model.peft.r", "8", "--model.peft.target_modules", "[q, v]", "--steering.role", "data"]
    )
    assert job.model.peft == {"peft_type": "LORA", "r": 8, "target_modules": ["q", "v"]}
    assert job.steering == {"role": "data", "sites": [{"at": {"layers": [1]}}]}
    assert read(Job, [*MODEL, "--steering", "s.yaml"]).steering == "s.yaml"
    assert read(Job, [*MODEL, "--steering", "{role: data}"]).steering == {"role": "data"}
    assert read(Job, [*MODEL, "--reward", '[{name: a, weight: 2, nested: {deep: [1e-3, "x"]}}]']).reward == [
        {"name": "a", "weight": 2, "nested": {"deep": [0.001, "x"]}}
    ]


def test_on_is_a_word_and_so_is_no(file):
    """A steering gate has a key `on`; plain YAML 1.1 reads it as true."""
    config = file("model: {path: m}\nsteering: {gate: {on: prompt_mean}}\nsampling: {stop: [no, yes, off, y], greedy: yes}")
    job = read(Job, ["--config", config])
    assert (
        job.steering
        == {"gate": {"on": "prompt_mean"}}
        == read(Job, [*MODEL, "--steering", "{gate: {on: prompt_mean}}"]).steering
    )
    assert job.sampling == Sampling(stop=["no", "yes", "off", "y"], greedy=True)


def test_a_flag_into_a_mapping_does_not_change_what_the_file_gave_elsewhere(file):
    config = file("model: {path: m}\nsteering: s.yaml")
    assert lines("--config", config, "--steering.role", "data") == [
        "steering.role: cannot be set, steering is 's.yaml' already; give the whole of it as a mapping"
    ]


def test_lists_on_the_command_line():
    job = read(Job, [*MODEL, "--sampling.stop", '["\\n", "a b"]', "--sampling.stop_ids", "[3, 4]"])
    assert job.sampling == Sampling(stop=["\n", "a b"], stop_ids=[3, 4])


def test_sections_in_lists_and_optional_sections(file):
    config = file("model: {path: m}\nparts: [{name: a}, {name: b, weight: 2}]\nother: {top_k: 3}")
    job = read(Job, ["--config", config])
    assert job.parts == [Part("a"), Part("b", 2.0)]
    assert job.other == Sampling(top_k=3)
    assert read(Job, ["--config", config, "--other", "null"]).other is None
    wrong = file("model: {path: m}\nparts: [{nam: a}, {name: b, weight: heavy}]")
    found = lines("--config", wrong)
    assert any(line.startswith("parts[0].nam: unknown") and "did you mean parts[0].name?" in line for line in found)
    assert any(line.startswith("parts[1].weight: expected a number, found 'heavy'") for line in found)
    assert any(line.startswith("parts[0].name: missing") for line in found)


def test_empty_sections_and_empty_files(file):
    assert (
        read(Job, ["--config", file("model: {path: m}\nsampling:\n"), "--config", file("# nothing yet\n")]).sampling
        == Sampling()
    )


def test_a_section_from_a_file(file):
    section = file("temperature: 0.3\nstop: [q]")
    assert read(Job, [*MODEL, "--sampling", section]).sampling == Sampling(temperature=0.3, stop=["q"])
    assert read(Job, [*MODEL, "--sampling", "{top_k: 2}"]).sampling == Sampling(top_k=2)


def test_values_without_a_flag():
    assert read(Job, [*MODEL, "null", "--verify", "true", "[b"]).words == ["null", "[b"]


def test_a_bool_flag_may_stand_alone():
    assert read(Job, [*MODEL, "--verify", "--sampling.greedy"]) == Job(Model("m"), Sampling(greedy=True), verify=True)
    assert read(Job, [*MODEL, "--verify", "false", "--sampling.greedy=true"]).verify is False


def test_negative_numbers_are_values_and_double_dashes_need_equals():
    assert read(Job, [*MODEL, "--sampling.top_k", "-1"]).sampling.top_k == -1
    assert read(Job, ["--model.path=--odd"]).model.path == "--odd"
    assert "model.path: no value after --model.path; give text, --model.path VALUE" in lines("--model.path", "--verify")


# what is wrong -> how its line begins, what it must hold
WRONG = {
    "misspelt flag": (["--sampling.temprature", "2"], "sampling.temprature: unknown", ["'2'", "sampling.temperature?"]),
    "misspelt section": (["--samplin.top_k", "2"], "samplin.top_k: unknown", ["'2'", "sampling.top_k?"]),
    "both misspelt": (["--samplin.topk", "2"], "samplin.topk: unknown", ["'2'", "sampling.top_k?"]),
    "abbreviated flag": (["--sampling.temp", "2"], "sampling.temp: unknown", ["'2'", "sampling.temperature?"]),
    "no section": (["--temperature", "2"], "temperature: unknown", ["sampling.temperature?"]),
    "wrong section": (["--model.temperature", "2"], "model.temperature: unknown", ["path", "kind", "peft"]),
    "below a value": (["--sampling.top_k.x", "2"], "sampling.top_k.x: unknown", ["a whole number"]),
    "one dash": (["-k", "2"], "-k: unknown flag", ["'2'", "--help"]),
    "number": (["--sampling.temperature", "hot"], "sampling.temperature: expected a number, found 'hot'", ["0.5"]),
    "not a number": (["--sampling.temperature", "nan"], "sampling.temperature: expected a number, found 'nan'", []),
    "whole number": (["--sampling.top_k", "1.5"], "sampling.top_k: expected a whole number, found '1.5'", ["such as 8"]),
    "a bool for a number": (["--sampling.top_k", "true"], "sampling.top_k: expected a whole number, found 'true'", []),
    "bool": (["--verify", "maybe"], "verify: expected true or false, found 'maybe'", ["write true or false"]),
    "null": (["--sampling.top_k", "null"], "sampling.top_k: expected a whole number, found 'null'", []),
    "optional": (["--sampling.limit", "x"], "sampling.limit: expected a whole number or null, found 'x'", []),
    "choice": (
        ["--model.kind", "casual"],
        "model.kind: expected one of auto, causal, seq2seq",
        ["'casual'", "did you mean causal?"],
    ),
    "far choice": (["--model.kind", "xyz"], "model.kind: expected one of auto, causal, seq2seq", ["choose auto or causal or"]),
    "list": (["--sampling.stop", "abc"], "sampling.stop: expected a list (each text), found 'abc'", ["['abc']"]),
    "list's item": (["--sampling.stop_ids", "[1, x]"], "sampling.stop_ids[1]: expected a whole number, found 'x'", []),
    "text item": (["--sampling.stop", "[a, 1]"], "sampling.stop[1]: expected text, found 1", ["quotes"]),
    "list of mappings": (
        ["--reward", "{name: a}"],
        "reward: expected a list (each a mapping)",
        ["write it as [{'name': 'a'}]"],
    ),
    "mapping": (["--model.peft", "lora"], "model.peft: expected a mapping or null, found 'lora'", ["{name: value}"]),
    "section": (["--sampling", "hot"], "sampling: expected a mapping, found 'hot'", ["{name: value}"]),
    "not YAML": (["--sampling.stop", "[a"], "sampling.stop:1:3: not valid YAML", []),
    "its own rule": (["--sampling.temperature", "-1"], "sampling.temperature: expected above 0, found -1.0", ["such as 0.7"]),
    "missing file": (["--config", "nowhere.yaml"], "--config: nowhere.yaml does not exist", []),
    "no value": (["--sampling.top_k"], "sampling.top_k: no value after --sampling.top_k; give a whole number", []),
}


@pytest.mark.parametrize("name", WRONG)
def test_one_clear_line(name):
    argv, begins, holds = WRONG[name]
    found = lines(*MODEL, *argv)
    assert len(found) == 1
    assert found[0].startswith(begins)
    assert all(part in found[0] for part in holds), found[0]


def test_all_problems_of_one_command_are_told_together(file):
    """Everything of the table in one command: each line is there, and no other."""
    values = [(argv, begins) for name, (argv, begins, _) in WRONG.items() if name not in ("no value", "its own rule")]
    found = lines(*MODEL, *(word for argv, _ in values for word in argv))
    assert len(found) == len(values)
    assert [begins for _, begins in values if not any(line.startswith(begins) for line in found)] == []


def test_all_problems_of_one_file(file):
    config = file(
        """
model: {path: 5, kind: casual}
samplng:
  temperatur: 2
sampling:
  temperature: hot
  top_k: 1.5
  stop: abc
  stop_ids: [1, x]
  greedy: 1
  limt: 3
other: {temperature: -2}
temperature: 0.3
verify: null
verify: true
"""
    )
    found = lines("--config", config, "--sampling.top_kk", "3")
    begins = [
        f"{config}:15: key 'verify' stands twice", "model.path: expected text, found 5", "model.kind: expected one of",
        "samplng: unknown", "samplng.temperatur: unknown", "sampling.temperature: expected a number, found 'hot'",
        "sampling.top_k: expected a whole number, found 1.5", "sampling.stop: expected a list",
        "sampling.stop_ids[1]: expected a whole number", "sampling.greedy: expected true or false, found 1",
        "sampling.limt: unknown", "sampling.temperature: expected above 0, found -2", "temperature: unknown",
        "sampling.top_kk: unknown",
    ]  # fmt: skip
    assert sorted(b for b in begins if sum(line.startswith(b) for line in found) != 1) == []
    assert len(found) == len(begins)
    assert all(config in line for line in found if "unknown" in line and "top_kk" not in line), "the file is named"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [", "not valid YAML"),
        ("just words", "expected settings as a mapping"),
        ("- a\n- b", "expected settings as a mapping"),
        ("model: {path: m}\n\tsampling: {}", "not valid YAML"),
        ("model: !!python/object:os.system {}", "not valid YAML"),
    ],
)
def test_files_that_cannot_be_read(file, text, part):
    (line,) = [line for line in lines("--config", file(text)) if not line.startswith("model.path: missing")]
    assert part in line
    assert "\n" not in line


def test_a_folder_and_bytes_for_a_config(tmp_path):
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read: Is a directory" in lines(*MODEL, "--config", str(tmp_path))[0]
    assert "is not UTF-8 text" in lines(*MODEL, "--config", str(tmp_path / "b.yaml"))[0]


def test_free_mappings_are_judged_by_those_who_know_more():
    found = lines("--steering", "{sights: []}", "--sampling.top_k", "x")
    assert [line.split(":")[0] for line in found] == [
        "sampling.top_k",
        "model.path",
        "steering.sights",
        "steering.role",
        "steering",
    ]


def test_shipped_files_have_names(tmp_path, monkeypatch):
    """From any folder, with a stranger's configs/ in it: steerl:NAME is the package's own file."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dump.yaml").write_text("dump: {rows: 1}")
    monkeypatch.chdir(tmp_path)
    own = Path(__file__).parents[2] / "configs" / "dump.yaml"
    assert read(DumpJob, ["--config", "steerl:dump"]) == read(DumpJob, ["--config", str(own)])
    with pytest.raises(UserError) as caught:
        read(DumpJob, ["--config", "steerl:dumb", "--config", "steerl:zzz", "--config", "steerl:recipes/gemma-3-1b-helpfull"])
    assert caught.value.lines[0] == "--config: steerl:dumb does not exist; did you mean steerl:dump?"
    assert caught.value.lines[1].startswith(
        "--config: steerl:zzz does not exist; there are steerl:calculator, steerl:complete, steerl:dump, "
    )
    near = "did you mean steerl:recipes/gemma-3-1b-helpful?"
    assert caught.value.lines[2] == f"--config: steerl:recipes/gemma-3-1b-helpfull does not exist; {near}"


def test_missing_settings_are_named_once():
    assert lines() == ["model.path: missing; give text, --model.path VALUE"]
    assert len(lines("--model.path")) == 1


def test_what_is_written_is_read_back(file):
    argv = [
        *MODEL,
        "--model.peft",
        "{r: 2, on: [a, b]}",
        "--sampling.stop",
        '["\\n", "é: #x"]',
        "--sampling.temperature",
        "1e-5",
    ]
    job = read(Job, argv)
    assert read(Job, ["--config", file(to_yaml(job))]) == job


def test_print_config_reads_back_and_shows_the_docs(file, capsys):
    argv = [*MODEL, "--sampling.stop", '["\\n"]', "--steering", "{role: data, sites: []}"]
    with pytest.raises(SystemExit) as left:
        read(Job, [*argv, "--print_config"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert read(Job, ["--config", file(text)]) == read(Job, argv)
    assert "  # What divides the logits.\n  temperature: 1.0\n" in text


def test_print_config_without_what_is_needed(capsys):
    with pytest.raises(SystemExit):
        read(Job, ["--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["path"] is None


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as left:
        read(Job, ["--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    for name in ("--model.path", "--model.kind", "--sampling.temperature", "--other.top_k", "--steering", "--verify", "WORDS"):
        assert f"  {name}  (" in text
    assert "What divides the logits." in text
    assert "one of auto, causal, seq2seq; default auto" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_door_shows_problems_and_leaves_with_two(capsys):
    def main(job: Job) -> None:
        raise UserError("prompts.path: first", "prompts.path: second")

    with pytest.raises(SystemExit) as left:
        run_command(main, Job, [*MODEL])
    assert left.value.code == 2
    assert capsys.readouterr().err == "prompts.path: first\nprompts.path: second\n"


def test_a_door_lets_no_strangers_words_steer_the_terminal(capsys, caplog):
    """Problems, and what any library logs: escapes, the C1 range and turned-round text come out as pictures."""
    words = "evil \x1b[2J\x9b2J\x07\r\u202e \ud800"

    def main(job: Job) -> None:
        logging.getLogger("some.library").warning("it said %s", words)
        raise UserError(f"reward[0]: {words}")

    factory = logging.getLogRecordFactory()
    try:
        with pytest.raises(SystemExit) as left:
            run_command(main, Job, [*MODEL])
    finally:
        logging.setLogRecordFactory(factory)
    shown = "evil \u241b[2J\ufffd2J\u2407\u240d\ufffd \ufffd"
    assert left.value.code == 2
    assert capsys.readouterr().err == f"reward[0]: {shown}\n"
    assert [record.getMessage() for record in caplog.records] == [f"it said {shown}"]


def test_a_door_hides_no_defect_of_ours():
    def main(job: Job) -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError):
        run_command(main, Job, [*MODEL])


def test_a_real_door(tmp_path):
    """A process: status 2, nothing on stdout, one line each on stderr, no usage block, no traceback."""
    command = [sys.executable, "scripts/make_tiny.py", "--ot", "x", "--seed", "one", "--worlds", "reviews"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 2
    assert ran.stdout == ""
    said = ran.stderr.splitlines()
    assert [line.split(":")[0] for line in said] == ["ot", "seed", "out"]
    assert "did you mean out?" in said[0]


@pytest.mark.parametrize(
    "text", ["1:30", "0777", "1_000", "0x1F", "0b11", "0o17", "2026-01-01", "1_0.5", "1:30.5", "+0777", "="]
)
def test_numbers_are_those_that_a_person_writes(file, text):
    """Base 60, base 8 and the like are text, in a file as on the command line: no number, and not another one."""
    for argv in (["--config", file(f"sampling: {{top_k: {text}}}\n")], ["--sampling.top_k", text]):
        with pytest.raises(UserError) as caught:
            read(Job, ["--model.path", "m", *argv])
        (line,) = caught.value.lines
        assert line.startswith(f"sampling.top_k: expected a whole number, found '{text}'")
    assert read(Job, ["--config", file(f"model: {{path: {text}}}\nwords: [{text}]\n")]).model.path == text
    job = read(Job, ["--model.path", text, "--sampling.stop", f"[{text}]", "--model.peft", f"{{a: {text}}}"])
    assert (job.model.path, job.sampling.stop, job.model.peft) == (text, [text], {"a": text})
    assert read(Job, ["--config", file(to_yaml(job))]) == job


@pytest.mark.parametrize(
    ("text", "value"), [("7", 7), ("-7", -7), ("+7", 7), ("0", 0), ("1e3", 1000.0), ("1E-5", 1e-5), (".5", 0.5), ("2.", 2.0)]
)
def test_plain_numbers_stay_numbers(file, text, value):
    found = read(Job, ["--config", file(f"model: {{path: m, peft: {{a: {text}}}}}\n")]).model.peft["a"]
    assert (found, type(found)) == (value, type(value))
    assert read(Job, ["--model.path", "m", f"--parts=[{{name: a, weight: {text}}}]"]).parts[0].weight == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &a [x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 9)}]\n" for m, n in itertools.pairwise("abcdefghijk")), "unfold to"),
        ("sampling: &s {stop: *s}\n", "inside what it names"),
        ("model: " + "[" * 100 + "]" * 100 + "\n", "nested more than 64 deep"),
        ("model: " + "[" * 30_000, "nested more than 64 deep"),
        ('model: {path: "\\ud800"}\n', "holds '\\ud800', a character that no file or name can have"),
        ('model: {path: "a\\0b"}\n', "holds '\\x00', a character that no file or name can have"),
        ("model: {path: a\x07b}\n", "0x0007 at position 15"),
        ("sampling: {top_k: 9223372036854775808}\n", "does not fit 64 bits"),
        ("sampling: {temperature: .inf}\n", "inf is not a finite number"),
        ("parts: [{name: a, weight: .nan}]\n", "nan is not a finite number"),
        ("k: v\n" * 60_000, "characters; settings have at most"),
        ("k: v\n" * 40_000, "39,989 more keys stand twice"),
        ("sampling: 5\n", "sampling: expected a mapping, found 5"),
        ("other: [1]\n", "other: expected a mapping or null, found [1]"),
    ],
)  # fmt: skip
def test_hostile_texts_are_refused_in_bounded_time(file, text, words):
    with pytest.raises(UserError) as caught:
        read(Job, ["--model.path", "m", "--config", file(text)])
    assert sum(words in line for line in caught.value.lines) == 1, caught.value.lines
    assert len(caught.value.lines) <= 51 and max(map(len, caught.value.lines)) < 400


def test_flags_meet_the_same_bounds():
    for argv, words in {
        ("--sampling=5",): "sampling: expected a mapping, found 5",
        ("--model.path", "a\ud800"): "a character that no file or name can have",
        ("--sampling.top_k", str(2**63)): "expected a whole number",
        ("--sampling.temperature", "1e400"): "expected a number",
        ("--model.peft", "{a: [" + "[" * 200 + "]" * 200 + "]}"): "nested more than 64 deep",
    }.items():
        with pytest.raises(UserError) as caught:
            read(Job, ["--model.path", "m", *argv])
        assert len(caught.value.lines) == 1 and words in caught.value.lines[0], caught.value.lines


def test_a_name_that_no_file_can_have_is_one_line(capsys):
    def main(job):
        Path("n" * 300).read_text()

    with pytest.raises(SystemExit) as left:
        run_command(main, Job, ["--model.path", "m"])
    assert left.value.code == 2
    assert capsys.readouterr().err == f"{'n' * 60}...: 300 characters; no file can have this name\n"
