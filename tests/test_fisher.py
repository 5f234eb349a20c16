"""Every member of the operator, on every network of the zoo, against the dense reference."""

from __future__ import annotations

import re

import pytest
import torch
from cases import ALL_CASES
from fisher_checks import DRAWS, KINDS, QUIET, ZOO, case, error, in_float32

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError

pytestmark = pytest.mark.filterwarnings(QUIET)
TOLERANCE = 1e-10
DAMPING = 0.03


def smallest_kept(c, **options):
    """The Fisher whose scores are kept in the fewest bytes: the factor paths, where there are any."""
    F = c.fisher(**options)
    budget = F.plan.nbytes
    while not (F.plan.streamed or F.plan.linearised):
        kept, budget = F, min(budget, F.plan.nbytes) - 8
        if budget <= 0:
            break
        F = c.fisher(memory=budget, **options)
    return kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_products_and_small_matrices(name, kind, unchanged):
    c = case(name, kind)
    with unchanged(c.model):
        F = c.fisher()
        V, T = c.vectors(), c.matrix
        assert error(F.dense(), T) < TOLERANCE
        assert error(F @ V, T @ V) < TOLERANCE
        assert error(F @ V[:, 1], T @ V[:, 1]) < TOLERANCE
        named = F @ F.layout.unflatten(V[:, 0])
        assert list(named) == list(F.layout)
        assert error(F.layout.flatten(named), T @ V[:, 0]) < TOLERANCE
        block = F @ F.layout.unflatten(V)
        assert block[F.layout.names[0]].shape == (*F.layout.parameters[0].shape, 4)
        assert error(F.layout.flatten(block), T @ V) < TOLERANCE
        assert error(F.diagonal(), T.diagonal()) < TOLERANCE
        assert F.trace() == pytest.approx(T.trace().item(), rel=TOLERANCE)
        assert F.frobenius_norm() == pytest.approx(T.norm().item(), rel=TOLERANCE)
        assert error(F.gradient(), c.gradient) < TOLERANCE
        assert all(x.dtype == torch.float64 for x in (F.dense(), F @ V, F.diagonal(), F.gram(), F.gradient()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_gram_solves_and_blocks(name, kind, unchanged):
    c = case(name, kind)
    with unchanged(c.model):
        F = c.fisher()
        V, T = c.vectors(), c.matrix
        K = F.gram()
        assert K.shape == (F.n_rows, F.n_rows)
        assert torch.equal(K, K.T)
        padded = torch.zeros(max(len(K), len(T)), dtype=T.dtype)
        found, wanted = padded.clone(), padded.clone()
        found[: len(K)], wanted[: len(T)] = torch.linalg.eigvalsh(K).flip(0), reference.spectrum(T)
        assert error(found.sort().values, wanted.sort().values) < TOLERANCE
        assert error(F.solve(V, DAMPING), reference.solve(T, V, DAMPING)) < TOLERANCE
        assert error(F.solve(V[:, 0], DAMPING), reference.solve(T, V[:, 0], DAMPING)) < TOLERANCE
        assert error(F.natural_gradient(DAMPING), reference.solve(T, c.gradient, DAMPING)) < TOLERANCE
        for layer in F.layout.layers:
            at = slice(layer.start, layer.stop)
            part = F.restrict(layer.name)
            assert error(F.block(layer.name), T[at, at]) < TOLERANCE
            assert error(part.dense(), T[at, at]) < TOLERANCE
            assert error(part @ V[at], T[at, at] @ V[at]) < TOLERANCE
            assert error(part.gradient(), c.gradient[at]) < TOLERANCE


@pytest.mark.parametrize("name", ALL_CASES)
def test_factor_paths(name):
    """The same in the fewest bytes: factors and convolutions in place of explicit rows."""
    c = case(name)
    F = smallest_kept(c)
    V, T = c.vectors(), c.matrix
    assert error(F.dense(), T) < TOLERANCE
    assert error(F @ V, T @ V) < TOLERANCE
    assert error(F @ V[:, 0], T @ V[:, 0]) < TOLERANCE
    assert error(F.diagonal(), T.diagonal()) < TOLERANCE
    assert F.frobenius_norm() == pytest.approx(T.norm().item(), rel=TOLERANCE)
    assert error(F.gram(), c.fisher().gram()) < TOLERANCE
    assert error(F.solve(V, DAMPING), reference.solve(T, V, DAMPING)) < TOLERANCE


def test_factor_paths_are_reached():
    storages = {e.storage for name in ("conv_groups", "conv_padding", "lenet") for e in smallest_kept(case(name)).plan}
    assert {"convolution", "factors"} <= storages
    assert case("conv_one_position").fisher().plan["0"].storage == "patches"
    assert case("lenet").fisher().plan["0"].path == "explicit"


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("name", ZOO)
def test_float32(name, kind):
    c, F = case(name, kind), in_float32(name, kind)
    V = c.vectors()
    assert F.dtype == torch.float32
    for found, truth in (
        (F @ V.float(), c.matrix @ V),
        (F.dense(), c.matrix),
        (F.diagonal(), c.matrix.diagonal()),
        (F.gram(), c.fisher().gram()),
        (F.gradient(), c.gradient),
        (F.solve(V.float(), DAMPING), reference.solve(c.matrix, V, DAMPING)),
        (F.natural_gradient(DAMPING), reference.solve(c.matrix, c.gradient, DAMPING)),
    ):
        assert found.dtype == torch.float32
        assert error(found, truth) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "lenet", "segmentation", "module_used_twice", "lstm"])
def test_linear_symmetric_positive_and_repeatable(name, kind):
    c = case(name, kind)
    F, again = c.fisher(), c.fisher()
    V, W = c.vectors(4), c.vectors(5)[:, :4]
    assert torch.equal(F @ V, F @ V)
    assert torch.equal(F @ V, again @ V)
    assert torch.equal(F.gram(), again.gram())
    assert torch.equal(F.diagonal(), again.diagonal())
    assert error(F @ (2 * V - W), 2 * (F @ V) - F @ W) < 1e-12
    assert error(F @ V, torch.stack([F @ V[:, k] for k in range(4)], 1)) < 1e-12
    assert error(W.T @ (F @ V), (F @ W).T @ V) < 1e-12
    assert ((V * (F @ V)).sum(0) >= 0).all()
    values = torch.linalg.eigvalsh(F.gram())
    assert values.min() > -1e-13 * values.max()


def test_facts():
    for name in ZOO:
        F = case(name).fisher()
        P, N = len(case(name).matrix), len(case(name).data[1])
        assert (F.shape, F.n_params, F.n_data) == ((P, P), P, N)
        assert (F.kind, F.dtype, F.device.type, F.layout.n_params) == ("exact", torch.float64, "cpu", P)
        assert F.scores.rows == N * F.n_columns
        values = reference.spectrum(case(name).matrix)
        assert (values > 1e-12 * values.max()).sum() <= F.rank_bound <= min(P, F.n_rows), name
    columns = {
        name: [case(name, kind).fisher().n_columns for kind in KINDS]
        for name in ("mlp_tanh", "bernoulli_two_outputs", "gaussian_three_outputs", "segmentation")
    }
    assert columns == {
        "mlp_tanh": [2, DRAWS, 1],
        "bernoulli_two_outputs": [2, DRAWS, 1],
        "gaussian_three_outputs": [3, DRAWS, 1],
        "segmentation": [18, DRAWS, 9],
    }
    assert case("mlp_tanh").fisher().rank_bound == 14
    assert case("mlp_tanh", "mc").fisher().rank_bound == 7 * DRAWS
    assert case("mlp_tanh", "empirical").fisher().rank_bound == 7
    assert case("bernoulli_two_outputs").fisher().rank_bound == 16


def test_repr_names_kind_likelihood_and_sizes():
    text = repr(case("mlp_tanh", "mc").fisher())
    for part in ("kind='mc'", "likelihood='categorical'", "P=79", "N=7", "R=2", "rank<=14", "float64", "cpu"):
        assert part in text


def test_plan_shows_each_layer_and_its_cost():
    plan = case("lenet").fisher().plan
    text = repr(plan)
    for name in ("0", "3", "7", "9"):
        entry = plan[name]
        assert re.search(rf"^{name} .*{entry.path}", text, re.MULTILINE), name
        assert entry.nbytes > 0
        assert entry.reason in text
    assert len(plan) == 4
    assert plan.nbytes == sum(entry.nbytes for entry in plan)
    assert plan.nbytes == sum(layer.nbytes for layer in case("lenet").fisher().scores.layers)
    assert 0 < plan.product_cost < 2


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "residual"])
def test_restrict_keeps_couplings_and_nests(name):
    c = case(name)
    F = c.fisher()
    names = F.layout.layer_names
    chosen = [names[-1], names[0]]
    index = torch.cat([torch.arange(F.layout.layer(n).start, F.layout.layer(n).stop) for n in (names[0], names[-1])])
    part = F.restrict(chosen)
    assert part.layout.layer_names == (names[0], names[-1])
    T = c.matrix[index][:, index]
    assert error(part.dense(), T) < TOLERANCE
    assert error(part.parameters, F.parameters[index]) == 0
    assert part.plan.nbytes == F.plan[names[0]].nbytes + F.plan[names[-1]].nbytes
    last = part.restrict(names[-1])
    at = slice(F.layout.layer(names[-1]).start, F.layout.layer(names[-1]).stop)
    assert error(last.dense(), c.matrix[at, at]) < TOLERANCE
    assert error(last.natural_gradient(DAMPING), reference.solve(c.matrix[at, at], c.gradient[at], DAMPING)) < TOLERANCE
    assert last.origins == (F.layout.layer(names[-1]).start,)
    assert error(F.dense(), c.matrix) < TOLERANCE


def test_selected_parameters():
    model, data, likelihood = ZOO["lenet"]()
    whole = reference.fisher(model, data, likelihood)
    layout = case("lenet").fisher().layout
    for params, names in (
        ("*.bias", [n for n in layout if n.endswith("bias")]),
        ("*.weight", [n for n in layout if n.endswith("weight")]),
        (["9", "0.bias"], ["0.bias", "9.weight", "9.bias"]),
        ("3.weight", ["3.weight"]),
    ):
        F = fl.Fisher(model, data, likelihood=likelihood, params=params)
        assert list(F.layout) == names
        index = layout.index_of(names)
        T = whole[index][:, index]
        V = torch.randn(len(index), 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert error(F.dense(), T) < TOLERANCE
        assert error(F @ V, T @ V) < TOLERANCE
        assert error(F @ V[:, 0], T @ V[:, 0]) < TOLERANCE
        assert error(F.diagonal(), T.diagonal()) < TOLERANCE
        assert error(torch.linalg.eigvalsh(F.gram()).flip(0)[:1], reference.spectrum(T)[:1]) < TOLERANCE
        small = smallest_kept(case("lenet"), params=params)
        assert error(small.dense(), T) < TOLERANCE
        assert error(small @ V, T @ V) < TOLERANCE


def test_blocks_of_names_and_patterns():
    c = case("lenet")
    F = c.fisher()
    for names in ("3", "*.bias", ["9.weight", "0"], ["0.bias", "0.bias", "0"]):
        index = F.layout.index_of(names)
        assert error(F.block(names), c.matrix[index][:, index]) < TOLERANCE


def test_no_vectors_give_no_vectors():
    F = case("mlp_tanh").fisher()
    assert (F @ torch.zeros(F.n_params, 0, dtype=torch.float64)).shape == (F.n_params, 0)


def test_dense_by_chunks_of_rows(monkeypatch):
    """A large data set must not be expanded into rows x P numbers for a small matrix."""
    monkeypatch.setattr("fisherlens.scores.matrix._AT_ONCE", 4000)
    for name in ("mlp_tanh", "lenet", "conv_groups", "module_used_twice", "layer_norm"):
        c = case(name)
        for F in (c.fisher(), smallest_kept(c)):
            assert error(F.dense(), c.matrix) < TOLERANCE
            last = F.layout.layers[-1]
            at = slice(last.start, last.stop)
            assert error(F.block(last.name), c.matrix[at, at]) < TOLERANCE


def test_caps_name_the_size_and_the_way_out():
    F = case("mlp_tanh").fisher()
    with pytest.raises(MemoryBudgetError, match=r"F\.dense\(\) of 79 parameters would take 48\.8 KiB; the cap is 78"):
        F.dense(max_params=78)
    with pytest.raises(MemoryBudgetError, match=r"block '0' of 36 parameters would take 10\.1 KiB; the cap is 35"):
        F.block("0", max_params=35)


def test_wrong_vectors():
    F = case("mlp_tanh").fisher()
    good = torch.ones(79, dtype=torch.float64)
    for wrong, kind, text in (
        (good[:-1], InputError, r"shape \(79,\) or \(79, K\).*\(78,\)"),
        (good[:, None, None], InputError, r"a tensor of shape \(79, 1, 1\)"),
        (good[None], InputError, r"a tensor of shape \(1, 79\)"),
        (good.float(), InputError, r"dtype torch\.float64 on cpu; got torch\.float32"),
        (good.long(), InputError, r"got torch\.int64"),
        (
            good.to_sparse(),
            InputError,
            r"takes a dense vector; got one of layout torch\.sparse_coo\. Use v\.to_dense\(\)",
        ),
        (good.numpy(), TypeError, "got ndarray. Use torch.as_tensor"),
        (good.index_fill(0, torch.tensor(3), float("nan")), NonFiniteError, "NaN or infinity"),
        (good.index_fill(0, torch.tensor(3), float("inf")), NonFiniteError, "NaN or infinity"),
        ({"0.weight": good}, InputError, r"missing \['0\.bias', .*unknown \[\]"),
        ({**F.layout.unflatten(good), "x": good}, InputError, r"missing \[\], unknown \['x'\]"),
        ({**F.layout.unflatten(good), "0.bias": good}, InputError, r"'0\.bias' must have shape \(6,\) or \(6, 'K'\)"),
    ):
        for act in (F.__matmul__, lambda v: F.solve(v, 0.1)):
            with pytest.raises(kind, match=text):
                act(wrong)
    huge = good * 1e308  # finite, though its sum is not
    assert torch.isfinite(F @ (huge * 1e-10)).all()


def test_later_changes_of_the_model_do_not_reach_the_operator():
    model, data, likelihood = ZOO["mlp_tanh"]()
    for memory, path in (("2GiB", "factors"), (2200, "linearised"), (500, "streamed")):
        F = fl.Fisher(model, data, likelihood=likelihood, memory=memory)
        assert {entry.path for entry in F.plan} == {path}
        V = torch.ones(79, 2, dtype=torch.float64)
        before, theta, gradient = F @ V, F.parameters.clone(), F.gradient()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        assert torch.equal(F @ V, before)
        assert torch.equal(F.parameters, theta)
        gradient.zero_()
        assert F.gradient().norm() > 0
