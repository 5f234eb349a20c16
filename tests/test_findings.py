"""The command behind ``docs/findings/cw-ngd.md`` runs on something tiny, goes on after an interruption, and computes what it says."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import fisherlens as fl

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "findings"
MODULES = ("cw_ngd", "cuts", "pairs", "study", "gather", "claims", "figures", "page")
GIVEN = ["--smoke", "--stages", "init", "end", "--out"]
INTERRUPTED = "digits-cnn-0-end.nc"


@pytest.fixture(scope="module")
def command():
    """The command's modules, which find each other as a script's do; gone afterwards."""
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("cw_ngd")
    sys.path[:] = path
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(command, tmp_path_factory):
    """Everything once, tiny."""
    out = tmp_path_factory.mktemp("findings")
    command.main([*GIVEN, str(out)])
    return out


@pytest.fixture(scope="module")
def operator():
    digits = fl.problem("digits-cnn", num_train=20)
    return fl.Fisher(digits.model(0), digits.train, likelihood="categorical", kind="empirical")


def test_page_and_figures_come_out(folder):
    page = (folder / "cw-ngd.md").read_text(encoding="utf-8")
    figures = {path.name for path in folder.glob("*.png")}
    assert figures == {f"cw-ngd-{name}.png" for name in ("step", "energy", "coupling", "training", "width")}
    for figure in figures:
        assert f"]({figure})" in page
    assert "**not yet run**: `python docs/findings/cw_ngd.py --networks cifar-vgg`" in page
    assert "one seed only" in page
    assert "nan" not in page


def test_numbers_of_the_page_are_those_of_the_files(folder):
    page = (folder / "cw-ngd.md").read_text(encoding="utf-8")
    found = fl.load(folder / "data" / INTERRUPTED)["exact"].dataset.sel(layer="all")
    energy = float(found["energy_captured"].sel(cut="cw-ngd"))
    draws = found["energy_captured"].sel(cut=["cw-ngd, random 0", "cw-ngd, random 1"]).values
    assert f"| cw-ngd | {energy:.3f} |" in page
    assert f"| cw-ngd, random | {draws.mean():.3f} |" in page


def test_interrupted_run_goes_on_and_gives_the_same(folder, command, monkeypatch):
    study = sys.modules["study"]
    files = sorted((folder / "data").glob("*.nc"))
    page = (folder / "cw-ngd.md").read_text(encoding="utf-8")
    before = fl.load(folder / "data" / INTERRUPTED)
    untouched = {path: path.stat().st_mtime_ns for path in files if path.name != INTERRUPTED}
    (folder / "data" / INTERRUPTED).unlink()

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(study, "measure", interrupt)
        patch.setattr(command, "write", lambda *_: "not this time")
        with pytest.raises(KeyboardInterrupt):
            command.main([*GIVEN, str(folder)])
    assert sorted((folder / "data").glob("*")) == sorted(untouched)  # nothing half written

    command.main([*GIVEN, str(folder)])
    after = fl.load(folder / "data" / INTERRUPTED)
    for kind in before.children:
        for name, array in before[kind].data_vars.items():
            assert np.array_equal(array.values, after[kind][name].values, equal_nan=True), (kind, name)
    assert {path: path.stat().st_mtime_ns for path in untouched} == untouched
    assert (folder / "cw-ngd.md").read_text(encoding="utf-8") == page


def test_other_settings_are_measured_again(folder, command):
    study = sys.modules["study"]
    plan = study.smoke(study.NETWORKS["digits-cnn"])
    path = study.file_of(folder / "data", "digits-cnn", 0, "end")
    assert study.is_there(path, plan)
    assert study.is_there(path, study.replace(plan, seconds=1.0))
    assert not study.is_there(path, study.replace(plan, examples=7))


@pytest.mark.parametrize("rule", ["cw-ngd", "unit", "input"])
def test_controls_have_the_sizes_of_the_rule(command, operator, rule):
    cuts = sys.modules["cuts"]
    own = cuts.of_rule(operator, rule)
    controls = [cuts.contiguous(operator, rule), cuts.random(operator, rule, 0), cuts.shifted(operator, rule)]
    for part in controls:
        for layer in operator.layout.layer_names:
            assert sorted(part.restrict(layer).sizes) == sorted(own.restrict(layer).sizes)
    assert not np.array_equal(controls[1].flat, cuts.random(operator, rule, 1).flat)


def test_shifted_and_merged_segments_are_halves_and_pairs_of_neighbours(command, operator):
    cuts = sys.modules["cuts"]
    own = cuts.of_rule(operator, "cw-ngd").restrict("conv2").blocks
    moved = cuts.shifted(operator).restrict("conv2").blocks
    assert moved[0].tolist() == [*own[0].tolist()[4:], *own[1].tolist()[:4]]
    assert moved[127].tolist() == [*own[127].tolist()[4:], *own[0].tolist()[:4]]
    pairs = cuts.merged(operator).restrict("conv2").blocks
    assert pairs[0].tolist() == [*own[0].tolist(), *own[1].tolist()]
    assert [len(block) for block in pairs] == [18] * 64 + [16]


def test_relations_count_every_pair_once(command, operator):
    pairs = sys.modules["pairs"]
    found = pairs.coupling_by_relation(operator, seed=0)["num_pairs"].sel(layer="conv2").values[:4]
    alive = fl.coupling(operator.restrict("conv2"), "kernel", num_null=0)["block_norm"].values[:128].reshape(16, 8) > 0
    next_to = (alive[:, 1:] & alive[:, :-1]).sum()
    inside = sum(n * (n - 1) // 2 for n in alive.sum(1))
    across = sum(n * (n - 1) // 2 for n in alive.sum(0))
    total = alive.sum() * (alive.sum() - 1) // 2
    assert found.tolist() == [next_to, inside - next_to, across, total - inside - across]


def test_verdicts_ask_for_an_interval_without_zero(command):
    claims = sys.modules["claims"]

    def verdict(difference, wants="above"):
        return claims.Claim("", "", "", np.array(difference), np.zeros(len(difference)), wants).verdict

    assert verdict([1.0, 1.1, 0.9]) == "supported"
    assert verdict([-1.0, -1.1, -0.9]) == "contradicted"
    assert verdict([1.0, -0.5, 0.2]) == "undecided"
    assert verdict([1.0]) == "one seed only"
    assert verdict([1.0, 1.1, 0.9], "not above") == "contradicted"
    assert verdict([1.0, -0.5, 0.2], "not above") == "not contradicted"
    assert verdict([np.nan, np.nan]) == "does not arise"


def test_smoke_does_not_write_over_the_page(command, capsys):
    with pytest.raises(SystemExit):
        command.main(["--smoke"])
    assert "--smoke would write over the page; give another --out" in capsys.readouterr().err
