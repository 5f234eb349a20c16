"""KFAC and EKFAC beside a library that nobody here wrote, in the cases that both take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_case
from fisher_checks import DRAWS, QUIET, SEED, ZOO, drawn_labels, error
from torch import Tensor, nn

import fisherlens as fl

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings(QUIET),
    # what the peer's own code and imports warn about
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
TOLERANCE = 1e-6
SHARED = [
    *(
        "softmax_regression",
        "mlp_tanh",
        "mlp_no_bias",
        "frozen_first_layer",
        "conv_stride",
        "conv_padding",
        "conv_dilation",
    ),
    *("conv_no_bias", "conv_rectangular", "conv_one_by_one", "conv_one_position", "conv_valid"),
    *("lenet", "average_pool", "max_pool", "batchnorm_2d_fixed"),
]


def peer(
    name: str,
    model: nn.Module,
    loss: nn.Module,
    data: tuple[Tensor, Tensor],
    approx: str = "expand",
    kind: str = "type-2",
    labels: Any = None,
) -> Tensor:
    """The peer's operator, column by column; ``labels`` replaces its draws, one tensor per draw."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    base = getattr(curvlinops, name)
    if labels is not None:
        draws = iter(labels)
        base = type(name, (base,), {"draw_label": lambda self, output: next(draws)})
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {
        "fisher_type": kind,
        "kfac_approx": approx,
        "separate_weight_and_bias": False,
        "check_deterministic": False,
    }
    if labels is not None:
        options["mc_samples"] = len(labels)
    operator = base(model, loss, parameters, [data], **options)
    size = sum(p.numel() for p in parameters)
    return operator @ torch.eye(size, dtype=parameters[0].dtype)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", SHARED)
def test_kfac_of_the_mean_cross_entropy(name, approx):
    model, data, _ = ZOO[name]()
    theirs = peer("KFACLinearOperator", model, nn.CrossEntropyLoss(), data, approx)
    ours = fl.KFAC(fl.Fisher(model, data, likelihood="categorical"), form=approx)
    assert error(ours.dense(), theirs) < TOLERANCE


@pytest.mark.parametrize("name", ["dense_on_positions", "linear"])
def test_kfac_on_positions(name):
    """Several positions of a dense layer, in both forms."""
    if name == "linear":
        build = lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))  # noqa: E731
        model, data, _ = make_case("positions of a peer", build, (6, 4))
    else:
        model, data, _ = ZOO[name]()
    F = fl.Fisher(model, data, likelihood="categorical")
    for approx in ("expand", "reduce"):
        theirs = peer("KFACLinearOperator", model, nn.CrossEntropyLoss(), data, approx)
        assert error(fl.KFAC(F, form=approx).dense(), theirs) < TOLERANCE


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp_tanh", "conv_stride", "lenet"])
def test_kfac_of_the_empirical_fisher(name, approx):
    model, data, _ = ZOO[name]()
    theirs = peer("KFACLinearOperator", model, nn.CrossEntropyLoss(), data, approx, "empirical")
    ours = fl.KFAC(fl.Fisher(model, data, likelihood="categorical", kind="empirical"), form=approx)
    assert error(ours.dense(), theirs) < TOLERANCE


@pytest.mark.parametrize("name", ["mlp_tanh", "lenet"])
def test_kfac_at_sampled_labels(name):
    """The peer is handed the labels that we drew."""
    model, data, _ = ZOO[name]()
    labels = drawn_labels(model, data, "categorical")
    theirs = peer("KFACLinearOperator", model, nn.CrossEntropyLoss(), data, "expand", "mc", labels.unbind(-1))
    ours = fl.KFAC(fl.Fisher(model, data, likelihood="categorical", kind="mc", mc_samples=DRAWS, seed=SEED))
    assert error(ours.dense(), theirs) < TOLERANCE


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    "name", ["gaussian_linear", "gaussian_three_outputs", "bernoulli_one_output", "bernoulli_two_outputs"]
)
def test_kfac_of_other_likelihoods(name, approx):
    """The GGN of MSELoss is 2/C F, that of BCEWithLogitsLoss F/C."""
    model, (x, y), likelihood = ZOO[name]()
    loss = nn.MSELoss() if likelihood == "gaussian" else nn.BCEWithLogitsLoss()
    factor = (2 if likelihood == "gaussian" else 1) / y[0].numel()
    theirs = peer("KFACLinearOperator", model, loss, (x, y), approx)
    ours = fl.KFAC(fl.Fisher(model, (x, y), likelihood=likelihood), form=approx)
    assert error(factor * ours.dense(), theirs) < TOLERANCE


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["softmax_regression", "mlp_tanh", "mlp_no_bias", "conv_one_position"])
def test_ekfac(name, approx):
    model, data, _ = ZOO[name]()
    theirs = peer("EKFACLinearOperator", model, nn.CrossEntropyLoss(), data, approx)
    ours = fl.EKFAC(fl.Fisher(model, data, likelihood="categorical"), form=approx)
    assert error(ours.dense(), theirs) < TOLERANCE


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_ekfac_of_convolutions(approx):
    """With more examples than inputs: an eigenvalue that is zero several times leaves the basis open."""
    build = lambda: nn.Sequential(  # noqa: E731
        *(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(2, 3))
    )
    model, data, _ = make_case("ekfac beside a peer", build, (1, 5, 5), n=30)
    theirs = peer("EKFACLinearOperator", model, nn.CrossEntropyLoss(), data, approx)
    F = fl.Fisher(model, data, likelihood="categorical")
    assert error(fl.EKFAC(F, form=approx).dense(), theirs) < TOLERANCE
    assert error(fl.KFAC(F, form=approx).dense(), theirs) > 1e-2


def test_damped_inverse():
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops is not installed")
    model, data, _ = ZOO["mlp_tanh"]()
    parameters = list(model.parameters())
    operator = curvlinops.KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        parameters,
        [data],
        fisher_type="type-2",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    K = fl.KFAC(fl.Fisher(model, data, likelihood="categorical"))
    identity = torch.eye(K.n_params, dtype=torch.float64)
    theirs = curvlinops.KFACInverseLinearOperator(operator, damping=0.03, use_exact_damping=True) @ identity
    assert error(K.solve(identity, 0.03), theirs) < TOLERANCE
    heuristic = curvlinops.KFACInverseLinearOperator(operator, damping=0.03, use_heuristic_damping=True) @ identity
    factored = fl.KFAC(fl.Fisher(model, data, likelihood="categorical"), damping="factored")
    assert error(factored.solve(identity, 0.03), heuristic) < TOLERANCE
