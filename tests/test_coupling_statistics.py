"""What chance does to couplings: independent blocks are found independent at the nominal rate, planted couplings are found and measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import fill, make_case
from fisher_checks import KINDS, QUIET, case
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.coupling import permutations
from fisherlens.coupling.permutations import benjamini_hochberg
from fisherlens.errors import InputError, MemoryBudgetError, NumericalWarning

pytestmark = pytest.mark.filterwarnings(QUIET)


class Heads(nn.Module):
    """Layers side by side, each with inputs of its own; the outputs are those of all, or added to one."""

    def __init__(self, count: int = 2, width: int = 3, added: bool = False):
        super().__init__()
        self.heads, self.width, self.added = nn.ModuleList(nn.Linear(width, 1) for _ in range(count)), width, added

    def forward(self, x: Tensor) -> Tensor:
        parts = [head(part) for head, part in zip(self.heads, x.split(self.width, 1), strict=True)]
        return sum(parts) if self.added else torch.cat(parts, 1)


def heads(seed: int, count: int = 2, width: int = 3, planted: float | None = None, n: int = 24) -> fl.Fisher:
    """Independent inputs; heads with outputs of their own, or of one output whose inputs share a part."""
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = fill(Heads(count, width, planted is not None).double(), g)
    x = torch.randn(n, count * width, generator=g, dtype=torch.float64)
    if planted is not None:
        for k in range(1, count):
            x[:, k * width : (k + 1) * width] = (
                planted * x[:, :width] + (1 - planted**2) ** 0.5 * x[:, k * width : (k + 1) * width]
            )
    outputs = 1 if planted is not None else count
    return fl.Fisher(model, (x, torch.zeros(n, outputs, dtype=torch.float64)), likelihood="gaussian")


def within(hits: int, trials: int, level: float, sigmas: float = 3.5) -> bool:
    """No further from the expected number than chance allows."""
    return abs(hits - trials * level) < sigmas * (trials * level * (1 - level)) ** 0.5


def test_independent_blocks_are_found_at_the_nominal_rate():
    """Uniform p-values: neither too many small ones, nor none."""
    p = np.array([fl.coupling(heads(s), num_null=39, seed=s)["p_value"].values[0, 1] for s in range(120)])
    assert p.min() >= 1 / 40
    for level in (0.05, 0.25, 0.5, 0.75):
        assert within((p <= level + 1e-9).sum(), 120, level), level


@pytest.mark.slow
def test_independent_blocks_over_many_seeds():
    p = np.array([fl.coupling(heads(s), num_null=99, seed=s)["p_value"].values[0, 1] for s in range(600)])
    for level in (0.01, 0.05, 0.1, 0.5):
        assert within((p <= level + 1e-9).sum(), 600, level), level


def test_planted_couplings_are_found():
    found = [fl.coupling(heads(s, planted=0.9), num_null=99, seed=s) for s in range(20)]
    p = np.array([ds["p_value"].values[0, 1] for ds in found])
    assert np.mean(p <= 0.05) > 0.9
    assert all(ds["coupling"].values[0, 1] > ds["noise_floor"].values[0, 1] for ds in found)
    apart = [fl.coupling(heads(s), num_null=0)["coupling"].values[0, 1] for s in range(5)]
    assert max(apart) < 1e-7  # exactly no coupling in the exact Fisher


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.8])
def test_planted_couplings_are_measured(strength):
    """One output, weights of two heads on Gaussian inputs of a known correlation c: F = E x xᵀ and so ρ = c, but for the sample."""
    model = Heads(added=True).double()
    for head in model.heads:
        head.bias.requires_grad_(False)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(20_000, 6, generator=g, dtype=torch.float64)
    x[:, 3:] = strength * x[:, :3] + (1 - strength**2) ** 0.5 * x[:, 3:]
    F = fl.Fisher(model, (x, torch.zeros(20_000, 1, dtype=torch.float64)), likelihood="gaussian")
    ds = fl.coupling(F, num_null=0)
    rho, floor = ds["coupling"].values[0, 1], ds["noise_floor"].values[0, 1]
    assert floor == pytest.approx((3 / 20_000) ** 0.5, rel=0.05)
    assert rho == pytest.approx((strength**2 + floor**2) ** 0.5, abs=3 / 20_000**0.5)
    assert strength or rho < 2 * floor


def test_layers_of_one_network_are_coupled():
    model, (x, y), likelihood = make_case(
        "coupled", lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,), n=60
    )
    ds = fl.coupling(fl.Fisher(model, (x, y), likelihood=likelihood), num_null=99)
    assert ds["p_value"].values[0, 1] <= 0.02
    assert ds["coupling"].values[0, 1] > 2 * ds["noise_floor"].values[0, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_adjusted_values_and_repeatability(kind):
    F = case("mlp_tanh", kind).fisher()
    a, b, c = (fl.coupling(F, "parameter", num_null=60, seed=s) for s in (1, 1, 2))
    off = ~np.eye(6, dtype=bool)
    for ds in (a, c):
        p, adjusted, q = (ds[name].values for name in ("p_value", "p_adjusted", "q_value"))
        for values in (p, adjusted, q):
            assert np.isnan(np.diag(values)).all()
            assert np.array_equal(values[off], values.T[off])
            assert ((values[off] >= p[off]) & (values[off] <= 1)).all()
        assert (p[off] >= 1 / 61).all()
        assert np.allclose(p[off] * 61, np.round(p[off] * 61))
        upper = np.triu_indices(6, 1)
        assert np.allclose(q[upper], reference.false_discovery(torch.from_numpy(p[upper])))
    assert a.drop_attrs().equals(b.drop_attrs())
    assert not np.array_equal(a["p_value"].values[off], c["p_value"].values[off])
    assert np.array_equal(a["coupling"].values, c["coupling"].values)


def families(
    count: int, seeds: int, num_null: int, n: int = 20, **options
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Smallest adjusted, q- and raw values over the pairs of independent heads, for each seed."""
    found = [fl.coupling(heads(s, count, 2, n=n), num_null=num_null, seed=s, **options) for s in range(seeds)]
    return tuple(np.array([np.nanmin(ds[name]) for ds in found]) for name in ("p_adjusted", "q_value", "p_value"))


def test_adjusted_values_control_the_whole_family():
    """Four independent heads, six pairs: the smallest adjusted value is small as often as a single p-value may be."""
    adjusted, q, raw = families(4, 100, 39)
    assert within((adjusted <= 0.1).sum(), 100, 0.1)  # the largest statistic is exact for the complete null
    assert (q <= 0.1).sum() < 10 + 3.5 * (100 * 0.09) ** 0.5
    assert (raw <= 0.1).sum() > 25 > (adjusted <= 0.1).sum()


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 5, 12])
def test_family_wise_errors_over_many_seeds(count):
    adjusted, q, _ = families(count, 400, 99)
    assert within((adjusted <= 0.05 + 1e-9).sum(), 400, 0.05)
    assert (q <= 0.05 + 1e-9).sum() < 20 + 3.5 * (400 * 0.05 * 0.95) ** 0.5


@pytest.mark.slow
def test_planted_couplings_among_many_independent_blocks():
    """Two of eight heads read the same inputs into one output: that pair is found, hardly any other."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(2, 1) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            parts = [head(part) for head, part in zip(self.heads, x.split(2, 1), strict=True)]
            return torch.cat([parts[0] + parts[1], *parts[2:]], 1)

    hits, others, trials = 0, 0, 60
    for seed in range(trials):
        g = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            model = fill(Mixed().double(), g)
        x = torch.randn(40, 16, generator=g, dtype=torch.float64)
        x[:, 2:4] = 0.9 * x[:, :2] + 0.43 * x[:, 2:4]
        F = fl.Fisher(model, (x, torch.zeros(40, 7, dtype=torch.float64)), likelihood="gaussian")
        small = np.triu(fl.coupling(F, num_null=199, seed=seed)["p_adjusted"].values <= 0.05, 1)
        hits += small[0, 1]
        others += small.sum() - small[0, 1] > 0
    assert hits > 0.9 * trials
    assert others < trials * 0.05 + 3.5 * (trials * 0.05 * 0.95) ** 0.5


def test_permutations_are_those_of_the_definition():
    """p-values again, from the reference's permuted blocks."""
    F = heads(3, n=9)
    sample = F.single_sample(7)
    U = sample.rows_at(torch.arange(9))
    generator = torch.Generator().manual_seed(7)
    blocks = [torch.arange(4), torch.arange(4, 8)]

    def squared(order):
        # U_iᵀ Π U_j: the norm of the block of the permuted matrix
        return reference.permuted_block(U, 1.0, *blocks, order).square().sum()

    null = torch.stack([squared(torch.randperm(9, generator=generator)) for _ in range(30)])
    expected = (1 + (null >= squared(torch.arange(9)) - 1e-12).sum().item()) / 31
    found = fl.coupling(F, num_null=30, seed=7)
    assert found["p_value"].values[0, 1] == pytest.approx(expected)


def test_strips_of_any_size_give_the_same_test(monkeypatch):
    F = case("mlp_tanh").fisher()
    whole = fl.coupling(F, "unit", num_null=25)
    for room in (2000, 9000):
        monkeypatch.setattr(permutations, "_ROOM", room)
        part = fl.coupling(F, "unit", num_null=25)
        for name in ("p_value", "p_adjusted", "q_value"):
            assert np.array_equal(part[name], whole[name], equal_nan=True), (room, name)


def test_rounding_does_not_break_ties():
    """Equal examples make many permutations equal to none: none of them may look smaller than what was observed."""
    model, _, likelihood = make_case("ties", lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), (2,))
    x = torch.tensor([[1.0, 2.0]] * 5 + [[-1.0, 0.5]] * 1, dtype=torch.float64)
    y = torch.tensor([0, 0, 0, 0, 0, 1])
    for dtype in (torch.float64, torch.float32):
        F = fl.Fisher(model.to(dtype), (x.to(dtype), y), likelihood=likelihood, kind="empirical")
        p = fl.coupling(F, num_null=60)["p_value"].values[0, 1]
        assert abs(p * 61 - 11) < 12  # one of six permutations leaves the odd example in place
        assert p > 1 / 61


def test_discoveries_of_benjamini_and_hochberg():
    p = np.array([0.01, 0.04, 0.03, 0.005, 0.5])
    assert np.allclose(benjamini_hochberg(p), [0.025, 0.05, 0.05, 0.025, 0.5])
    assert np.allclose(benjamini_hochberg(np.array([0.9, 0.8])), [0.9, 0.9])
    g = np.random.default_rng(0)
    for _ in range(5):
        p = np.round(g.random(30) ** 3, 2)
        assert np.allclose(benjamini_hochberg(p), reference.false_discovery(torch.from_numpy(p)))


# --- a choice of blocks, and sketches --------------------------------------------------------------------------------


def test_a_random_choice_of_blocks_is_exact():
    F = case("mlp_tanh").fisher()
    whole = fl.coupling(F, "diagonal", num_null=0)
    some = fl.coupling(F, "diagonal", num_null=0, sample=12, seed=4)
    places = some["place_i"].values
    assert len(places) == 12
    assert (np.diff(places) > 0).all()
    for name in ("coupling", "noise_floor"):
        assert np.allclose(some[name], whole[name].values[places][:, places], atol=1e-12)
    assert np.allclose(some["block_norm"], whole["block_norm"].values[places])
    assert list(some["block_i"].values) == list(whole["block_i"].values[places])
    assert '"num_blocks": 79' in some.attrs["settings"]
    assert np.array_equal(places, fl.coupling(F, "diagonal", num_null=0, sample=12, seed=4)["place_i"])
    assert not np.array_equal(places, fl.coupling(F, "diagonal", num_null=0, sample=12, seed=5)["place_i"])
    assert "place_i" not in fl.coupling(F, "diagonal", num_null=0, sample=79).coords
    tested = fl.coupling(F, "unit", num_null=19, sample=5)
    assert np.isfinite(tested["p_value"].values[~np.eye(5, dtype=bool)]).all()
    # more blocks than allowed are fine where only some of them are taken
    assert fl.coupling(F, "diagonal", num_null=0, sample=12, max_blocks=20).sizes["block_i"] == 12


def test_means_over_random_choices_are_unbiased():
    F = case("mlp_tanh").fisher()
    whole = fl.coupling(F, "unit", num_null=0)["coupling"].values
    upper = np.triu_indices(13, 1)
    means = []
    for seed in range(60):
        values = fl.coupling(F, "unit", num_null=0, sample=5, seed=seed)["coupling"].values
        means.append(values[np.triu_indices(5, 1)].mean())
    sem = np.std(means, ddof=1) / 60**0.5
    assert abs(np.mean(means) - whole[upper].mean()) < 4 * sem


SCHEMES = ({"scheme": "layer"}, {"scheme": "unit"}, {"scheme": "mbf"}, {"scheme": "random", "size": 9})


@pytest.mark.parametrize("options", SCHEMES, ids=lambda options: options["scheme"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups"])
def test_sketches_are_unbiased_within_their_errors(name, options):
    """The mean over many sketches, five standard errors; the errors themselves are those of the spread between runs."""
    c = case(name)
    F = c.fisher()
    parts = fl.partition(F, **options)
    exact = fl.coupling(F, parts, num_null=0)
    ds = fl.coupling(F, parts, num_null=0, num_sketches=60, sketch_size=16, seed=1)
    gap = ds["coupling_squared"].values - exact["coupling"].values ** 2
    sem = ds["coupling_squared_sem"].values
    off = ~np.eye(len(gap), dtype=bool)
    assert (np.abs(gap[off]) <= 5 * sem[off] + 0.01).all()  # the bias of a ratio is of the second order
    assert (gap[~off] == 0).all() or np.abs(gap[~off]).max() < 1e-12
    assert (sem[~off] == 0).all()
    z = gap[off] / sem[off]
    assert len(z) < 30 or 0.5 < np.sqrt(np.mean(z**2)) < 1.6
    assert (
        np.abs(ds["block_norm"] - exact["block_norm"]) <= 5 * ds["block_norm_sem"] + 0.02 * exact["block_norm"]
    ).all()
    # the floor of an estimated norm, with exact traces
    assert np.allclose(ds["noise_floor"], exact["noise_floor"], rtol=0.3)
    rho = ds["coupling"].values
    assert np.allclose(rho**2, np.clip(ds["coupling_squared"], 0, 1), atol=1e-12)
    assert np.allclose(ds["coupling_sem"], np.sqrt(rho**2 + sem) - rho)
    assert ds.attrs["num_matvecs"] == 60 * 16


@pytest.mark.slow
def test_errors_of_sketches_fall_with_their_number_and_are_calibrated():
    F = case("mlp_tanh").fisher()
    parts = fl.partition(F, "unit")
    truth = fl.coupling(F, parts, num_null=0)["coupling"].values ** 2
    off = ~np.eye(len(truth), dtype=bool)
    errors, stated, covered = [], [], []
    for count in (5, 20, 80):
        runs = [fl.coupling(F, parts, num_null=0, num_sketches=count, sketch_size=12, seed=s) for s in range(40)]
        gaps = np.array([ds["coupling_squared"].values[off] - truth[off] for ds in runs])
        sems = np.array([ds["coupling_squared_sem"].values[off] for ds in runs])
        errors.append(np.sqrt((gaps**2).mean()))
        stated.append(np.sqrt((sems**2).mean()))
        covered.append((np.abs(gaps) < 1.96 * sems).mean())
    slopes = np.diff(np.log(errors)) / np.log(4)
    assert np.allclose(slopes, -0.5, atol=0.08)
    assert np.allclose(np.array(stated) / errors, 1, atol=0.12)
    assert covered[-1] > 0.92


def test_sketches_of_streamed_scores_and_in_float32():
    c = case("mlp_tanh")
    a = fl.coupling(c.fisher(), "unit", num_null=0, num_sketches=3, sketch_size=8)
    b = fl.coupling(c.fisher(memory=8000), "unit", num_null=0, num_sketches=3, sketch_size=8)
    streamed = c.fisher(memory=1000)
    streamed.memory = 2**20
    d = fl.coupling(streamed, "unit", num_null=0, num_sketches=3, sketch_size=8)
    for other in (b, d):
        assert np.allclose(a["coupling_squared"], other["coupling_squared"], atol=1e-10)
        assert np.allclose(a["coupling_squared_sem"], other["coupling_squared_sem"], atol=1e-10)
    model, (x, y), likelihood = make_case(
        "mlp_tanh", lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), (5,), n=7
    )
    double = fl.coupling(fl.Fisher(model, (x, y), likelihood=likelihood), "unit", num_null=0, num_sketches=3)
    single = fl.coupling(
        fl.Fisher(model.float(), (x.float(), y), likelihood=likelihood), "unit", num_null=0, num_sketches=3
    )
    assert np.allclose(double["coupling_squared"], single["coupling_squared"], atol=1e-4)


def test_sketches_and_permutations_together():
    F = case("mlp_tanh").fisher()
    ds = fl.coupling(F, "unit", num_null=19, num_sketches=4)
    assert np.array_equal(ds["p_value"], fl.coupling(F, "unit", num_null=19)["p_value"], equal_nan=True)
    assert ds.attrs["method"] == "sketched block norms, example permutation"
    with pytest.warns(NumericalWarning, match="2 sketches are too few for standard errors .* Use num_sketches >= 3"):
        few = fl.coupling(F, "unit", num_null=0, num_sketches=2)
    assert np.isfinite(few["coupling"]).all()
    assert np.isnan(few["coupling_sem"]).all()
    assert np.isnan(few["block_norm_sem"]).all()


def test_what_sampling_and_sketches_refuse():
    F = case("mlp_tanh").fisher()
    for name, least in (("sample", 2), ("num_sketches", 1), ("sketch_size", 2), ("max_blocks", 1)):
        for value in (least - 1, 2.5, True, "8"):
            with pytest.raises(InputError, match=rf"{name} must be an integer >= {least}, .*; got"):
                fl.coupling(F, "unit", **{name: value})
    tight = case("mlp_tanh").fisher(memory=1000)
    with pytest.raises(
        MemoryBudgetError,
        match=r"A sketch of this size holds 39\.5 KiB, over the budget of 1000 B.* smaller sketch_size",
    ):
        fl.coupling(tight, "unit", num_null=0, num_sketches=3)
