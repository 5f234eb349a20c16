"""The rest of the zoo: layers and graphs beyond ``cases.py``, the smallest networks that hold them, in every form of input.

``MORE_CASES`` maps a name to a builder as in ``cases.py``. Inputs may be tuples, dicts and indices.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, fill, targets_for
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

MORE_CASES: dict[str, Callable[[], Case]] = {}
DTYPE = torch.float64


def floats(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(*shape, generator=g, dtype=DTYPE)


def words(*shape: int, vocabulary: int = 5) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(vocabulary, shape, generator=g)


def add(name: str, build: Callable[[], nn.Module], draw: Callable[[torch.Generator], Any], likelihood="categorical"):
    """Register a network and the function that draws its inputs; lazy layers of it are shaped by them."""

    def make() -> Case:
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        inputs = draw(generator)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the old weight norm and nested tensors say of themselves
            torch.manual_seed(0)
            model = build().double().eval()
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
            model = fill(model, generator)
        return model, (inputs, targets_for(model, inputs, likelihood, generator)), likelihood

    MORE_CASES[name] = make


def then_dense(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def layers(*make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(m() for m in make), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


# --- dense and convolutions ------------------------------------------------------------------------------------------

add("linear on positions in a plane", layers(lambda: nn.Linear(4, 3)), floats(5, 2, 2, 4))
add(
    "gaussian on every position",
    lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
    floats(4, 2, 3),
    "gaussian",
)
add(
    "bernoulli on every position",
    lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)),
    floats(4, 2, 3),
    "bernoulli",
)

_CONVOLUTIONS = {1: (nn.Conv1d, (8,)), 2: (nn.Conv2d, (6, 5)), 3: (nn.Conv3d, (4, 4, 5))}
for _d, (_conv, _size) in _CONVOLUTIONS.items():
    for _mode, _padding in (
        *(("zeros", 1), ("zeros", "same"), ("zeros", "valid"), ("reflect", 1), ("replicate", 1), ("circular", 1)),
        *([("circular", "same")] if _d == 3 else []),
    ):
        _options = {"groups": 2, "dilation": 2, "stride": 1 if _padding == "same" else 2}
        add(
            f"conv{_d}d {_mode} {_padding}",
            layers(lambda c=_conv, m=_mode, p=_padding, o=_options: c(2, 4, 2, padding=p, padding_mode=m, **o)),
            floats(4, 2, *_size),
        )
_TRANSPOSED = {1: (nn.ConvTranspose1d, (4,)), 2: (nn.ConvTranspose2d, (3, 2)), 3: (nn.ConvTranspose3d, (2, 2, 2))}
for _d, (_conv, _size) in _TRANSPOSED.items():
    add(
        f"transposed conv{_d}d",
        layers(lambda c=_conv: c(2, 4, 2, stride=2, padding=1, output_padding=1, groups=2, dilation=2)),
        floats(4, 2, *_size),
    )

# --- normalisation ---------------------------------------------------------------------------------------------------

add("batchnorm 3d", layers(lambda: nn.Conv3d(2, 3, 2), lambda: nn.BatchNorm3d(3)), floats(4, 2, 3, 3, 2))
add("batchnorm 1d on a line", layers(lambda: nn.BatchNorm1d(2), lambda: nn.Conv1d(2, 3, 2)), floats(4, 2, 4))
add(
    "layer norm over three axes",
    layers(lambda: nn.Conv2d(2, 3, 2), lambda: nn.LayerNorm((3, 2, 2))),
    floats(4, 2, 3, 3),
)
add("layer norm without bias", layers(lambda: nn.Linear(3, 4), lambda: nn.LayerNorm(4, bias=False)), floats(4, 2, 3))
add(
    "group norm without affine",
    layers(lambda: nn.Conv1d(2, 4, 2), lambda: nn.GroupNorm(2, 4, affine=False)),
    floats(4, 2, 4),
)
add("rms norm", layers(lambda: nn.Linear(3, 4), lambda: nn.RMSNorm(4)), floats(4, 2, 3))
add(
    "instance norm 2d",
    layers(lambda: nn.Conv2d(2, 3, 2), lambda: nn.InstanceNorm2d(3, affine=True)),
    floats(4, 2, 4, 4),
)
add(
    "instance norm 3d with statistics",
    layers(lambda: nn.InstanceNorm3d(2, affine=True, track_running_stats=True)),
    floats(4, 2, 2, 3, 2),
)

# --- tables ----------------------------------------------------------------------------------------------------------


class Mean(nn.Module):
    """The mean over all positions of what a table gives."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2).mean(1)


class FunctionalTable(nn.Module):
    """A sparse look-up in a parameter of the module's own."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Parameter(torch.ones(5, 3)), nn.Linear(3, 3)
        self.sparse = True

    def forward(self, index: Tensor) -> Tensor:
        return self.head(nn.functional.embedding(index, self.table, padding_idx=-1, sparse=self.sparse).mean(1))


class TiedTable(nn.Module):
    """Embedding and output layer share one tensor."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(index).mean(1))))


def _table(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Embedding(5, 3, **options), Mean(), nn.Tanh(), nn.Linear(3, 3))


def _bag(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.EmbeddingBag(5, 3, **options), nn.Tanh(), nn.Linear(3, 3))


add("embedding with padding", _table(padding_idx=1), words(6, 4))
add("embedding on a plane", _table(padding_idx=-1), words(6, 2, 3))
add("sparse embedding", _table(sparse=True), words(6, 3))
add("functional sparse embedding", FunctionalTable, words(6, 3))
add("tied embedding", TiedTable, words(6, 3))
add("embedding bag, sum", _bag(mode="sum"), words(6, 3))
add("embedding bag, mean of what is no padding", _bag(mode="mean", padding_idx=0), words(6, 3))
add("embedding bag, sparse", _bag(mode="mean", sparse=True), words(6, 3))
add("embedding bag, max", _bag(mode="max"), words(6, 3))

# --- other parameters ------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """Parameters of the root: a factor, a matrix used as it stands, and an integer one that nothing learns."""

    def __init__(self, shape: tuple[int, ...] = ()):
        super().__init__()
        self.scale, self.matrix = nn.Parameter(torch.full(shape, 0.7)), nn.Parameter(torch.ones(4, 3))
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.exp() * torch.tanh(x @ self.matrix) + self.steps


class Borrowed(nn.Module):
    """A layer's weight used once by the layer and once by a function."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) + nn.functional.linear(x.flip(1), self.first.weight))


class Unwrapped(nn.Module):
    """A layer with two inputs."""

    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(3, 2, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.both(a, b)


def _old_weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))


add("factor and matrix of the root", Scaled, floats(5, 4))
add("borrowed weight", Borrowed, floats(5, 4))
add("bilinear", Unwrapped, lambda g: (floats(5, 3)(g), floats(5, 2)(g)))
add("prelu", lambda: nn.Sequential(nn.Linear(4, 3), nn.PReLU(3), nn.Linear(3, 3), nn.PReLU()), floats(5, 4))
add("prelu on maps", layers(lambda: nn.Conv2d(1, 2, 2), lambda: nn.PReLU(2)), floats(5, 1, 3, 3))
add("weight norm", lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 3))), floats(5, 4))
add("weight norm of a convolution", layers(lambda: parametrizations.weight_norm(nn.Conv1d(2, 3, 2))), floats(4, 2, 4))
add("weight norm by hooks", _old_weight_norm, floats(5, 4))
add("spectral norm", lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))), floats(5, 4))
add("orthogonal", lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3))), floats(5, 3))
add("pruned", lambda: nn.Sequential(prune.random_unstructured(nn.Linear(4, 3), "weight", 0.3)), floats(5, 4))

# --- attention, recurrence, scans ------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, batch_first: bool):
        super().__init__()
        self.inner, self.head = nn.MultiheadAttention(4, 2, batch_first=batch_first), nn.Linear(4, 3)
        self.axis = 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.axis else x.transpose(0, 1)
        return self.head(self.inner(x, x, x, need_weights=False)[0].mean(self.axis))


class Encoder(nn.Module):
    """A transformer layer, whose evaluation has a fused path without gradients."""

    def __init__(self, batch_first: bool, **options: Any):
        super().__init__()
        self.inner = nn.TransformerEncoderLayer(4, 2, 3, batch_first=batch_first, **options)
        self.head, self.axis = nn.Linear(4, 3), 1 if batch_first else 0

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = x if self.axis else x.transpose(0, 1)
        return self.head(self.inner(x, src_key_padding_mask=padding).select(self.axis, 0))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module], **options: Any):
        super().__init__()
        self.inner, self.head = kind(2, 2, batch_first=True, **options), nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x)[0][:, -1])


class Packed(Recurrent):
    """Sequences of several lengths, which torch sorts inside."""

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        sequence = nn.utils.rnn.pack_padded_sequence(x, length.cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.inner(sequence)[1][-1])


class Cells(nn.Module):
    """A cell in a Python loop."""

    def __init__(self, kind: type[nn.Module]):
        super().__init__()
        self.cell, self.head = kind(2, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class Scan(nn.Module):
    """Dense layers in a Python loop, shared by all steps."""

    def __init__(self):
        super().__init__()
        self.read, self.keep, self.head = nn.Linear(2, 3), nn.Linear(3, 3, bias=False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 3)
        for step in x.unbind(1):
            state = torch.tanh(self.read(step) + self.keep(state))
        return self.head(state)


add("attention", lambda: Attention(True), floats(4, 3, 4))
add("attention, sequence first", lambda: Attention(False), floats(4, 3, 4))
add("transformer layer", lambda: Encoder(True), floats(4, 3, 4))
add("transformer layer, sequence first", lambda: Encoder(False, norm_first=True), floats(4, 3, 4))
add(
    "transformer layer with padding",
    lambda: Encoder(True, activation="gelu"),
    lambda g: (floats(4, 3, 4)(g), torch.arange(3) >= torch.tensor([[3], [2], [1], [2]])),
)
add("lstm, two layers, both ways", lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), floats(4, 3, 2))
add("lstm with projection", lambda: Recurrent(nn.LSTM, proj_size=1), floats(4, 3, 2))
add("gru, two layers, both ways", lambda: Recurrent(nn.GRU, num_layers=2, bidirectional=True), floats(4, 3, 2))
add("rnn", lambda: Recurrent(nn.RNN, nonlinearity="relu"), floats(4, 3, 2))
add("gru on packed sequences", lambda: Packed(nn.GRU), lambda g: (floats(4, 3, 2)(g), torch.tensor([2, 3, 1, 3])))
add("lstm cell", lambda: Cells(nn.LSTMCell), floats(4, 3, 2))
add("gru cell", lambda: Cells(nn.GRUCell), floats(4, 3, 2))
add("scan", Scan, floats(4, 3, 2))

# --- graphs that torch differentiates in one way only ----------------------------------------------------------------


class Cube(torch.autograd.Function):
    """x³; its backward hides from a second differentiation what it depends on."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g.detach()


class CubeOnce(Cube):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Between(nn.Module):
    """A function between two dense layers, where it stands in the way of some derivatives."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first, x))


def _without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        frozen = torch.tanh(layer(x))
    return frozen + 0.1 * layer(x.flip(1))


class Mixture(nn.Module):
    """Each example goes to one of two experts, as its gate says."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 2), nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        chosen, out = share.argmax(-1), x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            mine = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, mine, expert(x[mine]) * share[mine, k : k + 1])
        return out


add("function with a hidden backward", lambda: Between(lambda a, x: Cube.apply(a(x))), floats(5, 4))
add("function differentiable once", lambda: Between(lambda a, x: CubeOnce.apply(a(x))), floats(5, 4))
add("forward without gradient", lambda: Between(_without_gradient), floats(5, 4))
add("data cut from its graph", lambda: Between(lambda a, x: torch.tanh(a(x)).data + 0.1 * a(x.flip(1))), floats(5, 4))
add("straight through", lambda: Between(lambda a, x: a(x) + (a(x).round() - a(x)).detach()), floats(5, 4))
add(
    "checkpoint",
    lambda: Between(lambda a, x: checkpoint(lambda z: torch.tanh(a(z)), x, use_reentrant=False)),
    floats(5, 4),
)
add("mixture of experts", Mixture, floats(6, 4))
