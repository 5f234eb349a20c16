"""Readers of the original formats, on small files that are written here, and on the real ones where they are."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickletools
import re
import struct
import threading
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

from fisherlens.errors import FileFormatError, InputError
from fisherlens.training import checksums, datasets, folder, formats, problem, problems
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


# --- the folder -------------------------------------------------------------------------------------------------------

HOME = "https://github.com/zalandoresearch/fashion-mnist (Xiao, Rasul, Vollgraf)"


def test_without_a_folder_the_message_says_what_to_set(data):
    expected = (
        "Fashion-MNIST is read from a data folder, and none is named. Set the environment variable FISHERLENS_DATA, or give data_dir= "
        "(--data-dir on the command line), to a folder that holds fashion-mnist/train-images-idx3-ubyte. The data set comes from "
        f"{HOME}."
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        problem("fashion-mlp")


def test_a_missing_file_is_named_with_folder_and_origin(data, monkeypatch):
    write_idx_set(data / "fashion-mnist")
    (data / "fashion-mnist" / "t10k-labels-idx1-ubyte.gz").unlink()
    expected = (
        f"Fashion-MNIST is not in the data folder {data} (FISHERLENS_DATA): there is no t10k-labels-idx1-ubyte or "
        f"t10k-labels-idx1-ubyte.gz in {data / 'fashion-mnist'} or {data / 'FashionMNIST/raw'}. It comes from {HOME}: put "
        "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte there as they come, or name "
        "another folder with data_dir=, --data-dir or the environment variable FISHERLENS_DATA."
    )
    monkeypatch.setenv("FISHERLENS_DATA", str(data))
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        problem("fashion-mlp")
    with pytest.raises(
        InputError, match=re.escape(f"MNIST is not in the data folder {data} (data_dir): there is no train-i")
    ):
        problem("mnist-lenet", data_dir=data)
    expected = (
        f"The data folder {data / 'nowhere'} (data_dir) is no folder. Name one that exists; CIFAR-10 is looked for in its subfolder "
        "cifar10/cifar-10-batches-bin."
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        problem("cifar-vgg", data_dir=data / "nowhere")


def test_a_form_that_is_begun_is_not_passed_over(data):
    write_jpeg_archive(data / "cifar10")
    (data / "cifar10" / "cifar-10-batches-bin").mkdir()
    (data / "cifar10" / "cifar-10-batches-bin" / "data_batch_1.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"there is no data_batch_2\.bin or data_batch_2\.bin\.gz in"):
        problem("cifar-vgg", data_dir=data, verify=False)
    assert "JPEG" in problem("cifar-vgg", data_dir=data, verify=False, version="jpeg").description
    with pytest.raises(
        InputError, match=r"^Unknown version of CIFAR-10 'jpg'\. Did you mean 'jpeg'\? Known: 'binary', "
    ):
        problem("cifar-vgg", data_dir=data, version="jpg")


@pytest.mark.parametrize("place", ["FashionMNIST/raw", "fashion-mnist"])
def test_folders_of_torchvision_and_the_folder_itself(data, place):
    write_idx_set(data / place)
    for root in (data, data / Path(place).parts[0], str(data)):
        assert len(problem("fashion-mlp", data_dir=root, verify=False).train[0]) == 40


def test_a_wrong_checksum_is_refused_and_the_right_one_accepted(data, monkeypatch):
    arrays = write_idx_set(data / "mnist")
    name = "train-images-idx3-ubyte"
    got = hashlib.sha256(idx(arrays[name])).hexdigest()
    expected = (
        f"{data / 'mnist' / name}.gz: the sha256 of its content is {got}, but that of {name} of MNIST is "
        f"{checksums.CHECKSUMS['MNIST'][name][1]}. It is damaged, or another data set under the same name. Get it again from "
        "http://yann.lecun.com/exdb/mnist/ (LeCun, Cortes, Burges); for data of your own in this format pass verify=False."
    )
    with pytest.raises(FileFormatError, match=f"^{re.escape(expected)}$"):
        problem("mnist-lenet", data_dir=data)
    own = {file: ("sha256", hashlib.sha256(idx(array)).hexdigest()) for file, array in arrays.items()}
    monkeypatch.setitem(checksums.CHECKSUMS, "MNIST", own)
    assert len(problem("mnist-lenet", data_dir=data).train[0]) == 40


def test_checksums_are_on_record_for_every_file():
    lengths = {"sha256": 64, "sha1": 40, "md5": 32}
    for known in (datasets.MNIST, datasets.FASHION_MNIST, datasets.CIFAR10):
        files = [file for form in known.forms for file in form.files]
        assert sorted(files) == sorted(checksums.CHECKSUMS[known.name])
        for algorithm, digest in checksums.CHECKSUMS[known.name].values():
            assert re.fullmatch(f"[0-9a-f]{{{lengths[algorithm]}}}", digest)


def test_files_are_read_once_and_again_when_they_change(data, monkeypatch):
    write_idx_set(data / "mnist")
    reads = []
    ordinary = folder.read_bytes
    monkeypatch.setattr(folder, "read_bytes", lambda path: reads.append(path.name) or ordinary(path))
    threads = [
        threading.Thread(target=problem, args=("mnist-lenet",), kwargs={"data_dir": data, "verify": False})
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 4
    first = problem("mnist-lenet", data_dir=data, verify=False)
    first.train[0].fill_(7)  # nobody can spoil what is kept
    assert problem("mnist-autoencoder", data_dir=data, verify=False).train[0].max() == 1
    assert len(reads) == 4
    write_idx_set(data / "mnist", num_train=50)
    assert len(problem("mnist-lenet", data_dir=data, verify=False).train[0]) == 50
    assert len(reads) == 8


def test_the_list_says_what_is_not_here(data, monkeypatch):
    listed = problems()
    assert list(listed.missing) == [
        "fashion-mlp",
        "fashion-cnn",
        "mnist-lenet",
        "mnist-autoencoder",
        "cifar-vgg",
        "cifar-resnet",
    ]
    assert listed.missing["mnist-lenet"].startswith("MNIST is read from a data folder, and none is named.")
    write_idx_set(data / "mnist")
    listed = problems(data_dir=data)
    assert list(listed.missing) == ["fashion-mlp", "fashion-cnn", "cifar-vgg", "cifar-resnet"]
    rows = {row.split()[0]: row for row in str(listed).splitlines()}
    assert list(rows) == list(listed)
    assert rows["mnist-lenet"].split()[1] == "ready"
    assert re.search(r"^cifar-vgg +not here  CIFAR-10 32 x 32, 50,000", rows["cifar-vgg"])
    reasons = listed.reasons()
    assert [reason.split(":")[0] for reason in reasons] == ["fashion-mlp, fashion-cnn", "cifar-vgg, cifar-resnet"]
    write_jpeg_archive(data / "cifar10")
    assert problems(data_dir=data)["cifar-vgg"].startswith(
        "CIFAR-10 (JPEG q75) 32 x 32, 50,000 to train on and 10,000 "
    )
    (data / "cifar10" / "cifar10_jpegbytes.npz").rename(data / "cifar10" / "cifar10_lossless_first4000.npz")
    few = problems(data_dir=data)["cifar-resnet"]
    assert few.startswith("CIFAR-10 (first 4,000 training images) 32 x 32, 3,500 to train on and 500 to test: ")
    (data / "cifar10" / "cifar10_lossless_first4000.npz").unlink()
    monkeypatch.setenv("FISHERLENS_DATA", str(data))
    assert problems().missing == {
        name: why.replace("(data_dir)", "(FISHERLENS_DATA)") for name, why in listed.missing.items()
    }


# --- subsets ----------------------------------------------------------------------------------------------------------


def test_subsets_are_balanced_nested_and_always_the_same():
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(4), [3, 50, 20, 27]))
    assert np.array_equal(balanced(labels, 100), np.arange(100))
    assert np.bincount(labels[balanced(labels, 12)]).tolist() == [3, 3, 3, 3]
    assert np.bincount(labels[balanced(labels, 43)]).tolist() == [
        3,
        14,
        13,
        13,
    ]  # all of the rare class, and as equal as can be
    previous = set()
    for count in range(1, 101):
        taken = balanced(labels, count)
        assert len(taken) == count
        assert np.array_equal(taken, np.sort(taken))
        assert previous < set(taken.tolist())
        previous = set(taken.tolist())
    first = balanced(labels, 40)
    assert np.array_equal(first, balanced(labels, 40))
    assert not np.array_equal(first, np.arange(40))


# --- the real files ---------------------------------------------------------------------------------------------------

REAL = os.environ.get("FISHERLENS_DATA", "")


@pytest.mark.parametrize(
    ("name", "first_labels", "per_class"),
    [
        ("mnist-lenet", [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("fashion-mlp", [9, 0, 0, 3, 0, 2, 7, 2, 5, 5], [6000] * 10),
    ],
)
def test_the_real_idx_files(name, first_labels, per_class):
    if name in problems(data_dir=REAL).missing:
        pytest.skip(f"FISHERLENS_DATA does not hold the data of {name}")
    known = {"mnist-lenet": datasets.MNIST, "fashion-mlp": datasets.FASHION_MNIST}[name]
    _, train, test = folder.load(known, REAL)
    assert (len(train.labels), len(test.labels)) == (60_000, 10_000)
    assert train.labels[:10].tolist() == first_labels
    assert np.bincount(train.labels).tolist() == per_class
    levels = np.bincount(train.pixels(slice(None)).ravel(), minlength=256) / (60_000 * 28 * 28)
    grey = np.arange(256) / 255
    mean = levels @ grey  # the mean and deviation on record are those of these images
    assert (round(mean, 4), round((levels @ (grey - mean) ** 2) ** 0.5, 4)) == (known.mean[0], known.std[0])
    assert problem(name, data_dir=REAL).description == problems(data_dir=REAL)[name]
    few = problem(name, data_dir=REAL, num_train=200, num_test=100)
    assert few.train[1].bincount().tolist() == [20] * 10
    assert few.test[1].bincount().tolist() == [10] * 10


@pytest.mark.parametrize(
    ("version", "size"), [("binary", 50_000), ("python", 50_000), ("jpeg", 50_000), ("lossless-4000", 3500)]
)
def test_the_real_cifar_files(version, size):
    try:
        folder.find(datasets.CIFAR10, REAL, version)
    except InputError:
        pytest.skip(f"FISHERLENS_DATA does not hold CIFAR-10 in the form {version!r}")
    found = problem("cifar-vgg", data_dir=REAL, version=version, num_train=400, num_test=100)
    assert found.train[1].bincount().tolist() == [40] * 10
    assert found.test[1].bincount().tolist() == [10] * 10
    assert found.train[0].mean((0, 2, 3)).abs().max() < 0.15
    assert (found.train[0].std((0, 2, 3)) - 1).abs().max() < 0.1
    with pytest.raises(InputError, match=rf"^num_train must be at most {size:,}, the train examples of CIFAR-10"):
        problem("cifar-vgg", data_dir=REAL, version=version, num_train=50_001)
