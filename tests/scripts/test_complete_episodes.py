"""`steerl complete` with tools and with an environment: what is shown is what was said and told, numbers are one pass's."""

from __future__ import annotations

import json
import re
from pathlib import Path

from steerl.configs.reader import read

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.scripts.complete import CompleteJob, main

TOOLS = "[tiny/calculator/tools.py:add, tiny/calculator/tools.py:multiply]"
QUESTIONS = [
    f"what is {a} {sign} {b} ?" for a, sign, b in ((374, "*", 528), (120, "+", 456), (900, "*", 111), (333, "+", 222))
] * 4


@pytest.fixture(autouse=True)
def folder(episode_tasks) -> Path:
    return episode_tasks


def said(capfd: pytest.CaptureFixture, *words: str) -> list[str]:
    main(read(CompleteJob, list(words)))
    return capfd.readouterr().out.splitlines()


def calculator(*more: str) -> list[str]:
    return ["--model.path", "tiny/calculator/base", "--environment.tools", TOOLS, "--chat", "true", *more]


def expected(record: dict) -> list[str]:
    """The lines of an episode, of its record alone."""
    lines = [f"> {record['prompt'][-1]['content']}"]
    for turn in record["turns"]:
        lines.append(turn["text"])
        for message in turn["answer"]:
            lines += [f"  | {message.get('name') or message['role']}: {message['content']}"]
        lines += [f"  ! {error}" for error in turn["errors"]]
    count = len(record["turns"])
    how = {"policy": "the policy", "length": "sampling.max_new_tokens", "turns": "environment.max_turns"}[record["ended_by"]]
    return [*lines, f"  = ended by {how} after {count} turn{'s' * (count > 1)}"]


def test_what_is_shown_is_what_the_record_says(capfd):
    records = [json.loads(line) for line in said(capfd, *calculator("--json", "true"), *QUESTIONS)]
    assert [record["prompt"][0]["content"] for record in records] == QUESTIONS
    assert said(capfd, *calculator(), *QUESTIONS) == [line for record in records for line in expected(record)]
    turns = [turn for record in records for turn in record["turns"]]
    assert any(turn["calls"] and not turn["errors"] for turn in turns) and any(turn["errors"] for turn in turns)


def test_the_numbers_are_those_of_one_pass(capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained("tiny/calculator/base")
    tokenizer = AutoTokenizer.from_pretrained("tiny/calculator/base")
    lines = said(capfd, *calculator("--json", "true", "--sampling.temperature", "1.5"), *QUESTIONS)
    several = [record for record in map(json.loads, lines) if len(record["turns"]) > 1]
    assert several
    for record in several:
        places = [t for turn in record["turns"] for t in range(turn["first"], turn["end"])]
        assert places == [t for t, acts in enumerate(record["action_mask"]) if acts]
        question = record["prompt"][0]["content"]
        text = f"<|system|>tools: add(a, b) multiply(a, b)</s><|user|>{question}</s><|assistant|>"
        ids = tokenizer.encode(text) + record["ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        first = len(ids) - len(record["ids"])
        for t in places:
            assert record["logprobs"][t] == pytest.approx(float(logits[first + t - 1, record["ids"][t]]), abs=1e-4)


def test_an_environment_reads_the_datas_columns(capfd):
    words = ["--model.path", "tiny/maze/base", "--environment.factory", "tiny/maze/environment.py:Maze"]
    words += ["--prompts.path", "tiny/maze/prompts.jsonl", "--prompts.limit", "3", "--sampling.max_new_tokens", "4"]
    lines = said(capfd, *words, "--sampling.batch_size", "2", "--environment.max_turns", "10")
    rows = [json.loads(line) for line in Path("tiny/maze/prompts.jsonl").read_text().splitlines()][:3]
    assert [line[2:] for line in lines if line.startswith("> ")] == [row["prompt"] for row in rows]
    ends = [line for line in lines if line.startswith("  = ")]
    ended = r"  = ended by (environment.max_turns after 10 turns; reward 0|the environment after \d+ turns; reward 1)"
    assert len(ends) == 3 and all(re.fullmatch(ended, end) for end in ends)
    assert sum(line.startswith("  | ") for line in lines) > 9


def test_a_steered_episode_stands_below_the_plain_one(capfd):
    steering = {"sites": [{"name": "off", "at": {"layers": [1]}, "op": {"type": "zero"}, "strength": 1.0}]}
    lines = said(capfd, *calculator("--steering", json.dumps(steering)), *QUESTIONS[:2])
    heads = [line for line in lines if not line.startswith("  ") and line.endswith(":")]
    assert [lines.index(head) for head in dict.fromkeys(heads)][0] == 0 and heads[:2] == ["unsteered:", "unsteered:"]
    assert heads[2] == heads[3] != "unsteered:" and sum(line.startswith("> ") for line in lines) == 4
    steered = lines.index(heads[2])
    plain = said(capfd, *calculator(), *QUESTIONS[:2])
    assert [line for line in lines[:steered] if line != "unsteered:"] == plain
    assert [line for line in lines[steered:] if line != heads[2]] != plain


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--logprobs", "true", "what is 1 + 1 ?"], "logprobs: has no effect on episodes"),
        (["--sampling.n", "2", "what is 1 + 1 ?"], "sampling.n: 2, but a prompt has one completion"),
        (["--chat", "false", "what is 1 + 1 ?"], "environment: tools need conversations; add --chat true"),
        (["--environment.tools", "[tiny/calculator/tools.py:divide]", "what is 1 + 1 ?"], "divide"),
    ],
)
def test_what_an_episode_cannot_be_is_refused_in_a_line(words, line, capfd):
    with pytest.raises((UserError, SystemExit)) as refused:
        main(read(CompleteJob, calculator(*words)))
    told = "\n".join(refused.value.lines) if isinstance(refused.value, UserError) else capfd.readouterr().err
    assert line in told


def test_there_is_no_chat_with_tools(monkeypatch):
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    with pytest.raises(UserError, match="prompt: missing; an episode begins with one"):
        main(read(CompleteJob, calculator()))
