"""Readers of the original formats, on small files that are written here."""

from __future__ import annotations

import gzip
import pickletools
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import (
    array_stream,
    cifar_record_file,
    cifar_stream_file,
    idx,
    jpeg,
    labels_and_images,
    number,
    smooth_images,
    text,
    write_cifar_batches,
    write_idx_set,
    write_jpeg_archive,
)

from fisherlens.errors import FileFormatError
from fisherlens.training import folder, formats, problem
from fisherlens.training.batches import read_cifar_python
from fisherlens.training.subsets import balanced

HERE = Path("some") / "file"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder, named by nothing, and no data from other tests in memory."""
    monkeypatch.delenv("FISHERLENS_DATA", raising=False)
    folder._load.cache_clear()
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def refuses(text, reader, *arguments, **options):
    with pytest.raises(FileFormatError, match=f"^{re.escape(text)}$"):
        reader(*arguments, **options)


# --- idx --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_are_read_packed_or_not(data, packed):
    arrays = write_idx_set(data / "fashion-mnist", packed=packed)
    found = problem("fashion-cnn", data_dir=data, verify=False)
    (x, y), (test_x, test_y) = found.train, found.test
    assert y.tolist() == arrays["train-labels-idx1-ubyte"].tolist()
    assert test_y.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    for seen, name in ((x, "train-images-idx3-ubyte"), (test_x, "t10k-images-idx3-ubyte")):
        assert seen.dtype == torch.float32
        expected = (torch.from_numpy(arrays[name].astype(np.float64))[:, None] / 255 - 0.2860) / 0.3530
        torch.testing.assert_close(seen.double(), expected, rtol=1e-6, atol=1e-6)
    assert found.description.startswith("Fashion-MNIST 28 x 28, 40 to train on and 20 to test: three conv")
    assert found.targets == {}


def test_autoencoders_get_grey_levels_as_inputs_and_targets(data):
    arrays = write_idx_set(data / "mnist")
    found = problem("mnist-autoencoder", data_dir=data, verify=False)
    grey = torch.from_numpy(arrays["train-images-idx3-ubyte"]) / 255
    assert torch.equal(found.train[0], grey[:, None])
    assert torch.equal(found.train[1], grey.flatten(1))
    assert found.likelihood == "bernoulli"
    assert found.model(0)(found.train[0]).shape == (40, 784)
    found.train[0].zero_()
    assert found.train[1].sum() > 0  # inputs and targets share no memory


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
SMALL = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
GOOD = (idx(SMALL), HERE)
OTHER = "Probably it is another file under this name, or a damaged one."
CUT = "The file is cut short or damaged: get it again."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\x1f\x8b\x08\x00rest",
            f"{HERE}, offset 0: expected the magic number 0x00000803 (unsigned bytes, 3 axes); got 0x1f8b0800. {OTHER}",
        ),
        (b"", f"{HERE}, offset 0: expected the magic number 0x00000803 (unsigned bytes, 3 axes); got 0x. {OTHER}"),
        (
            idx(SMALL.reshape(2, 784)),
            f"{HERE}, offset 0: expected the magic number 0x00000803 (unsigned bytes, 3 axes); got 0x00000802. {OTHER}",
        ),
        (idx(SMALL)[:10], f"{HERE}, offset 10: the file ends within its header of 16 bytes. {CUT}"),
        (
            idx(SMALL)[:-5],
            f"{HERE}, offset 1579: the header promises 1,568 entries (2 x 28 x 28); got 1,563. {CUT}",
        ),
        (
            idx(SMALL) + b"more",
            f"{HERE}, offset 1584: the header promises 1,568 entries (2 x 28 x 28); got 1,572. {CUT}",
        ),
        (
            struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1) + b"x",
            f"{HERE}, offset 17: the header promises {(2**32 - 1) ** 3:,} entries (4294967295 x 4294967295 x 4294967295); "
            f"got 1. {CUT}",
        ),
    ],
    ids=["packed", "empty", "axes", "header", "cut", "longer", "huge"],
)
def test_a_wrong_idx_file_is_named_with_the_place(content, message):
    refuses(message, formats.read_idx, content, HERE, 3)


def test_images_and_labels_must_belong_together():
    labels = np.array([3, 1])
    assert formats.read_idx_pair(GOOD, (idx(labels), HERE))[0].tolist() == [3, 1]
    refuses(
        f"{HERE}, offset 4: expected a label for each of the 2 images in file; got 3. {OTHER}",
        formats.read_idx_pair,
        GOOD,
        (idx(np.array([1, 2, 3])), HERE),
    )
    refuses(
        f"{HERE}, offset 9: expected a label in 0..9; got 10, example 1. {OTHER}",
        formats.read_idx_pair,
        GOOD,
        (idx(np.array([0, 10])), HERE),
    )
    refuses(
        f"{HERE}, offset 8: expected images of 28 x 28; got 28 x 14. {OTHER}",
        formats.read_idx_pair,
        (idx(SMALL[:, :, :14]), HERE),
        (idx(labels), HERE),
    )


def test_damaged_compression_is_named(tmp_path):
    path = tmp_path / "file.gz"
    whole = gzip.compress(np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes())
    path.write_bytes(whole[:-100_000])
    with pytest.raises(
        FileFormatError, match=r"file\.gz cannot be read on from offset \d+ of its unpacked content: Comp"
    ):
        formats.read_bytes(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(
        FileFormatError, match=r"from offset 0 of its unpacked content: Not a gzipped file \(b'no'\)\. "
    ):
        formats.read_bytes(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(FileFormatError, match="The file is damaged or cut short: get it again"):
        formats.read_bytes(path)


def test_a_file_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MOST_BYTES", 2**21)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(bytes(2**23)))
    with pytest.raises(
        FileFormatError, match=r"bomb\.gz unpacks to more than 1 GiB, more than any of the data sets here"
    ):
        formats.read_bytes(path)


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "make", "suffix", "version"),
    [
        ("cifar10/cifar-10-batches-bin", cifar_record_file, ".bin", "binary"),
        ("cifar-10-batches-py", cifar_stream_file, "", "python"),
    ],
)
def test_cifar_batches(data, where, make, suffix, version):
    labels, images = write_cifar_batches(data / where, make, suffix)
    for chosen in (None, version):
        found = problem("cifar-vgg", data_dir=data, verify=False, version=chosen)
        assert found.train[0].shape == (100, 3, 32, 32)
        assert found.test[0].shape == (20, 3, 32, 32)
        assert found.train[1].tolist() == labels.tolist()
        mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
        expected = (torch.from_numpy(images) / 255 - mean[:, None, None]) / std[:, None, None]
        torch.testing.assert_close(found.train[0], expected)
        assert found.description.startswith("CIFAR-10 32 x 32, 100 to train on and 20 to test")


def test_a_wrong_record_file_is_named_with_the_place():
    good = cifar_record_file(*labels_and_images(3, (3, 32, 32), 0))
    message = f"{HERE}, offset 6146: expected records of 3,073 bytes; got 2 of them and 3,072 bytes more. {CUT}"
    refuses(message, formats.read_cifar_binary, good[:-1], HERE)
    empty = f"{HERE}, offset 0: expected records of 3,073 bytes; got 0 of them and 0 bytes more. {CUT}"
    refuses(empty, formats.read_cifar_binary, b"", HERE)
    bad = bytearray(good)
    bad[2 * 3073] = 77
    message = f"{HERE}, offset 6146: expected a label in 0..9; got 77, example 2. {OTHER}"
    refuses(message, formats.read_cifar_binary, bytes(bad), HERE)


STREAM = cifar_stream_file(*labels_and_images(5, (3, 32, 32), 1))


def test_the_stream_of_the_python_version_is_one():
    """The file that is written here is what Python 2's protocol 2 is made of, and holds the same as the binary version."""
    seen = {opcode.code.encode("latin-1") for opcode, _, _ in pickletools.genops(STREAM)}
    assert seen >= {b"}", b"U", b"T", b"K", b"c", b"R", b"b", b"u", b"e", b"t", b"\x86"}
    labels, images = read_cifar_python(STREAM, HERE)
    expected = labels_and_images(5, (3, 32, 32), 1)
    assert labels.tolist() == expected[0].tolist()
    assert np.array_equal(images, expected[1])


def test_every_cut_of_a_stream_is_told():
    labels, images = labels_and_images(1, (3, 32, 32), 1)
    stream = cifar_stream_file(labels, images)
    start = stream.index(images.tobytes())
    for length in [*range(start + 5), *range(start + 3060, len(stream))]:
        with pytest.raises(FileFormatError, match=rf"^{HERE}, offset {length}: the stream ends within an instr"):
            read_cifar_python(stream[:length], HERE)


REMEDY = 'Only files of CIFAR-10\'s "python version" are read here, as its authors made them.'


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (
            b"\x80\x02cposix\nsystem\nU\x04true\x85R.",
            f"{HERE}, offset 2: the stream names 'posix system', which no data file needs; nothing was run. {REMEDY}",
        ),
        (
            b"\x80\x02cnumpy\nload\n.",
            f"{HERE}, offset 2: the stream names 'numpy load', which no data file needs; nothing was run. {REMEDY}",
        ),
        (
            b"\x80\x04\x95\x00.",
            f"{HERE}, offset 2: instruction 0x95 belongs to no such file; nothing was run. {REMEDY}",
        ),
        (b"(ios\nsystem\n.", f"{HERE}, offset 1: instruction 0x69 belongs to no such file; nothing was run. {REMEDY}"),
        (b"\x85.", f"{HERE}, offset 0: instruction 0x85 does not fit what stands before it. {REMEDY}"),
        (b"h\x07.", f"{HERE}, offset 0: instruction 0x68 does not fit what stands before it. {REMEDY}"),
        (b"}K\x01K\x02b.", f"{HERE}, offset 5: instruction 0x62 does not fit what stands before it. {REMEDY}"),
        (b"K\x01)R.", f"{HERE}, offset 3: instruction 0x52 does not fit what stands before it. {REMEDY}"),
        (b"e.", f"{HERE}, offset 0: instruction 0x65 does not fit what stands before it. {REMEDY}"),
    ],
    ids=["system", "other name", "newer", "old way", "no item", "no memo", "no object", "no name", "no mark"],
)
def test_a_hostile_or_other_stream_is_not_run(stream, message):
    refuses(message, read_cifar_python, stream, HERE)


@pytest.mark.parametrize(
    "stream",
    [
        b".".join([b"K\x01", b""]),
        b"}.",
        b"]" + b".",
        STREAM.replace(b"K\x00K\x01K\x02K\x03K\x04e", b"K\x00K\x01K\x02K\x03e"),
        STREAM.replace(b"U\x02u1", b"U\x02f8"),
        STREAM.replace(b"K\x05M\x00\x0c\x86", b"K\x04M\x00\x0c\x86"),
        b"}(" + text(b"labels") + b"](" + number(1) + b"e" + text(b"data") + text(b"x") + b"u.",
        b"}(" + text(b"labels") + b"](Ne" + text(b"data") + array_stream((1, 3072), bytes(3072)) + b"u.",
    ],
    ids=["number", "empty dict", "list", "a label missing", "floats", "rows", "no array", "no label"],
)
def test_a_stream_of_something_else_is_told(stream):
    message = f"{HERE}, offset 0: expected a dict of 'labels' (a list of integers) and 'data' (an array of N x 3,072 bytes). {REMEDY}"
    refuses(message, read_cifar_python, stream, HERE)


def test_bits_that_flip_in_a_stream_never_run_anything():
    generator = np.random.default_rng(3)
    outcomes = {"read": 0, "refused": 0}
    for place in generator.integers(0, len(STREAM), 60).tolist() + list(range(0, 60)):
        changed = bytearray(STREAM)
        changed[place] ^= 1 << int(generator.integers(8))
        try:
            read_cifar_python(bytes(changed), HERE)
            outcomes["read"] += 1
        except FileFormatError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 20
    assert outcomes["read"] > 20  # a changed pixel is a pixel: only the checksum tells


def test_jpeg_archive(data):
    images = write_jpeg_archive(data / "cifar10")
    found = problem("cifar-resnet", data_dir=data, verify=False)
    assert found.description.startswith("CIFAR-10 (JPEG q75) 32 x 32, 30 to train on and 20 to test: ResNet-20")
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    seen = found.train[0] * std[:, None, None] + mean[:, None, None]
    assert (seen - torch.from_numpy(images["train"]).permute(0, 3, 1, 2) / 255).abs().max() < 8 / 255
    few = problem("cifar-resnet", data_dir=data, verify=False, num_train=10, num_test=10)
    assert torch.equal(few.train[0], found.train[0][balanced(found.train[1].numpy(), 10)])


def test_only_the_wanted_images_are_decoded(data, monkeypatch):
    write_jpeg_archive(data / "cifar10")
    decoded = []
    ordinary = formats.decode_jpegs
    monkeypatch.setattr(
        formats,
        "decode_jpegs",
        lambda path, e, o, index, out: decoded.append(len(index)) or ordinary(path, e, o, index, out),
    )
    for count in (10, 20, 10, None):
        problem("cifar-vgg", data_dir=data, verify=False, num_train=count, num_test=10)
    assert decoded == [10, 10, 10, 0, 0, 0, 10, 0]


def test_wrong_jpeg_archives_are_named(data):
    path = data / "cifar10" / "cifar10_jpegbytes.npz"
    write_jpeg_archive(data / "cifar10")
    with np.load(path) as archive:
        good = dict(archive)

    def fails(message, **changes):
        np.savez(path, **{name: array for name, array in (good | changes).items() if array is not None})
        folder._load.cache_clear()
        with pytest.raises(FileFormatError, match=re.escape(message)):
            problem("cifar-vgg", data_dir=data, verify=False)

    fails("offset 0: expected an array 'y_train' in the archive; got 'jpeg_train', 'offset_train', ", y_train=None)
    fails("expected the array 'y_test' of type integer with 1 axes; got float64 of shape (20,)", y_test=np.zeros(20))
    fails("expected 21 rising offsets from 0 to", offset_test=good["offset_test"][:-1])
    fails("expected 31 rising offsets from 0 to", offset_train=good["offset_train"][::-1])
    fails("expected a label in 0..9; got 10, example 3.", y_test=np.array([0, 1, 2, 10, *range(16)]))
    broken = good["jpeg_train"].copy()
    start = int(good["offset_train"][4])
    broken[start : start + 50] = 0
    fails(f"offset {start}: image 4 is no JPEG that can be decoded (cannot identify", jpeg_train=broken)
    large = jpeg(np.zeros((16, 16, 3), np.uint8))
    files = [
        bytes(good["jpeg_test"][a:b]) for a, b in zip(good["offset_test"][:-1], good["offset_test"][1:], strict=True)
    ]
    files[0] = large
    moved = {"jpeg_test": np.frombuffer(b"".join(files), np.uint8), "offset_test": np.cumsum([0, *map(len, files)])}
    fails("offset 0: image 0 is no JPEG that can be decoded (its size is 16 x 16, not 32 x 32)", **moved)
    fails(
        "cannot be read on from offset 0 of its npz archive: Object arrays cannot be loaded",
        y_test=np.array([{}, []], object),
    )
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(FileFormatError, match="from offset 0 of its npz archive: File is not a zip file"):
        problem("cifar-vgg", data_dir=data, verify=False)
    path.write_bytes(b"\x93NUMPY something")
    with pytest.raises(
        FileFormatError, match=r"expected an npz archive, which begins with 0x504b0304; got 0x934e554d\. "
    ):
        problem("cifar-vgg", data_dir=data, verify=False)


def test_lossless_images_give_a_test_half(data):
    folder_ = data / "cifar10"
    folder_.mkdir()
    images = smooth_images(80, 0)
    np.savez(folder_ / "cifar10_lossless_first4000.npz", x_train=images, y_train=(np.arange(80) % 10).astype(np.uint8))
    found = problem("cifar-vgg", data_dir=data, verify=False)
    assert len(found.train[0]) == 70
    assert found.test[1].bincount().tolist() == [1] * 10
    both = torch.cat([found.train[0], found.test[0]])
    assert len(both.flatten(1).unique(dim=0)) == 80
    assert found.description.startswith("CIFAR-10 (first 4,000 training images) 32 x 32, 70 to train on and 10")
    np.savez(folder_ / "cifar10_lossless_first4000.npz", x_train=images[:, :, :16], y_train=np.arange(80) % 10)
    with pytest.raises(
        FileFormatError, match=r"expected images \(N, 32, 32, 3\) and N >= 8 labels; got \(80, 32, 16, 3\)"
    ):
        problem("cifar-vgg", data_dir=data, verify=False)
