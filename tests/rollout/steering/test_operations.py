"""Operations against pyvene's numbers (golden/operations.npz) and against their formulas written out in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from steerl.rollout.steering.core import operations as op

GOLDEN = {k: torch.from_numpy(v) for k, v in np.load(Path(__file__).parent / "golden" / "operations.npz").items()}
ROWS = [[0, 1], [2, 3], [2, 3], [0, 1]]


def g(*names: str) -> list[Tensor]:
    return [GOLDEN[name] for name in names]


BASE, SOURCE = g("base", "source")
CASES = {
    "vanilla": lambda: op.vanilla(BASE, SOURCE),
    "vanilla_4": lambda: op.vanilla(BASE, SOURCE, range(4)),
    "vanilla_rows": lambda: op.vanilla(BASE, SOURCE, ROWS),
    "add": lambda: op.add(BASE, SOURCE),
    "subtract": lambda: op.subtract(BASE, SOURCE),
    "zero": lambda: op.zero(BASE),
    "collect": lambda: op.collect(BASE),
    "noise": lambda: op.noise(BASE, *g("noise_drawn", "noise_level")),
    "rotated": lambda: op.rotated(BASE, SOURCE, *g("rotation")),
    "rotated_02": lambda: op.rotated(BASE, SOURCE, *g("rotation"), [0, 2]),
    "low_rank_rotated": lambda: op.low_rank_rotated(BASE, SOURCE, *g("low_rank")),
    "low_rank_rotated_1": lambda: op.low_rank_rotated(BASE, SOURCE, *g("low_rank"), [1]),
    "boundless": lambda: op.boundless(BASE, SOURCE, *g("boundless_rotation"), 0.4, 0.7),
    "sigmoid_mask": lambda: op.sigmoid_mask(BASE, SOURCE, *g("mask"), 0.5),
    "sigmoid_mask_rotated": lambda: op.sigmoid_mask_rotated(BASE, SOURCE, *g("turned_rotation", "turned_mask"), 0.5),
    "pca": lambda: op.pca(BASE, SOURCE, *g("components", "mean", "std")),
    "autoencoder_035": lambda: op.autoencoder(
        BASE, SOURCE, *g("encoder", "encoder_bias", "decoder", "decoder_bias"), [0, 3, 5]
    ),
    "jumprelu": lambda: op.jumprelu(BASE, SOURCE, *g("jump_W_enc", "jump_b_enc", "jump_threshold", "jump_W_dec", "jump_b_dec")),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_pyvene(name: str) -> None:
    torch.testing.assert_close(CASES[name](), GOLDEN[name], atol=1e-6, rtol=1e-6)


# -- formulas, row by row in float64 ------------------------------------------------------------------------------------------


@pytest.fixture
def drawn() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis = torch.linalg.qr(draw(6, 6))[0]
    return {
        "h": draw(2, 5, 6), "s": draw(6), "Q": basis, "R": basis[:, :3], "W": draw(3, 6), "b": draw(3), "c": draw(3), "P": draw(3, 6),
        "p": draw(3), "up": draw(6, 3), "ub": draw(6),
    }  # fmt: skip


def by_row(function, h: Tensor) -> Tensor:
    return torch.stack([torch.stack([function(x) for x in row]) for row in h])


def test_directions(drawn: dict[str, Tensor]) -> None:
    h, u = drawn["h"], drawn["s"] / drawn["s"].norm()
    expected = {
        "ablate": by_row(lambda x: x - 0.7 * (x @ u) * u, h),
        "project": by_row(lambda x: (x @ u) * u, h),
        "clamp": by_row(lambda x: x + (2.5 - x @ u) * u, h),
        "renormalise": by_row(lambda x: (x + 2.0 * drawn["s"]) * x.norm() / (x + 2.0 * drawn["s"]).norm(), h),
    }
    found = {
        "ablate": op.ablate(h, drawn["s"], 0.7),
        "project": op.project(h, drawn["s"]),
        "clamp": op.clamp(h, drawn["s"], 2.5),
        "renormalise": op.renormalise(h, drawn["s"], 2.0),
    }
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_rotate_turns_by_the_angle_and_keeps_the_length(drawn: dict[str, Tensor]) -> None:
    h, u = drawn["h"], drawn["s"] / drawn["s"].norm()
    turned = op.rotate(h, drawn["s"], 0.3)
    torch.testing.assert_close(turned.norm(dim=-1), h.norm(dim=-1))
    angle = torch.arccos(h @ u / h.norm(dim=-1)) - torch.arccos(turned @ u / turned.norm(dim=-1))
    torch.testing.assert_close(angle, torch.full_like(angle, 0.3))
    plane = torch.linalg.lstsq(torch.stack([h[0, 0], u], 1), turned[0, 0]).residuals
    assert plane.numel() == 0 or float(plane.abs().max()) < 1e-12, "left the plane of h and u"
    along = 3.0 * drawn["s"]
    assert torch.equal(op.rotate(along, drawn["s"], 0.3), along), "parallel to u there is no plane to turn in"


def test_learned(drawn: dict[str, Tensor]) -> None:
    h, R, W, b, c, P, p, up, ub = (drawn[k] for k in ("h", "R", "W", "b", "c", "P", "p", "up", "ub"))
    expected = {
        "loreft": by_row(lambda x: x + R @ (torch.tanh(W @ x + b) - R.T @ x), h),
        "noreft": by_row(lambda x: x + P.T @ (W @ x + b - (P @ x + p)), h),
        "consreft": by_row(lambda x: x + R @ (c - R.T @ x), h),
        "lobireft": by_row(lambda x: x + R @ c, h),
        "direft": by_row(lambda x: x + R @ (W @ x + b), h),
        "nodireft": by_row(lambda x: x + P.T @ torch.relu(W @ x + b), h),
        "adapter": by_row(lambda x: x + up @ torch.relu(W @ x + b) + ub, h),
    }
    found = {
        "loreft": op.loreft(h, None, W, b, R, torch.tanh),
        "noreft": op.noreft(h, None, W, b, P, p),
        "consreft": op.consreft(h, None, c, R),
        "lobireft": op.lobireft(h, None, c, R),
        "direft": op.direft(h, None, W, b, R),
        "nodireft": op.nodireft(h, None, W, b, P, torch.relu),
        "adapter": op.adapter(h, None, W, b, up, ub),
    }
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_autoencoder_residual_changes_nothing_when_nothing_is_exchanged() -> None:
    given = g("encoder", "encoder_bias", "decoder", "decoder_bias")
    torch.testing.assert_close(op.autoencoder(BASE, BASE, *given, residual=True), BASE)
    lossy = op.autoencoder(BASE, BASE, *given)
    assert float((lossy - BASE).abs().max()) > 1e-2


def test_nothing_is_changed_in_place() -> None:
    base, source = BASE.clone(), SOURCE.clone()
    for name, case in CASES.items():
        case()
        assert torch.equal(BASE, base) and torch.equal(SOURCE, source), name


def test_narrow_types_are_worked_out_in_float32() -> None:
    torch.manual_seed(0)
    h, u = (torch.randn(64) * 30).bfloat16(), torch.randn(64)
    expected = (h.float() - (h.float() @ (u / u.norm())) * u / u.norm()).bfloat16()
    assert torch.equal(op.ablate(h, u), expected)
    assert op.ablate(h, u).dtype == torch.bfloat16


def test_collect_by_row() -> None:
    assert torch.equal(op.collect(BASE, None, ROWS), torch.stack([BASE[i, r] for i, r in enumerate(ROWS)]))
