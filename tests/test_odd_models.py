"""Models that take derivatives themselves, view their parameters as something else, or escape the hooks of a layer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import fill
from fisher_checks import error
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fisherlens as fl
from fisherlens import reference

DTYPE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


class Functional(nn.Module):
    """A forward pass that uses ``torch.func``: gradients of an energy, a derivative along a direction, a loop over examples."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.inner, self.outer = how, nn.Linear(3, 4), nn.Linear(4, 3)

    def plain(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).tanh())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "grad":
            return torch.vmap(torch.func.grad(lambda one: self.plain(one).square().sum()))(x)
        if self.how == "jvp":
            outputs, change = torch.func.jvp(self.plain, (x,), (torch.ones_like(x),))
            return outputs + change
        return torch.vmap(self.plain)(x)


class Convolved(nn.Module):
    """A convolution that a loop of ``torch.func`` calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 2, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda one: self.head(self.conv(one[None]).tanh().flatten()))(x)


class Complex(nn.Module):
    """A matrix of complex numbers held as pairs of real ones, behind a parameter of odd length."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.pairs, self.head = (
            nn.Parameter(torch.ones(3)),
            nn.Parameter(torch.ones(3, 2, 2)),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.fft(x + self.shift) @ torch.view_as_complex(self.pairs)
        return self.head(torch.cat([z.real, z.imag], dim=1).tanh())


class Scalar(nn.Module):
    """A parameter without an axis."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.tensor(0.5)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.exp() * self.inner(x).tanh()


def slow_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Twice differentiated, with normalised weights by their formula: the second derivative of torch's kernel is wrong (2.13)."""
    values = {name: value.detach() for name, value in model.named_parameters()}
    flat = torch.cat([value.reshape(-1) for value in values.values()])

    def gradient(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        pieces = at.split([value.numel() for value in values.values()])
        named = {name: piece.clone().reshape(values[name].shape) for name, piece in zip(values, pieces, strict=True)}
        outputs = torch.func.functional_call(model, named, (x,))
        return torch.autograd.grad(nn.functional.cross_entropy(outputs, y), at)[0]

    step = 1e-5
    columns = [
        (gradient(flat + step * e) - gradient(flat - step * e)) / (2 * step) for e in torch.eye(len(flat), dtype=DTYPE)
    ]
    return torch.stack(columns, dim=1)


MODELS = {
    "func.grad": lambda: Functional("grad"),
    "func.jvp": lambda: Functional("jvp"),
    "vmap": lambda: Functional("vmap"),
    "vmap of a convolution": Convolved,
    "complex": Complex,
    "scalar": Scalar,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_fisher_and_hessian(name, unchanged):
    model = fill(MODELS[name]().double(), torch.Generator().manual_seed(0))
    x, y = draw(5, 3), torch.arange(5) % 3
    truth, slow = reference.fisher(model, (x, y), "categorical"), slow_hessian(model, x, y)
    v = draw(len(truth), 4, seed=1)
    with unchanged(model):
        kept = fl.Fisher(model, (x, y), likelihood="categorical")
        streamed = fl.Fisher(model, (x, y), likelihood="categorical", memory=kept.plan.nbytes // 2)
        assert {entry.path for entry in streamed.plan} <= {"streamed", "linearised"}
        for F in (kept, streamed):
            assert error(F @ v, truth @ v) < 1e-10
            assert error(F @ v[:, :1], truth @ v[:, :1]) < 1e-10
        for memory in ("2GiB", 2000):
            H = fl.Fisher(model, (x, y), likelihood="categorical", kind="hessian", memory=memory)
            assert error(H @ v, slow @ v) < 1e-6
            assert error(H @ v[:, :1], slow @ v[:, :1]) < 1e-6
            assert error(H @ v, H.dense() @ v) < 1e-10


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301 - its own pickle
@pytest.mark.parametrize("path", ["linearised", "streamed", "hessian"])
def test_copies_keep_what_graphs_knew(path, way, monkeypatch):
    """A tensor comes out of a copy or a file without its graph, and its derivatives would be zero."""
    monkeypatch.setattr("fisherlens.scores.plan._GRAPHS", 1e9 if path == "streamed" else 1e-9)
    model = fill(Functional("vmap").double(), torch.Generator().manual_seed(0))
    kind, memory = ("hessian", "2GiB") if path == "hessian" else ("exact", 900)
    F = fl.Fisher(model, (draw(6, 3), torch.arange(6) % 3), likelihood="categorical", kind=kind, memory=memory)
    assert {entry.path for entry in F.plan} == {"linearised" if path == "hessian" else path}
    v = draw(F.n_params, 3, seed=1)
    twin = way(F)
    with torch.no_grad():
        model.inner.weight.zero_()
    for some in (v, v[:, :1]):
        assert error(twin @ some, F @ some) < 1e-12
        assert (F @ some).norm() > 0


class Tokens(nn.Module):
    """A dense layer on sequences whose output, a view of what it computed, is written over by the activation."""

    def __init__(self):
        super().__init__()
        self.inner, self.act, self.outer = nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.act(self.inner(x))).mean(1)


@pytest.mark.parametrize("memory", ["2GiB", 2000], ids=["kept", "streamed"])
def test_in_place_activation_behind_a_dense_layer_on_sequences(memory):
    model, x = fill(Tokens().to(DTYPE), torch.Generator().manual_seed(1)), draw(6, 5, 3)
    F = fl.Fisher(model, (x, None), likelihood="categorical", memory=memory, progress=False)
    assert F.plan.kept == (memory == "2GiB")
    dense = reference.fisher(model, (x, torch.zeros(6, dtype=torch.long)), "categorical")
    assert error(F @ torch.eye(F.n_params, dtype=DTYPE), dense) < 1e-12
    if F.plan.kept:  # inputs and outputs of both layers are known, so that they have Kronecker factors
        assert fl.KFAC(F).dense().shape == F.shape
