"""Plots of densities, and of spectra with bounds, over training steps and by block."""

import matplotlib as mpl
import numpy as np
import plot_samples as samples
import pytest
import xarray as xr

mpl.use("Agg")

from matplotlib.collections import LineCollection
from plot_samples import figures, full, texts, ticks  # noqa: F401 - the fixture acts by its presence

from fisherlens import plots
from fisherlens.errors import InputError
from fisherlens.plots import _common as common

# --- density ------------------------------------------------------------------------------------------------------


def lines(ax):
    return [line for line in ax.get_lines() if line.get_label() != "noise floor" and len(line.get_xdata()) > 2]


def test_density_is_drawn_log_log_with_a_band_of_two_standard_errors():
    ds = samples.density()
    ax = plots.density(ds)
    (line,) = lines(ax)
    np.testing.assert_array_equal(line.get_xdata(), ds["grid"])
    np.testing.assert_array_equal(line.get_ydata(), ds["density"])
    (band,) = ax.collections
    vertices = band.get_paths()[0].vertices
    at = np.flatnonzero(vertices[:, 0] == float(ds["grid"][50]))
    value = float(ds["density"][50])
    assert sorted(vertices[at, 1]) == pytest.approx([0.8 * value, 1.2 * value])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel() == "eigenvalue [nat]"
    assert ax.get_ylabel() == "density of eigenvalues [1/nat]"
    assert texts(ax) == [
        "density (35 % of eigenvalues are zero, 10 % unresolved)",
        "± 2 standard errors",
        "noise floor",
    ]
    assert [line.get_xdata()[0] for line in ax.get_lines() if line.get_label() == "noise floor"] == [1e-5]
    low, high = ax.get_ylim()
    assert 0 < low < float(ds["density"][np.abs(ds["grid"].values - 1).argmin()]) < high


def test_density_parts_can_be_switched_off():
    ax = plots.density(samples.density(), show_error=False, show_zero=False, show_floor=False)
    assert not ax.collections
    assert texts(ax) == ["density"]
    assert len(ax.get_lines()) == 1


def test_density_linear_and_cumulative():
    ax = plots.density(samples.density(scale="linear"))
    assert (ax.get_xscale(), ax.get_yscale()) == ("linear", "log")
    assert plots.density(samples.density(), scale="linear").get_xscale() == "linear"
    ds = samples.density()
    ax = plots.density(ds, y="cumulative")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    np.testing.assert_array_equal(lines(ax)[0].get_ydata(), ds["cumulative"])
    assert ax.get_ylabel() == "share of eigenvalues up to here"
    assert texts(ax)[0].startswith("cumulative share (35 %")


def test_density_shows_every_single_eigenvalue_and_not_the_flanks():
    """On a linear scale the axis ends below the height of one eigenvalue, 0.4 / (size width)."""
    low, _ = plots.density(samples.density(scale="linear")).get_ylim()
    assert 0.02 / (1000 * 0.1) < low < 0.4 / (1000 * 0.1)


def test_density_by_layer_and_stage():
    names = (*samples.CNN, "all")
    ax = plots.density(samples.density(layers=names))
    assert [line.get_color() for line in lines(ax)] == [*common.PALETTE[:4], common.INK]
    assert texts(ax)[:5] == [f"{name} (35 % zero, 10 % unresolved)" for name in names]
    stages = plots.density(samples.density(stages=samples.STAGES))
    brightness = [sum(line.get_color()[:3]) for line in lines(stages)]
    assert brightness == sorted(brightness, reverse=True)
    many = plots.density(samples.density(stages=range(0, 1200, 100)).rename(stage="step"))
    assert ticks(many.figure.axes[1].yaxis) == [str(step) for step in range(0, 1200, 100)]
    assert many.figure.axes[1].get_ylabel() == "step"
    assert not many.collections
    deep = plots.density(samples.density(layers=samples.DEEP, stages=("start", "end")).rename(layer="block"))
    assert ticks(deep.figure.axes[1].yaxis) == list(samples.DEEP)
    assert texts(deep)[:2] == ["start", "end"]


def test_density_legend_leaves_the_curves_free():
    ax = plots.density(samples.density(layers=samples.CNN))
    ax.figure.draw_without_rendering()
    box = ax.get_legend().get_window_extent()
    for line in lines(ax):
        assert not any(box.contains(*corner) for corner in ax.transData.transform(line.get_xydata()))


def test_density_without_errors_or_facts_is_drawn_bare():
    ds = samples.density()
    missing = ds.assign(density_sem=ds["density_sem"] * np.nan)
    assert texts(plots.density(missing, show_floor=False)) == [
        "density (35 % of eigenvalues are zero, 10 % unresolved)"
    ]
    assert texts(plots.density(ds[["density"]])) == ["density"]
    all_but_nothing = ds.assign(zero_fraction=0.99996, unresolved_fraction=0.0)
    assert texts(plots.density(all_but_nothing))[0] == "density (99.996 % of eigenvalues are zero)"


def test_density_refuses_what_has_no_logarithm_and_unknown_words():
    ds = samples.density()
    with pytest.raises(InputError, match=r"^plot\.density found nothing above zero to put on a logarithmic axis\."):
        plots.density(ds.assign(density=0 * ds["density"]))
    with pytest.raises(
        InputError, match=full("Unknown y 'densty'. Did you mean 'density'? Known: 'density', 'cumulative'.")
    ):
        plots.density(ds, y="densty")
    with pytest.raises(InputError, match=full("Unknown scale 'lin'. Did you mean 'linear'? Known: 'log', 'linear'.")):
        plots.density(ds, scale="lin")


# --- spectrum -----------------------------------------------------------------------------------------------------


def leading(count=6):
    ds = samples.spectrum(count=50, above=30).isel(rank=slice(0, count))
    value = ds["eigenvalue"]
    return ds.assign(lower=0.8 * value, upper=1.5 * value, converged=("rank", np.arange(count) < count - 2))


def test_spectrum_draws_bounds_and_marks_what_has_not_converged():
    ds = leading()
    ax = plots.spectrum(ds)
    (bars,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    np.testing.assert_allclose(ends, np.stack([ds["lower"], ds["upper"]], axis=1))
    (crosses,) = [line for line in ax.get_lines() if line.get_marker() == "x"]
    np.testing.assert_array_equal(crosses.get_ydata(), ds["eigenvalue"][-2:])
    assert {"bounds", "not converged"} <= set(texts(ax))
    bare = plots.spectrum(ds.drop_vars("converged"), show_bounds=False)
    assert not [c for c in bare.collections if isinstance(c, LineCollection)]
    assert not {"bounds", "not converged"} & set(texts(bare))


def test_spectrum_bounds_at_zero_reach_the_axis():
    ds = leading()
    ax = plots.spectrum(ds.assign(lower=0 * ds["eigenvalue"]))
    (bars,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    assert max(segment[0, 1] for segment in bars.get_segments()) < ax.get_ylim()[0]


def test_spectrum_names_a_floor_far_below_instead_of_squeezing_the_values():
    ds = leading()
    ax = plots.spectrum(ds)
    floor = float(ds["noise_floor"])
    assert ax.get_ylim()[0] > 1e3 * floor
    assert any(text.endswith(f"= {floor:.1g}, below the axis") for text in texts(ax))
    assert not any("below the axis" in text for text in texts(plots.spectrum(ds, show_floor=False)))


def test_spectrum_of_few_ranks_has_plain_numbers():
    assert ticks(plots.spectrum(leading()).xaxis) == ["1", "2", "3", "5"]


def test_spectrum_over_steps_and_blocks():
    ds = samples.spectrum(layers=samples.CNN, stages=samples.STAGES)
    ax = plots.spectrum(ds.rename(layer="block", stage="step"))
    assert texts(ax)[:7] == [*samples.CNN, *samples.STAGES]
    many = samples.spectrum(stages=range(0, 1200, 100), count=40, above=30).rename(stage="step")
    bar = plots.spectrum(many).figure.axes[1]
    assert ticks(bar.yaxis) == [str(step) for step in range(0, 1200, 100)]
    assert bar.get_ylabel() == "step"


def test_density_leaves_the_dataset_of_steps():
    ds = samples.density(layers=samples.CNN, stages=samples.STAGES)
    before = ds.copy(deep=True)
    plots.density(ds)
    xr.testing.assert_identical(ds, before)
