"""The traps in which peers were caught, from the fourteenth on: chance, sequences, precision, spectra and state."""

from __future__ import annotations

import gc
import random
import weakref

import numpy as np
import pytest
import torch
from fisher_checks import KINDS, error
from test_traps import DTYPE, agrees, filled, labels, mlp, noise, split, twelve
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fisherlens as fl
from fisherlens import reference
from fisherlens.errors import InputError, MemoryBudgetError, NonFiniteError

# --- chance between passes -------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Random numbers that no mode turns off."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class Centred(nn.Module):
    """A statistic over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Augmented(Dataset):
    """Inputs that are moved at random each time they are read."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.01 * torch.randn(self.x.shape[1:], dtype=DTYPE), self.y[i]


class Counted(list):
    """Batches that count how often they are read from the start, and how many are handed over."""

    starts, batches = 0, 0

    def __iter__(self):
        self.starts += 1
        for batch in super().__iter__():
            self.batches += 1
            yield batch


def within(model: nn.Module, module: nn.Module) -> nn.Module:
    return nn.Sequential(model, nn.Sequential(nn.Tanh(), module))


@pytest.mark.parametrize("kind", [*KINDS, "hessian"])
@pytest.mark.parametrize("memory", ["2GiB", 700])
def test_trap_14_two_passes_differ(kind, memory, unchanged):
    model, data = mlp(), twelve()
    options = {"likelihood": "categorical", "kind": kind, "memory": memory}
    dropout = within(model, nn.Dropout(0.2)).train()
    with unchanged(dropout), pytest.raises(InputError, match=r"'1\.1' \(Dropout\) is in training mode with p=0\.2"):
        fl.Fisher(dropout, data, **options)
    noisy = within(model, Noisy())
    with (
        unchanged(noisy),
        pytest.raises(InputError, match=r"two different outputs.*Module '1\.1' \(Noisy\) draws random"),
    ):
        fl.Fisher(noisy, data, **options)
    for loader, cause in (
        (
            DataLoader(TensorDataset(*data), batch_size=5, shuffle=True),
            r"sampler is a RandomSampler\)\. .*shuffle=False",
        ),
        (DataLoader(Augmented(*data), batch_size=5), "DataLoader of a Augmented gives other batches.*augmentation"),
    ):
        with unchanged(model), pytest.raises(InputError, match=f"differs from .* earlier pass.*{cause}"):
            fl.Fisher(model, loader, **options)


def test_trap_14_the_opt_out_and_its_price():
    model, data = mlp(), twelve()
    shuffled = DataLoader(TensorDataset(*data), batch_size=5, shuffle=True)
    F = fl.Fisher(model, shuffled, likelihood="categorical", check_deterministic=False)
    agrees(F, reference.fisher(model, data, "categorical"))  # kept scores of all examples, in any order
    noisy = fl.Fisher(within(model, Noisy()), data, likelihood="categorical", check_deterministic=False)
    assert noisy.trace() > 0
    coupled = within(model, Centred())
    with pytest.raises(InputError, match="depends on the other examples of its batch"):
        fl.Fisher(coupled, data, likelihood="categorical", check_deterministic=False)
    counted = Counted(split(data, 5, 4, 3))
    fl.Fisher(model, counted, likelihood="categorical")
    assert (counted.starts, counted.batches) == (3, 7)  # sizes and checksums, the first batch, scores
    with pytest.raises(TypeError, match="check_deterministic must be True or False; got 'no'"):
        fl.Fisher(model, data, likelihood="categorical", check_deterministic="no")


# --- sequences, convolutions, look-alikes ----------------------------------------------------------------------------


class Tokens(nn.Module):
    """Scores of each token, (N, S, C), or classes first."""

    def __init__(self, classes_first: bool):
        super().__init__()
        self.inner, self.head, self.classes_first = nn.Linear(2, 4), nn.Linear(4, 3), classes_first

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(torch.tanh(self.inner(x)))
        return out.transpose(1, 2) if self.classes_first else out


@pytest.mark.parametrize("kind", ["exact", "empirical"])
@pytest.mark.parametrize("length", [3, 7])
def test_trap_15_sequence_outputs(length, kind):
    x, y = noise(4, length, 2), labels(4 * length).view(4, length)
    with torch.random.fork_rng(devices=[]):
        last, first = filled(Tokens(False)), filled(Tokens(True))
    flat = nn.Sequential(last.inner, nn.Tanh(), last.head)
    truth = reference.fisher(flat, (x.flatten(0, 1), y.flatten()), "categorical", kind)  # each token an example
    a = fl.Fisher(last, (x, y), likelihood=fl.Categorical(class_axis=-1), kind=kind)
    b = fl.Fisher(first, (x, y), likelihood="categorical", kind=kind)
    agrees(a, truth)
    agrees(b, truth)
    assert (a.n_data, a.total_weight) == (4, 4 * length)
    if length == 7:  # with as many tokens as classes no size can tell, and the documented axis decides
        with pytest.raises(InputError, match=r"shape \(4, 7\), but .* leave \(4, 3\).*class_axis=-1"):
            fl.Fisher(last, (x, y), likelihood="categorical", kind=kind)
    else:
        other = fl.Fisher(last, (x, y), likelihood="categorical", kind=kind)
        agrees(other, reference.fisher(last, (x, y), "categorical", kind))
        assert error(other.dense(), truth) > 1e-2


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_trap_16_rows_of_convolutions_are_sums_over_patches(stride, padding):
    """By definition: the row of a kernel is Σ_t g_t ⊗ patch_t, whatever the stride and the padding."""
    x, y = noise(5, 2, 5, 5), noise(5, 3, seed=1)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=stride, padding=padding), nn.Flatten(), nn.LazyLinear(3)
        ).double()
        model(x)
    model = filled(model)
    outputs = model[0](x)
    positions = outputs.shape[2] * outputs.shape[3]
    patches = nn.functional.unfold(x, 3, stride=stride, padding=padding)  # (N, 2·9, T)
    g = model[2].weight.view(3, 3, positions)  # the score of output c at channel o and position t, for unit variance
    kernel = torch.einsum("cot,nit->ncoi", g, patches).reshape(5, 3, -1)
    bias = g.sum(2).expand(5, 3, 3)
    U = torch.cat([kernel, bias], 2).reshape(15, -1).detach()
    F = fl.Fisher(model, (x, y), likelihood="gaussian", params="0")
    agrees(F, U.T @ U / 5)
    one = nn.Sequential(nn.Conv2d(2, 3, 5), nn.Flatten(), nn.Linear(3, 3)).double()
    F = fl.Fisher(filled(one), (x, y), likelihood="gaussian", params="0.weight")  # one position: A ⊗ G is exact
    A, G = x.flatten(1).T @ x.flatten(1) / 5, one[2].weight.T @ one[2].weight
    agrees(F, torch.kron(G, A).detach())


class Linear(nn.Module):
    """A layer of another library by the name of torch's, with the weight stored transposed and square."""

    def __init__(self, size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size, size)), nn.Parameter(torch.ones(size))
        self.in_features = self.out_features = size

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Doubled(nn.Linear):
    """A subclass of torch's layer that does something else with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


def test_trap_17_look_alike_layers():
    for build in (Linear, lambda size: Doubled(size, size)):
        with torch.random.fork_rng(devices=[]):
            model = filled(nn.Sequential(build(4), nn.Tanh(), nn.Linear(4, 3)))
        F = fl.Fisher(model, twelve(), likelihood="categorical")
        agrees(F, reference.fisher(model, twelve(), "categorical"))
        assert F.plan["0"].storage == "per example"
        assert F.plan["2"].storage == "factors"


class Explosive:
    """Data that must not be touched."""

    def __iter__(self):
        raise AssertionError("the data were read")


@pytest.mark.parametrize("kind", [*KINDS, "hessian"])
def test_trap_18_losses_are_refused_before_anything_is_read(kind):
    for loss, name in (
        (nn.CrossEntropyLoss(), "categorical"),
        (nn.NLLLoss(), "categorical"),
        (nn.BCEWithLogitsLoss(), "bernoulli"),
        (nn.MSELoss(), "gaussian"),
        (nn.functional.mse_loss, "gaussian"),
        (nn.HuberLoss(), "one of"),
        (lambda outputs, targets: outputs.sum(), "one of"),
    ):
        with pytest.raises(TypeError, match=f"likelihood must be a name or a fisherlens likelihood.*use .*{name}"):
            fl.Fisher(mlp(), Explosive(), likelihood=loss, kind=kind)


def test_trap_19_degenerate_sizes():
    x, y = twelve()
    for empty in ((x[:0], y[:0]), [], [(x[:0], y[:0])]):
        with pytest.raises(InputError, match="The data set is empty"):
            fl.Fisher(mlp(), empty, likelihood="categorical")
    for n, outputs, inputs, present in ((12, 1, 4, 1), (12, 3, 4, 1), (2, 5, 4, 2), (1, 3, 4, 1), (12, 3, 1, 3)):
        y = torch.arange(12) % present
        model, some = mlp(inputs, outputs), (x[:n, :inputs], y[:n])
        F = fl.Fisher(model, some, likelihood="categorical")
        truth = reference.fisher(model, some, "categorical")
        assert len(some[0]) == F.n_data == n
        assert len(set(some[1].tolist())) == present
        if outputs == 1:  # a softmax of one class tells nothing
            for matrix in (F.dense(), F.gram(), F @ torch.eye(F.n_params, dtype=DTYPE)):
                assert torch.count_nonzero(matrix) == 0
            assert F.trace() == F.frobenius_norm() == F.rank_bound == 0
            assert (fl.spectrum(F)["eigenvalue"].values == 0).all()
        else:
            agrees(F, truth)
            assert (reference.spectrum(truth) > 1e-10).sum() <= F.rank_bound == min(F.n_params, n * (outputs - 1))
    small = fl.Fisher(mlp(1, 3)[2], (x[:, :4], y), likelihood="categorical")
    assert small.n_params < small.n_rows  # P < N (C - 1)
    agrees(small, reference.fisher(mlp(1, 3)[2], (x[:, :4], y), "categorical"))


# --- precision and products ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("dtype", "answer", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 4e-2),
        (torch.float16, torch.float32, 4e-3),
    ],
)
def test_trap_20_dtypes_enter_and_none_is_lowered(kind, dtype, answer, tolerance, unchanged):
    model, (x, y) = mlp().to(dtype), twelve()
    with unchanged(model):
        F = fl.Fisher(model, (x.to(dtype), y), likelihood="categorical", kind=kind)
    assert F.dtype == answer
    V = noise(35, 3).to(answer)
    answers = (F @ V, F @ V[:, 0], F.diagonal(), F.dense(), F.gram(), F.gradient(), F.solve(V, 0.1))
    assert {found.dtype for found in answers} == {answer}
    if kind != "mc":  # whose labels may differ where probabilities are rounded
        truth = reference.fisher(model.double(), (x.to(dtype).double(), y), "categorical", kind)
        assert error(F.dense(), truth) < tolerance
        assert error(F @ V, truth @ V.double()) < tolerance


def test_trap_21_products_are_no_differences():
    """In float32 the products have the error of float32, far below that of a difference quotient, and the attributes name no step."""
    model, (x, y) = mlp(), twelve()
    truth = reference.fisher(model, (x, y), "categorical")
    V = noise(35, 4)
    for memory in ("2GiB", 700):
        F = fl.Fisher(mlp().float(), (x.float(), y), likelihood="categorical", memory=memory)
        assert error(F @ V.float(), truth @ V) < 1e-6
        assert error(F @ (1e-6 * V.float()), 1e-6 * truth @ V) < 1e-6  # at any length of the vector
        assert error(F @ (1e6 * V.float()), 1e6 * truth @ V) < 1e-6


@pytest.mark.parametrize("examples", [2, 12])
def test_trap_22_wide_and_tall_operators_have_their_adjoint(examples):
    model, (x, y) = mlp(), twelve()
    for memory in ("2GiB", 700):
        F = fl.Fisher(model, (x[:examples], y[:examples]), likelihood="categorical", memory=memory)
        U = F.scores
        assert (U.rows < U.size) == (examples == 2 or U.rows < 35)
        v, z = noise(F.n_params, 3), noise(U.rows, 3, seed=1)
        assert error(z.T @ U.matmat(v), U.rmatmat(z).T @ v) < 1e-12
        assert error(v.T @ (F @ v), (F @ v).T @ v) < 1e-12
        L = F.to_scipy()
        np.testing.assert_allclose(L.rmatvec(v[:, 0].numpy()), L.matvec(v[:, 0].numpy()), rtol=1e-12)
        assert F.frobenius_norm() == pytest.approx(reference.frobenius_norm(F.dense()), rel=1e-12)


def test_trap_23_labels_are_drawn_once():
    model, data = mlp(), twelve()
    for memory in ("2GiB", 700):
        make = lambda seed, m=memory: fl.Fisher(model, data, likelihood="categorical", kind="mc", seed=seed, memory=m)  # noqa: E731
        F = make(0)
        V, W = noise(35, 4), noise(35, 4, seed=1)
        assert torch.equal(F @ V, F @ V)
        assert error(F @ (V + W), F @ V + F @ W) < 1e-12
        assert error(F @ V, torch.stack([F @ V[:, k] for k in range(4)], 1)) < 1e-12
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(123)
            assert torch.equal(make(0) @ V, F @ V)  # 0 is a seed like any other
        assert error(make(1) @ V, F @ V) > 1e-2


def test_trap_24_the_trace_follows_no_stopping_rule():
    for kind in KINDS:
        F = fl.Fisher(mlp(), twelve(), likelihood="categorical", kind=kind)
        assert F.trace() == pytest.approx(torch.linalg.eigvalsh(F.dense()).sum().item(), rel=1e-12)
        single = fl.Fisher(mlp().float(), (twelve()[0].float(), twelve()[1]), likelihood="categorical", kind=kind)
        assert single.trace() == pytest.approx(F.trace(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trap_26_low_rank_zero_and_repeated_eigenvalues(dtype):
    """Each eigenvalue as often as it is there, the rest below the noise, zeros for zero."""
    model = nn.Linear(6, 3, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.zero_()  # p = 1/3: F = (1/3)(I - 11ᵀ/3) ⊗ E[x xᵀ]
    x = torch.zeros(8, 6, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2] = 2.0, 2.0, 1.0
    F = fl.Fisher(model, (x, torch.zeros(8).long()), likelihood="categorical")
    found = fl.spectrum(F)
    values, seen = found["eigenvalue"].values, found["above_noise"].values
    wanted = np.array([4.0, 4.0, 4.0, 4.0, 1.0, 1.0]) / 3 / 8
    np.testing.assert_allclose(values[:6], wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12)
    assert seen.tolist() == [True] * 6 + [False] * (len(values) - 6)
    zero = fl.spectrum(fl.Fisher(model, (torch.zeros_like(x), torch.zeros(8).long()), likelihood="categorical"))
    assert (zero["eigenvalue"].values == 0).all()
    assert not zero["above_noise"].values.any()


# --- state -----------------------------------------------------------------------------------------------------------


class Restless(list):
    """Batches whose reading draws from every global generator."""

    def __iter__(self):
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002, S311
        return super().__iter__()


@pytest.mark.parametrize("kind", [*KINDS, "hessian"])
@pytest.mark.parametrize("memory", ["2GiB", 700])
def test_trap_28_no_side_effects(kind, memory, unchanged):
    model, (x, y) = mlp(), twelve()
    model[0].weight.requires_grad_(False)
    model[2].bias.grad = torch.ones_like(model[2].bias)
    model.register_forward_hook(lambda module, inputs, output: output + 0)
    model.train()
    x = x.clone().requires_grad_()
    F = None
    v = noise(sum(p.numel() for p in model.parameters() if p.requires_grad))
    with unchanged(model):
        F = fl.Fisher(model, Restless(split((x, y), 7, 5)), likelihood="categorical", kind=kind, memory=memory)
    calls = [
        lambda: F @ v,
        lambda: F @ torch.stack([v] * 5, 1),
        lambda: F.solve(v, 0.1),
        lambda: F.block("2"),
        lambda: F.restrict("2").dense(),
        lambda: F.damped(0.1) @ v,
        lambda: F.to_scipy() @ v.numpy(),
        *(F.diagonal, F.trace, F.frobenius_norm, F.dense, F.gradient),
        *([] if kind == "hessian" else [F.gram, lambda: F.natural_gradient(0.1)]),
        *([] if kind == "hessian" or memory == 700 else [lambda: F.single_sample(0)]),
    ]
    for call in calls:
        with unchanged(model):
            call()
    failures = [
        (lambda: F @ v[1:], InputError),
        (lambda: F @ (v * float("nan")), NonFiniteError),
        (lambda: F.solve(v, 0.0), InputError),
        *([] if kind == "hessian" else [(lambda: F.dense(max_params=3), MemoryBudgetError)]),
        (lambda: fl.Fisher(model, Restless([(x, y[:3])]), likelihood="categorical", kind=kind), InputError),
        (lambda: fl.Fisher(model, Restless([(x, y + 3)]), likelihood="categorical", kind=kind), InputError),
        (lambda: fl.Fisher(model, Restless([(x[:, :2], y)]), likelihood="categorical", kind=kind), InputError),
    ]
    for call, kind_of_error in failures:
        with unchanged(model), pytest.raises(kind_of_error):
            call()
    assert x.grad is None
    assert x.requires_grad


@pytest.mark.parametrize(("memory", "path"), [("1MB", "factors"), (2000, "linearised"), (500, "streamed")])
def test_trap_28_nothing_stays_alive(memory, path):
    """Memory goes with the last reference to it, without waiting for the garbage collector."""
    gc.disable()
    try:
        model = mlp()
        F = fl.Fisher(model, twelve(), likelihood="categorical", memory=memory)
        assert F.plan.layers[0].path == path
        F.gram(), F.solve(noise(35), 0.1), F @ noise(35)
        scores, network = weakref.ref(F.scores), weakref.ref(model)
        del model
        assert (network() is None) == F.plan.kept  # scores are all that is kept, where they are
        del F
        assert scores() is None
        assert network() is None
    finally:
        gc.enable()
