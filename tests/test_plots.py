"""Every plot: what it draws, the labels, an unchanged Dataset, the Axes it was given, and no torch anywhere."""

import ast
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
import plot_samples as samples
import pytest
import xarray as xr

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_hex
from plot_samples import figures, full, texts, ticks  # noqa: F401 - the fixture acts by its presence

from fisherlens import plots
from fisherlens.errors import InputError
from fisherlens.plots import _common as common

PLOTS = {
    "spectrum": samples.spectrum,
    "density": samples.density,
    "coupling": samples.coupling,
    "independence": samples.independence,
    "information": samples.information,
    "partition": samples.partition,
    "optimizers": samples.optimizers,
}
VARIABLE = {
    "spectrum": "eigenvalue",
    "density": "density",
    "coupling": "coupling",
    "independence": "natural_gradient_cosine",
    "information": "information",
    "partition": "block",
    "optimizers": "train_loss",
}


# --- what all plots have in common ----------------------------------------------------------------


def test_public_names():
    elsewhere = (
        "approximations",
        "dependence",
        "directions",
        "ellipse",
        "filters",
        "monitor",
        "spatial_coupling",
        "targets",
        "tuning",
        "verification",
    )  # in files of their own
    assert sorted(plots.__all__) == sorted([*PLOTS, *elsewhere, "independence_panels", "kinds"])


@pytest.mark.parametrize("name", PLOTS)
def test_draws_on_new_axes_and_leaves_the_dataset(name):
    dataset, before = PLOTS[name](), PLOTS[name]()
    ax = getattr(plots, name)(dataset)
    assert isinstance(ax, Axes)
    assert len(plt.get_fignums()) == 1
    ax.figure.draw_without_rendering()
    xr.testing.assert_identical(dataset, before)


@pytest.mark.parametrize("name", PLOTS)
def test_draws_on_the_axes_it_is_given(name):
    figure, (left, right) = plt.subplots(1, 2, layout="constrained")
    assert getattr(plots, name)(PLOTS[name](), right) is right
    assert getattr(plots, name)(PLOTS[name](), ax=left) is left
    assert plt.get_fignums() == [figure.number]
    assert left.has_data()
    assert right.has_data()
    figure.draw_without_rendering()


@pytest.mark.parametrize("name", PLOTS)
def test_order_of_dims_and_entries_of_length_one_do_not_matter(name):
    dataset = PLOTS[name]()
    turned = dataset.transpose(*reversed(list(dataset.dims))).expand_dims(damping=[1e-3])
    left, right = getattr(plots, name)(dataset), getattr(plots, name)(turned)
    assert len(left.get_lines()) == len(right.get_lines())
    for one, two in zip(left.get_lines(), right.get_lines(), strict=True):
        np.testing.assert_array_equal(one.get_xydata(), two.get_xydata())
    assert [p.get_bbox().bounds for p in left.patches] == [p.get_bbox().bounds for p in right.patches]
    for one, two in zip(left.images, right.images, strict=True):
        np.testing.assert_array_equal(one.get_array(), two.get_array())


@pytest.mark.parametrize("name", PLOTS)
def test_another_dim_is_refused_with_the_way_to_select(name):
    dataset = PLOTS[name]().expand_dims(damping=[0.1, 1.0])
    with pytest.raises(InputError) as error:
        getattr(plots, name)(dataset)
    message = str(error.value)
    assert f"plot.{name} draws '{VARIABLE[name]}' over " in message
    if name != "information":
        assert "here it also runs over 'damping' (2 entries)." in message
        assert message.endswith("Select one of them first: dataset.sel(damping=0.1).")
        with pytest.raises(InputError, match=r"dataset\.isel\(damping=0\)\.$"):
            getattr(plots, name)(dataset.drop_vars("damping"))


@pytest.mark.parametrize("name", PLOTS)
def test_missing_variables_and_dims_are_named(name):
    dataset, variable = PLOTS[name](), VARIABLE[name]
    pattern = rf"^plot\.{name} reads the variable '{variable}', as .+ returns it; this Dataset has none of that name\. "
    with pytest.raises(InputError, match=pattern):
        getattr(plots, name)(dataset.drop_vars(variable))
    dim = dataset[variable].dims[-1]
    if name != "information":
        with pytest.raises(InputError, match=rf"without '{dim}'\. Was that dim selected away\? Pass the Dataset as"):
            getattr(plots, name)(dataset.isel({dim: 0}))


@pytest.mark.parametrize("name", PLOTS)
@pytest.mark.parametrize("value", [None, np.zeros(3), xr.DataArray([1.0]), xr.DataTree()])
def test_only_datasets_are_drawn(name, value):
    pattern = rf"^plot\.{name} draws an xarray Dataset; got {type(value).__name__}\. (Pass the Dataset|Take one node)"
    with pytest.raises(TypeError, match=pattern):
        getattr(plots, name)(value)
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", PLOTS)
def test_legend_can_be_switched_off(name):
    if name != "partition":
        assert getattr(plots, name)(PLOTS[name](), legend=False).get_legend() is None


def test_sources_import_neither_torch_nor_the_rest_of_the_package():
    allowed = {"__future__", "collections", "itertools", "math", "numpy", "re", "textwrap", "typing"}
    lazy = allowed | {"matplotlib", "xarray"}
    files = sorted(Path(plots.__file__).parent.glob("*.py"))
    assert len(files) >= 7
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        guarded = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                own = name.startswith(("fisherlens.plots.", "fisherlens.errors"))
                top = name.split(".")[0]
                assert own or top in (lazy if node in guarded else allowed), f"{file.name} imports {name}"


# --- spectrum -------------------------------------------------------------------------------------


def curves(ax: Axes) -> list:
    """The curves of a scree plot: lines that are no noise and no reference."""
    return [line for line in ax.get_lines() if len(line.get_xdata()) > 2 and line.get_linestyle() != "None"]


def test_spectrum_draws_signal_noise_and_floor():
    dataset = samples.spectrum(count=50, above=30)
    ax = plots.spectrum(dataset)
    values = dataset["eigenvalue"].values
    (curve,) = curves(ax)
    np.testing.assert_array_equal(curve.get_xdata(), np.arange(1, 31))
    np.testing.assert_array_equal(curve.get_ydata(), values[:30])
    (noise,) = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    assert noise.get_markerfacecolor() == "none"
    assert set(noise.get_ydata()) <= set(values[30:][values[30:] > 0])
    assert min(noise.get_xdata()) > 30
    floor = float(dataset["noise_floor"])
    assert [line.get_ydata()[0] for line in ax.get_lines() if line.get_label().startswith("noise floor")] == [floor]
    assert texts(ax)[0] == "eigenvalues (30 of 50 above noise)"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_xlabel() == "rank (1 = largest)"
    assert ax.get_ylabel() == "eigenvalue of F [nat]"


def test_spectrum_parts_can_be_switched_off():
    dataset = samples.spectrum(count=50, above=30)
    ax = plots.spectrum(dataset, show_noise=False, show_floor=False, legend=False)
    assert len(ax.get_lines()) == 1
    assert not ax.patches


def test_spectrum_floor_as_attribute_and_flags_absent():
    dataset = samples.spectrum(count=20, above=14)
    floor = float(dataset["noise_floor"])
    as_attribute = dataset.drop_vars("noise_floor").assign_attrs(noise_floor=floor)
    assert any(line.get_ydata()[0] == floor for line in plots.spectrum(as_attribute).get_lines())
    bare = plots.spectrum(dataset[["eigenvalue"]])
    assert texts(bare) == ["eigenvalues"]
    assert len(bare.get_lines()) == 1


def test_spectrum_fraction_compares_layers_of_different_size():
    dataset = samples.spectrum(layers=samples.CNN)
    ax = plots.spectrum(dataset, x="fraction")
    assert ax.get_xlabel() == "rank / number of eigenvalues"
    count = np.isfinite(dataset["eigenvalue"]).sum("rank").values
    assert [line.get_xdata()[0] for line in curves(ax)] == pytest.approx(1 / count)
    assert max(line.get_xdata()[-1] for line in curves(ax)) <= 1


def test_spectrum_by_layer_has_one_mark_per_floor_and_the_whole_in_black():
    names = (*samples.CNN, "all")
    dataset = samples.spectrum(layers=names)
    ax = plots.spectrum(dataset)
    assert [line.get_color() for line in curves(ax)] == [*common.PALETTE[:4], common.INK]
    assert [text.split(" (")[0] for text in texts(ax)[:5]] == list(names)
    assert texts(ax)[5].endswith(", left edge")
    marks = [line for line in ax.get_lines() if list(line.get_xdata()) == [0, 0.035]]
    assert [mark.get_ydata()[0] for mark in marks] == list(dataset["noise_floor"].values)


def test_spectrum_by_stage_is_ordered():
    ax = plots.spectrum(samples.spectrum(stages=samples.STAGES))
    shades = [line.get_color() for line in curves(ax)]
    brightness = [sum(shade[:3]) for shade in shades]
    assert brightness == sorted(brightness, reverse=True)
    assert [text.split(" (")[0] for text in texts(ax)[:3]] == list(samples.STAGES)


def test_spectrum_by_layer_and_stage_explains_both_once():
    dataset = samples.spectrum(layers=samples.CNN, stages=samples.STAGES)
    ax = plots.spectrum(dataset)
    assert texts(ax)[:7] == [*samples.CNN, *samples.STAGES]
    assert len(curves(ax)) == 12


def test_spectrum_of_many_layers_names_each_beside_a_bar():
    ax = plots.spectrum(samples.spectrum(layers=samples.DEEP, count=100, above=80))
    assert len(ax.figure.axes) == 2
    assert ticks(ax.figure.axes[1].yaxis) == list(samples.DEEP)
    assert len(texts(ax)) == 1
    many = samples.spectrum(stages=[f"epoch {i}" for i in range(12)], count=40, above=30)
    assert ticks(plots.spectrum(many).figure.axes[1].yaxis) == [f"epoch {i}" for i in range(12)]


def test_spectrum_legend_leaves_the_curves_free():
    """Where floor and curves leave no room between them, the legend goes above the Axes."""
    values = np.concatenate([[1.0], np.geomspace(4e-3, 1e-3, 99)])
    dataset = xr.Dataset({"eigenvalue": ("rank", values), "noise_floor": 2e-3, "above_noise": ("rank", values > 2e-3)})
    ax = plots.spectrum(dataset)
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1
    ax = plots.spectrum(samples.spectrum())
    ax.figure.draw_without_rendering()
    box = ax.get_legend().get_window_extent()
    assert ax.get_window_extent().y0 < box.y0
    corners = ax.transData.transform(curves(ax)[0].get_xydata())
    assert not any(box.contains(*corner) for corner in corners)


def test_spectrum_refuses_what_has_no_logarithm_and_unknown_axes():
    message = (
        "plot.spectrum has a logarithmic axis and found no finite eigenvalue above zero to put on it. "
        "Is F the zero matrix, or was every layer selected away?"
    )
    with pytest.raises(InputError, match=full(message)):
        plots.spectrum(xr.Dataset({"eigenvalue": ("rank", [0.0, -1.0, np.nan])}))
    message = "Unknown x 'ranks'. Did you mean 'rank'? Known: 'rank', 'fraction'."
    with pytest.raises(InputError, match=full(message)):
        plots.spectrum(samples.spectrum(), x="ranks")


def test_spectrum_shows_noise_alone():
    dataset = samples.spectrum(count=20, above=14).isel(rank=slice(14, None))
    ax = plots.spectrum(dataset)
    assert texts(ax)[0] == "eigenvalues (0 of 6 above noise)"


# --- coupling -------------------------------------------------------------------------------------


def test_coupling_cells_numbers_and_labels():
    dataset = samples.coupling()
    ax = plots.coupling(dataset)
    (image,) = ax.images
    np.testing.assert_array_equal(image.get_array(), dataset["coupling"])
    assert image.get_clim() == (0, 1)
    assert ticks(ax.xaxis) == list(samples.CNN)
    assert ticks(ax.yaxis) == list(samples.CNN)
    shown = [text.get_text() for text in ax.texts]
    assert len(shown) == 16
    assert shown[:2] == ["1", f"{float(dataset['coupling'][0, 1]):.2f}"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("block", "block")
    bar = ax.figure.axes[1]
    assert bar.get_ylabel() == "coupling"
    pairs = dataset["noise_floor"].values[~np.eye(4, dtype=bool)]
    assert [line.get_ydata()[0] for line in bar.get_lines()] == pytest.approx([np.median(pairs)])


def test_coupling_marks_and_counts_significant_and_noisy_pairs():
    dataset = samples.coupling(per_layer=3)
    ax = plots.coupling(dataset, alpha=0.1)
    off = ~np.eye(12, dtype=bool)
    significant = (dataset["p_adjusted"].values < 0.1) & off
    noisy = (dataset["coupling"].values <= dataset["noise_floor"].values) & off
    assert significant.any()
    assert noisy.any()
    (dots,) = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    places = {(round(y + 0.34), round(x - 0.34)) for x, y in dots.get_xydata()}
    assert places == set(zip(*np.nonzero(significant), strict=True))
    (hatching,) = [artist for artist in ax.collections if isinstance(artist, PatchCollection)]
    assert len(hatching.get_paths()) == noisy.sum()
    assert hatching.get_hatch()
    assert texts(ax)[:2] == [
        f"adjusted p < 0.1: {significant.sum() // 2} of 66 pairs",
        f"at or below the noise floor: {noisy.sum() // 2} of 66 pairs",
    ]


def test_coupling_parts_can_be_switched_off():
    options = {
        "show_significant": False,
        "show_noise": False,
        "annotate": False,
        "boundaries": False,
        "colorbar": False,
    }
    ax = plots.coupling(samples.coupling(per_layer=3), **options)
    assert not ax.get_lines()
    assert not ax.collections
    assert not ax.texts
    assert ax.get_legend() is None
    assert len(ax.figure.axes) == 1


def test_coupling_without_null_and_floor():
    ax = plots.coupling(samples.coupling()[["coupling"]])
    assert ax.get_legend() is None
    message = (
        "plot.coupling(excess=True) subtracts the variable 'noise_floor'; this Dataset has none. "
        "Pass the Dataset as fl.coupling returned it, or excess=False."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.coupling(samples.coupling()[["coupling"]], excess=True)


def test_coupling_excess_is_symmetric_about_zero_without_the_diagonal():
    dataset = samples.coupling()
    (image,) = plots.coupling(dataset, excess=True).images
    expected = (dataset["coupling"] - dataset["noise_floor"]).values
    shown = image.get_array().filled(np.nan)
    assert np.isnan(shown.diagonal()).all()
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(shown[off], expected[off])
    low, high = image.get_clim()
    assert low == -high
    assert high == pytest.approx(np.abs(expected[off]).max())
    assert image.axes.figure.axes[1].get_ylabel() == "coupling − noise floor"


def test_coupling_of_many_blocks_is_named_by_layer():
    ax = plots.coupling(samples.coupling(per_layer=20))
    assert ticks(ax.xaxis) == list(samples.CNN)
    assert list(ax.get_xticks()) == [9.5, 29.5, 49.5, 69.5]
    assert ax.get_xlabel() == "layer"
    assert not ax.texts
    edges = sorted(line.get_xdata()[0] for line in ax.get_lines() if line.get_xdata()[0] == line.get_xdata()[1])
    assert edges == [19.5, 39.5, 59.5]
    assert len(texts(ax)) == 4  # counted, though the cells are too small for marks


def test_coupling_of_many_blocks_without_layers_thins_its_ticks():
    dataset = samples.coupling(per_layer=30).drop_vars(["layer_i", "layer_j"])
    ax = plots.coupling(dataset)
    assert 10 < len(ticks(ax.yaxis)) < 120
    assert set(ticks(ax.yaxis)) <= set(dataset["block_i"].values)


def test_coupling_of_one_block():
    ax = plots.coupling(samples.coupling(layers=("0",)))
    assert texts(ax)[0] == "adjusted p < 0.05: 0 of 0 pairs"


def test_coupling_numbers_are_readable_on_their_cell():
    ax = plots.coupling(samples.coupling())
    (image,) = ax.images
    for text in ax.texts:
        column, row = text.get_position()
        red, green, blue, _ = image.cmap(image.norm(image.get_array()[int(row), int(column)]))
        dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
        assert to_hex(text.get_color()) == ("#ffffff" if dark else common.INK)


def test_axes_of_a_subfigure():
    left, right = plt.figure(figsize=(9, 4), layout="constrained").subfigures(1, 2)
    for name, part in zip(PLOTS, cycle((left, right)), strict=False):
        getattr(plots, name)(PLOTS[name](), part.subplots())
        part.clear()
