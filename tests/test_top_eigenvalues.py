"""Leading, smallest and generalised eigenvalues: against the reference on every network, within their own bounds, and honest about what is missing."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from fisher_checks import KINDS, QUIET, ZOO, case, error, in_float32
from matrices import low_rank, sample
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import ConvergenceWarning, InputError, MemoryBudgetError
from fisherlens.spectrum import ends

pytestmark = pytest.mark.filterwarnings(QUIET)
SOME = ["fewer_parameters_than_examples", "mlp_tanh", "conv_groups", "lenet", "segmentation", "lstm"]
WHICH = ("largest", "smallest", "magnitude")


def operator(matrix: Tensor, *, psd: bool = True, block: bool = True) -> fl.Operator:
    return fl.Operator(lambda v: matrix @ v, len(matrix), matrix.dtype, block=block, psd=psd)


def wanted(truth: np.ndarray, k: int, which: str, floor: float, psd: bool) -> np.ndarray:
    """The eigenvalues that ``which`` means, descending, from all of them."""
    if which == "largest":
        return truth[:k]
    if which == "magnitude":
        return np.sort(truth[np.argsort(-np.abs(truth), kind="stable")[:k]])[::-1]
    if not psd:
        return truth[len(truth) - min(k, len(truth)) :]
    above, below = truth[truth > floor], truth[truth <= floor]
    found = above[-k:]
    return np.concatenate([found, below[: k - len(found)]])


def within(ds: Any, truth: np.ndarray) -> bool:
    return bool(((ds["lower"].values <= truth) & (truth <= ds["upper"].values)).all())


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), [*((name, "auto") for name in ZOO), *((name, "lanczos") for name in SOME)])
def test_every_network(name, method, unchanged):
    c = case(name)
    F = c.fisher()
    truth = reference.spectrum(c.matrix).numpy()
    for which in WHICH:
        with unchanged(c.model):
            ds = fl.top_eigenvalues(F, 5, which=which, method=method)
        expected = wanted(truth, 5, which, float(ds["noise_floor"]), True)
        assert ds.sizes == {"rank": min(5, F.n_params)}
        assert within(ds, expected), which
        assert ds["converged"].values.all()
        assert (np.diff(ds["eigenvalue"].values) <= 0).all()
        top = max(truth[0], 1e-300)
        assert np.abs(ds["eigenvalue"].values - expected).max() < 1e-9 * top
        assert np.array_equal(ds["above_noise"].values, ds["eigenvalue"].values > float(ds["noise_floor"]))
        assert int(ds["num_above_noise"]) == ds["above_noise"].values.sum()
        assert int(ds["rank_bound"]) == F.rank_bound
        assert float(ds["trace"]) == pytest.approx(truth.sum(), rel=1e-10, abs=1e-300)
        assert ds.attrs["which"] == which


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SOME)
def test_eigenvectors(name, kind):
    c = case(name, kind)
    F = c.fisher()
    truth = reference.spectrum(c.matrix)
    for which, method in (("largest", "lanczos"), ("largest", "exact"), ("smallest", "auto")):
        ds = fl.top_eigenvalues(F, 4, which=which, method=method, vectors=True)
        assert ds["eigenvector"].dims == ("rank", "param")
        above = ds["above_noise"].values
        x, lam = torch.from_numpy(ds["eigenvector"].values[above]), torch.from_numpy(ds["eigenvalue"].values[above])
        assert error(x @ x.T, torch.eye(len(x), dtype=x.dtype)) < 1e-9
        residual = torch.linalg.vector_norm(x @ c.matrix - lam[:, None] * x, dim=1).numpy()
        assert (residual <= ds["residual_norm"].values[above] + 1e-14 * truth[0].item()).all()
        assert residual.max() < 1e-6 * truth[0].item()
        assert np.isnan(ds["eigenvector"].values[~above]).all()
        assert list(ds["param_name"].values) == list(F.layout.parameter_labels())
        assert list(ds["param_layer"].values) == list(F.layout.parameter_layers())


@pytest.mark.parametrize("method", ["auto", "lanczos", "exact"])
@pytest.mark.filterwarnings("ignore:The smallest eigenvalues above zero are in doubt")
@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "fewer_parameters_than_examples"])
def test_float32_stays_within_its_bounds(name, method):
    F = in_float32(name)
    truth = reference.spectrum(F.dense().double()).numpy()
    for which in ("largest", "smallest"):
        ds = fl.top_eigenvalues(F, 6, which=which, method=method, vectors=True)
        expected = wanted(truth, 6, which, float(ds["noise_floor"]), True)
        assert within(ds, expected)
        assert ds["converged"].values.all()
        assert (ds["upper"] - ds["lower"]).max() < 1e-4 * truth[0]


def test_every_path_of_the_scores(monkeypatch):
    """Kept, linearised and streamed scores, ignored positions included."""
    model, (x, y), likelihood = ZOO["segmentation"]()
    y = y.clone()
    y[0, 0, :2] = -100
    truth = reference.spectrum(reference.fisher(model, (x, y), likelihood)).numpy()
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    paths = set()
    held = fl.Fisher(model, batches, likelihood=likelihood).plan.nbytes
    for memory, graphs in (("2GiB", 1), (held // 3, 1e-9), (held // 3, 1e9)):
        monkeypatch.setattr("fisherlens.scores.plan._GRAPHS", graphs)  # whether the graph of the network fits
        monkeypatch.setattr("fisherlens.scores.plan._SLOW_TWICE", frozenset())
        F = fl.Fisher(model, batches, likelihood=likelihood, memory=memory)
        paths |= {entry.path for entry in F.plan}
        for method in ("auto", "lanczos"):
            ds = fl.top_eigenvalues(F, 4, method=method, vectors=True)
            assert within(ds, truth[:4])
            assert np.abs(ds["eigenvalue"].values - truth[:4]).max() < 1e-9 * truth[0]
    assert paths >= {"streamed", "linearised"}


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups"])
def test_hessian_at_both_ends(name):
    c = case(name)
    H = fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    truth = np.linalg.eigvalsh(H.dense().numpy())[::-1]
    for which in WHICH:
        for method in ("auto", "lanczos"):
            ds = fl.top_eigenvalues(H, 5, which=which, method=method, vectors=True)
            assert within(ds, wanted(truth, 5, which, 0.0, False))
            x = torch.from_numpy(ds["eigenvector"].values)
            gap = (H @ x.T).T - torch.from_numpy(ds["eigenvalue"].values)[:, None] * x
            assert np.allclose(gap.norm(dim=1).numpy(), ds["residual_norm"].values, atol=1e-13)
    assert fl.top_eigenvalues(H, 1, which="smallest")["eigenvalue"].item() < 0
    assert "trace" not in ds


# --- random matrices -------------------------------------------------------------------------------------------------


def check_random(i: int, indefinite: bool) -> None:
    s = sample(i, indefinite=indefinite)
    op = operator(s.matrix, psd=s.psd, block=bool(i % 2))
    truth = s.truth.numpy()
    for which in WHICH:
        ds = fl.top_eigenvalues(op, s.k, which=which, seed=i, vectors=bool(i % 3), max_matvecs=4000)
        floor = float(ds["noise_floor"])
        if which == "smallest" and s.psd and (np.abs(truth - floor) < 20 * s.n**0.5 / s.n * floor).any():
            continue  # an eigenvalue at the floor may fall on either side
        assert len(ds["eigenvalue"]) == min(s.k, s.n)
        assert within(ds, wanted(truth, s.k, which, floor, s.psd)), (i, which)
        assert ds["converged"].values.all(), (i, which)


@pytest.mark.filterwarnings("ignore:The smallest eigenvalues above zero are in doubt")
@pytest.mark.parametrize("indefinite", [False, True])
def test_random_matrices(indefinite):
    for i in range(25):
        check_random(i, indefinite)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The smallest eigenvalues above zero are in doubt")
@pytest.mark.parametrize("indefinite", [False, True])
def test_300_random_matrices(indefinite):
    for i in range(300):
        check_random(i, indefinite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [60, 200])
def test_rank_four(n, dtype):
    """Four values above the floor, the others zero to rounding: not copies, and nothing that was never there."""
    matrix = low_rank(n, 4, dtype)
    truth = torch.linalg.eigvalsh(matrix.double()).flip(0).numpy()
    ds = fl.top_eigenvalues(operator(matrix), 10)
    assert ds["above_noise"].values.tolist() == [True] * 4 + [False] * 6
    assert within(ds, truth[:10])
    assert (np.abs(ds["eigenvalue"].values[4:]) < float(ds["noise_floor"])).all()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small = fl.top_eigenvalues(operator(matrix), 3, which="smallest")
    # float32 hides what float64 would show; in float64 the question does not arise
    assert [type(w.message) for w in caught] == [fl.NumericalWarning] * (dtype == torch.float32)
    if caught:
        text = rf"in doubt: the rank may be larger by {n - 4}, but nothing below the noise floor .* in float32\. Build .*model\.double"
        assert re.search(text, str(caught[0].message))
    assert np.allclose(small["eigenvalue"].values, truth[1:4], rtol=1e-4 if dtype == torch.float32 else 1e-10)


def test_zero_operator_and_known_rank():
    ds = fl.top_eigenvalues(operator(torch.zeros(20, 20, dtype=torch.float64)), 4)
    assert (ds["eigenvalue"].values == 0).all()
    assert not ds["above_noise"].values.any()
    F = case("one_class").fisher()
    ds = fl.top_eigenvalues(F, 4, vectors=True)
    assert F.rank_bound == 0
    for name in ("eigenvalue", "residual_norm", "lower", "upper"):
        assert (ds[name].values == 0).all()
    assert ds["converged"].values.all()
    assert np.isnan(ds["eigenvector"].values).all()
    assert ds.attrs["num_matvecs"] == 0
    # rank 2 of a softmax with 3 classes on one example: what is beyond is an exact zero, not computed
    x, y = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.tensor([1])
    model = nn.Linear(4, 3).double()
    one = fl.Fisher(model, (x, y), likelihood="categorical")
    ds = fl.top_eigenvalues(one, 6)
    assert ds["above_noise"].values.tolist() == [True, True, False, False, False, False]
    assert (ds["eigenvalue"].values[2:] == 0).all()


def test_values_are_rayleigh_quotients():
    """The value belongs to its vector, also where the run was cut short: no momentum, no recurrence in between."""
    matrix = operator(torch.diag(torch.linspace(0, 236.51, 500, dtype=torch.float64)), block=True)
    with pytest.warns(ConvergenceWarning):
        ds = fl.top_eigenvalues(matrix, 3, max_matvecs=40, vectors=True)
    x = torch.from_numpy(ds["eigenvector"].values)
    assert torch.allclose((x * (matrix @ x.T).T).sum(1), torch.from_numpy(ds["eigenvalue"].values), rtol=1e-12)
    residual = (matrix @ x.T).T - torch.from_numpy(ds["eigenvalue"].values)[:, None] * x
    assert np.allclose(residual.norm(dim=1), ds["residual_norm"])
    assert not ds["converged"].values.all()


# --- cost ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", WHICH)
def test_products_are_counted(which):
    spent = 0
    matrix = torch.diag(torch.linspace(0.1, 3, 150, dtype=torch.float64) ** 2)

    def product(v: Tensor) -> Tensor:
        nonlocal spent
        spent += v.shape[1]
        return matrix @ v

    ds = fl.top_eigenvalues(fl.Operator(product, 150, block=True, psd=True), 3, which=which)
    assert ds.attrs["num_matvecs"] == spent
    if which == "smallest":
        assert spent == 153  # the matrix and the check
        assert "dense matrix" in ds.attrs["method"]
    else:
        assert spent < 120
        assert "block Lanczos with thick restart" in ds.attrs["method"]


def test_a_gram_matrix_that_costs_less_is_used(monkeypatch):
    F = case("mlp_tanh").fisher()
    ds = fl.top_eigenvalues(F, 3)
    assert ds.attrs["method"] == "exact: eigenvalues of the Gram matrix in float64"
    assert ds.attrs["num_matvecs"] == 3  # the residuals
    assert "dense" in fl.top_eigenvalues(case("fewer_parameters_than_examples").fisher(), 3).attrs["method"]
    assert "score rows (order 14)" in fl.top_eigenvalues(F, 3, method="lanczos").attrs["method"]
    # beyond small orders: by cost, and Lanczos on the matrix rather than all of its eigenvalues
    monkeypatch.setattr(ends, "_SMALL", 5)
    monkeypatch.setattr(ends, "_ALL", 5)
    truth = reference.spectrum(case("mlp_tanh").matrix).numpy()
    for name, truth in ((name, reference.spectrum(case(name).matrix).numpy()) for name in SOME):
        F = case(name).fisher()
        for which in WHICH:
            ds = fl.top_eigenvalues(F, 4, which=which, vectors=True)
            expected = wanted(truth, 4, which, float(ds["noise_floor"]), True)
            assert within(ds, expected)
            assert ds["converged"].values.all()
        assert F.n_params < 6 or ds.attrs["method"].startswith(("Lanczos on the", "block Lanczos"))
    methods = {fl.top_eigenvalues(case(name).fisher(), 4).attrs["method"] for name in ZOO}
    assert any(method.startswith("Lanczos on the Gram matrix") for method in methods)


def test_the_low_end_by_lanczos_where_no_matrix_fits(monkeypatch):
    """On the side of the score rows, zeros passed over; and an unreachable end is flagged, not invented."""
    F = case("mlp_tanh").fisher()
    monkeypatch.setattr(ends, "smaller_matrix", _no_room)
    truth = reference.spectrum(case("mlp_tanh").matrix).numpy()
    ds = fl.top_eigenvalues(F, 3, which="smallest")
    assert "block Lanczos" in ds.attrs["method"]
    assert within(ds, wanted(truth, 3, "smallest", float(ds["noise_floor"]), True))
    spread = torch.diag(torch.logspace(0, -9, 800, dtype=torch.float64))
    with pytest.warns(ConvergenceWarning, match=r"0 of 2 eigenpairs converged.*about √\(λ_max/λ_min\) products"):
        ds = fl.top_eigenvalues(operator(spread), 2, which="smallest", max_matvecs=100)
    assert not ds["converged"].values.any()
    # some eigenvalue lies within each interval all the same
    values = spread.diagonal().numpy()
    for low, high in zip(ds["lower"].values, ds["upper"].values, strict=True):
        assert ((low <= values) & (values <= high)).any()


def _no_room(view: Any) -> None:
    message = "does not fit"
    raise MemoryBudgetError(message)


def test_large_orders_take_some_eigenvectors_only(monkeypatch):
    monkeypatch.setattr(ends, "_ALL", 5)
    monkeypatch.setattr(ends, "_SMALL", 5)
    c = case("mlp_tanh")
    truth = reference.spectrum(c.matrix).numpy()
    for which in WHICH:
        ds = fl.top_eigenvalues(c.fisher(), 4, which=which, method="exact", vectors=True)
        assert within(ds, wanted(truth, 4, which, float(ds["noise_floor"]), True))


# --- budget and interruption -----------------------------------------------------------------------------------------


def test_a_budget_that_runs_out():
    matrix = torch.diag(torch.linspace(1, 2, 300, dtype=torch.float64))
    for budget in (2, 9, 40):
        with pytest.warns(
            ConvergenceWarning, match=rf"of 6 eigenpairs converged to tol=1e-06 \(the budget is {budget} products\)"
        ):
            ds = fl.top_eigenvalues(operator(matrix), 6, max_matvecs=budget)
        assert ds.attrs["num_matvecs"] <= budget
        assert ds.sizes["rank"] == 6
        known = np.isfinite(ds["eigenvalue"].values)
        assert known.any()
        assert not ds["converged"].values[~known].any()
        assert not ds["above_noise"].values[~known].any()
        assert (ds["eigenvalue"].values[known] <= 2).all()


def test_control_c():
    matrix, calls = torch.diag(torch.linspace(1, 2, 300, dtype=torch.float64)), 0

    def product(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return matrix @ v

    with pytest.warns(ConvergenceWarning, match=r"of 4 eigenpairs converged to tol=1e-06 \(Ctrl-C ended the run\)"):
        ds = fl.top_eigenvalues(fl.Operator(product, 300, block=True), 4)
    assert not ds["converged"].values.all()
    assert np.isfinite(ds["residual_norm"].values).all()


def test_a_tolerance_that_is_tighter_costs_more():
    matrix = torch.diag(torch.arange(1, 400, dtype=torch.float64) ** -1.0)
    loose, tight = (fl.top_eigenvalues(operator(matrix), 4, tol=tol) for tol in (1e-2, 1e-11))
    assert loose.attrs["num_matvecs"] < tight.attrs["num_matvecs"]
    assert (tight["residual_norm"] <= 1e-11 + 1e-13).all()
    assert within(loose, matrix.diagonal()[:4].numpy())
    # below the rounding error of float32 the tolerance cannot be met, and convergence means that much
    single = fl.top_eigenvalues(operator(matrix.float()), 4, tol=1e-12)
    assert single["converged"].values.all()
    assert within(single, matrix.float().diagonal()[:4].double().numpy())


# --- the generalised problem -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pair", "damping", "object"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups"])
def test_pencil_with_a_block_diagonal(name, form):
    """The spectrum of a preconditioned Fisher: A = F, B = its blocks + λ."""
    c = case(name)
    F, lam = c.fisher(), 1e-2
    blocks = fl.BlockDiagonal(F, "unit")
    dense = blocks.dense() + lam * torch.eye(F.n_params, dtype=F.dtype)

    class Damped:
        shape = F.shape

        def __matmul__(self, v: Tensor) -> Tensor:
            return (blocks @ v) + lam * v

        def solve(self, v: Tensor) -> Tensor:
            return blocks.solve(v, lam)

    B = {"pair": {"B": (blocks, lam)}, "damping": {"B": blocks, "damping": lam}, "object": {"B": Damped()}}[form]
    truth, vectors = scipy.linalg.eigh(c.matrix.numpy(), dense.numpy())
    truth = truth[::-1]
    for which in ("largest", "smallest", "magnitude"):
        ds = fl.top_eigenvalues(F, 4, which=which, vectors=True, **B)
        expected = wanted(truth, 4, which, float(ds["noise_floor"]), True)
        assert within(ds, expected), which
        assert np.abs(ds["eigenvalue"].values - expected).max() < 1e-7 * truth[0]
        assert ds["converged"].values.all()
        x = torch.from_numpy(ds["eigenvector"].values)
        assert error(x @ dense @ x.T, torch.eye(4, dtype=x.dtype)) < 1e-9
        residual = c.matrix @ x.T - dense @ x.T * torch.from_numpy(ds["eigenvalue"].values)
        dual = (residual * torch.linalg.solve(dense, residual)).sum(0).sqrt().numpy()
        assert np.allclose(dual, ds["residual_norm"].values, rtol=0.1, atol=1e-12)
    assert ds["eigenvalue"].attrs["units"] == "1"
    assert ds.attrs["problem"] == "A x = λ B x"
    assert len(vectors) == F.n_params


def test_pencil_with_a_damped_fisher_and_a_hessian():
    c = case("mlp_tanh")
    F, H = c.fisher(), fl.Fisher(c.model, c.data, likelihood=c.likelihood, kind="hessian")
    dense = F.dense() + 0.1 * torch.eye(F.n_params, dtype=F.dtype)
    truth = scipy.linalg.eigh(H.dense().numpy(), dense.numpy(), eigvals_only=True)[::-1]
    for which in ("largest", "smallest"):
        for B in (F.damped(0.1), (F, 0.1)):
            ds = fl.top_eigenvalues(H, 3, which=which, B=B)
            assert within(ds, wanted(truth, 3, which, 0.0, False))


def test_a_wrong_b():
    c = case("mlp_tanh")
    F = c.fisher()
    blocks = fl.BlockDiagonal(F, "layer")
    with pytest.raises(InputError, match=r"B=BlockDiagonal is only semi-definite and solves with a damping"):
        fl.top_eigenvalues(F, 2, B=blocks)
    with pytest.raises(InputError, match=r"damping=0.1 belongs to B .*got B=None"):
        fl.top_eigenvalues(F, 2, damping=0.1)
    with pytest.raises(InputError, match=r"give the damping once"):
        fl.top_eigenvalues(F, 2, B=(blocks, 0.1), damping=0.1)
    with pytest.raises(InputError, match=r"damping must be a finite number > 0; got -1"):
        fl.top_eigenvalues(F, 2, B=(blocks, -1))
    with pytest.raises(TypeError, match=r"B must be an approximation with a damping.*got Tensor"):
        fl.top_eigenvalues(F, 2, B=torch.eye(F.n_params))
    other = fl.BlockDiagonal(case("conv_groups").fisher(), "layer")
    with pytest.raises(InputError, match=r"B must be of the same parameters as F; got \d+ for"):
        fl.top_eigenvalues(F, 2, B=(other, 0.1))
    with pytest.raises(InputError, match=r"by= cuts F into blocks, but B couples them"):
        fl.top_eigenvalues(F, 2, B=(blocks, 0.1), by="layer")
    with pytest.raises(InputError, match=r"method='exact' does not know B"):
        fl.top_eigenvalues(F, 2, B=(blocks, 0.1), method="exact")
