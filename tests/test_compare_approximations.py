"""Stand-ins for F side by side: every variable against its definition on dense matrices, estimates within their errors, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from fisher_checks import QUIET, ZOO, case, in_float32

import fisherlens as fl
from fisherlens import reference
from fisherlens.approximations import Approximation
from fisherlens.errors import (
    ConvergenceWarning,
    InputError,
    MemoryBudgetError,
    NumericalWarning,
    UnsupportedModuleError,
)

pytestmark = pytest.mark.filterwarnings(QUIET)
LAMBDA = 0.01


class Rough(Approximation):
    """Half of F on its layers and a little more on the diagonal: wrong inside the blocks, with everything known."""

    def __init__(self, F: fl.Fisher, layers: bool = True):
        super().__init__(F, "rough", fl.partition(F, "layer"))
        self.layers = layers
        T = F.dense().double()
        self.truth = reference.block_diagonal(T, list(self.partition.blocks))
        self.matrix = self.truth / 2 + 0.01 * torch.eye(len(T), dtype=torch.float64)

    def _product(self, v):
        return (self.matrix @ v.double()).to(v.dtype)

    def _solve(self, v, damping):
        return reference.solve(self.matrix, v.double(), damping).to(v.dtype)

    def _log_determinant(self, damping):
        return reference.log_determinant(self.matrix, damping)

    def diagonal(self):
        return self.matrix.diagonal().to(self.dtype)

    def squared_norm(self):
        return self.matrix.norm().item() ** 2

    def within_block_error(self):
        return (self.matrix - self.truth).norm().item() ** 2

    def on_layer(self, layer):
        if not self.layers:
            raise NotImplementedError("no layers here")
        return Rough(self._fisher.restrict(layer))

    @property
    def storage_bytes(self):
        return 17

    @property
    def solve_flops(self):
        return 19.0


def expected(T, F_hat, blocks, g, damping: float) -> dict[str, float]:
    mu = reference.preconditioned_spectrum(T, F_hat, damping)
    dropped, within = reference.error_split(T, F_hat, blocks)
    return {
        "dropped_coupling": dropped,
        "within_block_error": within,
        "relative_error": (T - F_hat).norm().item() / T.norm().item(),
        "natural_gradient_cosine": reference.natural_gradient_cosine(T, F_hat, g, damping),
        "metric_cosine": reference.metric_cosine(T, F_hat, g, damping),
        "decrease_ratio": reference.decrease_ratio(T, F_hat, g, damping),
        "kl_divergence": reference.gaussian_kl(T, F_hat, damping),
        "mu_max": mu[0].item(),
        "mu_min": mu[-1].item(),
        "condition_number": reference.condition_number(T, F_hat, damping),
        "predicted_steps": reference.predicted_steps(T, F_hat, damping) if mu[0] - mu[-1] > 1e-9 else 0.0,
        "num_blocks": len(blocks),
        "largest_block": max(len(b) for b in blocks),
    }


STAND_INS = {
    "blocks": lambda F: fl.BlockDiagonal(F, "layer"),
    "unit": lambda F: fl.BlockDiagonal(F, "unit"),
    "shared": lambda F: fl.BlockDiagonal(F, "mbf", shared=True),
    "kfac": fl.KFAC,
    "factored": lambda F: fl.KFAC(F, damping="factored"),
    "ekfac": fl.EKFAC,
    "diagonal": fl.Diagonal,
    "quasi": fl.QuasiDiagonal,
    "low rank": lambda F: fl.LowRank(F, 3),
    "low rank, rest": lambda F: fl.LowRank(F, 3, remainder=True),
    "rough": Rough,
}


def damped_twin(one: Approximation, damping: float) -> torch.Tensor:
    """What ``one`` inverts less λ, so that the dense reference damps it to the same."""
    eye = torch.eye(one.n_params, dtype=one.dtype)
    own = getattr(one, "damped_product", None)
    matrix = (one @ eye if own is None else own(eye, damping)).double()
    return matrix if own is None else matrix - damping * eye


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "fewer_parameters_than_examples"])
@pytest.mark.parametrize("stand_in", STAND_INS)
def test_every_variable_of_every_approximation(name, stand_in, unchanged):
    c = case(name)
    F = c.fisher()
    one = STAND_INS[stand_in](F) if stand_in != "low rank" or F.n_params > 8 else fl.LowRank(F, 2)
    with unchanged(c.model):
        ds = fl.compare_approximations(F, {stand_in: one}, damping=LAMBDA)
    assert list(ds["layer"].values) == [*F.layout.layer_names, "all"]
    for layer in ds["layer"].values:
        whole = layer == "all"
        at = slice(0, F.n_params) if whole else slice(F.layout.layer(layer).start, F.layout.layer(layer).stop)
        part = one if whole else one.on_layer(layer)
        blocks = [b - at.start for b in (one.partition if whole else one.partition.restrict(layer)).blocks]
        T, g = c.matrix[at, at], c.gradient[at]
        found = ds.isel(approximation=0).sel(layer=layer)
        wanted = expected(T, damped_twin(part, LAMBDA), blocks, g, LAMBDA)
        if stand_in == "factored":  # its error is that of the Kronecker product, not of what it inverts
            plain = expected(T, part.dense(), blocks, g, LAMBDA)
            wanted |= {key: plain[key] for key in ("within_block_error", "relative_error")}
        for key, value in wanted.items():
            assert found[key].item() == pytest.approx(value, rel=1e-8, abs=1e-9), (layer, key)
        assert found["storage_bytes"].item() == part.storage_bytes
        assert found["solve_flops"].item() == part.solve_flops
        assert found["kl_divergence_sem"].item() == 0


def test_energy_is_told_of_exact_blocks_only():
    F = case("mlp_tanh").fisher()
    both = fl.compare_approximations(F, {"unit": "unit", "rough": Rough(F)}, damping=LAMBDA)
    alone = fl.independence(F, "unit", damping=LAMBDA)
    for name in ("energy_captured", "energy_noise_floor", "kl_divergence", "condition_number", "decrease_ratio"):
        assert np.allclose(both[name].sel(approximation="unit"), alone[name].sel(partition="unit"), rtol=1e-10), name
    assert np.allclose(both["energy_captured"] + both["dropped_coupling"], 1, atol=1e-12, equal_nan=True) is False
    assert np.isnan(both["energy_captured"].sel(approximation="rough")).all()
    assert np.allclose((both["energy_captured"] + both["dropped_coupling"]).sel(approximation="unit"), 1)


def test_factored_damping_is_judged_where_the_factors_are_exact():
    """The last layer of a Gaussian network: G does not depend on the example, so that G ⊗ A is F; its factored damping is not F + λ."""
    F = case("gaussian_three_outputs").fisher()
    name = F.layout.layer_names[-1]
    exact, factored = fl.KFAC(F), fl.KFAC(F, damping="factored")
    assert exact.within_block_errors()[name] <= 1e-15 * F.frobenius_norm() ** 2
    ds = fl.compare_approximations(F, [exact, factored], damping=LAMBDA).sel(layer=name)
    layer = F.layout.layer(name)
    at = slice(layer.start, layer.stop)
    T, g = F.dense()[at, at], F.gradient()[at]
    for row, one in enumerate((exact, factored)):
        want = expected(T, damped_twin(one, LAMBDA)[at, at], [torch.arange(layer.size)], g, LAMBDA)
        for key in ("natural_gradient_cosine", "decrease_ratio", "kl_divergence", "condition_number"):
            assert ds[key][row].item() == pytest.approx(want[key], rel=1e-8, abs=1e-10), (row, key)
    assert ds.condition_number[0] < 1 + 1e-9 < 1.1 < ds.condition_number[1]


def test_what_may_stand_for_an_approximation():
    F = case("mlp_tanh").fisher()
    own = {"a": torch.arange(0, 79, 2), "b": torch.arange(1, 79, 2)}
    ds = fl.compare_approximations(F, [fl.KFAC, "unit", fl.partition(F, "diagonal"), own, lambda f: Rough(f)])
    assert list(ds["approximation"].values) == ["KFAC", "unit", "diagonal", "own", "rough"]
    named = fl.compare_approximations(F, {"first": "unit", "second": "unit"}, damping=[0.1, 1.0])
    assert named["decrease_ratio"].dims == ("damping", "approximation", "layer")
    assert named["dropped_coupling"].dims == ("approximation", "layer")
    assert named.isel(approximation=0, drop=True).equals(named.isel(approximation=1, drop=True))
    for alone in ("unit", fl.KFAC(F), fl.partition(F, "unit")):
        assert fl.compare_approximations(F, alone).sizes["approximation"] == 1


def test_float32():
    c, F = case("mlp_tanh"), in_float32("mlp_tanh")
    ds = fl.compare_approximations(F, [fl.KFAC, "unit", Rough(F)], damping=LAMBDA)
    double = c.fisher()
    exact = fl.compare_approximations(double, [fl.KFAC, "unit", Rough(double)], damping=LAMBDA)
    for name in ds.data_vars:
        if name not in ("storage_bytes", "predicted_steps"):
            assert np.allclose(ds[name], exact[name], rtol=1e-4, atol=1e-6, equal_nan=True), name


# --- estimates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_estimates_are_within_their_errors(seed):
    """As if no matrix fitted: norm, determinant and trace from probes, steps by conjugate gradients, both ends of M by Lanczos."""
    F = case("conv_everything").fisher()
    assert F.n_params > 256
    these = {"unit": "unit", "kfac": fl.KFAC(F, others="diagonal"), "rough": Rough(F)}
    exact = fl.compare_approximations(F, these, damping=LAMBDA)
    found = fl.compare_approximations(
        F, these, damping=LAMBDA, method="estimate", num_probes=6, num_matvecs=12, seed=seed
    )
    for name in ("kl_divergence", "dropped_coupling", "within_block_error", "relative_error", "energy_captured"):
        gap, sem = abs(found[name] - exact[name]), found[f"{name}_sem"]
        assert (gap <= 5 * sem + 1e-6 * abs(exact[name]) + 1e-9).where(np.isfinite(gap), True).all(), name
    assert (found["kl_divergence_sem"].sel(layer="all") > 0).all()
    for name in ("natural_gradient_cosine", "decrease_ratio", "metric_cosine"):
        assert np.allclose(found[name], exact[name], rtol=1e-6), name
    assert np.allclose(found["condition_number"], exact["condition_number"], rtol=1e-2)
    assert found.attrs["probe_seed"] == seed
    assert found.attrs["num_probes"] == 6
    assert "quadrature" in found.attrs["method"] or "Lanczos" in found.attrs["method"]


def test_nothing_is_dropped_outside_one_block_also_where_norms_are_estimated():
    F = case("mlp_tanh").fisher()
    options = {"damping": LAMBDA, "num_probes": 3, "num_matvecs": 3, "seed": 1}
    exact, found = (
        fl.compare_approximations(F, [fl.KFAC, "layer"], method=method, **options) for method in ("exact", "estimate")
    )
    layers = list(F.layout.layer_names)
    for name in ("dropped_coupling", "within_block_error", "relative_error"):
        assert np.allclose(found[name].sel(layer=layers), exact[name].sel(layer=layers), rtol=1e-9, atol=1e-12), name
        assert (found[f"{name}_sem"].sel(layer=layers) == 0).all(), name
    assert (found["dropped_coupling"].sel(layer=layers) == 0).all()
    assert (found["dropped_coupling_sem"].sel(layer="all") > 0).all()


def test_a_large_order_is_estimated_without_being_told(monkeypatch):
    F = case("mlp_tanh").fisher()
    exact = fl.independence(F, ["unit", "diagonal"], damping=LAMBDA)
    monkeypatch.setattr("fisherlens.fisher.solve.DIRECT_LIMIT", 5)
    found = fl.independence(F, ["unit", "diagonal"], damping=LAMBDA)
    gap = abs(found["kl_divergence"] - exact["kl_divergence"])
    assert (gap <= 5 * found["kl_divergence_sem"] + 1e-6).all()
    assert np.allclose(found["decrease_ratio"], exact["decrease_ratio"], rtol=1e-6)
    with pytest.raises(MemoryBudgetError, match=r"method='exact' needs a Cholesky factor of order \d+ for '0'"):
        fl.independence(F, ["unit"], damping=LAMBDA, method="exact")


@pytest.mark.parametrize("path", ["streamed", "linearised"])
def test_scores_that_are_not_kept(path):
    c = case("mlp_tanh")
    kept, streamed = c.fisher(), c.fisher(memory={"streamed": 400, "linearised": 1500}[path])
    assert getattr(streamed.plan, path)
    streamed.memory = 10**9
    for method in ("auto", "estimate"):
        ds = fl.independence(streamed, ["layer", "diagonal"], damping=LAMBDA, method=method)
        exact = fl.independence(kept, ["layer", "diagonal"], damping=LAMBDA)
        assert (abs(ds["kl_divergence"] - exact["kl_divergence"]) <= 5 * ds["kl_divergence_sem"] + 1e-8).all()
        assert np.allclose(ds["decrease_ratio"], exact["decrease_ratio"], rtol=1e-6)


def test_the_trace_over_rows_over_parameters_and_estimated(monkeypatch):
    F = case("conv_everything").fisher()
    from fisherlens.independence import divergence, options, standin, target

    for name, one in {"kfac": fl.KFAC(F, others="diagonal"), "rough": Rough(F)}.items():
        judged = target.Target(F, "all", options.Options(), F.diagonal())
        stand_in = standin.StandIn(name, one, one.partition.sizes, exact_blocks=False)
        eye = torch.eye(F.n_params, dtype=torch.float64)
        B = one.dense() + LAMBDA * eye
        truth = torch.linalg.solve(B, F.dense() + LAMBDA * eye).trace().item() - F.n_params
        assert divergence._over_rows(judged, stand_in, LAMBDA) == pytest.approx(truth, rel=1e-8), name
        assert divergence._over_parameters(judged, stand_in, LAMBDA) == pytest.approx(truth, rel=1e-8), name
        monkeypatch.setattr(divergence, "_CHUNK_BYTES", 20_000)
        assert divergence._over_rows(judged, stand_in, LAMBDA) == pytest.approx(truth, rel=1e-8), name
        assert divergence._over_parameters(judged, stand_in, LAMBDA) == pytest.approx(truth, rel=1e-8), name
        monkeypatch.undo()
        for seed in range(3):
            judged = target.Target(F, "all", options.Options(seed=seed), F.diagonal())
            found = divergence._estimated(judged, stand_in, LAMBDA)
            assert abs(found.value - truth) <= 5 * found.sem, name
            assert 0 < found.sem < abs(truth), name


def test_interrupt_keeps_what_is_done(monkeypatch):
    F = case("mlp_tanh").fisher()
    whole = fl.compare_approximations(F, ["unit", "diagonal"], damping=LAMBDA)
    calls = []

    class Stopping(Rough):
        def on_layer(self, layer):
            calls.append(layer)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return super().on_layer(layer)

    with pytest.warns(
        ConvergenceWarning, match=r"Interrupted after 6 of 12 judgements; the others are NaN in the result\."
    ):
        ds = fl.compare_approximations(F, ["unit", "diagonal", Stopping(F)], damping=LAMBDA)
    assert ds.attrs["interrupted"] == "after 6 of 12 judgements"
    for layer in ("0", "2"):
        assert np.allclose(
            ds["kl_divergence"].sel(layer=layer)[:2], whole["kl_divergence"].sel(layer=layer), rtol=1e-10
        )
    assert np.isnan(ds["kl_divergence"].sel(layer="all")).all()
    calls[:] = [None, None]
    with pytest.raises(KeyboardInterrupt):
        fl.compare_approximations(F, Stopping(F), damping=LAMBDA)


# --- what is left out, and what is refused ---------------------------------------------------------------------------


def test_an_approximation_without_layers_is_judged_as_a_whole():
    F = case("mlp_tanh").fisher()
    with pytest.warns(
        NumericalWarning,
        match=r"'rough' on '(0|2|4)' is left out, as this approximation cannot be cut to a layer \(no layers here\)",
    ) as caught:
        ds = fl.compare_approximations(F, [Rough(F, layers=False), "unit"], damping=LAMBDA)
    assert len(caught) == 3
    assert {w.filename for w in caught} == {__file__}
    assert np.isnan(ds["kl_divergence"].sel(approximation="rough", layer=["0", "2", "4"])).all()
    assert np.isfinite(ds["kl_divergence"].sel(layer="all")).all()


def test_an_approximation_of_another_fisher_has_no_error_split():
    c = case("mlp_tanh")
    F, other = c.fisher(), c.fisher(kind="empirical")
    with pytest.warns(NumericalWarning, match=r"'theirs' was built from another Fisher .* the error split is NaN"):
        ds = fl.compare_approximations(F, {"ours": "unit", "theirs": fl.BlockDiagonal(other, "unit")}, damping=LAMBDA)
    assert np.isnan(ds["within_block_error"].sel(approximation="theirs")).all()
    assert np.isfinite(ds["within_block_error"].sel(approximation="ours")).all()
    cut = reference.block_diagonal(case("mlp_tanh", "empirical").matrix, list(fl.partition(F, "unit").blocks))
    found = ds.sel(approximation="theirs", layer="all")
    assert found["kl_divergence"].item() == pytest.approx(reference.gaussian_kl(c.matrix, cut, LAMBDA), rel=1e-8)
    assert found["mu_max"].item() == pytest.approx(
        reference.preconditioned_spectrum(c.matrix, cut, LAMBDA)[0].item(), rel=1e-8
    )


def test_what_is_refused(unchanged):
    c = case("mlp_tanh")
    F, other = c.fisher(), case("mlp_no_bias").fisher()

    def refuse(kind, match, *args, **options):
        with unchanged(c.model), pytest.raises(kind, match=match):
            fl.compare_approximations(F, *args, **options)

    refuse(InputError, r"approximations is empty; give at least one", [])
    refuse(TypeError, r"approximations must be a sequence or a dict name -> approximation; got int", 3)
    refuse(TypeError, r"approximations holds Tensor under 0", [torch.eye(79)])
    refuse(
        TypeError, r"approximations holds a callable that gave Tensor under 'mine'", {"mine": lambda f: torch.eye(79)}
    )
    refuse(InputError, r"Two approximations are called 'unit'", ["unit", fl.BlockDiagonal(F, "unit")])
    refuse(InputError, r"Approximation 'KFAC' is of \d+ parameters in another layout; F has 79", [fl.KFAC(other)])
    refuse(InputError, r"is torch\.float32 on cpu, F is torch\.float64 on cpu", [fl.KFAC(in_float32("mlp_tanh"))])
    refuse(InputError, r"Unknown .*'unti'", ["unti"])
    refuse(InputError, r"79 parameters|another", [fl.partition(other, "unit")])
    for blocks in ({"a": range(79), "b": [3]}, {"a": range(70)}):
        refuse(InputError, r"Blocks must (be disjoint; index 3|cover)", [blocks])
    for damping in (0.0, -1.0, math.nan, math.inf, [0.1, -1.0], "much"):
        refuse(InputError, r"damping must be a finite number > 0", ["unit"], damping=damping)
    refuse(InputError, r"damping is an empty list", ["unit"], damping=[])
    refuse(InputError, r"damping holds 0\.1 twice", ["unit"], damping=[0.1, 0.1])
    refuse(InputError, r"Unknown method 'guess'\. .*'estimate'", ["unit"], method="guess")
    refuse(InputError, r"num_probes must be an integer >= 1", ["unit"], num_probes=0)
    refuse(InputError, r"num_matvecs must be an integer >= 2", ["unit"], num_matvecs=1)
    refuse(InputError, r"seed must be an integer >= 0", ["unit"], seed=-1)
    for tol in (0.0, 1.0, True, "fine"):
        refuse(InputError, r"tol must be a number between 1e-10 and 0\.5", ["unit"], tol=tol)
    with pytest.raises(InputError, match=r"needs observed labels.*targets=None"):
        fl.compare_approximations(fl.Fisher(c.model, (c.data[0], None), likelihood="categorical"), ["unit"])
    with pytest.raises(TypeError, match=r"takes a fisherlens\.Fisher"):
        fl.compare_approximations(c.model, ["unit"])
    model, data, likelihood = ZOO["batchnorm_first"]()
    with pytest.raises(UnsupportedModuleError, match="BatchNorm"):
        fl.compare_approximations(fl.Fisher(model, data, likelihood=likelihood), [fl.KFAC])


def test_blocks_that_do_not_fit_are_left_out():
    F = case("mlp_tanh").fisher()
    F.memory = 1500
    with pytest.warns(NumericalWarning, match=r"'unit' is left out\. The blocks of partition 'unit' need"):
        ds = fl.compare_approximations(F, ["unit", "diagonal"], damping=LAMBDA)
    assert np.isnan(ds["kl_divergence"].sel(approximation="unit")).all()
    assert np.isfinite(ds["kl_divergence"].sel(approximation="diagonal")).all()
