"""The reference networks of the benchmarks: C = 10 classes, random inputs of the real shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Reference:
    """A network with the batch size at which it is measured."""

    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    n: int

    def make(self, n: int | None = None, seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """Network in evaluation mode and (inputs, targets)."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().eval()
        generator = torch.Generator().manual_seed(seed + 1)
        x = torch.randn(n or self.n, *self.input_shape, generator=generator)
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
    "mlp": Reference("mlp", _mlp, (784,), 512),
    "lenet": Reference("lenet", _lenet, (1, 28, 28), 256),
    "conv6": Reference("conv6", _conv6, (3, 32, 32), 128),
}
