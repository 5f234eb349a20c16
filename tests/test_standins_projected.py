"""ProjectedKFAC against its dense twin, KFAC, and the definition of its bases."""

from __future__ import annotations

import pytest
import torch
from cases import cast
from fisher_checks import DRAWS, KINDS, QUIET, ZOO, case, drawn_labels, error
from standin_checks import check_standin
from test_fisher_streamed import of_path
from torch import Tensor

import fisherlens as fl
from fisherlens import reference
from fisherlens.approximations.kronecker import KFAC
from fisherlens.errors import InputError, MemoryBudgetError, UnsupportedModuleError
from fisherlens.linalg.spiked import spiked
from fisherlens.reference import kronecker

pytestmark = pytest.mark.filterwarnings(QUIET)
NAMES = [
    *("softmax_regression", "mlp_tanh", "mlp_no_bias", "frozen_first_layer", "dense_on_positions", "module_used_twice"),
    *("conv_stride", "conv_groups", "conv_depthwise", "conv_everything", "conv_1d", "conv_3d", "lenet", "segmentation"),
]


def dense_factors(c, name: str, form: str) -> tuple[Tensor, Tensor]:
    labels = drawn_labels(c.model, c.data, c.likelihood, DRAWS) if c.kind == "mc" else None
    module = c.model.get_submodule("" if name == "(root)" else name)
    a, g, w = kronecker.inputs_and_scores(
        c.model, c.data, c.likelihood, "" if name == "(root)" else name, c.kind, labels=labels
    )
    if getattr(module, "bias", None) is not None and module.bias.requires_grad:
        a = kronecker.with_bias(a)
    return kronecker.kronecker_factors(a, g, w, form)


def by_group(x: Tensor) -> Tensor:
    return x if x.ndim == 3 else x[None]


def twin(c, K: fl.ProjectedKFAC, form: str = "expand") -> Tensor:
    blocks = []
    for layer in K.layout.layers:
        G, A = dense_factors(c, layer.name, form)
        pairs = [(G, by_group(K.basis_g[layer.name])), (A, by_group(K.basis_a[layer.name]))]
        G, A = (
            torch.stack([reference.projected_factor(*one) for one in zip(x, basis, strict=True)]) for x, basis in pairs
        )
        blocks.append(kronecker.kronecker_block(G, A, layer.bias is not None))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_projected_factors(name, rank, unchanged):
    c = case(name)
    F = c.fisher()
    with unchanged(c.model):
        K = fl.ProjectedKFAC(F, rank)
        check_standin(K, c.matrix, twin(c, K), c.vectors())
    for bases in (K.basis_g, K.basis_a):
        for basis in bases.values():
            r = basis.shape[-1]
            assert r == min(rank, basis.shape[-2])
            assert error(basis.mT @ basis, torch.eye(r).double().expand(*basis.shape[:-2], r, r)) < 1e-12


@pytest.mark.parametrize("name", ["mlp_tanh", "dense_on_positions", "conv_groups", "lenet", "module_used_twice"])
def test_with_every_direction_it_is_kfac(name):
    c = case(name)
    F = c.fisher()
    for form in ("expand", "reduce"):
        K, full = fl.ProjectedKFAC(F, 100, form=form), KFAC(F, form=form)
        check_standin(K, c.matrix, full.dense(), c.vectors(), layers=form == "expand")
    for damping in ("exact", "factored"):
        K, full = fl.ProjectedKFAC(F, 100, damping=damping), KFAC(F, damping=damping)
        assert error(K.solve(c.vectors(), 0.02), full.solve(c.vectors(), 0.02)) < 1e-9
        assert error(K.damped_product(c.vectors(), 0.02), full.damped_product(c.vectors(), 0.02)) < 1e-10
        assert K.log_determinant(0.02) == pytest.approx(full.log_determinant(0.02), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "segmentation"])
def test_every_kind(name, kind):
    c = case(name, kind)
    K = fl.ProjectedKFAC(c.fisher(), 2)
    check_standin(K, c.matrix, twin(c, K), c.vectors(), layers=False)


@pytest.mark.parametrize("form", ["expand", "reduce"])
@pytest.mark.parametrize("damping", ["exact", "factored"])
def test_forms_of_positions_and_damping(form, damping):
    for name in ("conv_groups", "dense_on_positions"):
        c = case(name)
        F = c.fisher()
        K = fl.ProjectedKFAC(F, 2, form=form, damping=damping)
        assert error(K.dense(), twin(c, K, form)) < 1e-10
        V = c.vectors()
        for lam in (1e-3, 0.5):
            assert error(K.damped_product(K.solve(V, lam), lam), V) < 1e-9
            assert error(K.solve(K.damped_product(V, lam), lam), V) < 1e-9
        if damping == "exact":
            assert error(K.damped_product(V, 0.5), K @ V + 0.5 * V) < 1e-12


def test_factored_damping_is_that_of_the_projected_factors():
    c = case("mlp_tanh")
    F = c.fisher()
    K = fl.ProjectedKFAC(F, 2, damping="factored")
    blocks = []
    for layer in F.layout.layers:
        G, A = dense_factors(c, layer.name, "expand")
        G, A = (
            reference.projected_factor(x[0], basis[layer.name])[None] for x, basis in ((G, K.basis_g), (A, K.basis_a))
        )
        blocks.append(kronecker.kronecker_block(*kronecker.factored_damping(G, A, 0.03), True))
    damped = torch.block_diag(*blocks)
    assert error(K.damped_product(c.vectors(), 0.03), damped @ c.vectors()) < 1e-10
    assert error(K.solve(c.vectors(), 0.03), torch.linalg.solve(damped, c.vectors())) < 1e-10
    assert K.log_determinant(0.03) == pytest.approx(torch.logdet(damped / 0.03).item(), rel=1e-10)


@pytest.mark.parametrize("path", ["streamed", "linearised"])
def test_scores_that_are_not_kept(path):
    c = case("lenet")
    F = of_path(c, path)
    F.memory = 2**30
    K = fl.ProjectedKFAC(F, 2)
    check_standin(K, c.matrix, twin(c, K), c.vectors(), layers=False)


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet"])
def test_float32(name):
    c = case(name)
    model, data, likelihood = cast(ZOO[name](), torch.float32)
    K = fl.ProjectedKFAC(fl.Fisher(model, data, likelihood=likelihood), 2)
    check_standin(K, c.matrix, twin(c, K), c.vectors(), tol=2e-5, split=1e-4, layers=False)


def test_power_steps_approach_the_leading_eigenvectors():
    c = case("mlp_tanh")
    F = c.fisher()
    exact = fl.ProjectedKFAC(F, 2, basis="exact")
    for name, basis in exact.basis_a.items():
        _, A = dense_factors(c, name, "expand")
        values, vectors = torch.linalg.eigh(A[0])
        assert error(basis @ basis.T, vectors[:, -2:] @ vectors[:, -2:].T) < 1e-10
        assert exact.level_a[name].item() == pytest.approx(values[:-2].mean().item(), rel=1e-10)
    gaps = [error(fl.ProjectedKFAC(F, 2, power_steps=steps).dense(), exact.dense()) for steps in (1, 4, 200)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-8


def test_a_power_step_multiplies_a_random_start_by_the_factor():
    A = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    A = A @ A.mT
    made = spiked(A, 2, power_steps=2, generator=torch.Generator().manual_seed(7))
    start = torch.randn(1, 6, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    image = torch.linalg.qr(A @ A @ start)[0]
    assert error(made.basis @ made.basis.mT, image @ image.mT) < 1e-10
    assert error(made.dense(), reference.projected_factor(A[0], made.basis[0])[None]) < 1e-12


def test_seeds():
    F = case("mlp_tanh").fisher()
    first = fl.ProjectedKFAC(F, 1, seed=3)
    assert torch.equal(first.dense(), fl.ProjectedKFAC(F, 1, seed=3).dense())
    assert error(first.dense(), fl.ProjectedKFAC(F, 1, seed=4).dense()) > 1e-6
    assert torch.equal(
        fl.ProjectedKFAC(F, 1, basis="exact", seed=3).dense(), fl.ProjectedKFAC(F, 1, basis="exact").dense()
    )


def test_traces_are_those_of_kfac():
    F = case("conv_groups").fisher()
    assert fl.ProjectedKFAC(F, 2).trace() == pytest.approx(KFAC(F).trace(), rel=1e-12)
    K = fl.ProjectedKFAC(F, 2)
    held = sum(d * 2 + 2 + 1 for d in (3, 19) for _ in range(2))
    held += sum(d * 2 + 2 + 1 for d in (3, 25))
    assert K.storage_bytes == 8 * held


def test_other_layers():
    c = case("batchnorm_2d")
    F = c.fisher()
    text = r"ProjectedKFAC has no Kronecker factors for layer '1' \(BatchNorm2d\).*others='diagonal'"
    with pytest.raises(UnsupportedModuleError, match=text):
        fl.ProjectedKFAC(F)
    for others in ("diagonal", "block"):
        K = fl.ProjectedKFAC(F, 2, others=others)
        own = KFAC(F, others=others).on_layer("1")
        assert error(K.on_layer("1").dense(), own.dense()) < 1e-12
        assert K.within_block_error() > 0


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"rank": 0}, InputError, r"rank must be at least 1; got 0\. The basis of a factor needs a direction"),
        ({"rank": 2.5}, TypeError, r"rank must be an int; got 2\.5 of type float"),
        ({"rank": True}, TypeError, r"rank must be an int; got True of type bool"),
        ({"power_steps": 0}, InputError, r"power_steps must be at least 1; got 0"),
        ({"basis": "exakt"}, InputError, r"Unknown basis 'exakt'\. Did you mean 'exact'\?"),
        ({"form": "expend"}, InputError, r"Unknown form 'expend'\. Did you mean 'expand'\?"),
        (
            {"damping": 1e-3},
            InputError,
            r"damping of ProjectedKFAC is how solves are damped, .* ProjectedKFAC\(F\)\.solve\(v, damping=1e-3\)",
        ),
        ({"damping": "factord"}, InputError, r"Unknown way of damping 'factord'\. Did you mean 'factored'\?"),
        ({"others": "drop"}, InputError, r"Unknown value of others 'drop'"),
        ({"seed": -1}, InputError, r"seed must be an integer >= 0; got -1"),
    ],
)
def test_what_is_refused(options, kind, text, unchanged):
    c = case("mlp_tanh")
    with unchanged(c.model), pytest.raises(kind, match=text):
        fl.ProjectedKFAC(c.fisher(), **options)


def test_what_does_not_fit():
    F = case("mlp_tanh").fisher()
    F.memory = 100
    with pytest.raises(MemoryBudgetError, match=r"The factors of ProjectedKFAC take .* over the budget of 100 B"):
        fl.ProjectedKFAC(F)
