"""Complete spectra of blocks, approximations and plain operators; how far float32 goes; what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fisher_checks import QUIET, case, error, in_float32
from matrices import low_rank

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError, NumericalWarning
from fisherlens.linalg import dense

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = ["mlp_tanh", "conv_groups", "lenet", "module_used_twice", "lstm", "fewer_parameters_than_examples"]


def operator(matrix, **options) -> fl.Operator:
    return fl.Operator(lambda v: matrix @ v, len(matrix), matrix.dtype, block=True, **options)


def check_block(part, block, vectors_at=None):
    """One entry of a result against the matrix of its block."""
    truth = reference.spectrum(block).numpy()
    values = part["eigenvalue"].dropna("rank").values
    scale = max(truth[0], 1e-300)
    assert len(values) <= len(truth)
    assert np.abs(values - truth[: len(values)]).max() < 1e-12 * scale
    assert np.abs(truth[len(values) :]).max(initial=0.0) < 1e-12 * scale
    assert float(part["trace"]) == pytest.approx(truth.sum(), rel=1e-10, abs=1e-300)
    above = part["above_noise"].values
    assert np.array_equal(above[: len(values)], values > float(part["noise_floor"]))
    assert not above[len(values) :].any()
    assert int(part["num_above_noise"]) == above.sum() <= int(part["rank_bound"])
    if vectors_at is not None:
        x = torch.from_numpy(part["eigenvector"].values[above])
        lam = torch.from_numpy(part["eigenvalue"].values[above])
        inside = x[:, vectors_at]
        assert error(inside @ inside.T, torch.eye(len(inside), dtype=x.dtype)) < 1e-7
        assert error(inside @ block, lam[:, None] * inside) < 1e-9
        assert np.isnan(np.delete(x.numpy(), vectors_at.numpy(), axis=1)).all()
        residual = torch.linalg.vector_norm(inside @ block - lam[:, None] * inside, dim=1).numpy()
        assert (residual <= 3 * part["residual_norm"].values[above] + 1e-14 * scale).all()


@pytest.mark.parametrize("scheme", ["unit", "input", "parameter", "kernel", "diagonal"])
@pytest.mark.parametrize("name", NAMES)
def test_by_scheme(name, scheme, unchanged):
    c = case(name)
    F = c.fisher()
    parts = fl.partition(F, scheme)
    with unchanged(c.model):
        ds = fl.spectrum(F, by=scheme, vectors=scheme != "diagonal")
    assert ds["eigenvalue"].dims == ("block", "rank")
    assert list(ds["block"].values) == list(parts.labels)
    assert list(ds["layer"].values) == [name or "(several)" for name in parts.layers]
    assert list(ds["size"].values) == list(parts.sizes)
    for b, index in enumerate(parts.blocks):
        check_block(ds.isel(block=b), c.matrix[index][:, index], None if scheme == "diagonal" else index)
    assert ds["trace"].values.sum() == pytest.approx(c.matrix.trace().item())
    assert json.loads(ds.attrs["settings"])["by"] == scheme


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_by_a_partition_or_a_dict_of_ones_own(kind):
    c = case("mlp_tanh", kind)
    F = c.fisher()
    random = fl.partition(F, "random", size=10, seed=3)
    own = {"front": range(30), "back": range(30, F.n_params)}
    for by, parts in ((random, random), (own, fl.partition(F, own))):
        ds = fl.spectrum(F, by=by, vectors=True)
        for b, index in enumerate(parts.blocks):
            check_block(ds.isel(block=b), c.matrix[index][:, index], index)
    assert json.loads(fl.spectrum(F, by=random).attrs["settings"])["by"] == {"scheme": "random", "size": 10, "seed": 3}
    assert list(ds["block"].values) == ["front", "back"]
    assert ds["layer"].values[1] == "(several)"


def test_scheme_layer_as_a_partition_has_blocks_without_the_whole():
    F = case("mlp_tanh").fisher()
    ds, named = fl.spectrum(F, by=fl.partition(F, "layer")), fl.spectrum(F, by="layer")
    assert list(ds["block"].values) == list(F.layout.layer_names)
    assert list(named["layer"].values) == [*F.layout.layer_names, "all"]
    shared = named.isel(layer=slice(0, -1), rank=slice(0, ds.sizes["rank"]))["eigenvalue"].values
    both = np.isfinite(ds["eigenvalue"].values) & np.isfinite(shared)
    assert np.allclose(ds["eigenvalue"].values[both], shared[both], rtol=0, atol=1e-13)


def test_blocks_of_a_hessian():
    c = case("conv_groups")
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    matrix = H.dense()
    ds = fl.spectrum(H, by="unit")
    parts = fl.partition(H, "unit")
    for b, index in enumerate(parts.blocks):
        truth = torch.linalg.eigvalsh(matrix[index][:, index]).flip(0).numpy()
        part = ds.isel(block=b)
        assert np.abs(part["eigenvalue"].dropna("rank").values - truth).max() < 1e-12 * np.abs(truth).max()
        floor = float(part["noise_floor"])
        assert np.array_equal(
            part["above_noise"].values[: len(truth)], np.abs(part["eigenvalue"].dropna("rank").values) > floor
        )
    assert (ds["eigenvalue"].min() < 0).item()


# --- approximations and operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["layer", "unit", "diagonal"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups"])
def test_block_diagonal_by_its_blocks(name, scheme):
    c = case(name)
    F = c.fisher()
    B = fl.BlockDiagonal(F, scheme)
    truth = reference.spectrum(B.dense()).numpy()
    ds = fl.spectrum(B)
    values = ds["eigenvalue"].values
    assert np.abs(values - truth[: len(values)]).max() < 1e-12 * truth[0]
    assert np.abs(truth[len(values) :]).max(initial=0.0) < 1e-12 * truth[0]
    assert float(ds["trace"]) == pytest.approx(truth.sum())
    assert "blocks" in ds.attrs["method"]
    assert ds.attrs["n_params"] == F.n_params
    by_layer = fl.spectrum(B, by="layer")
    assert list(by_layer["layer"].values) == [*F.layout.layer_names, "all"]
    for layer in F.layout.layers:
        at = slice(layer.start, layer.stop)
        own = reference.spectrum(B.dense()[at, at]).numpy()
        found = by_layer["eigenvalue"].sel(layer=layer.name).dropna("rank").values
        assert np.abs(found - own[: len(found)]).max() < 1e-12 * own[0]
    # a partition that cuts its blocks goes through the matrix
    finer = fl.spectrum(B, by=fl.partition(F, "sequential", size=7))
    for b, index in enumerate(fl.partition(F, "sequential", size=7).blocks):
        own = reference.spectrum(B.dense()[index][:, index]).numpy()
        assert np.abs(finer["eigenvalue"].values[b][: len(own)] - own).max() < 1e-12 * truth[0]
    with_vectors = fl.spectrum(B, vectors=True)
    good = with_vectors["above_noise"].values
    x, lam = (
        torch.from_numpy(with_vectors["eigenvector"].values[good]),
        torch.from_numpy(with_vectors["eigenvalue"].values[good]),
    )
    assert error(x @ B.dense(), lam[:, None] * x) < 1e-9


def test_plain_operators():
    matrix = low_rank(40, 6)
    truth = reference.spectrum(matrix).numpy()
    ds = fl.spectrum(operator(matrix, psd=True), vectors=True)
    assert np.abs(ds["eigenvalue"].values - truth).max() < 1e-12 * truth[0]
    assert ds["num_above_noise"].item() == 6
    assert ds.attrs["num_matvecs"] == 80
    assert "param_name" not in ds.coords
    indefinite = operator(matrix - 3 * torch.eye(40, dtype=torch.float64))
    ds = fl.spectrum(indefinite)
    assert ds["num_above_noise"].item() == 40
    assert ds.attrs["num_matvecs"] == 40
    assert ds["eigenvalue"].values[-1] == pytest.approx(-3)
    damped = case("mlp_tanh").fisher().damped(0.1)
    shifted = fl.spectrum(damped)["eigenvalue"].values
    assert np.allclose(shifted, reference.spectrum(case("mlp_tanh").matrix).numpy() + 0.1)


def test_a_callable_may_answer_in_one_tensor_of_its_own():
    d, answer = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), torch.empty(3, dtype=torch.float64)
    A = fl.Operator(lambda v: torch.mul(v, d, out=answer), 3)
    assert torch.equal(A @ torch.eye(3, dtype=torch.float64), torch.diag(d))
    assert fl.spectrum(A)["eigenvalue"].values.tolist() == [3.0, 2.0, 1.0]
    with torch.inference_mode():
        assert float(fl.estimate_trace(A, method="hutchinson")["trace"]) == pytest.approx(6.0, rel=1e-12)


def test_operators_that_are_refused():
    skew = torch.tensor([[1.0, 5.0], [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(
        InputError, match=r"must be symmetric; its entries \(i, j\) and \(j, i\) differ by up to 5\.0e\+00"
    ):
        fl.spectrum(operator(skew))
    with pytest.raises(NonFiniteError, match="The callable of the operator gave NaN"):
        fl.spectrum(fl.Operator(lambda v: v / 0, 3))
    d = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for block in (False, True):
        inplace = fl.Operator(lambda v, b=block: v.mul_(d[:, None] if v.ndim == 2 else d), 3, block=block)
        for function in (fl.spectrum, fl.estimate_trace, fl.spectral_density, lambda A: fl.top_eigenvalues(A, 1)):
            with pytest.raises(
                InputError, match=r"The callable of the operator wrote into the vector that it was given"
            ):
                function(inplace)
    with pytest.raises(InputError, match=r"by= cuts named parameters into blocks, but Operator has no layout"):
        fl.spectrum(operator(skew), by="unit")
    with pytest.raises(TypeError, match=r"Expected a fisherlens\.Fisher, one of its approximations, or fl\.Operator"):
        fl.spectrum(skew)
    large = fl.Operator(lambda v: v, 5001)
    with pytest.raises(
        MemoryBudgetError, match=r"takes 5001 products.*the cap is 5000 parameters\. fl\.top_eigenvalues"
    ):
        fl.spectrum(large)


# --- memory, precision, fallback -------------------------------------------------------------------------------------


def test_budget_of_blocks():
    F = case("lenet").fisher()
    F.memory = 10**5
    with pytest.raises(MemoryBudgetError, match=r"partition 'layer' need|and their eigenvectors take .*vectors=False"):
        fl.spectrum(F, by="unit", vectors=True)
    F.memory, F.scores.rows = 10**6, 5000
    F.layout = type("Layout", (), {"n_params": 3000, "layer_names": ("0",)})()
    with pytest.raises(MemoryBudgetError, match=r"kind='mc' with one column each.*fl\.top_eigenvalues\(F, k\) finds"):
        fl.spectrum(F)


def test_how_far_float32_can_be_trusted():
    single, double = fl.spectrum(in_float32("mlp_tanh")), fl.spectrum(case("mlp_tanh").fisher())
    text = single.attrs["precision"]
    known, total = single["num_above_noise"].item(), single.sizes["rank"]
    assert text.startswith("entries in float32: absolute error up to the noise floor (at most ")
    assert f"{known} of {total} eigenvalues stand above it" in text
    assert "model.double()" in text
    assert "model.double()" not in double.attrs["precision"]
    # and it is true
    gap = np.abs(single["eigenvalue"].values - double["eigenvalue"].values)
    assert (gap <= single["residual_norm"].values + 5e-7 * double["eigenvalue"].values[0]).all()


@pytest.mark.parametrize("solver", ["eigvalsh", "eigh"])
@pytest.mark.parametrize("rank", [0, 1, 6])
def test_a_failing_eigensolver_falls_back_to_the_cpu(monkeypatch, solver, rank):
    """CUDA's has failed on low rank, zero and ill-conditioned matrices: just what a Fisher is."""
    matrix = low_rank(6, max(rank, 1)) * (rank > 0)
    honest, calls = getattr(torch.linalg, solver), 0

    def failing(x):
        nonlocal calls
        calls += 1
        if calls == 1:
            message = "linalg.eigh: (Batch element 0): The algorithm failed to converge"
            raise torch.linalg.LinAlgError(message)
        assert x.dtype == torch.float64
        assert x.device.type == "cpu"
        return honest(x)

    monkeypatch.setattr(torch.linalg, solver, failing)
    with pytest.warns(
        NumericalWarning, match=r"The eigensolver on cpu failed for .*; computed on the CPU in float64 instead"
    ):
        ds = fl.spectrum(operator(matrix, psd=True), vectors=solver == "eigh")
    assert calls == 2
    monkeypatch.undo()
    truth = torch.linalg.eigvalsh(matrix).flip(0).numpy()
    assert np.abs(ds["eigenvalue"].values - truth).max() <= 1e-13 * max(truth[0], 1.0)
    assert dense.eigenvalues(matrix).shape == (6,)
