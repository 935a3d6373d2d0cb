"""The completion command: through pipes, and in a pseudo-terminal: colors, interrupts, wide characters, narrow windows."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from steerl.configs.reader import run_command

import pytest
import torch
import transformers
import yaml
from tokenizers import AddedToken, Tokenizer, decoders, models

from steerl.rollout.chat.terminal import BANDS, width_of
from steerl.scripts.complete import CompleteJob, main
from steerl.scripts.completing import session
from tests import warm
from tests.models import CHAT, tiny, tiny_tokenizer

ROOT = Path(__file__).parents[2]
COLOR = re.compile(r"\x1b\[[0-9;]*m")
WIDE = "日本語質問回答東京京都🙂🎉ＡＢ漢字仮名交文"


@pytest.fixture(scope="module")
def models_(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small: 128 tokens of context, a chat template. long: goes on for seconds. wide: writes wide characters and blanks."""
    base = tmp_path_factory.mktemp("models")
    tiny("gpt2").save_pretrained(base / "small")
    tiny_tokenizer(chat=True).save_pretrained(base / "small")
    endless = tiny("gpt2", n_positions=8192)
    with torch.no_grad():
        endless.transformer.ln_f.bias.zero_()
        endless.lm_head.weight[2] = 0.0  # the end is never likely
    for name, chat in (("long", True), ("plain", False)):
        endless.save_pretrained(base / name)
        tiny_tokenizer(chat=chat).save_pretrained(base / name)
    entries = ["<pad>", "<s>", "</s>", "<unk>", *"abc \n", *WIDE]
    core = Tokenizer(models.BPE({entry: i for i, entry in enumerate(entries)}, [], unk_token="<unk>"))
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in entries[:4]])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, chat_template=CHAT, **names).save_pretrained(base / "wide")
    tiny("gpt2", vocab_size=len(entries)).save_pretrained(base / "wide")
    return base


def steering(folder: Path) -> str:
    """A YAML with one vector, added from the first sampled token on."""
    site = {
        "name": "push", "at": {"layers": [0], "component": "block_output"}, "op": {"type": "add"}, "strength": 2.0,
        "vector": torch.randn(32, generator=torch.Generator().manual_seed(0)).tolist(),
        "where": {"prompt": "none", "steps": "all"},
    }  # fmt: skip
    (folder / "steering.yaml").write_text(yaml.safe_dump({"sites": [site]}))
    return str(folder / "steering.yaml")


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code: Any = 0
    try:
        run_command(main, CompleteJob, argv)
    except SystemExit as left:
        code = left.code
    out, err = capsys.readouterr()
    return code, out, err


# -- piped ------------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_the_text_alone(models_: Path) -> None:
    command = [sys.executable, "scripts/complete.py", "--model.path", str(models_ / "small"), "--sampling.seed", "3"]
    by_flag = warm.run([*command, "the end"])
    by_pipe = subprocess.run(command, input="the end\n", capture_output=True, text=True, cwd=ROOT)
    assert by_flag.returncode == by_pipe.returncode == 0
    record = warm.run([*command, "--json", "the end"])
    assert by_flag.stdout == by_pipe.stdout == json.loads(record.stdout)["generation"] + "\n"
    assert "\x1b" not in by_flag.stdout


def test_json_is_one_object_per_prompt_with_true_numbers(models_: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.path", str(models_ / "small"), "--sampling.max_new_tokens", "9", "--sampling.temperature", "0.5"]
    code, out, _ = run(capsys, *argv, "--json", "the end", "a")
    records = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [record["prompt"] for record in records] == ["the end", "a"]
    model = transformers.AutoModelForCausalLM.from_pretrained(models_ / "small").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models_ / "small")
    for record in records:
        prompt = tokenizer(record["prompt"])["input_ids"]
        with torch.no_grad():
            numbers = torch.log_softmax(model(torch.tensor([prompt + record["ids"]])).logits[0].double(), -1)
        wanted = [float(numbers[len(prompt) + t - 1, token]) for t, token in enumerate(record["ids"])]
        assert record["logprobs"] == pytest.approx(wanted, abs=2e-5)
        assert record["average_logprob"] == pytest.approx(sum(wanted) / len(wanted), abs=2e-5)
        assert record["least_certain"][0]["logprob"] == min(record["logprobs"])
        assert record["generation"] == tokenizer.decode(record["ids"], skip_special_tokens=True)


def test_files_of_prompts(models_: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.path", str(models_ / "small"), "--sampling.max_new_tokens", "5", "--json"]
    (tmp_path / "p.txt").write_text("one\n\ntwo\nthree\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n{"prompt": "three"}\n')
    _, lines, _ = run(capsys, *argv, "--prompts.path", str(tmp_path / "p.txt"))
    _, rows, _ = run(capsys, *argv, "--prompts.path", str(tmp_path / "p.jsonl"))
    _, small, _ = run(capsys, *argv, "--prompts.path", str(tmp_path / "p.jsonl"), "--sampling.batch_size", "1")
    assert [json.loads(line)["ids"] for line in lines.splitlines()] == [json.loads(line)["ids"] for line in rows.splitlines()]
    assert [json.loads(line)["ids"] for line in small.splitlines()] == [json.loads(line)["ids"] for line in rows.splitlines()]


def test_chat_and_report_and_verify(models_: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.path", str(models_ / "small"), "--sampling.max_new_tokens", "6"]
    _, out, _ = run(capsys, *argv, "--chat", "--system", "be good", "--json", "hello")
    record = json.loads(out)
    assert [message["role"] for message in record["prompt"]] == ["system", "user"]
    assert record["generation"]["role"] == "assistant"
    code, out, err = run(capsys, *argv, "hello", "--logprobs", "true", "--verify", "true")
    assert (
        code == 0
        and "average log-prob" in out
        and "least certain: " in out
        and len(re.findall(r"^ +-\d+\.\d{4}  ['\"]", out, re.M)) == 6
    )
    assert "verify: 1 rows, 6 tokens scored alone in float32: gap at most" in err and "passed" in err


def test_steering_stands_beside(models_: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [
        "--model.path",
        str(models_ / "small"),
        "--sampling.max_new_tokens",
        "20",
        "--steering",
        steering(tmp_path),
        "the end",
    ]
    _, out, _ = run(capsys, *argv, "--json")
    record = json.loads(out)
    assert record["generation"] != record["steered"]["generation"] and record["steered"]["steering"].startswith("push#")
    code, out, _ = run(capsys, *argv)
    assert code == 0 and out.splitlines()[0].split(" | ")[0].strip() == "unsteered" and "push#" in out.splitlines()[0]


def test_bad_input_is_one_line(models_: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model.path", str(models_ / "small")]
    (tmp_path / "empty").mkdir()
    for problem, argv in {
        "prompts.path too": [*small, "a", "--prompts.path", "x.txt"],
        "x.txt does not exist": [*small, "--prompts.path", "x.txt"],
        "model.path: missing": ["a"],
        "more than the 128 of the context": [*small, "a" * 200],
        "sampling.greedy": [*small, "a", "--sampling.temperature", "0"],
        "sampling.n: 2": [*small, "a", "--sampling.n", "2"],
        "add --chat true": [*small, "a", "--system", "x"],
        "no chat template": ["--model.path", str(models_ / "plain"), "--chat", "a"],
    }.items():
        code, out, err = run(capsys, *argv)
        assert code == 2 and problem in err and out == "" and "Traceback" not in err


# -- in a terminal ------------------------------------------------------------------------------------------------------


class Terminal:
    """The command in a pseudo-terminal of a given size, as a person would use it."""

    def __init__(self, *argv: str, columns: int = 80, rows: int = 24):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            environment.pop(name, None)
        self.process = warm.start([sys.executable, "scripts/complete.py", *argv], env=environment, terminal=os.ttyname(slave))
        os.close(slave)
        self.seen = b""

    @property
    def text(self) -> str:
        return self.seen.decode("utf-8", errors="replace").replace("\r\n", "\n")

    def until(self, condition: Any, seconds: float = 120.0) -> str:
        """Read until `condition(text)` or the end of output."""
        end = time.monotonic() + seconds
        while not condition(self.text):
            assert time.monotonic() < end, f"waited in vain; seen: {self.text[-500:]!r}"
            if select.select([self.master], [], [], 1.0)[0]:
                try:
                    self.seen += os.read(self.master, 65536)
                except OSError:  # the other end is closed
                    break
        return self.text

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def interrupt(self, condition: Any) -> str:
        """Ctrl-C until `condition(text)`: pressed again when nothing comes of it, since Python's line editor loses one that
        falls between its reading a key and its waiting for the next. At an empty prompt one more does nothing."""
        for _ in range(20):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.until(condition, 6.0)
        raise AssertionError(f"no interrupt was heard; seen: {self.text[-500:]!r}")

    def leave(self) -> int:
        self.until(lambda text: False)
        os.close(self.master)
        return self.process.wait(60)


def test_colours_in_a_terminal_are_those_of_the_probabilities(models_: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--model.path", str(models_ / "small"), "--sampling.max_new_tokens", "12", "the end"]
    terminal = Terminal(*argv)
    assert terminal.leave() == 0
    _, out, _ = run(capsys, *argv, "--json")
    record = json.loads(out)
    assert COLOR.sub("", terminal.text) == record["generation"] + "\n"
    bands = [next(code for limit, code in BANDS if 2.718281828**number < limit) for number in record["logprobs"]]
    wanted = "".join(
        f"{band}{text}\x1b[0m" for band, text in zip(bands, record["tokens"], strict=True) if text not in ("\n", "</s>")
    )
    assert terminal.text.replace("\n", "") == wanted


@pytest.mark.slow
def test_a_chat_with_interrupts(models_: Path) -> None:
    """Ctrl-C stops an answer and the chat goes on; at the prompt it clears the line; Ctrl-D leaves."""
    terminal = Terminal("--model.path", str(models_ / "long"), "--sampling.max_new_tokens", "6000", "--color", "never")
    terminal.until(lambda text: text.endswith("> "))
    terminal.type("hello\n")
    terminal.until(lambda text: len(text.partition("hello\n")[2]) > 20)
    after = terminal.interrupt(lambda text: text.endswith("\n> "))
    assert 20 < len(after) < 6000
    terminal.type("half a line")
    terminal.until(lambda text: text.endswith("half a line"))
    terminal.interrupt(lambda text: text.endswith("\n> "))
    terminal.type("again\n")
    # The second answer may be short: it is over (its prompt stands again), or it is stopped.
    answer = lambda text: text.partition("again\n")[2]  # noqa: E731
    terminal.until(lambda text: len(answer(text)) > 20 or answer(text).endswith("\n> "))
    if not answer(terminal.text).endswith("\n> "):
        terminal.interrupt(lambda text: answer(text).endswith("\n> "))
    terminal.type("\x04")
    assert terminal.leave() == 0
    assert "Traceback" not in terminal.text


def test_an_interrupt_between_two_steps_of_a_chat_does_not_end_it(models_: Path, monkeypatch, capsys) -> None:
    """After a line was read, and while the dialog is put together: there is nothing to stop, and the answer comes."""
    lines = iter(["hello", "again"])
    own = session.ask

    def read(prompt: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError
        return line

    def ask(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return own(*arguments)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(session, "ask", ask)
    before = signal.getsignal(signal.SIGINT)
    code, out, _ = run(capsys, "--model.path", str(models_ / "small"), "--sampling.max_new_tokens", "3", "--color", "never")
    assert code == 0 and out.count("\n") == 3, out
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.slow
def test_an_interrupted_completion_ends_with_130_and_resets_the_colour(models_: Path) -> None:
    terminal = Terminal("--model.path", str(models_ / "long"), "--sampling.max_new_tokens", "6000", "hello")
    terminal.until(lambda text: len(COLOR.sub("", text)) > 20)
    terminal.type("\x03")
    assert terminal.leave() == 130
    shown = terminal.text.replace("^C", "")
    assert "Traceback" not in shown and shown.count("\x1b[0m") * 2 == len(COLOR.findall(shown)) and shown.endswith("\n")


@pytest.mark.slow
@pytest.mark.parametrize("columns", [24, 80])
def test_wide_characters_in_a_narrow_and_a_normal_window(models_: Path, tmp_path: Path, columns: int) -> None:
    argv = ["--model.path", str(models_ / "wide"), "--sampling.max_new_tokens", "90", "--sampling.seed", "1", "日本 a"]
    terminal = Terminal(*argv, "--steering", steering(tmp_path), columns=columns)
    assert terminal.leave() == 0
    lines = COLOR.sub("", terminal.text).splitlines()
    assert any(character in WIDE for line in lines for character in line)
    assert max(width_of(line) for line in lines) <= columns
    if columns == 80:  # the bar stands in one column, whatever stands left of it
        assert {width_of(line.split("|")[0]) for line in lines if "|" in line} == {39}
    else:
        assert lines[0] == "unsteered:" and any(line.startswith("push#") for line in lines)


def test_half_an_emoji_is_never_written(models_: Path, tmp_path: Path) -> None:
    """A byte-level vocabulary: every write of a stream is whole characters."""
    folder = tmp_path / "bytes"
    tiny("gpt2", vocab_size=270).save_pretrained(folder)
    tiny_tokenizer(270, kind="bytes").save_pretrained(folder)
    terminal = Terminal("--model.path", str(folder), "--sampling.max_new_tokens", "40", "--color", "never", "x")
    assert terminal.leave() == 0
    terminal.seen.decode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", terminal.text)
