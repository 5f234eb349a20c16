"""The networks of the ready problems: sizes, shapes, and that they can be analysed and trained."""

import pytest
import torch
from torch import nn

import fisherlens as fl
from fisherlens.training import networks

IMAGES = (1, 28, 28)
CIFAR = (3, 32, 32)
NETWORKS = [
    (networks.digits_mlp, (64,), 10, 2410),
    (networks.digits_cnn, (1, 8, 8), 10, 5530),
    (networks.digits_autoencoder, (64,), 64, 4744),
    (networks.fashion_mlp, IMAGES, 10, 784 * 120 + 120 + 120 * 120 + 120 + 120 * 10 + 10),
    (networks.fashion_cnn, IMAGES, 10, 16 * 10 + 32 * 145 + 64 * 289 + 10 * 577),
    (
        networks.mnist_lenet,
        IMAGES,
        10,
        61_706,
    ),  # LeNet-5 with every map of the second convolution fed by all of the first
    (networks.mnist_autoencoder, IMAGES, 784, 2_837_314),
    (networks.cifar_vgg, CIFAR, 10, 550_570),
    (networks.cifar_resnet, CIFAR, 10, 269_722),  # 0.27 million in table 6 of He et al. (2016)
]


def build(factory, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return factory()


def sample(shape, n=4):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("factory", "shape", "outputs", "n_params"), NETWORKS, ids=lambda v: getattr(v, "__name__", None)
)
def test_sizes_and_shapes(factory, shape, outputs, n_params):
    model = build(factory)
    assert sum(p.numel() for p in model.parameters()) == n_params
    found = model.eval()(sample(shape))
    assert found.shape == (4, outputs)
    assert 0.01 < found.std() < 3  # neither dead nor blown up before training
    ready = fl.problems()[factory.__name__.replace("_", "-")]
    assert f"{n_params:,} parameters" in ready


def squared_scores(model, x, outputs):
    """Σ over labels of p(label) |score|²: the trace of one example's Fisher, of a softmax or of independent bits."""
    f = model(x)[0]
    p = f.softmax(0) if outputs == 10 else f.sigmoid()
    terms = f.log_softmax(0) * p.detach().sqrt() if outputs == 10 else f * (p * (1 - p)).detach().sqrt()
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(term, parameters, retain_graph=True) for term in terms]
    return sum(float(part.square().sum()) for gradient in gradients for part in gradient)


# mnist_autoencoder is digits_autoencoder with a thousand times as many parameters
@pytest.mark.parametrize("case", [case for case in NETWORKS if case[3] < 1_000_000], ids=lambda case: case[0].__name__)
def test_every_network_has_an_exact_fisher(case):
    factory, shape, outputs, _ = case
    model = build(factory).eval()
    x = sample(shape, 2)
    y = torch.tensor([3, 1]) if outputs == 10 else torch.full((2, outputs), 0.5)
    F = fl.Fisher(model, (x, y), likelihood="categorical" if outputs == 10 else "bernoulli", progress=False)
    expected = (squared_scores(model, x[:1], outputs) + squared_scores(model, x[1:], outputs)) / 2
    assert float(F.trace()) == pytest.approx(expected, rel=1e-4)


def test_only_the_resnet_normalises_by_batch():
    norms = (nn.modules.batchnorm._BatchNorm, nn.Dropout)
    for factory, *_ in NETWORKS:
        has = any(isinstance(module, norms) for module in build(factory).modules())
        assert has == (factory is networks.cifar_resnet)
    with pytest.raises(fl.InputError, match=r"eval\(\)"):
        fl.Fisher(build(networks.cifar_resnet), (sample(CIFAR), torch.arange(4)), likelihood="categorical")


def test_a_residual_block_is_its_formula():
    block = build(lambda: networks.ResidualBlock(2, 4)).eval()
    x = sample((2, 6, 6))
    inner = block.norm2(block.conv2(block.norm1(block.conv1(x)).relu()))
    shortcut = torch.zeros(4, 4, 3, 3)
    shortcut[:, 1:3] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), (inner + shortcut).relu())
    same = build(lambda: networks.ResidualBlock(2, 2)).eval()
    torch.testing.assert_close(same(x), (x + same.norm2(same.conv2(same.norm1(same.conv1(x)).relu()))).relu())
