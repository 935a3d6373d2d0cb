"""The summarization command line: what it leaves and measures, and one line for each bad flag; the world it is tried on."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from steerl.reward.build import build_reward
from steerl.reward.kinds.rouge import rouge, rouge_l
from steerl.rollout.common.errors import UserError
from steerl.scripts.run_summarization import main, parse
from steerl.scripts.toy_tasks import summaries
from tests import warm
from tests.episodes import samples_of, talk
from tests.models import tiny, tiny_tokenizer

ROWS = [
    {"id": i, "article": f"the {a} was {b}. more.", "summary": f"{a} {b}"}
    for i, (a, b) in enumerate(zip("abcdef", "ghijkl", strict=True))
]


@pytest.fixture
def job(tmp_path):
    """run(extra flags) in this process; the model is a tiny T5, the table six rows."""
    tiny("t5", dropout_rate=0.0).save_pretrained(tmp_path / "t5")
    tiny_tokenizer().save_pretrained(tmp_path / "t5")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(*flags: str, model: str = "", file: str = "rows.jsonl", columns: bool = True) -> None:
        named = ["--text_column", "article", "--summary_column", "summary"] if columns else []
        files = [f"--{part}_file={tmp_path / file}" for part in ("train", "validation", "test")]
        command = [
            "--model_name_or_path",
            model or str(tmp_path / "t5"),
            "--output_dir",
            str(tmp_path / "out"),
            *files,
            *named,
            *flags,
        ]
        main(*parse(command))

    return run


def results(tmp_path, part: str) -> dict:
    return json.loads((tmp_path / "out" / f"{part}_results.json").read_text())


# -- the well-known command -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_well_known_command_trains_measures_and_leaves_a_model(tmp_path, tiny_world):
    world = tiny_world("summaries")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    command = [
        sys.executable,
        "scripts/run_summarization.py",
        "--model_name_or_path",
        str(world / "sft"),
        "--do_train",
        "--do_eval",
    ]
    command += ["--train_file", str(world / "train.jsonl"), "--validation_file", str(world / "validation.jsonl")]
    command += ["--text_column", "article", "--summary_column", "summary", "--source_prefix", "summarize: "]
    command += ["--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size=4", "--per_device_eval_batch_size=4"]
    command += ["--num_train_epochs", "1", "--overwrite_output_dir", "--predict_with_generate"]
    command += ["--max_train_samples", "40", "--max_eval_samples", "24", "--learning_rate", "1e-3"]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "old").exists(), "no job wrote it"
    assert results(tmp_path, "train")["train_samples"] == 40
    rows = [json.loads(line) for line in (world / "validation.jsonl").read_text().splitlines()][:24]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    written, losses = [], []
    for row in rows:  # one by one, no padding
        ids = torch.tensor([tokenizer.encode("summarize: " + row["article"])])
        written.append(tokenizer.decode(model.generate(input_ids=ids, max_length=128)[0], skip_special_tokens=True))
        labels = torch.tensor([tokenizer.encode(row["summary"])])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss) * labels.numel())
    found = results(tmp_path, "eval")
    assert found["eval_rougeL"] == pytest.approx(100 * rouge(written, [row["summary"] for row in rows])["rougeL"], abs=1.0)
    lead = rouge([summaries.lead(row["article"]) for row in rows], [row["summary"] for row in rows])["rougeL"]
    assert found["eval_rougeL"] > 100 * lead, "supervised training beats the first sentence"


def test_prediction_writes_its_texts_and_all_results(job, tmp_path):
    job("--do_eval", "--do_predict", "--predict_with_generate", "--max_target_length", "5", "--max_predict_samples", "4")
    lines = (tmp_path / "out" / "generated_predictions.txt").read_text().splitlines()
    assert len(lines) == 4 and results(tmp_path, "predict")["predict_samples"] == 4
    everything = results(tmp_path, "all")
    assert {"eval_loss", "eval_rouge1", "eval_gen_len", "predict_rougeL"} <= set(everything)
    assert not (tmp_path / "out" / "model.safetensors").exists(), "nothing was trained"


@pytest.mark.slow
def test_two_processes_write_every_row_once(job, tmp_path):
    """Five rows in batches of two on two processes: the last batches are filled up, and what fills them must not count."""
    flags = ["--do_eval", "--do_predict", "--predict_with_generate", "--max_target_length", "6"]
    flags += ["--max_predict_samples", "5", "--max_eval_samples", "3", "--per_device_eval_batch_size", "2"]
    job(*flags)
    alone = [(tmp_path / "out" / "generated_predictions.txt").read_text(), results(tmp_path, "all")]
    command = ["scripts/run_summarization.py", "--model_name_or_path", str(tmp_path / "t5")]
    command += [f"--{part}_file={tmp_path / 'rows.jsonl'}" for part in ("validation", "test")]
    command += ["--text_column", "article", "--summary_column", "summary", "--output_dir", str(tmp_path / "out"), *flags]
    done = warm.run_ranks(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "generated_predictions.txt").read_text() == alone[0]
    found = results(tmp_path, "all")
    for name in ("eval_rougeL", "eval_gen_len", "predict_rouge1", "predict_gen_len"):
        assert found[name] == pytest.approx(alone[1][name])


def test_the_first_two_columns_and_incomplete_rows(job, tmp_path, caplog):
    rows = [{"text": "a b c", "short": "a"}, {"text": "d", "short": ""}, {"text": "e f", "short": "f"}]
    (tmp_path / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job("--do_train", "--max_steps", "1", file="plain.jsonl", columns=False)
    assert results(tmp_path, "train")["train_samples"] == 2
    assert "1 of 3 rows have no text or no summary" in caplog.text


# -- ROUGE -------------------------------------------------------------------------------------------------------------


def test_rouge_is_the_harmonic_mean_of_recall_and_precision():
    # The longest common subsequence of "the cat sat" and "the dog sat down" is "the sat": 2 of 3 and 2 of 4.
    messages = [{"role": "assistant", "content": "hm"}, {"role": "assistant", "content": "the cat sat"}]
    expected = rouge_l(["p"], ["the cat sat"], summary=["the dog sat down"])
    assert rouge_l(["p"], [messages], summary=["the dog sat down"]) == expected
    samples = samples_of([talk("p", ("the dog", " sat down "), ("the cat sat", ""), chat=False)], summary=["the dog sat down"])
    assert build_reward([{"kind": "function", "function": rouge_l}])(*samples).total_B.tolist() == pytest.approx(expected)
    assert rouge_l(["p"], ["the cat sat"], summary=["the dog sat down"]) == [
        pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    ]
    found = rouge(["the cat sat", "x"], ["the cat sat", "y"])
    assert found["rougeL"] == found["rouge1"] == found["rouge2"] == found["rougeLsum"] == 0.5
    with pytest.raises(UserError, match="no reference, a column named summary .* it has: title"):
        rouge_l(["p"], ["a"], title=["b"])


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], ["nothing to do: give --do_train, --do_eval or --do_predict"]),
        (["--do_predict"], ["do_predict: needs --predict_with_generate"]),
        (["--do_train", "--text_column", "body"], ["text_column: 'body' is no column of", "it has: id, article, summary"]),
        (["--do_train", "--nonsense", "1"], ["--nonsense"]),
        (["--do_train", "--num_train_epochs", "many"], ["num_train_epochs", "many"]),
        (["--do_train", "--train_file", "nowhere.jsonl"], ["train_file", "nowhere.jsonl does not exist"]),
    ],
)
def test_a_bad_flag_is_one_clear_line(job, flags, words):
    with pytest.raises(UserError) as caught:
        job(*flags)
    (line,) = caught.value.lines
    assert all(word in line for word in words), line


def test_a_causal_model_and_a_full_folder_are_refused(job, tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="gpt2 model, which has no seq2seq head"):
        job("--do_train", model=str(tmp_path / "gpt2"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(UserError, match="out is not empty; add .*--overwrite_output_dir"):
        job("--do_train")
    assert (tmp_path / "out" / "old").exists()


def test_a_generation_config_that_transformers_refuses_to_save_loses_no_training(job, tmp_path):
    tiny("t5", dropout_rate=0.0).save_pretrained(tmp_path / "odd")
    tiny_tokenizer().save_pretrained(tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "generation_config.json").read_text())
    unused = {"temperature": 0.9, "top_p": 0.6, "top_k": 7, "early_stopping": True}  # without do_sample and num_beams
    (tmp_path / "odd" / "generation_config.json").write_text(json.dumps({**config, **unused, "eos_token_id": 3}))
    job("--do_train", "--max_steps", "2", model=str(tmp_path / "odd"))
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")


def test_a_folder_that_a_job_wrote_is_emptied_and_not_what_is_read_from_it(job, tmp_path):
    job("--do_train", "--max_steps", "1")
    (tmp_path / "out" / "stale").touch()
    job("--do_train", "--max_steps", "1", "--overwrite_output_dir")
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / "stale").exists()
    with pytest.raises(
        UserError, match="model_name_or_path: .*out lies in output_dir, which --overwrite_output_dir would empty"
    ):
        job("--do_train", "--max_steps", "1", "--overwrite_output_dir", model=str(tmp_path / "out"))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_door_leaves_with_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "scripts/run_summarization.py", "--do_train"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--model_name_or_path" in done.stderr.splitlines()[-1]


# -- the world ---------------------------------------------------------------------------------------------------------


def test_every_fact_of_a_summary_stands_in_its_article_and_the_lead_has_only_some():
    import random

    draw = random.Random(1)
    scores = []
    for _ in range(200):
        sentences, summary = summaries.story(draw)
        text = summaries.article(sentences)
        assert all(word in text.split() for word in summary.split() if word not in ("in", "on", "the", "."))
        scores += rouge_l([text], [summaries.lead(text)], summary=[summary])
    assert 0.25 < sum(scores) / len(scores) < 0.45
