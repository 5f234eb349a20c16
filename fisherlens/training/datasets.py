"""The data sets behind the ready problems: scikit-learn's digits, and MNIST, Fashion-MNIST and CIFAR-10 in a data folder."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fisherlens.training import formats
from fisherlens.training.batches import read_cifar_python
from fisherlens.training.folder import DataSet, Files, Form, Part
from fisherlens.training.subsets import balanced


def _read_idx(files: Files) -> tuple[Part, Part]:
    train, test = (
        Part(labels, images.__getitem__)
        for labels, images in (
            formats.read_idx_pair(files[f"{part}-images-idx3-ubyte"], files[f"{part}-labels-idx1-ubyte"])
            for part in ("train", "t10k")
        )
    )
    return train, test


def _read_batches(reader: Callable[[bytes, Path], tuple[np.ndarray, np.ndarray]], files: Files) -> tuple[Part, Part]:
    *train, (test_labels, test_images) = [reader(content, path) for content, path in files.values()]
    labels, images = (np.concatenate(arrays) for arrays in zip(*train, strict=True))
    return Part(labels, images.__getitem__), Part(test_labels, test_images.__getitem__)


def _read_lossless(files: Files) -> tuple[Part, Part]:
    ((content, path),) = files.values()
    arrays = formats.read_npz(content, path, {"x_train": ("uint8", 4), "y_train": ("integer", 1)})
    images = arrays["x_train"].transpose(0, 3, 1, 2)
    if images.shape[1:] != (3, 32, 32) or len(images) != len(arrays["y_train"]) or len(images) < 8:
        what = f"expected images (N, 32, 32, 3) and N >= 8 labels; got {arrays['x_train'].shape} and {len(arrays['y_train'])}"
        raise formats.wrong(path, 0, what)
    labels = formats.check_labels(arrays["y_train"], path, first=0, stride=0)
    test = balanced(labels, len(labels) // 8)  # there is no test half: every eighth example serves as one
    train = np.setdiff1d(np.arange(len(labels)), test)
    return Part(labels[train], images[train].__getitem__), Part(labels[test], images[test].__getitem__)


class _Jpegs:
    """Images kept as JPEG, each decoded when it is first asked for."""

    def __init__(self, path: Path, encoded: np.ndarray, offsets: np.ndarray):
        self.path, self.encoded, self.offsets = path, encoded, offsets
        self.decoded = np.zeros((len(offsets) - 1, 3, 32, 32), np.uint8)
        self.done = np.zeros(len(self.decoded), np.bool_)
        self.lock = threading.Lock()

    def pixels(self, index: np.ndarray) -> np.ndarray:
        with self.lock:
            wanted = index[~self.done[index]]
            formats.decode_jpegs(self.path, self.encoded, self.offsets, wanted, self.decoded)
            self.done[wanted] = True
            return self.decoded[index]


def _read_jpegs(files: Files) -> tuple[Part, Part]:
    ((content, path),) = files.values()
    names = {"jpeg_": ("uint8", 1), "offset_": ("integer", 1), "y_": ("integer", 1)}
    wanted = {f"{name}{part}": form for part in ("train", "test") for name, form in names.items()}
    arrays = formats.read_npz(content, path, wanted)
    parts = []
    for part in ("train", "test"):
        labels = formats.check_labels(arrays[f"y_{part}"], path, first=0, stride=0)
        encoded = arrays[f"jpeg_{part}"]
        offsets = formats.check_offsets(arrays[f"offset_{part}"], len(labels), len(encoded), path)
        parts.append(Part(labels, _Jpegs(path, encoded, offsets).pixels))
    return parts[0], parts[1]


_IDX_FILES = tuple(f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
_BATCHES = (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch")


def _idx(name: str, home: str, folders: tuple[str, ...], mean: float, std: float) -> DataSet:
    return DataSet(name, home, (Form("idx", name, folders, _IDX_FILES, _read_idx),), (mean,), (std,))


# Mean and deviation are those of the training images, grey levels in 0..1, rounded to four digits. The folders that follow the
# first are those in which torchvision keeps the same files.
MNIST = _idx(
    "MNIST",
    "http://yann.lecun.com/exdb/mnist/ (LeCun, Cortes, Burges)",
    ("mnist", "MNIST/raw"),
    0.1307,
    0.3081,
)
FASHION_MNIST = _idx(
    "Fashion-MNIST",
    "https://github.com/zalandoresearch/fashion-mnist (Xiao, Rasul, Vollgraf)",
    ("fashion-mnist", "FashionMNIST/raw"),
    0.2860,
    0.3530,
)
CIFAR10 = DataSet(
    "CIFAR-10",
    "https://www.cs.toronto.edu/~kriz/cifar.html (Krizhevsky)",
    (
        Form(
            "binary",
            "CIFAR-10",
            ("cifar10/cifar-10-batches-bin", "cifar-10-batches-bin"),
            tuple(f"{batch}.bin" for batch in _BATCHES),
            functools.partial(_read_batches, formats.read_cifar_binary),
        ),
        Form(
            "python",
            "CIFAR-10",
            ("cifar10/cifar-10-batches-py", "cifar-10-batches-py"),
            _BATCHES,
            functools.partial(_read_batches, read_cifar_python),
        ),
        Form("jpeg", "CIFAR-10 (JPEG q75)", ("cifar10",), ("cifar10_jpegbytes.npz",), _read_jpegs),
        Form(
            "lossless-4000",
            "CIFAR-10 (first 4,000 training images)",
            ("cifar10",),
            ("cifar10_lossless_first4000.npz",),
            _read_lossless,
            (3500, 500),
        ),
    ),
    (0.4914, 0.4822, 0.4465),
    (0.2470, 0.2435, 0.2616),
)


def as_images(pixels: np.ndarray) -> Tensor:
    """Grey levels 0..255 as float32 in [0, 1]; a new tensor."""
    return torch.tensor(pixels, dtype=torch.float32, device="cpu").div_(255)


def standardised(images: Tensor, data: DataSet) -> Tensor:
    """(x - mean) / std with one mean and deviation per channel, in place."""
    mean, std = (
        torch.tensor(numbers, dtype=torch.float32, device="cpu")[:, None, None] for numbers in (data.mean, data.std)
    )
    return images.sub_(mean).div_(std)


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Load scikit-learn's 1,797 handwritten digits as (train x, test x, train y, test y), always split the same way."""
    state = random.getstate()
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    random.setstate(state)  # something that scikit-learn imports draws a number when it is first imported
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)  # grey levels 0..16 become 0..1, exactly
    return tuple(train_test_split(images, labels, test_size=360, stratify=labels, random_state=0))
