"""Leading eigenvalues by layer and block, and what is refused."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch
from fisher_checks import QUIET, case, error
from test_top_eigenvalues import WHICH, operator, wanted, within

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError

pytestmark = pytest.mark.filterwarnings(QUIET)


# --- by layer and by block -------------------------------------------------------------------------------------------


def test_by_layer():
    c = case("mlp_tanh")
    F = c.fisher()
    for vectors in (False, True):
        ds = fl.top_eigenvalues(F, 4, by="layer", vectors=vectors)
        assert list(ds["layer"].values) == [*F.layout.layer_names, "all"]
        for layer in F.layout.layers:
            at = slice(layer.start, layer.stop)
            truth = reference.spectrum(c.matrix[at, at]).numpy()
            part = ds.sel(layer=layer.name)
            assert within(part, truth[:4])
            if vectors:
                x = torch.from_numpy(part["eigenvector"].values)
                lam = torch.from_numpy(part["eigenvalue"].values)
                assert np.isnan(np.delete(x.numpy(), np.arange(layer.start, layer.stop), axis=1)).all()
                assert error(x[:, at] @ c.matrix[at, at], lam[:, None] * x[:, at]) < 1e-9
        assert within(ds.sel(layer="all"), reference.spectrum(c.matrix).numpy()[:4])
    assert json.loads(ds.attrs["settings"])["by"] == "layer"
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    ds = fl.top_eigenvalues(H, 2, which="smallest", by="layer")
    matrix = H.dense()
    for layer in H.layout.layers:
        at = slice(layer.start, layer.stop)
        assert within(ds.sel(layer=layer.name), torch.linalg.eigvalsh(matrix[at, at]).flip(0)[-2:].numpy())


@pytest.mark.parametrize("which", WHICH)
def test_by_block(which):
    c = case("mlp_tanh")
    F = c.fisher()
    parts = fl.partition(F, "unit")
    ds = fl.top_eigenvalues(F, 3, which=which, by="unit", vectors=True)
    assert ds["eigenvalue"].dims == ("block", "rank")
    assert list(ds["block"].values) == list(parts.labels)
    for b, index in enumerate(parts.blocks):
        part = ds.isel(block=b)
        truth = reference.spectrum(c.matrix[index][:, index]).numpy()
        assert within(part, wanted(truth, 3, which, float(part["noise_floor"]), True))
        above = part["above_noise"].values
        x = torch.from_numpy(part["eigenvector"].values[above])
        lam = torch.from_numpy(part["eigenvalue"].values[above])
        assert error(x[:, index] @ c.matrix[index][:, index], lam[:, None] * x[:, index]) < 1e-9
    assert ds["converged"].values.all()
    assert ds.attrs["which"] == which


# --- arguments -------------------------------------------------------------------------------------------------------


def test_what_is_refused():
    F = case("mlp_tanh").fisher()
    for k in (0, -1, 2.0, True, "3"):
        with pytest.raises(InputError, match="k must be an integer >= 1; got"):
            fl.top_eigenvalues(F, k)
    with pytest.raises(InputError, match="max_matvecs must be an integer >= 2; got 1"):
        fl.top_eigenvalues(F, 1, max_matvecs=1)
    with pytest.raises(InputError, match="seed must be an integer >= 0; got -1"):
        fl.top_eigenvalues(F, 1, seed=-1)
    with pytest.raises(InputError, match=r"Unknown option which= 'larges'\. Did you mean 'largest'\?"):
        fl.top_eigenvalues(F, 1, which="larges")
    with pytest.raises(InputError, match=r"Unknown method 'gram'.*Known: 'auto', 'exact', 'lanczos'"):
        fl.top_eigenvalues(F, 1, method="gram")
    for tol in (0, 1, -1e-3, float("nan"), "small"):
        with pytest.raises(InputError, match="tol must be a number between 0 and 1"):
            fl.top_eigenvalues(F, 1, tol=tol)
    with pytest.raises(TypeError, match=r"Expected a fisherlens\.Fisher, one of its approximations, or fl\.Operator"):
        fl.top_eigenvalues(torch.eye(3))
    with pytest.raises(InputError, match=r"by= cuts named parameters into blocks, but Operator has no layout"):
        fl.top_eigenvalues(operator(torch.eye(3, dtype=torch.float64)), by="layer")
    with pytest.raises(InputError, match="Unknown partition scheme 'layers'"):
        fl.top_eigenvalues(F, 1, by="layers")


def test_operators_that_cannot_be():
    skew = torch.tensor([[1.0, 5.0], [0.0, 1.0]], dtype=torch.float64)
    for method in ("auto", "exact"):
        with pytest.raises(InputError, match="The operator must be symmetric"):
            fl.top_eigenvalues(operator(skew), 1, method=method)
    broken = fl.Operator(lambda v: v * float("nan"), 5)
    with pytest.raises(NonFiniteError, match="The callable of the operator gave NaN or infinity"):
        fl.top_eigenvalues(broken, 1)


def test_a_matrix_over_the_budget_is_refused_when_asked_for():
    large = fl.Operator(lambda v: v, 6000, psd=True)
    with pytest.raises(MemoryBudgetError, match=r"takes 6000 products.*fl\.top_eigenvalues finds the leading"):
        fl.top_eigenvalues(large, 2, method="exact")


def test_the_result(unchanged):
    F = case("lenet").fisher()
    with warnings.catch_warnings(), unchanged():
        warnings.simplefilter("error")
        one = fl.top_eigenvalues(F, 3, seed=4, method="lanczos", vectors=True)
        two = fl.top_eigenvalues(F, 3, seed=4, method="lanczos", vectors=True)
    assert np.array_equal(one["eigenvector"].values, two["eigenvector"].values)
    assert one["eigenvalue"].attrs == {"long_name": "eigenvalue", "units": "nat"}
    settings = json.loads(one.attrs["settings"])
    assert settings == {
        "k": 3,
        "tol": 1e-6,
        "by": None,
        "vectors": True,
        "seed": 4,
        "method": "lanczos",
        "max_matvecs": 1000,
    }
    assert fl.plot.spectrum(one) is not None


def test_round_trip_through_a_file(tmp_path):
    ds = fl.top_eigenvalues(case("mlp_tanh").fisher(), 3, vectors=True)
    fl.save(ds, tmp_path / "top.nc")
    assert fl.load(tmp_path / "top.nc").identical(ds)
