"""Plots of couplings of many blocks, of dependence, and of places in a convolution: artists, labels, and what they refuse."""

import matplotlib as mpl
import numpy as np
import plot_samples as samples
import pytest
import xarray as xr

mpl.use("Agg")

import matplotlib.pyplot as plt
from plot_samples import figures, full, texts, ticks  # noqa: F401 - the fixture acts by its presence

from fisherlens import plots
from fisherlens.errors import InputError


def dependence(layers=samples.CNN, per_layer=1) -> xr.Dataset:
    """As ``fl.dependence`` returns it: some values below 0, the linear part smaller."""
    base = samples.coupling(layers, per_layer)
    values = base["coupling"].values ** 2 + 0.15
    far = base["coupling"].values < 0.2
    values = np.where(far, -0.03, np.clip(values, 0, 1))
    np.fill_diagonal(values, 1.0)
    pair = ("block_i", "block_j")
    words = {"long_name": "distance correlation, squared and bias-corrected", "units": "1"}
    linear = (
        pair,
        base["coupling"].values * 0.9,
        {"long_name": "coupling of two blocks in the same sample", "units": "1"},
    )
    return base[["p_value", "p_adjusted"]].assign(dependence=(pair, values, words), linear_coupling=linear)


def spatial(kernel=(3, 3), distances=8) -> xr.Dataset:
    names = [",".join(map(str, place)) for place in np.ndindex(*kernel)]
    count, pair = len(names), ("offset_i", "offset_j")
    apart = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    share = 0.7 * 0.4 ** np.arange(distances) - 0.02
    words = {name: {"long_name": name.replace("_", " "), "units": "1"} for name in ("share", "coupling", "floor")}
    return xr.Dataset(
        {
            "kernel_coupling": (pair, 0.9**apart, words["coupling"]),
            "kernel_noise_floor": (pair, np.full((count, count), 0.07), words["floor"]),
            "kernel_correlation": (pair, 1 - 0.2 * apart, words["coupling"]),
            "trace_share": ("distance", share, {"long_name": "share of the trace", "units": "1"}),
            "position_coupling": (
                "distance",
                0.8 ** np.arange(distances),
                {"long_name": "mean coupling", "units": "1"},
            ),
            "position_noise_floor": ("distance", np.full(distances, 0.1), {"long_name": "floor", "units": "1"}),
            "position_share": ((), share[0], words["share"]),
        },
        {"offset_i": names, "offset_j": names, "distance": np.arange(distances)},
    )


# --- couplings of many blocks --------------------------------------------------------------------------------------------


def drawn(ax) -> np.ndarray:
    return ax.images[0].get_array().filled(np.nan)


def test_below_the_diagonal_of_many_blocks_only_what_stands_out():
    dataset = samples.coupling(per_layer=20)
    lower = np.tri(80, k=-1, dtype=bool)
    for options, kept, words in (
        ({}, dataset["p_adjusted"].values < 0.05, "below the diagonal: only pairs with adjusted p < 0.05"),
        ({"alpha": 0.2}, dataset["p_adjusted"].values < 0.2, "below the diagonal: only pairs with adjusted p < 0.2"),
        (
            {"below": "above floor"},
            dataset["coupling"].values > dataset["noise_floor"].values,
            "below the diagonal: only pairs above the noise floor",
        ),
    ):
        ax = plots.coupling(dataset, **options)
        shown = drawn(ax)
        assert np.array_equal(np.isnan(shown), lower & ~kept)
        assert np.array_equal(shown[~lower], dataset["coupling"].values[~lower])
        assert words in texts(ax)
    for options in (
        {"below": "all"},
        {"legend": False},
        {"show_significant": False},
    ):  # nothing would say what is left out
        assert not np.isnan(drawn(plots.coupling(dataset, **options))).any()
    assert not np.isnan(drawn(plots.coupling(samples.coupling(per_layer=15)))).any()  # 60 blocks: marks can be seen
    assert not np.isnan(drawn(plots.coupling(dataset[["coupling"]]))).any()
    floor = plots.coupling(dataset.drop_vars("p_adjusted"))
    assert "below the diagonal: only pairs above the noise floor" in texts(floor)


def test_below_the_diagonal_refuses_what_it_does_not_know():
    dataset = samples.coupling()
    message = (
        "plot.coupling(below='significant') needs the variable 'p_adjusted'; this Dataset has none. Compute it with fl.coupling (num_null > 0 for p-values), or "
        "pass below='all'."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.coupling(dataset.drop_vars("p_adjusted"), below="significant")
    with pytest.raises(InputError, match="needs the variable 'noise_floor'"):
        plots.coupling(dataset.drop_vars("noise_floor"), below="above floor")
    with pytest.raises(InputError, match="Unknown below 'upper'"):
        plots.coupling(dataset, below="upper")


def test_which_test_is_marked():
    dataset = samples.coupling(per_layer=3)
    dataset = dataset.assign(q_value=dataset["p_adjusted"] * 0.5)
    off = ~np.eye(12, dtype=bool)
    for test, words in (("p_adjusted", "adjusted p"), ("q_value", "q"), ("p_value", "p")):
        hits = ((dataset[test].values < 0.05) & off).sum() // 2
        assert texts(plots.coupling(dataset, test=test))[0] == f"{words} < 0.05: {hits} of 66 pairs"
    with pytest.raises(InputError, match=r"Unknown test 'p'.*'p_adjusted', 'q_value', 'p_value'"):
        plots.coupling(dataset, test="p")


def test_the_error_of_estimated_couplings_is_named():
    dataset = samples.coupling()
    sem = (("block_i", "block_j"), np.where(np.eye(4, dtype=bool), 0, 0.031))
    assert "median standard error 0.031" in texts(plots.coupling(dataset.assign(coupling_sem=sem)))
    assert not any("standard error" in text for text in texts(plots.coupling(dataset)))
    unknown = (("block_i", "block_j"), np.full((4, 4), np.nan))
    assert not any("standard error" in text for text in texts(plots.coupling(dataset.assign(coupling_sem=unknown))))


def test_a_thousand_blocks_are_still_one_picture():
    ax = plots.coupling(samples.coupling(layers=samples.DEEP[:10], per_layer=100))
    ax.figure.draw_without_rendering()
    assert len(ax.images) == 1
    assert not ax.texts
    assert len(ticks(ax.yaxis)) == 10


# --- dependence ----------------------------------------------------------------------------------------------------------


def test_dependence_above_and_squared_coupling_below():
    dataset = dependence()
    before = dependence()
    ax = plots.dependence(dataset)
    xr.testing.assert_identical(dataset, before)
    shown, lower = drawn(ax), np.tri(4, k=-1, dtype=bool)
    assert np.array_equal(shown[~lower], dataset["dependence"].values[~lower])
    assert np.array_equal(shown[lower], dataset["linear_coupling"].values[lower] ** 2)
    assert ax.images[0].get_clim() == (0, 1)
    said = " ".join(texts(ax)).replace("\n", " ")
    assert "above the diagonal: distance correlation, squared and bias-corrected" in said
    assert "below: squared coupling, of the same sample" in said
    hits = np.triu(dataset["p_adjusted"].values < 0.05, 1)
    assert f"adjusted p < 0.05: {hits.sum()} of 6 pairs" in said
    (dots,) = [line for line in ax.get_lines() if line.get_linestyle() == "None"]
    assert {(round(y + 0.34), round(x - 0.34)) for x, y in dots.get_xydata()} == set(
        zip(*np.nonzero(hits), strict=True)
    )
    assert ax.texts[3].get_text() == "−0.03"
    assert ax.figure.axes[1].get_ylabel() == "share"


def test_dependence_alone_and_switched_off():
    dataset = dependence()
    ax = plots.dependence(dataset, show_linear=False)
    assert np.array_equal(drawn(ax), dataset["dependence"].values)
    assert [text for text in texts(ax) if "diagonal" in text] == []
    quiet = plots.dependence(dataset, show_significant=False, annotate=False, colorbar=False, legend=False)
    assert quiet.get_legend() is None
    assert not quiet.texts
    assert len(quiet.figure.axes) == 1
    plain = plots.dependence(dataset[["dependence"]])
    assert plain.get_legend() is None
    one = plots.dependence(dependence(layers=("0",)))
    assert drawn(one).tolist() == [[1.0]]
    q = plots.dependence(dataset.assign(q_value=dataset["p_value"]), test="q_value")
    assert any(text.startswith("q < 0.05") for text in texts(q))


def test_dependence_on_given_axes_and_of_many_blocks():
    _, (left, right) = plt.subplots(1, 2)
    assert plots.dependence(dependence(per_layer=20), right) is right
    assert not left.images
    assert ticks(right.yaxis) == list(samples.CNN)


def test_what_dependence_refuses():
    with pytest.raises(TypeError, match=r"plot\.dependence draws an xarray Dataset; got dict"):
        plots.dependence({})
    with pytest.raises(
        InputError, match=r"plot\.dependence reads the variable 'dependence', as fl\.dependence returns it"
    ):
        plots.dependence(samples.coupling())


# --- places in a convolution ---------------------------------------------------------------------------------------------


def test_spatial_panels():
    dataset, before = spatial(), spatial()
    axes = plots.spatial_coupling(dataset)
    xr.testing.assert_identical(dataset, before)
    assert list(axes) == ["kernel", "correlation", "distance"]
    axes["kernel"].figure.draw_without_rendering()
    assert np.array_equal(drawn(axes["kernel"]), dataset["kernel_coupling"])
    assert np.array_equal(drawn(axes["correlation"]), dataset["kernel_correlation"])
    assert axes["kernel"].images[0].get_clim() == (0, 1)
    assert axes["correlation"].images[0].get_clim() == (-1, 1)
    assert ticks(axes["kernel"].xaxis) == list(dataset["offset_i"].values)
    assert axes["kernel"].get_xlabel() == "place in the kernel (row,column)"
    assert texts(axes["kernel"]) == ["median noise floor 0.07 (in the colour bar)"]
    line = axes["distance"]
    assert [bar.get_height() for bar in line.containers[0]] == pytest.approx(dataset["trace_share"].values)
    curves = {c.get_label(): c.get_ydata() for c in line.get_lines() if len(c.get_xdata()) == 8}
    assert np.array_equal(curves["mean coupling"], dataset["position_coupling"])
    assert np.array_equal(curves["floor"], dataset["position_noise_floor"])
    assert any(text.startswith("share of the trace (68 % at distance 0)") for text in texts(line))
    assert line.get_xlabel() == "distance of two output positions"


def test_spatial_without_a_kernel_on_own_axes_and_large():
    dataset = spatial()
    dense = dataset.drop_vars([name for name in dataset if str(name).startswith("kernel")])
    assert list(plots.spatial_coupling(dense)) == ["distance"]
    _, row = plt.subplots(1, 3)
    axes = dict(zip(("kernel", "correlation", "distance"), row, strict=True))
    assert plots.spatial_coupling(spatial(kernel=(5,)), axes, legend=False) == axes
    assert axes["kernel"].get_xlabel() == "place in the kernel"
    assert all(ax.get_legend() is None for ax in axes.values())
    large = plots.spatial_coupling(spatial(kernel=(5, 5), distances=40))
    assert not large["kernel"].texts
    large["kernel"].figure.draw_without_rendering()


def test_what_spatial_refuses():
    message = (
        "plot.spatial_coupling draws the panels ['kernel', 'correlation', 'distance']; axes has no entry 'correlation'. Pass axes=None for a new figure, or a "
        "dict with one Axes for each panel."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.spatial_coupling(spatial(), {"kernel": plt.figure().subplots()})
    with pytest.raises(InputError, match=r"reads the variable 'trace_share', as fl\.spatial_coupling returns it"):
        plots.spatial_coupling(samples.coupling())
    with pytest.raises(TypeError, match=r"plot\.spatial_coupling draws an xarray Dataset; got list"):
        plots.spatial_coupling([])
