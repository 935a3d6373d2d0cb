"""Random numbers depend on their keys alone."""

from __future__ import annotations

import torch
from scipy import stats

from steerl.rollout.common.random import uniforms


def test_uniforms_are_uniform_and_independent_over_each_key() -> None:
    rows, ones = torch.arange(20_000), torch.ones(20_000, dtype=torch.int64)
    series = {
        "row": uniforms(0, 0, rows, ones, 0),
        "sample": uniforms(0, 0, ones, rows, 0),
        "t": uniforms(0, 0, ones[:1], ones[:1], rows)[0],
        "step": torch.cat([uniforms(0, k, ones[:1], ones[:1], 0) for k in range(2000)]),
        "seed": torch.cat([uniforms(k, 0, ones[:1], ones[:1], 0) for k in range(2000)]),
    }
    for name, values in series.items():
        assert values.dtype == torch.float64 and float(values.min()) >= 0 and float(values.max()) < 1
        assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3, name
        assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 4 / len(values) ** 0.5, name
        assert len(values.unique()) == len(values), name


def test_uniforms_of_a_row_of_positions_equal_those_one_by_one() -> None:
    rows, samples = torch.tensor([5, 9, 5]), torch.tensor([0, 0, 1])
    table = uniforms(7, 3, rows, samples, torch.arange(3))
    assert table.shape == (3, 3)
    for t in range(3):
        assert torch.equal(table[:, t], uniforms(7, 3, rows, samples, t))
    assert torch.equal(table[1:2], uniforms(7, 3, rows[1:2], samples[1:2], torch.arange(3)))


def test_uniforms_do_not_change_from_release_to_release() -> None:
    """Stored values: a dump that is resumed with a later version goes on with the same numbers."""
    found = uniforms(42, 3, torch.tensor([0, 1, 10**12]), torch.tensor([0, 5, 2]), torch.tensor([0, 191]))
    assert torch.allclose(found, torch.tensor(STORED, dtype=torch.float64), atol=0, rtol=0)
    assert float(uniforms(-1, 0, torch.tensor([0]), torch.tensor([0]), 0)) == float(
        uniforms(2**64 - 1, 0, torch.tensor([0]), torch.tensor([0]), 0)
    )


STORED = [
    [0.6697115871639002, 0.9137167119648674],
    [0.6032452862009363, 0.7357779993286058],
    [0.9278493298174532, 0.8022323875940313],
]
