"""A hostile case is a function of its seed: which command, with which flags, in a copy of the world with which damage.

Seeds go round the families, so that any row of them holds all: settings, YAML, prompts, models, reward models, vectors,
steering specs, checkpoints, dumps, rewards.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerl.configs.values import type_at

from steerl.rollout.common.settings_reader import every_path, words
from tests.fuzz.damage import ESCAPE, LONE, LONG, NUMBERS, TEXTS, Bomb, damage, damaged_bytes, damaged_tree, deep, dumps, value
from tests.fuzz.world import CLEAN, COMMANDS, OUT


@dataclass(frozen=True)
class Case:
    command: str
    argv: list[str]
    what: str
    goes_on: bool = False
    """Whether it writes where it reads (a resume)."""
    names: bool = False
    """Whether its settings may name other files to write."""


def make(seed: int, folder: Path) -> Case:
    draw = random.Random(seed)
    return FAMILIES[seed % len(FAMILIES)](draw, folder)


# -- families ----------------------------------------------------------------------------------------------------------

ENDLESS = ("steps", "epochs", "eval_every", "measure", "max_steps")
"""Large numbers that are a long job, not a wrong one."""


def settings(draw: random.Random, folder: Path) -> Case:
    """One or two settings of a command with a value that does not suit."""
    command = draw.choice(list(COMMANDS))
    paths = [path for path in every_path(COMMANDS[command][1]) if path[-1] not in ENDLESS]
    argv, said = list(CLEAN[command]), []
    for path in draw.sample(paths, draw.choice([1, 1, 2])):
        wanted = words(type_at(COMMANDS[command][1], path))
        text = str(draw.choice(NUMBERS)) if "number" in wanted and draw.random() < 0.6 else draw.choice(TEXTS)
        name = ".".join(path[: len(path) - (draw.random() < 0.05)]) or "x"
        argv += [f"--{name}={text}"] if draw.random() < 0.7 else [f"--{name}", text]
        said.append(f"{name}={text[:40]!r}")
    return Case(command, argv, " ".join(said), names=True)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
DOCUMENTS: list[str] = [
    BOMB + "run: *a11\n",
    "x: &x [*x]\n",
    "sampling: &s {max_new_tokens: 4, bad: *s}\n",
    "run: {dir: " + "[" * 20_000,
    "run: " + "[" * 300 + "]" * 300 + "\n",
    "a: " * 500 + "\n",
    "? " * 3000,
    "- " * 3000,
    f"{json.dumps(ESCAPE)}: {json.dumps(ESCAPE)}\n",
    f'"{LONG}": 1\n',
    '"\\ud800": 1\n',
    'run: {dir: "\\ud800"}\n',
    'run: {dir: "a\\0b"}\n',
    f"run: {{dir: {LONG}}}\n",
    "run:\n\tdir: x\n",
    "run: {seed: 1:30}\n",
    "run: {seed: 0777}\n",
    "run: {seed: 1_000}\n",
    "run: {seed: 0x1F}\nsampling: {seed: 2026-01-01}\n",
    "run: {seed: 2026-13-45}\n",
    "run: {seed: " + "9" * 5000 + "}\n",
    "run: !!python/object/apply:os.system [touch PWNED]\n",
    "!!binary aGFsbG8=\n",
    "run: !!set {a, b}\nmodel: !!omap [a: 1]\n",
    "run: {<<: {seed: 1}, seed: 2}\n",
    "run: {<<: 3}\n",
    "1: 2\ntrue: x\nnull: y\n[1, 2]: z\n",
    "{a: 1}: 2\n",
    "run: {dir: a, dir: b}\n",
    "--- {}\n--- {}\n",
    "...\n",
    "\ufeffrun: {seed: 1}\n",
    "sampling: 5\nprompts: [1]\nrun: x\n",
    "reward: [[[{kind: length}]]]\n",
    "steering: {sites: " + "[" * 200 + "]" * 200 + "}\n",
    "x" * 2_000_000,
    "k: v\n" * 200_000,
]


def yaml(draw: random.Random, folder: Path) -> Case:
    """A --config file that is no settings file of ours."""
    command = draw.choice(list(COMMANDS))
    document = draw.choice(DOCUMENTS)
    content = document.encode("utf-8", "surrogatepass")
    if draw.random() < 0.15:
        content = damaged_bytes(draw, content[:4000])
    (folder / "config.yaml").write_bytes(content)
    return Case(command, ["--config", "config.yaml", *CLEAN[command]], f"config {document[:60]!r}")


PROMPT_FILES: list[tuple[str, bytes]] = [
    ("p.jsonl", dumps({"prompt": "a" * 10_000_000})),
    ("p.jsonl", dumps({"prompt": deep(400)})),
    ("p.jsonl", b'{"prompt": ' + b"[" * 200_000),
    ("p.jsonl", b'{"prompt": "\\ud800"}\n'),
    ("p.jsonl", dumps({"prompt": ESCAPE})),
    ("p.jsonl", dumps({ESCAPE: "a", LONG: "b"})),
    ("p.jsonl", dumps({"prompt": "a\x00b", LONE: 1})),
    ("p.jsonl", b'{"prompt": NaN}\n{"prompt": 1e999}\n{"prompt": ' + b"9" * 5000 + b"}\n"),
    ("p.jsonl", b'{"prompt": "a", "prompt": "b"}\n'),
    ("p.jsonl", b"\xff\xfe{\x00}\x00"),
    ("p.jsonl", b"\n\n\n"),
    ("p.jsonl", dumps({"prompt": [{"role": "user"}]})),
    ("p.jsonl", dumps({"prompt": [{"role": 5, "content": {"a": 1}}, {"content": "x"}]})),
    ("p.jsonl", dumps({"prompt": [{"role": "user", "content": LONE}]})),
    (
        "p.jsonl",
        dumps(
            {
                "prompt": [{"role": "tool", "content": [{"type": "text", "text": "a"}]}],
                "tools": "{",
                "chat_template_kwargs": "[1]",
            }
        ),
    ),
    ("p.jsonl", dumps({"prompt": [{"role": "user", "content": "a"}], "tools": 5, "chat_template_kwargs": {"tokenize": False}})),
    ("p.json", b"[" * 100_000),
    ("p.json", b'[{"prompt": "a"}, 5]'),
    ("p.json", b'{"prompt": "a"}'),
    ("p.json", dumps([{"prompt": deep(900)}])),
    ("p.csv", b'prompt,x\n"a,b\nc,d\n'),
    ("p.csv", b"prompt,prompt\na,b\n"),
    ("p.csv", b"prompt\n" + b'"' + b"a" * 200_000 + b'"\n'),
    ("p.csv", b"prompt,x\na\n"),
    ("p.csv", b"prompt\na\x00b\n"),
    ("p.csv", b""),
    ("p.tsv", "prompt\tx\nä\tö\n".encode("latin-1")),
    ("p.parquet", b"PAR1" + bytes(100) + b"PAR1"),
    ("p.parquet", b""),
    ("p.txt", b"a\n"),
]


def prompts(draw: random.Random, folder: Path) -> Case:
    """Data files that are damaged, huge, of another shape or another encoding."""
    flags = {"dump_rollouts": "--prompts.path", "train_ppo": "--prompts.path", "complete": "--prompts.path"}
    flags |= {"train_sft": "--prompts.path", "train_reward": "--prompts.path", "extract_steering": "--extract.pairs"}
    command = draw.choice(list(flags))
    argv = [word for word in CLEAN[command] if word != "abc"]
    kind = draw.random()
    if kind < 0.6:
        name, content = draw.choice(PROMPT_FILES)
        said = f"{name} {content[:60]!r}"
        if draw.random() < 0.2:
            content = damaged_bytes(draw, content[:4000])
        (folder / name).write_bytes(content)
    elif kind < 0.8:
        import pyarrow
        from pyarrow import parquet

        name = "p.parquet"
        columns = {"prompt": draw.choice([["a", None], [1, 2], [["a"], []], [{"a": 1}], [b"\xff"], [["a"], ["b"]]])}
        parquet.write_table(pyarrow.table(columns), folder / name)
        if draw.random() < 0.5:
            (folder / name).write_bytes(damaged_bytes(draw, (folder / name).read_bytes()))
        said = f"{name} {columns}"
    else:
        name = {"train_sft": "sft.jsonl", "train_reward": "pairs.jsonl", "extract_steering": "steer.jsonl"}.get(
            command, "prompts.jsonl"
        )
        said = damage(draw, folder / name)
    return Case(command, [*argv, flags[command], name], said)


def _model(draw: random.Random, folder: Path) -> str:
    """Damage of a model's folder, in a word or two."""
    kind = draw.random()
    if kind < 0.45:
        file = folder / "config.json"
        tree = json.loads(file.read_text())
        keys = (
            "num_hidden_layers",
            "hidden_size",
            "vocab_size",
            "num_attention_heads",
            "model_type",
            "rope_parameters",
            "dtype",
        )
        key = draw.choice([*keys, *tree])
        tree[key] = draw.choice([value(draw), draw.choice([-1, 0, 1, 3, "1", 1.5, "gpt2", 10**12])])
        file.write_bytes(dumps(tree))
        return f"config.json {key} = {str(tree[key])[:60]!r}"
    if kind < 0.52:
        import torch

        weights = draw.choice(["pytorch_model.bin", "model.safetensors"])
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Bomb()}, folder / weights)
        return f"a pickle called {weights}"
    files = ("model.safetensors", "model.safetensors", "tokenizer.json", "tokenizer.json", "tokenizer_config.json")
    file = folder / draw.choice([*files, "generation_config.json", "config.json"])
    return damage(draw, file) if file.exists() else "as it was"


def models(draw: random.Random, folder: Path) -> Case:
    command = draw.choice(["dump_rollouts", "train_ppo", "complete", "train_sft", "train_reward", "extract_steering", "plan"])
    return Case(command, CLEAN[command], _model(draw, folder / "model"))


def judges(draw: random.Random, folder: Path) -> Case:
    """Reward models, also as the value to begin with."""
    said = _model(draw, folder / "judge")
    judge = "[{kind: model, path: judge}]"
    choice = draw.choice(["reward", "value", "score"])
    if choice == "score":
        return Case("score_rollouts", ["--dump.dir", "dump", "--reward", judge, *OUT], said)
    more = ["--reward", judge] if choice == "reward" else ["--ppo.value", "judge"]
    return Case("train_ppo", [*CLEAN["train_ppo"], *more], f"{choice}, {said}")


def vectors(draw: random.Random, folder: Path) -> Case:
    name = draw.choice(["vector.safetensors", "vector.gguf", "vector.gguf", "pyvene"])
    if name == "pyvene":
        file = folder / name / draw.choice(["config.json", *[f.name for f in (folder / name).glob("*.bin")] * 3])
        if draw.random() < 0.3:
            import torch

            junk = [Bomb(), {"a": Bomb()}, [1], 5, {"source_representation": 5}, {5: torch.ones(32)}]
            junk += [{"rotate_layer.parametrizations.weight.original": torch.ones(3)}]
            file = next((folder / name).glob("*.bin"))
            torch.save(draw.choice(junk), file)
            said = "pyvene, another object"
        else:
            said = damage(draw, file)
    else:
        path = folder / name
        content = path.read_bytes()
        at = draw.randrange(min(len(content), 256))
        other = content[:at] + bytes(draw.randrange(256) for _ in range(draw.choice([1, 4, 8]))) + content[at + 8 :]
        path.write_bytes(other if draw.random() < 0.5 else damaged_bytes(draw, content))
        said = f"{name}, other bytes"
    source = f"{{folder: {name}}}" if name == "pyvene" else f"{{file: {name}}}"
    spec = f"{{sites: [{{at: {{layers: [0]}}, op: {{type: add}}, vector: {source}}}]}}"
    command = draw.choice(["dump_rollouts", "complete"])
    return Case(command, [*CLEAN[command], "--steering", spec], said)


def specs(draw: random.Random, folder: Path) -> Case:
    """Steering specs with one place changed."""
    at, vector = {"layers": [0], "component": "block_output"}, {"values": [0.1] * 32}
    where = {"prompt": {"window": [0, 2]}, "steps": {"every": 2}, "exclude": {"token_ids": ["eos"], "positions": [1]}}
    gate = {"vector": vector, "layer": 0, "open_above": 0.0}
    site = {"at": at, "op": {"type": "add"}, "vector": vector, "strength": 1.0}
    sites = [
        site,
        {**site, "where": where, "at": {"layers": [1]}, "gate": gate},
        {**site, "strength": {"dist": "uniform", "low": 0.0, "high": 1.0, "per": "prompt"}},
        {**site, "strength": draw.choice([1e300, -1e300, 1e39, 1e-320, 3e38])},
        {"at": {"module": "model.layers.0", "io": "output"}, "op": {"type": "clamp", "value": 1.0}, "vector": vector},
        {"at": at, "op": {"type": "set", "coordinates": [0, 1]}, "vector": {"file": "vector.safetensors", "normalise": True}},
    ]
    tree: Any = {"sites": [draw.choice(sites)], "role": draw.choice(["policy", "data"]), "fraction": 1.0, "on_deploy": "keep"}
    if draw.random() < 0.85:
        tree = damaged_tree(draw, tree)
    command = draw.choice(["dump_rollouts", "complete", "train_ppo"])
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5)
    if draw.random() < 0.5:
        return Case(command, [*CLEAN[command], "--steering", text], text[:200])
    (folder / "spec.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    return Case(command, [*CLEAN[command], "--steering", "spec.yaml"], text[:200])


def checkpoints(draw: random.Random, folder: Path) -> Case:
    """Run folders of another shape; a changed state has its checksum in the manifest, as a bad program would write it."""
    step = next((folder / "run" / "checkpoints").glob("step-*"))
    file = draw.choice([step / "state.json"] * 5 + [step / "tensors.safetensors", step / "manifest.json", folder / "run" / "metrics.jsonl"]
                       + [folder / "run" / name for name in ("summary.json", "config.yaml", "samples.jsonl")])  # fmt: skip
    said = damage(draw, file)
    manifest = step / "manifest.json"
    if file.parent == step and file != manifest and file.exists():
        tree = json.loads(manifest.read_text())
        tree["files"][file.name] = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        manifest.write_bytes(dumps(tree))
    if draw.random() < 0.3:
        return Case("report", CLEAN["report"], said)
    steps = ["--ppo.steps", draw.choice(["1", "2"])]
    return Case("train_ppo", [*CLEAN["train_ppo"], *steps, "--run.dir", "run", "--run.resume", "true"], said, goes_on=True)


def stores(draw: random.Random, folder: Path) -> Case:
    """Dumps and scores that are damaged."""
    files = [path for place in ("dump", "scores") for path in sorted((folder / place).glob("*.*"))]
    said = damage(draw, draw.choice([*files, *[path for path in files if path.suffix == ".json"] * 3]))
    command = draw.choice(["inspect_rollouts", "select_rollouts", "score_rollouts", "report", "train_ppo", "resume"])
    if command == "report":
        return Case("report", ["dump", "--out", "out.html"], said)
    if command == "train_ppo":
        return Case(command, [*CLEAN[command], "--ppo.replay", "dump", "--ppo.correction.type", "none"], f"replay, {said}")
    if command == "resume":
        again = [*CLEAN["dump_rollouts"], "--sampling.n", "2", "--run.dir", "dump", "--run.resume", "true"]
        return Case("dump_rollouts", again, f"resume, {said}", goes_on=True)
    return Case(command, CLEAN[command], said)


REWARDS: list[Any] = [
    {"kind": "length", "unit": "characters", "max": 8, "min": 1},
    {"kind": "regex", "pattern": "(a+)+$"},
    {"kind": "keywords", "words": ["a"]},
    {"kind": "exact", "column": "answer"},
    {"kind": "numeric", "column": "answer"},
    {"kind": "json"},
    {"kind": "repetition", "n": 3},
    {"kind": "function", "function": "reward.py:score"},
    {"kind": "http", "url": "http://127.0.0.1:9", "timeout": 1, "retries": 0},
]


def rewards(draw: random.Random, folder: Path) -> Case:
    """Entries of `reward:` with one place changed."""
    (folder / "reward.py").write_text("def score(prompts, completions, **columns):\n    return [1.0] * len(completions)\n")
    entry = {**draw.choice(REWARDS), "weight": 1.0, "name": "part", "clip": [-1.0, 1.0], "normalise": {"mean": 0.0, "std": 1.0}}
    tree = damaged_tree(draw, [entry])
    command = draw.choice(["score_rollouts", "train_ppo"])
    text = json.dumps(tree, ensure_ascii=draw.random() < 0.5)
    return Case(command, [*CLEAN[command], "--reward", text], text[:200])


FAMILIES: tuple[Callable[[random.Random, Path], Case], ...] = (
    settings, yaml, prompts, models, judges, vectors, specs, checkpoints, stores, rewards,
)  # fmt: skip
