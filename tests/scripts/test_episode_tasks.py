"""The toy tasks of several turns: a calculator and a maze; the page's own tool, run as it is written; a short run learns."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shlex
from collections import Counter
from pathlib import Path
from types import ModuleType

from steerl.configs.reader import read

import pytest

from steerl.cli import main as steerl_main
from steerl.scripts import train_ppo
from steerl.scripts.toy_tasks import calculator, maze

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(episode_tasks) -> Path:
    return episode_tasks


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def trained(world: str, **flags: object) -> dict:
    words = [word for name, value in flags.items() for word in (f"--{name.replace('__', '.')}", str(value))]
    train_ppo.main(
        read(train_ppo.PPOJob, ["--config", f"steerl:{world}", "--run.dir", "run", "--ppo.eval_prompts", "0", *words])
    )
    return rows(Path("run/metrics.jsonl"))[-1]


# -- the calculator ------------------------------------------------------------------------------------------------------


def test_the_answers_are_what_the_tools_say(folder):
    tools = module(folder / "tiny/calculator/tools.py")
    for name in ("prompts", "heldout"):
        for row in rows(folder / f"tiny/calculator/{name}.jsonl"):
            a, sign, b = re.fullmatch(r"what is (\d+) ([+*]) (\d+) \?", row["prompt"][0]["content"]).groups()
            assert row["answer"] == str({"+": tools.add, "*": tools.multiply}[sign](int(a), int(b)))
            assert row["answer"] == str(int(a) + int(b) if sign == "+" else int(a) * int(b))
    asked = [json.dumps(row) for name in ("prompts", "heldout") for row in rows(folder / f"tiny/calculator/{name}.jsonl")]
    assert len(set(asked)) == len(asked), "held-out questions are others"


def test_a_guess_is_hardly_ever_right():
    draw = random.Random(0)
    questions = [calculator.question(draw) for _ in range(20_000)]
    hits = sum(calculator.guess(draw, *each) == str(calculator.result(*each)) for each in questions)
    assert hits < 40, "two in a thousand would be an easier task than the page says"


def test_demonstrations_are_of_every_kind():
    draw, kinds = random.Random(0), Counter[str]()
    for _ in range(4000):
        name, a, b = calculator.question(draw)
        said = calculator.demonstration(draw, name, a, b)
        answer = str(a + b if name == "add" else a * b)
        if len(said) == 1:
            kinds["guess"] += 1
        elif said[1].startswith("error"):
            kinds["refused"] += 1
        else:
            called = json.loads(said[0][len("<tool_call>") : -len("</tool_call>")])
            kinds["right call"] += called == {"name": name, "arguments": {"a": a, "b": b}}
        kinds["right"] += said[-1] == answer
    assert 0.45 < kinds["guess"] / 4000 < 0.55 and 0.25 < kinds["right call"] / 4000 < 0.35
    assert 0.14 < kinds["right"] / 4000 < 0.24 and kinds["refused"] > 200


def test_a_call_that_is_shown_is_one_that_is_read(folder):
    """The template writes a call as the demonstrations do, so that earlier turns stay what was said."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tiny/calculator/base")
    call = {"type": "function", "function": {"name": "multiply", "arguments": {"a": 374, "b": 528}}}
    said = [
        {"role": "user", "content": "what is 374 * 528 ?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "multiply", "content": "197472"},
    ]
    text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|user|>what is 374 * 528 ?</s><|assistant|>"
        + calculator.call("multiply", 374, 528)
        + "</s><|tool|>197472</s><|assistant|>"
    )
    assert [tokenizer.decode(i) for i in tokenizer.encode("197472")] == list("197472"), "a token for every digit"


def test_the_pages_own_tool_runs(folder, capfd):
    """docs/environments.md, its file and its commands, with a run of one step."""
    page = (ROOT / "docs/environments.md").read_text(encoding="utf-8")
    section = page[page.index("## A tool of your own") : page.index("## An environment of your own")]
    (file,) = re.findall(r"```python\n# my_tools.py\n(.*?)```", section, flags=re.DOTALL)
    Path("my_tools.py").write_text(file, encoding="utf-8")
    (block,) = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [words[1] for words in lines] == ["tiny", "complete", "ppo", "complete"]
    for words in lines[1:]:
        small = ["--ppo.steps", "1", "--ppo.rollouts_per_step", "16", "--ppo.eval_prompts", "0"] if words[1] == "ppo" else []
        steerl_main([*words[1:], *small])
    said = capfd.readouterr().out
    assert said.count("> what is 374 * 528 ?\n") == 2 and said.count("  = ended by ") == 2
    assert 1 <= rows(Path("runs/mine/metrics.jsonl"))[0]["environment/turns"] <= 4


@pytest.mark.proofs
@pytest.mark.parametrize("world", ["calculator", "maze"])
@pytest.mark.parametrize("credit", ["gae", "group"])
def test_it_is_learned(world, credit, folder):
    more = {"sampling__n": 8, "ppo__rollouts_per_step": 128, "ppo__minibatches": 4} if credit == "group" else {}
    first = trained(world, ppo__steps=1, **more)["reward/mean"]
    last = trained(world, ppo__credit=credit, run__overwrite="true", **more)
    assert first < 0.25 and last["reward/mean"] > 0.75
    assert last["gap/max"] < 1e-3


@pytest.mark.proofs
def test_nothing_is_learned_without_the_tool(folder):
    last = trained("calculator", environment__tools="[]", environment__max_turns=8)
    assert last["reward/mean"] < 0.03 and "environment/turns" not in last


# -- the maze ------------------------------------------------------------------------------------------------------------


def best_walk(doors: dict, start: str, key: str, out: str) -> int:
    """Steps of the shortest walk to the key and then out, over (room, key or not)."""
    reached, steps = {(start, start == key)}, 0
    while (out, True) not in reached:
        reached |= {(other, has or other == key) for room, has in reached for other in doors[room].values()}
        steps += 1
    return steps


@pytest.mark.parametrize("seed", range(4))
def test_every_start_is_five_to_eight_steps_away(seed):
    doors, key, out = maze.make_maze(random.Random(seed))
    assert sorted(doors) == sorted(maze.ROOMS)
    back = {"north": "south", "south": "north", "east": "west", "west": "east"}
    assert all(doors[other][back[way]] == room for room, ways in doors.items() for way, other in ways.items())
    shortest = [best_walk(doors, start, key, out) for start in maze.starts(doors, key, out)]
    assert min(shortest) >= 5 and max(shortest) <= 8 < maze.TURNS


def test_what_is_seen_earned_and_over(folder):
    doors = {"hall": {"east": "attic"}, "attic": {"west": "hall", "east": "tower"}, "tower": {"west": "attic"}}
    row = {"doors": json.dumps(doors), "start": "attic", "key": "hall", "exit": "tower"}
    for walk in (maze.Maze(), module(folder / "tiny/maze/environment.py").Maze()):
        assert walk.reset(row) == "attic : west east"
        assert walk.step("north") == walk.step("sit") == ("attic : west east", 0.0, False)
        assert walk.step(" east") == ("tower : west exit", 0.0, False), "not without the key"
        assert walk.step("east") == ("tower : west exit", 0.0, False), "no door"
        assert walk.step("sit down") == ("tower : west exit", 0.0, False)
        walk.step("west")
        assert walk.step("west") == ("hall : east", 0.0, False), "taken as soon as it is found"
        walk.step("east")
        assert walk.step("east") == ("tower : west exit", 1.0, True)


def test_a_step_of_either_task(folder):
    """Every kind of row: calls and answers, ten turns, and the prompt that the environment opens with."""
    found = trained("maze", ppo__steps=1, ppo__rollouts_per_step=16)
    assert 2 < found["environment/turns"] <= 10 and found["environment/failures"] == 0
    assert found["rollout/fed_tokens"] > found["rollout/rows"]
    found = trained("calculator", ppo__steps=1, ppo__rollouts_per_step=32, run__overwrite="true")
    assert found["environment/tool_calls"] > 0 and found["environment/failures"] == 0
    facts = json.loads(Path("tiny/maze/maze.json").read_text(encoding="utf-8"))
    for row in rows(Path("tiny/maze/heldout.jsonl"))[:10]:
        assert facts["shortest"][row["start"]] == best_walk(json.loads(row["doors"]), row["start"], row["key"], row["exit"])
        assert row["prompt"].split(" : ")[0] == row["start"]
