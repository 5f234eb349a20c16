"""Dependence of blocks beyond correlation, against the definitions, and what it finds that a coupling does not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from cases import make_case
from fisher_checks import KINDS, QUIET, case, in_float32
from test_coupling_statistics import Heads, heads, within
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError

pytestmark = pytest.mark.filterwarnings(QUIET)
TWINS = {"dcor": reference.distance_correlation, "hsic": reference.hsic}


def sampled_rows(F: fl.Fisher, seed: int = 0) -> Tensor:
    """The scores at one sampled label per example, ``(N, P)``."""
    return F.single_sample(seed).rows_at(torch.arange(F.n_data))


def check(U: Tensor, ds, parts: fl.Partition, measure: str, tolerance: float = 1e-10) -> None:
    blocks = list(parts.blocks)
    found, linear = ds["dependence"].values, ds["linear_coupling"].values
    assert np.array_equal(found, found.T)
    pairs = list(itertools.combinations_with_replacement(range(len(blocks)), 2))
    for i, j in pairs[:: len(pairs) // 4 + 1]:
        truth = TWINS[measure](U[:, blocks[i]], U[:, blocks[j]])
        assert found[i, j] == pytest.approx(truth, abs=tolerance), (i, j)
    rho = reference.coupling(U.T @ U, blocks).numpy()
    assert np.abs(linear**2 - rho**2).max() < tolerance
    assert list(ds["block_i"].values) == list(parts.labels)
    assert list(ds["size_i"].values) == list(parts.sizes)


@pytest.mark.parametrize("measure", TWINS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "segmentation"])
def test_against_the_definitions(name, kind, measure, unchanged):
    c = case(name, kind)
    F = c.fisher()
    for scheme in ("layer", "parameter", "unit"):
        parts = fl.partition(F, scheme)
        for num_null in (0, 3):
            with unchanged(c.model):
                ds = fl.dependence(F, parts, measure=measure, num_null=num_null)
            assert ("p_value" in ds) == bool(num_null)
            check(sampled_rows(F), ds, parts, measure)
    assert ds.attrs["measure"] == measure


def test_partitions_across_layers_and_inside_one():
    F = case("mlp_tanh").fisher()
    parts = fl.partition(F, "random", size=20)
    check(sampled_rows(F), fl.dependence(F, parts, num_null=2), parts, "dcor")
    part = F.restrict("2")
    check(sampled_rows(part), fl.dependence(part, "unit", num_null=2), fl.partition(part, "unit"), "dcor")


def test_float32_threads_and_strips():
    F = case("mlp_tanh").fisher()
    for measure in TWINS:
        single = fl.dependence(in_float32("mlp_tanh"), "layer", measure=measure, num_null=0)
        double = fl.dependence(F, "layer", measure=measure, num_null=0)
        for name in ("dependence", "linear_coupling"):
            assert np.allclose(single[name], double[name], atol=1e-4)
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(fl.dependence(F, "unit", num_null=20))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert np.allclose(other["dependence"], found[0]["dependence"], atol=1e-12)
        for name in ("p_value", "p_adjusted", "q_value"):
            assert np.array_equal(other[name], found[0][name], equal_nan=True)
    tight = case("mlp_tanh").fisher(memory=30_000)
    tested = fl.dependence(tight, "unit", num_null=20)
    assert np.allclose(tested["dependence"], found[0]["dependence"], atol=1e-12)
    assert np.array_equal(tested["p_adjusted"], found[0]["p_adjusted"], equal_nan=True)


# --- what it finds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", TWINS)
def test_independent_blocks_are_found_at_the_nominal_rate(measure):
    """Heads with outputs and inputs of their own: uniform p-values, and a mean dependence of 0."""
    found = [fl.dependence(heads(s, n=12), measure=measure, num_null=19, seed=s) for s in range(60)]
    p = np.array([ds["p_value"].values[0, 1] for ds in found])
    for level in (0.1, 0.5):
        assert within((p <= level + 1e-9).sum(), 60, level), level
    values = np.array([ds["dependence"].values[0, 1] for ds in found])
    assert (values < 0).any()
    assert abs(values.mean()) < 4 * values.std(ddof=1) / 60**0.5


@pytest.mark.slow
@pytest.mark.parametrize("measure", TWINS)
def test_family_wise_errors(measure):
    found = [fl.dependence(heads(s, 4, 2, n=14), measure=measure, num_null=99, seed=s) for s in range(300)]
    smallest = np.array([np.nanmin(ds["p_adjusted"]) for ds in found])
    assert within((smallest <= 0.05 + 1e-9).sum(), 300, 0.05)


def shared_scale(seed: int, n: int = 120) -> fl.Fisher:
    """Two heads with outputs of their own, whose inputs share one random length: F has no coupling at all between them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g, dtype=torch.float64) * torch.where(torch.rand(n, 1, generator=g) < 0.5, 0.1, 1.0)
    with torch.random.fork_rng(devices=[]):
        model = Heads().double()
    for head in model.heads:
        head.bias.requires_grad_(False)
    return fl.Fisher(model, (x, torch.zeros(n, 2, dtype=torch.float64)), likelihood="gaussian")


def test_dependent_blocks_without_correlation_are_found():
    """Found by both measures in nearly every sample; the exact coupling is 0, and its test, whose null is independence, finds some."""
    hits = {"dcor": 0, "hsic": 0, "coupling": 0}
    for seed in range(12):
        F = shared_scale(seed)
        for measure in TWINS:
            hits[measure] += fl.dependence(F, measure=measure, num_null=39, seed=seed)["p_value"].values[0, 1] <= 0.05
        ds = fl.coupling(F, num_null=39, seed=seed)
        assert ds["coupling"].values[0, 1] < 1e-7
        hits["coupling"] += ds["p_value"].values[0, 1] <= 0.05
    assert hits["dcor"] >= 10
    assert hits["hsic"] >= 11
    assert hits["coupling"] <= 8


def test_a_shared_length_of_the_output_score_can_be_taken_out():
    """One output: blocks share its score ε, scores ε x_i; divided by |ε|, and by nothing else, as the twin does."""
    F = heads(0, planted=0.0, n=20)
    U = sampled_rows(F, 3)
    parts = fl.partition(F, "layer")
    plain = fl.dependence(F, seed=3, num_null=0)
    check(U, plain, parts, "dcor")
    length = U[:, 3].abs()  # the bias of a head: its score is that of the output
    taken = fl.dependence(F, seed=3, num_null=0, normalise="outputs")
    check(U / length[:, None], taken, parts, "dcor")
    assert taken["dependence"].values[0, 1] < plain["dependence"].values[0, 1]
    assert '"normalise": "outputs"' in taken.attrs["settings"]


@pytest.mark.parametrize("name", ["mlp_tanh", "segmentation", "bernoulli_two_outputs"])
def test_lengths_of_observed_output_scores(name):
    c = case(name, "empirical")
    F = c.fisher()
    outputs = reference.outputs_at(c.model, {}, c.data[0])
    t = reference.terms(outputs, c.likelihood, c.data[1])
    length = (t.weight.sqrt()[..., None] * reference.score(t, t.observed)).flatten(1).norm(dim=1)
    ds = fl.dependence(F, num_null=0, normalise="outputs")
    check(sampled_rows(F) / length[:, None].detach(), ds, fl.partition(F, "layer"), "dcor")


# --- what is special and what is refused -------------------------------------------------------------------------------


def test_blocks_whose_score_never_changes():
    model, data, likelihood = make_case(
        "still", lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3,), n=8
    )
    with torch.no_grad():
        model[2].weight.zero_()  # no gradient reaches the first layer
    F = fl.Fisher(model, data, likelihood=likelihood)
    for measure in TWINS:
        ds = fl.dependence(F, "layer", measure=measure, num_null=9)
        assert ds["dependence"].values.tolist() == [[0, 0], [0, 1]]
        assert ds["linear_coupling"].values.tolist() == [[0, 0], [0, 1]]
        assert ds["p_value"].values[0, 1] == 1
        assert np.array_equal(fl.dependence(F, "layer", measure=measure, num_null=0)["dependence"], ds["dependence"])


def test_equal_examples():
    """Distances of equal scores are 0 and not the root of rounding; a median distance of 0 is replaced."""
    x = torch.tensor([[1.0, 2.0]] * 6 + [[3.0, -1.0], [0.5, 1.5]], dtype=torch.float64)
    y = torch.tensor([0] * 6 + [1, 1])
    model, _, _ = make_case("equal", lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), (2,))
    F = fl.Fisher(model, (x, y), likelihood="categorical", kind="empirical")
    for measure in TWINS:
        check(sampled_rows(F), fl.dependence(F, measure=measure, num_null=0), fl.partition(F, "layer"), measure)


def test_weights_and_ignored_labels():
    c = case("mlp_tanh")
    y = c.data[1].clone()
    y[2] = -100
    F = fl.Fisher(c.model, (c.data[0], y), likelihood=fl.Categorical(weight=[0.5, 1.0, 4.0]))
    ds = fl.dependence(F, num_null=3, normalise="outputs")
    U = sampled_rows(F)[[0, 1, 3, 4, 5, 6]]
    assert np.isfinite(ds["dependence"]).all()
    check(U, fl.dependence(F, num_null=3), fl.partition(F, "layer"), "dcor")


def test_what_is_refused():
    F = case("mlp_tanh").fisher()
    with pytest.raises(InputError, match=r"Unknown measure 'dcov'. Did you mean 'dcor'\? Known: 'dcor', 'hsic'"):
        fl.dependence(F, measure="dcov")
    with pytest.raises(InputError, match=r"normalise must be None or 'outputs'.*; got True"):
        fl.dependence(F, normalise=True)
    with pytest.raises(InputError, match="num_null must be an integer >= 0"):
        fl.dependence(F, num_null=-1)
    with pytest.raises(InputError, match="seed must be an integer >= 0"):
        fl.dependence(F, seed=-1)
    with pytest.raises(
        InputError, match=r"'diagonal' has 79 blocks, so 6241 pairs; the limit is 20 blocks\. Take one layer with"
    ):
        fl.dependence(F, "diagonal", max_blocks=20)
    with pytest.raises(
        InputError, match="normalise='outputs' needs the labels' scores at the outputs, which the mc kind does not keep"
    ):
        fl.dependence(case("mlp_tanh", "mc").fisher(), normalise="outputs")
    x, y = case("mlp_tanh").data
    few = fl.Fisher(case("mlp_tanh").model, (x[:3], y[:3]), likelihood="categorical")
    with pytest.raises(
        InputError, match=r"Dependence needs at least 4 examples.* divides by N - 3; F has 3 with weight"
    ):
        fl.dependence(few)
    with pytest.raises(MemoryBudgetError, match=r"One row per example was asked of scores that are streamed"):
        fl.dependence(case("mlp_tanh").fisher(memory=1000))
    F.memory = 3000
    with pytest.raises(
        MemoryBudgetError, match=r"Matrices over pairs of 7 examples need 4\.6 KiB, over the budget of 2\.9 KiB"
    ):
        fl.dependence(F)
    with pytest.raises(TypeError, match=r"takes a fisherlens\.Fisher; got Tensor"):
        fl.dependence(x)
