"""Problems on the command line: the table, the data folder, and problems of one's own."""

import sys

import pytest
from dataset_files import write_idx_set

import fisherlens as fl
from fisherlens import cli
from fisherlens.training import folder

MINE = """
import torch
from torch import nn

import fisherlens as fl


def wave():
    x = torch.linspace(-3, 3, 40)[:, None]
    make = lambda: nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))
    return fl.Problem("wave", "A sine.", make, (x, x.sin()), (x, x.sin()), fl.Gaussian(0.01))


def number():
    return 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.delenv("FISHERLENS_DATA", raising=False)
    (tmp_path / "my_problems.py").write_text(MINE)
    folder._load.cache_clear()
    yield tmp_path
    sys.modules.pop("my_problems", None)


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    return end.value.code


def test_the_table_and_why_data_are_not_here(here, capsys):
    assert call("problems") == 0
    out, err = capsys.readouterr()
    assert out == f"{fl.problems()}\n"
    assert [row.split()[0] for row in out.splitlines()] == list(fl.problems())
    lines = err.splitlines()
    assert lines[0].startswith(
        "Not here: fashion-mlp, fashion-cnn: Fashion-MNIST is read from a data folder, and none is named."
    )
    assert len(lines) == 3
    write_idx_set(here / "data" / "fashion-mnist")
    assert call("problems", "--data-dir", "data") == 0
    out, err = capsys.readouterr()
    assert dict(row.split()[:2] for row in out.splitlines())["fashion-cnn"] == "ready"
    assert "fashion" not in "".join(line.split(": ")[1] for line in err.splitlines())


def test_a_data_folder_goes_into_a_comparison(here, capsys):
    assert call("compare", "--problem", "mnist-lenet", "--steps", "1", "--out", "o") == 2
    assert "none is named. Set the environment variable FISHERLENS_DATA, or give" in capsys.readouterr().err
    write_idx_set(here / "data" / "mnist")
    assert call("compare", "--problem", "mnist-lenet", "--data-dir", "data", "--steps", "1", "--out", "o") == 2
    err = capsys.readouterr().err
    assert "the sha256 of its content is" in err
    assert len(err.splitlines()) == 1
    assert call("compare", "--data-dir", "nowhere", "--problem", "fashion-cnn") == 2
    assert "nowhere (data_dir) is no folder." in capsys.readouterr().err
    assert not (here / "o").exists()


def test_a_problem_of_ones_own(here, capsys):
    assert call("compare", "--problem", "my_problems:wave", "-o", "sgd=0.001", "--steps", "2", "--seeds", "1") == 0
    assert fl.load(here / "compare" / "compare.nc").attrs["problem"] == "wave"
    capsys.readouterr()
    assert call("compare", "--problem", "my_problems:number") == 2
    expected = "fisherlens: --problem my_problems:number: the function must return a fl.Problem; it returned int. Return fl.Problem(name"
    assert capsys.readouterr().err.startswith(expected)
    assert call("compare", "--problem", "my_problems:wav") == 2
    assert "module 'my_problems' has no 'wav'. Did you mean 'wave'?" in capsys.readouterr().err
    assert call("compare", "--problem", "my_problems:wave", "--data-dir", ".") == 2
    assert "data_dir chooses data of a ready problem, and 'wave' brings its own." in capsys.readouterr().err


def test_a_subset_goes_into_a_comparison(here, capsys):
    options = ("--num-train", "40", "--num-test", "30", "-o", "sgd", "--steps", "2", "--seeds", "1")
    assert call("compare", "--problem", "digits-mlp", *options) == 0
    attrs = fl.load(here / "compare" / "compare.nc").attrs
    assert attrs["n_data"] == 40
    assert '"n_test": 30' in attrs["settings"]
    assert call("compare", "--problem", "digits-mlp", "--num-train", "2000") == 2
    assert "num_train must be at most 1,437, the train examples of the digits; got 2,000." in capsys.readouterr().err


def test_report_takes_both(here, monkeypatch):
    seen = []

    def fake(subject, folder, **options):
        seen.append(subject)
        raise KeyboardInterrupt("told")

    monkeypatch.setattr(sys.modules["fisherlens.report"], "report", fake)
    assert call("report", "--problem", "my_problems:wave") == 130
    assert call("report", "--data-dir", ".") == 130
    assert call("report", "--num-train", "30", "--num-test", "20") == 130
    assert [subject.name for subject in seen] == ["wave", "digits-cnn", "digits-cnn"]
    assert [len(subject.train[0]) for subject in seen] == [40, 1437, 30]
    assert len(seen[-1].test[0]) == 20


def test_a_folder_and_a_model_of_ones_own_exclude_each_other(here, capsys):
    assert call("report", "--model", "a:b", "--data", "a:c", "--likelihood", "categorical", "--data-dir", ".") == 2
    assert capsys.readouterr().err.startswith(
        "fisherlens: --data-dir belongs to a ready problem, which is trained; --model is"
    )
