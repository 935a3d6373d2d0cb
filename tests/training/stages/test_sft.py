"""The supervised stage: its loss against a written-out one, what it leaves behind, resume, and one line for each bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from steerl.rollout.common.errors import Stopped, UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.training.stages.settings import SFTJob, SFTSettings, TableSettings
from steerl.training.stages.sft import run_sft
from tests import warm
from tests.models import tiny, tiny_tokenizer

PAIRS = [
    {"prompt": p, "completion": c} for p, c in [("the film ", "was good"), ("a", " b"), ("say it: ", "no."), ("x ", "long end")]
]
TALKS = [[{"role": "user", "content": p}] for p in ("hi", "say a", "what", "why")]
TOOLS = [{"type": "function", "function": {"name": "look"}}]
ANSWERS = [[{"role": "assistant", "content": c}] for c in ("hello", "a", "no", "so it is")]


def model_folder(tmp_path: Path, family: str = "llama") -> str:
    folder = tmp_path / family
    tiny(family, scale=0.05, **({"dropout_rate": 0.0} if family == "t5" else {})).save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return str(folder)


def table(tmp_path: Path, rows: list, name: str = "rows.jsonl") -> str:
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / name)


def job(tmp_path: Path, rows: list, family: str = "llama", run: str = "run", peft=None, heldout=(), **sft) -> SFTJob:
    return SFTJob(
        model=ModelSettings(path=model_folder(tmp_path, family), peft=peft),
        prompts=TableSettings(
            path=table(tmp_path, rows),
            heldout=0.0,
            heldout_path=table(tmp_path, list(heldout), "held.jsonl") if heldout else "",
        ),
        sft=SFTSettings(**{"batch_size": 4, "steps": 3, "learning_rate": 1e-2, **sft}),
        run=RunSettings(dir=str(tmp_path / run)),
    )


@torch.no_grad()
def mean_loss(model, rows: list[tuple[list[int], list[int]]]) -> float:
    """The definition: minus the mean log-prob of the learned tokens, row by row without padding, in float64."""
    total, count = 0.0, 0
    for given, learned in rows:
        ids = torch.tensor([given + learned])
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.config.decoder_start_token_id, *learned[:-1]]])
            logits = model(input_ids=torch.tensor([given]), decoder_input_ids=start).logits[0]
        else:
            logits = model(input_ids=ids).logits[0, len(given) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        total -= sum(float(logprobs[t, token]) for t, token in enumerate(learned))
        count += len(learned)
    return total / count


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["pairs", "texts", "whole pairs", "talks", "messages", "tools of some"])
def test_the_measured_loss_is_that_of_the_learned_tokens(tmp_path, shape):
    tokenizer = tiny_tokenizer(chat=True)
    ids, end = tokenizer.encode, tokenizer.eos_token_id

    def spoken(messages, **how):
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **how)["input_ids"]

    both = [a + b for a, b in zip(TALKS, ANSWERS, strict=True)]
    rows, learned, settings = {
        "pairs": (PAIRS, [(ids(r["prompt"]), [*ids(r["completion"]), end]) for r in PAIRS], {}),
        "whole pairs": (
            PAIRS,
            [(ids(r["prompt"])[:1], [*ids(r["prompt"])[1:], *ids(r["completion"]), end]) for r in PAIRS],
            {"completion_only": False},
        ),
        "texts": (
            [{"text": r["prompt"]} for r in PAIRS],
            [(ids(r["prompt"])[:1], [*ids(r["prompt"])[1:], end]) for r in PAIRS],
            {},
        ),
        "talks": (
            [{"prompt": a, "completion": b} for a, b in zip(TALKS, ANSWERS, strict=True)],
            [(g := spoken(a, add_generation_prompt=True), spoken(w)[len(g) :]) for a, w in zip(TALKS, both, strict=True)],
            {},
        ),
        "tools of some": (  # the first row has none; they come as a list and as JSON text
            [{"messages": both[0]}, {"messages": both[1], "tools": TOOLS}, {"messages": both[2], "tools": json.dumps(TOOLS)}],
            [
                (spoken(w, tools=tools)[:1], spoken(w, tools=tools)[1:])
                for w, tools in zip(both[:3], [None, TOOLS, TOOLS], strict=True)
            ],
            {},
        ),
        "messages": ([{"messages": w} for w in both], [(spoken(w)[:1], spoken(w)[1:]) for w in both], {}),
    }[shape]
    outcome = run_sft(job(tmp_path, rows, heldout=rows, steps=1, learning_rate=1e-12, **settings))
    assert outcome.metrics["heldout_loss"] == pytest.approx(mean_loss(tiny("llama", scale=0.05), learned), abs=1e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_learns_its_completions_and_where_they_stop(tmp_path, family):
    tokenizer = tiny_tokenizer()
    prefix = "say: "
    learned = [
        (tokenizer.encode(prefix + r["prompt"]), [*tokenizer.encode(r["completion"]), tokenizer.eos_token_id]) for r in PAIRS
    ]
    made = job(tmp_path, PAIRS, family, heldout=PAIRS, steps=1, learning_rate=1e-12, source_prefix=prefix, rouge=True)
    outcome = run_sft(made)
    assert outcome.metrics["heldout_loss"] == pytest.approx(mean_loss(tiny(family, scale=0.05), learned), abs=1e-5)
    assert 0 <= outcome.metrics["rougeL"] <= 1 and outcome.metrics["gen_len"] > 0


# -- what it leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, auto", [("llama", AutoModelForCausalLM), ("t5", AutoModelForSeq2SeqLM)])
def test_the_loss_falls_and_the_folder_loads_by_transformers_alone(tmp_path, family, auto, capfd):
    made = job(tmp_path, PAIRS, family, heldout=PAIRS, steps=30, log_every=5)
    before = run_sft(dataclasses.replace(made, sft=dataclasses.replace(made.sft, steps=1, learning_rate=1e-12)))
    shutil.rmtree(tmp_path / "run")
    after = run_sft(made, resolved="sft: {}\n")
    assert after.metrics["heldout_loss"] < 0.8 * before.metrics["heldout_loss"]
    for folder in (after.model, tmp_path / "run"):
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    said = capfd.readouterr().err
    assert "%|" not in said and "it/s" not in said, "bars are for terminals"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 30 and summary["world_size"] == 1 and summary["heldout_loss"] == after.metrics["heldout_loss"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [5, 10, 15, 20, 25, 30]
    assert "sft: {}" in (tmp_path / "run" / "config.yaml").read_text()


def test_equal_seeds_give_equal_weights_and_another_seed_others(tmp_path):
    rows = PAIRS * 3

    def weights(run: str, seed: int) -> bytes:
        made = job(tmp_path, rows, run=run)
        run_sft(dataclasses.replace(made, run=RunSettings(dir=str(tmp_path / run), seed=seed)))
        return (tmp_path / run / "model" / "model.safetensors").read_bytes()

    assert weights("a", 0) == weights("b", 0) != weights("c", 1)


def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path):
    rows = PAIRS * 4
    whole = job(tmp_path, rows, run="whole", steps=6, log_every=1)
    run_sft(dataclasses.replace(whole, run=RunSettings(dir=str(tmp_path / "whole"), save_every=2, keep=5)))
    broken = tmp_path / "broken" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-2", broken / "checkpoint-2")
    # A checkpoint whose writing was cut short has no trainer state, and is passed over.
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "checkpoint-4", broken / "checkpoint-4")
    (broken / "checkpoint-4" / "trainer_state.json").unlink()
    run_sft(dataclasses.replace(whole, run=RunSettings(dir=str(tmp_path / "broken"), resume=True)))
    for name in ("model/model.safetensors",):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()][:6]
        for run in ("whole", "broken")
    ]
    assert losses[0] == losses[1] and None not in losses[0]


def interrupted(monkeypatch, at: int) -> None:
    """Ctrl-C in the midst of step `at` of the next trainer."""
    steps, step = [0], transformers.Trainer.training_step

    def signalled(*given, **named):
        steps[0] += 1
        if steps[0] == at:
            signal.raise_signal(signal.SIGINT)
        return step(*given, **named)

    monkeypatch.setattr(transformers.Trainer, "training_step", signalled)


def test_ctrl_c_finishes_the_step_saves_and_the_run_goes_on_as_if_undisturbed(tmp_path, monkeypatch):
    whole = job(tmp_path, PAIRS * 4, run="whole", steps=5, log_every=1)
    run_sft(whole)
    with monkeypatch.context() as patched:
        interrupted(patched, 2)
        with pytest.raises(Stopped, match="stopped after step 2 of 5 and saved"):
            run_sft(dataclasses.replace(whole, run=RunSettings(dir=str(tmp_path / "run"))))
    assert not (tmp_path / "run" / "model").exists()
    run_sft(dataclasses.replace(whole, run=RunSettings(dir=str(tmp_path / "run"), resume=True)))
    for name in ("model/model.safetensors",):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_other_data_weights_and_settings_are_told_on_a_resume(tmp_path, monkeypatch, caplog):
    made = job(tmp_path, PAIRS * 4, steps=4, log_every=1, schedule="constant", warmup=0.0)
    with monkeypatch.context() as patched:
        interrupted(patched, 2)
        with pytest.raises(Stopped):
            run_sft(made)
    resumed = dataclasses.replace(made, run=RunSettings(dir=str(tmp_path / "run"), resume=True))
    table(tmp_path, PAIRS * 5)
    tiny("llama", 1, scale=0.05).save_pretrained(made.model.path)
    with pytest.raises(UserError) as caught:
        run_sft(dataclasses.replace(resumed, sft=dataclasses.replace(made.sft, learning_rate=1e-3, log_every=2)))
    assert [line.split(":")[0] for line in caught.value.lines] == ["sft.learning_rate", "model.path", "prompts.path"]
    begun = tmp_path / "run" / "checkpoints" / "begun.json"
    kept = begun.read_text()
    for damaged in ("[]", '{"config": 1, "made_from": {}}', kept[:-30]):
        begun.write_text(damaged)
        with pytest.raises(UserError, match="begun.json: not what a run writes"):
            run_sft(resumed)
    begun.write_text(kept)
    allowed = dataclasses.replace(resumed, run=dataclasses.replace(resumed.run, allow_changes=True))
    run_sft(dataclasses.replace(allowed, sft=dataclasses.replace(made.sft, learning_rate=0.0)))
    assert "sft.learning_rate: 0.0, but the run to resume has 0.01" in caplog.text
    saved = [load_file(tmp_path / "run" / part / "model.safetensors") for part in ("checkpoints/checkpoint-2", "model")]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0]), "the lower rate is the one that counts"
    assert "# from checkpoint-2: sft.learning_rate: 0.0" in (tmp_path / "run" / "config.yaml").read_text()


def test_a_generation_config_that_transformers_refuses_to_save_loses_no_training(tmp_path):
    made = job(tmp_path, PAIRS, steps=1)
    config = json.loads((Path(made.model.path) / "generation_config.json").read_text())
    unused = {"temperature": 0.9, "top_p": 0.6, "top_k": 7}  # without do_sample, as in Llama-2-chat's
    (Path(made.model.path) / "generation_config.json").write_text(json.dumps({**config, **unused, "eos_token_id": 3}))
    run_sft(dataclasses.replace(made, run=RunSettings(dir=str(tmp_path / "run"), save_every=1)))
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").save_pretrained(tmp_path / "again")


def test_a_full_disk_at_a_checkpoint_is_one_line(tmp_path, monkeypatch):
    def full(*given, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    made = job(tmp_path, PAIRS, steps=1)
    with pytest.raises(UserError, match="run: cannot be written: No space left on device; free some space"):
        run_sft(dataclasses.replace(made, run=RunSettings(dir=str(tmp_path / "run"), save_every=1)))


def test_metrics_go_to_the_trackers_and_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    made = job(tmp_path, PAIRS, steps=2, log_every=1)
    run_sft(dataclasses.replace(made, run=RunSettings(dir=str(tmp_path / "run"), trackers=["tensorboard"])))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
    model = AutoModelForCausalLM.from_pretrained(made.model.path)
    with torch.no_grad():
        model.lm_head.weight[7, 0] = float("nan")
    model.save_pretrained(made.model.path)
    with pytest.raises(UserError, match="step 1: the loss is nan; lower the learning rate"):
        run_sft(dataclasses.replace(made, run=RunSettings(dir=str(tmp_path / "nan"))))
    assert not (tmp_path / "nan" / "model").exists()


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_adapter_is_left_by_itself_and_merged(tmp_path, family):
    made = job(tmp_path, PAIRS, family, peft={"peft_type": "LORA", "r": 2}, steps=5)
    run_sft(made)
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    merged = auto.from_pretrained(tmp_path / "run" / "model")
    alone = load_policy(ModelSettings(path=str(tmp_path / "run" / "adapter")))  # its base is found from its config
    ids = {"input_ids": torch.tensor([[5, 6, 7]])}
    if family == "t5":
        ids["decoder_input_ids"] = torch.tensor([[0, 5]])
    with torch.no_grad():
        torch.testing.assert_close(alone.model(**ids).logits, merged(**ids).logits, atol=1e-5, rtol=0)
        assert (merged(**ids).logits - auto.from_pretrained(made.model.path)(**ids).logits).abs().max() > 1e-3
    # Trained further: the adapter of the folder is what learns.
    again = dataclasses.replace(
        made, model=ModelSettings(path=str(tmp_path / "run" / "adapter")), run=RunSettings(dir=str(tmp_path / "on"))
    )
    run_sft(again)
    further = load_policy(ModelSettings(path=str(tmp_path / "on" / "adapter")))
    with torch.no_grad():
        assert (further.model(**ids).logits - merged(**ids).logits).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["", "LORA", "PROMPT_TUNING", "PREFIX_TUNING"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_padded_batch_teaches_what_its_rows_one_by_one_do(tmp_path, kind, family):
    """Rows one at a time have no padding, and the step's one count of tokens makes four of them the batch of four."""
    found = []
    for micro in (4, 1):
        extra = {"num_virtual_tokens": 2} if "TUNING" in kind else {"r": 2}
        peft = {"peft_type": kind, **extra} if kind else None
        made = job(tmp_path, PAIRS, family, f"run{micro}", peft, micro_batch_size=micro, log_every=1)
        run_sft(made)
        lines = (tmp_path / f"run{micro}" / "metrics.jsonl").read_text().splitlines()
        found.append([value for line in lines[:3] for value in (json.loads(line)["loss"], json.loads(line)["grad_norm"])])
    assert found[0] == pytest.approx(found[1], rel=2e-3) and found[0][0] != found[0][4]


@pytest.mark.slow
def test_two_processes_leave_one_model(tmp_path):
    made = job(tmp_path, PAIRS * 4, heldout=PAIRS)
    command = ["scripts/train_sft.py", "--config", "configs/sft.yaml"]
    command += ["--model.path", made.model.path, "--prompts.path", made.prompts.path, "--run.dir", str(tmp_path / "two")]
    command += ["--sft.steps", "2", "--prompts.heldout_path", made.prompts.heldout_path]
    done = warm.run_ranks(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["world_size"] == 2 and summary["steps"] == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, sft, words",
    [
        (
            [{"question": "a", "answer": "b"}],
            {},
            ["expected prompt and completion or messages or text", "found the columns: question, answer"],
        ),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], {}, ["row 2: completion is missing, expected a text"]),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": 7}], {}, ["row 2: completion is int '7'"]),
        (
            [{"messages": TALKS[0]}, {"messages": [{"role": "user"}]}],
            {},
            ["row 2: messages: message 0 (user) has no content"],
        ),
        (
            [{"messages": TALKS[0]}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}],
            {},
            ["row 2: message 0 (user) has a list of parts as content, which the chat template does not read"],
        ),
        (
            [{"messages": TALKS[0]}, {"messages": TALKS[1], "chat_template_kwargs": "x"}],
            {},
            ["row 2: chat_template_kwargs: not JSON"],
        ),
        ([{"messages": "hello"}], {}, ["row 1: messages is str, expected a list"]),
        ([], {}, ["has no rows"]),
        (PAIRS, {"batch_size": 0}, ["sft.batch_size: 0"]),
        (
            PAIRS,
            {"batch_size": 4, "micro_batch_size": 3},
            ["sft.batch_size: 4 rows cannot be split evenly", "micro_batch_size 3"],
        ),
        (PAIRS, {"warmup": 1.5}, ["sft.warmup: 1.5"]),
        (PAIRS, {"rouge": True}, ["sft.rouge: True, but the model is causal"]),
        ([{"text": "a"}], {"completion_only": True}, ["sft.completion_only: true, but the rows have text"]),
        (PAIRS, {"assistant_only": True}, ["sft.assistant_only: true, but the rows are texts"]),
    ],
)
def test_bad_rows_and_settings_are_one_clear_line(tmp_path, rows, sft, words):
    with pytest.raises(UserError) as caught:
        run_sft(job(tmp_path, rows, **sft))
    (line,) = caught.value.lines
    assert all(word in line for word in words), line
    assert not (tmp_path / "run" / "model").exists()


def test_columns_are_renamed_and_a_wrong_name_is_told(tmp_path):
    rows = [{"question": r["prompt"], "answer": r["completion"], "id": 3} for r in PAIRS]
    made = job(tmp_path, rows, steps=1)
    named = dataclasses.replace(made.prompts, columns={"prompt": "question", "completion": "answer"})
    assert run_sft(dataclasses.replace(made, prompts=named)).metrics["rows"] == 4
    text = dataclasses.replace(made.prompts, column="answer")
    again = RunSettings(dir=str(tmp_path / "run"), overwrite=True)
    assert run_sft(dataclasses.replace(made, prompts=text, run=again)).metrics["rows"] == 4
    wrong = dataclasses.replace(made.prompts, columns={"prompt": "questions", "completion": "answer"})
    with pytest.raises(UserError, match="columns.prompt: the data has no column 'questions'; it has: question, answer, id"):
        run_sft(dataclasses.replace(made, prompts=wrong))


def test_models_that_do_not_fit_are_one_clear_line(tmp_path):
    made = job(tmp_path, PAIRS, "t5")
    with pytest.raises(UserError, match="t5 model, which has no causal head"):
        run_sft(dataclasses.replace(made, model=ModelSettings(path=made.model.path, kind="causal")))
    with pytest.raises(UserError, match="the prompts are conversations, but the model is an encoder-decoder"):
        run_sft(job(tmp_path, [{"prompt": a, "completion": b} for a, b in zip(TALKS, ANSWERS, strict=True)], "t5"))
    with pytest.raises(UserError, match="model.path: missing"):
        run_sft(dataclasses.replace(made, model=ModelSettings()))
    causal = job(tmp_path, PAIRS)
    with pytest.raises(UserError, match="checkpointing: true, but PREFIX_TUNING lives in the cache"):
        peft = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}
        run_sft(job(tmp_path, PAIRS, run="prefix", peft=peft, checkpointing=True))
    with pytest.raises(UserError, match="max_tokens: every row is cut before its completion at 2"):
        short = dataclasses.replace(job(tmp_path, PAIRS[:1], run="short").prompts, max_tokens=2)
        run_sft(dataclasses.replace(causal, prompts=short, run=RunSettings(dir=str(tmp_path / "short"))))
    assert not (tmp_path / "short").exists(), "nothing was begun, nothing is left"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="is not empty; add --run.resume true or --run.overwrite true"):
        run_sft(dataclasses.replace(causal, run=RunSettings(dir=str(tmp_path / "full"))))


def test_the_held_out_share_is_drawn_by_the_seed_and_never_learned(tmp_path):
    from steerl.training.stages.data import hold_out

    rows = [{"text": str(i)} for i in range(50)]
    settings = TableSettings(heldout=0.2)
    train, held = hold_out(rows, settings, 0, [])
    assert len(held) == 10 and sorted([*train, *held], key=lambda r: int(r["text"])) == rows
    assert hold_out(rows, settings, 0, []) == (train, held) != hold_out(rows, settings, 1, [])
    with pytest.raises(UserError, match="leaves none to learn from"):
        hold_out(rows[:1], settings, 0, [])


@pytest.mark.parametrize("peft", [None, {"peft_type": "LORA", "r": 2}, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}])
def test_what_is_taught_to_end_turns_ends_them_in_what_is_left(tmp_path, peft):
    """A template that ends turns with a token which is not the checkpoint's eos: every folder that is left stops there."""
    made = job(tmp_path, [{"prompt": a, "completion": b} for a, b in zip(TALKS, ANSWERS, strict=True)], peft=peft)
    tokenizer = tiny_tokenizer(
        chat="{% for m in messages %}{{ m.role }}:{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(made.model.path)
    tiny("llama", scale=0.05, vocab_size=80).save_pretrained(made.model.path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert load_policy(made.model).eos_ids == (tokenizer.eos_token_id,)
    outcome = run_sft(made)
    for folder in [outcome.model, *([tmp_path / "run" / "adapter"] if peft else [])]:
        policy = load_policy(ModelSettings(path=str(folder)))
        assert policy.eos_ids == (tokenizer.eos_token_id, end), folder


def test_rows_that_are_cut_are_counted_and_told(tmp_path, capsys):
    def short(made: SFTJob, tokens: int) -> SFTJob:
        return dataclasses.replace(made, prompts=dataclasses.replace(made.prompts, max_tokens=tokens))

    # with their end 4, 5, 6 and 9 tokens: one fits exactly, two are cut
    texts = [{"text": "a" * (n - 1)} for n in (4, 5, 6, 9)]
    outcome = run_sft(short(job(tmp_path, texts), 5))
    assert outcome.metrics["rows_cut"] == 2
    assert "prompts: 2 of 4 rows have more than the 5 tokens" in capsys.readouterr().err
    talks = [{"messages": [*a, *b]} for a, b in zip(TALKS, ANSWERS, strict=True)]
    lengths = [len(tiny_tokenizer(chat=True).apply_chat_template(row["messages"], return_dict=False)) for row in talks]
    outcome = run_sft(short(job(tmp_path, talks, run="talks"), sorted(lengths)[1]))
    assert outcome.metrics["rows_cut"] == 2
    run_sft(short(job(tmp_path, PAIRS, "t5", run="shorter", source_prefix="s"), 6))
    said = capsys.readouterr().err
    assert f"prompts: {sum(len(row['prompt']) > 5 for row in PAIRS)} of 4 rows have more than the 6 tokens" in said
