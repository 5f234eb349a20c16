"""The ready problems on images: which data with which network, and what suits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from fisherlens.training import datasets, networks
from fisherlens.training.base import Pair, Problem
from fisherlens.training.datasets import CIFAR10, FASHION_MNIST, MNIST
from fisherlens.training.folder import DataSet, Form, Part, load
from fisherlens.training.subsets import take


@dataclass(frozen=True)
class Ready:
    """A problem on images. ``title`` names data and sizes, ``about`` the task and the network; ``data`` is None for the digits."""

    title: str
    about: str
    sizes: tuple[int, int]
    factory: Callable[[], nn.Module]
    data: DataSet | None = None
    shape: tuple[int, ...] | None = None  # of one example of the digits
    likelihood: str = "categorical"
    batch_size: int = 64
    targets: Mapping[str, float] = field(default_factory=dict)

    def describe(self, form: Form | None = None, sizes: tuple[int, int] | None = None) -> str:
        """One sentence; ``form`` is the one in which the data are there."""
        train, test = sizes or (form.sizes if form else None) or self.sizes
        title = self.title.replace(self.data.name, form.title, 1) if self.data and form else self.title
        return f"{title}, {train:,} to train on and {test:,} to test: {self.about}."

    def build(self, name: str, where: Mapping[str, Any], counts: tuple[int | None, int | None]) -> Problem:
        """Take the data, all of them or a subset, and put the problem together."""
        if self.data is None:
            form, pairs = None, self._digits(counts)
        else:
            form, *parts = load(self.data, **where)
            pairs = [
                self._images(self.data, part, take(part.labels, count, half, form.title))
                for part, count, half in zip(parts, counts, ("train", "test"), strict=True)
            ]
        sizes = (len(pairs[0][1]), len(pairs[1][1]))
        whole = sizes == self.sizes  # what a run can reach on a part of the data is not known
        return Problem(
            name,
            self.describe(form, sizes),
            self.factory,
            *pairs,
            likelihood=self.likelihood,
            batch_size=min(self.batch_size, sizes[0]),
            targets=dict(self.targets) if whole else {},
        )

    def _digits(self, counts: tuple[int | None, int | None]) -> list[Pair]:
        train_x, test_x, train_y, test_y = datasets.digits()
        pairs = []
        for x, y, count, half in ((train_x, train_y, counts[0], "train"), (test_x, test_y, counts[1], "test")):
            index = take(y, count, half, "the digits")
            # a copy: nobody can spoil the cache
            images = torch.tensor(x[index], device="cpu").reshape(-1, *(self.shape or ()))
            labels = torch.tensor(y[index], dtype=torch.int64, device="cpu")
            pairs.append((images, images.clone() if self.likelihood == "bernoulli" else labels))
        return pairs

    def _images(self, data: DataSet, part: Part, index: np.ndarray) -> Pair:
        images = datasets.as_images(part.pixels(index))
        if self.likelihood == "bernoulli":  # grey levels are the targets too, as probabilities
            return images, images.flatten(1).clone()
        return datasets.standardised(images, data), torch.tensor(part.labels[index], device="cpu")


# Targets are what Adam or SGD reach within some epochs; that of mnist-autoencoder lies a little above what the demo of MBF shows after
# ten. None for CIFAR-10: what is reached without augmentation depends on the form of the data too much.
READY: dict[str, Ready] = {
    "digits-mlp": Ready(
        "Handwritten digits as rows of 64 grey levels (scikit-learn)",
        "64-32-10 with tanh, 2,410 parameters",
        (1437, 360),
        networks.digits_mlp,
        shape=(64,),
        targets={"train_loss": 0.1, "test_accuracy": 0.95},
    ),
    "digits-cnn": Ready(
        "Handwritten digits 8 x 8 (scikit-learn)",
        "two convolutions and two dense layers with ReLU, 5,530 parameters",
        (1437, 360),
        networks.digits_cnn,
        shape=(1, 8, 8),
        targets={"train_loss": 0.1, "test_accuracy": 0.95},
    ),
    "digits-autoencoder": Ready(
        "Handwritten digits as rows of 64 grey levels (scikit-learn)",
        "autoencoder 64-32-8-32-64 with tanh and Bernoulli likelihood, 4,744 parameters",
        (1437, 360),
        networks.digits_autoencoder,
        shape=(64,),
        likelihood="bernoulli",
        targets={"train_loss": 20.0},
    ),
    "fashion-mlp": Ready(
        "Fashion-MNIST 28 x 28",
        "784-120-120-10 with ReLU, 109,930 parameters",
        (60_000, 10_000),
        networks.fashion_mlp,
        FASHION_MNIST,
        batch_size=128,
        targets={"train_loss": 0.3, "test_accuracy": 0.87},
    ),
    "fashion-cnn": Ready(
        "Fashion-MNIST 28 x 28",
        "three convolutions and a dense layer with ReLU, 29,066 parameters",
        (60_000, 10_000),
        networks.fashion_cnn,
        FASHION_MNIST,
        batch_size=128,
        targets={"train_loss": 0.3, "test_accuracy": 0.87},
    ),
    "mnist-lenet": Ready(
        "MNIST 28 x 28",
        "LeNet-5 with ReLU and max pooling, 61,706 parameters",
        (60_000, 10_000),
        networks.mnist_lenet,
        MNIST,
        batch_size=128,
        targets={"train_loss": 0.05, "test_accuracy": 0.98},
    ),
    "mnist-autoencoder": Ready(
        "MNIST 28 x 28",
        "autoencoder 784-1000-500-250-30 and back with ReLU and Bernoulli likelihood, 2,837,314 parameters",
        (60_000, 10_000),
        networks.mnist_autoencoder,
        MNIST,
        likelihood="bernoulli",
        batch_size=1000,
        targets={"train_loss": 70.0},
    ),
    "cifar-vgg": Ready(
        "CIFAR-10 32 x 32",
        "six convolutions and two dense layers with ReLU and no normalisation, 550,570 parameters",
        (50_000, 10_000),
        networks.cifar_vgg,
        CIFAR10,
        batch_size=128,
    ),
    "cifar-resnet": Ready(
        "CIFAR-10 32 x 32",
        "ResNet-20 with batch normalisation, 269,722 parameters",
        (50_000, 10_000),
        networks.cifar_resnet,
        CIFAR10,
        batch_size=128,
    ),
}
