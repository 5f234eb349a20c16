"""The Hessian as an operator: against automatic differentiation on every model, and against F where they are equal."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import ALL_CASES, EXTRA_CASES, cast
from fisher_checks import error
from hessian_checks import dense_of, hessian, streamed, truth_of, vectors
from torch import Tensor, nn

import fisherlens as fl
from fisherlens import reference
from fisherlens.likelihoods import ElementwiseLikelihood, Gaussian, HeteroscedasticGaussian

ZOO = {**ALL_CASES, **EXTRA_CASES}
# torch announces once per process that it pads even kernels of "same" convolutions in a copy
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("name", ZOO)
def test_whole_matrix_and_products(name, unchanged):
    model, data, likelihood = ZOO[name]()
    truth = truth_of(model, data, likelihood)
    with unchanged(model):
        H = hessian(model, data, likelihood)
        v = vectors(H.n_params, 3)
        products = H @ v, H @ v[:, 1], H @ H.layout.unflatten(v[:, 2])
        matrix = H.dense()
    assert isinstance(H, fl.Fisher)
    assert H.plan.linearised
    assert error(matrix, truth) < 1e-12
    assert error(products[0], truth @ v) < 1e-12
    assert error(products[1], truth @ v[:, 1]) < 1e-12
    assert error(H.layout.flatten(products[2]), truth @ v[:, 2]) < 1e-12
    assert torch.equal(matrix, matrix.T)
    assert error(H.gradient(), reference.gradient(model, data, likelihood)) < 1e-12


@pytest.mark.parametrize(
    "name", ["mlp_tanh", "mlp_inplace_relu", "lenet", "batchnorm_1d", "group_norm", "segmentation", "lstm"]
)
def test_streamed_in_pieces(name, unchanged):
    model, data, likelihood = ZOO[name]()
    truth = truth_of(model, data, likelihood)
    with unchanged(model):
        H = streamed(model, data, likelihood)
        v = vectors(H.n_params, 3)
        found = H @ v
    assert H.curvature.step < len(data[1])  # several pieces
    assert error(found, truth @ v) < 1e-12
    assert error(H @ v[:, 0], truth @ v[:, 0]) < 1e-12
    assert (
        error(H.restrict(H.layout.layer_names[0]).dense(), truth[: H.layout.layers[0].size, : H.layout.layers[0].size])
        < 1e-12
    )
    assert H.plan.product_cost == pytest.approx(3)
    assert H.plan.nbytes == 0


@pytest.mark.parametrize(
    "name", ["mlp_smooth_activations", "lenet", "layer_norm", "gaussian_image", "bernoulli_image", "lstm"]
)
def test_float32(name):
    model, data, likelihood = ZOO[name]()
    truth = truth_of(model, data, likelihood)
    H = hessian(*cast((copy.deepcopy(model), data, likelihood), torch.float32)[:2], likelihood)
    v = vectors(H.n_params, 3).float()
    found = H @ v
    assert found.dtype == H.dtype == torch.float32
    assert error(found, truth @ v.double()) < 1e-4
    assert error(H.dense(), truth) < 1e-4
    assert H.dense().dtype == H.diagonal().dtype == torch.float32


def test_low_precision_answers_in_float32():
    model, data, likelihood = ZOO["mlp_tanh"]()
    truth = truth_of(model, data, likelihood)
    H = hessian(model.to(torch.bfloat16), (data[0].to(torch.bfloat16), data[1]), likelihood)
    assert H.dense().dtype == torch.float32
    assert error(H.dense(), truth) < 0.1


@pytest.mark.parametrize("sizes", [(12,), (9, 3), (5, 4, 3), (1, 11)])
@pytest.mark.parametrize("kept", [True, False])
def test_split_into_batches_changes_nothing(sizes, kept):
    generator = torch.Generator().manual_seed(1)
    model, _, _ = ALL_CASES["mlp_tanh"]()
    x, y = torch.randn(12, 5, generator=generator, dtype=torch.float64), torch.randint(3, (12,), generator=generator)
    y[2] = -100
    likelihood = fl.Categorical(weight=[0.2, 1.0, 3.0])
    truth = truth_of(model, (x, y), likelihood)
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    H = (hessian if kept else streamed)(model, data, likelihood)
    assert error(H.dense(), truth) < 1e-12
    assert error(H.gradient(), reference.gradient(model, (x, y), likelihood)) < 1e-12
    # a weight is a repetition count
    doubled = hessian(model, (torch.cat([x, x[:5]]), torch.cat([y, y[:5]])), likelihood).dense()
    weight = likelihood.weight[y.clamp(min=0)] * (y >= 0)
    part = hessian(model, (x[:5], y[:5]), likelihood).dense()
    mixed = (weight.sum() * truth + weight[:5].sum() * part) / (weight.sum() + weight[:5].sum())
    assert error(doubled, mixed) < 1e-12


@pytest.mark.parametrize("kept", [True, False])
def test_other_likelihoods(kept):
    """pos_weight, a variance per example, a predicted variance, a likelihood of one's own, classes on the last axis."""

    class Poisson(ElementwiseLikelihood):
        def fisher_root(self, outputs):
            return (outputs / 2).exp()

        def score(self, outputs, targets):
            return outputs.exp() - targets

        def sample(self, outputs, uniforms):
            raise NotImplementedError

    generator = torch.Generator().manual_seed(4)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    model = ALL_CASES["bernoulli_two_outputs"]()[0]
    zeros, counts = (
        torch.randint(2, (6, 2), generator=generator).double(),
        torch.randint(4, (6, 2), generator=generator).double(),
    )
    means = torch.randn(6, 1, generator=generator, dtype=torch.float64)
    variance = 0.5 + torch.rand(6, 1, generator=generator, dtype=torch.float64)

    def poisson(f: Tensor) -> Tensor:
        return (f.exp() - counts * f).sum() / 6

    def normal(f: Tensor) -> Tensor:
        return ((f - counts).square() / variance).sum() / 12

    def weighted(f: Tensor) -> Tensor:
        loss = nn.BCEWithLogitsLoss(reduction="sum", pos_weight=torch.tensor([3.0, 0.5], dtype=torch.float64))
        return loss(f, zeros) / 6

    def heteroscedastic(f: Tensor) -> Tensor:
        return (f[:, 1:] + (means - f[:, :1]).square() * (-f[:, 1:]).exp()).sum() / 12

    build = hessian if kept else streamed
    for targets, likelihood, loss in [
        (zeros, fl.Bernoulli(pos_weight=[3.0, 0.5]), weighted),
        (counts, Gaussian(variance=variance), normal),
        (means, HeteroscedasticGaussian(), heteroscedastic),
        (counts, Poisson(), poisson),
    ]:
        theta = {name: p.detach() for name, p in model.named_parameters()}
        truth = dense_of(lambda t, loss=loss: loss(torch.func.functional_call(model, t, (x,))), theta)
        H = build(model, list(zip(x.split((4, 2)), targets.split((4, 2)), strict=True)), likelihood)
        assert error(H.dense(), truth) < 1e-12, likelihood
    axis = fl.Categorical(class_axis=-1)
    tokens = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    sequence = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (4, 5), generator=generator)
    assert error(build(tokens, (sequence, labels), axis).dense(), truth_of(tokens, (sequence, labels), axis)) < 1e-12


@pytest.mark.parametrize("name", ["softmax_regression", "gaussian_linear", "fewer_parameters_than_examples"])
def test_equals_the_fisher_of_a_linear_model(name):
    model, data, likelihood = ALL_CASES[name]()
    F, H = fl.Fisher(model, data, likelihood=likelihood), hessian(model, data, likelihood)
    assert error(H.dense(), F.dense()) < 1e-12
    assert error(H.gradient(), F.gradient()) < 1e-12
    if (
        likelihood == "gaussian"
    ):  # at the minimum of the squared error of a nonlinear model too, as all residuals vanish
        net = ALL_CASES["gaussian_three_outputs"]()[0]
        x = data[0]
        fitted = (x, net(x).detach())
        assert (
            error(hessian(net, fitted, "gaussian").dense(), fl.Fisher(net, fitted, likelihood="gaussian").dense())
            < 1e-12
        )


def test_is_indefinite_and_differs_from_the_fisher_elsewhere():
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    H = hessian(model, data, likelihood)
    values = torch.linalg.eigvalsh(H.dense())
    assert values[0] < -1e-2 * values[-1]
    assert error(fl.Fisher(model, data, likelihood=likelihood).dense(), H.dense()) > 1e-2


def test_functions_inputs_and_selections():
    def network(params, inputs):
        return torch.tanh(inputs @ params["first"]) @ params["second"]

    generator = torch.Generator().manual_seed(7)
    params = {
        "first": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "second": torch.randn(4, 2, generator=generator, dtype=torch.float64),
    }
    x, y = torch.randn(5, 3, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    H = hessian(network, (x, y), params=params)
    truth = dense_of(lambda p: nn.functional.cross_entropy(network(p, x), y), params)
    assert error(H.dense(), truth) < 1e-12
    model, data, likelihood = ALL_CASES["mlp_tanh"]()
    whole, some = hessian(model, data, likelihood), hessian(model, data, likelihood, params=["2", "4.bias"])
    index = whole.layout.index_of(["2", "4.bias"])
    assert error(some.dense(), whole.dense()[index][:, index]) < 1e-12
    (left, right), targets = EXTRA_CASES["two_inputs"]()[1]
    named = EXTRA_CASES["two_inputs"]()[0]
    assert (
        error(
            hessian(named, ({"a": left, "b": right}, targets)).dense(), hessian(named, ((left, right), targets)).dense()
        )
        == 0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_attention(dtype):
    """Fused kernels have no second derivative; the plain ones of the same operations are found."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.encoder(x).mean(1))

    generator = torch.Generator().manual_seed(5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = Attention().eval()
    x, y = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        truth = truth_of(copy.deepcopy(model).double(), (x, y), "categorical")
    flags = torch.backends.cudnn.enabled, torch.backends.cuda.flash_sdp_enabled()
    H = hessian(model.to(dtype), (x.to(dtype), y))
    v = vectors(H.n_params, 2).to(dtype)
    assert error(H @ v, truth @ v.double()) < (1e-12 if dtype == torch.float64 else 1e-4)
    assert flags == (
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
    )


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["mlp_tanh", "lenet", "gaussian_three_outputs"])
def test_against_curvlinops(name):
    curvlinops = pytest.importorskip("curvlinops")
    model, (x, y), likelihood = ALL_CASES[name]()
    loss = nn.CrossEntropyLoss() if likelihood == "categorical" else nn.MSELoss()
    theirs = curvlinops.HessianLinearOperator(
        model, loss, list(model.parameters()), [(x, y)], check_deterministic=False
    )
    H = hessian(model, (x, y), likelihood)
    v = vectors(H.n_params, 2)
    scale = (
        1.0 if likelihood == "categorical" else 2 / y.shape[1]
    )  # MSELoss means over elements, of a square without the half
    assert error(scale * (H @ v), theirs @ v) < 1e-12
