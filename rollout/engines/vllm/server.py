"""A vLLM server of the job's own: started on a free port of the loopback interface, ended with the job.

    server = Server(settings, model, RUN/engine.log, flags)
    server.start()          waits until it answers
    Client(server.url)      ...
    server.stop()           it and all that it started, in seconds

Whatever keeps it from starting is one line: what its interpreter has not, what it said last, or that it took too long.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.progress import duration
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm import guard
from steerl.rollout.engines.vllm.client import Client, Gone
from steerl.rollout.engines.vllm.support import check_interpreter, on_gpu

EXTENSION = "steerl.rollout.engines.vllm.plugin.worker.Extension"
PORTS = 5
"""More ports that are tried: between its choice and the server's start another program may take one."""
ROWS, CACHE = 128, (1 << 28, 1 << 32)
"""On a CPU: rows whose keys and values the cache has room for, and the least and the most bytes it takes for them."""
TELL = 30.0
"""Seconds between two lines that say it is still starting."""
_logger = logging.getLogger(__name__)


class Server:
    """One server process, and the next ones where it has to be started again."""

    def __init__(
        self, settings: EngineSettings, model: Path, log: Path, flags: Sequence[str] = (), scratch: Path | None = None
    ):
        """`scratch`: a folder of the job's that is removed with the server where the job is killed."""
        self.settings, self.flags, self.scratch = settings, tuple(flags), scratch
        self.model, self.log = Path(model).resolve(), Path(log).resolve()
        self.port = 0
        self.restarts = 0
        self._guard: subprocess.Popen[bytes] | None = None
        self._said = 0
        """Where in the log the words of this start begin."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """As it is started. The user's own flags come last and win."""
        # Not resolved: a virtual environment's interpreter is a link, and is what it is by the path it is called by.
        command = [str(Path(self.settings.python).absolute()), "-P", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.model), "--served-model-name", "policy", "--model-impl", self.settings.model_impl]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--generation-config", "vllm"]
        command += ["--load-format", "dummy", "--skip-tokenizer-init", "--no-async-scheduling", "--enable-scale-out"]
        command += ["--worker-extension-cls", EXTENSION, "--disable-uvicorn-access-log"]
        config = _config(self.model)
        # Left to itself, vLLM makes float32 bfloat16.
        command += ["--dtype", str(getattr(config, "dtype", None) or "auto").removeprefix("torch.")]
        if not on_gpu():
            command += ["--enforce-eager"]
            if self._one_worker():
                command += ["--distributed-executor-backend", "uni"]
            if "VLLM_CPU_KVCACHE_SPACE" not in os.environ and "--gpu-memory-utilization" not in self.settings.arguments:
                # Left to itself, it takes nine tenths of the memory, or refuses.
                command += ["--kv-cache-memory-bytes", str(cache_bytes(config, _longest(config, self.flags)))]
        return [*command, *self.flags, *self.settings.arguments]

    def environment(self) -> dict[str, str]:
        """The trainer's own, without what is of its packages and of its ranks."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(_TRAINERS)}
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if "OMP_NUM_THREADS" in kept:  # a rank's share of the cores; the ranks wait while the server draws
            kept["OMP_NUM_THREADS"] = str(int(kept["OMP_NUM_THREADS"]) * ranks)
        alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if not on_gpu() and self._one_worker() else {}
        return {**_UNLESS_SET, **kept, **_SET, **alone}

    def _one_worker(self) -> bool:
        """The worker runs in its engine's own process. On a CPU vLLM would give it another one, and both wait for each other
        by spinning: on two cores a step then takes several times as long. It is told so by flag and environment."""
        given = " ".join(self.settings.arguments)
        return not any(word in given for word in ("parallel", "--distributed-executor-backend", "-tp ", "-pp "))

    def start(self) -> None:
        """Start it and wait until it answers."""
        check_interpreter(self.settings.python)
        taken = killed = 0
        while True:
            self.port = self.port or _free_port()
            self._launch()
            if self._comes_up():
                return
            text, status = self._ended()
            if "address already in use" in text.lower() and taken < PORTS:
                taken, self.port = taken + 1, 0
            elif was_killed(text, status) and not killed:
                killed = 1
                _logger.warning("engine: the vLLM server was killed while it was starting; it is started again (%s)", self.log)
            else:
                raise UserError(f"{why_it_ended(text, status)}; see {self.log}")

    def alive(self) -> bool:
        return self._guard is not None and self._guard.poll() is None

    def stop(self) -> None:
        """End it and all that it started."""
        if self._guard is None:
            return
        process, self._guard = self._guard, None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(4 * guard.GRACE)
        except subprocess.TimeoutExpired:  # stopped, or starved: its watcher does what it would have done
            process.kill()
            process.wait()

    def restart(self) -> None:
        """Another one in its place, on the same port where that is free."""
        self.stop()
        self.restarts += 1
        self.start()

    def guarded(self, **streams: Any) -> subprocess.Popen[bytes]:
        """The server and its guard, as a process that ends with this one."""
        command = [sys.executable, "-I", guard.__file__, str(os.getpid()), *self.command()]
        environment = {**self.environment(), **({guard.SCRATCH: str(self.scratch)} if self.scratch else {})}
        # Not in the user's folder, whose own vllm/ or torch.py nobody means.
        return subprocess.Popen(command, cwd=self.model, env=environment, **streams)

    def _launch(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._said = log.tell()
            self._guard = self.guarded(stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _comes_up(self) -> bool:
        """Whether it answers at last; False where it has ended before."""
        client = Client(self.url)
        began = told = time.monotonic()
        while True:
            waited = time.monotonic() - began
            if not self.alive():
                return False
            if self._answers(client):
                return True
            if waited > self.settings.start_timeout:
                self.stop()
                raise UserError(
                    f"engine.start_timeout: the server did not answer within {duration(waited)}; see {self.log}, "
                    "or give it more seconds"
                )
            if time.monotonic() - told > TELL:
                told = time.monotonic()
                _logger.warning("engine: the vLLM server is starting, %s so far (%s)", duration(waited), self.log)
            time.sleep(0.2)

    def _answers(self, client: Client) -> bool:
        """It, and no other server that has taken its port."""
        try:
            client.get("/health")
            models = client.get("/v1/models")["data"]
        except (Gone, UserError, LookupError, TypeError):
            return False
        return any(model.get("root") == str(self.model) for model in models)

    def _ended(self) -> tuple[str, int]:
        """What it said, and its status."""
        assert self._guard is not None
        status, self._guard = self._guard.wait(), None
        with self.log.open("rb") as log:
            log.seek(self._said)
            return log.read().decode(errors="replace"), status


_TRAINERS = (
    *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"),
    *(
        "RANK",
        "LOCAL_RANK",
        "GROUP_",
        "ROLE_",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_",
        "TORCHELASTIC_",
        "ACCELERATE_",
        "FSDP_",
    ),
)
_UNLESS_SET = {
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning on cores that others use make a step many times as long
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every server of a machine sits on the same cores
    "VLLM_HOST_IP": "127.0.0.1",
}
_SET = {
    "VLLM_SERVER_DEV_MODE": "1",  # the routes by which weights come
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",  # all that it reads lies in its folder
    "PYTHONSAFEPATH": "1",
}


def _config(folder: Path) -> Any:
    """None where it is of a class that transformers does not know by itself."""
    from transformers import AutoConfig

    with contextlib.suppress(OSError, ValueError):
        return AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    return None


def _longest(config: Any, flags: Sequence[str]) -> int:
    told = dict(zip(flags, flags[1:], strict=False)).get("--max-model-len")
    return int(told or getattr(config, "max_position_embeddings", None) or 4096)


def cache_bytes(config: Any, longest: int) -> int:
    """Keys and values of ROWS rows that are all as long as can be, within limits."""
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        return CACHE[1]
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    token = 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size * 4
    return min(max(ROWS * longest * token, CACHE[0]), CACHE[1])


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def was_killed(text: str, status: int) -> bool:
    """It, or a process of its own."""
    silent = "Engine core initialization failed" in text and not _errors(text)  # the engine's end without a word
    return status in (-signal.SIGKILL, 128 + signal.SIGKILL) or silent or "exit code: -9" in text


def why_it_ended(text: str, status: int) -> str:
    """Of a server that ended while it was starting: what it said of that, in a line."""
    told = _last_words(text)
    if any(words in text for words in _NO_MEMORY):
        return (
            f"engine: out of memory while the server was starting: {told}; a smaller --gpu-memory-utilization or "
            "--max-num-seqs in engine.arguments, fewer programs beside it, or a smaller model"
        )
    if was_killed(text, status):
        return "engine: the server was killed while it was starting, as the kernel does where memory ends; make room"
    return f"engine: the server ended with status {status} while it was starting: {told}"


_NO_MEMORY = (
    *("out of memory", "OutOfMemoryError", "Cannot allocate memory", "can't allocate memory", "std::bad_alloc", "MemoryError"),
    *("No available memory for the cache blocks", "memory utilization", "KV cache is needed", "requested memory for kv"),
)
_ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt|Exit): .*|[\w.]*: error: .*|\s*Value error, .*)$")
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\) )?(?:(ERROR|WARNING|INFO) [\d-]+ [\d:]+ \[[^\]]*\] ?)?")


def _last_words(text: str) -> str:
    """The last error that says more than that there was one; without any, the last line."""
    lines = [line.strip() for line in text.splitlines() if "warn" not in line.lower()]
    told = next(iter([*reversed(_errors(text)), *reversed([line for line in lines if line])]), "it said nothing")
    told = told.removeprefix("Value error, ").split(" [type=")[0]
    return told if len(told) <= 300 else f"{told[:297]}..."


def _errors(text: str) -> list[str]:
    found = []
    for line in text.splitlines():
        if (match := _PREFIX.match(line)) and match[1] not in ("WARNING", "INFO"):
            rest = line[match.end() :].strip()
            if _ERROR.match(rest) and "Engine core initialization failed" not in rest:
                found.append(rest)
    return found
