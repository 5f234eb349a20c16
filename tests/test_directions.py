"""Stiff and sloppy directions against eigenvectors of dense matrices."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch
from cases import fill, make_case
from fisher_checks import KINDS, QUIET, case, in_float32
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, NumericalWarning

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = ["fewer_parameters_than_examples", "mlp_tanh", "conv_groups", "lenet", "batchnorm_first"]


def blocks_of(F: fl.Fisher) -> list[torch.Tensor]:
    return [torch.arange(layer.start, layer.stop) for layer in F.layout.layers]


def check(F: fl.Fisher, T: torch.Tensor, ds, rel: float = 1e-8) -> None:
    """Everything that does not depend on the choice of vectors in a cluster, and the vectors where there is none."""
    values, vectors = reference.eigenvectors(T)
    ranks = ds["rank"].values.copy()
    np.testing.assert_allclose(ds["eigenvalue"], values[ranks], rtol=rel)
    np.testing.assert_allclose(ds["share"], reference.share_of_trace(T)[ranks], rtol=rel)
    width = 1 / (F.n_data * (values[ranks] + ds.attrs["damping"])).sqrt()
    np.testing.assert_allclose(ds["std_bound"], width, rtol=rel)
    np.testing.assert_allclose(ds["layer_share"].sum("layer"), 1)
    v = torch.tensor(ds["eigenvector"].values.T)
    # an eigenvector of one matrix is known to the rounding of the other over the gap
    alone = [k for k, rank in enumerate(ranks) if not ds["degenerate"].values[k]]
    tolerance = 1e-14 * values[0].item() if rel < 1e-6 else 1e-7 * values[0].item()
    spread = torch.cat([values.new_tensor([np.inf]), -values.diff(), values.new_tensor([np.inf])])
    gap = torch.minimum(spread[:-1], spread[1:])[ranks]
    for k in alone:
        allowed = 100 * tolerance / gap[k].item() + rel
        truth = vectors[:, ranks[k]]
        truth = truth * truth[truth.abs().argmax()].sign()
        if allowed > 0.05:
            continue
        assert min((v[:, k] - truth).norm(), (v[:, k] + truth).norm()) < allowed
        found, wanted = ds.isel(rank=k), truth[:, None]
        assert (
            np.abs(found["layer_share"].values - reference.block_share(wanted, blocks_of(F))[0].numpy()).max()
            < 2 * allowed
        )
        assert abs(float(found["participation"]) / reference.participation(wanted).item() - 1) < 8 * allowed
    floor = float(ds["noise_floor"])
    assert int(ds["num_above_noise"]) == int((values > floor).sum())
    assert int(ds["null_dimension"]) == len(T) - int(ds["num_above_noise"])
    assert int(ds["num_identifiable"]) == int((values > max(floor, ds.attrs["damping"])).sum())


@pytest.mark.parametrize("name", NAMES)
def test_both_ends_against_the_dense_matrix(name, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        ds = fl.directions(F, 4, damping=0.01, vectors=True)
    check(F, c.matrix, ds)
    assert (ds["residual_norm"] <= 1e-12 * float(ds["eigenvalue"][0])).all()
    floor = float(ds["noise_floor"])
    known = reference.projector(c.matrix, floor)
    np.testing.assert_allclose(ds["leverage"], known.diagonal(), atol=1e-6)
    lives = reference.block_share(known, blocks_of(F)).sum(0)  # tr P = Σ P_ij², as P² = P
    np.testing.assert_allclose(ds["identifiable_dimension"], lives, atol=1e-6)
    np.testing.assert_allclose(ds["identifiable_dimension"].sum(), ds["num_above_noise"])
    np.testing.assert_allclose(ds["null_dimension_of_layer"], ds["layer_size"] - lives.numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind):
    c = case("mlp_tanh", kind)
    check(c.fisher(), c.matrix, fl.directions(c.fisher(), 3, vectors=True))


def test_streamed_scores_tell_the_same():
    c = case("conv_groups")
    kept = fl.directions(c.fisher(), 3, vectors=True)
    F = c.fisher(memory=2000)
    assert F.plan.streamed
    found = fl.directions(F, 3, vectors=True)
    check(F, c.matrix, found)
    np.testing.assert_allclose(found["identifiable_dimension"], kept["identifiable_dimension"], rtol=1e-10)
    np.testing.assert_allclose(found["leverage"], kept["leverage"], rtol=1e-8)


def test_an_embedding():
    g = torch.Generator().manual_seed(0)
    table, head = nn.Embedding(5, 3).double(), nn.Linear(6, 3).double()
    model = fill(nn.Sequential(table, nn.Flatten(), nn.Tanh(), head), g)
    data = torch.randint(4, (7, 2), generator=g), torch.randint(3, (7,), generator=g)
    F = fl.Fisher(model, data, likelihood="categorical")
    ds = fl.directions(F, 3, vectors=True)
    check(F, reference.fisher(model, data, "categorical"), ds)
    assert (ds["leverage"].values[12:15] == 0).all()  # the last word never occurs


def test_of_a_restricted_operator():
    c = case("lenet")
    part = c.fisher().restrict(["3", "9"])
    index = c.fisher().layout.index_of(["3", "9"])
    ds = fl.directions(part, 3, vectors=True)
    check(part, c.matrix[index][:, index], ds)
    assert list(ds["layer"].values) == ["3", "9"]


def test_float32():
    F = in_float32("mlp_tanh")
    ds = fl.directions(F, 3, which="stiff", vectors=True)
    values, vectors = reference.eigenvectors(case("mlp_tanh").matrix)
    np.testing.assert_allclose(ds["eigenvalue"], values[:3], rtol=1e-4)
    overlap = np.abs(ds["eigenvector"].values @ vectors[:, :3].numpy())
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-3)


def test_the_gradient_in_the_stiff_directions():
    c = case("mlp_tanh")
    ds = fl.directions(c.fisher(), 5, vectors=True)
    g = c.gradient
    cosine = ds["eigenvector"].values @ (g / g.norm()).numpy()
    np.testing.assert_allclose(ds["gradient_share"], cosine**2, rtol=1e-8)
    inputs, _ = c.data
    without = fl.Fisher(c.model, (inputs, None), likelihood=c.likelihood)
    assert "gradient_share" not in fl.directions(without, 2)
    # all directions together hold all of a gradient that lies in the row space
    whole = fl.directions(c.fisher(), c.fisher().n_params, which="stiff")
    assert float(whole["gradient_share"].sum()) == pytest.approx(1)


def test_each_direction_is_listed_once():
    F = case("mlp_tanh").fisher()
    rank = int(fl.directions(F, 1)["num_above_noise"])
    ds = fl.directions(F, rank - 2)
    assert ds["rank"].values.tolist() == list(range(rank))
    assert ds["side"].values.tolist() == ["stiff"] * (rank - 2) + ["sloppy"] * 2
    for which, ranks in (("stiff", [0, 1, 2]), ("sloppy", [rank - 3, rank - 2, rank - 1])):
        one = fl.directions(F, 3, which=which)
        assert one["rank"].values.tolist() == ranks
        assert set(one["side"].values) == {which}
        assert "eigenvector" not in one
        assert "leverage" not in one


def test_a_known_matrix():
    """Least squares on a design with one dead column and two equal ones: 3 of 4 weights are seen, 2 directions determined."""
    x = torch.tensor([[2.0, 1, 1, 0], [-2, 1, 1, 0], [2, -1, -1, 0], [-2, -1, -1, 0]], dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    F = fl.Fisher(model, (x, torch.zeros(4, 1, dtype=torch.float64)), likelihood="gaussian")
    ds = fl.directions(F, 4, damping=3.0, vectors=True)
    np.testing.assert_allclose(ds["eigenvalue"], [4, 2])
    np.testing.assert_allclose(ds["participation"], [1, 2])
    np.testing.assert_allclose(ds["top_parameter_share"], [1, 0.5])
    assert ds["top_parameter"].values[0] == "weight[0,0]"
    np.testing.assert_allclose(ds["std_bound"], [1 / (4 * 7) ** 0.5, 1 / (4 * 5) ** 0.5])
    assert ds["identifiable"].values.tolist() == [True, False]  # 2 nat are less than the damping
    assert (int(ds["num_above_noise"]), int(ds["num_identifiable"]), int(ds["null_dimension"])) == (2, 1, 2)
    np.testing.assert_allclose(ds["leverage"], [1, 0.5, 0.5, 0], atol=1e-12)
    assert not ds["degenerate"].values.any()
    assert ds["cluster"].values.tolist() == [0, 1]


def test_equal_eigenvalues_are_flagged():
    """Two outputs with one design: every eigenvalue comes twice, and only sums over a pair mean something."""
    x = torch.tensor([[2.0, 0], [0, 1]], dtype=torch.float64)
    F = fl.Fisher(nn.Linear(2, 2, bias=False).double(), (x, None), likelihood="gaussian")
    ds = fl.directions(F, 4, vectors=True)
    np.testing.assert_allclose(ds["eigenvalue"], [2, 2, 0.5, 0.5])
    assert ds["degenerate"].values.all()
    assert ds["cluster"].values.tolist() == [0, 0, 1, 1]
    pair = (ds["eigenvector"].isel(rank=[0, 1]) ** 2).sum("rank").values
    np.testing.assert_allclose(pair, [1, 0, 1, 0], atol=1e-12)


def test_nothing_is_told():
    ds = fl.directions(case("one_class").fisher(), 3, vectors=True)
    assert ds.sizes["rank"] == 0
    assert int(ds["null_dimension"]) == case("one_class").fisher().n_params
    assert (ds["identifiable_dimension"] == 0).all()
    assert (ds["leverage"] == 0).all()


def test_lanczos_finds_the_same_stiff_end():
    c = case("lenet")
    F = c.fisher()
    exact = fl.directions(F, 3, which="stiff", vectors=True)
    found = fl.directions(F, 3, which="stiff", method="lanczos", vectors=True, progress=False)
    np.testing.assert_allclose(found["eigenvalue"], exact["eigenvalue"], rtol=1e-8)
    np.testing.assert_allclose(found["layer_share"], exact["layer_share"], atol=1e-5)
    assert found["converged"].values.all()
    assert np.isnan(found["num_above_noise"])
    assert np.isnan(found["identifiable_dimension"]).all()
    assert "leverage" not in found
    assert "Lanczos" in found.attrs["method"]
    with pytest.warns(
        NumericalWarning,
        match=r"^Only the stiff end is returned: the sloppy one needs the complete spectrum of an order of",
    ):
        both = fl.directions(F, 3, method="lanczos")
    assert set(both["side"].values) == {"stiff"}


def test_too_large_for_the_complete_spectrum(monkeypatch):
    F = case("lenet").fisher()
    monkeypatch.setattr(sys.modules["fisherlens.directions"], "DENSE_LIMIT", 3)
    assert "dense" not in fl.directions(F, 2, which="stiff").attrs["method"]
    monkeypatch.setattr(sys.modules["fisherlens.spectrum.smaller"], "_ALWAYS", 3)
    small = case("lenet").fisher(memory=2000)
    with pytest.raises(MemoryBudgetError, match="The complete spectrum needs the smaller of"):
        fl.directions(small, 2, method="exact")


def test_what_is_refused():
    F = case("mlp_tanh").fisher()
    for k, message in (
        (0, "k must be an integer >= 1, the directions on each side; got 0."),
        (True, "k must be an integer >= 1, the directions on each side; got True."),
        (
            F.n_params + 1,
            f"k must be at most the number of parameters, {F.n_params}; got {F.n_params + 1}. F has no more directions.",
        ),
    ):
        with pytest.raises(InputError, match="^" + re.escape(message) + "$"):
            fl.directions(F, k)
    for damping in (0, -1, float("nan"), float("inf"), "a"):
        with pytest.raises(InputError, match="damping must be a finite number > 0"):
            fl.directions(F, damping=damping)
    with pytest.raises(
        InputError, match=r"^Unknown option which= 'stif'\. Did you mean 'stiff'\? Known: 'both', 'stiff', 'sloppy'\."
    ):
        fl.directions(F, which="stif")
    with pytest.raises(InputError, match=r"^Unknown method 'gram'\."):
        fl.directions(F, method="gram")
    with pytest.raises(InputError, match="seed must be an integer >= 0"):
        fl.directions(F, seed=-1)
    with pytest.raises(TypeError, match=r"takes a fisherlens\.Fisher"):
        fl.directions(case("mlp_tanh").model)
    hessian = fl.Fisher(case("mlp_tanh").model, case("mlp_tanh").data, likelihood="categorical", kind="hessian")
    with pytest.raises(InputError, match="This needs score rows"):
        fl.directions(hessian)


def test_saved_and_loaded(tmp_path):
    ds = fl.directions(case("mlp_tanh").fisher(), 3, vectors=True)
    fl.save(ds, tmp_path / "d.nc")
    assert fl.load(tmp_path / "d.nc").identical(ds)


def test_a_dead_unit_is_not_identifiable():
    model, data, likelihood = make_case(
        "dead", lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), (4,)
    )
    with torch.no_grad():
        model[0].bias[2] = -1e3
    F = fl.Fisher(model, data, likelihood=likelihood)
    leverage = fl.directions(F, 1, vectors=True)["leverage"]
    dead = fl.information(F, "parameter")["dead"]
    assert dead.values.sum() == 8
    assert (leverage.values[dead.values] == 0).all()
