"""More layers, likelihoods and forms of data beside libraries that nobody here wrote, wherever one of them takes them."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from cases import ALL_CASES, fill
from cases_more import MORE_CASES
from fisher_checks import QUIET, error
from test_peers import curvlinops_matrix, default_dtype, nngeometry_matrix
from test_traps import mlp, noise, split, twelve
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherlens as fl

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings(QUIET),
    # what the peers' own code and imports warn about
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOLERANCE = 1e-10
ZOO = {**ALL_CASES, **MORE_CASES}
LOSSES = {"categorical": nn.CrossEntropyLoss, "bernoulli": nn.BCEWithLogitsLoss, "gaussian": nn.MSELoss}

# --- curvlinops: anything that torch.func differentiates ---------------------------------------------------------------

CURVLINOPS = [
    *("linear on positions in a plane", "conv2d reflect 1", "conv3d circular same", "conv1d replicate 1"),
    *("transposed conv1d", "transposed conv2d", "transposed conv3d", "batchnorm 3d", "batchnorm 1d on a line"),
    *("layer norm over three axes", "layer norm without bias", "rms norm", "instance norm 2d"),
    *("instance norm 3d with statistics", "embedding on a plane", "tied embedding", "factor and matrix of the root"),
    *("borrowed weight", "prelu", "spectral norm", "pruned", "attention", "transformer layer"),
    *("lstm, two layers, both ways", "gru cell", "rnn", "scan", "conv_everything", "conv_reflect", "conv_replicate"),
]


def without_fused_path(model: nn.Module) -> None:
    """Attention in evaluation mode takes a path that the peer cannot differentiate; in training mode without dropout it does not."""
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0


@pytest.mark.parametrize("name", CURVLINOPS)
def test_curvlinops_ggn(name):
    if name == "embedding on a plane":  # their forward mode goes through padding, which no gradient reaches
        build = ALL_CASES["softmax_regression"]
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(18, 3)).double()
        model, (x, y) = fill(model, torch.Generator().manual_seed(0)), (ZOO[name]()[1][0], build()[1][1][:6])
    else:
        model, (x, y), likelihood = ZOO[name]()
        assert likelihood == "categorical"
        without_fused_path(model)
    with sdpa_kernel(SDPBackend.MATH):
        peer = curvlinops_matrix("GGNLinearOperator", model, nn.CrossEntropyLoss(), [(x, y)])
    for memory in ("2GiB", fl.Fisher(model, (x, y), likelihood="categorical").plan.nbytes // 3):
        F = fl.Fisher(model, (x, y), likelihood="categorical", memory=memory)
        assert error(F @ torch.eye(F.n_params, dtype=F.dtype), peer) < TOLERANCE


@pytest.mark.parametrize("name", ["gaussian on every position", "bernoulli on every position"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_curvlinops_trailing_shapes(name, reduction):
    model, (x, y), likelihood = ZOO[name]()
    F = fl.Fisher(model, (x, y), likelihood=likelihood)
    factor = {"mean": 1 / y[0].numel(), "sum": len(y)}[reduction] * (2 if likelihood == "gaussian" else 1)
    peer = curvlinops_matrix("GGNLinearOperator", model, LOSSES[likelihood](reduction=reduction), [(x, y)])
    assert error(factor * F.dense(), peer) < TOLERANCE


def test_curvlinops_ignored_labels():
    """The sum over what is kept; the mean of the peer, over one batch, divides by the number kept as ours does."""
    model, (x, y), _ = ZOO["segmentation"]()
    y = y.clone()
    y[0, 0], y[3] = -100, -100
    F = fl.Fisher(model, (x, y), likelihood="categorical")
    peer = curvlinops_matrix("GGNLinearOperator", model, nn.CrossEntropyLoss(reduction="sum"), [(x, y)])
    assert F.total_weight == (y != -100).sum()
    assert error(F.total_weight * F.dense(), peer) < TOLERANCE


def test_curvlinops_gaussian_variance():
    """A variance scales the squared error."""
    model, (x, y), _ = ZOO["gaussian_three_outputs"]()
    for variance in (0.3, [0.2, 1.0, 5.0]):
        root = torch.as_tensor(variance, dtype=x.dtype).sqrt()
        scaled = nn.Sequential(model, Scaled(1 / root))
        peer = curvlinops_matrix("GGNLinearOperator", scaled, nn.MSELoss(reduction="sum"), [(x, y / root)])
        F = fl.Fisher(model, (x, y), likelihood=fl.Gaussian(variance))
        assert error(2 * F.n_data * F.dense(), peer) < TOLERANCE


class Scaled(nn.Module):
    def __init__(self, factor: Tensor):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


class FromDict(nn.Module):
    """A model of one mapping, as a peer calls it, or of its entries, as ours is called."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, batch: Any = None, **entries: Tensor) -> Tensor:
        entries = entries or batch
        return self.inner(entries["x"] * entries["scale"])


def test_curvlinops_mappings():
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    model, (x, y) = FromDict(), twelve()
    scale = 1 + noise(12, 1).abs()
    batches = [({"x": a, "scale": s}, b) for a, s, b in zip(*(t.split((7, 5)) for t in (x, scale, y)), strict=True)]
    parameters = list(model.parameters())
    peer = curvlinops.GGNLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        parameters,
        [(UserDict(inputs), targets) for inputs, targets in batches],
        check_deterministic=False,
        batch_size_fn=lambda inputs: len(inputs["x"]),
    ) @ torch.eye(35, dtype=x.dtype)
    forms = [batches, [UserDict({**inputs, "labels": targets}) for inputs, targets in batches]]
    for data in forms:
        assert error(fl.Fisher(model, data, likelihood="categorical").dense(), peer) < TOLERANCE


@pytest.mark.parametrize("name", ["transposed conv2d", "rms norm", "attention", "gru cell", "tied embedding"])
def test_curvlinops_empirical_fisher(name):
    model, (x, y), _ = ZOO[name]()
    without_fused_path(model)
    with sdpa_kernel(SDPBackend.MATH):
        peer = curvlinops_matrix("EFLinearOperator", model, nn.CrossEntropyLoss(), [(x, y)])
    assert error(fl.Fisher(model, (x, y), likelihood="categorical", kind="empirical").dense(), peer) < TOLERANCE


# --- nngeometry: normalisation and transposed convolutions ------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["conv_1d", "batchnorm_1d", "batchnorm_2d", "layer_norm", "group_norm", "transposed conv2d"]
)
def test_nngeometry_layers(name):
    model, (x, y), _ = ZOO[name]()
    if name == "transposed conv2d":  # the peer knows no groups
        with torch.random.fork_rng(devices=[]):
            inner = [nn.ConvTranspose2d(2, 4, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(128, 3)]
            model = fill(nn.Sequential(*inner).double(), torch.Generator().manual_seed(0))
        x = noise(4, 2, 3, 5)
    peer = nngeometry_matrix(model, (x, y), "classif_logits")
    assert error(fl.Fisher(model, (x, y), likelihood="categorical").dense(), peer) < TOLERANCE


# --- BackPACK: diagonals, and gradients of single examples ------------------------------------------------------------


def backpack_answers(model: nn.Module, data: tuple[Tensor, Tensor], loss: nn.Module, *wanted: str) -> list[Tensor]:
    """A peer's extensions after one backward pass: diagonals flat, gradients of examples ``(N, P)``."""
    backpack = pytest.importorskip("backpack", reason="BackPACK is not installed")
    from backpack import extensions

    found = {"diag_ggn_exact": extensions.DiagGGNExact, "grad_batch": extensions.BatchGrad}
    model, loss = backpack.extend(model), backpack.extend(loss)
    with default_dtype(torch.float64), backpack.backpack(*(found[name]() for name in wanted)):
        loss(model(data[0]), data[1]).backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    diagonals = {
        "diag_ggn_exact": lambda p: p.diag_ggn_exact.reshape(-1),
        "grad_batch": lambda p: p.grad_batch.flatten(1),
    }
    return [torch.cat([diagonals[name](p) for p in parameters], dim=-1) for name in wanted]


BACKPACK = [
    *("softmax_regression", "mlp_tanh", "mlp_no_bias", "mlp_smooth_activations", "frozen_first_layer", "conv_stride"),
    *("conv_padding", "conv_dilation", "conv_groups", "conv_depthwise", "conv_everything", "conv_1d", "conv_3d"),
    *("transposed conv1d", "transposed conv2d", "transposed conv3d", "average_pool", "max_pool", "lenet"),
    *("gaussian_linear", "gaussian_three_outputs", "bernoulli_one_output"),
]


@pytest.mark.parametrize("name", BACKPACK)
def test_backpack_diagonal_and_scores(name):
    """The diagonal of the mean loss, and the gradients of single examples, which our rows are times √N."""
    model, (x, y), likelihood = ZOO[name]()
    if name == "mlp_smooth_activations":  # the peer has no second-order rule for all of them
        with torch.random.fork_rng(devices=[]):
            inner = [nn.Linear(4, 5), nn.SELU(), nn.Linear(5, 4), nn.ELU(), nn.Linear(4, 3), nn.LogSigmoid()]
            model = fill(nn.Sequential(*inner).double(), torch.Generator().manual_seed(0))
    if name.startswith("transposed"):  # nor one for what is padded at the output
        with torch.random.fork_rng(devices=[]):
            model = nn.Sequential(type(model[0])(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)).double()
            model(x)
            model = fill(model, torch.Generator().manual_seed(0))
    exact, empirical = (fl.Fisher(model, (x, y), likelihood=likelihood, kind=kind) for kind in ("exact", "empirical"))
    elements = 1 if likelihood == "categorical" else y[0].numel()
    factor = 2 if likelihood == "gaussian" else 1  # the squared error is twice the negative logarithm
    diagonal, gradients = backpack_answers(model, (x, y), LOSSES[likelihood](), "diag_ggn_exact", "grad_batch")
    assert error(factor / elements * exact.diagonal(), diagonal) < TOLERANCE
    U = gradients * len(y) * elements / factor  # the scores of a sum over outputs, of each example
    assert error(empirical.dense(), U.T @ U / len(y)) < TOLERANCE
    assert error(empirical.gradient(), gradients.sum(0) * elements / factor) < TOLERANCE


@pytest.mark.parametrize("name", ["batchnorm_1d", "batchnorm_2d", "lstm", "rnn", "embedding"])
def test_backpack_gradients_of_examples(name):
    """Layers for which the peer has gradients of examples, but no diagonal."""
    with torch.random.fork_rng(devices=[]):
        models = {
            "lstm": nn.Sequential(nn.LSTM(2, 3, batch_first=True), First(), nn.Flatten(), nn.Linear(9, 3)),
            "rnn": nn.Sequential(nn.RNN(2, 3, batch_first=True), First(), nn.Flatten(), nn.Linear(9, 3)),
            "embedding": nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 3)),
        }
    model, (x, y), _ = ZOO[name]() if name not in models else (models[name], (noise(6, 3, 2), twelve()[1][:6]), "")
    if name == "embedding":
        x = MORE_CASES["embedding with padding"]()[1][0]
    if name in models:
        model = fill(model.double(), torch.Generator().manual_seed(0))
    (gradients,) = backpack_answers(model, (x, y), nn.CrossEntropyLoss(), "grad_batch")
    U = gradients * len(y)
    F = fl.Fisher(model, (x, y), likelihood="categorical", kind="empirical")
    assert error(F.dense(), U.T @ U / len(y)) < TOLERANCE


class First(nn.Module):
    """The outputs of a recurrent layer, without its state."""

    def forward(self, pair: tuple[Tensor, Any]) -> Tensor:
        return pair[0]


def test_peers_on_unequal_batches():
    """The summed loss is the same for every split, in both libraries."""
    model, data = mlp(), twelve()
    peer = curvlinops_matrix("GGNLinearOperator", model, nn.CrossEntropyLoss(reduction="sum"), split(data, 9, 3))
    F = fl.Fisher(model, split(data, 5, 4, 3), likelihood="categorical")
    assert error(12 * F.dense(), peer) < TOLERANCE
