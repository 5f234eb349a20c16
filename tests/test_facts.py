"""Numerical facts on which silent errors rest, as far as the code meets them: decompositions, precision, sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import fill
from fisher_checks import error
from test_traps import DTYPE, mlp, twelve
from torch import nn

import fisherlens as fl
from fisherlens.errors import NonFiniteError
from fisherlens.linalg.dense import eigenpairs, eigenvalues


@pytest.mark.parametrize("place", [(0, 0), (2, 2), (4, 4), (1, 3)])
@pytest.mark.parametrize("solve", [eigenvalues, eigenpairs])
def test_fact_eigensolvers_are_silent_about_nan(solve, place):
    matrix = torch.eye(5, dtype=DTYPE)
    matrix[place] = float("nan")
    with pytest.raises(NonFiniteError, match="T holds NaN or infinity, so a decomposition"):
        solve(matrix, "T")


def test_fact_eigensolvers_read_one_triangle():
    matrix = torch.tensor([[1.0, 5.0], [0.0, 1.0]], dtype=DTYPE)
    assert torch.linalg.eigvalsh(matrix).tolist() == [1.0, 1.0]  # the fact
    assert eigenvalues(matrix).tolist() == [3.5, -1.5]  # of the symmetric part


def test_fact_values_below_rounding_are_noise():
    """The spectrum of float32 scores: what is far below the largest value is flagged, not dropped."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -7, 40, dtype=DTYPE)  # eigenvalues from 1 to 1e-14
    x = torch.linalg.qr(torch.randn(60, 40, generator=generator, dtype=DTYPE)).Q * scale * 60**0.5
    model = fill(nn.Linear(40, 1, bias=False).double(), generator)
    wide = fl.spectrum(fl.Fisher(model, (x, None), likelihood="gaussian"))
    single = fl.spectrum(fl.Fisher(model.float(), (x.float(), None), likelihood="gaussian"))
    truth = scale.square().numpy()
    for found, least in ((wide, 1e-13), (single, 1e-4)):
        values, seen = found["eigenvalue"].values, found["above_noise"].values
        assert len(values) == 40
        assert seen[0]
        assert seen[truth > least].all()
        assert (np.diff(seen.astype(int)) <= 0).all()
    assert wide["above_noise"].values.sum() > single["above_noise"].values.sum()
    good = single["above_noise"].values & (truth > 1e-3)
    np.testing.assert_allclose(single["eigenvalue"].values[good], truth[good], rtol=1e-3)
    np.testing.assert_allclose(wide["eigenvalue"].values[truth > 1e-9], truth[truth > 1e-9], rtol=1e-5)


def test_fact_chunks_add_up(monkeypatch):
    F = fl.Fisher(mlp(), twelve(), likelihood="categorical")
    whole = F.dense()
    monkeypatch.setattr("fisherlens.scores.matrix._AT_ONCE", 2000)
    assert error(F.dense(), whole) < 1e-14


def test_fact_low_precision_is_summed_in_float32():
    """bfloat16 scores of many equal examples: a sum in bfloat16 would stand still at 256."""
    n = 3000
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    F = fl.Fisher(model, (torch.ones(n, 1, dtype=torch.bfloat16), None), likelihood="gaussian")
    assert F.trace() == pytest.approx(1.0, rel=1e-6)
    assert (F @ torch.ones(1)).item() == pytest.approx(1.0, rel=1e-4)
