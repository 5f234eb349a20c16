"""Information by parameter, unit, channel and layer, against dense matrices."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
import xarray as xr
from cases import make_case
from fisher_checks import KINDS, QUIET, case
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import ConvergenceWarning, InputError, MemoryBudgetError

pytestmark = pytest.mark.filterwarnings(QUIET)
BY = {
    "layer": ("layer", "layer"),
    "unit": ("unit", "unit"),
    "channel": ("channel", "channel"),
    "kernel": ("kernel", "kernel"),
    "filter": ("kernel", "kernel"),
    "parameter": ("param", "diagonal"),
}
NAMES = [
    "fewer_parameters_than_examples",
    "mlp_tanh",
    "conv_groups",
    "lenet",
    "batchnorm_first",
    "frozen_first_layer",
    "root_parameter",
]


def check(F: fl.Fisher, T: torch.Tensor, by: str, damping: float, rel: float = 1e-8) -> None:
    dim, scheme = BY[by]
    ds = fl.information(F, by, damping=damping)
    blocks = list(fl.partition(F, scheme).blocks)
    expected = reference.information(T, F.parameters.to(T), blocks, damping, F.n_data)
    for name, value in expected.items():
        assert ds[name].dims == (dim,)
        assert np.allclose(ds[name], value, rtol=rel, atol=1e-12), name
    np.testing.assert_allclose(
        ds["determined"], reference.determined(T, blocks, damping), rtol=rel, atol=1e-8 if rel < 1e-6 else 1e-5
    )
    assert float(ds["determined"].sum()) == pytest.approx(reference.effective_dimension(T, damping), rel=10 * rel)
    assert list(ds["num_dead"].values) == [(T.diagonal()[b] == 0).sum() for b in blocks]
    for name in ("std_bound_sem", "determined_sem", "effective_dimension_sem"):
        assert (ds[name] == 0).all()
    assert list(ds["size"].values) == [len(b) for b in blocks]
    assert np.array_equal(ds["dead"], np.array([T[b][:, b].trace().item() == 0 for b in blocks]))
    assert ds["share"].sum().item() == pytest.approx(1)
    assert ds.attrs["damping"] == damping


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize("name", NAMES)
def test_every_part(name, by, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        check(F, c.matrix, by, 0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    c = case("mlp_tanh", kind)
    check(c.fisher(), c.matrix, "unit", 0.1)
    check(c.fisher(), c.matrix, "parameter", 1e-3)


def test_coordinates_carry_the_names():
    F = case("mlp_tanh").fisher()
    ds = fl.information(F, "parameter")
    assert list(ds["param_name"].values) == list(F.layout.parameter_labels())
    assert list(ds["layer"].values) == list(F.layout.parameter_layers())
    assert list(fl.information(F)["layer"].values) == ["0", "2", "4"]
    unit = fl.information(F, "unit")
    assert list(unit["unit"].values) == list(fl.partition(F, "unit").labels)
    assert unit["layer"].values.tolist() == ["0"] * 6 + ["2"] * 4 + ["4"] * 3


def test_of_restricted_operators():
    c = case("lenet")
    F = c.fisher()
    part = F.restrict(["3", "9"])
    index = F.layout.index_of(["3", "9"])
    for by in BY:
        check(part, c.matrix[index][:, index], by, 0.01)


def test_dead_units_are_found():
    """A unit whose activation is zero everywhere tells nothing, and neither does what reads it."""
    model, data, likelihood = make_case(
        "dead", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)
    )
    with torch.no_grad():
        model[0].bias[2] = -1e3
    F = fl.Fisher(model, data, likelihood=likelihood)
    ds = fl.information(F, "unit")
    assert ds["dead"].values.tolist() == [False, False, True, False, False, False, False, False]
    assert ds["effective_dimension"].values[2] == 0
    prior = (1 / (1e-3 * F.n_data)) ** 0.5
    assert ds["std_bound"].values[2] == pytest.approx(prior)
    single = fl.information(F, "parameter")
    assert single["dead"].values.sum() == 5 + 3
    assert (single["std_bound"] <= prior * (1 + 1e-12)).all()


def test_one_class_tells_nothing():
    ds = fl.information(case("one_class").fisher(), "unit")
    assert ds["dead"].values.all()
    assert (ds["share"].values == 0).all()
    assert (ds["effective_dimension"].values == 0).all()


def test_bound_is_reached_by_an_efficient_estimator():
    """Least squares on Gaussian data: the spread of its estimates is the Cramér–Rao width."""
    g = torch.Generator().manual_seed(0)
    model = nn.Linear(3, 1).double().requires_grad_(True)
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.zeros(40, 1, dtype=torch.float64)), likelihood=fl.Gaussian(0.25))
    width = torch.from_numpy(fl.information(F, "parameter", damping=1e-12)["std_bound"].values)
    design = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1)
    noise = 0.5 * torch.randn(40, 4000, generator=g, dtype=torch.float64)
    estimates = torch.linalg.lstsq(design, noise).solution
    assert (estimates.std(1) / width - 1).abs().max() < 0.05


def test_removing_a_parameter_costs_its_saliency():
    """For a linear Gaussian model the divergence of setting one weight to zero is exactly its saliency."""
    model, (x, y), _ = make_case("linear", lambda: nn.Linear(4, 2), (4,), "gaussian", n=9)
    F = fl.Fisher(model, (x, y), likelihood="gaussian")
    saliency = fl.information(F, "parameter")["saliency"].values
    for k in range(F.n_params):
        delta = torch.zeros(F.n_params, dtype=torch.float64)
        delta[k] = -F.parameters[k]
        kl = reference.kl_divergence(model, None, delta, x, "gaussian")
        assert saliency[k] == pytest.approx(kl, rel=1e-10)


def test_float32():
    model, (x, y), likelihood = make_case(
        "single information", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)
    )
    T = reference.fisher(model, (x, y), likelihood)
    F = fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood)
    for by in BY:
        check(F, T, by, 0.01, rel=1e-4)


def test_what_is_refused():
    F = case("mlp_tanh").fisher()
    for by in ("units", None, 3, ["unit"]):
        with pytest.raises(
            InputError, match=r"Unknown option by= .*Known: 'parameter', 'unit', 'kernel', 'filter', 'channel', 'layer'"
        ):
            fl.information(F, by)
    for damping in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="damping must be a finite number > 0"):
            fl.information(F, damping=damping)
    with pytest.raises(
        InputError, match="num_probes must be an integer >= 6, the solves that estimate a diagonal; got 5"
    ):
        fl.information(F, num_probes=5)
    with pytest.raises(InputError, match="seed must be an integer >= 0"):
        fl.information(F, seed=-1)
    with pytest.raises(TypeError, match=r"takes a fisherlens\.Fisher"):
        fl.information(case("mlp_tanh").model)


# --- more than one side can hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("by", ["layer", "unit", "parameter"])
def test_bounds_are_estimated_where_no_factor_fits(by, seed, monkeypatch):
    F = case("lenet").fisher()
    exact = fl.information(F, by, damping=0.01)
    monkeypatch.setattr("fisherlens.fisher.solve.DIRECT_LIMIT", 5)
    F = case("lenet").fisher()
    found = fl.information(F, by, damping=0.01, num_probes=36, seed=seed)
    assert "estimated: diagonal of the damped inverse, 36 solves" in found.attrs["method"]
    for name in ("std_bound", "determined"):
        gap, sem = np.abs(found[name] - exact[name]), found[f"{name}_sem"]
        assert (gap <= 6 * sem + 1e-4 * exact[name].max()).mean() > 0.97, name
    assert (found["std_bound_sem"] > 0).any()
    assert float(np.abs(found["std_bound"] / exact["std_bound"] - 1).mean()) < 0.03
    for name in ("information", "share", "saliency", "effective_dimension", "dead", "size"):
        np.testing.assert_allclose(found[name], exact[name], rtol=1e-8)
    # no estimate leaves the range that F_ii and λ leave
    if by == "parameter":
        diagonal = F.diagonal().numpy()
        least, most = 1 / (diagonal + 0.01), np.full(len(diagonal), 100.0)
        assert (found["std_bound"].values ** 2 * F.n_data >= least * (1 - 1e-12)).all()
        assert (found["std_bound"].values ** 2 * F.n_data <= most * (1 + 1e-12)).all()


def test_a_solve_that_does_not_end_says_so(monkeypatch):
    monkeypatch.setattr("fisherlens.fisher.solve.DIRECT_LIMIT", 5)
    monkeypatch.setattr(sys.modules["fisherlens.information"], "_STEPS", 1)
    with pytest.warns(ConvergenceWarning, match="Conjugate gradients ended after 1 steps"):
        fl.information(case("lenet").fisher(), damping=1e-4)


def test_errors_of_estimates_are_calibrated(monkeypatch):
    """The mean square of (estimate - truth) / sem over seeds is that of Student's t, not more."""
    exact = fl.information(case("mlp_tanh").fisher(), "layer", damping=0.02)["determined"].values
    monkeypatch.setattr("fisherlens.fisher.solve.DIRECT_LIMIT", 5)
    F = case("mlp_tanh").fisher()
    scores = []
    for seed in range(24):
        found = fl.information(F, "layer", damping=0.02, num_probes=10, seed=seed)
        scores.append((found["determined"].values - exact) / found["determined_sem"].values)
    assert 0.4 < np.median(np.abs(scores)) < 1.2


@pytest.mark.parametrize("by", ["layer", "unit", "kernel", "parameter"])
def test_streamed_scores_tell_the_same(by):
    c = case("conv_groups")
    F = c.fisher(memory=2000)
    assert F.plan.streamed
    check(F, c.matrix, by, 0.01)


def test_blocks_come_in_chunks(monkeypatch):
    module = sys.modules["fisherlens.information"]
    monkeypatch.setattr(module, "CHUNK_BYTES", 1)
    c = case("lenet")
    for by in ("unit", "channel", "kernel"):
        check(c.fisher(), c.matrix, by, 0.01)


def test_whole_layers_that_do_not_fit_are_estimated(monkeypatch):
    module = sys.modules["fisherlens.information"]
    monkeypatch.setattr(module, "_ALWAYS", 3)
    c = case("mlp_tanh")
    F, exact = c.fisher(), fl.information(c.fisher(), damping=0.01)
    F.memory = 24 * 10
    found = fl.information(F, damping=0.01)
    assert "estimated by Lanczos quadrature for 0, 2, 4" in found.attrs["method"]
    np.testing.assert_allclose(found["effective_dimension"], exact["effective_dimension"], rtol=1e-6)
    message = "A block of 6 parameters of layer '0' has 6 on its smaller side, and its Cholesky factor would take 864 B with workspace, over the budget of 240 B."
    with pytest.raises(MemoryBudgetError, match=re.escape(message)):
        fl.information(F, "unit")


# --- kernels and tables ------------------------------------------------------------------------------------------------


def test_kernels_know_their_channels():
    c = case("conv_groups")  # 4 channels to 6, in two groups
    F = c.fisher()
    ds = fl.information(F, "filter")
    assert ds.identical(
        fl.information(F, "kernel").assign_attrs(created_at=ds.attrs["created_at"], settings=ds.attrs["settings"])
    )
    own = ds.isel(kernel=ds["out_channel"] >= 0)
    assert list(own["out_channel"].values) == [o for o in range(6) for _ in range(2)]
    assert list(own["in_channel"].values) == [2 * (o // 3) + i for o in range(6) for i in range(2)]
    assert list(own["kernel"].values) == [f"0 kernel {o},{i}" for o in range(6) for i in range(2)]
    T = c.matrix.diagonal()[: 6 * 2 * 9].reshape(6, 2, 9).sum(-1)
    np.testing.assert_allclose(own["information"], T.reshape(-1))
    rest = ds.isel(kernel=ds["out_channel"] < 0)
    assert list(rest["kernel"].values) == ["0.bias", "3 unit 0", "3 unit 1", "3 unit 2"]
    assert (rest["in_channel"] == -1).all()


def test_values_of_parameters():
    F = case("mlp_tanh").fisher()
    ds = fl.information(F, "parameter")
    assert np.array_equal(ds["value"], F.parameters)
    assert "value" not in fl.information(F, "unit")


def test_table_is_sorted():
    F = case("mlp_tanh").fisher()
    ds = fl.information(F, "unit")
    table = fl.information_table(ds, "share", 5)
    order = np.argsort(-ds["share"].values, kind="stable")[:5]
    assert list(table.index) == list(ds["unit"].values[order])
    assert list(table.columns) == ["layer", *ds.data_vars]
    assert list(table["share"]) == list(ds["share"].values[order])
    assert list(table["layer"]) == list(ds["layer"].values[order])
    least = fl.information_table(ds, "std_bound", 2, ascending=True)
    assert list(least["std_bound"]) == sorted(ds["std_bound"].values)[:2]
    single = fl.information_table(fl.information(F, "parameter"), "saliency", 1)
    assert single.index.name == "param_name"
    assert next(iter(fl.information_table(fl.information(F)).columns)) == "information"
    assert len(fl.information_table(fl.information(F))) == 3


def test_table_refuses():
    ds = fl.information(case("mlp_tanh").fisher(), "unit")
    with pytest.raises(TypeError, match=r"^information_table takes the Dataset of fl\.information; got dict\.$"):
        fl.information_table({}, "share")
    with pytest.raises(InputError, match=r"^Unknown variable key= 'shares'\. Did you mean 'share'\?"):
        fl.information_table(ds, "shares")
    with pytest.raises(InputError, match="num must be an integer >= 1, the rows of the table; got 0"):
        fl.information_table(ds, "share", 0)
    steps = xr.concat([ds, ds], dim=xr.Variable("step", [0, 10]), combine_attrs="drop_conflicts")
    with pytest.raises(
        InputError, match=r"sorts along one dim; 'share' runs over \('step', 'unit'\)\. Select one entry"
    ):
        fl.information_table(steps, "share")
    assert len(fl.information_table(steps.isel(step=[1]), "share", 2)) == 2


@pytest.mark.parametrize("damping", [1e-5, 0.1])
@pytest.mark.parametrize("by", ["layer", "unit", "channel", "kernel"])
@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "mlp_no_bias", "frozen_first_layer"])
def test_contractions_and_columns_agree(name, by, damping, monkeypatch):
    c = case(name)
    F = c.fisher()
    assert not F.solver.dense_side
    module = sys.modules["fisherlens.information"]
    asked = []
    columns = type(F.scores.layers[0]).columns
    monkeypatch.setattr(
        type(F.scores.layers[0]), "columns", lambda self, index: asked.append(1) or columns(self, index)
    )
    quick = fl.information(F, by, damping=damping)
    if by in ("layer", "unit") and name.startswith("mlp"):
        assert not asked  # no column of U was formed
    check(F, c.matrix, by, damping)
    monkeypatch.setattr(module, "_CONTRACTED", 0.0)
    slow = fl.information(F, by, damping=damping)
    assert asked
    for key in ("determined", "std_bound"):
        np.testing.assert_allclose(quick[key], slow[key], rtol=1e-8)
