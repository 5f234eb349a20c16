"""The exact and empirical kinds beside libraries that nobody here wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import make_case
from fisher_checks import QUIET, ZOO, error
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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
CLASSIFIERS = [
    *("softmax_regression", "mlp_tanh", "mlp_no_bias", "mlp_inplace_relu", "frozen_first_layer", "conv_stride"),
    *("conv_padding", "conv_dilation", "conv_groups", "conv_depthwise", "conv_same", "conv_circular", "conv_1d"),
    *("conv_3d", "lenet", "batchnorm_2d", "layer_norm", "group_norm", "adaptive_pool", "residual", "module_used_twice"),
    *("conv_used_twice", "segmentation"),
]


def curvlinops_matrix(kind: str, model: nn.Module, loss: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A peer's operator, column by column, in the order of the parameters that require grad."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = getattr(curvlinops, kind)(model, loss, parameters, batches, check_deterministic=False)
    size = sum(p.numel() for p in parameters)
    return operator @ torch.eye(size, dtype=parameters[0].dtype)


def nngeometry_matrix(model: nn.Module, data: tuple[Tensor, Tensor], variant: str) -> Tensor:
    """A peer's dense Fisher; its constants follow the default dtype."""
    metrics = pytest.importorskip("nngeometry.metrics", reason="nngeometry is not installed")
    from nngeometry.object import PMatDense

    with default_dtype(torch.float64):
        loader = DataLoader(TensorDataset(*data), batch_size=3)
        return metrics.FIM(model=model, loader=loader, representation=PMatDense, variant=variant).to_torch()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_curvlinops_ggn_of_the_mean_cross_entropy(name):
    model, (x, y), _ = ZOO[name]()
    peer = curvlinops_matrix("GGNLinearOperator", model, nn.CrossEntropyLoss(), [(x, y)])
    F = fl.Fisher(model, (x, y), likelihood="categorical")
    assert error(F.dense(), peer) < TOLERANCE
    assert error(F @ torch.eye(F.n_params, dtype=F.dtype), peer) < TOLERANCE


def test_curvlinops_sum_over_unequal_batches():
    """The summed loss has the GGN W F, for any split."""
    model, (x, y), _ = ZOO["mlp_tanh"]()
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    peer = curvlinops_matrix("GGNLinearOperator", model, nn.CrossEntropyLoss(reduction="sum"), batches)
    F = fl.Fisher(model, batches, likelihood="categorical")
    assert error(F.total_weight * F.dense(), peer) < TOLERANCE


def test_curvlinops_class_weights_in_one_batch():
    model, (x, y), _ = ZOO["mlp_tanh"]()
    weight = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    peer = curvlinops_matrix("GGNLinearOperator", model, nn.CrossEntropyLoss(weight=weight), [(x, y)])
    F = fl.Fisher(model, (x, y), likelihood=fl.Categorical(weight=weight))
    assert error(F.dense(), peer) < TOLERANCE


@pytest.mark.parametrize("name", ["gaussian_linear", "gaussian_three_outputs", "gaussian_image"])
def test_curvlinops_squared_error(name):
    """The GGN of MSELoss is (2/C) F for the mean and 2 N F for the sum, C output elements per example."""
    model, (x, y), _ = ZOO[name]()
    F = fl.Fisher(model, (x, y), likelihood="gaussian")
    elements = y[0].numel()
    mean = curvlinops_matrix("GGNLinearOperator", model, nn.MSELoss(), [(x, y)])
    assert error(2 / elements * F.dense(), mean) < TOLERANCE
    total = curvlinops_matrix("GGNLinearOperator", model, nn.MSELoss(reduction="sum"), [(x, y)])
    assert error(2 * F.n_data * F.dense(), total) < TOLERANCE


@pytest.mark.parametrize("name", ["bernoulli_one_output", "bernoulli_two_outputs", "bernoulli_image"])
def test_curvlinops_binary_cross_entropy(name):
    """The GGN of BCEWithLogitsLoss is F/C for the mean and N F for the sum."""
    model, (x, y), _ = ZOO[name]()
    F = fl.Fisher(model, (x, y), likelihood="bernoulli")
    mean = curvlinops_matrix("GGNLinearOperator", model, nn.BCEWithLogitsLoss(), [(x, y)])
    assert error(F.dense() / y[0].numel(), mean) < TOLERANCE
    total = curvlinops_matrix("GGNLinearOperator", model, nn.BCEWithLogitsLoss(reduction="sum"), [(x, y)])
    assert error(F.n_data * F.dense(), total) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp_tanh", "conv_groups", "lenet"])
def test_curvlinops_empirical_fisher(name):
    model, (x, y), _ = ZOO[name]()
    peer = curvlinops_matrix("EFLinearOperator", model, nn.CrossEntropyLoss(), [(x, y)])
    F = fl.Fisher(model, (x, y), likelihood="categorical", kind="empirical")
    assert error(F.dense(), peer) < TOLERANCE


def test_curvlinops_in_float32():
    model, (x, y), _ = ZOO["lenet"]()
    model, x = model.float(), x.float()
    peer = curvlinops_matrix("GGNLinearOperator", model, nn.CrossEntropyLoss(), [(x, y)])
    assert error(fl.Fisher(model, (x, y), likelihood="categorical").dense(), peer) < 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "softmax_regression",
        "mlp_tanh",
        "mlp_no_bias",
        "conv_stride",
        "conv_padding",
        "conv_dilation",
        "lenet",
        "average_pool",
    ],
)
def test_nngeometry_dense_fisher(name):
    model, (x, y), _ = ZOO[name]()
    F = fl.Fisher(model, (x, y), likelihood="categorical")
    assert error(F.dense(), nngeometry_matrix(model, (x, y), "classif_logits")) < TOLERANCE


@pytest.mark.parametrize("name", ["gaussian_linear", "gaussian_three_outputs"])
def test_nngeometry_regression(name):
    model, (x, y), _ = ZOO[name]()
    F = fl.Fisher(model, (x, y), likelihood="gaussian")
    assert error(F.dense(), nngeometry_matrix(model, (x, y), "regression")) < TOLERANCE


def test_nngeometry_one_logit():
    model, (x, y), _ = ZOO["bernoulli_one_output"]()
    F = fl.Fisher(model, (x, y), likelihood="bernoulli")
    assert error(F.dense(), nngeometry_matrix(model, (x, y), "classif_binary_logits")) < TOLERANCE


def test_both_peers_on_a_wider_network():
    model, (x, y), _ = make_case(
        "peers", lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 10)), (12,), n=30
    )
    F = fl.Fisher(model, (x, y), likelihood="categorical")
    assert error(F.dense(), nngeometry_matrix(model, (x, y), "classif_logits")) < TOLERANCE
    assert error(F.dense(), curvlinops_matrix("GGNLinearOperator", model, nn.CrossEntropyLoss(), [(x, y)])) < TOLERANCE
