"""The traps in which peers were caught, one by one and in their order: scale and weights, graphs and layers.

The numbers are those of the project's list of traps; ``test_traps_more.py`` holds the rest. Truths are explicit sums over
examples, or the dense reference.
"""

from __future__ import annotations

import pytest
import torch
from cases import fill
from fisher_checks import KINDS, drawn_labels, error
from hessian_checks import truth_of
from torch import Tensor, nn
from torch.nn import functional

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError

DTYPE = torch.float64
TOLERANCE = 1e-10
WEIGHTS = [0.2, 1.0, 3.0]
LOSSES = {"categorical": nn.CrossEntropyLoss(), "bernoulli": nn.BCEWithLogitsLoss(), "gaussian": nn.MSELoss()}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def labels(n: int, classes: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed + 100))


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    return fill(model.double().eval(), torch.Generator().manual_seed(seed))


def mlp(inputs: int = 4, outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return filled(nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)))


def twelve() -> tuple[Tensor, Tensor]:
    x, y = noise(12, 4), labels(12)
    assert len(x) == 12
    assert set(y.tolist()) == {0, 1, 2}
    return x, y


def split(data: tuple[Tensor, Tensor], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    assert sum(sizes) == len(data[1])
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def per_example(model: nn.Module, x: Tensor, y: Tensor, kind: str) -> list[Tensor]:
    """F_n of each example alone."""
    return [reference.fisher(model, (x[n : n + 1], y[n : n + 1]), "categorical", kind) for n in range(len(x))]


def agrees(F: fl.Fisher, truth: Tensor, tolerance: float = TOLERANCE) -> None:
    """Products, diagonal, trace, matrix and the blocks of all layers."""
    V = noise(F.n_params, 3, seed=9)
    assert F.n_params == len(truth)
    assert error(F @ V, truth @ V) < tolerance
    assert error(F @ V[:, 0], truth @ V[:, 0]) < tolerance
    assert error(F.diagonal(), truth.diagonal()) < tolerance
    assert F.trace() == pytest.approx(truth.trace().item(), rel=tolerance)
    assert error(F.dense(), truth) < tolerance
    for layer in F.layout.layers:
        at = slice(layer.start, layer.stop)
        assert error(F.block(layer.name), truth[at, at]) < tolerance


# --- scale and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_trap_01_unequal_batches(kind):
    model, data = mlp(), twelve()
    drawn = drawn_labels(model, data, "categorical")
    truth = reference.fisher(model, data, "categorical", kind, labels=drawn)
    options = {"likelihood": "categorical", "kind": kind, "mc_samples": drawn.shape[-1], "seed": 5}
    one = fl.Fisher(model, data, **options)
    agrees(one, truth)
    for sizes in ((9, 3), (5, 4, 3)):
        F = fl.Fisher(model, split(data, *sizes), **options)
        assert error(F.dense(), one.dense()) < 1e-12
        assert error(F.gradient(), one.gradient()) < 1e-12
        assert F.total_weight == one.total_weight == 12


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_trap_02_class_weights_over_several_batches(kind):
    model, (x, y) = mlp(), twelve()
    w = torch.tensor(WEIGHTS, dtype=DTYPE)[y]
    truth = sum(w_n * F_n for w_n, F_n in zip(w, per_example(model, x, y, kind), strict=True)) / w.sum()
    likelihood = fl.Categorical(weight=WEIGHTS)
    one = fl.Fisher(model, (x, y), likelihood=likelihood, kind=kind)
    agrees(one, truth)
    two = fl.Fisher(model, split((x, y), 7, 5), likelihood=likelihood, kind=kind)
    assert error(two.dense(), one.dense()) < 1e-12
    batch_means = [fl.Fisher(model, batch, likelihood=likelihood, kind=kind).dense() for batch in split((x, y), 7, 5)]
    assert error((7 * batch_means[0] + 5 * batch_means[1]) / 12, truth) > 1e-2  # the trap


def test_trap_03_class_weights_in_every_kind():
    model, data = mlp(), twelve()
    likelihood = fl.Categorical(weight=WEIGHTS)
    drawn = drawn_labels(model, data, likelihood)
    for kind in KINDS:
        truth = reference.fisher(model, data, likelihood, kind, labels=drawn)
        for batches in (data, split(data, 7, 5)):
            F = fl.Fisher(model, batches, likelihood=likelihood, kind=kind, mc_samples=drawn.shape[-1], seed=5)
            agrees(F, truth)
            for scheme in ("layer", "unit"):
                blocks = fl.BlockDiagonal(F, scheme)
                index = [torch.as_tensor(block) for block in fl.partition(F, scheme).blocks]
                kept = torch.zeros_like(truth)
                for block in index:
                    kept[block[:, None], block] = truth[block[:, None], block]
                assert error(blocks.dense(), kept) < TOLERANCE
        plain = fl.Fisher(model, data, likelihood="categorical", kind=kind, mc_samples=drawn.shape[-1], seed=5)
        assert error(plain.dense(), truth) > 1e-2
    H = fl.Fisher(model, split(data, 7, 5), likelihood=likelihood, kind="hessian")
    assert error(H.dense(), truth_of(model, data, likelihood)) < TOLERANCE


def test_trap_04_a_class_weight_is_a_repetition_count():
    model, (x, y) = mlp(), twelve()
    w = torch.tensor(WEIGHTS, dtype=DTYPE)[y]
    rows = []
    for n in range(12):  # gradients of the unweighted loss: the weight enters once
        grads = torch.autograd.grad(
            functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1]), list(model.parameters())
        )
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    U = torch.stack(rows)
    F = fl.Fisher(model, (x, y), likelihood=fl.Categorical(weight=WEIGHTS), kind="empirical")
    agrees(F, U.T @ (w[:, None] * U) / w.sum())
    for kind in ("exact", "empirical"):
        heavy = fl.Fisher(model, (x, y), likelihood=fl.Categorical(weight=[1.0, 2.0, 1.0]), kind=kind)
        twice = (torch.cat([x, x[y == 1]]), torch.cat([y, y[y == 1]]))
        agrees(heavy, reference.fisher(model, twice, "categorical", kind))


@pytest.mark.parametrize(("reduction", "factor"), [("mean", lambda n, c: 2 / c), ("sum", lambda n, c: 2 * n)])
def test_trap_05_factors_of_the_squared_error(reduction, factor):
    model, x, y = mlp(outputs=5), noise(12, 4), noise(12, 5, seed=1)
    f = model(x).detach()
    H = torch.autograd.functional.hessian(lambda z: functional.mse_loss(z, y, reduction=reduction), f).reshape(60, 60)
    J = reference.jacobian(model, x).reshape(60, -1)
    F = fl.Fisher(model, (x, y), likelihood=fl.Gaussian(1.0))
    assert error(factor(12, 5) * F.dense(), J.T @ H @ J) < TOLERANCE
    with pytest.raises(TypeError, match=r"likelihood must be a name.*got MSELoss.*use likelihood='gaussian'"):
        fl.Fisher(model, (x, y), likelihood=nn.MSELoss(reduction=reduction))


def test_trap_06_mean_of_squares_and_its_kind():
    model, data = mlp(), twelve()
    exact, empirical = (fl.Fisher(model, data, likelihood="categorical", kind=kind) for kind in ("exact", "empirical"))
    square_of_mean = reference.gradient(model, data, "categorical").square()
    mean_of_squares = torch.stack(
        [reference.gradient(model, (x[None], y[None]), "categorical") for x, y in zip(*data, strict=True)]
    )
    assert error(empirical.diagonal(), mean_of_squares.square().mean(0)) < TOLERANCE
    assert error(empirical.diagonal(), square_of_mean) > 0.1
    assert error(empirical.dense(), exact.dense()) > 0.1
    for F, kind in ((exact, "exact"), (empirical, "empirical")):
        assert f"kind='{kind}'" in repr(F)
        assert fl.spectrum(F).attrs["kind"] == kind


def test_trap_07_damping_is_added_once_and_leaves_no_trace():
    F, v = fl.Fisher(mlp(), twelve(), likelihood="categorical"), noise(35, 2)
    before = F @ v, F.dense(), F.trace()
    damped, twice, sum_of_both = F.damped(0.3), F.damped(0.3).damped(0.2), F.damped(0.5)
    assert error(damped @ v, F @ v + 0.3 * v) < 1e-14
    assert error(damped @ v, damped @ v) == 0
    assert error(twice @ v, sum_of_both @ v) < 1e-14
    assert error(twice.dense(), F.dense() + 0.5 * torch.eye(35, dtype=DTYPE)) < 1e-14
    assert error(damped.solve(v), reference.solve(F.dense(), v, 0.3)) < TOLERANCE
    assert torch.equal(F @ v, before[0])
    assert torch.equal(F.dense(), before[1])
    assert F.trace() == before[2]


# --- graphs and layers -----------------------------------------------------------------------------------------------


class Siamese(nn.Module):
    """One layer in two branches, and one used at each step of a recurrence."""

    def __init__(self):
        super().__init__()
        self.branch, self.step, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.tanh(self.branch(x[:, :2])) * torch.tanh(self.branch(x[:, 2:]))
        for _ in range(3):
            state = torch.tanh(self.step(state))
        return self.head(state)


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_trap_08_module_called_twice(kind):
    with torch.random.fork_rng(devices=[]):
        model = filled(Siamese())
    F = fl.Fisher(model, twelve(), likelihood="categorical", kind=kind)
    agrees(F, reference.fisher(model, twelve(), "categorical", kind))
    assert F.plan["step"].storage in ("factors", "rows")  # by the rule, summed over calls


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_trap_09_tied_weights_count_once():
    with torch.random.fork_rng(devices=[]):
        model = filled(Tied())
    F = fl.Fisher(model, twelve(), likelihood="categorical")
    assert F.n_params == 16 + 4 + 4 + 15 == sum({id(p): p.numel() for p in model.parameters()}.values())
    assert F.layout["first.weight"].aliases == ("second.weight",)
    assert "second.weight" not in F.layout
    agrees(F, reference.fisher(model, twelve(), "categorical"))
    total = {name: p.detach().clone() for name, p in model.named_parameters()}
    J = torch.func.jacrev(lambda t: torch.func.functional_call(model, t, (twelve()[0],)))(total)  # both uses move
    J = torch.cat([J[name].reshape(12, 3, -1) for name in total], 2)
    p = model(twelve()[0]).softmax(-1).detach()
    H = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    assert error(F.dense(), torch.einsum("ncp,ncd,ndq->pq", J, H, J) / 12) < TOLERANCE


class Rooted(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.head = nn.Parameter(torch.ones(3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.head(x)


def test_trap_10_root_level_parameter():
    with torch.random.fork_rng(devices=[]):
        model = filled(Rooted())
    F = fl.Fisher(model, twelve(), likelihood="categorical")
    assert F.n_params == 3 + 15
    assert F.layout.layer_names == ("(root)", "head")
    agrees(F, reference.fisher(model, twelve(), "categorical"))
    for chosen, size in (("gain", 3), (["gain", "head.bias"], 6), ("head", 15)):
        assert fl.Fisher(model, twelve(), likelihood="categorical", params=chosen).n_params == size


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_trap_11_groups_dilation_depthwise(groups, dilation):
    with torch.random.fork_rng(devices=[]):
        conv = nn.Conv2d(4, 4, 2, groups=groups, dilation=dilation)
        model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
        model(noise(1, 4, 4, 3))
        model = filled(model)
    data = (noise(5, 4, 4, 3), labels(5))
    truth = reference.fisher(model, data, "categorical")
    agrees(fl.Fisher(model, data, likelihood="categorical"), truth)
    assert conv.weight.shape == (4, 4 // groups, 2, 2)


def test_trap_12_string_padding_is_numeric_padding():
    """ "same" pads even kernels by one more at the end; the numbers are those of explicit padding."""
    data = (noise(5, 2, 4, 5), labels(5))
    matrices = []
    for kernel, name, pad in (
        ((3, 3), "same", (1, 1, 1, 1)),
        ((2, 4), "same", (1, 2, 0, 1)),
        ((2, 3), "valid", (0, 0, 0, 0)),
    ):
        for padding in (name, None):
            with torch.random.fork_rng(devices=[]):
                conv = nn.Conv2d(2, 2, kernel, padding=padding or 0)
                explicit = [] if padding else [nn.ZeroPad2d(pad)]
                model = nn.Sequential(*explicit, conv, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double().eval()
                model(data[0])
                model = filled(model, seed=3)
            matrices.append(fl.Fisher(model, data, likelihood="categorical").dense())
            if padding:
                assert error(matrices[-1], reference.fisher(model, data, "categorical")) < TOLERANCE
        assert error(matrices[-2], matrices[-1]) < 1e-12


@pytest.mark.parametrize("kind", [*KINDS, "hessian"])
def test_trap_13_batchnorm_in_training_mode(kind, unchanged):
    with torch.random.fork_rng(devices=[]):
        model = filled(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)))
    model.train()
    with unchanged(model), pytest.raises(InputError, match=r"'1' \(BatchNorm1d\) is in training mode.*model\.eval\(\)"):
        fl.Fisher(model, twelve(), likelihood="categorical", kind=kind)
    model.eval()
    with unchanged(model):  # buffers included
        F = fl.Fisher(model, twelve(), likelihood="categorical", kind=kind)
        matrix = F.dense()
    assert model[1].num_batches_tracked == 7
    if kind in ("exact", "empirical"):
        assert error(matrix, reference.fisher(model, twelve(), "categorical", kind)) < TOLERANCE
