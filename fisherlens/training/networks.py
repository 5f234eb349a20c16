"""The networks of the ready problems: factories without arguments that draw their weights from the global random state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

Layers = list[tuple[str, nn.Module]]


def digits_mlp() -> nn.Module:
    """64-32-10 with tanh, on rows of 64 grey levels."""
    layers = [("hidden", nn.Linear(64, 32)), ("tanh", nn.Tanh()), ("output", nn.Linear(32, 10))]
    return nn.Sequential(OrderedDict(layers))


def digits_cnn() -> nn.Module:
    """Two convolutions and two dense layers, on 8 x 8 images."""
    # The dense layer is fed by a flattened 16 x 4 x 4 map: with 16 positions CW-NGD still cuts it per source channel.
    layers: Layers = [
        ("conv1", nn.Conv2d(1, 8, 3, padding=1)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(8, 16, 3, padding=1)),
        ("relu2", nn.ReLU()),
        ("pool", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(256, 16)),
        ("relu3", nn.ReLU()),
        ("output", nn.Linear(16, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def digits_autoencoder() -> nn.Module:
    """64-32-8-32-64 with tanh and a linear code."""
    return _autoencoder((64, 32, 8), nn.Tanh, flatten=False)


def mnist_autoencoder() -> nn.Module:
    """784-1000-500-250-30 and back, with ReLU and a linear code.

    The widths are those of Hinton and Salakhutdinov (2006), on which MBF and others report; the activations are our choice.
    """
    return _autoencoder((784, 1000, 500, 250, 30), nn.ReLU, flatten=True)


def fashion_mlp() -> nn.Module:
    """784-120-120-10, the widths of the follow-up of CW-NGD (2023); ReLU is our choice."""
    layers: Layers = [
        ("flatten", nn.Flatten()),
        ("hidden1", nn.Linear(784, 120)),
        ("relu1", nn.ReLU()),
        ("hidden2", nn.Linear(120, 120)),
        ("relu2", nn.ReLU()),
        ("output", nn.Linear(120, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def fashion_cnn() -> nn.Module:
    """Three 3 x 3 convolutions of 16, 32 and 64 channels, each with ReLU and 2 x 2 max pooling, and one dense layer."""
    layers: Layers = []
    for number, (before, after) in enumerate(((1, 16), (16, 32), (32, 64)), start=1):
        layers.append((f"conv{number}", nn.Conv2d(before, after, 3, padding=1)))
        layers.append((f"relu{number}", nn.ReLU()))
        layers.append((f"pool{number}", nn.MaxPool2d(2)))
    layers += [("flatten", nn.Flatten()), ("output", nn.Linear(64 * 3 * 3, 10))]
    return nn.Sequential(OrderedDict(layers))


def mnist_lenet() -> nn.Module:
    """LeNet-5 after LeCun et al. (1998): convolutions of 6 and 16 maps, then 400-120-84-10; here with ReLU and max pooling."""
    layers: Layers = [
        ("conv1", nn.Conv2d(1, 6, 5, padding=2)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(6, 16, 5)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
        ("dense1", nn.Linear(400, 120)),
        ("relu3", nn.ReLU()),
        ("dense2", nn.Linear(120, 84)),
        ("relu4", nn.ReLU()),
        ("output", nn.Linear(84, 10)),
    ]
    return nn.Sequential(OrderedDict(layers))


def cifar_vgg() -> nn.Module:
    """Three pairs of 3 x 3 convolutions (32, 64, 128 channels) after Simonyan and Zisserman (2015), then 2048-128-10.

    Max pooling, no dropout and no normalisation: examples stay independent, so train and eval mode are the same function. Without
    normalisation the scale of the weights matters, hence He's initialisation.
    """
    layers: Layers = []
    before = 3
    for stage, width in enumerate((32, 64, 128), start=1):
        for place in (1, 2):
            layers.append((f"conv{stage}_{place}", nn.Conv2d(before, width, 3, padding=1)))
            layers.append((f"relu{stage}_{place}", nn.ReLU()))
            before = width
        layers.append((f"pool{stage}", nn.MaxPool2d(2)))
    layers += [
        ("flatten", nn.Flatten()),
        ("hidden", nn.Linear(128 * 4 * 4, 128)),
        ("relu", nn.ReLU()),
        ("output", nn.Linear(128, 10)),
    ]
    return _he_initialised(nn.Sequential(OrderedDict(layers)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with batch normalisation, added to their input.

    Where the width doubles, the input is subsampled and padded with empty channels: option A of He et al. (2016), without parameters.

    Parameters
    ----------
    before, after
        Channels of the input and of the output; where they differ, height and width are halved.
    """

    def __init__(self, before: int, after: int):
        super().__init__()
        self.stride = 1 if before == after else 2
        self.missing = after - before
        self.conv1 = nn.Conv2d(before, after, 3, stride=self.stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(x + g(x)), shape (N, after, H / stride, W / stride)."""
        inner = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        if self.missing:
            half = self.missing // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.missing - half))
        return self.relu2(x + inner)


def cifar_resnet() -> nn.Module:
    """ResNet-20 of He et al. (2016), for 32 x 32 images: 16, 32 and 64 channels, three residual blocks each.

    It is built in training mode, in which batch normalisation couples the examples of a batch; a Fisher needs it in eval mode. The last
    scale of each of the nine blocks starts at 1/3 and not at 1: before training, in eval mode, nothing is normalised yet, and the
    variance would double with each block.
    """
    layers: Layers = [
        ("conv", nn.Conv2d(3, 16, 3, padding=1, bias=False)),
        ("norm", nn.BatchNorm2d(16)),
        ("relu", nn.ReLU()),
    ]
    before = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for place in (1, 2, 3):
            block = ResidualBlock(before, width)
            nn.init.constant_(block.norm2.weight, 1 / 3)
            layers.append((f"block{stage}_{place}", block))
            before = width
    layers += [("pool", nn.AdaptiveAvgPool2d(1)), ("flatten", nn.Flatten()), ("output", nn.Linear(64, 10))]
    return _he_initialised(nn.Sequential(OrderedDict(layers)))


def _autoencoder(widths: Sequence[int], activation: type[nn.Module], *, flatten: bool) -> nn.Module:
    layers: Layers = [("flatten", nn.Flatten())] if flatten else []
    for part, sizes in (("encoder", tuple(widths)), ("decoder", tuple(widths)[::-1])):
        for number in range(1, len(sizes)):
            layers.append((f"{part}{number}", nn.Linear(sizes[number - 1], sizes[number])))
            if number < len(sizes) - 1:  # neither the code nor the logits are bent
                layers.append((f"{part}_activation{number}", activation()))
    return nn.Sequential(OrderedDict(layers))


def _he_initialised(model: nn.Sequential) -> nn.Module:
    """Weights drawn with variance 2 / fan-in and biases 0 (He et al. 2015), but for the last layer, which no ReLU follows."""
    for module in [inner for layer in model[:-1] for inner in layer.modules()]:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
