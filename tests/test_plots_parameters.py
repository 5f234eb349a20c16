"""Plots of parameter space: maps over training, sorted bars, filters, directions, ellipses, kernels of a partition."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import plot_samples as samples
import pytest
import xarray as xr

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import LogNorm, to_hex
from plot_samples import figures, full, texts, ticks  # noqa: F401 - the fixture acts by its presence

from fisherlens import plots
from fisherlens.errors import InputError


def over_steps(one: xr.Dataset, steps=(0, 5, 20)) -> xr.Dataset:
    return xr.concat([(k + 1) * one for k in range(len(steps))], dim=xr.Variable("step", list(steps)))


# --- information: maps and sorted bars -----------------------------------------------------------------------------------


def test_map_of_layers_over_steps():
    dataset = over_steps(samples.information())
    ax = plots.information(dataset)
    (image,) = ax.images
    expected = dataset["information"].transpose("layer", "step").values[:-1]  # without "all"
    np.testing.assert_array_equal(image.get_array(), expected)
    assert ticks(ax.xaxis) == ["0", "5", "20"]
    assert ticks(ax.yaxis) == list(samples.CNN)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "layer")
    assert len(ax.figure.axes) == 2


def test_map_of_units_sorts_within_layers_and_greys_what_is_dead():
    dataset = over_steps(samples.unit_information())
    before = dataset.copy(deep=True)
    ax = plots.information(dataset)
    (image,) = ax.images
    assert isinstance(image.norm, LogNorm)
    picture = image.get_array()
    owners = dataset["layer"].values
    start = 0
    for layer in samples.CNN:
        own = dataset["information"].transpose("unit", "step").values[owners == layer]
        rows = picture[start : start + len(own)]
        order = np.argsort(-own[:, -1], kind="stable")
        np.testing.assert_array_equal(np.ma.filled(rows, 0.0), own[order])
        np.testing.assert_array_equal(np.ma.getmaskarray(rows), own[order] == 0)
        start += len(own)
    assert ticks(ax.yaxis) == list(samples.CNN)
    assert ax.figure.axes[1].get_ylabel().endswith(", grey: none")
    assert to_hex(image.cmap.get_bad()) == "#d9d9d9"
    xr.testing.assert_identical(dataset, before)


def test_map_of_a_few_units_names_them_and_scales():
    dataset = over_steps(samples.unit_information(samples.CNN[:2], per_layer=3))
    ax = plots.information(dataset, scale="linear")
    assert len(ticks(ax.yaxis)) == 6
    assert all(" unit " in name for name in ticks(ax.yaxis))
    assert not isinstance(ax.images[0].norm, LogNorm)
    _, given = plt.subplots()
    assert plots.information(dataset, given) is given
    with pytest.raises(InputError, match=r"found no value above zero"):
        plots.information(dataset * 0, scale="log")
    plots.information(dataset * 0).figure.draw_without_rendering()
    both = xr.concat([dataset, dataset], dim=xr.Variable("stage", ["start", "end"]))
    with pytest.raises(InputError, match=r"and 'stage' or 'step' at will; it has the dims"):
        plots.information(both)


def test_the_largest_as_named_bars():
    dataset = samples.unit_information()
    ax = plots.information(dataset, top=12)
    values = dataset["information"].values
    order = np.argsort(-values, kind="stable")[:12]
    np.testing.assert_array_equal([bar.get_width() for bar in ax.patches], values[order])
    assert ticks(ax.yaxis) == list(dataset["unit"].values[order])
    assert ax.get_xlabel().replace("\n", " ").endswith("the 12 largest of 256")
    shown = list(dict.fromkeys(layer for layer in samples.CNN if layer in dataset["layer"].values[order]))
    assert texts(ax) == (shown if len(shown) > 1 else [])
    tones = {
        layer: {
            to_hex(bar.get_facecolor())
            for bar, o in zip(ax.patches, order, strict=True)
            if dataset["layer"].values[o] == layer
        }
        for layer in shown
    }
    assert all(len(tone) == 1 for tone in tones.values())
    points = plots.information(dataset, top=5, scale="log")
    assert points.get_xscale() == "log"
    np.testing.assert_array_equal(points.collections[0].get_offsets()[:, 0], values[order[:5]])
    layers = plots.information(samples.information(), top=99)
    assert len(layers.patches) == 4  # "all" is no part
    assert layers.get_legend() is None


def test_the_largest_needs_one_dim_and_a_number():
    dataset = samples.unit_information()
    for top in (0, -1, 2.5, True):
        with pytest.raises(
            InputError, match=full(f"top must be an integer >= 1, the bars to draw, or None; got {top!r}.")
        ):
            plots.information(dataset, top=top)
    with pytest.raises(InputError, match=r"Select one entry of the others first"):
        plots.information(over_steps(dataset), top=3)
    with pytest.raises(InputError, match="found no value above zero"):
        plots.information(dataset * 0, top=3, scale="log")


# --- filters -------------------------------------------------------------------------------------------------------------


def kernels(outputs=4, inputs=3, layers=("0", "3")) -> xr.Dataset:
    values = np.random.default_rng(0).uniform(1, 2, len(layers) * outputs * inputs + 1)
    pairs = [(layer, o, i) for layer in layers for o in range(outputs) for i in range(inputs)]
    owner, out, into = zip(*pairs, strict=True)
    coords = {
        "kernel": [*(f"{layer} kernel {o},{i}" for layer, o, i in pairs), "3.bias"],
        "layer": ("kernel", [*owner, "3"]),
        "out_channel": ("kernel", [*out, -1]),
        "in_channel": ("kernel", [*into, -1]),
    }
    attrs = {"long_name": "Fisher information", "units": "nat"}
    return xr.Dataset({"information": ("kernel", values, attrs)}, coords)


def weights(shape=(4, 3, 2, 2), layer="0") -> xr.Dataset:
    places = list(np.ndindex(*shape))
    names = [f"{layer}.weight[{','.join(map(str, place))}]" for place in places] + [
        f"{layer}.bias[{o}]" for o in range(shape[0])
    ]
    values = np.random.default_rng(1).uniform(1, 2, len(names))
    coords = {"param": np.arange(len(names)), "param_name": ("param", names), "layer": ("param", [layer] * len(names))}
    return xr.Dataset(
        {
            "information": ("param", values, {"long_name": "Fisher information", "units": "nat"}),
            "value": ("param", values - 1.5),
        },
        coords,
    )


def test_filters_by_kernel():
    dataset = kernels()
    ax = plots.filters(dataset, layer="3")
    np.testing.assert_array_equal(ax.images[0].get_array(), dataset["information"].values[12:24].reshape(4, 3))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("input channel", "output channel")
    assert ax.get_title(loc="left") == "3: 4 × 3 channels"
    assert ticks(ax.xaxis) == ["0", "1", "2"]
    assert len(ax.figure.axes) == 2
    bare = plots.filters(dataset, layer="3", colorbar=False, title=False)
    assert (len(bare.figure.axes), bare.get_title(loc="left")) == (1, "")


def test_filters_by_weight():
    dataset = weights()
    ax = plots.filters(dataset)
    picture = np.ma.filled(np.ma.asarray(ax.images[0].get_array()), np.nan)
    assert picture.shape == (4 * 3 - 1, 3 * 3 - 1)
    own = dataset["information"].values[:48].reshape(4, 3, 2, 2)
    for o, i, y, x in np.ndindex(4, 3, 2, 2):
        assert picture[o * 3 + y, i * 3 + x] == own[o, i, y, x]
    assert np.isnan(picture[2]).all()
    assert np.isnan(picture[:, 2]).all()
    assert ax.get_title(loc="left") == "0: 4 × 3 channels, kernels of 2 × 2"
    signed = plots.filters(dataset, variable="value")
    assert signed.images[0].norm.vmin == -signed.images[0].norm.vmax
    line = plots.filters(weights((2, 3, 5)))
    assert line.images[0].get_array().shape == (2 * 2 - 1, 3 * 6 - 1)
    volume = plots.filters(weights((2, 1, 2, 3, 3)))
    assert volume.images[0].get_array().shape == (2 * 8 - 1, 3)


def test_filters_grey_what_is_dead_and_cut_what_is_large():
    dataset = kernels()
    values = dataset["information"].values.copy()
    values[13], values[14] = 0.0, 1e-6
    dataset["information"] = ("kernel", values, dataset["information"].attrs)
    ax = plots.filters(dataset, layer="3")
    assert isinstance(ax.images[-1].norm, LogNorm)
    assert [image.get_array()[0, 1] is np.ma.masked or np.isnan(image.get_array()[0, 1]) for image in ax.images] == [
        False,
        True,
    ]
    assert ax.figure.axes[1].get_ylabel().endswith("grey: none")
    cut = plots.filters(kernels(9, 9), layer="0", max_outputs=4, max_inputs=2)
    assert cut.images[0].get_array().shape == (4, 2)
    assert (cut.get_xlabel(), cut.get_ylabel()) == ("input channel (first 2 of 9)", "output channel (first 4 of 9)")
    _, given = plt.subplots()
    assert plots.filters(dataset, given, layer="0") is given


def test_filters_of_groups_leave_absent_pairs_white():
    dataset = kernels(4, 2, layers=("0",))
    dataset["in_channel"] = ("kernel", [2 * (o // 2) + i for o in range(4) for i in range(2)] + [-1])
    image = plots.filters(dataset).images[0]
    picture = np.ma.filled(np.ma.asarray(image.get_array()), np.nan)
    assert picture.shape == (4, 4)
    np.testing.assert_array_equal(np.isnan(picture), [[0, 0, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2)


def test_filters_refuse():
    dataset = kernels()
    with pytest.raises(
        InputError,
        match=full("plot.filters draws one layer; this Dataset has kernels of ['0', '3']. Name one: layer='0'."),
    ):
        plots.filters(dataset)
    with pytest.raises(InputError, match=r"^Unknown layer with kernels '2'\. Known: '0', '3'\.$"):
        plots.filters(dataset, layer="2")
    with pytest.raises(
        InputError,
        match=r"draws the kernels of a convolution: .* the coordinates out_channel and in_channel are missing here",
    ):
        plots.filters(dataset.drop_vars("in_channel"), layer="0")
    with pytest.raises(InputError, match=r"the coordinate param_name is missing here"):
        plots.filters(weights().drop_vars("param_name"))
    with pytest.raises(InputError, match=r"no layer of this Dataset has kernels"):
        plots.filters(weights((4, 3)))
    with pytest.raises(InputError, match=r"it also runs over 'unit'|has the dims"):
        plots.filters(samples.unit_information())
    with pytest.raises(InputError, match=r"scale='log'\) needs values above zero and none below; 'value' has others"):
        plots.filters(weights(), variable="value", scale="log")
    with pytest.raises(
        InputError, match=full("max_inputs must be an integer >= 1, the channels to draw at most; got 0.")
    ):
        plots.filters(dataset, layer="0", max_inputs=0)
    with pytest.raises(TypeError, match=r"plot\.filters draws an xarray Dataset; got dict"):
        plots.filters({})


# --- directions ----------------------------------------------------------------------------------------------------------


def directions(count=4, layers=samples.CNN, **flags) -> xr.Dataset:
    """Both ends of a spectrum of 50 with shares of every layer."""
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.ones(len(layers)), 2 * count)
    values = np.concatenate([np.geomspace(10, 1, count), np.geomspace(1e-5, 1e-6, count)])
    var = samples._var
    return xr.Dataset(
        {
            "eigenvalue": var("rank", values, "eigenvalue of F", "nat"),
            "layer_share": var(("rank", "layer"), shares, "share of the layer"),
            "identifiable": var("rank", flags.get("identifiable", values > 1e-3), "above noise and damping"),
            "degenerate": var("rank", flags.get("degenerate", np.zeros(2 * count, dtype=bool)), "close"),
            "noise_floor": var((), 1e-20, "noise floor", "nat"),
        },
        {
            "rank": [*range(count), *range(50 - count, 50)],
            "side": ("rank", ["stiff"] * count + ["sloppy"] * count),
            "layer": list(layers),
        },
        {"damping": 1e-3},
    )


def test_directions_draw_eigenvalues_above_shares():
    dataset = directions()
    before = dataset.copy(deep=True)
    panels = plots.directions(dataset)
    assert list(panels) == ["eigenvalue", "layer_share"]
    top, bottom = panels.values()
    assert top.figure is bottom.figure
    points = np.concatenate([line.get_xydata() for line in top.get_lines() if line.get_marker() == "o"])
    np.testing.assert_array_equal(points[:, 1], dataset["eigenvalue"])
    assert np.diff(points[:, 0]).tolist() == pytest.approx([1, 1, 1, 1.8, 1, 1, 1])  # a gap between the sides
    assert top.get_yscale() == "log"
    assert ticks(bottom.xaxis) == ["1", "2", "3", "4", "47", "48", "49", "50"]
    assert bottom.get_xlabel() == "rank (1 = stiffest)"
    assert ticks(bottom.yaxis) == list(samples.CNN)
    assert texts(top) == ["identifiable", "below damping or noise", "damping λ", "noise floor = 1e-20, off the axis"]
    cells = {(patch.get_x() + 0.5, patch.get_y() + 0.5): to_hex(patch.get_facecolor()) for patch in bottom.patches}
    shades = mpl.colormaps["YlGnBu"]
    for k, place in enumerate(points[:, 0]):
        for row in range(4):
            near = next(tone for (x, y), tone in cells.items() if abs(x - place) < 1e-9 and y == row)
            assert near == to_hex(shades(float(dataset["layer_share"][k, row])))
    xr.testing.assert_identical(dataset, before)
    top.figure.draw_without_rendering()


def test_directions_mark_clusters_and_write_shares():
    close = np.array([False, True, True, False] + [False] * 4)
    panels = plots.directions(directions(degenerate=close), annotate=True)
    squares = [line for line in panels["eigenvalue"].get_lines() if line.get_marker() == "s"]
    assert sum(len(line.get_xdata()) for line in squares) == 2
    assert "identifiable, in a group too close to tell apart" in texts(panels["eigenvalue"])
    numbers = [text.get_text() for text in panels["layer_share"].texts]
    shares = directions()["layer_share"].values
    assert len(numbers) == (shares >= 0.01).sum()
    assert not plots.directions(directions(), annotate=False)["layer_share"].texts
    quiet = plots.directions(directions(), legend=False, show_damping=False)["eigenvalue"]
    assert quiet.get_legend() is None
    assert len(quiet.get_lines()) == 2


def test_one_axes_for_several_panels_is_told():
    ds = xr.Dataset({"layer_share": (("rank", "layer"), [[0.9, 0.1]])}, {"rank": [0], "layer": ["0", "2"]})
    with pytest.raises(InputError, match=r"axes lacks 'layer_share'\. Pass a dict panel -> Axes"):
        plots.directions(ds, plt.figure().subplots(), panels=["layer_share"])


def test_directions_of_one_panel_and_on_given_axes():
    assert list(plots.directions(directions(), panels=["layer_share"])) == ["layer_share"]
    _, axes = plt.subplots(2, 1, figsize=(8, 6), layout="constrained")
    given = dict(zip(("eigenvalue", "layer_share"), axes, strict=True))
    assert plots.directions(directions(3), given) == given
    message = (
        "plot.directions draws into the Axes of every panel or of none; axes lacks 'layer_share'. Pass a dict panel -> Axes for "
        "['eigenvalue', 'layer_share'], or choose panels=."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.directions(directions(), {"eigenvalue": axes[0]})
    with pytest.raises(InputError, match=r"^Unknown panel 'shares'\."):
        plots.directions(directions(), panels=["shares"])
    with pytest.raises(InputError, match=r"^plot\.directions found no direction above the noise floor\."):
        plots.directions(directions().isel(rank=slice(0, 0)))
    with pytest.raises(
        InputError, match=r"plot\.directions reads the variable 'layer_share', as fl\.directions returns it"
    ):
        plots.directions(directions().drop_vars("layer_share"))
    many = plots.directions(directions(12, samples.DEEP))
    many["eigenvalue"].figure.draw_without_rendering()


# --- ellipses ------------------------------------------------------------------------------------------------------------


def ellipse(radii=(0.1, 1.0), metric=((4.0, 1.0), (1.0, 1.0)), kl=True, bounded=True) -> xr.Dataset:
    metric = np.array(metric)
    values, vectors = np.linalg.eigh(metric)
    values, vectors = values[::-1], vectors[:, ::-1]
    angle = np.linspace(0, 2 * np.pi, 61)
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    radii = np.array(radii)
    with np.errstate(divide="ignore"):
        semi = np.sqrt(2 * radii[:, None] / np.where(bounded, values, [values[0], 0.0]))
    points = np.einsum("ar,cr,ir->cai", circle, np.where(np.isfinite(semi), semi, 1.0), vectors)
    points = points if bounded else np.full_like(points, np.inf)
    x, y = np.linspace(-3, 3, 21), np.linspace(-4, 4, 21)
    u, v = np.meshgrid(x, y)
    quadratic = (metric[0, 0] * u**2 + 2 * metric[0, 1] * u * v + metric[1, 1] * v**2) / 2
    variables = {
        "boundary_x": samples._var(("contour", "angle"), points[..., 0], "step along a"),
        "boundary_y": samples._var(("contour", "angle"), points[..., 1], "step along b"),
        "metric": samples._var(("axis_i", "axis_j"), metric, "metric", "nat"),
        "eigenvalue": samples._var("rank", values if bounded else [values[0], 0.0], "curvature", "nat"),
        "principal": samples._var(("rank", "axis_i"), vectors.T, "principal direction"),
        "semi_axis": samples._var(("contour", "rank"), semi, "semi-axis"),
        "bounded": samples._var((), bounded, "bounded"),
        "kl_quadratic": samples._var(("y", "x"), quadratic, "model", "nat"),
    }
    if kl:
        variables["kl"] = samples._var(("y", "x"), quadratic, "divergence", "nat")
    coords = {
        "radius": ("contour", radii),
        "x": x,
        "y": y,
        "axis_i": ["a", "b"],
        "axis_j": ["a", "b"],
        "rank": [0, 1],
        "angle": angle,
    }
    return xr.Dataset(variables, coords)


def contour_points(ax) -> list[np.ndarray]:
    found = [c for c in ax.collections if hasattr(c, "levels")]
    return [np.concatenate([path.vertices for path in c.get_paths()]) for c in found]


def test_ellipse_draws_model_and_divergence():
    dataset = ellipse()
    before = dataset.copy(deep=True)
    ax = plots.ellipse(dataset)
    curves = [line for line in ax.get_lines() if len(line.get_xdata()) == 61]
    for k, line in enumerate(curves):
        np.testing.assert_array_equal(line.get_xdata(), dataset["boundary_x"][k])
    for points, radius in zip(contour_points(ax), (0.1, 1.0), strict=True):
        value = (4 * points[:, 0] ** 2 + 2 * points[:, 0] * points[:, 1] + points[:, 1] ** 2) / 2
        np.testing.assert_allclose(value, radius, rtol=0.02)  # also the one that is smaller than two cells
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step along a", "step along b")
    assert (ax.get_xlim(), ax.get_ylim()) == ((-3, 3), (-4, 4))
    assert texts(ax) == ["KL = 0.1 nat", "KL = 1 nat", "½ δᵀFδ, the quadratic model", "true divergence on the data"]
    xr.testing.assert_identical(dataset, before)


def test_ellipse_visuals_can_be_left_out():
    assert not contour_points(plots.ellipse(ellipse(), show_kl=False))
    bare = plots.ellipse(ellipse(kl=False), legend=False)
    assert bare.get_legend() is None
    assert not contour_points(bare)
    assert plots.ellipse(ellipse(), equal=True).get_aspect() == 1
    tinted = plots.ellipse(ellipse(), show_ratio=True)
    assert len(tinted.figure.axes) == 2
    tinted.figure.draw_without_rendering()
    _, given = plt.subplots()
    assert plots.ellipse(ellipse(), given) is given
    infinite = ellipse()
    infinite["kl"][0, 0] = np.inf
    assert len(contour_points(plots.ellipse(infinite, show_ratio=True))) == 2


def test_unbounded_ellipse_is_two_lines():
    ax = plots.ellipse(ellipse((0.5,), ((4.0, 0.0), (0.0, 0.0)), bounded=False))
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 2]
    assert sorted(float(line.get_xdata()[0]) for line in lines) == pytest.approx([-0.5, 0.5])
    assert all(abs(line.get_ydata()).min() > 4 for line in lines)
    assert texts(ax)[-1] == "unbounded: a direction without information"
    (points,) = contour_points(ax)
    np.testing.assert_allclose(np.abs(points[:, 0]), 0.5, atol=0.02)
    nothing = plots.ellipse(ellipse((0.5,), ((0.0, 0.0), (0.0, 0.0)), bounded=False))
    assert [line for line in nothing.get_lines() if len(line.get_xdata()) == 2] == []


def test_ellipse_refuses():
    with pytest.raises(InputError, match=r"plot\.ellipse reads the variable 'boundary_x', as fl\.ellipse returns it"):
        plots.ellipse(ellipse().drop_vars("boundary_x"))
    with pytest.raises(TypeError, match=r"plot\.ellipse draws an xarray Dataset; got DataArray"):
        plots.ellipse(ellipse()["kl"])


# --- partitions ----------------------------------------------------------------------------------------------------------


def test_partition_as_squares():
    dataset = samples.partition("kernel", outputs=3, channels=2, kernel=6).assign_attrs(kernel_width=3)
    ax = plots.partition(dataset, squares=True)
    picture = ax.images[0].get_array()
    assert picture.shape[:2] == (3 * 3 - 1, 2 * 4 - 1 + 2 + 1)
    block, tones = dataset["block"].values.reshape(3, 2, 2, 3), {}
    for o, i, y, x in np.ndindex(3, 2, 2, 3):
        tones.setdefault(block[o, i, y, x], set()).add(to_hex(picture[o * 3 + y, i * 4 + x]))
    assert all(len(tone) == 1 for tone in tones.values())
    assert to_hex(picture[2, 0]) == "#ffffff"
    assert to_hex(picture[0, 0]) != to_hex(picture[0, 4])  # the margin does not hide that kernels are neighbours
    assert to_hex(picture[0, 0]) != to_hex(picture[3, 0])
    assert ax.get_xlabel() == "input channel, 2 × 3 each"
    assert ticks(ax.xaxis) == ["0", "1", "bias"]
    assert ticks(ax.yaxis) == ["0", "1", "2"]
    assert ax.get_title(loc="left").startswith("features.3 · kernel")
    cut = plots.partition(samples.partition("unit", 40, 30, 9).assign_attrs(kernel_width=3), squares=True, title=False)
    assert cut.get_xlabel() == "input channel, 3 × 3 each (first 8 of 30)"
    assert cut.get_ylabel() == "output (first 32 of 40)"
    message = (
        "plot.partition(squares=True) draws kernels in two dimensions; features.3 has none, or its Dataset does not say how wide they are (kernel_width). "
        "Leave squares out for dense layers, and pass what Partition.to_dataset(layer) returns."
    )
    for wrong in (samples.partition("unit", kernel=1), samples.partition("kernel")):
        with pytest.raises(InputError, match=full(message)):
            plots.partition(wrong, squares=True)


def test_partition_is_cut_between_kernels():
    ax = plots.partition(samples.partition("kernel", outputs=4, channels=6, kernel=25))
    assert ax.images[0].get_array().shape[1] == 50 + 3
    assert ax.get_xlabel() == "input channel, 25 entries each (first 2 of 6)"
    whole = plots.partition(samples.partition("kernel", outputs=2, channels=2, kernel=100))
    assert whole.images[0].get_array().shape[1] == 72 + 3


def test_partition_of_blocks_that_cross_layers_says_what_is_here():
    dataset = samples.partition("random", outputs=4, channels=2).assign_attrs(scheme="random")
    sizes = np.unique(
        np.concatenate([dataset["block"].values.ravel(), dataset["bias_block"].values]), return_counts=True
    )[1]
    title = plots.partition(dataset).get_title(loc="left")
    assert title == f"features.3 · random · {len(sizes)} blocks with {sizes.min()} to {sizes.max()} entries here"
