"""The data folder: what is found there, what is told where it is missing or wrong, subsets, and the real files."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from dataset_files import idx, write_idx_set, write_jpeg_archive

from fisherlens.errors import FileFormatError, InputError
from fisherlens.training import checksums, datasets, folder, problem, problems
from fisherlens.training.subsets import balanced


@pytest.fixture
def data(tmp_path, monkeypatch):
    """An empty data folder, named by nothing, and no data from other tests in memory."""
    monkeypatch.delenv("FISHERLENS_DATA", raising=False)
    folder._load.cache_clear()
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


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
