"""What a layer's scores answer, in every representation, against explicit rows from automatic differentiation."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import ALL_CASES, make_case
from fisher_checks import QUIET, Case, case, error
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.layout import Layout
from fisherlens.linalg.memory import SMALL, Workspace, zeros
from fisherlens.scores.conv import ConvGeometry, ConvScores
from fisherlens.scores.dense import DenseScores
from fisherlens.scores.explicit import ExplicitScores, ZeroScores
from fisherlens.scores.matrix import ScoreMatrix

pytestmark = pytest.mark.filterwarnings(QUIET)
TOLERANCE = 1e-12


def explicit_rows(c: Case, F: fl.Fisher) -> Tensor:
    """U ``(N R, P)``, n-major, from the full Jacobian and the score columns in output space."""
    J = reference.jacobian(c.model, c.data[0])
    n, p = len(J), J.shape[-1]
    J = J.reshape(n, -1, p)
    columns = [torch.cat([bound.column(r) for bound in F._bound]).reshape(n, -1) for r in range(F.n_columns)]
    return torch.stack([torch.einsum("nc,ncp->np", column, J) for column in columns], dim=1).reshape(-1, p)


def check_answers(scores, U: Tensor) -> None:
    """All questions that a layer answers; U is its explicit matrix."""
    rows, p = U.shape
    g = torch.Generator().manual_seed(0)
    assert (scores.rows, scores.size, scores.n * scores.r) == (rows, p, rows)
    for k in (1, 2, 7):
        V = torch.randn(p, k, generator=g, dtype=U.dtype)
        Z = torch.randn(rows, k, generator=g, dtype=U.dtype)
        assert error(scores.matmat(V), U @ V) < TOLERANCE
        assert error(scores.matmat(V.T.contiguous().T), U @ V) < TOLERANCE
        assert error(scores.matmat(torch.cat([V, V], 1)[:, :k]), U @ V) < TOLERANCE
        for out in (torch.full((k, p), 9.0, dtype=U.dtype), torch.full((k, p + 5), 9.0, dtype=U.dtype)[:, 2 : p + 2]):
            scores.rmatmat(Z, out)
            assert error(out, (U.T @ Z).T) < TOLERANCE
        # adjoint
        assert error((Z * scores.matmat(V)).sum(0), (out.T * V).sum(0)) < TOLERANCE
    assert error(scores.gram(), U @ U.T) < TOLERANCE
    assert error(scores.diagonal(), U.square().sum(0)) < TOLERANCE
    order = torch.randperm(p, generator=g)
    for index in (order, order[:1], torch.tensor([0, p - 1, 0]), order[:0]):
        assert error(scores.columns(index), U[:, index]) < TOLERANCE
    some = torch.randint(rows, (5,), generator=g)
    for index in (torch.arange(rows), some, some[:0]):
        assert error(scores.rows_at(index), U[index]) < TOLERANCE
    for size in {1, min(2, p), max(1, p // 2), p}:
        index = order[: p // size * size].reshape(-1, size)
        truth = torch.stack([U[:, b].T @ U[:, b] for b in index])
        assert error(scores.moments(index), truth) < TOLERANCE
        X = scores.block_rows(index)
        assert X.shape == (len(index), scores.block_row_count(index), size)
        assert error(X.mT @ X, truth) < TOLERANCE
    c = torch.randn(scores.n, scores.r, generator=g, dtype=U.dtype)
    one = scores.contract(c)
    assert (one.rows, one.r, one.layer) == (scores.n, 1, scores.layer)
    contracted = torch.einsum("nr,nrp->np", c, U.view(scores.n, scores.r, p))
    assert error(one.rows_at(torch.arange(scores.n)), contracted) < TOLERANCE
    assert error(one.gram(), contracted @ contracted.T) < TOLERANCE
    assert torch.equal(torch.sort(torch.cat(scores.column_chunks())).values, torch.arange(p))
    assert scores.nbytes >= 0


def smallest_kept(c: Case) -> fl.Fisher:
    F = kept = c.fisher()
    budget = F.plan.nbytes
    while not (F.plan.streamed or F.plan.linearised):
        kept, budget = F, min(budget, F.plan.nbytes) - 8
        F = c.fisher(memory=budget)
    return kept


@pytest.mark.parametrize("name", ALL_CASES)
def test_every_layer_of_the_zoo(name):
    c = case(name)
    for F in (c.fisher(), smallest_kept(c)):
        U = explicit_rows(c, F)
        for scores in F.scores.layers:
            check_answers(scores, U[:, scores.layer.start : scores.layer.stop])
        V = c.vectors()
        assert error(F.scores.matmat(V), U @ V) < TOLERANCE
        assert error(F.scores.rmatmat(U[:, :3].contiguous()), U.T @ U[:, :3]) < TOLERANCE
        assert error(F.scores.columns(torch.arange(len(V)).flip(0)), U.flip(1)) < TOLERANCE
        assert error(F.scores.rows_at(torch.tensor([1, 0])), U[[1, 0]]) < TOLERANCE
        assert error(F.scores.product(V, 0.5), U.T @ (U @ V) / 2) < TOLERANCE


def test_every_representation_is_met():
    seen = {
        type(s).__name__ for n in ALL_CASES for F in (case(n).fisher(), smallest_kept(case(n))) for s in F.scores.layers
    }
    assert {"DenseScores", "ConvScores", "ExplicitScores"} <= seen


# --- representations built directly ----------------------------------------------------------------------------------


def layer_of(module: nn.Module, only: str | None = None):
    return Layout.from_model(module, only).layers[0]


@pytest.mark.parametrize("only", [None, "weight", "bias"])
@pytest.mark.parametrize(
    ("n", "r", "t", "d_i", "d_o"), [(5, 3, 1, 4, 2), (3, 2, 4, 5, 3), (2, 1, 3, 1, 1), (1, 4, 2, 3, 5), (6, 1, 1, 1, 2)]
)
def test_dense_scores(n, r, t, d_i, d_o, only):
    g = torch.Generator().manual_seed(1)
    a = torch.randn(n, t, d_i, generator=g, dtype=torch.float64)
    s = torch.randn(n, r, t, d_o, generator=g, dtype=torch.float64)
    weight = torch.einsum("nrto,nti->nroi", s, a).reshape(n * r, -1)
    U = {
        None: torch.cat([weight, s.sum(2).reshape(n * r, -1)], 1),
        "weight": weight,
        "bias": s.sum(2).reshape(n * r, -1),
    }[only]
    check_answers(DenseScores(layer_of(nn.Linear(d_i, d_o), only), a, s), U)


def test_dense_gram_by_tiles_and_by_columns(monkeypatch):
    monkeypatch.setattr("fisherlens.scores.dense.CHUNK_BYTES", 100)
    g = torch.Generator().manual_seed(1)
    for n, r, t, d_i, d_o in ((7, 2, 2, 30, 20), (7, 2, 9, 2, 3), (7, 3, 1, 4, 5)):
        a = torch.randn(n, t, d_i, generator=g, dtype=torch.float64)
        s = torch.randn(n, r, t, d_o, generator=g, dtype=torch.float64)
        U = torch.cat([torch.einsum("nrto,nti->nroi", s, a).reshape(n * r, -1), s.sum(2).reshape(n * r, -1)], 1)
        scores = DenseScores(layer_of(nn.Linear(d_i, d_o)), a, s)
        assert error(scores.gram(), U @ U.T) < TOLERANCE
        V = torch.randn(U.shape[1], 3, generator=g, dtype=torch.float64)
        assert error(scores.matmat(V), U @ V) < TOLERANCE


CONVS = {
    "1d": (nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7)),
    "1d circular": (nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"), (2, 7)),
    "1d groups": (nn.Conv1d(4, 6, 2, groups=2, dilation=2, bias=False), (4, 6)),
    "2d": (nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 2)), (2, 5, 4)),
    "2d same, even": (nn.Conv2d(2, 2, (2, 4), padding="same", dilation=(1, 2)), (2, 4, 5)),
    "2d valid": (nn.Conv2d(2, 2, 3, padding="valid"), (2, 5, 4)),
    "2d depthwise": (nn.Conv2d(3, 6, 3, groups=3, padding=1, stride=2), (3, 5, 5)),
    "2d reflect": (nn.Conv2d(2, 2, 3, padding=2, padding_mode="reflect"), (2, 4, 5)),
    "2d replicate": (nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="replicate", dilation=(2, 1)), (2, 5, 4)),
    "2d circular": (nn.Conv2d(2, 4, (3, 1), padding=(2, 0), padding_mode="circular", groups=2), (2, 4, 4)),
    "2d one by one": (nn.Conv2d(3, 2, 1, stride=2), (3, 4, 4)),
    "3d": (nn.Conv3d(2, 4, (1, 2, 2), stride=(2, 1, 1), padding=(0, 1, 0), groups=2), (2, 3, 3, 3)),
    "3d same": (nn.Conv3d(1, 2, 2, padding="same"), (1, 2, 3, 2)),
}


@pytest.mark.parametrize("only", [None, "weight", "bias"])
@pytest.mark.parametrize("name", CONVS)
def test_convolution_scores(name, only):
    """Rows from functorch, one example and one signal at a time."""
    module, shape = CONVS[name]
    module = copy.deepcopy(module).double()
    if only == "bias" and module.bias is None:
        return
    g = torch.Generator().manual_seed(2)
    x = torch.randn(4, *shape, generator=g, dtype=torch.float64)
    s = torch.randn(4, 2, *module(x).shape[1:], generator=g, dtype=torch.float64)
    own = {k: v.detach() for k, v in module.named_parameters()}

    def inner(parameters, example, signal):
        return (torch.func.functional_call(module, {**own, **parameters}, (example[None],))[0] * signal).sum()

    chosen = {k: v for k, v in own.items() if only in (None, k)}
    per_signal = torch.func.vmap(torch.func.grad(inner), (None, None, 0))
    grads = torch.func.vmap(per_signal, (None, 0, 0))(chosen, x, s)
    U = torch.cat([v.reshape(8, -1) for v in grads.values()], 1)
    geometry = ConvGeometry.of(module)
    scores = ConvScores(layer_of(module, only), geometry, geometry.padded(x), s)
    check_answers(scores, U)
    assert geometry.positions(geometry.padded(x)) == tuple(module(x).shape[2:])


def test_explicit_and_zero_scores():
    g = torch.Generator().manual_seed(3)
    layer = layer_of(nn.Linear(3, 2))
    U = torch.randn(6, 8, generator=g, dtype=torch.float64)
    check_answers(ExplicitScores(layer, [U[:, :6].contiguous(), U[:, 6:].contiguous()], r=3), U)
    check_answers(ExplicitScores(layer, [U], r=1), U)
    check_answers(ZeroScores(layer, 2, 3, torch.float64, torch.device("cpu")), torch.zeros_like(U))


def test_layers_that_are_never_called():
    model, data, likelihood = make_case(
        "unused", lambda: nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 4)})["a"], (3,)
    )

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = model, nn.Linear(3, 4).double()

        def forward(self, x):
            return self.used(x)

    with torch.random.fork_rng(devices=[]):
        whole = Half()
    F = fl.Fisher(whole, data, likelihood=likelihood)
    assert (F.plan["idle"].storage, F.plan["idle"].nbytes) == ("none", 0)
    assert error(F.dense(), reference.fisher(whole, data, likelihood)) < TOLERANCE
    assert F.diagonal()[8:].abs().max() == 0
    assert error(F.dense()[:8, :8], reference.fisher(model, data, likelihood)) < TOLERANCE


# --- several layers --------------------------------------------------------------------------------------------------


def test_rows_without_weight_are_left_out_of_the_gram_only():
    g = torch.Generator().manual_seed(4)
    layer = layer_of(nn.Linear(3, 2))
    U = torch.randn(6, 8, generator=g, dtype=torch.float64)
    kept = torch.tensor([True, False, True, True, True, False])
    U[~kept] = 0
    scores = ScoreMatrix([ExplicitScores(layer, [U], r=2)], kept)
    assert error(scores.gram(), U[kept] @ U[kept].T) < TOLERANCE
    assert error(scores.full_gram(), U @ U.T) < TOLERANCE
    assert error(scores.matmat(torch.eye(8, dtype=torch.float64)), U) < TOLERANCE
    assert scores.contract(torch.ones(3, 2, dtype=torch.float64)).kept.tolist() == [True, True, True]
    assert scores.contract(torch.ones(3, 2, dtype=torch.float64)).gram().shape == (3, 3)


@pytest.mark.parametrize(("room", "kept"), [(2, 0), (3.9, 0), (4, 2)])
def test_grams_of_layers_are_kept_only_within_the_budget(room, kept):
    F = case("lenet").fisher()
    rows, layers = F.scores.rows, F.scores.layers[:2]
    scores = ScoreMatrix(layers, memory=room * rows**2 * F.dtype.itemsize)
    expected = ScoreMatrix(layers).full_gram()
    assert error(scores.full_gram(), expected) < TOLERANCE
    assert len(scores._grams) == kept
    assert F.scores.memory == F.memory == F.scores.restrict([F.layout.layers[0].name]).memory


def test_restricted_matrices_share_their_grams():
    F = case("lenet").fisher()
    part = F.scores.restrict(["3", "9"])
    assert part.offsets == (0, F.layout.layer("3").size)
    kept = F.scores.layer_gram("3")
    assert part.layer_gram("3") is kept
    assert error(part.gram(), kept + F.scores.layer_gram("9")) < TOLERANCE


# --- memory ----------------------------------------------------------------------------------------------------------


def test_workspace_never_lends_memory_that_is_in_use():
    workspace, cpu = Workspace(limit=64 * SMALL), torch.device("cpu")
    live: list[tuple[Tensor, float]] = []
    g = torch.Generator().manual_seed(5)
    recycled, addresses = 0, set()
    for k in range(200):
        numel = int(torch.randint(SMALL // 8, SMALL // 4, (1,), generator=g))
        x = workspace.empty((numel, 2), torch.float64, cpu).fill_(k)
        recycled += x.data_ptr() in addresses
        addresses.add(x.data_ptr())
        # what is kept is a view, a slice, a transpose, or nothing but an array
        kept = [x, x.T, x[3:7], x.view(-1)[::2], x.detach()][k % 5]
        live.append((kept, float(k)))
        if len(live) > 6:
            live.pop(int(torch.randint(7, (1,), generator=g)))
        del x, kept
        assert all(bool((tensor == value).all()) for tensor, value in live), k
    assert recycled > 50


def test_workspace_keeps_what_only_numpy_refers_to():
    workspace, cpu = Workspace(), torch.device("cpu")
    array = workspace.empty((SMALL,), torch.float64, cpu).fill_(1).numpy()
    other = workspace.empty((SMALL,), torch.float64, cpu).fill_(2)
    assert array.min() == array.max() == 1
    del array
    again = workspace.empty((SMALL,), torch.float64, cpu)
    assert again.data_ptr() != other.data_ptr()
    assert (other == 2).all()


def test_workspace_gives_back_what_is_over_its_limit():
    workspace, cpu = Workspace(limit=3 * SMALL), torch.device("cpu")
    for k in range(10):
        x = workspace.empty((SMALL // 8 + 4096 * k,), torch.float64, cpu)
        del x
    assert sum(buffer.nbytes for buffer in workspace._buffers) <= 3 * SMALL
    huge = workspace.empty((SMALL,), torch.float64, cpu)  # over the limit by itself: lent, not kept
    assert huge.numel() == SMALL
    assert len(pickle.loads(pickle.dumps(workspace))._buffers) == 0  # noqa: S301 - its own pickle
    assert copy.deepcopy(workspace).limit == workspace.limit
    assert workspace.empty((3,), torch.float32, cpu).shape == (3,)
    assert zeros((SMALL, 2), torch.float64, cpu).abs().max() == 0


def test_products_of_recycled_memory_stay_what_they_were():
    model, data, likelihood = make_case(
        "wide", lambda: nn.Sequential(nn.Linear(400, 500), nn.Tanh(), nn.Linear(500, 3)), (400,)
    )
    F = fl.Fisher(model, data, likelihood=likelihood)
    g = torch.Generator().manual_seed(6)
    V = torch.randn(F.n_params, 4, generator=g, dtype=torch.float64)
    first = F @ V
    kept = first.clone()
    one = F @ V[:, 0]
    for k in range(6):
        F @ (V * k)
        F @ V[:, k % 4]
    assert torch.equal(first, kept)
    assert error(one, kept[:, 0]) < TOLERANCE
    first.mul_(0)  # the caller's own
    assert torch.equal(F @ V, kept)
