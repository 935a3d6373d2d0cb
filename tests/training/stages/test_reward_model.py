"""The reward-model stage: what it measures against single unpadded rows, what it leaves, and one line for each bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.model.policy import ModelSettings
from steerl.training.stages.reward_model import pair_metrics, run_reward
from steerl.training.stages.settings import RewardJob, RewardStageSettings, TableSettings
from tests import warm
from tests.models import tiny, tiny_tokenizer

WORDS = ["good", "fine", "nice"], ["bad", "poor", "dull"]


def said(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def pairs(shape: str, count: int = 12) -> list[dict]:
    draw = random.Random(0)
    rows = []
    for _ in range(count):
        prompt, chosen, rejected = f"film {draw.randrange(9)}: ", *(f"so {draw.choice(words)}." for words in WORDS)
        rows.append(
            {
                "explicit": {"prompt": prompt, "chosen": chosen, "rejected": rejected},
                "text and talk": {
                    "prompt": prompt,
                    "chosen": said("assistant", chosen),
                    "rejected": said("assistant", rejected),
                },
                "twice": {
                    "prompt": prompt,
                    "chosen": said("user", prompt) + said("assistant", chosen),
                    "rejected": said("user", prompt) + said("assistant", rejected),
                },
                "implicit": {"chosen": prompt + chosen, "rejected": prompt + rejected},
                "explicit talk": {
                    "prompt": said("user", prompt),
                    "chosen": said("assistant", chosen),
                    "rejected": said("assistant", rejected),
                },
                "implicit talk": {
                    "chosen": said("user", prompt) + said("assistant", chosen),
                    "rejected": said("user", prompt) + said("assistant", rejected),
                },
            }[shape]
        )
    return rows


def job(tmp_path: Path, rows: list, heldout=None, run: str = "run", model: str = "", peft=None, **settings) -> RewardJob:
    if not model:
        model = str(tmp_path / "base")
        tiny("llama", scale=0.05).save_pretrained(model)
        tiny_tokenizer(chat=True).save_pretrained(model)
    paths = []
    for name, part in (("rows", rows), ("held", heldout)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in part or []))
        paths.append(str(file) if part is not None else "")
    return RewardJob(
        model=ModelSettings(path=model, peft=peft),
        prompts=TableSettings(path=paths[0], heldout=0.0, heldout_path=paths[1]),
        reward_model=RewardStageSettings(**{"batch_size": 4, "steps": 2, "learning_rate": 1e-2, **settings}),
        run=RunSettings(dir=str(tmp_path / run)),
    )


def gaps_of(folder: Path, rows: list[dict]) -> list[float]:
    """Chosen minus rejected, each by itself, tokenized by the folder's own tokenizer: text + end, or the template."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        scores = []
        for side in ("chosen", "rejected"):
            whole = row["prompt"] + row[side] if "prompt" in row else row[side]
            if isinstance(whole, str):
                ids = [*tokenizer.encode(whole), tokenizer.eos_token_id]
            else:
                ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=True)["input_ids"]
            with torch.no_grad():
                scores.append(float(model(input_ids=torch.tensor([ids])).logits[0, 0]))
        found.append(scores[0] - scores[1])
    return found


# -- what is measured and left ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["explicit", "implicit", "explicit talk", "implicit talk"])
def test_accuracy_and_margin_are_those_of_single_unpadded_pairs(tmp_path, shape):
    held = pairs(shape)[:7] + [dict(row, chosen=row["rejected"], rejected=row["chosen"]) for row in pairs(shape)[7:]]
    outcome = run_reward(job(tmp_path, pairs(shape), held))
    gaps = gaps_of(outcome.model, held)
    assert outcome.metrics["accuracy"] == pytest.approx(sum(gap > 0 for gap in gaps) / len(gaps))
    assert outcome.metrics["margin"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert outcome.metrics["rows_heldout"] == 12 and outcome.metrics["rows_too_long"] == 0
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["missing_keys"] and model.config.num_labels == 1 and model.config.pad_token_id == 0


def test_the_loss_is_minus_log_sigmoid_of_the_gap_and_portions_of_a_step_do_not_matter(tmp_path):
    rows = pairs("explicit", 4)
    found = []
    for micro in (4, 1):
        run_reward(job(tmp_path, rows, run=f"run{micro}", micro_batch_size=micro, learning_rate=1e-12, steps=1, log_every=1))
        first = json.loads((tmp_path / f"run{micro}" / "metrics.jsonl").read_text().splitlines()[0])
        found.append((first["loss"], first["grad_norm"]))
    gaps = gaps_of(tmp_path / "run4" / "model", rows)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][0] == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 4, abs=1e-5)


def test_preferences_are_learned_by_an_adapter_and_the_merged_model_loads_alone(tmp_path):
    rows = pairs("explicit", 40)
    outcome = run_reward(job(tmp_path, rows, rows, peft={"peft_type": "LORA", "r": 4}, steps=40, batch_size=8))
    assert outcome.metrics["accuracy"] == 1.0 and outcome.metrics["margin"] > 1
    assert min(gaps_of(outcome.model, rows)) > 0
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()
    trunk = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1).model.embed_tokens.weight
    assert torch.equal(AutoModelForSequenceClassification.from_pretrained(outcome.model).model.embed_tokens.weight, trunk)


def test_a_text_prompt_beside_conversations_is_the_users_message_said_once(tmp_path):
    found = [
        run_reward(job(tmp_path, pairs(shape), pairs(shape), run=shape))
        for shape in ("implicit talk", "text and talk", "twice")
    ]
    assert found[0].metrics["margin"] == found[1].metrics["margin"] == found[2].metrics["margin"]
    kinds = [pairs(shape) for shape in ("implicit talk", "text and talk", "twice")]
    mixed = [kinds[i % 3][i] for i in range(len(kinds[0]))]  # the first row says nothing of the others
    assert run_reward(job(tmp_path, mixed, mixed, run="mixed")).metrics["margin"] == found[0].metrics["margin"]


def test_a_masked_language_model_can_become_a_reward_model(tmp_path):
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0
    )
    torch.manual_seed(0)
    bert = BertForMaskedLM(config)
    for parameter in bert.parameters():  # wide weights: attention to padding would show
        torch.nn.init.normal_(parameter, std=0.5)
    bert.save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    outcome = run_reward(job(tmp_path, pairs("implicit"), pairs("implicit"), model=str(tmp_path / "bert")))
    gaps = gaps_of(outcome.model, pairs("implicit"))
    assert outcome.metrics["margin"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)


def test_equal_seeds_give_equal_weights(tmp_path):
    weights = []
    for run in ("a", "b"):
        run_reward(job(tmp_path, pairs("explicit"), run=run))
        weights.append((tmp_path / run / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


# -- calibration -----------------------------------------------------------------------------------------------------


def test_a_gap_that_keeps_its_promise_has_no_calibration_error():
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(200_000, generator=generator, dtype=torch.float64) * 4
    right = torch.rand(200_000, generator=generator, dtype=torch.float64) < size.sigmoid()
    found = pair_metrics(torch.where(right, size, -size))
    assert found["calibration_error"] < 0.01 and len(found["bins"]) == 10
    assert found["accuracy"] == pytest.approx(float(right.double().mean()))
    # The same answers told with three times the confidence promise more than they keep.
    assert pair_metrics(torch.where(right, 3 * size, -3 * size))["calibration_error"] > 0.08


def test_calibration_of_a_few_pairs_by_hand():
    gaps = torch.tensor([0.0, 2.0, -1.0])
    found = pair_metrics(gaps)
    promised = [0.5, 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))]
    assert found["accuracy"] == pytest.approx((0.5 + 1 + 0) / 3) and found["margin"] == pytest.approx(1 / 3)
    assert [b["promised"] for b in found["bins"]] == pytest.approx(promised)
    assert found["calibration_error"] == pytest.approx((0 + promised[1] + (1 - promised[2])) / 3)


# -- the commands -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_door_reaches_the_accuracy_of_the_embedded_reward_model(tmp_path, tiny_world):
    world = tiny_world("reviews")
    command = [sys.executable, "scripts/train_reward.py", "--config", "configs/reward.yaml", "--run.dir", str(tmp_path / "run")]
    command += ["--model.path", str(world / "base"), "--prompts.path", str(world / "preferences.jsonl")]
    done = warm.run(command)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["accuracy"] >= 0.95 and summary["rows_heldout"] == 100
    calibration = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert sum(b["pairs"] for b in calibration["bins"]) == 100


@pytest.mark.slow
def test_two_processes_measure_every_pair_once(tmp_path):
    held = pairs("explicit")[:5]
    made = job(tmp_path, pairs("explicit"), held)
    command = ["scripts/train_reward.py", "--config", "configs/reward.yaml"]
    command += ["--model.path", made.model.path, "--prompts.path", made.prompts.path, "--run.dir", made.run.dir]
    command += ["--reward_model.steps", "2", "--prompts.heldout_path", made.prompts.heldout_path]
    done = warm.run_ranks(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    gaps = gaps_of(tmp_path / "run" / "model", held)
    assert summary["world_size"] == 2 and summary["rows_heldout"] == 5
    assert summary["margin"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)


def test_the_door_tells_a_bad_row_in_one_line_and_leaves_with_2(tmp_path):
    made = job(tmp_path, [{"chosen": "a b", "rejected": "a b"}])
    command = [sys.executable, "scripts/train_reward.py", "--config", "configs/reward.yaml", "--run.dir", made.run.dir]
    command += ["--model.path", made.model.path, "--prompts.path", made.prompts.path]
    done = warm.run(command)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "prompts.path: row 1: chosen equals rejected" in done.stderr


# -- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, settings, words",
    [
        ([{"good": "a", "bad": "b"}], {}, ["expected chosen and rejected", "found the columns: good, bad"]),
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a"}], {}, ["row 2: rejected is missing"]),
        ([{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "b", "margin": 1}], {}, ["row 1: margin is no number"]),
        ([{"chosen": "a", "rejected": said("user", "b")}], {}, ["row 1: rejected is list", "expected a text"]),
        ([], {}, ["has no rows"]),
        ([{"chosen": "a", "rejected": "b"}], {"center": -1.0}, ["reward_model.center: -1.0"]),
        ([{"chosen": "a", "rejected": "b"}], {"learning_rate": -1.0}, ["reward_model.learning_rate: -1.0"]),
    ],
)
def test_bad_rows_and_settings_are_one_clear_line(tmp_path, rows, settings, words):
    with pytest.raises(UserError) as caught:
        run_reward(job(tmp_path, rows, **settings))
    (line,) = caught.value.lines
    assert all(word in line for word in words), line


def test_what_cannot_become_a_reward_model_is_refused(tmp_path):
    rows = pairs("explicit", 3)
    with pytest.raises(UserError, match="PROMPT_TUNING cannot be merged into a reward model that loads alone"):
        run_reward(job(tmp_path, rows, peft={"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}))
    made = job(tmp_path, rows, run="long")
    with pytest.raises(UserError, match="every training pair is longer than 3 tokens"):
        run_reward(dataclasses.replace(made, prompts=dataclasses.replace(made.prompts, max_tokens=3)))
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(UserError, match="pairs are conversations, but the tokenizer has no chat template"):
        run_reward(dataclasses.replace(job(tmp_path, pairs("implicit talk"), model=made.model.path, run="talk")))
