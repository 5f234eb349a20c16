"""Small files in the original formats of the image data sets, written from the descriptions of their authors."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np


def labels_and_images(count: int, shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels 0..9 in turn, and random images."""
    generator = np.random.default_rng(seed)
    return np.arange(count) % 10, generator.integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    """An array of bytes as an idx file."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_idx_set(folder: Path, num_train: int = 40, num_test: int = 20, packed: bool = True) -> dict[str, np.ndarray]:
    """The four files of MNIST or Fashion-MNIST; returns what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", num_train), ("t10k", num_test)):
        labels, images = labels_and_images(count, (28, 28), seed=count)
        arrays |= {f"{part}-labels-idx1-ubyte": labels, f"{part}-images-idx3-ubyte": images}
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array), compresslevel=1))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def cifar_record_file(labels: np.ndarray, images: np.ndarray) -> bytes:
    """CIFAR-10's binary version: for each image its label and 3 x 32 x 32 bytes."""
    return b"".join(bytes([label]) + image.tobytes() for label, image in zip(labels, images, strict=True))


def text(value: bytes) -> bytes:
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)


def array_stream(shape: tuple[int, ...], raw: bytes, dtype: bytes = b"u1") -> bytes:
    """What Python 2 wrote about a numpy array."""
    made = b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85q\x09U\x01bq\x0a\x87q\x0bRq\x0c"
    kind = b"cnumpy\ndtype\nq\x0d" + text(dtype) + b"q\x0eK\x00K\x01\x87q\x0fRq\x10"
    kind += b"(K\x03U\x01|q\x11NNN" + number(-1) + number(-1) + b"K\x00tq\x12b"
    size = b"".join(map(number, shape)) + (b"\x86" if len(shape) == 2 else b"\x85") + b"q\x13"
    return made + b"(K\x01" + size + kind + b"\x89" + text(raw) + b"q\x14tq\x15b"


def cifar_stream_file(labels: np.ndarray, images: np.ndarray) -> bytes:
    """CIFAR-10's python version, in the instructions that Python 2 wrote: a dict of four entries."""
    stream = b"\x80\x02}q\x01(" + text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5") + b"q\x03"
    stream += text(b"labels") + b"q\x04]q\x05(" + b"".join(number(int(label)) for label in labels) + b"e"
    stream += text(b"data") + b"q\x06" + array_stream((len(images), 3072), images.tobytes())
    stream += (
        text(b"filenames") + b"q\x16]q\x17(" + text(b"a.png") + b"r\x00\x01\x00\x00" + b"j\x00\x01\x00\x00" + b"eu."
    )
    return stream


def write_cifar_batches(folder: Path, make, suffix: str, count: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Six files of one version of CIFAR-10; returns labels and images of the training half."""
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{k}{suffix}" for k in range(1, 6)), f"test_batch{suffix}"]
    halves = [labels_and_images(count, (3, 32, 32), seed=k) for k in range(6)]
    for name, (labels, images) in zip(names, halves, strict=True):
        (folder / name).write_bytes(make(labels, images))
    return np.concatenate([half[0] for half in halves[:5]]), np.concatenate([half[1] for half in halves[:5]])


def jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """An image (32, 32, 3) as a JPEG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def smooth_images(count: int, seed: int) -> np.ndarray:
    """Images (N, 32, 32, 3) of slow waves, which JPEG keeps within a few grey levels."""
    phase = np.random.default_rng(seed).uniform(0, 6, (count, 1, 1, 3))
    row, column = np.mgrid[:32, :32][:, None, :, :, None] / 16
    return (127 + 100 * np.sin(row + phase) * np.cos(column - phase)).astype(np.uint8)


def write_jpeg_archive(folder: Path, num_train: int = 30, num_test: int = 20) -> dict[str, np.ndarray]:
    """Both halves as JPEG files laid end to end; returns the images that went in."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays, images = {}, {}
    for part, count in (("train", num_train), ("test", num_test)):
        images[part] = smooth_images(count, seed=count)
        files = [jpeg(image) for image in images[part]]
        arrays[f"jpeg_{part}"] = np.frombuffer(b"".join(files), np.uint8)
        arrays[f"offset_{part}"] = np.cumsum([0, *map(len, files)])
        arrays[f"y_{part}"] = (np.arange(count) % 10).astype(np.uint8)
    np.savez(folder / "cifar10_jpegbytes.npz", **arrays)
    return images
