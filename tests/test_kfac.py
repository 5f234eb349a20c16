"""KFAC against its dense twin on every layer it takes, exact where theory says so, and refusing what it does not take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_case
from fisher_checks import DRAWS, KINDS, QUIET, SEED, ZOO, Case, case, drawn_labels, error
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import ConvergenceWarning, InputError
from fisherlens.layout import ROOT

pytestmark = pytest.mark.filterwarnings(QUIET)
TOLERANCE = 1e-10
SUPPORTED = [
    *(
        "softmax_regression",
        "mlp_tanh",
        "mlp_no_bias",
        "frozen_first_layer",
        "dense_on_positions",
        "bernoulli_two_outputs",
    ),
    *(
        "gaussian_three_outputs",
        "conv_stride",
        "conv_padding",
        "conv_dilation",
        "conv_groups",
        "conv_depthwise",
        "conv_no_bias",
    ),
    *(
        "conv_rectangular",
        "conv_one_by_one",
        "conv_one_position",
        "conv_same",
        "conv_same_dilated",
        "conv_valid",
        "conv_circular",
    ),
    *(
        "conv_circular_same",
        "conv_reflect",
        "conv_replicate",
        "conv_everything",
        "conv_1d",
        "conv_3d",
        "lenet",
        "segmentation",
    ),
    *("gaussian_image", "bernoulli_image", "module_used_twice", "conv_used_twice"),
]
FEW = ["mlp_tanh", "dense_on_positions", "conv_groups", "conv_everything", "lenet", "conv_used_twice"]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def twin_factors(c: Any, F: fl.Fisher, layer: str, form: str) -> tuple[Tensor, Tensor]:
    """G and A of one layer from the definitions, ``(groups, d, d)``, for the parameters that F covers."""
    labels = drawn_labels(c.model, c.data, c.likelihood) if c.kind == "mc" else None
    module = "" if layer == ROOT else layer
    a, g, w = reference.inputs_and_scores(c.model, c.data, c.likelihood, module, c.kind, labels=labels)
    info = F.layout.layer(layer)
    if not info.weight:
        a = a[..., :0]
    return reference.kronecker_factors(reference.with_bias(a) if info.bias else a, g, w, form)


def twin(c: Any, F: fl.Fisher, form: str = "expand") -> Tensor:
    """The whole stand-in, ``(P, P)``."""
    return torch.block_diag(
        *(
            reference.kronecker_block(*twin_factors(c, F, layer.name, form), layer.bias is not None)
            for layer in F.layout.layers
        )
    )


def check(K: Any, T: Tensor, F_dense: Tensor, V: Tensor, tolerance: float = TOLERANCE) -> None:
    """Every member of a stand-in against its dense twin and the dense F."""
    V = V.to(K.dtype)
    assert error(K.dense(), T) < tolerance
    assert error(K @ V, T @ V.double()) < tolerance
    assert error(K @ V[:, 0], T @ V[:, 0].double()) < tolerance
    assert error(K.diagonal(), T.diagonal()) < tolerance
    assert K.trace() == pytest.approx(T.trace().item(), rel=tolerance)
    assert K.squared_norm() == pytest.approx(T.square().sum().item(), rel=10 * tolerance)
    layers = K.layout.layers
    gaps = {
        x.name: (F_dense[x.start : x.stop, x.start : x.stop] - T[x.start : x.stop, x.start : x.stop])
        .square()
        .sum()
        .item()
        for x in layers
    }
    scale = F_dense.square().sum().item() + T.square().sum().item()
    found = K.within_block_errors()
    assert list(found) == [x.name for x in layers]
    for name, gap in gaps.items():
        assert found[name] == pytest.approx(gap, rel=1e-6, abs=tolerance * scale)
        assert found[name] >= 0
    assert K.within_block_error() == pytest.approx(sum(gaps.values()), rel=1e-6, abs=tolerance * scale)
    assert (K.shape, K.n_params) == (T.shape, len(T))
    for lam in (1e-2, 1.5):
        exact = reference.solve(T, V.double(), lam)
        assert error(K.solve(V, lam), exact) < 10 * tolerance
        named = K.solve(K.layout.unflatten(V), lam)
        assert error(K.layout.flatten(named), exact) < 10 * tolerance
        assert K.log_determinant(lam) == pytest.approx(
            reference.log_determinant(T, lam), rel=100 * tolerance, abs=tolerance
        )


# --- against the dense twin ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["expand", "reduce"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_layer(name, form, unchanged):
    c = case(name)
    with unchanged(c.model):
        F = c.fisher()
        K = fl.KFAC(F, form=form)
        found = K.within_block_error()
    assert found == K.within_block_error()
    check(K, twin(c, F, form), c.matrix, c.vectors())
    for layer in F.layout.layer_names:
        G, A = twin_factors(c, F, layer, form)
        assert error(K.factor_g[layer], G[0] if len(G) == 1 else G) < TOLERANCE
        assert error(K.factor_a[layer], A[0] if len(A) == 1 else A) < TOLERANCE


@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("name", [*FEW, "segmentation", "bernoulli_image", "gaussian_image"])
def test_every_kind(name, kind):
    c = case(name, kind)
    F = c.fisher()
    check(fl.KFAC(F), twin(c, F), c.matrix, c.vectors())


@pytest.mark.parametrize("form", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_ignored_labels_enter_once(kind, form):
    """Trap 3: one weight path for all kinds and structures."""
    model, (x, _), _ = ZOO["segmentation"]()
    y = torch.randint(3, (5, 3, 3), generator=rng())
    y[0, :2], y[3] = -100, -100
    likelihood = fl.Categorical(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
    whole = fl.Fisher(model, (x, y), likelihood=likelihood, kind=kind, mc_samples=DRAWS, seed=SEED)
    labels = drawn_labels(model, (x, y), likelihood) if kind == "mc" else None
    truth = reference.fisher(model, (x, y), likelihood, kind, labels=labels)
    parts = []
    for layer in whole.layout.layers:
        a, g, w = reference.inputs_and_scores(model, (x, y), likelihood, layer.name, kind, labels=labels)
        parts.append(reference.kronecker_block(*reference.kronecker_factors(reference.with_bias(a), g, w, form), True))
    T = torch.block_diag(*parts)
    split = [(x[:2], y[:2]), (x[2:3], y[2:3]), (x[3:], y[3:])]
    for F in (whole, fl.Fisher(model, split, likelihood=likelihood, kind=kind, mc_samples=DRAWS, seed=SEED)):
        check(fl.KFAC(F, form=form), T, truth, case("segmentation").vectors())


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("form", ["expand", "reduce"])
def test_trap_3_a_weight_of_two_is_the_example_twice(kind, form):
    model, (x, _), _ = ZOO["conv_stride"]()
    y = torch.tensor([0, 1, 2, 1, 0])
    likelihood = fl.Categorical(weight=torch.tensor([1.0, 2.0, 0.25], dtype=torch.float64))
    weighted = fl.KFAC(fl.Fisher(model, (x, y), likelihood=likelihood, kind=kind), form=form).dense()
    times = torch.tensor([4, 8, 1])[y]
    again = (x.repeat_interleave(times, 0), y.repeat_interleave(times))
    repeated = fl.KFAC(fl.Fisher(model, again, likelihood="categorical", kind=kind), form=form).dense()
    assert error(weighted, repeated) < 1e-12
    plain = fl.KFAC(fl.Fisher(model, (x, y), likelihood="categorical", kind=kind), form=form).dense()
    assert error(weighted, plain) > 1e-2


@pytest.mark.parametrize("name", FEW)
def test_streamed_and_kept_give_the_same(name):
    c = case(name)
    kept = c.fisher()
    streamed = c.fisher(memory=kept.plan.nbytes // 2)
    assert not streamed.plan.kept
    for form in ("expand", "reduce"):
        one, other = fl.KFAC(kept, form=form), fl.KFAC(_roomy(streamed), form=form)
        assert error(other.dense(), one.dense()) < 1e-12
        assert other.within_block_error() == pytest.approx(
            one.within_block_error(), rel=1e-8, abs=1e-12 * kept.frobenius_norm() ** 2
        )


def _roomy(F: fl.Fisher) -> fl.Fisher:
    """The budget decided that scores are streamed; factors of tiny networks are as large as their scores."""
    F.memory = 2**30
    return F


def test_float32():
    for name in ("mlp_tanh", "lenet", "conv_groups"):
        c = case(name)
        model, (x, y), likelihood = ZOO[name]()
        F = fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood)
        K = fl.KFAC(F)
        assert K.dtype == torch.float32
        check(K, twin(c, c.fisher()), c.matrix, c.vectors(), 1e-5)


def wide(dtype: torch.dtype = torch.float64) -> Any:
    """Four examples, and layers with many more inputs and outputs: factors of low rank."""
    build = lambda: nn.Sequential(nn.Conv1d(16, 20, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))  # noqa: E731
    model, (x, y), likelihood = make_case("wide layers", build, (16, 3), n=4)
    truth = reference.fisher(model, (x, y), likelihood, "empirical")
    data = (x.to(dtype), y)
    return Case(model.to(dtype), data, likelihood, "empirical", truth)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_few_examples_and_wide_layers(dtype):
    """Eigenvectors come from the few rows of the factors; what is outside of their span has the eigenvalue 0."""
    c, tolerance = wide(dtype), {torch.float64: TOLERANCE, torch.float32: 1e-5}[dtype]
    F = c.fisher()
    T = twin(wide(), wide().fisher())
    K = fl.KFAC(F)
    eigen = K._parts["0"].eigen
    assert eigen.q_a.shape == (2, 25, 4)
    assert eigen.q_g.shape == (2, 10, 4)
    check(K, T, c.matrix, c.vectors(), tolerance)
    assert K.solve_flops < 9 * (2 * (25**3 + 10**3) + 21**3 + 3**3) / 4
    E = fl.EKFAC(F)
    assert E.basis_a["0"].shape == (2, 25, 4)
    assert fl.EKFAC(F, form="reduce").basis_a["0"].shape == (2, 25, 25)
    bases = [
        reference.ekfac_block(
            c.matrix[x.start : x.stop, x.start : x.stop],
            *(q.double() if q.ndim == 3 else q.double()[None] for q in (E.basis_g[x.name], E.basis_a[x.name])),
            True,
        )
        for x in F.layout.layers
    ]
    check(E, torch.block_diag(*bases), c.matrix, c.vectors(), tolerance)
    assert E.trace() == pytest.approx(c.matrix.trace().item(), rel=tolerance)


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "conv_everything", "lenet"])
def test_factored_damping(name):
    c = case(name)
    F = c.fisher()
    K = fl.KFAC(F, damping="factored")
    assert K.name == "KFAC factored"
    V = c.vectors()
    assert error(K.dense(), twin(c, F)) < TOLERANCE
    for lam in (1e-2, 1.5):
        blocks = [
            reference.kronecker_block(
                *reference.factored_damping(*twin_factors(c, F, x.name, "expand"), lam), x.bias is not None
            )
            for x in F.layout.layers
        ]
        damped = torch.block_diag(*blocks)
        assert error(K.solve(V, lam), torch.linalg.solve(damped, V)) < TOLERANCE
        assert error(K.damped_product(V, lam), damped @ V) < TOLERANCE
        assert K.log_determinant(lam) == pytest.approx(torch.logdet(damped / lam).item(), rel=1e-9)
        exact = fl.KFAC(F)
        assert error(exact.damped_product(V, lam), (exact @ V) + lam * V) < TOLERANCE
        assert error(exact.damped_product(V[:, 0], lam), (exact @ V[:, 0]) + lam * V[:, 0]) < TOLERANCE
        assert error(K.solve(V, lam), exact.solve(V, lam)) > 1e-4  # another matrix
    orders = [
        (len(G[0]), len(A[0]), len(G)) for G, A in (twin_factors(c, F, x, "expand") for x in F.layout.layer_names)
    ]
    assert K.solve_flops == pytest.approx(sum(n * (d_o**3 + d**3) / 3 for d_o, d, n in orders))


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "residual"])
def test_on_layer(name):
    c = case(name)
    F = c.fisher()
    K = fl.KFAC(F, others="diagonal")
    whole, errors = K.dense(), K.within_block_errors()
    for layer in F.layout.layers:
        part = K.on_layer(layer.name)
        at = slice(layer.start, layer.stop)
        assert error(part.dense(), whole[at, at]) < TOLERANCE
        assert part.shape == (layer.size, layer.size)
        assert part.within_block_error() == errors[layer.name]
        alone = fl.KFAC(F.restrict(layer.name), others="diagonal")
        assert error(alone.dense(), whole[at, at]) < TOLERANCE
        assert part.storage_bytes == alone.storage_bytes
    assert K.storage_bytes == sum(K.on_layer(name).storage_bytes for name in F.layout.layer_names)
    assert K.solve_flops == pytest.approx(sum(K.on_layer(name).solve_flops for name in F.layout.layer_names))
    with pytest.raises(InputError, match=r"Unknown layer 'nowhere'"):
        K.on_layer("nowhere")


# --- exact where theory says so --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deep", "convolutions", "groups"])
def test_exact_for_a_deep_linear_network_with_gaussian_likelihood(name):
    """Traps 11 and 16: one output position, no reuse; one pair for each group."""
    builds = {
        "deep": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2)), (4,)),
        "convolutions": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, stride=3), nn.Flatten(), nn.Linear(3, 2)), (2, 3, 4)),
        "groups": (
            lambda: nn.Sequential(nn.Conv2d(4, 6, (2, 3), groups=2, stride=2), nn.Flatten(), nn.Linear(6, 2)),
            (4, 2, 3),
        ),
    }
    build, shape = builds[name]
    model, data, _ = make_case(f"linear {name}", build, shape, "gaussian", n=9)
    F = fl.Fisher(model, data, likelihood=fl.Gaussian(variance=0.3))
    for form in ("expand", "reduce"):
        K = fl.KFAC(F, form=form)
        truth = F.frobenius_norm() ** 2
        for layer in F.layout.layers:
            block = F.block(layer.name)
            if layer.groups > 1:  # no product of Kronecker pairs couples the groups
                group = torch.cat([torch.arange(6).repeat_interleave(12) // 3, torch.arange(6) // 3])
                block = block * (group[:, None] == group)
            assert error(K.on_layer(layer.name).dense(), block) < 1e-12
            if layer.groups == 1:
                assert K.within_block_errors()[layer.name] < 1e-12 * truth
    if name == "deep":
        v = torch.randn(F.n_params, generator=rng(), dtype=torch.float64)
        B = fl.BlockDiagonal(F, "layer")
        assert error(fl.KFAC(F).solve(v, 0.1), B.solve(v, 0.1)) < 1e-10


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_exact_for_one_example_with_one_position(likelihood):
    def build():
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))

    model, data, likelihood = make_case("one example", build, (2, 3, 3), likelihood, n=1)
    F = fl.Fisher(model, data, likelihood=likelihood)
    assert error(fl.KFAC(F).dense(), fl.BlockDiagonal(F, "layer").dense()) < 1e-12
    assert fl.KFAC(F).within_block_error() < 1e-12 * F.frobenius_norm() ** 2


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (1, "same"), (2, 0), (2, 1), (3, 0), (3, 1)])
def test_trap_16_factors_are_sums_patch_by_patch(stride, padding):
    """Written out: every patch by itself, and the scores of every position."""
    side = 1 if padding == "same" else padding
    corners = [(i, j) for i in range(0, 3 + 2 * side, stride) for j in range(0, 4 + 2 * side, stride)]

    def build() -> nn.Module:
        conv = nn.Conv2d(2, 3, 3, stride=stride, padding=padding)
        return nn.Sequential(conv, nn.Flatten(), nn.Linear(3 * len(corners), 2))

    model, (x, y), _ = make_case(f"patches {stride} {padding}", build, (2, 5, 6), "gaussian", n=4)
    padded = torch.nn.functional.pad(x, (side,) * 4)
    patches = [
        torch.cat([padded[:, :, i : i + 3, j : j + 3].flatten(1), torch.ones_like(x[:, 0, 0, :1])], 1)
        for i, j in corners
    ]
    scores = model[2].weight.detach().view(2, 3, -1).unbind(2)  # at each position, and the same for every example
    K = fl.KFAC(fl.Fisher(model, (x, y), likelihood="gaussian"))
    assert error(K.factor_a["0"], sum(a.T @ a for a in patches) / (4 * len(corners))) < 1e-12
    assert error(K.factor_g["0"], sum(g.T @ g for g in scores)) < 1e-12


def test_reduce_is_exact_where_the_scores_do_not_depend_on_the_position():
    """A mean over positions after a linear layer: g is constant over t, so the block is (Σg)(mean a)."""

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((2, 3))

    model, data, _ = make_case("mean of a linear map", Mean, (2, 5, 5), "gaussian", n=7)
    F = fl.Fisher(model, data, likelihood="gaussian")
    assert error(fl.KFAC(F, form="reduce").dense(), F.dense()) < 1e-12
    assert error(fl.KFAC(F).dense(), F.dense()) > 1e-2


def test_trap_8_uses_of_a_module_are_further_positions():
    """The rule is that of positions: a layer that is called twice equals one call on both inputs, one after another."""

    class Twice(nn.Module):
        def __init__(self, together: bool):
            super().__init__()
            self.shared, self.head, self.together = nn.Linear(3, 4), nn.Linear(8, 3), together

        def forward(self, x: Tensor) -> Tensor:
            if self.together:
                return self.head(torch.tanh(self.shared(x)).flatten(1))
            return self.head(torch.cat([torch.tanh(self.shared(x[:, 0])), torch.tanh(self.shared(x[:, 1]))], 1))

    model, data, _ = make_case("twice", lambda: Twice(False), (2, 3))
    other = Twice(True).double()
    other.load_state_dict(model.state_dict())
    F, H = (fl.Fisher(m, data, likelihood="categorical") for m in (model, other))
    assert F.plan["shared"].positions == 2
    for form in ("expand", "reduce"):
        assert error(fl.KFAC(F, form=form).dense(), fl.KFAC(H, form=form).dense()) < 1e-12
    assert fl.KFAC(F).within_block_errors()["shared"] > 0


# --- the best Kronecker block ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp_no_bias", "conv_no_bias", "conv_everything"])
def test_optimal_factors(name):
    c = case(name)
    F = c.fisher()
    K, best = fl.KFAC(F), fl.KFAC(F, factors="optimal")
    assert best.name == "KFAC optimal"
    for layer in [x for x in F.layout.layers if x.bias is None]:
        T = c.matrix[layer.start : layer.stop, layer.start : layer.stop]
        d_o = layer.weight.shape[0]
        if layer.groups == 1:
            optimum = reference.best_kronecker_error(T, d_o, layer.size // d_o)
        else:
            size = layer.size // layer.groups
            inside = sum(
                reference.best_kronecker_error(
                    T[k : k + size, k : k + size].contiguous(), d_o // layer.groups, layer.size // d_o
                )
                for k in range(0, layer.size, size)
            )
            kept = sum(T[k : k + size, k : k + size].square().sum().item() for k in range(0, layer.size, size))
            optimum = inside + T.square().sum().item() - kept
        norm2 = T.square().sum().item()
        assert best.within_block_errors()[layer.name] == pytest.approx(optimum, rel=1e-6, abs=1e-9 * norm2)
        assert best.within_block_errors()[layer.name] <= K.within_block_errors()[layer.name] + 1e-12 * norm2
    assert best.within_block_error() < K.within_block_error()


def test_optimal_factors_with_bias_are_no_worse():
    for name in ("mlp_tanh", "dense_on_positions", "lenet"):
        F = case(name).fisher()
        assert fl.KFAC(F, factors="optimal").within_block_error() <= fl.KFAC(F).within_block_error()


def test_optimal_factors_that_are_not_reached_say_so(monkeypatch):
    monkeypatch.setattr("fisherlens.approximations.kronecker_sums._MOST_STEPS", 3)
    F = case("conv_padding").fisher()
    with pytest.warns(
        ConvergenceWarning, match="best Kronecker factors of .* were not reached to 1e-13 in 3 half-steps"
    ):
        best = fl.KFAC(F, factors="optimal")
    assert best.within_block_error() <= fl.KFAC(F).within_block_error()


def test_zero_scores():
    c = case("one_class")
    K = fl.KFAC(c.fisher())
    assert not K.dense().any()
    v = torch.ones(K.n_params, dtype=torch.float64)
    assert error(K.solve(v, 0.5), 2 * v) < TOLERANCE
    assert error(fl.KFAC(c.fisher(), damping="factored").solve(v, 0.5), v) > 0
    assert K.within_block_error() == 0
    best = fl.KFAC(c.fisher(), factors="optimal")
    assert not best.dense().any()
    assert best.log_determinant(0.1) == 0
