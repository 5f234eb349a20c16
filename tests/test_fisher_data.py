"""Normalisation over batches, weights and structured outputs: F is that of the mean over the whole data set."""

from __future__ import annotations

import pytest
import torch
from cases import fill
from fisher_checks import DRAWS, KINDS, QUIET, SEED, ZOO, Case, case, drawn_labels, error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError

pytestmark = pytest.mark.filterwarnings(QUIET)
TOLERANCE = 1e-10
WEIGHTS = [0.2, 1.0, 3.0]


def split(data, sizes):
    inputs, targets = data
    assert sum(sizes) == len(targets)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [(inputs[b - s : b], targets[b - s : b]) for s, b in zip(sizes, ends, strict=True)]


def linear(n: int = 12, d: int = 4, classes: int = 3, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        model = fill(nn.Sequential(nn.Linear(d, 5), nn.Tanh(), nn.Linear(5, classes)).double(), g)
    return model, (torch.randn(n, d, generator=g, dtype=torch.float64), torch.randint(classes, (n,), generator=g))


def structured(classes_last: bool = False, n: int = 5) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Logits (N, C, S), or (N, S, C), with S = C = 3, so that no size tells which axis is which."""
    g = torch.Generator().manual_seed(1)
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)]
    with torch.random.fork_rng(devices=[]):
        model = fill(nn.Sequential(*layers, *([] if classes_last else [Transposed()])).double(), g)
    return model, (torch.randn(n, 3, 4, generator=g, dtype=torch.float64), torch.randint(3, (n, 3), generator=g))


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def make(model, data, likelihood, kind) -> Case:
    labels = drawn_labels(model, data, likelihood) if kind == "mc" else None
    matrix = reference.fisher(model, data, likelihood, kind, labels=labels)
    return Case(model, data, likelihood, kind, matrix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_stride", "gaussian_three_outputs", "bernoulli_two_outputs", "lstm"])
def test_unequal_batches_equal_one_batch(name, kind):
    c = case(name, kind)
    n = len(c.data[1])
    one = c.fisher()
    V = c.vectors()
    for sizes in ((n - 3, 3), (1, n - 1), (2, 1, n - 3), (1,) * n):
        F = c.fisher(data=split(c.data, sizes))
        assert error(F.dense(), one.dense()) < 1e-12
        assert error(F @ V, one @ V) < 1e-12
        assert error(F.gradient(), one.gradient()) < 1e-12
        assert error(F.gram(), one.gram()) < 1e-12
        assert (F.n_data, F.total_weight) == (n, one.total_weight)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders(workers):
    c = case("mlp_tanh")
    loader = DataLoader(TensorDataset(*c.data), batch_size=3, num_workers=workers)
    assert error(c.fisher(data=loader).dense(), c.matrix) < TOLERANCE


def test_lists_of_batches_and_empty_batches():
    c = case("mlp_tanh")
    x, y = c.data
    assert error(c.fisher(data=[(x[:0], y[:0]), (x, y), (x[:0], y[:0])]).dense(), c.matrix) < 1e-12
    assert error(c.fisher(data=[[x, y]]).dense(), c.matrix) < 1e-12
    assert error(c.fisher(data=[x, y]).dense(), c.matrix) < 1e-12


def test_two_batches_are_not_mistaken_for_inputs_and_targets():
    c = case("mlp_tanh")
    x, y = c.data
    for pair in (((x[:3], y[:3]), (x[3:], y[3:])), [(x[:3], None), (x[3:], None)], ((x[:3], None), (x[3:], None))):
        assert error(c.fisher(data=pair).dense(), c.matrix) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_class_weights(kind):
    model, data = linear(12)
    c = make(model, data, fl.Categorical(weight=WEIGHTS), kind)
    for sizes in ((12,), (7, 5), (1, 2, 9)):
        F = c.fisher(data=split(data, sizes))
        assert error(F.dense(), c.matrix) < TOLERANCE
        assert error(F @ c.vectors(), c.matrix @ c.vectors()) < TOLERANCE
        assert error(F.gradient(), c.gradient) < TOLERANCE
        assert error(F.natural_gradient(0.1), reference.solve(c.matrix, c.gradient, 0.1)) < TOLERANCE
        assert F.total_weight == pytest.approx(sum(WEIGHTS[y] for y in data[1].tolist()))
    plain = make(model, data, "categorical", kind)
    assert error(c.matrix, plain.matrix) > 1e-2


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_weight_two_equals_the_example_given_twice(kind):
    model, (x, y) = linear(6)
    doubled = (torch.cat([x, x[y == 1]]), torch.cat([y, y[y == 1]]))
    one = fl.Fisher(model, (x, y), likelihood=fl.Categorical(weight=[1.0, 2.0, 1.0]), kind=kind)
    two = fl.Fisher(model, doubled, likelihood="categorical", kind=kind)
    assert error(one.dense(), two.dense()) < 1e-12
    assert error(one.gradient(), two.gradient()) < 1e-12
    # linear in the weights
    parts = [
        fl.Fisher(model, (x, y), likelihood=fl.Categorical(weight=w), kind=kind) for w in ([1.0, 0, 2], [0, 3.0, 1])
    ]
    whole = fl.Fisher(model, (x, y), likelihood=fl.Categorical(weight=[1.0, 3.0, 3.0]), kind=kind)
    total = sum(F.dense() * F.total_weight for F in parts)
    assert error(whole.dense() * whole.total_weight, total) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_classes_of_weight_zero_are_dropped(kind):
    model, data = linear(12)
    c = make(model, data, fl.Categorical(weight=[1.0, 0.0, 2.0]), kind)
    F = c.fisher()
    kept = int((data[1] != 1).sum())
    assert 0 < kept < 12
    assert F.gram().shape == (kept * F.n_columns,) * 2
    assert F.rank_bound == min(F.n_params, kept * (2 if kind == "exact" else F.n_columns))
    assert error(F.dense(), c.matrix) < TOLERANCE
    assert error(F.solve(c.vectors(), 0.1), reference.solve(c.matrix, c.vectors(), 0.1)) < TOLERANCE
    assert error(F.natural_gradient(0.1), reference.solve(c.matrix, c.gradient, 0.1)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("classes_last", [False, True])
def test_structured_outputs_with_ignored_labels_and_weights(kind, classes_last):
    model, (x, y) = structured(classes_last)
    y[0, 1], y[3, 2], y[4] = 7, 7, 7  # the last example has no label at all
    likelihood = fl.Categorical(weight=WEIGHTS, ignore_index=7, class_axis=-1 if classes_last else 1)
    c = make(model, (x, y), likelihood, kind)
    kept = int((y != 7).sum())
    for sizes in ((5,), (4, 1), (1, 2, 2)):
        F = c.fisher(data=split((x, y), sizes))
        assert error(F.dense(), c.matrix) < TOLERANCE
        assert error(F @ c.vectors(), c.matrix @ c.vectors()) < TOLERANCE
        assert error(F.diagonal(), c.matrix.diagonal()) < TOLERANCE
        assert error(F.gradient(), c.gradient) < TOLERANCE
        assert error(F.natural_gradient(0.1), reference.solve(c.matrix, c.gradient, 0.1)) < TOLERANCE
        assert F.gram().shape == ({"exact": 2 * kept, "empirical": kept, "mc": 4 * DRAWS}[kind],) * 2


def test_class_axis_is_named_and_never_guessed():
    model, (x, y) = structured()
    first = fl.Fisher(model, (x, y), likelihood=fl.Categorical(class_axis=1)).dense()
    last = fl.Fisher(model, (x, y), likelihood=fl.Categorical(class_axis=-1)).dense()
    also = fl.Fisher(model, (x, y), likelihood=fl.Categorical(class_axis=2)).dense()
    assert error(first, reference.fisher(model, (x, y), "categorical")) < TOLERANCE
    assert error(last, reference.fisher(model, (x, y), fl.Categorical(class_axis=-1))) < TOLERANCE
    assert torch.equal(last, also)
    assert error(first, last) > 1e-2


def test_classes_last_equals_classes_first():
    a, data = structured(classes_last=True)
    b, _ = structured()
    one = fl.Fisher(a, data, likelihood=fl.Categorical(class_axis=-1))
    assert error(one.dense(), fl.Fisher(b, data, likelihood="categorical").dense()) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_variance_and_pos_weight(kind):
    for name, likelihood in (
        ("gaussian_three_outputs", fl.Gaussian(0.3)),
        ("gaussian_three_outputs", fl.Gaussian([0.2, 1.0, 5.0])),
        ("gaussian_image", fl.Gaussian(torch.tensor([0.2, 3.0])[:, None, None])),
        ("bernoulli_two_outputs", fl.Bernoulli(2.5)),
        ("bernoulli_two_outputs", fl.Bernoulli([0.5, 4.0])),
    ):
        model, data, _ = ZOO[name]()
        c = make(model, data, likelihood, kind)
        F = c.fisher()
        assert error(F.dense(), c.matrix) < TOLERANCE
        assert error(F.gradient(), c.gradient) < TOLERANCE
        assert error(F.natural_gradient(0.1), reference.solve(c.matrix, c.gradient, 0.1)) < TOLERANCE


def test_soft_bernoulli_targets():
    model, (x, _), _ = ZOO["bernoulli_two_outputs"]()
    y = torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind in ("exact", "empirical"):
        for pos_weight in (None, 3.0, [0.5, 2.0]):
            c = make(model, (x, y), fl.Bernoulli(pos_weight), kind)
            assert error(c.fisher().dense(), c.matrix) < TOLERANCE
            assert error(c.fisher().gradient(), c.gradient) < TOLERANCE
            assert error(c.fisher().natural_gradient(0.1), reference.solve(c.matrix, c.gradient, 0.1)) < TOLERANCE
            weight = None if pos_weight is None else torch.tensor(pos_weight, dtype=torch.float64)
            loss = nn.functional.binary_cross_entropy_with_logits(model(x), y, pos_weight=weight, reduction="sum") / 8
            gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))])
            assert error(c.fisher().gradient(), gradient) < TOLERANCE


def test_targets_may_be_missing_where_nothing_needs_them():
    c = case("mlp_tanh")
    x, _ = c.data
    F = fl.Fisher(c.model, (x, None), likelihood="categorical")
    assert error(F.dense(), c.matrix) < TOLERANCE
    F = fl.Fisher(c.model, (x, None), likelihood="categorical", kind="mc", mc_samples=DRAWS, seed=SEED)
    assert error(F.dense(), case("mlp_tanh", "mc").matrix) < TOLERANCE
    with pytest.raises(InputError, match="needs observed labels, but this Fisher was built with targets=None"):
        F.gradient()
    mixed = fl.Fisher(c.model, [(x[:3], c.data[1][:3]), (x[3:], None)], likelihood="categorical")
    with pytest.raises(InputError, match="targets=None"):
        mixed.natural_gradient(0.1)


class Named(nn.Module):
    """Keyword inputs, one of them a setting for the whole batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor, scale: Tensor) -> Tensor:
        return torch.tanh(self.a(left)) * scale + self.b(right)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_dicts_and_tuples_of_inputs(kind):
    g = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = fill(Named().double(), g)
    left, right = (torch.randn(6, d, generator=g, dtype=torch.float64) for d in (3, 2))
    scale, y = torch.tensor(1.7, dtype=torch.float64), torch.randint(3, (6,), generator=g)
    T = reference.fisher(model, ({"left": left, "right": right, "scale": scale}, y), "categorical", kind)
    for inputs in ({"left": left, "right": right, "scale": scale}, (left, right, scale)):
        F = fl.Fisher(model, (inputs, y), likelihood="categorical", kind=kind)
        assert error(F.dense(), T) < TOLERANCE
    batches = [({"left": left[i], "right": right[i], "scale": scale}, y[i]) for i in (slice(4), slice(4, 6))]
    assert error(fl.Fisher(model, batches, likelihood="categorical", kind=kind).dense(), T) < TOLERANCE


def test_small_passes_change_nothing(monkeypatch):
    """The data are cut into pieces of bounded size; here into single examples."""
    monkeypatch.setattr("fisherlens.scores.collector._TRANSIENT", 1)
    for name in ("mlp_tanh", "conv_groups", "segmentation", "lstm", "layer_norm"):
        for kind in KINDS:
            c = case(name, kind)
            assert error(c.fisher().dense(), c.matrix) < TOLERANCE
            assert error(c.fisher().gradient(), c.gradient) < TOLERANCE


def test_memory_layout_of_the_inputs_does_not_matter():
    for name in ("conv_padding", "conv_groups", "batchnorm_2d"):
        c = case(name)
        x, y = c.data
        for other in (
            x.to(memory_format=torch.channels_last),
            x.transpose(2, 3).contiguous().transpose(2, 3),
            torch.cat([x, x], 1)[:, : x.shape[1]],
        ):
            assert torch.equal(x, other)
            assert error(c.fisher(data=(other, y)).dense(), c.matrix) < TOLERANCE
    model, data, likelihood = ZOO["conv_padding"]()
    model = model.to(memory_format=torch.channels_last)
    assert error(fl.Fisher(model, data, likelihood=likelihood).dense(), case("conv_padding").matrix) < TOLERANCE
    x = data[0][:, :1].expand(-1, 2, -1, -1)  # stride 0
    T = reference.fisher(model, (x.clone(), data[1]), likelihood)
    assert error(fl.Fisher(model, (x, data[1]), likelihood=likelihood).dense(), T) < TOLERANCE
