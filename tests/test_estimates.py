"""Traces, diagonals and functions of a spectrum, exact and estimated, with their errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fisher_checks import case, in_float32

import fisherlens as fl
from fisherlens.errors import ConvergenceWarning, InputError, NumericalWarning


def operator(matrix, psd=True):
    return fl.Operator(lambda v: matrix @ v, len(matrix), matrix.dtype, block=True, psd=psd)


def hessian(name="mlp_tanh"):
    c = case(name)
    return fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")


# --- trace and diagonal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "fewer_parameters_than_examples", "lstm"])
@pytest.mark.parametrize("method", ["hutch++", "hutchinson", "xtrace", "xnystrace"])
def test_trace_of_a_fisher(method, name, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        ds = fl.estimate_trace(F, method=method, num_matvecs=40)
    assert set(ds.data_vars) == {"trace", "trace_sem", "trace_low", "trace_high"}
    assert abs(ds["trace"].item() - F.trace()) <= 5 * ds["trace_sem"].item() + 1e-10 * F.trace()
    assert ds["trace_low"] <= ds["trace"] <= ds["trace_high"]
    assert ds.attrs["num_matvecs"] <= 40  # fewer where the sketch spans the whole space
    assert (ds.attrs["confidence"], ds.attrs["kind"]) == (0.95, "exact")
    assert ds.attrs["interval"].startswith("indicative" if method.startswith("x") else "Student t")
    assert ("score rows" in ds.attrs["method"]) == (F.scores.rows < F.n_params)
    again = fl.estimate_trace(F, method=method, num_matvecs=40)
    other = fl.estimate_trace(F, method=method, num_matvecs=40, seed=1)
    assert again.identical(ds) or again.drop_attrs().identical(ds.drop_attrs())
    assert other["trace"].item() != ds["trace"].item() or ds["trace_sem"].item() < 1e-8


def test_trace_and_diagonal_of_other_operators():
    H = hessian()
    for A, trace, diagonal in (
        (H, H.trace(), H.diagonal()),
        (fl.BlockDiagonal(case("mlp_tanh").fisher(), "layer"), case("mlp_tanh").fisher().trace(), None),
        (operator(H.dense(), psd=False), H.trace(), H.diagonal()),
        (in_float32("lenet"), in_float32("lenet").trace(), in_float32("lenet").diagonal()),
    ):
        ds = fl.estimate_trace(A, num_matvecs=30)
        assert abs(ds["trace"].item() - trace) <= 5 * ds["trace_sem"].item() + 1e-5 * abs(trace)
        for method in ("hutch++", "hutchinson", "xdiag"):
            found = fl.estimate_diagonal(A, method=method, num_matvecs=30)
            if diagonal is None:
                continue
            off = np.abs(found["diagonal"].values - diagonal.double().numpy())
            inside = (found["diagonal_low"].values <= diagonal.numpy()) & (
                diagonal.numpy() <= found["diagonal_high"].values
            )
            assert inside.mean() > 0.85
            assert np.linalg.norm(off) < np.linalg.norm(diagonal.double()) * 3
    assert list(found["param_name"].values) == list(A.layout.parameter_labels())
    assert found["diagonal"].dims == ("param",)
    assert "param_name" not in fl.estimate_diagonal(operator(H.dense(), psd=False)).coords


def test_low_rank_with_few_products():
    """Rank 4, 6 products: off by a third, and the interval says so."""
    u = torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = operator(u @ u.T)
    exact = fl.estimate_trace(A, num_matvecs=12)
    assert exact["trace"].item() == pytest.approx(u.square().sum().item(), rel=1e-12)
    assert exact["trace_high"] - exact["trace_low"] < 1e-10 * exact["trace"]
    assert exact["trace_low"] <= u.square().sum().item() <= exact["trace_high"]
    hits, error = 0, []
    for seed in range(100):
        ds = fl.estimate_trace(A, num_matvecs=6, seed=seed)
        hits += bool(ds["trace_low"] <= u.square().sum().item() <= ds["trace_high"])
        error.append(abs(ds["trace"].item() / u.square().sum().item() - 1))
    assert np.mean(error) > 0.1
    assert hits >= 88  # binomial, 95 %, one in a thousand


def test_target_error_and_its_budget():
    A = operator(torch.diag(torch.arange(1.0, 301, dtype=torch.float64) ** -1) + 0.01)
    ds = fl.estimate_trace(A, method="hutchinson", num_matvecs=10, target_sem=0.1)
    assert ds["trace_sem"].item() <= 0.1
    assert 10 < ds.attrs["num_matvecs"] < 10_000
    with pytest.warns(
        ConvergenceWarning, match=r"The standard error is .* after 20 products, above the target 1.00e-06"
    ):
        ds = fl.estimate_trace(A, method="hutchinson", num_matvecs=10, target_sem=1e-6, max_matvecs=20)
    assert ds["trace_sem"].item() > 1e-6


def test_confidence():
    A = operator(torch.diag(torch.arange(1.0, 101, dtype=torch.float64)) + 1)
    width = [fl.estimate_trace(A, num_matvecs=30, confidence=c) for c in (0.5, 0.95, 0.999)]
    width = [float(ds["trace_high"] - ds["trace_low"]) for ds in width]
    assert width[0] < width[1] < width[2]
    assert "99.9 % interval" in fl.estimate_trace(A, confidence=0.999)["trace_low"].attrs["long_name"]


def test_few_probes_warn():
    A = operator(torch.eye(9, dtype=torch.float64))
    with pytest.warns(
        NumericalWarning, match=r"2 products of method='hutchinson' are fewer than 3 independent probes.*NaN"
    ):
        ds = fl.estimate_trace(A, method="hutchinson", num_matvecs=2)
    assert np.isnan(ds["trace_sem"].item())
    assert np.isnan(ds["trace_low"].item())
    with pytest.warns(NumericalWarning, match="fewer than 3 independent probes"):
        assert np.isnan(fl.estimate_diagonal(A, method="hutchinson", num_matvecs=1)["diagonal_sem"]).all()


def test_what_traces_and_diagonals_refuse(unchanged):
    c = case("mlp_tanh")
    F, A = c.fisher(), operator(torch.eye(5, dtype=torch.float64), psd=False)
    for estimate, known in ((fl.estimate_trace, "hutch++"), (fl.estimate_diagonal, "xdiag")):
        with pytest.raises(
            InputError, match=r"Unknown method 'huch\+\+'. Did you mean 'hutch\+\+'\?.*" + known.replace("+", r"\+")
        ):
            estimate(F, method="huch++")
        for bad in (0, -3, 2.5, True, "many"):
            with pytest.raises(InputError, match=r"num_matvecs must be an integer >= 1, the products"):
                estimate(F, num_matvecs=bad)
        with pytest.raises(InputError, match="seed must be an integer >= 0"):
            estimate(F, seed=-1)
        for bad in (0, 1, 95, "high", True):
            with pytest.raises(InputError, match="confidence must be a number between 0 and 1"):
                estimate(F, confidence=bad)
        with pytest.raises(TypeError, match=r"Expected a fisherlens.Fisher, one of its approximations, or fl.Operator"):
            estimate(torch.eye(3))
        with unchanged(c.model), pytest.raises(InputError, match="num_matvecs must be an integer >= 2"):
            estimate(F, method="xtrace" if estimate is fl.estimate_trace else "xdiag", num_matvecs=1)
    with pytest.raises(InputError, match="method='xnystrace' needs a positive semi-definite operator"):
        fl.estimate_trace(A, method="xnystrace")
    with pytest.raises(
        InputError, match="target_sem= needs an honest standard error, but that of method='xtrace' is indicative"
    ):
        fl.estimate_trace(F, method="xtrace", target_sem=0.1)
    for bad in (0, -1.0, float("nan"), "small"):
        with pytest.raises(InputError, match="target_sem must be a number > 0"):
            fl.estimate_trace(F, target_sem=bad)
    with pytest.raises(InputError, match="max_matvecs must be an integer >= 60"):
        fl.estimate_trace(F, target_sem=0.1, max_matvecs=10)
    with pytest.raises(fl.NonFiniteError, match="The callable of the operator gave NaN or infinity"):
        fl.estimate_trace(fl.Operator(lambda v: v / 0, 4))


def test_an_empty_list_of_dampings():
    with pytest.raises(InputError, match="damping is an empty list; expected one number > 0 or several"):
        fl.effective_dimension(case("mlp_tanh").fisher(), [])
