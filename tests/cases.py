"""A zoo of tiny networks with data: every layer, option and likelihood that the fast code must get right.

``ALL_CASES`` maps a name to a builder; calling it gives ``(model, (inputs, targets), likelihood)``, always the same numbers,
in float64 and evaluation mode, and does not touch the global generator. ``EXTRA_CASES`` are networks that only general
methods take: layers without a rule of their own, parameters outside layers, several inputs.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Any, Tensor], str]

ALL_CASES: dict[str, Callable[[], Case]] = {}
EXTRA_CASES: dict[str, Callable[[], Case]] = {}


def fill(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Set every parameter and buffer from a generator, so that nothing is zero, one, or otherwise special."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.ndim > 1:
                parameter.copy_(1.3 * noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.4 * noise + (1.0 if _is_scale(model, name) else 0.0))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.5 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
            elif name.endswith("running_var"):
                buffer.copy_(0.5 + 1.5 * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)
    return model


def _is_scale(model: nn.Module, name: str) -> bool:
    return name.endswith("weight") and "Norm" in type(model.get_submodule(name.rpartition(".")[0])).__name__


def make_case(
    name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], likelihood: str = "categorical", n: int = 6
) -> Case:
    """Build a network, fill it, and draw inputs ``(n, *shape)`` and targets that fit its outputs."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.random.fork_rng(devices=[]):  # constructors initialise from the global generator
        model = fill(build().double(), generator).eval()
    inputs = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    return model, (inputs, targets_for(model, inputs, likelihood, generator)), likelihood


def targets_for(model: nn.Module, inputs: Any, likelihood: str, generator: torch.Generator) -> Tensor:
    """Random targets of the shape and dtype that a likelihood wants for the outputs of a model."""
    with torch.no_grad():
        outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    if likelihood == "categorical":
        return torch.randint(outputs.shape[1], (len(outputs), *outputs.shape[2:]), generator=generator)
    if likelihood == "bernoulli":
        return torch.randint(2, outputs.shape, generator=generator).double()
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64)


def cast(case: Case, dtype: torch.dtype) -> Case:
    """The same case in another floating-point dtype, as a copy."""
    model, (inputs, targets), likelihood = case
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    return model.to(dtype), (inputs.to(dtype), targets), likelihood


def _case(
    shape: tuple[int, ...], likelihood: str = "categorical", n: int = 6, zoo: dict[str, Callable[[], Case]] = ALL_CASES
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Register a function that builds a network as a case of its own name."""

    def register(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        zoo[build.__name__] = lambda: make_case(build.__name__, build, shape, likelihood, n)
        return build

    return register


# --- dense -----------------------------------------------------------------------------------------------------------


@_case((4,), n=7)
def softmax_regression():
    return nn.Linear(4, 3)


@_case((1,), n=9)
def fewer_parameters_than_examples():
    return nn.Linear(1, 2)


@_case((5,), n=7)
def mlp_tanh():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


@_case((5,))
def mlp_no_bias():
    return nn.Sequential(nn.Linear(5, 6, bias=False), nn.Sigmoid(), nn.Linear(6, 3, bias=False))


@_case((4,))
def mlp_smooth_activations():
    return nn.Sequential(
        *(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 4), nn.Softplus(), nn.Linear(4, 3))
    )


@_case((4,))
def mlp_inplace_relu():
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 6), nn.LeakyReLU(0.2, inplace=True), nn.Linear(6, 3)
    )


@_case((4,))
def frozen_first_layer():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    return model


@_case((3, 4))
def dense_on_positions():
    """A dense layer applied at three positions of each example."""
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3))


@_case((3,), "bernoulli", n=8)
def bernoulli_two_outputs():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


@_case((3,), "bernoulli", n=8)
def bernoulli_one_output():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


@_case((3,), "gaussian", n=8)
def gaussian_linear():
    return nn.Linear(3, 2)


@_case((3,), "gaussian", n=5)
def gaussian_three_outputs():
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))


# --- convolutions ----------------------------------------------------------------------------------------------------


def _then_dense(conv: nn.Module, features: int, outputs: int = 3) -> nn.Module:
    return nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(features, outputs))


@_case((2, 7, 6), n=5)
def conv_stride():
    return _then_dense(nn.Conv2d(2, 3, 3, stride=(2, 3)), 3 * 3 * 2)


@_case((2, 4, 4), n=5)
def conv_padding():
    return _then_dense(nn.Conv2d(2, 2, 3, padding=1), 2 * 16)


@_case((2, 7, 7), n=5)
def conv_dilation():
    return _then_dense(nn.Conv2d(2, 3, 3, dilation=2, stride=2, padding=1), 3 * 9)


@_case((4, 4, 4), n=5)
def conv_groups():
    return _then_dense(nn.Conv2d(4, 6, 3, groups=2), 6 * 4)


@_case((3, 5, 5), n=5)
def conv_depthwise():
    return _then_dense(nn.Conv2d(3, 6, 3, groups=3, padding=1, stride=2), 6 * 9)


@_case((2, 4, 4), n=5)
def conv_no_bias():
    return nn.Sequential(nn.Conv2d(2, 4, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3, bias=False))


@_case((2, 5, 6), n=5)
def conv_rectangular():
    return _then_dense(nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(1, 0)), 3 * 5 * 3)


@_case((3, 3, 3), n=5)
def conv_one_by_one():
    return _then_dense(nn.Conv2d(3, 4, 1), 4 * 9)


@_case((2, 3, 3), n=5)
def conv_one_position():
    """The kernel covers the whole map, so that T = 1."""
    return _then_dense(nn.Conv2d(2, 5, 3), 5)


@_case((2, 4, 5), n=5)
def conv_same():
    """Even kernels: "same" pads one side more than the other."""
    return _then_dense(nn.Conv2d(2, 2, (2, 4), padding="same"), 2 * 20)


@_case((2, 6, 5), n=5)
def conv_same_dilated():
    return _then_dense(nn.Conv2d(2, 2, (3, 2), padding="same", dilation=(2, 3)), 2 * 30)


@_case((2, 4, 4), n=5)
def conv_valid():
    return _then_dense(nn.Conv2d(2, 3, 3, padding="valid"), 3 * 4)


@_case((2, 4, 4), n=5)
def conv_circular():
    return _then_dense(nn.Conv2d(2, 2, 3, padding=(1, 2), padding_mode="circular"), 2 * 4 * 6)


@_case((2, 4, 4), n=5)
def conv_circular_same():
    return _then_dense(nn.Conv2d(2, 2, (2, 3), padding="same", padding_mode="circular"), 2 * 16)


@_case((2, 4, 4), n=5)
def conv_reflect():
    return _then_dense(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), 2 * 16)


@_case((2, 4, 4), n=5)
def conv_replicate():
    return _then_dense(nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate", stride=2), 2 * 4)


@_case((4, 5, 5), n=5)
def conv_everything():
    """Groups, dilation, stride, one-sided sizes and padding at once, without a bias."""
    conv = nn.Conv2d(4, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2, bias=False)
    return _then_dense(conv, 4 * 4 * 5)


@_case((2, 8), n=5)
def conv_1d():
    return _then_dense(nn.Conv1d(2, 4, 3, stride=2, padding=1), 4 * 4)


@_case((2, 3, 3, 3), n=5)
def conv_3d():
    return _then_dense(nn.Conv3d(2, 3, 2, padding=(0, 1, 0)), 3 * 2 * 4 * 2)


@_case((1, 8, 8), n=5)
def lenet():
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)),
    )


@_case((2, 4, 4), n=5)
def segmentation():
    """One label per position: outputs (N, C, 3, 3), nine terms per example."""
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, 1))


@_case((2, 4, 4), "gaussian", n=5)
def gaussian_image():
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2, padding=1))


@_case((1, 4, 4), "bernoulli", n=5)
def bernoulli_image():
    return nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, stride=2), nn.Tanh(), nn.Conv2d(3, 1, 1))


# --- normalisation and pooling ---------------------------------------------------------------------------------------


@_case((2, 5, 5), n=5)
def batchnorm_2d():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
    )


@_case((2, 5, 5), n=5)
def batchnorm_2d_fixed():
    """Batch normalisation without parameters: a fixed affine map."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.MaxPool2d(3)),
        *(nn.Flatten(), nn.Linear(4, 3)),
    )


@_case((2, 4, 4), n=5)
def batchnorm_first():
    return nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3))


@_case((4,), n=7)
def batchnorm_1d():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3))


@_case((4,))
def layer_norm():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))


@_case((2, 4, 4), n=5)
def group_norm():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))


@_case((2, 5, 5), n=5)
def average_pool():
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.AvgPool2d(2, padding=1), nn.Flatten(), nn.Linear(27, 3))


@_case((2, 6, 6), n=5)
def max_pool():
    """Overlapping windows, so that one position may be the largest of several."""
    return nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(3, stride=1), nn.Flatten(), nn.Linear(27, 3))


@_case((2, 5, 6), n=5)
def adaptive_pool():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 2), nn.Tanh(), nn.AdaptiveMaxPool2d((3, 2)), nn.Conv2d(4, 5, 2), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(5, 3)),
    )


@_case((2, 4, 4), n=5)
def conv_inplace_relu():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 3)),
        *(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(12, 3)),
    )


# --- graphs ----------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with a shortcut, then a dense layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.shortcut = nn.Conv2d(3, 3, 1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.inner(x) + self.shortcut(x)
        return self.head(x.mean((2, 3)))


@_case((1, 4, 4), n=5)
def residual():
    return Residual()


class UsedTwice(nn.Module):
    """One dense layer applied twice in a row, between two others."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.shared(torch.tanh(self.shared(x))))
        return self.last(x)


@_case((3,))
def module_used_twice():
    return UsedTwice()


class ConvUsedTwice(nn.Module):
    """One convolution applied to maps of two sizes."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 2, 3), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(torch.tanh(self.conv(x)))).mean((2, 3)))


@_case((2, 6, 6), n=5)
def conv_used_twice():
    return ConvUsedTwice()


# --- networks for general methods only -------------------------------------------------------------------------------


class RootParameter(nn.Module):
    """Parameters that belong to no known layer, one of them unused."""

    def __init__(self):
        super().__init__()
        self.scale, self.unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.fc(x))


@_case((4,), zoo=EXTRA_CASES)
def root_parameter():
    return RootParameter()


class Tied(nn.Module):
    """Two names for one weight, used in both orientations."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


@_case((4,), "gaussian", zoo=EXTRA_CASES)
def tied_weights():
    return Tied()


class LastOfLSTM(nn.Module):
    """A recurrent layer, read at the last step."""

    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


@_case((4, 2), zoo=EXTRA_CASES)
def lstm():
    return LastOfLSTM()


@_case((3,), zoo=EXTRA_CASES)
def one_class():
    """A softmax over a single class, which tells nothing: F = 0."""
    return nn.Linear(3, 1)


class TwoInputs(nn.Module):
    """A bilinear network of two inputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) * self.right(b)


def two_inputs() -> Case:
    generator = torch.Generator().manual_seed(2)
    with torch.random.fork_rng(devices=[]):
        model = fill(TwoInputs().double(), generator).eval()
    inputs = tuple(torch.randn(6, size, generator=generator, dtype=torch.float64) for size in (3, 2))
    return model, (inputs, targets_for(model, inputs, "categorical", generator)), "categorical"


EXTRA_CASES["two_inputs"] = two_inputs
