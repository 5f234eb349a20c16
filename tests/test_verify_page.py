"""The picture of the claims, the command, the section of the report, and the page of findings."""

# ruff: noqa: F811 - fixtures are imported, and then named as arguments
from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import xarray as xr
from plot_samples import figures  # noqa: F401 - the fixture acts by its presence

mpl.use("Agg")

from test_verify import MINE, line, tiny, truth  # noqa: F401 - fixtures act by their names

import fisherlens as fl
from fisherlens import plots
from fisherlens.errors import InputError

# --- the picture -----------------------------------------------------------------------------------------------------


def test_picture_tells_states_apart_without_colour(truth):
    from matplotlib.figure import Figure

    made = truth.copy(deep=True)
    made["holds"].values[:2] = False
    made["decided"].values[1] = False
    before = made.copy(deep=True)
    figure = Figure(layout="constrained", figsize=(9, 8))
    ax = figure.subplots()
    assert plots.verification(made, ax) is ax
    figure.draw_without_rendering()
    xr.testing.assert_identical(made, before)
    count = made.sizes["claim"]
    assert [text.get_text() for text in ax.get_legend().get_texts()][:4] == [
        "range in which the claim holds",
        f"holds ({count - 2})",
        "fails (1)",
        "undecided (1)",
    ]
    assert len({container.lines[0].get_marker() for container in ax.containers if hasattr(container, "lines")}) == 3
    assert {text.get_text() for text in ax.texts} >= {"predicted", "measured"}
    assert any(text.get_text().endswith(" nat") for text in ax.texts)
    plain = plots.verification(
        made, Figure().subplots(), show_range=False, show_seeds=False, show_numbers=False, legend=False
    )
    assert not plain.texts
    assert plain.get_legend() is None
    with pytest.raises(InputError, match=r"reads the variable 'holds', as fl\.verify returns it"):
        plots.verification(made.drop_vars("holds"))


# --- the command and the report ----------------------------------------------------------------------------------------


def command(*arguments):
    from fisherlens.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["verify", *map(str, arguments)])
    return ended.value.code


def test_command_prints_a_table_and_writes_both_files(tmp_path, capsys):
    out = tmp_path / "out"
    assert command("linear-gaussian", "--claims", "metric,one_step", "--seeds", 2, "--num-train", 40, "--out", out) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[0] == "linear-gaussian, means over 2 seeds ± standard error:"
    top = next(line for line in lines if line.startswith("metric/top"))
    assert top.split()[-6:] == ["nat", "=", "within", "1", "%", "holds"]
    assert "one_step/order" in printed.out
    assert "14 of 14 claims hold." in lines
    assert printed.err == ""
    found = fl.load(out / "verify.nc")
    assert found.sizes["seed"] == 2
    assert (out / "verification.png").read_bytes().startswith(b"\x89PNG")


def test_command_reports_failures_with_exit_code_0_and_bad_input_with_2(tmp_path, capsys):
    assert command("linear-gaussian", "--claims", "metric", "--kind", "empirical", "--seeds", 1, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "FAILS" in printed
    assert "one seed: no uncertainty" in printed
    assert command("linear-gaussian", "--claims", "metrics", "--out", tmp_path / "new") == 2
    assert "Unknown claim 'metrics'. Did you mean 'metric'?" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert command("digits", "--out", tmp_path / "new") == 2


def test_section_of_the_report_says_what_failed(truth):
    from fisherlens.report.sections.verification import verification
    from fisherlens.report.sections.view import View

    def section(result):
        nodes = {"/": xr.Dataset(attrs={"trained": "yes"})} | ({} if result is None else {"/verify": result})
        return verification(View(xr.DataTree.from_dict(nodes), {}))

    assert section(truth).headline == f"**All {truth.sizes['claim']} claims hold.**"
    made = truth.copy(deep=True)
    made["holds"].values[:2] = False
    made["decided"].values[1] = False
    found = section(made)
    names = made.claim.values.tolist()
    assert found.headline == (
        f"**{truth.sizes['claim'] - 2} of {truth.sizes['claim']} claims hold.** `{names[0]}` fails. `{names[1]}` is undecided."
    )
    assert "FAILS" in "".join(found.body)
    assert section(None).headline == "The claims of the analysis were not checked."


# --- the page of findings ----------------------------------------------------------------------------------------------


def test_page_of_findings_is_written_from_files_and_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    path = Path(__file__).resolve().parents[1] / "docs" / "findings" / "verification.py"
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("findings_verification", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PROBLEMS", {"linear-gaussian": "straight line", "fashion-mlp": "other"})
    monkeypatch.delenv("FISHERLENS_DATA", raising=False)
    given = ["--claims", "metric", "one_step", "--seeds", "2", "--out", str(tmp_path)]
    module.main(given)
    page = (tmp_path / "verification.md").read_text(encoding="utf-8")
    assert "- **straight line**: 14 of 14 claims hold." in page
    assert "**not yet run**: `python docs/findings/verification.py --problems fashion-mlp`" in page
    assert "fashion-mlp: left out." in capsys.readouterr().out
    for name in ("verification-linear-gaussian.png", "verification-linear-gaussian-metric.png"):
        assert f"]({name})" in page
        assert (tmp_path / name).exists()
    found = fl.load(tmp_path / "data" / "verification" / "linear-gaussian-metric.nc")
    assert f"{float(found.measured.sel(claim='metric/top')):.3g} nat" in page

    def again(*arguments, **options):
        raise AssertionError

    monkeypatch.setattr(fl, "verify", again)
    module.main(given)  # everything is there
    with pytest.raises(AssertionError):
        module.main([*given[:-2], "--full", "--out", str(tmp_path)])  # made with other settings
