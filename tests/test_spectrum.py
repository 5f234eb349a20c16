"""Spectra against the reference, on both sides, by layer, with vectors, and functions of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import make_case
from fisher_checks import KINDS, QUIET, ZOO, case, error, in_float32
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError
from fisherlens.linalg.dense import damped_cholesky, eigenpairs, eigenvalues, require_finite, self_gram

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = [
    "fewer_parameters_than_examples",
    "mlp_tanh",
    "conv_groups",
    "lenet",
    "segmentation",
    "module_used_twice",
    "lstm",
]


def values(ds, name="eigenvalue", **chosen):
    return torch.from_numpy(np.array(ds[name].sel(**chosen).dropna("rank").values))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_every_network(name, kind, unchanged):
    c = case(name, kind)
    F = c.fisher()
    with unchanged(c.model):
        ds = fl.spectrum(F)
    found, truth = values(ds), reference.spectrum(c.matrix)
    order = min(F.n_params, F.n_rows)
    assert len(found) == order
    assert ds.sizes == {"rank": order}
    top = truth[0].item()
    assert (found - truth[:order]).abs().max() <= 1e-12 * top + 1e-300
    assert (truth[order:].abs() <= 1e-12 * top + 1e-300).all()
    assert (found.diff() <= 0).all()
    assert ds["trace"].item() == pytest.approx(truth.sum().item(), rel=1e-10, abs=1e-300)
    above = ds["above_noise"].values
    assert above.dtype == bool
    assert ds["num_above_noise"].item() == above.sum() <= F.rank_bound == ds["rank_bound"].item()
    assert ds["noise_floor"].item() == pytest.approx(order * 2.3e-16 * max(top, 0), rel=0.1, abs=1e-300)
    assert np.array_equal(above, found.numpy() > ds["noise_floor"].item())
    assert (ds["residual_norm"].values == ds["noise_floor"].item()).all()
    assert ds["eigenvalue"].attrs["units"] == "nat"


def test_gram_and_dense_agree():
    """The same network, with fewer rows than parameters and with more."""
    model, (x, y), likelihood = make_case(
        "both", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,), n=40
    )
    F = fl.Fisher(model, (x, y), likelihood=likelihood)
    assert F.n_params < F.n_rows
    gram = torch.linalg.eigvalsh(F.gram()).flip(0)[: F.n_params]
    ds = fl.spectrum(F)
    assert "dense matrix" in ds.attrs["method"]
    assert error(values(ds), gram) < 1e-12
    few = fl.Fisher(model, (x[:9], y[:9]), likelihood=likelihood)
    assert few.n_rows < few.n_params
    ds = fl.spectrum(few)
    assert "Gram matrix" in ds.attrs["method"]
    assert error(values(ds), torch.linalg.eigvalsh(few.dense()).flip(0)[: few.n_rows]) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_eigenvectors(name):
    c = case(name)
    F = c.fisher()
    ds = fl.spectrum(F, vectors=True)
    assert ds["eigenvector"].dims == ("rank", "param")
    above = torch.from_numpy(ds["above_noise"].values)
    lam, v = values(ds)[above], torch.from_numpy(ds["eigenvector"].values)[above]
    assert error(v @ v.T, torch.eye(len(v), dtype=v.dtype)) < 1e-9
    assert error(v @ c.matrix, lam[:, None] * v) < 1e-9
    residual = torch.from_numpy(ds["residual_norm"].values)[above]
    assert ((v @ c.matrix - lam[:, None] * v).norm(dim=1) <= 2 * residual + 1e-14 * lam[0]).all()
    assert residual.max() < 1e-10 * lam[0]
    # a direction of eigenvalue zero is arbitrary
    assert np.isnan(ds["eigenvector"].values[~above.numpy()]).all()
    assert error(v.T @ (lam[:, None] * v), c.matrix) < 1e-9
    assert list(ds["param_name"].values) == list(F.layout.parameter_labels())


@pytest.mark.parametrize("vectors", [False, True])
@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "frozen_first_layer"])
def test_by_layer(name, vectors):
    c = case(name)
    F = c.fisher()
    ds = fl.spectrum(F, by="layer", vectors=vectors)
    assert list(ds["layer"].values) == [*F.layout.layer_names, "all"]
    for layer in F.layout.layers:
        at = slice(layer.start, layer.stop)
        block = c.matrix[at, at]
        truth = reference.spectrum(block)
        found = values(ds, layer=layer.name)
        assert len(found) == min(layer.size, F.n_rows)
        assert (found - truth[: len(found)]).abs().max() < 1e-12 * truth[0]
        assert ds["trace"].sel(layer=layer.name).item() == pytest.approx(block.trace().item())
        assert not ds["above_noise"].sel(layer=layer.name).values[len(found) :].any()
        if vectors:
            part = ds.sel(layer=layer.name)
            good = part["above_noise"].values
            v = torch.from_numpy(part["eigenvector"].values[good][:, at])
            assert error(v @ block, values(part)[: len(v), None] * v) < 1e-9
            outside = np.delete(part["eigenvector"].values[good], np.arange(layer.start, layer.stop), axis=1)
            assert np.isnan(outside).all()
    assert error(values(ds, layer="all"), values(fl.spectrum(F))) < 1e-12


def test_of_restricted_operators():
    c = case("mlp_tanh")
    part = c.fisher().restrict(["2", "4"])
    T = c.matrix[36:, 36:]
    ds = fl.spectrum(part, vectors=True)
    assert ds.sizes["param"] == 43
    v = torch.from_numpy(ds["eigenvector"].values)[torch.from_numpy(ds["above_noise"].values)]
    assert error(v @ T, values(ds)[: len(v), None] * v) < 1e-9
    both = fl.spectrum(part, by="layer", vectors=True)
    assert list(both["layer"].values) == ["2", "4", "all"]
    last = torch.from_numpy(both["eigenvector"].sel(layer="4").values[0])
    assert torch.isnan(last[:28]).all()
    assert error(T[28:, 28:] @ last[28:], reference.spectrum(T[28:, 28:])[0] * last[28:]) < 1e-9


def test_weights_and_ignored_labels():
    model, (x, y), _ = ZOO["mlp_tanh"]()
    y = y.clone()
    y[2] = -100
    likelihood = fl.Categorical(weight=[0.5, 1.0, 3.0])
    F = fl.Fisher(model, (x, y), likelihood=likelihood)
    truth = reference.spectrum(reference.fisher(model, (x, y), likelihood))
    ds = fl.spectrum(F, vectors=True)
    assert ds.sizes["rank"] == 12
    assert error(values(ds), truth[:12]) < 1e-12
    v = torch.from_numpy(ds["eigenvector"].values)
    assert error(v.T @ (values(ds)[:, None] * v), F.dense()) < 1e-9


def test_float32_is_decomposed_in_float64():
    for name in ("mlp_tanh", "lenet", "fewer_parameters_than_examples"):
        F = in_float32(name)
        ds = fl.spectrum(F, vectors=True)
        truth = reference.spectrum(case(name).matrix)
        found = values(ds)
        assert found.dtype == torch.float64
        assert (found - truth[: len(found)]).abs().max() < 1e-5 * truth[0]
        order = min(F.n_params, F.n_rows)
        assert ds["noise_floor"].item() == pytest.approx(order * 1.19e-7 * truth[0].item(), rel=0.01)
        assert ds.attrs["dtype"] == "float32"
        residual = ds["residual_norm"].values[ds["above_noise"].values]
        assert residual.max() < 1e-4 * truth[0]


def test_zero_matrix():
    F = case("one_class").fisher()
    for vectors in (False, True):
        ds = fl.spectrum(F, vectors=vectors)
        assert (ds["eigenvalue"].values == 0).all()
        assert not ds["above_noise"].values.any()
        assert (ds["rank_bound"].item(), ds["num_above_noise"].item()) == (0, 0)
    assert fl.effective_dimension(F, 1.0).item() == 0
    assert fl.log_determinant(F, 1.0).item() == 0


@pytest.mark.parametrize("name", NAMES)
def test_functions_of_the_spectrum(name):
    c = case(name)
    F = c.fisher()
    ds = fl.spectrum(F)
    grid = [1e-4, 0.1, 10.0]
    for source in (F, ds, fl.spectrum(F, by="layer").sel(layer="all")):
        d, h = fl.effective_dimension(source, grid), fl.log_determinant(source, grid)
        assert d.dims == h.dims == ("damping",)
        assert list(d["damping"].values) == grid
        for lam in grid:
            exact = reference.effective_dimension(c.matrix, lam)
            assert d.sel(damping=lam).item() == pytest.approx(exact, rel=1e-9)
            assert h.sel(damping=lam).item() == pytest.approx(reference.log_determinant(c.matrix, lam), rel=1e-9)
            assert fl.effective_dimension(source, lam).item() == pytest.approx(exact, rel=1e-9)
            assert fl.effective_dimension(source, lam).ndim == 0
            assert F.solver.log_determinant(lam) == pytest.approx(reference.log_determinant(c.matrix, lam), rel=1e-9)
    assert 0 < d.min() <= F.rank_bound


def test_what_is_refused(unchanged):
    F = case("mlp_tanh").fisher()
    with pytest.raises(InputError, match=r"Unknown partition scheme 'layers'\. Did you mean 'layer'\?"):
        fl.spectrum(F, by="layers")
    with pytest.raises(InputError, match=r"one spectrum per layer; choose one, such as result\.sel\(layer='all'\)"):
        fl.effective_dimension(fl.spectrum(F, by="layer"), 0.1)
    with pytest.raises(TypeError, match=r"Expected a Fisher or the Dataset of fl\.spectrum; got int"):
        fl.log_determinant(3, 0.1)
    for damping in (0, -1.0, [0.1, 0.0], float("nan")):
        with pytest.raises(InputError, match="damping must be a finite number > 0"):
            fl.effective_dimension(F, damping)


def test_memory_is_judged_before_the_work():
    F = case("lenet").fisher()
    F.memory, F.scores.rows = 10**6, 5000
    F.layout = type("Layout", (), {"n_params": 3000, "layer_names": ("0",)})()
    with pytest.raises(
        MemoryBudgetError, match=r"smaller of 3000 x 3000 \(dense\) and 5000 x 5000 \(Gram\).*An order of 204 would fit"
    ):
        fl.spectrum(F)


# --- the linear algebra below ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [(0, 0), (4, 4), (2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_decompositions_refuse_what_lapack_would_not(place, value):
    matrix = torch.eye(5, dtype=torch.float64)
    matrix[place] = value
    for act in (eigenvalues, eigenpairs, lambda m, what: damped_cholesky(m, 0.1, what), require_finite):
        with pytest.raises(fl.NonFiniteError, match="The thing holds NaN or infinity"):
            act(matrix, "The thing")


def test_both_triangles_are_read():
    matrix = torch.tensor([[1.0, 5.0], [0.0, 1.0]], dtype=torch.float64)
    assert eigenvalues(matrix).tolist() == [3.5, -1.5]
    assert eigenpairs(matrix)[0].tolist() == [3.5, -1.5]


def test_cholesky_of_what_lost_its_definiteness():
    v = torch.randn(6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = v @ v.T - 1e-15 * torch.eye(6, dtype=torch.float64)
    with pytest.warns(
        fl.NumericalWarning, match=r"A block \+ 1e-18 I was not positive definite in float64; 10 ε tr/n was added"
    ):
        factor = damped_cholesky(matrix, 1e-18, "A block")
    assert error(factor @ factor.T, v @ v.T) < 1e-12
    with pytest.raises(fl.NonFiniteError, match=r"is not positive definite, even with 10 ε tr/n added"):
        damped_cholesky(matrix - torch.eye(6, dtype=torch.float64), 1e-3)


@pytest.mark.parametrize("m", [1, 511, 512, 513, 1300])
def test_self_gram_by_tiles(m):
    x = torch.randn(m, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = self_gram(x)
    assert error(found, x @ x.T) < 1e-14
    assert torch.equal(found, found.T)


def test_numbers_of_numpy_are_numbers():
    """A count or a seed often comes out of an array."""
    c = case("mlp_tanh")
    F = c.fisher(memory=np.int64(10**8), seed=np.int64(1))
    three = np.arange(4)[3]
    assert fl.top_eigenvalues(F, three, seed=three, tol=np.float32(1e-4), max_matvecs=np.int64(900)).sizes["rank"] == 3
    options = {"num_probes": three, "num_matvecs": three, "seed": three, "deflate": None}
    assert fl.spectral_density(F, **options).sizes["probe"] == 3
    assert fl.estimate_trace(F, num_matvecs=np.int64(12), seed=three).attrs["num_matvecs"] == 12
    assert fl.spectrum(F, bootstrap=np.int64(20), seed=three)["trace_low"] > 0
    with pytest.raises(InputError, match=r"k must be an integer >= 1; got np\.float64\(3\.0\)"):
        fl.top_eigenvalues(F, np.float64(3))
