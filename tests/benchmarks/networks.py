"""The networks of the benchmarks: C = 10 classes, random inputs of the real shapes.

``REFERENCES`` are the three networks for which design.md sets goals; ``MORE`` are two larger kinds of network. Both are in
``NETWORKS``, with one that is small enough to try a script on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reference:
    """A network with the batch size at which it is measured; with a vocabulary, inputs are that many tokens.

    Products over data that do not fit are measured on ``streamed`` such batches: enough that a budget which they exceed still
    lets a pass take about a batch at a time.
    """

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    n: int
    vocabulary: int = 0
    streamed: int = 4

    def make(self, n: int | None = None, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """Network in evaluation mode and (inputs, targets)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().eval()
        generator = torch.Generator().manual_seed(seed + 1)
        shape = (n or self.n, *self.input_shape)
        x = (
            torch.randint(0, self.vocabulary, shape, generator=generator)
            if self.vocabulary
            else torch.randn(*shape, generator=generator)
        )
        y = torch.randint(0, 10, (n or self.n,), generator=generator)
        return model, (x, y)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 500), nn.ReLU(), nn.Linear(500, 10))


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def _conv6() -> nn.Module:
    layers: list[nn.Module] = []
    for c_in, c_out, stride in [(3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)]:
        layers += [nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


REFERENCES = {
    "mlp": Reference("mlp", _mlp, (784,), 512, streamed=8),
    "lenet": Reference("lenet", _lenet, (1, 28, 28), 256),
    "conv6": Reference("conv6", _conv6, (3, 32, 32), 128),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with normalisation around an identity, after He et al. (2016), arXiv:1512.03385."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and c_in == c_out
            else nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride=stride, bias=False), nn.BatchNorm2d(c_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Residual sum, rectified."""
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.shortcut(x))


def _resnet18() -> nn.Module:
    """18 layers in four stages of two blocks, with the 3x3 stem that is usual for images of 32x32."""
    blocks, c_in = [], 64
    for c_out, stride in [(64, 1), (128, 2), (256, 2), (512, 2)]:
        blocks += [BasicBlock(c_in, c_out, stride), BasicBlock(c_out, c_out, 1)]
        c_in = c_out
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training: statistics and scales of their own in every channel
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


class EncoderBlock(nn.Module):
    """Attention and two dense layers, each after a normalisation and around an identity (pre-norm)."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, width) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # written out, since the fused kernels have no forward-mode derivative, on which the peers build
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).flatten(-2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Transformer encoder that classifies a sequence of tokens by the mean of its last representations."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, blocks: int, classes: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[EncoderBlock(width, heads, 4 * width) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T) integers to (N, classes)."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))).mean(1))


def _transformer() -> nn.Module:
    return Encoder(vocabulary=1000, length=32, width=128, heads=4, blocks=2, classes=10)


MORE = {
    "resnet18": Reference("resnet18", _resnet18, (3, 32, 32), 16, streamed=2),
    "transformer": Reference("transformer", _transformer, (32,), 128, vocabulary=1000),
}


def _tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    )


TINY = Reference("tiny", _tiny, (1, 8, 8), 16)
NETWORKS = REFERENCES | MORE | {"tiny": TINY}
