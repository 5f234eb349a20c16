"""``fisherlens compare``: every optimizer by name, a search, targets, and going on where it stopped."""

import re

import numpy as np
import pytest
import torch

import fisherlens as fl
from fisherlens import cli, optim
from fisherlens.errors import InputError
from fisherlens.report import race
from fisherlens.training import loop


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        cli.main(["compare", "--problem", "digits-mlp", "--num-train", "60", "--num-test", "20", *arguments])
    return end.value.code


def test_every_method_has_a_name():
    assert {kind for kind, _ in race.OURS.values()} == set(optim.__all__)
    problem = fl.problem("digits-mlp", num_train=60)
    for name in race.NAMES:
        made = race.optimizer(f"{name}=0.25", problem, 16)(problem.model(0))
        assert made.defaults["lr"] == 0.25
        assert type(made).__name__ == (race.TORCH | race.OURS)[name][0]
    make = race.optimizer("fngd", problem, 16)
    assert make.keywords["epoch_steps"] == 4  # of 60 examples
    assert make.keywords["likelihood"] == "categorical"
    words = next(option.help for option in cli.compare.params if option.name == "entries")
    assert set(race.NAMES) <= set(re.findall(r"[\w-]+", words))  # the help names them all


def test_rates_around_that_of_the_entry():
    problem = fl.problem("digits-mlp", num_train=60)
    make = race.optimizer("adam", problem, 16)
    assert race.grid(make, problem, 5) == [1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2]
    assert race.grid(make, problem, 2) == [5.62e-4, 1.78e-3]


def test_search_targets_and_picture(here, capsys):
    arguments = (
        "-o",
        "sgd",
        "-o",
        "kfac=0.03",
        "--steps",
        "6",
        "--seeds",
        "2",
        "--tune",
        "2",
        "--target",
        "train_loss=2",
    )
    assert call(*arguments, "--target", "test_accuracy=1.5", "--record-every", "2") == 0
    out, err = capsys.readouterr()
    found = fl.load(here / "compare" / "compare.nc")
    assert dict(zip(found.target.values, found.target_value.values, strict=True)) == {
        "train_loss": 2,
        "test_accuracy": 1.5,
    }
    np.testing.assert_allclose(found.option_lr, [[0.0562, 0.178], [0.0169, 0.0533]], rtol=1e-2)
    assert "measured every 2 steps" in out
    assert "train_loss ≤ 2" in out
    assert "not reached" in out
    assert "The search, by train loss, at the last step (lower is better):" in out
    assert "at the edge" in out
    assert "is at the edge of the search in lr" in err
    picture = (here / "compare" / "compare.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_it_goes_on_where_it_stopped(here, monkeypatch, capsys):
    arguments = ("-o", "sgd", "-o", "adam", "--steps", "5", "--seeds", "1", "--resume")
    ordinary, calls = loop.mean_loss, []

    def stopping(*given):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return ordinary(*given)

    monkeypatch.setattr(loop, "mean_loss", stopping)
    assert call(*arguments) == 130
    assert "interrupted; what was recorded is saved" in capsys.readouterr().err
    assert call(*arguments) == 0
    assert len(calls) == 8 + 5  # the first run was kept, the second began again
    found = fl.load(here / "compare" / "compare.nc")
    assert found.steps_taken.values.tolist() == [[5], [5]]
    assert call(*arguments, "--batch-size", "16") == 2
    assert "batch_size was 64 and is 16" in capsys.readouterr().err


def test_a_target_that_is_none(here, capsys):
    for text, words in (
        ("train_loss", "There is no '=' in it."),
        ("train_loss=low", "got 'train_loss=low'."),
        ("los=1", "Unknown target 'los'"),
    ):
        assert call("--target", text) == 2
        assert words in capsys.readouterr().err
        assert not (here / "compare").exists()
    assert race.target("test_accuracy=0.9") == ("test_accuracy", 0.9)
    with pytest.raises(InputError, match="--target takes METRIC=NUMBER"):
        race.target("0.9")


def test_it_runs_on_a_device_of_choice(here, capsys):
    assert call("--device", "cpu", "-o", "sgd", "--steps", "1", "--seeds", "1") == 0
    assert fl.load(here / "compare" / "compare.nc").attrs["device"] == "cpu"
    assert call("--device", "gpu") == 2
    assert "Unknown device 'gpu'" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert call("--device", "cuda") == 2
