"""What dropping couplings costs: every variable against its definition on dense matrices."""

from __future__ import annotations

import itertools
import sys

import numpy as np
import pytest
import torch
from cases import make_case
from fisher_checks import KINDS, QUIET, ZOO, case
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, NumericalWarning

pytestmark = pytest.mark.filterwarnings(QUIET)
SCHEMES = ["layer", "parameter", "unit", "cw-ngd", "mbf", "diagonal"]
NAMES = [
    "fewer_parameters_than_examples",
    "mlp_tanh",
    "conv_1d",
    "batchnorm_first",
    "gaussian_three_outputs",
    "residual",
]
VARYING = {"natural_gradient_cosine", "metric_cosine", "decrease_ratio", "kl_divergence", "kl_divergence_sem"} | {
    *("condition_number", "mu_max", "mu_min", "predicted_steps")
}


def truth(T: torch.Tensor, blocks: list, g: torch.Tensor, damping: float) -> dict[str, float]:
    cut = reference.block_diagonal(T, blocks)
    sizes = [len(b) for b in blocks]
    return {
        "energy_captured": reference.energy_captured(T, blocks),
        "energy_noise_floor": reference.energy_noise_floor(T, blocks),
        "natural_gradient_cosine": reference.natural_gradient_cosine(T, cut, g, damping),
        "decrease_ratio": reference.decrease_ratio(T, cut, g, damping),
        "condition_number": reference.condition_number(T, cut, damping),
        "kl_divergence": reference.gaussian_kl(T, cut, damping),
        "num_blocks": len(blocks),
        "largest_block": max(sizes),
        "storage_bytes": 8 * sum(s**2 for s in sizes),
    }


def parts_of(F: fl.Fisher, scheme, layer: str):
    """Blocks of a partition inside one layer, counted from its start, and where that layer lies."""
    parts = fl.partition(F, scheme)
    if layer == "all":
        return list(parts.blocks), slice(0, F.n_params)
    info = F.layout.layer(layer)
    return [b - info.start for b in parts.restrict(layer).blocks], slice(info.start, info.stop)


def check(ds, F: fl.Fisher, T: torch.Tensor, g: torch.Tensor, schemes: list, damping: float, rel: float = 1e-8) -> None:
    for k, scheme in enumerate(schemes):
        for layer in [*F.layout.layer_names, "all"]:
            blocks, at = parts_of(F, scheme, layer)
            found = ds.isel(partition=k).sel(layer=layer)
            for name, value in truth(T[at, at], blocks, g[at], damping).items():
                assert found[name].item() == pytest.approx(value, rel=rel, abs=1e-10), (scheme, layer, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_variable(name, kind, unchanged):
    c = case(name, kind)
    F = c.fisher()
    with unchanged(c.model):
        ds = fl.independence(F, SCHEMES, damping=0.01)
    assert list(ds["partition"].values) == SCHEMES
    assert list(ds["layer"].values) == [*F.layout.layer_names, "all"]
    assert ds.attrs["damping"] == 0.01
    check(ds, F, c.matrix, c.gradient, SCHEMES, 0.01)
    for name in ("num_blocks", "largest_block", "storage_bytes"):
        assert ds[name].dtype == np.int64


def test_one_block_loses_nothing():
    F = case("mlp_tanh").fisher()
    ds = fl.independence(F, ["layer", {"everything": range(79)}])
    for found in (ds.sel(partition="layer").drop_sel(layer="all"), ds.isel(partition=1)):
        for name in ("energy_captured", "natural_gradient_cosine", "decrease_ratio", "condition_number"):
            assert np.allclose(found[name], 1, rtol=1e-12), name
        assert np.allclose(found["kl_divergence"], 0)


def test_finer_partitions_lose_more():
    """Energy falls and divergence grows with each refinement; all values stay in their ranges."""
    for name in ("mlp_tanh", "lenet", "conv_groups"):
        F = case(name).fisher()
        chain = ["layer", "unit", "diagonal"]
        for coarse, fine in itertools.pairwise(chain):
            assert fl.partition(F, fine).refines(fl.partition(F, coarse)), (name, coarse, fine)
        ds = fl.independence(F, chain, damping=1e-2)
        assert (ds["energy_captured"].diff("partition") <= 1e-12).all()
        assert (ds["kl_divergence"].diff("partition") >= -1e-12).all()
        assert (ds["num_blocks"].diff("partition") >= 0).all()
        for variable, low, high in (
            ("energy_captured", 0, 1),
            ("decrease_ratio", 0, 1),
            ("natural_gradient_cosine", 0, 1),
        ):
            assert ((ds[variable] > low) & (ds[variable] <= high + 1e-12)).all(), variable
        assert (ds["condition_number"] >= 1 - 1e-9).all()


def test_noise_floor_is_the_mean_over_random_partitions():
    c = case("mlp_tanh")
    F = c.fisher()
    sizes = [30, 20, 20, 9]
    g = torch.Generator().manual_seed(0)
    energies = [
        reference.energy_captured(c.matrix, list(torch.randperm(79, generator=g).split(sizes))) for _ in range(400)
    ]
    own = {str(k): index for k, index in enumerate(torch.arange(79).split(sizes))}
    floor = fl.independence(F, [own])["energy_noise_floor"].sel(layer="all").item()
    assert np.mean(energies) == pytest.approx(floor, abs=4 * np.std(energies) / 20)


def test_several_dampings():
    c = case("mlp_tanh")
    F = c.fisher()
    grid = [1e-3, 0.1, 10.0]
    ds = fl.independence(F, ["unit", "diagonal"], damping=grid)
    assert list(ds["damping"].values) == grid
    for name in ds.data_vars:
        assert ("damping" in ds[name].dims) is (name in VARYING)
    for lam in grid:
        check(ds.sel(damping=lam), F, c.matrix, c.gradient, ["unit", "diagonal"], lam)
    assert fl.independence(F, ["unit"], damping=[0.1])["kl_divergence"].dims == ("damping", "partition", "layer")
    # with much damping every partition is as good as the whole
    last = ds.isel(damping=-1)
    assert (last["natural_gradient_cosine"] > 0.97).all()
    assert (last["kl_divergence"] < ds["kl_divergence"].isel(damping=0) + 1e-12).all()


def test_lanczos_agrees_with_the_dense_condition_number(monkeypatch):
    """Above an order of 256 both ends come from Lanczos, to 1 %, or as exact as was asked for."""
    for name in ("mlp_tanh", "conv_groups", "residual"):
        c = case(name)
        F = c.fisher()
        exact = fl.independence(F, ["unit", "diagonal"], damping=0.01)["condition_number"]
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules["fisherlens.independence.conditioning"], "DENSE_ORDER", 20)
            found = fl.independence(F, ["unit", "diagonal"], damping=0.01)["condition_number"]
            close = fl.independence(F, ["unit", "diagonal"], damping=0.01, tol=1e-6)["condition_number"]
        assert np.allclose(found, exact, rtol=1e-2)
        assert np.allclose(close, exact, rtol=1e-6)


def test_repeatable_and_without_trace(unchanged):
    c = case("conv_everything")
    F = c.fisher()
    assert F.n_params > 256
    with unchanged(c.model):
        a, b = (fl.independence(F, ["unit", "diagonal"], damping=0.01) for _ in range(2))
    assert a.drop_attrs().equals(b.drop_attrs())
    check(a, F, c.matrix, c.gradient, ["unit", "diagonal"], 0.01, rel=1e-2)


def test_weights_and_ignored_labels():
    model, (x, y), _ = ZOO["mlp_tanh"]()
    y = y.clone()
    y[1] = -100
    likelihood = fl.Categorical(weight=[0.5, 1.0, 3.0])
    F = fl.Fisher(model, (x, y), likelihood=likelihood)
    T, g = reference.fisher(model, (x, y), likelihood), reference.gradient(model, (x, y), likelihood)
    check(fl.independence(F, ["unit", "layer"], damping=0.01), F, T, g, ["unit", "layer"], 0.01)


def test_blocks_that_cross_layers_are_cut_at_them():
    c = case("mlp_tanh")
    F = c.fisher()
    own = fl.partition(F, {"a": torch.arange(0, 79, 2), "b": torch.arange(1, 79, 2)})
    random = fl.partition(F, "random", size=10, seed=3)
    ds = fl.independence(F, [own, random], damping=0.01)
    check(ds, F, c.matrix, c.gradient, [own, random], 0.01)
    assert ds["num_blocks"].sel(partition="own").values.tolist() == [2, 2, 2, 2]


def test_names_tell_partitions_apart():
    F = case("mlp_tanh").fisher()
    options = [{"size": 5}, {"size": 9}, {"size": 9, "seed": 1}]
    schemes = [fl.partition(F, "random", **o) for o in options] + [fl.partition(F, "random", size=9)] * 2 + ["unit"]
    names = list(fl.independence(F, schemes)["partition"].values)
    assert len(set(names)) == 6
    assert names[-1] == "unit"
    assert all(name.startswith("random") for name in names[:-1])


def test_float32():
    model, (x, y), likelihood = make_case(
        "single", lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,)
    )
    T, g = reference.fisher(model, (x, y), likelihood), reference.gradient(model, (x, y), likelihood)
    F = fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood)
    ds = fl.independence(F, ["unit", "diagonal"], damping=0.01)
    for k, scheme in enumerate(["unit", "diagonal"]):
        expected = truth(T, parts_of(F, scheme, "all")[0], g, 0.01)
        expected["storage_bytes"] /= 2
        for name, value in expected.items():
            assert ds[name].isel(partition=k).sel(layer="all").item() == pytest.approx(value, rel=1e-4), name


def test_zero_matrix():
    ds = fl.independence(case("one_class").fisher(), ["parameter", "diagonal"])
    assert (ds["energy_captured"] == 1).all()
    assert np.isnan(ds["natural_gradient_cosine"]).all()
    assert np.isnan(ds["decrease_ratio"]).all()
    assert np.allclose(ds["kl_divergence"], 0)
    assert np.allclose(ds["condition_number"], 1)


def test_partitions_that_do_not_fit_are_left_out_with_a_warning():
    c = case("mlp_tanh")
    F = c.fisher()
    F.memory = 1500
    with pytest.warns(
        NumericalWarning, match=r"independence: 'unit' on '(0|2|all)' is left out\. The blocks of partition 'unit' need"
    ) as caught:
        ds = fl.independence(F, ["unit", "diagonal"])
    assert {w.filename for w in caught} == {__file__}
    assert np.isnan(ds["energy_captured"].sel(partition="unit", layer="all"))
    assert np.isnan(ds["kl_divergence"].sel(partition="unit", layer="all"))
    fine = ds.sel(partition="diagonal")
    assert np.isfinite(fine["kl_divergence"]).all()
    assert fine["num_blocks"].sel(layer="all").item() == 79


def test_without_labels_nothing_is_begun():
    c = case("mlp_tanh")
    F = fl.Fisher(c.model, (c.data[0], None), likelihood="categorical")
    with pytest.raises(InputError, match=r"needs observed labels.*targets=None"):
        fl.independence(F)


def test_what_is_refused():
    F = case("mlp_tanh").fisher()
    with pytest.raises(InputError, match="damping is an empty list"):
        fl.independence(F, damping=[])
    with pytest.raises(InputError, match="partitions is empty"):
        fl.independence(F, [])
    for damping in (0, [0.1, -1.0], float("nan")):
        with pytest.raises(InputError, match="damping must be a finite number > 0"):
            fl.independence(F, damping=damping)
    with pytest.raises(InputError, match=r"Unknown .*'unti'"):
        fl.independence(F, "unti")


def test_partitions_are_a_sequence():
    F = case("mlp_tanh").fisher()
    for wrong in (None, 5):
        with pytest.raises(TypeError, match="partitions must be a sequence of schemes"):
            fl.independence(F, wrong)


def test_a_single_partition_needs_no_list():
    F = case("mlp_tanh").fisher()
    for one in ("unit", fl.partition(F, "unit"), {"everything": range(79)}):
        assert fl.independence(F, one).sizes["partition"] == 1


@pytest.mark.parametrize("damping", [1e-5, 1e-2])
def test_whole_layers_of_fewer_directions_than_rows_at_a_small_damping(damping):
    """Gram matrices of layers that are singular: what lies in their null spaces stands for no vector, and must not grow into the answer."""
    generator = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 17), nn.ReLU(), nn.Linear(17, 4)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(20, 3, 6, 6, generator=generator, dtype=torch.float64)
    F = fl.Fisher(model, (x, torch.randint(4, (20,), generator=generator)), likelihood="categorical")
    found = fl.independence(F, "layer", damping=damping).isel(partition=0).sel(layer="all")
    T = F.dense()
    mu = reference.preconditioned_spectrum(
        T, reference.block_diagonal(T, list(fl.partition(F, "layer").blocks)), damping
    )
    assert found.mu_max <= 3
    assert found.mu_max.item() == pytest.approx(mu[0].item(), rel=0.01)
    assert found.condition_number.item() == pytest.approx((mu[0] / mu[-1]).item(), rel=0.01)
