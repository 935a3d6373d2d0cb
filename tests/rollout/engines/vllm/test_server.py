"""Server and guard: it starts, says in a line why it did not, and ends with all that it started, whoever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import psutil
import pytest
from transformers import AutoConfig

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm import guard as guard_program
from steerl.rollout.engines.vllm import server as server_module
from steerl.rollout.engines.vllm.client import Client
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.server import Server, why_it_ended
from steerl.rollout.engines.vllm.wire import VERSION, Answer, Ask, Law
from tests.models import tiny_policy
from tests.rollout.engines.vllm.scripted import Scripted, interpreter

ROOT = Path(__file__).resolve().parents[4]


def server_of(folder: Path, fault: str = "", flags: tuple[str, ...] = (), **settings: object) -> Server:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    python = settings.pop("python", None) or interpreter(folder, fault)
    return Server(EngineSettings(kind="vllm", python=str(python), **settings), model, folder / "run/engine.log", flags)


def soon(true: Callable[[], object], what: str, seconds: float = 15.0) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.02)


def below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def ended(processes: list[psutil.Process]) -> bool:
    return not any(map(_runs, processes))


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:  # it ended between the two questions
        return False


def listens(port: int) -> bool:
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


# -- starting ----------------------------------------------------------------------------------------------------------


def test_what_it_is_started_with(tmp_path, monkeypatch):
    for name, value in {
        "PYTHONPATH": "/trainer",
        "RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "3",
        "MINE": "kept",
    }.items():
        monkeypatch.setenv(name, value)
    server = server_of(tmp_path, flags=("--max-lora-rank", "8"), model_impl="transformers", arguments=["--max-num-seqs", "4"])
    server.start()
    try:
        words, folder, environment = json.loads((tmp_path / "model/started.json").read_text())
        assert words[:3] == ["-P", "-m", "vllm.entrypoints.openai.api_server"]
        assert words[-4:] == ["--max-lora-rank", "8", "--max-num-seqs", "4"]
        pairs = list(zip(words, words[1:], strict=False))
        for pair in [("--model", str(tmp_path / "model")), ("--host", "127.0.0.1"), ("--model-impl", "transformers")]:
            assert pair in pairs
        assert ("--port", server.url.rpartition(":")[2]) in pairs
        assert folder == str(tmp_path / "model")  # and no file of the user's can be imported
        assert not {"PYTHONPATH", "RANK", "LOCAL_WORLD_SIZE"} & set(environment)
        assert environment["OMP_NUM_THREADS"] == "6" and environment["MINE"] == "kept"
        assert environment["VLLM_SERVER_DEV_MODE"] == environment["PYTHONSAFEPATH"] == "1"
        assert Client(server.url).rpc("steerl_hello") == [{"wire": 1, "version": -1, "model": "Scripted"}]
    finally:
        server.stop()


def test_again_on_the_same_port_into_the_same_log(tmp_path):
    server = server_of(tmp_path)
    server.start()
    try:
        url, log = server.url, tmp_path / "run/engine.log"
        log.write_text("said before\n")
        server.restart()
        assert (server.url, server.restarts, server.alive()) == (url, 1, True)
        assert Client(url).healthy() and log.read_text().startswith("said before\n")
    finally:
        server.stop()
    assert not server.alive() and not listens(server.port)


def test_another_port_where_the_first_is_taken(tmp_path):
    server = server_of(tmp_path, "taken")
    with Scripted(model="another's") as stranger:
        server.port = int(stranger.url.rpartition(":")[2])
        server.start()
        try:
            assert server.url != stranger.url and Client(server.url).rpc("steerl_hello")
        finally:
            server.stop()


def test_one_that_is_killed_while_it_starts_is_started_again(tmp_path):
    server = server_of(tmp_path, "killed once")
    server.start()
    try:
        first, second = (tmp_path / "model/starts").read_text().split()
        assert first == second == str(server.port) and server.alive()
    finally:
        server.stop()


@pytest.mark.parametrize(
    "fault, line",
    [
        ("memory", r"engine: out of memory while the server was starting: torch.OutOfMemoryError: CUDA out of memory. Tried 9 GiB; .*--gpu-memory-utilization.*; see .*engine.log"),
        ("words", r"engine: the server ended with status 1 while it was starting: ValueError: Head size 16 is not supported; see .*engine.log"),
        ("silent", r"engine: the server ended with status 1 while it was starting: it said nothing; see .*engine.log"),
        ("killed", r"engine: the server was killed while it was starting, as the kernel does where memory ends; make room; see .*engine.log"),
        ("no vllm", r"engine.python: .*python-no-vllm has no vLLM; make vllm builds one that has, or name another"),
        ("no steerl", r"engine.python: .*python-no-steerl has no steerl; make vllm puts it there .*"),
    ],
)  # fmt: skip
def test_what_keeps_it_from_starting_is_one_line(tmp_path, fault, line):
    server = server_of(tmp_path, fault)
    with pytest.raises(UserError, match=f"^{line}$"):
        server.start()
    assert not server.alive()


def test_an_interpreter_that_is_not_there_or_none(tmp_path):
    with pytest.raises(UserError, match=r"^engine.python: nowhere/python is not there; make vllm builds it, or name another$"):
        server_of(tmp_path, python="nowhere/python").start()
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such thing >&2; exit 3\n")
    broken.chmod(0o755)
    with pytest.raises(UserError, match=r"^engine.python: .*broken is no Python that runs \(no such thing\); make vllm"):
        server_of(tmp_path, python=broken).start()


def test_too_slow_is_ended(tmp_path):
    server = server_of(tmp_path, "never", start_timeout=0.5)
    with pytest.raises(
        UserError, match=r"^engine.start_timeout: the server did not answer within \d s; see .*engine.log, or give"
    ):
        server.start()
    assert not server.alive()


def test_the_root_cause_is_told_not_the_last_line():
    text = "\n".join(
        [
            "(Worker pid=9) WARNING 11-26 23:07:09 [base.py:380] ValueError: Tokenizer not available",
            "(EngineCore pid=8) ERROR 11-26 23:07:09 [core.py:9] ValueError: To serve at least one request, 3 GiB KV cache is needed",
            "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
            "(APIServer pid=7) WARNING 11-26 23:07:10 [base.py:380] ValueError: it was going to warm up a chat template",
        ]
    )
    assert why_it_ended(text, 1).startswith(
        "engine: out of memory while the server was starting: ValueError: To serve at least"
    )
    silent = (
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n  warnings.warn('')"
    )
    assert "killed" in why_it_ended(silent, 1)  # so it is where the engine had no time to say a word
    assert why_it_ended("Traceback\n  line\nno word of an error\nUserWarning: leaked", 3).endswith(
        "starting: no word of an error"
    )
    argument = "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --nope\n"
    assert why_it_ended(argument, 2).endswith(
        "status 2 while it was starting: api_server.py: error: unrecognized arguments: --nope"
    )


def test_the_cache_on_a_cpu_holds_128_long_rows_within_limits(tmp_path, monkeypatch):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(server_module, "on_gpu", lambda: False)

    def given(flags: tuple[str, ...] = (), arguments: tuple[str, ...] = (), **config: int) -> str | None:
        AutoConfig.for_model("llama", dtype="float32", **config).save_pretrained(tmp_path / "model")
        words = server_of(tmp_path, flags=flags, arguments=list(arguments)).command()
        return words[words.index("--kv-cache-memory-bytes") + 1] if "--kv-cache-memory-bytes" in words else None

    # keys and values of 12 layers, 2 of 4 heads, 64 numbers of 4 bytes: 12,288 bytes a token
    middling = {"num_hidden_layers": 12, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    assert given(("--max-model-len", "1000"), **middling) == str(12_288 * 128 * 1000)
    assert given(max_position_embeddings=500, **middling) == str(12_288 * 128 * 500)
    assert given(max_position_embeddings=10, **middling) == str(256 << 20)
    assert given(max_position_embeddings=131_072, **middling) == str(4 << 30)
    assert given(arguments=("--gpu-memory-utilization", "0.5"), **middling) is None  # it would have no effect
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "3")
    assert given(**middling) is None


def test_a_server_has_the_dtype_of_its_config(tmp_path):
    for dtype in ("float32", "bfloat16"):
        AutoConfig.for_model("llama", dtype=dtype).save_pretrained(tmp_path / "model")
        words = server_of(tmp_path).command()
        assert words[words.index("--dtype") + 1] == dtype


@pytest.mark.parametrize(
    "methods, line",
    [
        ({"steerl_hello": lambda: {"wire": VERSION + 1}}, f"engine: the server's steerl speaks version {VERSION + 1} of the wire, this one {VERSION}"),
        ({}, "engine.url: the server at http://127.* was not started for steerl"),
        (None, "engine.url: nobody answers .*; `steerl engine serve` starts a server, or leave engine.url out"),
    ],
)  # fmt: skip
def test_a_server_that_runs_already_is_asked_who_it_is(tmp_path, methods, line):
    with Scripted() as server:
        server.methods |= methods or {}
        if methods is None:
            server.listener.server_close()
        settings = EngineSettings(kind="vllm", url=server.url)
        engine = VllmEngine(tiny_policy("llama", hidden_size=128, head_dim=32), settings, tmp_path / "engine.log", alone=True)
        try:
            with pytest.raises(UserError, match=f"^{line}"):
                engine.ready(0)
        finally:
            engine.close()


# -- ending ------------------------------------------------------------------------------------------------------------

JOB = """
import os, subprocess, sys, time
print(subprocess.Popen([sys.executable, "-I", sys.argv[1], str(os.getpid()), *sys.argv[2:]], start_new_session=True).pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def temporary(monkeypatch):
    """Where temporary files are made. Not below tmp_path, whose name is too long for a socket's."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


@pytest.fixture
def job(tmp_path, temporary):
    """A job that has a server with an engine and a worker: (job, port, guard, the server and all below it)."""
    (tmp_path / "model").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [interpreter(tmp_path, "children"), "--port", str(port), "--model", str(tmp_path / "model")]
    process = subprocess.Popen(
        [sys.executable, "-I", "-c", JOB, guard_program.__file__, *words], stdout=subprocess.PIPE, text=True
    )
    guard = int(process.stdout.readline())
    soon(lambda: len(below(guard)) >= 4 and listens(port), "watcher, server, engine, worker")
    yield process, port, guard, below(guard)
    process.kill()
    process.wait()


def watcher_of(guard: int, processes: list[psutil.Process]) -> psutil.Process:
    return next(p for p in processes if p.ppid() == guard and "guard.py" in " ".join(p.cmdline()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_the_server_ends_with_the_job_however_that_ends(job, temporary, number):
    process, port, guard, processes = job
    process.send_signal(number)
    soon(
        lambda: ended(processes) and not psutil.pid_exists(guard) and not any(temporary.iterdir()) and not listens(port),
        f"left over after {number.name}",
    )


def test_the_server_ends_with_its_guard(job, temporary):
    _, port, guard, processes = job
    os.kill(guard, signal.SIGKILL)
    soon(lambda: ended(processes) and not any(temporary.iterdir()) and not listens(port), "the guard was killed")


def test_the_guard_goes_on_without_its_watcher(job, temporary):
    process, port, guard, processes = job
    watcher_of(guard, processes).kill()
    process.kill()
    soon(
        lambda: ended(processes) and not psutil.pid_exists(guard) and not any(temporary.iterdir()) and not listens(port),
        "the watcher was killed",
    )


def test_all_ends_with_the_servers_front(job, temporary):
    _, port, guard, processes = job
    next(p for p in processes if p.ppid() == guard and "guard.py" not in " ".join(p.cmdline())).kill()
    soon(lambda: ended(processes) and not any(temporary.iterdir()) and not listens(port), "the front was killed")


@pytest.mark.proofs
@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_left_whoever_is_killed_and_when(tmp_path, temporary, monkeypatch, seed):
    """The job, its guard, the watcher or a process of the server, at any moment; then the job. All that was started has its
    name in its environment."""
    random = Random(seed)
    monkeypatch.setenv("STARTED_BY", str(tmp_path))

    def started() -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("STARTED_BY") == str(tmp_path) and process.pid != os.getpid():
                    found.append(process)
        return [p for p in found if not ended([p])]

    (tmp_path / "model").mkdir()
    words = [interpreter(tmp_path, "children"), "--port", "0", "--model", str(tmp_path / "model")]
    job = subprocess.Popen([sys.executable, "-I", "-c", JOB, guard_program.__file__, *words], stdout=subprocess.DEVNULL)
    time.sleep(random.uniform(0, 1.2))
    with contextlib.suppress(psutil.Error):
        random.choice(started()).kill()
    time.sleep(random.uniform(0, 0.3))
    job.kill()
    job.wait()
    soon(lambda: not started() and not any(temporary.iterdir()), f"left over: {started()}")


def test_stopping_leaves_nothing_even_where_the_guard_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(guard_program, "GRACE", 0.1)
    for stuck in (False, True):
        server = server_of(tmp_path, "children")
        server.start()
        soon(lambda: len(below(server._guard.pid)) >= 4, "watcher, server, engine, worker")
        processes = below(server._guard.pid)
        if stuck:
            os.kill(server._guard.pid, signal.SIGSTOP)
        server.stop()
        soon(lambda: ended(processes) and not listens(server.port), "stopped")


# -- a real one --------------------------------------------------------------------------------------------------------


@pytest.mark.vllm
def test_a_real_server_knows_the_rows_it_was_asked_for(vllm_server):
    policy, client = vllm_server.policy, vllm_server.client
    (hello,) = client.rpc("steerl_hello")
    assert hello["model"] == "LlamaForCausalLM"
    law = Law(Sampling(max_new_tokens=5, seed=1), policy.vocab_size, tuple(policy.eos_ids))
    client.generate([1, 5, 6], law, Ask("one", 0, 0, 0))
    (got,) = client.rpc("steerl_take", json.dumps(["one", "another"]))
    assert set(got) == {"one"} and len(Answer.of_packed(got["one"]).ids) <= 5


@pytest.mark.vllm
def test_a_real_server_does_not_know_any_method(vllm_server):
    with pytest.raises(UserError, match=r"does not know steerl_nothing\); `steerl engine serve`"):
        vllm_server.client.rpc("steerl_nothing")


@pytest.mark.vllm
def test_a_real_server_listens_on_loopback_alone(vllm_server):
    port = int(vllm_server.url.rpartition(":")[2])
    connections = [c for c in psutil.net_connections("inet") if c.status == psutil.CONN_LISTEN and c.pid]
    front = next(c.pid for c in connections if c.laddr.port == port)
    family = {front, *(p.pid for p in below(front))}
    assert {c.laddr.ip for c in connections if c.pid in family} <= {"127.0.0.1", "::1"}


REAL_JOB = """
import sys, time
from pathlib import Path
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.client import Client
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.server import Server
python, model, log = sys.argv[1:]
server = Server(EngineSettings(kind="vllm", python=python), Path(model), Path(log))
server.start()
Client(server.url).rpc("steerl_hello")
print(server.port, flush=True)
time.sleep(600)
"""


@pytest.mark.vllm
def test_a_real_server_in_a_strangers_folder_ends_with_its_killed_job(vllm_server, vllm_python, tmp_path, temporary):
    """Files that bear the names of what the server imports end whoever imports them; the job is killed as by a failing node."""
    for name in ("vllm", "torch", "steerl", "json", "transformers"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a stranger was imported')\n")
    words = [vllm_python, str(vllm_server.model), str(tmp_path / "engine.log")]
    process = subprocess.Popen([sys.executable, "-P", "-c", REAL_JOB, *words], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        port, family = int(process.stdout.readline()), below(process.pid)
        assert len(family) >= 4 and listens(port)  # guard, watcher, front, engine
        shared = {m.path for p in family for m in p.memory_maps() if m.path.startswith("/dev/shm/")}  # where workers have any
        assert any(temporary.iterdir())
    finally:
        process.kill()
        process.wait()
    soon(lambda: ended(family) and not listens(port), "left over of a real server")
    assert not any(map(os.path.exists, shared)) and not any(temporary.iterdir())
