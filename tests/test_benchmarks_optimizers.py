"""The benchmark of the optimizers' steps runs, on something tiny, and amortises as it says. No times are asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fisherlens import optim

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture
def entrants(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import optimizer_entrants

    return optimizer_entrants


def test_smoke_run_times_every_method(tmp_path, entrants, monkeypatch, capsys):
    import optimizer_steps

    figures, section = tmp_path / "figures.json", tmp_path / "section.md"
    options = ["--smoke", "--no-peaks", "--json", figures, "--markdown", section]
    monkeypatch.setattr(sys, "argv", ["optimizer_steps.py", *map(str, options)])
    monkeypatch.setattr(optimizer_steps, "full_float32", lambda: None)  # a global setting, of no matter here
    optimizer_steps.main()
    assert "a step of SGD with momentum takes" in capsys.readouterr().out
    [run] = json.loads(figures.read_text())["runs"]
    assert run["sgd_seconds"] > 0
    methods = run["methods"]
    assert set(methods) == set(entrants.ENTRANTS) - {entrants.SGD}
    for name, found in methods.items():
        if name in entrants.PEERS and "note" in found:
            continue
        assert "note" not in found, (name, found)
        rates = entrants.ENTRANTS[name].rates("conv")
        assert [tuple(row["rate"]) for row in found["rates"]] == list(rates)
        for row in found["rates"]:
            assert 0 < row["low"] <= row["ratio"] <= row["high"], name
        assert found["events"] == {}, name
        assert all(one["steps"] >= 3 for one in found["kinds"].values()), name
    kinds = {
        name: set(methods[name]["kinds"]) for name in ("KFAC", "TENGraD", "CWNGD", "Shampoo", "FNGD, after epoch 1")
    }
    assert kinds == {
        "KFAC": {"plain", "statistics", "inverses"},
        "TENGraD": {"plain", "inverses"},
        "CWNGD": {"inverses"},
        "Shampoo": {"statistics", "inverses"},
        "FNGD, after epoch 1": {"plain"},
    }
    assert methods["CWNGD"]["kept"] > 4 * 418
    text = section.read_text()
    assert text.startswith("## Steps of the optimizers, on a CPU")
    assert "| KFAC " in text


def test_every_method_of_the_package_takes_part(entrants):
    named = {name.split(",")[0].replace("-", "") for name in entrants.ENTRANTS}
    assert set(optim.__all__) <= named


@pytest.mark.parametrize(
    ("rate", "mean"), [((1, 1), 9.0), ((1, 5), 4.2), ((20, 100), 1.16), ((100, 100), 1.08), ((0, 0), 1.0)]
)
def test_amortised_is_the_mean_over_a_period(entrants, rate, mean):
    kinds = {"plain": 1.0, "statistics": 3.0, "inverses": 9.0}
    assert entrants.amortised(kinds, rate) == pytest.approx(mean)
    if rate[0]:  # the same, step by step
        steps = [kinds[entrants.kind_of_step(number, rate)] for number in range(3 * rate[1])]
        assert sum(steps) / len(steps) == pytest.approx(mean)


@pytest.mark.filterwarnings("ignore::fisherlens.errors.NumericalWarning")  # of BatchNorm, which they do not cover
@pytest.mark.parametrize("name", ["KFAC", "TENGraD", "MBF"])
def test_kinds_of_steps_are_those_that_the_optimizer_makes(entrants, name):
    from optimizer_tasks import Task

    task = Task("tiny", 8, torch.device("cpu"))
    entrant = entrants.ENTRANTS[name]
    cycle = entrant.cycle("conv")
    subject = entrant.make(task, *cycle)
    before = [p.clone() for p in subject.model.parameters()]
    for number in range(2 * cycle[1]):
        taken = subject.optimizer.diagnostics["refreshes"]
        subject.step()
        taken = subject.optimizer.diagnostics["refreshes"] - taken
        assert taken == (entrants.kind_of_step(number, cycle) != "plain")
    assert not all(torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True))
    subject.restore()
    assert all(torch.equal(a, b) for a, b in zip(before, subject.model.parameters(), strict=True))


def test_peaks_grow_with_what_is_kept(entrants):
    import optimizer_peaks

    found = {name: optimizer_peaks.here("tiny", 512, name, "cpu")["peak"] for name in (entrants.SGD, "NGD")}
    assert 0 < found[entrants.SGD] < found["NGD"] - 512 * 512 * 4, "NGD holds a 512 x 512 kernel in float64"


def test_runs_are_the_usual_ones_or_what_was_asked_for(entrants):
    from argparse import Namespace

    from optimizer_steps import runs_of

    def runs(device="cpu", networks=None, batch=None):
        return runs_of(Namespace(device=device, networks=networks, batch=batch))

    assert runs() == [("lenet", 128), ("conv6", 128), ("autoencoder", 128), ("lenet", 1024)]
    assert ("vgg16", 1024) in runs("cuda")
    assert runs(networks=["conv6", "tiny"]) == [("conv6", 128), ("tiny", 16)]
    assert runs(batch=[32, 64])[:3] == [("lenet", 32), ("lenet", 64), ("conv6", 32)]


def test_a_run_whose_time_is_over_begins_nothing(entrants, monkeypatch, capsys, tmp_path):
    import optimizer_steps

    figures = tmp_path / "figures.json"
    options = ["--smoke", "--limit", "1e-9", "--json", figures, "--methods", "KFAC", "MBF"]
    monkeypatch.setattr(sys, "argv", ["optimizer_steps.py", *map(str, options)])
    monkeypatch.setattr(optimizer_steps, "full_float32", lambda: None)
    optimizer_steps.main()
    [run] = json.loads(figures.read_text())["runs"]
    assert {found["note"] for found in run["methods"].values()} == {
        "not begun, as the time of the run was over (--limit)"
    }
    assert "MBF: not begun, as the time of the run was over (--limit)." in capsys.readouterr().out
