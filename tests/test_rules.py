"""Networks in which a layer's input and output do not explain its parameters: the rows must be exact all the same.

The truth here is plain automatic differentiation of the user's own model, one example at a time; it shares nothing with
the capture, and no ``functional_call`` either.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import fill
from fisher_checks import drawn_labels
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import fisherlens as fl
from fisherlens import reference

DTYPE = torch.float64


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def data(n: int = 12, shape: tuple[int, ...] = (4, 6)) -> tuple[Tensor, Tensor]:
    g = generator(n)
    return torch.randn(n, *shape, generator=g, dtype=DTYPE), torch.randint(3, (n,), generator=g)


def empirical(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(1/N) Σ_n g_n g_nᵀ with the gradient of each example's loss, one backward pass each."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for n in range(len(x)):
        loss = nn.functional.cross_entropy(model(x[n : n + 1]), y[n : n + 1])
        grads = torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    rows = torch.stack(rows)
    return rows.T @ rows / len(rows)


def error(found: Tensor, truth: Tensor) -> float:
    assert truth.norm() > 0
    return ((found - truth).norm() / truth.norm()).item()


class Two(nn.Module):
    """Two dense layers ``a`` and ``b``; what happens in between is the subclass's."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 3)


class SequenceFirst(Two):
    """The dense layer sees (S, N, d)."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1))).mean(0))


class Reversed(Two):
    """The dense layer sees the examples in another order; its summed gradient is right all the same."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x[:, 0].flip(0))).flip(0))


class Sorted(Two):
    """The order depends on the data, as with packed sequences."""

    def forward(self, x):
        order = x[:, 0, 0].argsort()
        return self.b(torch.tanh(self.a(x[order, 0]))[order.argsort()])


class Table(Two):
    """One layer reads a table that all examples share."""

    def __init__(self, length: int):
        super().__init__()
        self.register_buffer("table", torch.randn(length, 6, generator=generator(), dtype=DTYPE))
        self.c = nn.Linear(6, 5)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x[:, 0]) + self.c(self.table).sum(0)))


class Routed(Two):
    """Two experts, each of which sees some of the examples."""

    def __init__(self, border: float = 0.0):
        super().__init__()
        self.c, self.border = nn.Linear(6, 5), border

    def forward(self, x):
        x = x[:, 0]
        high = x[:, 0] > self.border
        h = torch.zeros(len(x), 5, dtype=x.dtype).index_put((high,), self.a(x[high]))
        return self.b(torch.tanh(h.index_put((~high,), self.c(x[~high]))))


class Conditional(Two):
    """A second layer that is called only if some example asks for it, and then adds to those that do."""

    def __init__(self, border: float):
        super().__init__()
        self.c, self.border = nn.Linear(6, 5), border

    def forward(self, x):
        high = (x[:, 0, 0] > self.border).to(x.dtype)[:, None]
        h = self.a(x[:, 1])
        if high.any():
            h = h + high * self.c(x[:, 2])
        return self.b(torch.tanh(h))


class Functional(Two):
    """A weight used by itself beside its module."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x[:, 0])) + 0.3 * x[:, 1] @ self.a.weight.T)


class Detached(Two):
    """Calls whose result is thrown away or detached must add nothing."""

    def forward(self, x):
        self.a(x[:, 2])
        return self.b(torch.tanh(self.a(x[:, 0])) + self.a(x[:, 1]).detach())


class Checkpointed(Two):
    def forward(self, x):
        return self.b(checkpoint(lambda z: torch.tanh(self.a(z)), x[:, 0], use_reentrant=False))


class InPlace(Two):
    """In-place changes of a layer's output."""

    def forward(self, x):
        h = self.a(x[:, 0])
        h += 1
        h.mul_(2)
        return self.b(h.tanh_())


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.cell, self.head = kind(6, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Transformer(nn.Module):
    def __init__(self, batch_first: bool):
        super().__init__()
        self.body = nn.TransformerEncoderLayer(6, 2, 7, batch_first=batch_first)
        self.head, self.batch_first = nn.Linear(6, 3), batch_first

    def forward(self, x):
        return self.head(self.body(x).mean(1) if self.batch_first else self.body(x.transpose(0, 1)).mean(0))


def with_own_parameter() -> nn.Module:
    layer = nn.Linear(6, 3)
    layer.register_parameter("gain", nn.Parameter(torch.ones(2)))
    return nn.Sequential(layer)


def conv_with_own_parameter() -> nn.Module:
    layer = nn.Conv1d(4, 3, 6)
    layer.register_parameter("gain", nn.Parameter(torch.ones(2)))
    return nn.Sequential(layer, nn.Flatten())


def bias_before_weight() -> nn.Module:
    layer = parametrizations.weight_norm(nn.Linear(6, 3))
    parametrize.remove_parametrizations(layer, "weight")
    assert [name for name, _ in layer.named_parameters()] == ["bias", "weight"]
    return nn.Sequential(layer)


def pruned() -> nn.Module:
    layer = prune.random_unstructured(nn.Linear(6, 3), "weight", 0.3)
    return nn.Sequential(layer)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 3)))


def with_hooks() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return model


POSITIONS = {  # (N, 4, 6) inputs
    "sequence first": SequenceFirst,
    "reversed": Reversed,
    "sorted": Sorted,
    "table of one": lambda: Table(1),
    "table as long as the sample": lambda: Table(8),
    "table as long as the data": lambda: Table(12),
    "longer table": lambda: Table(24),
    "routed": Routed,
    "all to one expert": lambda: Routed(-9.0),
    "functional use": Functional,
    "detached": Detached,
    "checkpointed": Checkpointed,
    "in place": InPlace,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "attention": lambda: Transformer(True),
    "attention, sequence first": lambda: Transformer(False),
    "convolution with a parameter of its own": conv_with_own_parameter,
    "instance norm": lambda: nn.Sequential(
        nn.Conv1d(4, 3, 2), nn.InstanceNorm1d(3, affine=True), nn.Flatten(), nn.Linear(15, 3)
    ),
    "transposed convolution": lambda: nn.Sequential(nn.ConvTranspose1d(4, 2, 2), nn.Flatten(), nn.Linear(14, 3)),
}
PLAIN = {  # (N, 6) inputs
    "dense with a parameter of its own": with_own_parameter,
    "bias before weight": bias_before_weight,
    "pruned": pruned,
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 3))),
    "weight norm by hooks": old_weight_norm,
    "user's hooks": with_hooks,
    "learned slope": lambda: nn.Sequential(nn.Linear(6, 4), nn.PReLU(4), nn.Linear(4, 3)),
}
NETWORKS = {**{name: (build, (4, 6)) for name, build in POSITIONS.items()}, **{k: (b, (6,)) for k, b in PLAIN.items()}}


def network(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    build, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
    return fill(model, generator(1)), *data(shape=shape)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_are_exact_where_no_rule_holds(name, unchanged):
    model, x, y = network(name)
    truth = empirical(model, x, y)
    F = fl.Fisher(model, (x, y), likelihood="categorical", kind="empirical")
    assert F.n_params == sum(p.numel() for p in model.parameters())
    assert error(F.dense(), truth) < 1e-12
    assert error(F @ torch.eye(F.n_params, dtype=DTYPE), truth) < 1e-12
    assert error(F.gradient(), reference.gradient(model, (x, y), "categorical")) < 1e-10
    batches = [(x[:1], y[:1]), (x[1:6], y[1:6]), (x[6:], y[6:])]
    assert error(fl.Fisher(model, batches, likelihood="categorical", kind="empirical").dense(), truth) < 1e-12


def test_the_rule_is_used_where_it_holds():
    for name in ("detached", "checkpointed", "in place"):
        model, x, y = network(name)
        plan = fl.Fisher(model, (x, y), likelihood="categorical").plan
        assert {entry.storage for entry in plan} <= {"factors", "rows"}, name
    for name in ("reversed", "functional use", "sequence first"):
        model, x, y = network(name)
        plan = fl.Fisher(model, (x, y), likelihood="categorical").plan
        assert plan["a"].storage == "per example"
        assert plan["b"].storage == "factors", name


@pytest.mark.parametrize("kind", ["exact", "empirical"])
def test_layer_first_called_after_the_sample(kind):
    """The sample does not call the layer at all, so that its scores would be taken for zero."""
    x, y = data(20)
    order = x[:, 0, 0].argsort()
    x, y = x[order], y[order]
    model = fill(Conditional(x[15, 0, 0].item()).double().eval(), generator(3))
    truth = reference.fisher(model, (x, y), "categorical", kind)
    batches = list(zip(x.split(5), y.split(5), strict=True))
    assert error(fl.Fisher(model, batches, likelihood="categorical", kind=kind).dense(), truth) < 1e-12
    assert error(fl.Fisher(model, (x, y), likelihood="categorical", kind=kind).dense(), truth) < 1e-12


def test_expert_first_called_after_the_sample():
    x, y = data(20)
    order = x[:, 0, 0].argsort()
    x, y = x[order], y[order]
    model = fill(Routed(x[14, 0, 0].item()).double().eval(), generator(3))
    truth = empirical(model, x, y)
    assert error(fl.Fisher(model, (x, y), likelihood="categorical", kind="empirical").dense(), truth) < 1e-12


@pytest.mark.parametrize(
    "build", [SequenceFirst, lambda: Recurrent(nn.GRU), lambda: Pooled()], ids=["first", "gru", "pooled"]
)
def test_sequences_of_other_lengths_in_later_batches(build):
    with torch.random.fork_rng(devices=[]):
        model = fill(build().double().eval(), generator(4))
    batches = [(x, y) for n, length in ((4, 3), (3, 5), (5, 2)) for x, y in [data(n, (length, 6))]]
    truth = sum(empirical(model, x, y) * len(x) for x, y in batches) / 12
    found = fl.Fisher(model, batches, likelihood="categorical", kind="empirical")
    assert error(found.dense(), truth) < 1e-12


class Pooled(Two):
    """A dense layer on positions, then their mean: the rule holds for any length."""

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)).mean(1))


class Late(Two):
    """The weight of a layer serves by itself too, for examples of a kind that the sample does not show."""

    def __init__(self, border: float, use):
        super().__init__()
        self.border, self.use = border, use

    def forward(self, x):
        h = self.a(x[:, 1])
        high = (x[:, 0, 0] > self.border).to(x.dtype)[:, None]
        return self.b(torch.tanh(h + high * self.use(self.a, x[:, 2]) if high.any() else h))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", ["exact", "exact without labels", "mc", "empirical"])
def test_weight_used_by_itself_after_the_sample(kind, dtype):
    """Scores that do not add up to the gradient of the whole data are taken once more, one gradient per example."""
    kind, labelled = kind.split()[0], "without" not in kind
    x, y = data(20)
    x = x[x[:, 0, 0].argsort()]
    model = fill(Late(x[15, 0, 0].item(), lambda a, z: z @ a.weight.T).double().eval(), generator(3))
    labels = drawn_labels(model, (x, y), "categorical", draws=1, seed=0)
    truth = reference.fisher(model, (x, y), "categorical", kind, labels=labels)
    batches = [(a, b if labelled else None) for a, b in zip(x.to(dtype).split(5), y.split(5), strict=True)]
    F = fl.Fisher(model.to(dtype), batches, likelihood="categorical", kind=kind)
    assert F.plan["a"].storage == "per example"
    assert F.plan["b"].storage == "factors"
    assert error(F.dense(), truth) < (1e-12 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("kind", ["exact", "mc", "empirical"])
def test_sorting_model_on_a_sorted_sample(kind):
    """Where the first examples come sorted, sorting them shows only in another order."""
    x, y = data(20)
    x = torch.cat([x[:8][x[:8, 0, 0].argsort()], x[8:]])
    model = fill(Sorted().double().eval(), generator(3))
    labels = drawn_labels(model, (x, y), "categorical", draws=1, seed=0)
    F = fl.Fisher(model, (x, y), likelihood="categorical", kind=kind)
    assert F.plan["a"].storage == "per example"
    assert error(F.dense(), reference.fisher(model, (x, y), "categorical", kind, labels=labels)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rules_hold_where_the_gradient_vanishes(dtype):
    """At a minimum the gradient is rounding, and so is its distance from that of the scores: no reason to leave a rule."""
    x, y = data(40, (6,))
    model = nn.Linear(6, 3).double()
    targets = torch.nn.functional.one_hot(y, 3).double()
    padded = torch.cat([x, torch.ones(40, 1, dtype=DTYPE)], 1)
    best = torch.linalg.lstsq(padded, targets).solution
    with torch.no_grad():
        model.weight.copy_(best[:6].T)
        model.bias.copy_(best[6])
    inputs = (x.to(dtype), targets.to(dtype))
    for kind in ("exact", "empirical", "mc"):
        F = fl.Fisher(model.to(dtype), inputs, likelihood="gaussian", kind=kind)
        assert F.gradient().norm() < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-1}[dtype]
        assert F.plan["(root)"].storage == "factors"
        model = model.double()
