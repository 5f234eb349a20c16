"""Claims on training, on problems where their truth is known: each is shown to hold where it does, and reported false where it does not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.training import segments
from fisherlens.training.synthetic import known_fisher
from fisherlens.training.verify import Budget, Subject
from fisherlens.training.verify.blocks import chosen, judge
from fisherlens.training.verify.independence import independence
from fisherlens.training.verify.information import REMOVED, SHARES, information
from fisherlens.training.verify.movable import Movable, batches
from fisherlens.training.verify.sharing import METHODS, sharing

BUDGET = Budget(num_examples=200, train_steps=5, gd_steps=5, num_steps=10, rates=3)


def line(mixing, weight=None, noise=0.3, n=120):
    """Linear regression with one output, no bias and unit variance: F = XᵀX/N at every θ, and the loss is quadratic."""
    generator = torch.Generator().manual_seed(3)
    d = len(mixing)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.as_tensor(mixing, dtype=torch.float64)
    weight = torch.ones(d, dtype=torch.float64) if weight is None else torch.tensor(weight, dtype=torch.float64)
    y = (x @ weight)[:, None] + noise * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    return of_inputs(x, y)


def of_inputs(x, y):
    def factory():
        return nn.Linear(x.shape[1], 1, bias=False, dtype=torch.float64)

    return fl.Problem("line", "A line.", factory, (x, y), (x, y), "gaussian", batch_size=len(x))


def split_inputs(n=120):
    """Each example shows the first three inputs or the last three: scores of the two halves never meet, whatever the labels."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(n, 6, generator=generator, dtype=torch.float64) @ torch.triu(torch.ones(6, 6, dtype=torch.float64))
    first = torch.arange(n) % 2 == 0
    x[first, 3:], x[~first, :3] = 0, 0
    return of_inputs(x, x.sum(1, keepdim=True))


def pairs(rho, order=range(6)):
    """A mixing matrix of six inputs in three pairs of the given correlations, the inputs renumbered."""
    covariance = torch.eye(6, dtype=torch.float64)
    for k, value in enumerate(rho):
        covariance[2 * k, 2 * k + 1] = covariance[2 * k + 1, 2 * k] = value
    covariance = covariance[list(order)][:, list(order)]
    return torch.linalg.cholesky(covariance).T


def subject(problem, **options):
    return Subject(problem, options.pop("seed", 0), budget=options.pop("budget", BUDGET), **options)


def rows_of(claim):
    return {row.name.partition("/")[2]: row for row in claim.rows}


HALVES = {"a": [0, 1, 2], "b": [3, 4, 5]}
ACROSS = {"a": [0, 3], "b": [1, 4], "c": [2, 5]}


# --- information -----------------------------------------------------------------------------------------------------


def test_removal_in_a_linear_gaussian_problem_is_what_the_form_says():
    problem = fl.problem("linear-gaussian")
    one = subject(problem)
    claim = information([one], by="input")
    rows = rows_of(claim)
    F = known_fisher(problem, one.model)
    blocks = fl.partition(one.model, "input").blocks
    wanted = [reference.removal_divergence(F, one.theta, b) for b in blocks]
    np.testing.assert_allclose(claim.curves["information_predicted"].values[0], wanted, rtol=1e-10)
    np.testing.assert_allclose(claim.curves["information_divergence"].values[0], wanted, rtol=1e-9)
    g = one.gradient
    losses = []
    for b in blocks:
        delta = torch.zeros_like(one.theta)
        delta[b] = -one.theta[b]
        losses.append(reference.linear_gaussian_loss(F, g, delta))
    np.testing.assert_allclose(claim.curves["information_loss_predicted"].values[0], losses, rtol=1e-9)
    np.testing.assert_allclose(claim.curves["information_loss_change"].values[0], losses, rtol=1e-8)
    np.testing.assert_allclose(claim.curves["information_ratio"].values[0], 1, rtol=1e-8)
    for name in ("small", "removed", "rank", "loss", "against-random"):
        assert rows[name].holds, name
    assert f"up to a removed share of {SHARES[-1]:g}" in rows["small"].note


def test_pruning_curve_is_the_form_of_all_that_is_gone():
    problem = fl.problem("linear-gaussian")
    one = subject(problem)
    F, theta = known_fisher(problem, one.model), one.theta
    blocks = fl.partition(one.model, "input").blocks
    ranked = sorted(range(len(blocks)), key=lambda k: reference.removal_divergence(F, theta, blocks[k]))
    curve = information([one], by="input").curves["information_pruned"]
    for share, found in zip(REMOVED, curve.values[0, 0], strict=True):
        gone = [blocks[k] for k in ranked[: round(share * len(blocks))]]
        wanted = reference.removal_divergence(F, theta, torch.cat(gone)) if gone else 0.0
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("wrong", ["scaled", "shuffled"])
def test_a_false_operator_is_found_out_by_removals(wrong):
    def operator(F):
        matrix = F.dense()
        if wrong == "scaled":
            return 3 * matrix
        turned = torch.arange(len(matrix)).flip(0)
        return matrix[turned][:, turned]

    rows = rows_of(information([subject(fl.problem("linear-gaussian"), operator=operator)], by="input"))
    assert not rows["removed"].holds
    assert not rows["small"].holds
    assert rows["rank"].holds is (wrong == "scaled")


def test_units_without_information_count_where_removal_is_felt():
    """An operator that hears nothing is wrong wherever a removal is felt, and not left out for want of a ratio."""
    silent = fl.Operator(lambda v: 0 * v, 14, torch.float64, block=True)
    row = rows_of(information([subject(fl.problem("linear-gaussian"), operator=silent)], by="input"))["small"]
    assert row.decided
    assert not row.holds
    assert row.measured > 1e3


# --- independence ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_independent_blocks_follow_natural_gradient_step_by_step(kind):
    claim = independence(
        [subject(split_inputs(), kind=kind)], partitions={"halves": HALVES}, num_steps=4, batch_size=30
    )
    row = rows_of(claim)["halves"]
    assert row.holds
    np.testing.assert_allclose(claim.curves["independence_shared"].values, 1, atol=1e-9)
    np.testing.assert_allclose(claim.curves["independence_predicted"].values, 1, atol=1e-9)
    assert np.abs(claim.curves["independence_apart"].values).max() < 1e-12
    assert "not harmless" not in row.note


def test_departure_is_the_distance_of_the_steps():
    """With the whole data as a batch everything is quadratic: what is measured has a closed form."""
    problem = line(pairs([0.9, 0.7, 0.4]))
    one = subject(problem, damping=1e-2)
    cut = {"wrong": {"a": [0, 2], "b": [1, 4], "c": [3, 5]}, "right": {"a": [0, 1], "b": [2, 3], "c": [4, 5]}}
    claim = independence([one], partitions=cut, num_steps=1)
    x = problem.train[0]
    F, g = x.T @ x / len(x), one.gradient
    for place, blocks in enumerate(cut.values()):
        index = [torch.tensor(b) for b in blocks.values()]
        eye = torch.eye(6, dtype=torch.float64)
        predicted = reference.shared_way(F, g, index, 1e-2, F + 1e-2 * eye)
        assert predicted == pytest.approx(reference.decrease_ratio(F, reference.block_diagonal(F, index), g, 1e-2))
        assert claim.curves["independence_predicted"].values[0, place, 0] == pytest.approx(predicted, rel=1e-9)
        measured = reference.shared_way(F, g, index, 1e-2, F)
        assert claim.curves["independence_shared"].values[0, place, 0] == pytest.approx(measured, rel=1e-7)


def test_the_steps_are_those_of_the_optimizers():
    one = subject(line(pairs([0.9, 0.7, 0.4])), kind="empirical", damping=0.1)
    (batch,) = batches(one, 40, 1, 41)
    network = Movable(one)
    F = network.fisher(batch, "empirical")
    plain = {"labels": "true", "likelihood": "gaussian", "kl_clip": None}
    makes = {
        "blocks": lambda m: fl.optim.CWNGD(m, 1.0, 0.1, partition=ACROSS, ema=0.0, momentum_ema=0.0, **plain),
        "exact": lambda m: fl.optim.NGD(m, 1.0, 0.1, **plain),
    }
    wanted = {
        "blocks": fl.BlockDiagonal(F, ACROSS).solve(F.gradient(), 0.1),
        "exact": F.natural_gradient(0.1),
    }
    for name, make in makes.items():
        model = copy.deepcopy(one.model)
        optimizer = make(model)
        loss = one.problem.loss_fn(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(one.theta - model.weight.detach().flatten(), wanted[name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("where", ["no coupling where there is", "coupling where there is none"])
def test_a_false_operator_is_found_out_by_block_steps(where):
    if where.startswith("no"):
        problem, cut = (
            line(pairs([0.95, 0.95, 0.95]), [7.2, -5.2] * 3),
            {"cut": {"a": [0, 2], "b": [1, 4], "c": [3, 5]}},
        )

        def operator(F):
            return fl.BlockDiagonal(F, cut["cut"])
    else:
        problem, cut = split_inputs(), {"cut": HALVES}

        def operator(F):
            g = F.gradient()
            ones = torch.ones(6, dtype=torch.float64)
            return 50 * torch.outer(ones, ones) + torch.diag(
                torch.rand(6, generator=torch.Generator().manual_seed(1), dtype=g.dtype)
            )

    true = rows_of(independence([subject(problem)], partitions=cut, num_steps=2))["cut"]
    false = rows_of(independence([subject(problem, operator=operator)], partitions=cut, num_steps=2))["cut"]
    assert true.holds
    assert false.decided
    assert not false.holds
    assert false.measured == pytest.approx(true.measured, rel=1e-9)  # what is measured asks no operator


def test_judging_an_operator_agrees_with_the_analysis():
    one = subject(fl.problem("softmax-regression"))
    F, g = one.true_fisher, one.gradient
    parts = list(chosen(one, None).values())
    fast, plain = (
        judge(F, parts, g, 0.01),
        judge(fl.Operator(lambda v: F @ v, F.n_params, F.dtype, block=True), parts, g, 0.01),
    )
    for a, b in zip(fast, plain, strict=True):
        assert (a.decrease_ratio, a.natural_gradient_cosine) == pytest.approx(
            (b.decrease_ratio, b.natural_gradient_cosine)
        )
        assert a.condition_number == pytest.approx(b.condition_number, rel=1e-6)


def test_a_large_operator_that_is_no_fisher_is_refused():
    big = fl.Operator(lambda v: v, 1501, torch.float64, block=True)
    with pytest.raises(
        fl.InputError,
        match=r"An operator that is no fl.Fisher is written out .* up to 1,500 parameters; this one has 1,501",
    ):
        judge(big, [], torch.zeros(1501, dtype=torch.float64), 0.1)


# --- sharing ---------------------------------------------------------------------------------------------------------


def test_nothing_goes_stale_where_the_curvature_is_constant():
    """Linear-Gaussian, all examples in each step: rows of drawn labels are those of any other step."""
    claim = sharing([subject(fl.problem("linear-gaussian"))], ages=(1, 3), batch_size=200)
    rows = rows_of(claim)
    assert rows["tengrad-1"].holds
    assert rows["tengrad-3"].holds
    place = METHODS.index("tengrad")
    for name in ("cosine", "other_batch", "predicted", "measured"):
        np.testing.assert_allclose(claim.curves[f"sharing_{name}"].values[0, place], 1, rtol=1e-9)
    np.testing.assert_allclose(claim.curves["sharing_gram"].values, 0, atol=1e-12)


def test_what_other_rows_cost_is_what_a_quadratic_loss_shows():
    one = subject(fl.problem("linear-gaussian"))
    claim = sharing([one], ages=(1, 2, 4), batch_size=10)
    for row in claim.rows:
        assert row.holds, row.name

    def wrong(F):
        """Bends where F is flat, and the other way round."""
        return torch.linalg.inv(F.dense() + 0.01 * torch.eye(F.n_params, dtype=F.dtype))

    false = sharing([subject(fl.problem("linear-gaussian"), operator=wrong)], ages=(1, 2, 4), batch_size=10)
    assert not all(row.holds for row in false.rows)


# --- all of them -----------------------------------------------------------------------------------------------------


def test_verify_runs_on_a_network_and_leaves_it_alone():
    problem = fl.problem("digits-mlp", num_train=40, num_test=20)
    state = torch.get_rng_state()
    result = fl.verify(problem, ["independence", "information", "sharing"], seeds=1, num_examples=8, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    names = {str(name).partition("/")[0] for name in result.claim.values}
    assert names == {"independence", "information", "sharing"}
    assert np.isfinite(result.measured.sel(claim=["independence/unit", "information/small"])).all()


def test_segments_that_cut_alike_are_kept_once():
    one = subject(fl.problem("logistic"))
    kept = list(chosen(one, None).values())
    assert len(segments.distinct([*kept, *kept])) == len(kept)
    assert len({tuple(sorted(map(tuple, (b.tolist() for b in p.blocks)))) for p in kept}) == len(kept)
