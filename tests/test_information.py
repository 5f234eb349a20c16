"""Information by parameter, unit, channel and layer, against dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import make_case
from fisher_checks import KINDS, QUIET, case
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError

pytestmark = pytest.mark.filterwarnings(QUIET)
BY = {
    "layer": ("layer", "layer"),
    "unit": ("unit", "unit"),
    "channel": ("channel", "channel"),
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


def test_what_is_refused(monkeypatch):
    F = case("mlp_tanh").fisher()
    for by in ("units", None, 3):
        with pytest.raises(InputError, match=r"Unknown option by= .*Known: 'parameter', 'unit', 'channel', 'layer'"):
            fl.information(F, by)
    with pytest.raises(InputError, match="damping must be a finite number > 0"):
        fl.information(F, damping=0)
    monkeypatch.setattr("fisherlens.fisher.solve.DIRECT_LIMIT", 5)
    with pytest.raises(MemoryBudgetError, match=r"needs a Cholesky factor of order 14; the limit is"):
        fl.information(F)
