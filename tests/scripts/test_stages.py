"""The shipped YAML of the supervised and summaries jobs, run for two steps; and the proof on summaries over three seeds."""

from __future__ import annotations

import json
from pathlib import Path

from steerl.configs.reader import read

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from steerl.reward.kinds.rouge import rouge
from steerl.scripts import make_tiny, train_ppo
from steerl.scripts.toy_tasks import summaries
from steerl.training.stages.reward_model import run_reward
from steerl.training.stages.settings import RewardJob, SFTJob
from steerl.training.stages.sft import run_sft
from tests.models import tiny, tiny_tokenizer


def flags(config: str, **given: object) -> list[str]:
    return [
        "--config",
        f"configs/{config}.yaml",
        *(part for name, value in given.items() for part in (f"--{name}", str(value))),
    ]


def jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# -- every shipped YAML of these stages, two steps -----------------------------------------------------------------------


@pytest.mark.slow
def test_sft_yaml_on_reviews_and_on_summaries(tmp_path, tiny_world):
    for world, extra in (("reviews", {}), ("summaries", {"sft.rouge": "true"})):
        folder, run = tiny_world(world), tmp_path / world
        given = {"model.path": folder / "base", "prompts.path": folder / "sft.jsonl", "prompts.limit": 80, "run.dir": run}
        run_sft(read(SFTJob, flags("sft", **given, **extra, **{"sft.steps": 2})))
        summary = json.loads((run / "summary.json").read_text())
        assert summary["steps"] == 2 and summary["rows"] == 72 and summary["rows_heldout"] == 8
        assert ("rougeL" in summary) == (world == "summaries")


@pytest.mark.slow
def test_reward_yaml_on_reviews(tmp_path, tiny_world):
    folder = tiny_world("reviews")
    given = {"model.path": folder / "base", "prompts.path": folder / "preferences.jsonl", "run.dir": tmp_path / "run"}
    run_reward(read(RewardJob, flags("reward", **given, **{"reward_model.steps": 2, "prompts.limit": 80})))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("peft", ["null", "{peft_type: LORA, r: 4}"])
def test_summaries_yaml(tmp_path, tiny_world, peft):
    run = tmp_path / "run"
    given = {"ppo.steps": 2, "ppo.rollouts_per_step": 16, "ppo.eval_prompts": 8, "model.peft": peft}
    train_ppo.main(read(train_ppo.PPOJob, ppo_flags(tiny_world("summaries"), "sft", run, **given)))
    lines = jsonl(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["gap/max"] < 1e-3 and line["ppo/ratio_first_error"] < 1e-4 for line in lines)
    assert all(0 < line["reward/rouge"] < 1 for line in lines)


def test_ppo_yaml(tmp_path):
    """The starting point for any model, here two steps of a random one."""
    tiny("gpt2").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in "abcdefg"))
    (tmp_path / "mine.py").write_text("def name(prompts, completions, **_):\n    return [float(len(c)) for c in completions]\n")
    reward = json.dumps([{"name": "mine", "kind": "function", "function": f"{tmp_path / 'mine.py'}:name"}])
    given = {"model.path": tmp_path / "model", "prompts.path": tmp_path / "prompts.jsonl", "reward": reward}
    given |= {"run.dir": tmp_path / "run", "ppo.steps": 2, "ppo.rollouts_per_step": 8, "sampling.max_new_tokens": 8}
    train_ppo.main(read(train_ppo.PPOJob, flags("ppo", **given)))
    lines = jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2] and all(line["ppo/optimizer_steps"] == 16 for line in lines)
    assert all(line["ppo/ratio_first_error"] < 1e-5 and line["gap/max"] < 1e-4 for line in lines)


def ppo_flags(world: Path, model: str | Path, run: Path, **given: object) -> list[str]:
    paths = {"model.path": world / model, "prompts.path": world / "prompts.jsonl", "heldout.path": world / "heldout.jsonl"}
    return flags("summaries", **paths, **{"run.dir": run}, **given)


# -- the proof -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy(folder: Path, rows: list[dict]) -> float:
    """ROUGE-L of greedy summaries of the held-out articles."""
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    written: list[str] = []
    for begin in range(0, len(rows), 50):
        batch = tokenizer([row["prompt"] for row in rows[begin : begin + 50]], return_tensors="pt", padding=True)
        ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=32)
        written += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return rouge(written, [row["summary"] for row in rows])["rougeL"]


@pytest.mark.proofs
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_supervision_beats_the_lead_and_ppo_beats_supervision_with_the_kl_held(tmp_path, seed):
    make_tiny.make("summaries", tmp_path, seed)
    world = tmp_path / "summaries"
    rows = jsonl(world / "heldout.jsonl")
    lead = rouge(
        [summaries.lead(row["prompt"].removeprefix(summaries.PREFIX)) for row in rows], [row["summary"] for row in rows]
    )
    given = {"model.path": world / "base", "prompts.path": world / "sft.jsonl", "run.dir": tmp_path / "sft", "run.seed": seed}
    run_sft(read(SFTJob, flags("sft", **given, **{"sft.steps": 60})))
    run, taught = tmp_path / "ppo", tmp_path / "sft" / "model"
    job = read(train_ppo.PPOJob, ppo_flags(world, taught, run, **{"run.seed": seed, "sampling.seed": seed}))
    train_ppo.main(job)
    summary = json.loads((run / "summary.json").read_text())
    # Sampled as in training, at temperature 1; greedy decoding beside it.
    sampled = {"lead": lead["rougeL"], "sft": summary["reward_before"], "ppo": summary["reward_after"]}
    best = {"sft": greedy(taught, rows), "ppo": greedy(run / "model", rows)}
    last = [line["kl/ref"] for line in jsonl(run / "metrics.jsonl")[-(job.ppo.steps // 3) :]]
    kl = sum(last) / len(last)
    print(json.dumps({"seed": seed, "sampled": sampled, "greedy": best, "kl": [min(last), kl, max(last)]}))
    # Stopped early, the supervised model has room: PPO raises what it samples, its objective, and the greedy summary with it.
    assert sampled["lead"] + 0.3 < best["sft"] and best["sft"] + 0.01 < best["ppo"]
    assert sampled["sft"] + 0.15 < sampled["ppo"]
    assert abs(kl / job.ppo.kl_target - 1) < 0.15
