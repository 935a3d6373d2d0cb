"""How fast the live page opens and how much it holds: `python -m tests.training.report.watch_load [RUNS STEPS FED]`.

RUNS runs of STEPS steps with samples are there when the page is opened; then FED steps are written into the first as fast as the
page takes them. Told are the seconds until all curves are drawn, and the server's memory and the page's heap on the way.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.browser import Browser

KEYS = [f"{room}/{name}" for room in ("reward", "ppo", "value", "rollout", "time", "other") for name in "abcdefgh"]
TOKENS = 60


def lines(step: int) -> tuple[str, str]:
    values = {"reward/mean": random.random(), "kl/ref": random.random(), "gap/max": random.random()}
    values |= {key: random.random() for key in KEYS}
    numbers = {
        name: [round(-random.random(), 6) for _ in range(TOKENS)]
        for name in ("policy_logprobs", "reference_logprobs", "values")
    }
    sample = {
        "step": step,
        "row": step,
        "sample": 0,
        "kind": "random",
        "reward": 0.5,
        "prompt_text": "a " * 20,
        "completion": "b " * TOKENS,
    }
    sample |= {
        "response_ids": [7] * TOKENS,
        "response_tokens": ["b "] * TOKENS,
        "prompt_ids": [1],
        "prompt_tokens": ["a"],
        **numbers,
    }
    return json.dumps({"step": step, **values}) + "\n", json.dumps(sample) + "\n"


def write(folder: Path, steps: range) -> None:
    folder.mkdir(exist_ok=True)
    made = [lines(step) for step in steps]
    for name, which in (("metrics.jsonl", 0), ("samples.jsonl", 1)):
        with (folder / name).open("a") as file:
            file.write("".join(pair[which] for pair in made))


def memory(process: subprocess.Popen[bytes]) -> float:
    told = Path(f"/proc/{process.pid}/status").read_text()
    return int(told.partition("VmRSS:")[2].split()[0]) / 1024


def heap(browser: Browser) -> float:
    browser.call("HeapProfiler.collectGarbage")
    return float(browser.call("Runtime.getHeapUsage")["usedSize"]) / 2**20


def main(runs: int = 10, steps: int = 1000, fed: int = 20_000) -> None:
    with tempfile.TemporaryDirectory() as made, Browser() as browser:
        for i in range(runs):
            write(Path(made) / f"run{i}", range(1, steps + 1))
        command = [sys.executable, "-P", "-m", "steerl", "watch", made, "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            address = server.stdout.readline().split()[0].decode()
            drawn = "document.querySelectorAll('path[data-label^=\"reward/mean\"]').length"
            last = f"document.querySelectorAll('.state').length === {runs} && [...document.querySelectorAll('.state')].every(s => s.textContent.includes('step {steps}'))"
            for _ in range(3):
                began = time.perf_counter()
                browser.open(address)
                while not (browser.run(last) and browser.run(drawn) == runs):
                    time.sleep(0.02)
                print(f"{runs} runs x {steps} steps: all curves after {time.perf_counter() - began:.2f} s", flush=True)
            print(f"{steps:>6} steps: server {memory(server):.0f} MiB, page {heap(browser):.1f} MiB")
            for at in range(steps, steps + fed, fed // 10):
                for start in range(at, at + fed // 10, 100):
                    write(Path(made) / "run0", range(start + 1, start + 101))
                    wanted = f"document.querySelector('.state').textContent.includes('step {start + 100}')"
                    while not browser.run(wanted):
                        time.sleep(0.02)
                print(f"{at + fed // 10:>6} steps: server {memory(server):.0f} MiB, page {heap(browser):.1f} MiB", flush=True)
            print("problems of the page:", browser.problems)
            server.terminate()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
