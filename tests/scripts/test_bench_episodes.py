"""The ablation's wrong credit, by sums: what is fed counts as time there and is worth nothing; the page's table; the arms."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from steerl.scripts.bench_cases import episodes
from steerl.training.algorithm import advantages

ROOT = Path(__file__).resolve().parents[2]


def sums(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """GAE as a sum over all later states of one sequence."""
    after = [*values[1:], 0.0]
    errors = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, len(errors))) for t in range(len(errors))]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_zeros_are_values_of_what_was_fed_and_time_goes_on_there(gamma, lam):
    draw = torch.Generator().manual_seed(0)
    masks = torch.rand(40, 12, generator=draw) < 0.6
    masks[:, 0] = True
    rewards = torch.where(masks, torch.randn(40, 12, generator=draw), 0.0).double()
    values = torch.randn(40, 12, generator=draw).double()
    found = episodes.gae_with_zeros(rewards, values, masks, gamma=gamma, lam=lam)
    right = advantages.gae(rewards, values, masks, gamma=gamma, lam=lam)
    for i, mask in enumerate(masks.tolist()):
        last = max(t for t, acts in enumerate(mask) if acts)
        zeroed = [float(v) if acts else 0.0 for v, acts in zip(values[i], mask, strict=True)][: last + 1]
        expected = sums(rewards[i, : last + 1].tolist(), zeroed, gamma, lam)
        assert found.advantages_BR[i, : last + 1][masks[i, : last + 1]].tolist() == pytest.approx(
            [a for a, acts in zip(expected, mask, strict=False) if acts], abs=1e-12
        )
        assert (found.advantages_BR[i][~masks[i]] == 0).all() and (found.returns_BR[i][~masks[i]] == 0).all()
        acted = [t for t, acts in enumerate(mask) if acts]
        cut = sums([float(rewards[i, t]) for t in acted], [float(values[i, t]) for t in acted], gamma, lam)
        assert right.advantages_BR[i][masks[i]].tolist() == pytest.approx(cut, abs=1e-12)
    assert torch.allclose(found.advantages_BR, right.advantages_BR) == (gamma == lam == 1)


def test_the_pages_table():
    page = (ROOT / "docs/environments.md").read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]
    table = {cells[0]: cells[1:] for cells in lines if cells[0] in ("advantage here", "with zeros across the gap")}
    acts = [0, 1, 8, 9]
    mask = torch.tensor([[t in acts for t in range(10)]])
    rewards, values = torch.zeros(1, 10), torch.full((1, 10), 0.5)
    rewards[0, 9] = 1
    for name, gae in (("advantage here", advantages.gae), ("with zeros across the gap", episodes.gae_with_zeros)):
        found = gae(rewards, values, mask, gamma=1.0, lam=0.95).advantages_BR[0, acts].tolist()
        shown = table[name]
        assert shown[2] == "." and [float(cell) for cell in shown[:2] + shown[3:]] == pytest.approx(found, abs=5e-4), name


def test_only_the_arms_of_zeros_have_another_credit():
    before = advantages.gae
    for arm in episodes.ARMS:
        with episodes.credit_of(arm):
            assert (advantages.gae is not before) == arm.startswith("zeros"), arm
            rewards, mask = torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor([[True, False, False, True]])
            found = advantages.gae(rewards, torch.zeros(1, 4), mask, gamma=1.0, lam=0.9).advantages_BR[0, 0].item()
            later = 1 + (0 if "zeros" not in arm else 40 if "x20" in arm else 2)
            assert found == pytest.approx(0.9**later, abs=1e-6), arm
        assert advantages.gae is before


def test_a_table_of_made_up_runs():
    def run(rewards: list[float]) -> dict:
        return {"before": 0.1, "after": rewards[-1], "rewards": rewards, "seconds": 3.0, "wall": 4.0}

    head, _, *rows = episodes.table({"critic": {"0": run([0.2, 0.96]), "1": run([0.4, 0.6])}})
    assert [cell.strip() for cell in rows[0].strip("|").split("|")] == [
        "critic", "0.10", "0.78", "0.60", "0.54", "2 never", "3",
    ]  # fmt: skip
    assert rows[0].count("|") == head.count("|") and math.isclose((0.58 + 0.5) / 2, 0.54)
