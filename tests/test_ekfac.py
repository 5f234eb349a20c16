"""EKFAC: the best diagonal in the eigenbases of KFAC's factors, against its dense twin."""

from __future__ import annotations

import pytest
import torch
from cases import make_case
from fisher_checks import DRAWS, QUIET, SEED, ZOO, case, drawn_labels, error
from test_kfac import FEW, SUPPORTED, check, twin_factors
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError

pytestmark = pytest.mark.filterwarnings(QUIET)
TOLERANCE = 1e-10


def batched(matrix: Tensor) -> Tensor:
    return (matrix if matrix.ndim == 3 else matrix[None]).double()


def twin(E: fl.EKFAC, truth: Tensor) -> Tensor:
    """Q diag(Qᵀ F_l Q) Qᵀ of every layer, in the bases that E names."""
    blocks = []
    for layer in E.layout.layers:
        at = slice(layer.start, layer.stop)
        bases = batched(E.basis_g[layer.name]), batched(E.basis_a[layer.name])
        blocks.append(reference.ekfac_block(truth[at, at], *bases, layer.bias is not None))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("form", ["expand", "reduce"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_layer(name, form, unchanged):
    c = case(name)
    with unchanged(c.model):
        F = c.fisher()
        E = fl.EKFAC(F, form=form)
        E.within_block_error()
    check(E, twin(E, c.matrix), c.matrix, c.vectors())
    for layer in F.layout.layer_names:
        G, A = twin_factors(c, F, layer, form)
        for factor, basis in ((G, E.basis_g[layer]), (A, E.basis_a[layer])):
            q = batched(basis)
            rotated = q.mT @ factor @ q
            values = rotated.diagonal(dim1=-2, dim2=-1)
            assert error(torch.diag_embed(values), rotated) < TOLERANCE
            assert (values.diff(dim=-1) <= 1e-10 * values[..., :1]).all()
            # complete, or the rows of the factor are fewer than half its order
            assert q.shape[-1] == q.shape[-2] or 2 * q.shape[-1] <= q.shape[-2]
            assert values.sum().item() == pytest.approx(factor.diagonal(dim1=-2, dim2=-1).sum().item(), rel=TOLERANCE)
            q = q.contiguous()
            assert error(q.mT @ q, torch.eye(q.shape[-1], dtype=q.dtype).expand(len(q), -1, -1)) < 1e-12
        assert (E.scales[layer] >= 0).all()


@pytest.mark.parametrize("kind", ["mc", "empirical"])
@pytest.mark.parametrize("name", [*FEW, "segmentation", "bernoulli_image", "gaussian_image"])
def test_every_kind(name, kind):
    c = case(name, kind)
    E = fl.EKFAC(c.fisher())
    check(E, twin(E, c.matrix), c.matrix, c.vectors())


@pytest.mark.parametrize("form", ["expand", "reduce"])
@pytest.mark.parametrize("name", [*SUPPORTED, "residual"])
def test_trace_preserved_and_never_worse_than_kfac(name, form):
    F = case(name).fisher()
    others = "diagonal" if name == "residual" else "raise"
    E, K = fl.EKFAC(F, form=form, others=others), fl.KFAC(F, form=form, others=others)
    assert E.trace() == pytest.approx(F.trace(), rel=1e-12)
    ours, theirs = E.within_block_errors(), K.within_block_errors()
    rounding = 1e-12 * F.frobenius_norm() ** 2
    assert all(ours[layer] <= theirs[layer] + rounding for layer in F.layout.layer_names)
    if name in ("mlp_tanh", "lenet", "conv_groups"):
        assert E.within_block_error() < 0.99 * K.within_block_error()


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_weights_and_ignored_labels(kind):
    model, (x, _), _ = ZOO["segmentation"]()
    y = torch.randint(3, (5, 3, 3), generator=torch.Generator().manual_seed(0))
    y[0, :2], y[3] = -100, -100
    likelihood = fl.Categorical(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64))
    labels = drawn_labels(model, (x, y), likelihood) if kind == "mc" else None
    truth = reference.fisher(model, (x, y), likelihood, kind, labels=labels)
    split = [(x[:2], y[:2]), (x[2:], y[2:])]
    for data in ((x, y), split):
        E = fl.EKFAC(fl.Fisher(model, data, likelihood=likelihood, kind=kind, mc_samples=DRAWS, seed=SEED))
        check(E, twin(E, truth), truth, case("segmentation").vectors())


@pytest.mark.parametrize("name", FEW)
def test_streamed_and_kept_give_the_same(name):
    c = case(name)
    kept = c.fisher()
    streamed = c.fisher(memory=kept.plan.nbytes // 2)
    assert not streamed.plan.kept
    streamed.memory = 2**30
    one, other = fl.EKFAC(kept), fl.EKFAC(streamed)
    check(other, twin(other, c.matrix), c.matrix, c.vectors())
    for layer in kept.layout.layer_names:
        assert other.within_block_errors()[layer] == pytest.approx(
            one.within_block_errors()[layer], rel=1e-6, abs=1e-10 * kept.frobenius_norm() ** 2
        )


def test_float32():
    for name in ("mlp_tanh", "lenet", "conv_groups"):
        c = case(name)
        model, (x, y), likelihood = ZOO[name]()
        E = fl.EKFAC(fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood))
        assert E.dtype == torch.float32
        check(E, twin(E, c.matrix), c.matrix, c.vectors(), 1e-5)


def test_exact_where_kfac_is_exact():
    build = lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2))  # noqa: E731
    model, data, _ = make_case("linear ekfac", build, (4,), "gaussian", n=9)
    F = fl.Fisher(model, data, likelihood="gaussian")
    assert error(fl.EKFAC(F).dense(), fl.BlockDiagonal(F, "layer").dense()) < 1e-10
    assert fl.EKFAC(F).within_block_error() < 1e-10 * F.frobenius_norm() ** 2


def test_positions_are_summed_before_squaring():
    """A moment of sums over positions is not a sum of the positions' moments."""
    c = case("dense_on_positions")
    F = c.fisher()
    E = fl.EKFAC(F)
    a, g, w = reference.inputs_and_scores(c.model, c.data, c.likelihood, "0")
    a, q_g, q_a = reference.with_bias(a)[0], E.basis_g["0"], E.basis_a["0"]
    together = (q_g.T @ torch.einsum("nrto,nti->nroi", g[0], a) @ q_a).square().sum((0, 1)) / w.sum()
    apart = torch.einsum("nrto,nti->nrtoi", g[0] @ q_g, a @ q_a).square().sum((0, 1, 2)) / w.sum()
    assert error(E.scales["0"], together) < TOLERANCE
    assert error(E.scales["0"], apart) > 0.05


def test_on_layer_and_storage():
    c = case("residual")
    F = c.fisher()
    E = fl.EKFAC(F, others="block")
    assert E.name == "EKFAC"
    assert fl.EKFAC(F, form="reduce", others="block").name == "EKFAC reduce"
    whole, errors = E.dense(), E.within_block_errors()
    for layer in F.layout.layers:
        part, at = E.on_layer(layer.name), slice(layer.start, layer.stop)
        assert error(part.dense(), whole[at, at]) < TOLERANCE
        assert part.within_block_error() == errors[layer.name]
    d_o, d = 3, 9 + 1
    assert E.on_layer("stem").storage_bytes == 8 * (d_o**2 + d**2 + d_o * d)
    assert E.on_layer("stem").solve_flops == pytest.approx(9 * (d_o**3 + d**3))
    with pytest.raises(InputError, match=r"Unknown layer 'stam'. Did you mean 'stem'"):
        E.on_layer("stam")


def test_zero_scores():
    E = fl.EKFAC(case("one_class").fisher())
    assert not E.dense().any()
    assert E.within_block_error() == 0
    assert E.log_determinant(0.1) == 0
