"""Datasets of texts and conversations as rows of a reward."""

from __future__ import annotations

import json

import pytest

from steerl.reward.texts import TextSettings, load_texts
from steerl.rollout.common.errors import UserError


def table(tmp_path, rows, **settings):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_texts(TextSettings(path=str(path), **settings), "texts")


USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "settings", "prompt", "completion", "others"),
    [
        ({"prompt": "q", "completion": "a", "g": 1}, {}, "q", "a", ["g"]),
        ({"prompt": "q", "response": "a"}, {}, "q", "a", []),
        ({"text": "a", "label": 1}, {}, "", "a", ["label"]),
        ({"messages": [USER, REPLY], "prompt": "x"}, {}, [USER], "a", ["prompt"]),
        ({"messages": [USER, REPLY], "prompt": "x", "text": "b"}, {"completion": "text"}, "x", "b", ["messages"]),
        ({"prompt": [USER], "completion": [REPLY]}, {}, [USER], "a", []),
        ({"prompt": "q", "completion": [REPLY]}, {}, [USER], "a", []),
        ({"prompt": [{**USER, "content": [{"type": "text", "text": "q"}]}], "completion": [REPLY]}, {}, None, "a", []),
        ({"messages": [USER, {**REPLY, "content": [{"type": "text", "text": "a"}]}]}, {}, [USER], "a", []),
        ({"ask": "q", "say": "a"}, {"prompt": "ask", "completion": "say"}, "q", "a", []),
    ],
)
def test_layouts(tmp_path, row, settings, prompt, completion, others):
    rollout, texts = table(tmp_path, [row, row], **settings).batch(range(1, 2))
    assert (
        texts.prompts == [prompt if prompt is not None else row["prompt"]]
        and texts.completions == [completion]
        and list(texts.columns) == others
    )
    assert rollout.row_B.tolist() == [1] and rollout.lengths_B.tolist() == [0]


def test_limit(tmp_path):
    assert len(table(tmp_path, [{"text": "a"}] * 5, limit=3)) == 3


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"title": "q"}, {}, "texts.completion: none of the usual columns is there"),
        ({"text": "a"}, {"prompt": "ask"}, "texts.prompt: 'ask' is not a column"),
        ({"messages": [REPLY], "text": "a"}, {"messages": "messages", "completion": "text"}, "have no effect, leave them out"),
        ({"messages": [REPLY, USER]}, {}, "texts: row 0, column 'messages': the last message is"),
        ({"messages": "hello"}, {}, "texts: row 0, column 'messages': expected a list of messages"),
        ({"messages": [{"role": "user"}, REPLY]}, {}, "texts: row 0, column 'messages': message 0 (user) has no content"),
        ({"messages": [{**USER, "content": 3}, REPLY]}, {}, "message 0 (user) has a content of type int"),
        ({"prompt": "q", "completion": None}, {}, "texts: row 0: column 'completion' holds None"),
        ({"prompt": 3, "completion": "a"}, {}, "texts: row 0: column 'prompt' holds int"),
    ],
)
def test_bad_rows(tmp_path, row, settings, message):
    with pytest.raises(UserError) as caught:
        table(tmp_path, [row], **settings).batch(range(1))
    assert message in str(caught.value)


def test_columns_are_those_of_the_data_set_whatever_rows_are_read(tmp_path):
    rows = [{"text": "a"}, {"text": "b", "gold": "b"}, {"text": "c", "level": 1}]
    found = table(tmp_path, rows)
    for start in range(3):
        columns = found.batch(range(start, start + 1))[1].columns
        assert list(columns.items()) == [("gold", [rows[start].get("gold")]), ("level", [rows[start].get("level")])]
    assert len(table(tmp_path, [{"title": 1}, {"text": "b"}], completion="text")) == 2  # the first row lacks the column
