"""The long ones, run by hand: `python -m pytest -m proofs -s tests/training/test_ppo_proofs.py`. Their tables go into docs/log.

reviews     reward from under 0.35 to over 0.8, five of five seeds
kl_target   KL per response within 10 % of the target over the last third, five of five seeds
ablation    what each known defect costs; the defects are put in here, the product has no settings for them
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from steerl.configs.reader import read

import pytest
import torch

from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.scoring import logprobs
from steerl.scripts import train_ppo
from steerl.training import ppo
from steerl.training.algorithm import advantages, loss, update
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from tests.models import tiny_policy
from tests.ppo_runs import prompts_of, share_of_threes

SEEDS = range(5)
ROOT = Path(__file__).parents[2]


def reviews(world: Path, folder: Path, seed: int, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """PPO on reviews as configs/quickstart.yaml has it, with the world's own policy and reward model."""
    reward = [{"name": "kindness", "kind": "model", "path": str(world / "reward_model"), "output": "probability"}]
    argv = ["--config", str(ROOT / "configs/quickstart.yaml"), "--model.path", str(world / "sft")]
    argv += ["--prompts.path", str(world / "prompts.jsonl"), "--heldout.path", str(world / "heldout.jsonl")]
    argv += ["--reward", json.dumps(reward), "--run.dir", str(folder)]
    argv += ["--run.seed", str(seed), "--sampling.seed", str(seed), *flags]
    train_ppo.main(read(train_ppo.PPOJob, argv))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), rows


@pytest.mark.proofs
def test_reviews_become_kind_in_five_of_five_seeds(tiny_world, tmp_path):
    print("\nseed  before  after  KL after  first step over 0.8  gap max")
    for seed in SEEDS:
        summary, rows = reviews(tiny_world("reviews"), tmp_path / str(seed), seed)
        over = next((row["step"] for row in rows if row["reward/mean"] > 0.8), None)
        print(
            f"{seed:4d}  {summary['reward_before']:6.3f}  {summary['reward_after']:5.3f}  {summary['kl_after']:8.2f}  "
            f"{over!s:>19}  {summary['gap_max']:.1e}",
            flush=True,
        )
        assert summary["reward_before"] < 0.35 and summary["reward_after"] > 0.8


@pytest.mark.proofs
def test_the_adaptive_weight_holds_the_kl_in_five_of_five_seeds(tiny_world, tmp_path):
    target, steps = 2.5, 36
    flags = [
        "--ppo.steps",
        str(steps),
        "--ppo.kl_target",
        str(target),
        "--ppo.kl_coef",
        "0.1",
        "--ppo.kl_horizon",
        "250",
        "--ppo.epochs",
        "2",
    ]
    print(f"\nseed  KL per response over the last third (target {target}): mean, least, most   reward  weight at the end")
    for seed in SEEDS:
        summary, rows = reviews(tiny_world("reviews"), tmp_path / str(seed), seed, *flags, "--ppo.schedule", "constant")
        last = [row["kl/ref"] for row in rows[-steps // 3 :]]
        print(
            f"{seed:4d}  {fmean(last):.3f}  {min(last):.3f}  {max(last):.3f}   {summary['reward_after']:.3f}  "
            f"{rows[-1]['kl/coef']:.4f}",
            flush=True,
        )
        assert abs(fmean(last) / target - 1) < 0.1


# -- ablation ----------------------------------------------------------------------------------------------------------


def dropout_in_old_logprobs(patch: pytest.MonkeyPatch) -> None:
    real = ppo.score

    def score(*arguments: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(logprobs, "no_dropout", lambda model: contextlib.nullcontext(model.train()))
            return real(*arguments)

    patch.setattr(ppo, "score", score)


def score_one_slot_late(patch: pytest.MonkeyPatch) -> None:
    real = advantages.gae

    def late(rewards_BR: torch.Tensor, values_BR: torch.Tensor, mask_BR: torch.Tensor, **settings: Any) -> advantages.Credit:
        pad = torch.nn.functional.pad
        wide = pad(mask_BR, (1, 0), value=True)  # one action more in every row, the last one on padding
        last_BR = mask_BR & ~pad(mask_BR, (0, 1))[:, 1:]
        moved = torch.where(last_BR, rewards_BR, 0.0)
        rewards = pad(torch.where(last_BR, 0.0, rewards_BR), (0, 1)) + pad(moved, (1, 0))
        found = real(rewards, pad(values_BR, (0, 1)), wide, **settings)
        return advantages.Credit(*(torch.where(mask_BR, part[:, :-1], 0.0) for part in found))

    patch.setattr(advantages, "gae", late)


def unmasked_whitening(patch: pytest.MonkeyPatch) -> None:
    real = advantages.whiten
    patch.setattr(
        advantages, "whiten", lambda values, mask, **s: torch.where(mask, real(values, torch.ones_like(mask), **s), 0.0)
    )


def no_position_ids(patch: pytest.MonkeyPatch) -> None:
    real = logprobs.forward_inputs
    patch.setattr(logprobs, "aligned", False)  # rows without padding before them need no explicit positions
    patch.setattr(logprobs, "forward_inputs", lambda *a: {k: v for k, v in real(*a).items() if k != "position_ids"})


def means_of_micro_batches(patch: pytest.MonkeyPatch) -> None:
    def own_mean(mask_BR: torch.Tensor, *, tokens: int, rows: int, reduction: str) -> torch.Tensor:
        return torch.where(mask_BR, len(mask_BR) / rows / mask_BR.sum().clamp(min=1), 0.0)

    patch.setattr(update.loss, "token_weights", own_mean)


DEFECTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "none": lambda patch: None,
    "old log-probs with dropout": dropout_in_old_logprobs,
    "score one slot late": score_one_slot_late,
    "unmasked whitening": unmasked_whitening,
    "no position ids": no_position_ids,
    "means of micro-batches": means_of_micro_batches,
}


@pytest.mark.proofs
def test_what_each_defect_costs(tmp_path):
    """A GPT-2 with dropout 0.1 and prompts of one to four tokens; the reward is the share of ids that leave 3 by 4."""
    assert loss is update.loss
    print("\ndefect                       reward of the last 5 of 25 steps by seed        mean  ratio_first  KL     gap max")
    means = {}
    for name, put_in in DEFECTS.items():
        ends, ratios, distances, gaps = [], [], [], []
        for seed in SEEDS:
            policy = tiny_policy("gpt2", seed, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
            folder = tmp_path / f"{name.replace(' ', '_')}-{seed}"
            settings = PPOSettings(
                steps=25, rollouts_per_step=32, minibatches=2, micro_batch_size=4, learning_rate=1e-3, kl_coef=0.01,
                eval_prompts=0, samples=0, gap_tolerance=1e9, stop_kl=1e9,  # no alarm stops a defect
            )  # fmt: skip
            sampling = Sampling(max_new_tokens=12, stop_ids=[12, 17, 24], seed=seed)
            with pytest.MonkeyPatch.context() as patch:
                put_in(patch)
                train(policy, prompts_of(policy), share_of_threes, sampling, settings, RunSettings(dir=str(folder), seed=seed))
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            ends.append(fmean(row["reward/mean"] for row in rows[-5:]))
            ratios.append(fmean(row["ppo/ratio_first"] for row in rows))
            distances.append(fmean(row["kl/ref"] for row in rows[-5:]))
            gaps.append(max(row["gap/max"] for row in rows))
        means[name] = fmean(ends)
        print(
            f"{name:28s} {'  '.join(f'{end:.3f}' for end in ends):45s} {fmean(ends):.3f}  {fmean(ratios):11.4f}  "
            f"{fmean(distances):5.2f}  {max(gaps):.1e}",
            flush=True,
        )
    assert means["none"] > 0.45
