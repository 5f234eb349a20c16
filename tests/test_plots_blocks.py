"""Plots of independence, information, partitions and training runs: artists, labels, and what they refuse."""

import re

import matplotlib as mpl
import numpy as np
import plot_samples as samples
import pytest
import xarray as xr

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_hex
from plot_samples import figures, full, texts, ticks  # noqa: F401 - the fixture acts by its presence

from fisherlens import plots
from fisherlens.errors import InputError

# --- independence ---------------------------------------------------------------------------------


def test_independence_groups_bars_by_layer_the_whole_network_first():
    dataset = samples.independence()
    ax = plots.independence(dataset)
    names = ["layer", "unit", "cw-ngd", "mbf", "diagonal"]
    assert texts(ax) == [*names, "full Fisher"]
    assert ticks(ax.xaxis) == ["whole\nnetwork", *samples.CNN]
    order = ["all", *samples.CNN]
    for name, bars in zip(names, ax.containers, strict=True):
        expected = dataset["natural_gradient_cosine"].sel(partition=name, layer=order)
        np.testing.assert_array_equal([bar.get_height() for bar in bars], expected)
    assert ax.get_ylabel() == "cosine to the natural gradient"
    assert ax.get_ylim()[0] == 0


def test_independence_marks_the_chance_level_of_the_energy():
    dataset = samples.independence()
    ax = plots.independence(dataset, variable="energy_captured")
    assert "random partition, same sizes" in texts(ax)
    levels = [segment[0][1] for lines in ax.collections for segment in lines.get_segments()]
    assert set(levels) == set(dataset["energy_noise_floor"].values.ravel())
    middles = sorted(bar.get_x() + bar.get_width() / 2 for bars in ax.containers for bar in bars)
    marks = sorted({np.mean([point[0] for point in s]) for lines in ax.collections for s in lines.get_segments()})
    np.testing.assert_allclose(marks, middles)
    assert not plots.independence(dataset, variable="energy_captured", show_floor=False).collections
    assert not plots.independence(dataset.drop_vars("energy_noise_floor"), variable="energy_captured").collections


def test_independence_draws_points_on_logarithmic_axes():
    dataset = samples.independence()
    ax = plots.independence(dataset, variable="condition_number")
    assert ax.get_yscale() == "log"
    assert not ax.containers
    points = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    assert len({line.get_marker() for line in points}) == 5
    values = dataset["condition_number"].sel(layer=["all", *samples.CNN]).values
    np.testing.assert_array_equal([line.get_ydata() for line in points], values)
    ideal = [line.get_ydata()[0] for line in ax.get_lines() if line.get_label() == "full Fisher"]
    assert ideal == [1.0]


def test_independence_of_many_layers_uses_points_and_selects_layers():
    dataset = samples.independence(samples.DEEP)
    ax = plots.independence(dataset)
    assert not ax.containers
    assert len(ticks(ax.xaxis)) == 25
    ax = plots.independence(dataset, layers=[samples.DEEP[3], "all"], show_ideal=False)
    assert ticks(ax.xaxis)[1] == "whole\nnetwork"
    assert len(ax.containers) == 5
    assert "full Fisher" not in texts(ax)
    message = "Unknown layer 'encoder'. "
    with pytest.raises(InputError, match="^" + re.escape(message)):
        plots.independence(dataset, layers="encoder")
    with pytest.raises(InputError, match=r"^Unknown layer ''\."):
        plots.independence(dataset, layers=[])


def test_independence_leaves_out_what_was_not_computed():
    dataset = samples.independence()
    values = dataset["condition_number"].copy()
    values[0, 0] = np.nan
    ax = plots.independence(dataset.assign(condition_number=values), variable="condition_number")
    assert [len(line.get_xdata()) for line in ax.get_lines() if line.get_linestyle() == "None"] == [4, 5, 5, 5, 5]
    empty = dataset.assign(natural_gradient_cosine=dataset["natural_gradient_cosine"] * np.nan)
    plots.independence(empty).figure.draw_without_rendering()
    message = (
        "plot.independence(scale='log') found no value above zero in 'natural_gradient_cosine'. "
        "Use scale='linear', or look at the values."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.independence(empty, scale="log")
    with pytest.raises(InputError, match=full("Unknown scale 'cubic'. Known: 'auto', 'linear', 'log'.")):
        plots.independence(dataset, scale="cubic")


def test_independence_of_more_partitions_than_colours():
    names = [f"scheme-{i}" for i in range(11)]
    ax = plots.independence(samples.independence(samples.CNN[:2], names))
    looks = {(to_hex(bars[0].get_facecolor()), bars[0].get_hatch()) for bars in ax.containers}
    assert len(looks) == 11


def test_independence_panels():
    dataset, before = samples.independence(), samples.independence()
    panels = plots.independence_panels(dataset)
    assert list(panels) == ["natural_gradient_cosine", "energy_captured", "decrease_ratio", "condition_number"]
    (figure,) = {ax.figure for ax in panels.values()}
    (legend,) = figure.legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == [*dataset["partition"].values, "full Fisher", "random partition, same sizes"]
    assert not any(ax.get_legend() for ax in panels.values())
    figure.draw_without_rendering()
    xr.testing.assert_identical(dataset, before)


def test_independence_panels_of_many_layers_are_stacked_and_share_names():
    panels = plots.independence_panels(samples.independence(samples.DEEP), legend=False)
    axes = list(panels.values())
    figure = axes[0].figure
    figure.draw_without_rendering()
    boxes = [ax.get_position() for ax in axes]
    assert len({round(box.x0, 3) for box in boxes}) == 1
    assert [any(label.get_visible() for label in ax.get_xticklabels()) for ax in axes] == [False, False, False, True]
    assert not figure.legends


def test_independence_panels_on_given_axes():
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    given = {"kl_divergence": axes[0], "num_blocks": axes[1]}
    panels = plots.independence_panels(samples.independence(), given, variables=["kl_divergence", "num_blocks"])
    assert panels == given
    assert plt.get_fignums() == [figure.number]
    assert axes[0].get_legend() is not None
    assert axes[0].get_ylabel() == "divergence to the full Fisher [nat]"
    message = (
        "plot.independence_panels draws into the Axes of every variable or of none; axes lacks 'energy_captured'. "
        "Pass a dict variable -> Axes for ['kl_divergence', 'energy_captured']."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.independence_panels(samples.independence(), given, variables=["kl_divergence", "energy_captured"])


def test_independence_over_dampings_is_a_line_per_partition():
    grid = [1e-4, 1e-2, 1.0]
    stacked = xr.concat([samples.independence(seed=seed) for seed in range(3)], xr.Variable("damping", grid))
    before = stacked.copy(deep=True)
    ax = plots.independence(stacked, over="damping")
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 3]
    assert texts(ax) == ["layer", "unit", "cw-ngd", "mbf", "diagonal", "full Fisher"]
    for line, values in zip(
        lines, stacked.natural_gradient_cosine.sel(layer="all").transpose("partition", "damping").values, strict=True
    ):
        assert np.allclose(line.get_xdata(), grid)
        assert np.allclose(line.get_ydata(), values)
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "damping λ [nat]"
    xr.testing.assert_identical(stacked, before)
    ax = plots.independence(
        stacked, over="damping", variable="condition_number", layers="features.0", legend=False, show_ideal=False
    )
    assert (ax.get_xlabel(), ax.get_yscale()) == ("damping λ [nat], layer features.0", "log")
    assert ax.get_legend() is None
    message = (
        "plot.independence(over='damping') draws one line per partition, for one layer; got layers=['features.0', 'all']. Choose one of them, "
        "'all' being the whole network."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.independence(stacked, over="damping", layers=["features.0", "all"])
    with pytest.raises(InputError, match="Unknown value of over 'seed'"):
        plots.independence(stacked, over="seed")
    with pytest.raises(InputError, match="without 'damping'"):
        plots.independence(samples.independence(), over="damping")


# --- approximations -------------------------------------------------------------------------------


def test_approximations_stack_both_parts_of_the_error_beside_the_step():
    dataset, before = samples.approximations(), samples.approximations()
    panels = plots.approximations(dataset)
    assert list(panels) == ["error", "step"]
    whole = dataset.sel(layer="all")
    bars = panels["error"].patches
    count = dataset.sizes["approximation"]
    assert np.allclose([bar.get_width() for bar in bars[:count]], whole.dropped_coupling)
    assert np.allclose([bar.get_width() for bar in bars[count:]], whole.within_block_error)
    assert np.allclose([bar.get_x() for bar in bars[count:]], whole.dropped_coupling)
    marks = [line for line in panels["step"].get_lines() if line.get_linestyle() == "None"]
    assert np.allclose(marks[0].get_xdata(), whole.decrease_ratio)
    assert np.allclose(marks[1].get_xdata(), whole.natural_gradient_cosine)
    assert ticks(panels["error"].yaxis) == list(dataset.approximation.values)
    assert texts(panels["error"]) == ["coupling that was dropped", "error inside the blocks"]
    assert texts(panels["step"]) == ["decrease ratio", "cosine of the natural gradients", "exact natural gradient"]
    panels["error"].figure.draw_without_rendering()
    xr.testing.assert_identical(dataset, before)


def test_approximations_of_one_layer_damping_and_panel():
    dataset = samples.approximations(dampings=[1e-3, 1e-1])
    panels = plots.approximations(dataset, panels=["step"], layer="features.3", damping=2e-1, legend=False)
    mark = panels["step"].get_lines()[0]
    assert np.allclose(mark.get_xdata(), dataset.decrease_ratio.sel(layer="features.3", damping=1e-1))
    assert panels["step"].get_legend() is None
    axes = dict(zip(("step", "error"), plt.subplots(1, 2)[1], strict=True))
    drawn = plots.approximations(dataset, axes)
    assert all(drawn[name] is axes[name] for name in axes)
    missing = "plot.approximations draws into the Axes of every panel or of none; axes lacks 'error'. Pass a dict panel -> Axes for ['error', 'step']."
    with pytest.raises(InputError, match=full(missing)):
        plots.approximations(dataset, {"step": axes["step"]})
    with pytest.raises(InputError, match="Unknown panel 'errors'"):
        plots.approximations(dataset, panels=["errors"])
    with pytest.raises(InputError, match=r"Unknown layer 'features\.4'"):
        plots.approximations(dataset, layer="features.4")
    with pytest.raises(
        InputError, match=r"plot\.approximations\(damping=0\.1\) chooses among several dampings; this result has one"
    ):
        plots.approximations(samples.approximations(), damping=0.1)
    with pytest.raises(InputError, match="reads the variable 'dropped_coupling'"):
        plots.approximations(samples.independence())
    with pytest.raises(TypeError, match=r"plot\.approximations draws an xarray Dataset; got list"):
        plots.approximations([])


def test_approximations_name_what_was_not_computed():
    dataset = samples.approximations()
    hole = dataset.copy(deep=True)
    for name in hole.data_vars:
        hole[name][1] = np.nan
    panels = plots.approximations(hole)
    for ax in panels.values():
        assert [text.get_text() for text in ax.texts] == ["not computed"]
    panels["step"].figure.draw_without_rendering()


# --- information ----------------------------------------------------------------------------------


def test_information_bars_follow_the_network_with_shares():
    dataset = samples.information()
    ax = plots.information(dataset)
    (bars,) = ax.containers
    np.testing.assert_array_equal([bar.get_width() for bar in bars], dataset["information"][:-1])
    assert ticks(ax.yaxis) == list(samples.CNN)  # without "all"
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert ax.get_xlabel() == "information, trace of the block [nat]\n% = share of the information"
    share = dataset["share"].values[:-1]
    for text, value in zip(ax.texts, share, strict=True):
        shown = text.get_text().removesuffix(" %")
        assert shown == "< 0.1" if value < 0.001 else float(shown) == pytest.approx(100 * value, abs=0.5)
    assert not plots.information(dataset, annotate=False).texts


def test_information_annotates_values_where_shares_do_not_apply():
    dataset = samples.information()
    ax = plots.information(dataset, variable="effective_dimension")
    assert [text.get_text() for text in ax.texts] == [f"{v:.3g}" for v in dataset["effective_dimension"].values[:-1]]
    assert ax.get_xlabel() == "effective dimension"
    bare = plots.information(dataset[["information"]])
    assert [text.get_text() for text in bare.texts] == [f"{v:.3g}" for v in dataset["information"].values[:-1]]


def test_information_of_stages_and_of_the_whole_alone():
    dataset = samples.information(stages=samples.STAGES)
    ax = plots.information(dataset)
    assert texts(ax) == list(samples.STAGES)
    assert len(ax.containers) == 3
    for stage, bars in zip(samples.STAGES, ax.containers, strict=True):
        expected = dataset["information"].sel(stage=stage)[:-1]
        np.testing.assert_array_equal([bar.get_width() for bar in bars], expected)
    whole = plots.information(samples.information().isel(layer=[-1]))
    assert ticks(whole.yaxis) == ["all"]


def test_information_on_a_logarithmic_axis_is_points():
    dataset = samples.information()
    dataset["information"][0] = 0.0
    ax = plots.information(dataset, scale="log")
    assert ax.get_xscale() == "log"
    assert not ax.containers
    (points,) = ax.get_lines()
    np.testing.assert_array_equal(points.get_xdata(), dataset["information"][1:-1])
    assert len(ax.texts) == 3
    message = (
        "plot.information(scale='log') found no value above zero in 'information'. Use scale='linear', or look at the values: "
        "zero information means that no output depends on the parameter."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.information(dataset * 0, scale="log")
    with pytest.raises(InputError, match=full(message)):
        plots.information(samples.unit_information() * 0, scale="log")


def test_information_of_units_is_sorted_per_layer():
    dataset = samples.unit_information()
    ax = plots.information(dataset)
    assert ax.get_yscale() == "log"
    for line, text, layer in zip(ax.get_lines(), texts(ax), samples.CNN, strict=True):
        values = dataset["information"].values[dataset["layer"].values == layer]
        np.testing.assert_array_equal(line.get_ydata(), np.sort(values[values > 0])[::-1])
        assert text == f"{layer} ({(values == 0).sum()} of 64 zero)"
    assert ax.get_xlabel() == "rank among the units of a layer (1 = largest)"
    assert ax.get_ylabel() == "information, trace of the block [nat]"


def test_information_of_parameters_without_layers():
    values = np.linspace(1, 2, 300)
    dataset = xr.Dataset({"information": ("param", values)})
    ax = plots.information(dataset)
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert ax.get_legend() is None
    assert ax.get_xlabel() == "rank among the parameters (1 = largest)"
    np.testing.assert_array_equal(ax.get_lines()[0].get_ydata(), values[::-1])


def test_information_of_units_in_many_layers_and_stages():
    ax = plots.information(samples.unit_information(samples.DEEP, per_layer=8))
    assert len(ax.figure.axes) == 2
    one = samples.unit_information(samples.CNN[:2])
    both = xr.concat([one, 2 * one], dim=xr.Variable("stage", ["start", "end"]))
    ax = plots.information(both)
    assert [text.split(" (")[0] for text in texts(ax)] == [
        f"{name} · {s}" for name in samples.CNN[:2] for s in ("start", "end")
    ]
    assert len({line.get_color() for line in ax.get_lines()}) == 2


def test_information_needs_one_dim():
    message = (
        "plot.information draws 'information' over one of the dims 'layer', 'unit', 'kernel', 'channel' or 'param', and 'stage' or 'step' at will; "
        "it has the dims ('layer', 'unit') here. Select one entry of the others first, with dataset.sel(...)."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.information(xr.Dataset({"information": (("layer", "unit"), np.ones((2, 2)))}))
