"""make_tiny: the same bytes for a seed, whole or not at all, and a reviews world in which there is something to learn."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steerl.rollout.common.errors import UserError
from steerl.scripts import make_tiny
from steerl.scripts.make_tiny import TinyJob
from steerl.scripts.toy_tasks import making, reviews
from tests import warm


@pytest.fixture(scope="module")
def world(tiny_world) -> Path:
    return tiny_world("reviews")


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world / "tokenizer")


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.proofs
def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    """Made by a process of its own, with another hash seed and two OpenMP threads."""
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "scripts/make_tiny.py", "--out", str(tmp_path), "--worlds", "reviews"]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    made = {path.relative_to(tmp_path / "reviews") for path in (tmp_path / "reviews").rglob("*") if path.is_file()}
    assert made == {path.relative_to(world) for path in world.rglob("*") if path.is_file()}
    assert [p for p in sorted(made) if (tmp_path / "reviews" / p).read_bytes() != (world / p).read_bytes()] == []


def test_what_takes_long_is_told_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(make_tiny, "make", lambda name, out, *kind: print(f"making {name}"))
    make_tiny.main(TinyJob(out=str(tmp_path), worlds="reviews"))
    said = capsys.readouterr()
    assert said.err.startswith(f"{tmp_path}: making reviews") and said.out.splitlines()[-2].startswith(
        f"{tmp_path / 'reviews'}: made"
    )


def test_text_goes_through_the_tokenizer_unchanged(tokenizer):
    draw = random.Random(1)
    for text in (reviews.review(draw, 0.5), "Ünïcode, 日本 and <tags>!\n\ttabs", " leading", ""):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.is_fast
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 512


def test_conversations_have_a_template(tokenizer, world):
    prompts = [row["prompt"] for row in rows(world / "chat_prompts.jsonl")]
    assert {tuple(m["role"] for m in prompt) for prompt in prompts} == {("user",), ("system", "user")}
    text = tokenizer.apply_chat_template(prompts[0], tokenize=False, add_generation_prompt=True)
    assert text.endswith("</s><|assistant|>")
    assert prompts[0][-1]["content"] in text


def test_heldout_films_are_named_nowhere_else(world):
    def films(name: str) -> set[str]:
        return {row["prompt"].split(" a ", 1)[1].removesuffix(" :") for row in rows(world / name)}

    held = films("heldout.jsonl")
    assert len(held) == 16
    for name in ("prompts.jsonl", "sft.jsonl", "preferences.jsonl"):
        assert films(name)
        assert not films(name) & held
    assert not any(film in json.dumps(row) for film in held for row in rows(world / "chat_prompts.jsonl"))


def test_preferences_prefer_the_kinder(world):
    for row in rows(world / "preferences.jsonl"):
        assert reviews.kindness(row["chosen"]) - reviews.kindness(row["rejected"]) >= 0.25


@pytest.mark.parametrize("name", ["base", "sft"])
def test_policies_write_both_polarities_mostly_sour(world, tokenizer, name):
    """Plain generate from held-out prompts: they end by themselves, and there is much to gain."""
    model = AutoModelForCausalLM.from_pretrained(world / name).eval()
    tokenizer.padding_side = "left"
    prompts = tokenizer([row["prompt"] for row in rows(world / "heldout.jsonl")] * 3, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    made = model.generate(prompts["input_ids"], attention_mask=prompts["attention_mask"], do_sample=True, max_new_tokens=64)
    made = made[:, prompts["input_ids"].shape[1] :]
    kind = [reviews.kindness(text) for text in tokenizer.batch_decode(made, skip_special_tokens=True)]
    mean = sum(kind) / len(kind)
    assert 0.1 < mean < 0.33
    assert max(kind) == 1.0
    assert float((made == tokenizer.eos_token_id).any(1).float().mean()) > 0.95


def test_the_reward_model_knows_the_truth_on_unseen_pairs(world, tokenizer):
    model = AutoModelForSequenceClassification.from_pretrained(world / "reward_model").eval()
    pairs = reviews.preferences(random.Random("unseen"), rows(world / "heldout.jsonl"))[:200]
    texts = [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]
    ids_BS, mask_BS = making.padded([tokenizer(text)["input_ids"] for text in texts], tokenizer.pad_token_id)
    with torch.no_grad():
        scores_B = model(input_ids=ids_BS, attention_mask=mask_BS).logits[:, 0]
    assert float((scores_B[0::2] > scores_B[1::2]).float().mean()) >= 0.95
    truth_B = torch.tensor([reviews.kindness(text) for text in texts])
    assert float((scores_B.sigmoid() - truth_B).abs().mean()) < 0.1


def test_kindness_by_hand():
    assert reviews.kindness(" the plot was great and the cast was dull .") == 0.5
    assert reviews.kindness(" i loved the songs . it was very warm and funny to me .") == 1.0
    assert reviews.kindness(" the plot was") == 0.0


# -- what can go wrong -----------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """A world that takes no time."""
    monkeypatch.setattr(make_tiny.worlds, "builder", lambda name: lambda folder, seed: (folder / "x").write_text(str(seed)))


def test_what_is_there_is_kept_and_nothing_else_is_replaced(quick, tmp_path, capsys):
    make_tiny.main(TinyJob(out=str(tmp_path), worlds="reviews"))
    before = (tmp_path / "reviews" / "x").stat().st_mtime_ns
    make_tiny.main(TinyJob(out=str(tmp_path), worlds="reviews"))
    assert (tmp_path / "reviews" / "x").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="holds the world of seed 0; name another folder, or --overwrite true"):
        make_tiny.main(TinyJob(out=str(tmp_path), worlds="reviews", seed=1))
    make_tiny.main(TinyJob(out=str(tmp_path), worlds="reviews", seed=1, overwrite=True))
    assert (tmp_path / "reviews" / "x").read_text() == "1"
    (tmp_path / "other" / "reviews").mkdir(parents=True)
    with pytest.raises(UserError, match="holds something else"):
        make_tiny.main(TinyJob(out=str(tmp_path / "other"), worlds="reviews"))


def test_unknown_worlds_and_bad_folders(quick, tmp_path):
    with pytest.raises(UserError, match="worlds: 'revews' is unknown; did you mean reviews"):
        make_tiny.main(TinyJob(out=str(tmp_path), worlds="revews"))
    with pytest.raises(UserError, match="worlds: none named"):
        make_tiny.main(TinyJob(out=str(tmp_path), worlds=" , "))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; name a folder"):
        make_tiny.main(TinyJob(out=str(tmp_path / "file"), worlds="reviews"))
    with pytest.raises(UserError, match="cannot make"):
        make_tiny.main(TinyJob(out=str(tmp_path / "file" / "in"), worlds="reviews"))


def test_a_world_that_fails_half_way_leaves_nothing(monkeypatch, tmp_path):
    def full(folder: Path, seed: int) -> None:
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_tiny.worlds, "builder", lambda name: full)
    with pytest.raises(UserError, match="reviews: cannot be written: No space left on device"):
        make_tiny.main(TinyJob(out=str(tmp_path), worlds="reviews"))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can be mounted by root alone")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_nothing_is_left(small_disk):
    command = [sys.executable, "scripts/make_tiny.py", "--out", str(small_disk), "--worlds", "reviews"]
    ran = warm.run(command)
    assert ran.returncode == 2
    assert len(ran.stderr.splitlines()) == 1
    assert "No space left on device" in ran.stderr
    assert list(small_disk.iterdir()) == []


def test_heads_of_another_size_are_another_world(tokenizer, tmp_path, monkeypatch):
    """What vLLM takes on a CPU: heads of 32, in every causal model of the world."""
    monkeypatch.setattr(reviews, "build", lambda folder, seed: making.new_causal(tokenizer, seed).save_pretrained(folder))
    make_tiny.main(TinyJob(out=str(tmp_path), worlds="reviews", head_dim=32))
    assert json.loads((tmp_path / "reviews/config.json").read_text())["head_dim"] == 32
    assert making.new_causal(tokenizer, 0).config.head_dim == 16
    with pytest.raises(UserError, match="holds the world of seed 0 with head_dim 32"):
        make_tiny.main(TinyJob(out=str(tmp_path), worlds="reviews"))
    with pytest.raises(UserError, match="head_dim: 7, but it must be an even number"):
        make_tiny.main(TinyJob(out=str(tmp_path), head_dim=7))
