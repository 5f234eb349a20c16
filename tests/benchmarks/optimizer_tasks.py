"""What the optimizers' steps are measured on: networks in training mode, random data of the real shapes, the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import MORE, REFERENCES, TINY
from torch import Tensor, nn
from torch.nn import functional

from fisherlens.training.networks import mnist_autoencoder


def _vgg16() -> nn.Module:
    """13 convolutions with normalisation and one dense layer, the usual form for images of 32x32 (arXiv:1409.1556)."""
    layers: list[nn.Module] = []
    c_in = 3
    for c_out in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if not c_out:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
        c_in = c_out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


@dataclass(frozen=True)
class Network:
    """How a network is made, which of a method's published periods belong to it, and the batch sizes."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    kind: str = "conv"  # or "dense"
    likelihood: str = "categorical"
    batches: tuple[int, ...] = ()  # where they are not a matter of choice


NETWORKS = {
    "lenet": Network(REFERENCES["lenet"].build, (1, 28, 28)),
    "conv6": Network(REFERENCES["conv6"].build, (3, 32, 32)),
    "autoencoder": Network(mnist_autoencoder, (1, 28, 28), "dense", "bernoulli"),
    "vgg16": Network(_vgg16, (3, 32, 32)),
    "resnet18": Network(MORE["resnet18"].build, (3, 32, 32)),
    "tiny": Network(TINY.build, TINY.input_shape, batches=(16,)),
}
# Network and batch size of a run without arguments: on a CPU what two cores do within ten minutes, on a GPU all of it.
ON_CPU = (("lenet", 128), ("conv6", 128), ("autoencoder", 128), ("lenet", 1024))
ON_GPU = tuple(
    (name, batch) for name in ("lenet", "conv6", "autoencoder", "vgg16", "resnet18") for batch in (128, 1024)
)


class Task:
    """One network on one batch."""

    def __init__(self, network: str, batch: int, device: torch.device):
        made = NETWORKS[network]
        self.network, self.batch, self.device = network, batch, device
        self.kind, self.likelihood, self._build = made.kind, made.likelihood, made.build
        generator = torch.Generator().manual_seed(1)
        draw = torch.rand if made.likelihood == "bernoulli" else torch.randn
        self.x = draw(batch, *made.shape, generator=generator).to(device)
        self.y = torch.randint(0, 10, (batch,), generator=generator).to(device)

    def model(self) -> nn.Module:
        """The network, always with the same parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._build().to(self.device).train()

    def loss_of(self, outputs: Tensor) -> Tensor:
        """Mean over examples of the cross-entropy, which an autoencoder sums over pixels."""
        if self.likelihood == "bernoulli":
            target = self.x.reshape(outputs.shape)
            return functional.binary_cross_entropy_with_logits(outputs, target, reduction="sum") / self.batch
        return functional.cross_entropy(outputs, self.y)


class Subject:
    """An optimizer with a network of its own, in the ordinary loop."""

    def __init__(self, task: Task, make: Callable[[nn.Module], torch.optim.Optimizer]):
        self.task, self.model = task, task.model()
        self.start = [p.detach().clone() for p in self.model.parameters()]
        self.optimizer = make(self.model)

    def step(self) -> None:
        """Forward, backward and step."""
        loss = self.task.loss_of(self.model(self.task.x))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back, so that every step is from the same place and nothing can diverge."""
        for p, start in zip(self.model.parameters(), self.start, strict=True):
            p.copy_(start)

    def kept(self) -> int | None:
        """Bytes of all tensors that the optimizer keeps between steps, its state; None where it does not tell."""
        return _tensor_bytes(self.optimizer.state_dict())


def _tensor_bytes(state: Any) -> int:
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        state = list(state.values())
    return sum(map(_tensor_bytes, state)) if isinstance(state, list | tuple) else 0
