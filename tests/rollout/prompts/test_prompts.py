"""Prompts from every kind of table, text or conversations, in an order that can be taken up anywhere."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import processors

from steerl.reward.build import build_reward
from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.dumps.store import from_table, to_table
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.chat import answered, conversation_ids
from steerl.rollout.prompts.prompts import PromptBatch, Prompts, PromptSettings, load_prompts
from steerl.rollout.prompts.tables import read_table
from tests.models import tiny, tiny_policy, tiny_tokenizer

ROWS = [
    {"prompt": f"film {word}", "label": i, "note": None} for i, word in enumerate(["good", "bad", "a", "very long one", "x"])
]
TALK = [
    {"messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], "label": 1},
    {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
        "label": 2,
    },
]
TOOL = [
    {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}}
]


def chatty() -> Policy:
    return Policy.of(tiny("gpt2"), tiny_tokenizer(chat=True))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("name", ("rows.jsonl", "rows.json", "rows.parquet", "rows.csv", "folder"))
def test_every_kind_of_table_gives_the_same_prompts(tmp_path: Path, name: str) -> None:
    policy = tiny_policy("gpt2")
    prompts = load_prompts(PromptSettings(path=write(tmp_path / name, ROWS)), policy)
    assert len(prompts) == 5
    batch = prompts.batch([3, 0])
    assert batch.rows == [3, 0] and batch.prompts == ["film very long one", "film good"] == batch.prompt_texts
    assert batch.ids == [policy.tokenizer(text)["input_ids"] for text in batch.prompts]
    assert [str(label) for label in batch.columns["label"]] == ["3", "0"] and "prompt" not in batch.columns


@pytest.mark.parametrize("name", ("talk.jsonl", "talk.parquet", "talk"))
def test_conversations_go_through_the_chat_template_with_the_generation_prompt(tmp_path: Path, name: str) -> None:
    policy = chatty()
    prompts = load_prompts(PromptSettings(path=write(tmp_path / name, TALK)), policy)
    batch = prompts.batch([0, 1])
    for ids, row in zip(batch.ids, TALK, strict=True):
        template = policy.tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ids == template and ids.count(policy.tokenizer.bos_token_id) == 1
    assert batch.prompt_texts[0] == "<s>system:be kind</s>user:hi</s>assistant:"
    assert batch.prompts == [row["messages"] for row in TALK]


def test_a_tokenizer_that_adds_bos_adds_none_to_a_conversation(tmp_path: Path) -> None:
    policy = chatty()
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    policy.tokenizer.backend_tokenizer.post_processor = template
    talk = load_prompts(PromptSettings(path=write(tmp_path / "talk.jsonl", TALK)), policy).batch([0]).ids[0]
    text = load_prompts(PromptSettings(path=write(tmp_path / "rows.jsonl", ROWS)), policy).batch([0]).ids[0]
    assert talk[:2].count(1) == 1 and text == policy.tokenizer("film good")["input_ids"] and text[0] == 1


def test_an_end_token_that_the_tokenizer_adds_is_taken_off_where_a_model_goes_on_from_it(tmp_path: Path) -> None:
    rows = [{"prompt": "ab"}, {"prompt": "ab</s>"}]
    for family, ends in (("gpt2", ([], [2])), ("t5", ([2], [2, 2]))):
        policy = tiny_policy(family)
        template = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
        policy.tokenizer.backend_tokenizer.post_processor = template
        ids = load_prompts(PromptSettings(path=write(tmp_path / "ends.jsonl", rows)), policy).batch([0, 1]).ids
        assert [row[2:] for row in ids] == list(ends)


@pytest.mark.parametrize("name", ("tools.jsonl", "tools.parquet"))
def test_tools_reach_the_template(tmp_path: Path, name: str) -> None:
    policy = chatty()
    rows = [{**TALK[0], "tools": json.dumps(TOOL)}, {**TALK[1], "tools": ""}]
    batch = load_prompts(PromptSettings(path=write(tmp_path / name, rows)), policy).batch([0, 1])
    assert batch.prompt_texts[0].startswith("<s>tools:add;system:be kind") and batch.prompt_texts[1].startswith("<s>user:a")
    nested = load_prompts(PromptSettings(path=write(tmp_path / "nested.jsonl", [{**TALK[0], "tools": TOOL}])), policy)
    assert nested.batch([0]).ids == [batch.ids[0]]


def test_keys_that_arrow_fills_with_none_do_not_reach_the_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.name is defined %}[{{ m.name }}]{% endif %}{{ m.content }}{% endfor %}"
    policy = Policy.of(tiny("gpt2"), tiny_tokenizer(chat=template))
    rows = [{"messages": [{"role": "user", "content": "a", "name": "b"}, {"role": "user", "content": "c"}]}]
    for name in ("t.jsonl", "t.parquet", "t"):
        batch = load_prompts(PromptSettings(path=write(tmp_path / name, rows)), policy).batch([0])
        assert batch.prompt_texts == ["[b]ac"] and batch.prompts == [rows[0]["messages"]]


STRICT = (
    "{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% if not loop.last or not thinking %}.{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}.{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASK, OPEN = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "well "}
TYPED = [{"type": "text", "text": "o"}, {"type": "text", "text": "k"}]
TURNS: list[tuple[str, list[Any], Any, str]] = [
    (STRICT, [ASK], None, "<user>hi.<assistant>"),
    (STRICT, [ASK, OPEN], None, "<user>hi.<assistant>well"),  # as the template trims it
    (PARTS, [ASK, OPEN], None, "<user>hi.<assistant>well "),
    (PARTS, [ASK, {**OPEN, "content": "i."}], "", "<user>hi.<assistant>i."),  # what it says stands in the template, too
    (PARTS, [ASK, {**OPEN, "content": ""}], None, "<user>hi.<assistant>"),
    (PARTS, [ASK, OPEN], {"add_generation_prompt": True}, "<user>hi.<assistant>well .<assistant>"),
    (PARTS, [ASK, OPEN], '{"continue_final_message": false}', "<user>hi.<assistant>well .<assistant>"),
    (PARTS, [ASK, OPEN], {"continue_final_message": True}, "<user>hi.<assistant>well "),
    (PARTS, [ASK, OPEN], {"add_generation_prompt": False}, "<user>hi.<assistant>well "),
    (PARTS, [ASK], {"add_generation_prompt": True, "continue_final_message": False}, "<user>hi.<assistant>"),
    (PARTS, [{**ASK, "content": TYPED}, OPEN], None, "<user>ok.<assistant>well "),
    (PARTS, [ASK, {**OPEN, "content": TYPED}], None, "<user>hi.<assistant>ok"),
]


@pytest.mark.parametrize(("template", "messages", "extra", "text"), TURNS)
def test_an_assistants_message_at_the_end_is_gone_on_with_by_policy_and_reward(
    tmp_path: Path, template: str, messages: list[Any], extra: Any, text: str
) -> None:
    policy = Policy.of(tiny("gpt2"), tiny_tokenizer(chat=template))
    path = write(tmp_path / "open.jsonl", [{"prompt": [ASK]}, {"prompt": messages, "chat_template_kwargs": extra}])
    batch = load_prompts(PromptSettings(path=path), policy).batch([1])
    assert batch.prompt_texts == [text]
    said = answered(messages, " done", extra, text)
    whole = policy.tokenizer.decode(conversation_ids(policy.tokenizer, said, None, extra, whole=True))
    # what the reward reads: the policy's row, as far as the template does not trim the message
    assert whole in (text + " done.", text + "done.")


def test_messages_without_a_text_are_one_line_with_the_row(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    plain = Policy.of(tiny("gpt2"), tiny_tokenizer(chat=True))
    shout = Policy.of(tiny("gpt2"), tiny_tokenizer(chat="{{ raise_exception('roles must alternate') }}"))
    for policy, row, told in [
        (plain, {"prompt": [{"role": "user"}]}, "row 1 of .*: message 0 .user. has no content"),
        (plain, {"prompt": [ASK, {"role": "assistant", "content": None}, ASK]}, "row 1 of .*: message 1 .assistant. has no content"),
        (plain, {"prompt": [{"role": "user", "content": TYPED}]}, "row 1 .* has a list of parts as content, which the chat template"),
        (plain, {"prompt": [{"role": "user", "content": {"a": 1}}]}, "row 1 .* has a mapping as content, which the chat template"),
        (plain, {"prompt": [{"role": "user", "content": ["a"]}]}, "row 1 .* has a part that is no text, a; only text is read"),
        (plain, {"prompt": [{"role": "user", "content": 3}]}, "row 1 .* has a content of type int, '3'"),
        (plain, {"prompt": [ASK, call]}, "row 1 .* only calls tools; there is no text to go on from"),
        (plain, {"prompt": [ASK], "tools": "[{"}, "row 1 .*: tools: not JSON"),
        (plain, {"prompt": [ASK], "tools": {"a": 1}}, "row 1 .*: tools: expected a list of descriptions"),
        (plain, {"prompt": [ASK], "chat_template_kwargs": "no"}, "row 1 .*: chat_template_kwargs: not JSON"),
        (plain, {"prompt": [ASK], "chat_template_kwargs": [1]}, "row 1 .*: chat_template_kwargs: expected a mapping"),
        (plain, {"prompt": [ASK], "chat_template_kwargs": {"tokenize": 0}}, "row 1 .*: 'tokenize' is not the template's to take"),
        (plain, {"prompt": [ASK], "chat_template_kwargs": {"continue_final_message": True}}, "row 1 .*continue_final_message True, but"),
        (plain, {"prompt": [ASK], "chat_template_kwargs": {"add_generation_prompt": False}}, "row 1 .*add_generation_prompt False, but"),
        (plain, {"prompt": [ASK, OPEN], "chat_template_kwargs": {"add_generation_prompt": "x"}}, "row 1 .*give true or false"),
        (plain, {"prompt": [ASK, OPEN], "chat_template_kwargs": {"add_generation_prompt": True, "continue_final_message": True}},
         "row 1 .*are both true"),
        (shout, {"prompt": [ASK]}, "row 0 of .*: the chat template does not take this conversation: roles must alternate"),
    ]:  # fmt: skip
        path = write(tmp_path / "rows.jsonl", [{"prompt": [ASK]}, row])
        with pytest.raises(UserError, match=told) as caught:
            load_prompts(PromptSettings(path=path), policy)
        assert all("\n" not in line for line in caught.value.lines)
    called = write(tmp_path / "tools.jsonl", [{"prompt": [ASK, call, {"role": "tool", "content": "4"}]}])
    assert len(load_prompts(PromptSettings(path=called), plain)) == 1  # a call of a tool needs no text


def test_long_prompts_are_cut_on_the_left_or_refused(tmp_path: Path) -> None:
    policy = tiny_policy("gpt2")
    path = write(tmp_path / "rows.jsonl", ROWS)
    cut = load_prompts(PromptSettings(path=path, max_tokens=6), policy).batch([3, 4])
    assert cut.prompt_texts == ["ng one", "film x"] and cut.prompts[0] == "film very long one"
    with pytest.raises(UserError) as caught:
        load_prompts(PromptSettings(path=path, max_tokens=6, too_long="refuse"), policy)
    assert len(caught.value.lines) == 4 - 1 and "row 0 has 9 tokens, more than the 6" in caught.value.lines[0]
    long = write(tmp_path / "long.jsonl", [{"prompt": "a" * 200}])
    assert len(load_prompts(PromptSettings(path=long), policy).batch([0]).ids[0]) == 128
    assert len(load_prompts(PromptSettings(path=long), policy, max_new_tokens=100).batch([0]).ids[0]) == 28
    with pytest.raises(UserError, match="leaves no room for a prompt in a context of 128"):
        load_prompts(PromptSettings(path=long), policy, max_new_tokens=128)


def beginning(tokenizer: Any, template: str) -> Any:
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("family", "template", "kept"),
    [
        ("gpt2", "$A", lambda text: text[-6:]),
        ("gpt2", "<s> $A", lambda text: [1, *text[-5:]]),
        ("gpt2", "<s> $A </s>", lambda text: [1, *text[-5:]]),
        ("t5", "$A </s>", lambda text: [*text[-5:], 2]),
        ("bart", "<s> $A </s>", lambda text: [1, *text[-4:], 2]),
    ],
)
def test_a_cut_prompt_keeps_what_the_tokenizer_puts_around_it(tmp_path: Path, family: str, template: str, kept: Any) -> None:
    policy = Policy.of(tiny(family), beginning(tiny_tokenizer(), template))
    path = write(tmp_path / "rows.jsonl", ROWS)
    batch = load_prompts(PromptSettings(path=path, max_tokens=6), policy).batch([3])
    text = policy.tokenizer("film very long one", add_special_tokens=False)["input_ids"]
    assert batch.ids == [kept(text)]


@pytest.mark.parametrize("template", ["<s> $A", "$A"])
def test_a_cut_conversation_keeps_its_bos(tmp_path: Path, template: str) -> None:
    policy = Policy.of(tiny("gpt2"), beginning(tiny_tokenizer(chat=True), template))
    path = write(tmp_path / "talk.jsonl", TALK)
    batch = load_prompts(PromptSettings(path=path, max_tokens=14), policy).batch([0])
    whole = policy.tokenizer.apply_chat_template(
        TALK[0]["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert batch.ids == [[1, *whole[-13:]]]


def test_how_many_prompts_are_cut_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    policy = tiny_policy("gpt2")
    path = write(tmp_path / "rows.jsonl", ROWS)
    prompts = load_prompts(PromptSettings(path=path, max_tokens=8), policy)
    prompts.batch([0, 3, 3, 4])
    assert [record.getMessage() for record in caplog.records] == [
        f"prompts: 2 of the 5 prompts of {path} have more than the 8 tokens that prompts.max_tokens or the model's context "
        "leave (up to 18); they are cut to their last ones (prompts.too_long refuse ends the job instead)"
    ]
    assert prompts.cut == {0: 9, 3: 18}
    caplog.clear()
    short = [{"prompt": "a"}] * 1000
    path = write(tmp_path / "late.jsonl", [*short, {"prompt": "b" * 20}, {"prompt": "b" * 30}])
    late = load_prompts(PromptSettings(path=path, max_tokens=8), policy)
    assert not caplog.records, "nobody has seen a long one yet"
    late.batch([1001, 0, 1000])
    assert len(caplog.records) == 1 and "row 1001 and maybe others" in caplog.text and "(up to 30)" in caplog.text
    caplog.clear()
    load_prompts(PromptSettings(path=path), policy).batch([1000])
    assert not caplog.records, "all fit"


def test_the_order_is_reproducible_resumable_and_every_epoch_has_every_row_once(tmp_path: Path) -> None:
    prompts = load_prompts(PromptSettings(path=write(tmp_path / "rows.jsonl", ROWS)), tiny_policy("gpt2"))
    whole = prompts.take(7, 0, 23)
    for epoch in range(4):
        assert sorted(whole[5 * epoch : 5 * epoch + 5]) == [0, 1, 2, 3, 4]
    assert whole[:5] != whole[5:10] or whole[5:10] != whole[10:15]
    assert prompts.take(7, 0, 23) == whole != prompts.take(8, 0, 23)
    assert prompts.take(7, 3, 6) + prompts.take(7, 9, 14) == whole[3:]
    endless = prompts.order(7, position=2)
    assert [next(endless) for _ in range(10)] == whole[2:12]
    shards = [[prompts.take(7, at, 1)[0] for at in range(rank, 20, 3)] for rank in range(3)]
    assert sorted(row for shard in shards for row in shard) == sorted(whole[:20])


def test_limit_keeps_the_first_rows(tmp_path: Path) -> None:
    prompts = load_prompts(PromptSettings(path=write(tmp_path / "rows.jsonl", ROWS), limit=2), tiny_policy("gpt2"))
    assert len(prompts) == 2 and set(prompts.take(0, 0, 8)) == {0, 1}
    with pytest.raises(UserError, match="row 2 is asked for, but there are 2 rows"):
        prompts.batch([2])


def test_splits(tmp_path: Path) -> None:
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:])})
    parts.save_to_disk(str(tmp_path / "parts"))
    assert len(load_prompts(PromptSettings(path=str(tmp_path / "parts")), tiny_policy("gpt2"))) == 2
    assert len(load_prompts(PromptSettings(path=str(tmp_path / "parts"), split="test"), tiny_policy("gpt2"))) == 3
    with pytest.raises(UserError, match=r"prompts.split: valid; .* has: train, test"):
        load_prompts(PromptSettings(path=str(tmp_path / "parts"), split="valid"), tiny_policy("gpt2"))


BAD = [
    ({"path": ""}, [], "prompts.path: missing"),
    ({"path": "nowhere.jsonl"}, None, "does not exist"),
    ({}, [], "has no rows"),
    ({}, [{"prompt": "a"}, {"prompt": ""}], "row 1 of .* is empty"),
    ({}, [{"prompt": "a"}, {"prompt": None}], "row 1 of .* is empty"),
    ({}, [{"prompt": "a"}, {"other": 1}], "row 1 of .* is empty"),
    ({}, [{"prompt": []}], "row 0 of .* is empty"),
    ({}, [{"prompt": 5}], "expected a text or a list of messages, found int"),
    ({}, [{"prompt": ["a"]}], "a conversation is a list of messages"),
    ({"column": "question"}, ROWS, "'question' is not a column; .* has: prompt, label, note"),
    ({}, [{"label": 1}], "none of the usual columns"),
    ({}, TALK, "holds conversations, but the tokenizer has no chat template"),
]


@pytest.mark.parametrize(("settings", "rows", "message"), BAD)
def test_bad_prompts_are_one_clear_line(
    tmp_path: Path, settings: dict[str, Any], rows: list[dict[str, Any]] | None, message: str
) -> None:
    path = write(tmp_path / "rows.jsonl", rows) if rows is not None else str(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(PromptSettings(**{"path": path, **settings} if rows is not None else {"path": path}), tiny_policy("gpt2"))
    assert len(caught.value.lines) == 1 and "\n" not in caught.value.lines[0]


def test_broken_files_name_the_line(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "list.jsonl").write_text('{"prompt": "a"}\n[1]\n')
    (tmp_path / "ragged.csv").write_text("prompt,label\na,1\nb\n")
    (tmp_path / "broken.parquet").write_text("no")
    (tmp_path / "rows.txt").write_text("a")
    (tmp_path / "open.csv").write_text('prompt,label\na,1\n"b\nc,2\nd,3\n')
    (tmp_path / "swallowed.csv").write_text('prompt\na\n"b\nc\nd\n')
    (tmp_path / "shut.csv").write_text('prompt,label\n"a\nb",1\n"c,2\nd,"e",3\n')
    (tmp_path / "wide.csv").write_text("prompt,label\n" + "a" * 140_000 + ",1\n")
    (tmp_path / "twice.csv").write_text("prompt,label,prompt\na,1,b\n")
    (tmp_path / "twice.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "prompt": "b"}\n')
    (tmp_path / "twice.json").write_text('[{"prompt": "a", "columns": {"x": 1, "x": 2}}]')
    for name, message in (
        ("broken.jsonl", "line 2 is not JSON"), ("list.jsonl", "line 2 is a list"),
        ("open.csv", "line 3 cannot be read as CSV: a quote that is opened there is never closed"),
        ("swallowed.csv", "line 3 cannot be read as CSV: a quote that is opened there is never closed"),
        ("shut.csv", "line 4 cannot be read as CSV"), ("wide.csv", "line 2 cannot be read as CSV: field larger than"),
        ("twice.csv", "two columns named 'prompt'"),
        ("twice.jsonl", "line 2 cannot be read: the key 'prompt' is there twice"),
        ("twice.json", "the key 'x' is there twice"),
        ("ragged.csv", "line 3 has another number of fields"),
        ("broken.parquet", "cannot be read as parquet"), ("rows.txt", "no ending that is known"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            load_prompts(PromptSettings(path=str(tmp_path / name)), tiny_policy("gpt2"))
        assert len(caught.value.lines) == 1
    (tmp_path / "quoted.csv").write_text('prompt,label\n"a ""b"",\n\nc",1\n\nd,"2"\n')
    table = read_table(str(tmp_path / "quoted.csv"))
    assert table == [{"prompt": 'a "b",\n\nc', "label": "1"}, {"prompt": "d", "label": "2"}]


def test_raw_ids_and_empty_prompts() -> None:
    tokenizer = tiny_tokenizer()
    batch = PromptBatch.of_ids([[4, 5], [6]], rows=[10, 20], tokenizer=tokenizer)
    assert batch.prompt_texts == ["ab", "c"] and batch.rows == [10, 20]
    assert batch.select([1, 1, 0]).rows == [20, 20, 10]
    with pytest.raises(UserError, match="row 20 has an empty prompt"):
        PromptBatch.of_ids([[4], []], rows=[10, 20])


def test_negative_limits_are_told() -> None:
    with pytest.raises(UserError) as caught:
        PromptSettings(max_tokens=-1, limit=-2)
    assert len(caught.value.lines) == 2


def test_prompts_take_any_sequence_of_rows() -> None:
    assert Prompts(ROWS, "prompt", tiny_policy("gpt2"), PromptSettings()).batch([4]).prompts == ["film x"]


RAGGED: list[dict[str, Any]] = [
    {"prompt": "a", "level": 1},
    {"prompt": "b", "answer": "b", "level": 2},
    {"answer": "c", "prompt": "c"},
    {"prompt": "d", "note": {"by": "x"}},
]


@pytest.mark.parametrize("name", ("rows.jsonl", "rows.json", "rows.parquet", "folder"))
def test_columns_are_those_of_the_data_set_whatever_row_comes_first(tmp_path: Path, name: str) -> None:
    rows = [{key: row.get(key) for key in ("prompt", "level", "answer", "note")} for row in RAGGED]
    path = write(tmp_path / name, rows if name in ("rows.parquet", "folder") else RAGGED)
    prompts = load_prompts(PromptSettings(path=path), tiny_policy("gpt2"))
    for size in (1, 2, 4):
        for index in itertools.permutations(range(4), size):
            columns = prompts.batch(index).columns
            assert columns == {key: [RAGGED[i].get(key) for i in index] for key in ("level", "answer", "note")}
            assert list(columns) == ["level", "answer", "note"]


def test_a_reward_and_a_dump_say_the_same_of_a_row_in_every_order(tmp_path: Path) -> None:
    prompts = load_prompts(PromptSettings(path=write(tmp_path / "rows.jsonl", RAGGED)), policy := tiny_policy("gpt2"))
    sampler = Sampler(policy, Sampling(max_new_tokens=2))
    kept, scored = [], []
    for index in itertools.permutations(range(4)):
        rollout, texts = sampler.sample(prompts.batch(index))
        back = next(from_table(to_table(rollout, texts)))[1]
        kept.append({row: {key: values[at] for key, values in back.columns.items()} for at, row in enumerate(index)})
        every_row = lambda prompts, **_: [0.0] * len(prompts)  # noqa: E731  a row to which no part applies is refused
        exact, asked = build_reward([{"kind": "exact"}, every_row]), build_reward([lambda answer, **_: map(bool, answer)])
        scored.append([dict(zip(index, found(rollout, texts).total_B.tolist(), strict=True)) for found in (exact, asked)])
    assert all(found == kept[0] for found in kept) and all(found == scored[0] for found in scored)
    assert kept[0] == {row: {key: RAGGED[row].get(key) for key in ("level", "answer", "note")} for row in range(4)}
    assert scored[0][1] == {0: 0.0, 1: 1.0, 2: 1.0, 3: 0.0}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    "row", ['{"prompt": "a\\ud800"}', '{"prompt": "a", "\\udfff": 1}', '{"prompt": "a", "b": {"c": "\\ud800"}}']
)
def test_half_a_character_is_one_line(tmp_path, name, row):
    (tmp_path / name).write_text(f"[{row}]" if name.endswith(".json") else row)
    with pytest.raises(UserError, match="is half of a character, which no file can hold"):
        read_table(str(tmp_path / name))
    (tmp_path / name).write_text('[{"prompt": "\\ud83d\\ude42"}]' if name.endswith(".json") else '{"prompt": "\\ud83d\\ude42"}')
    assert read_table(str(tmp_path / name))[0]["prompt"] == "🙂"
