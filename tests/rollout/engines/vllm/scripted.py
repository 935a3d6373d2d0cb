"""A server that speaks vLLM's routes and does as it is told. In this process, or as the interpreter of `engine.python`.

    with Scripted() as server:                      server.url, server.calls: what it was asked
        server.methods["steerl_take"] = lambda ids: {...}       what /collective_rpc answers; results of one worker
        server.faults["/health"] = "hang"           hang | half | close | close after | 500 | 503 | dead | cancelled, of a route or method
        server.release()                            lets what hangs go on

    python = interpreter(folder, fault)             a program that passes for .venv-vllm/bin/python, for a real Server

Faults of the program, while it starts: "" | memory | words | silent | taken | killed | killed once | never | no vllm | no steerl.
With "children" it has a child and a grandchild in a session of its own, as an engine and its workers.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
WAIT = "import time; time.sleep(600)"


class Scripted:
    """Answers /health, /v1/models, /inference/v1/generate and /collective_rpc."""

    def __init__(self, port: int = 0, model: str = ""):
        self.calls: list[tuple[str, Any]] = []
        self.faults: dict[str, str] = {}
        self.methods: dict[str, Callable[..., Any]] = {"check_health": lambda: None}
        self.on_generate: Callable[[dict[str, Any]], None] = lambda body: None
        self.connections = 0
        self.model = model
        self.waiting = threading.Semaphore(0)
        """One for each request that hangs."""
        self._released = threading.Event()
        scripted = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                scripted.connections += 1

            def do_GET(self) -> None:
                scripted._serve(self, None)

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers.get("content-length", 0)))
                scripted._serve(self, json.loads(data) if data else None)

            def log_message(self, *args: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *args: object) -> None:
                pass  # who asked has gone

        self.listener = Listener(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.listener.server_address[1]}"
        self._thread = threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Scripted:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()
        self.listener.shutdown()
        self.listener.server_close()

    def release(self) -> None:
        self._released.set()

    def _serve(self, handler: BaseHTTPRequestHandler, body: Any) -> None:
        path = handler.path
        self.calls.append((path, body))
        fault = self.faults.get(path, "")
        if path == "/collective_rpc":
            fault = self.faults.get(body["method"], fault)
        if fault == "hang":
            self.waiting.release()
            self._released.wait(60)
        if fault == "half":
            handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
        if fault in ("half", "close"):
            handler.close_connection = True
            return
        status, answer = self._answer(path, body, fault)
        data = json.dumps(answer).encode()
        handler.send_response(status)
        handler.send_header("content-length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
        if fault == "close after":  # and does not say so
            handler.close_connection = True

    def _answer(self, path: str, body: Any, fault: str) -> tuple[int, Any]:
        if fault in ("500", "dead"):
            return 500, {"error": {"message": DEAD if fault == "dead" else "it went\nwrong", "code": 500}}
        if fault == "cancelled":  # a worker was killed
            return 500, {"error": {"message": "Call to collective_rpc method failed: cancelled", "code": 500}}
        if path == "/health":
            return (503 if fault == "503" else 200), None
        if path == "/v1/models":
            return 200, {"data": [{"id": "policy", "root": self.model}]}
        if path == "/inference/v1/generate":
            self.on_generate(body)
            return 200, {"choices": []}
        if path == "/collective_rpc":
            if body["method"] not in self.methods:
                said = f"Method '{body['method']}' is not implemented."
                return 500, {"error": {"message": f"Call to collective_rpc method failed: {said}", "code": 500}}
            return 200, {"results": [self.methods[body["method"]](*body.get("args", []))]}
        return 404, {"detail": "Not Found"}


def interpreter(folder: Path, fault: str = "") -> str:
    """An executable that answers as .venv-vllm/bin/python would, with this server instead of vLLM's."""
    path = folder / f"python-{fault.replace(' ', '-') or 'plain'}"
    path.write_text(
        f"#!{sys.executable} -I\nimport runpy, sys\nsys.argv[0:1] = [{__file__!r}, {fault!r}]\nrunpy.run_path({__file__!r}, run_name='__main__')\n"
    )
    path.chmod(0o755)
    return str(path)


def main(fault: str, words: list[str]) -> int:
    if "-c" in words:  # what does this interpreter have?
        print(json.dumps([None if fault == "no vllm" else "0.32.0", fault != "no steerl"]))
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--model")
    given, _ = parser.parse_known_args(words)
    Path(given.model, "started.json").write_text(json.dumps([words, os.getcwd(), dict(os.environ)]))
    said = {
        "memory": "(Worker pid=7) ERROR 11-26 23:06:52 [core.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried 9 GiB",
        "words": "(EngineCore pid=7) ERROR 11-26 23:06:52 [core.py:1] ValueError: Head size 16 is not supported\n"
        "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
        "silent": "",
    }
    if fault in said:
        print(said[fault], file=sys.stderr)
        return 1
    starts = Path(given.model, "starts")
    starts.write_text(f"{starts.read_text() if starts.exists() else ''}{given.port}\n")
    first = len(starts.read_text().splitlines()) == 1
    if fault == "taken" and first:
        print("OSError: [Errno 98] Address already in use", file=sys.stderr)
        return 1
    if fault == "killed" or (fault == "killed once" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "children":
        grandchild = (
            f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {WAIT!r}], start_new_session=True).wait()"
        )
        subprocess.Popen([sys.executable, "-c", grandchild])
    if fault == "never":
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", given.port))
            threading.Event().wait(600)
    with Scripted(given.port, given.model) as server:
        server.methods["steerl_hello"] = lambda: {"wire": 1, "version": -1, "model": "Scripted"}
        threading.Event().wait(600)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
