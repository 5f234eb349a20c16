"""Plots of partitions and training runs: artists, labels, and what they refuse."""

import matplotlib as mpl
import numpy as np
import plot_samples as samples
import pytest
import xarray as xr

mpl.use("Agg")

from matplotlib.colors import to_hex
from plot_samples import figures, full, texts, ticks  # noqa: F401 - the fixture acts by its presence

from fisherlens import plots
from fisherlens.errors import InputError
from fisherlens.plots import _partition

# --- partition ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["kernel", "unit", "input", "diagonal", "layer", "sequential"])
def test_partition_neighbours_differ_and_blocks_keep_their_colour(scheme):
    dataset = samples.partition(scheme, bias=False)
    (image,) = plots.partition(dataset).images
    picture, block = image.get_array(), dataset["block"].values
    assert picture.shape[:2] == block.shape
    for one, two in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        differ = (picture[one] != picture[two]).any(axis=-1)
        np.testing.assert_array_equal(differ, block[one] != block[two])
    for number in np.unique(block):
        assert len(np.unique(picture[block == number], axis=0)) == 1


def test_partition_cuts_between_blocks():
    dataset = samples.partition("kernel", outputs=2, channels=2, kernel=3, bias=False)
    ax = plots.partition(dataset, show_kernels=False)
    (lines,) = ax.collections
    segments = {tuple(map(tuple, segment)) for segment in np.array(lines.get_segments())}
    vertical = {((2.5, row - 0.5), (2.5, row + 0.5)) for row in range(2)}
    horizontal = {((column - 0.5, 0.5), (column + 0.5, 0.5)) for column in range(6)}
    assert segments == vertical | horizontal


def test_partition_labels_and_title():
    ax = plots.partition(samples.partition("kernel"))
    assert ax.get_title(loc="left") == "features.3 · kernel · 33 blocks, 32 of 9 and 1 of 8"
    assert ax.get_xlabel() == "input channel, 9 entries each"
    assert ticks(ax.xaxis) == ["0", "1", "2", "3", "bias"]
    assert ax.get_ylabel() == "output"
    assert len(ax.get_lines()) == 3  # between four kernels
    assert not plots.partition(samples.partition("kernel"), title=False).get_title(loc="left")
    dense = plots.partition(samples.partition("unit", outputs=5, channels=6, kernel=1))
    assert dense.get_xlabel() == "input"
    assert dense.get_title(loc="left") == "features.3 · unit · 5 blocks of 7"
    assert not dense.get_lines()


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ([[0, 1, 1, 2, 2, 2]], "3 blocks of 1 to 3"),
        ([[0, 0, 0]], "1 block of 3"),
        ([[-1, -1]], "no blocks"),
        ([[0, -1]], "1 block of 1"),
    ],
)
def test_partition_title_counts_blocks(blocks, expected):
    dataset = xr.Dataset({"block": (("output", "input"), np.array(blocks))})
    assert plots.partition(dataset).get_title(loc="left") == expected


def test_partition_of_entries_in_no_block_is_pale():
    dataset = xr.Dataset({"block": (("output", "input"), np.array([[0, -1]]))})
    (image,) = plots.partition(dataset).images
    assert to_hex(image.get_array()[0, 1]) == _partition._NO_BLOCK.lower()


def test_partition_bias_shares_its_block_or_is_grey():
    unit = plots.partition(samples.partition("unit")).images[0].get_array()
    np.testing.assert_array_equal(unit[:, -1], unit[:, 0])
    kernel = plots.partition(samples.partition("kernel")).images[0].get_array()
    assert {to_hex(tone) for tone in kernel[:, -1]} == {_partition._GREYS[0].lower()}
    assert {to_hex(tone) for tone in kernel[:, -2]} == {"#ffffff"}


def test_partition_of_a_large_weight_shows_its_corner_and_says_so():
    dataset = samples.partition("kernel", outputs=64, channels=32)
    ax = plots.partition(dataset)
    assert ax.images[0].get_array().shape[:2] == (32, 72 + 3)
    assert ax.get_xlabel() == "input channel, 9 entries each (first 8 of 32)"
    assert ax.get_ylabel() == "output (first 32 of 64)"
    assert ax.get_title(loc="left") == "features.3 · kernel · 2049 blocks, 1 of 64 and 2048 of 9"
    dense = plots.partition(samples.partition("unit", channels=100, kernel=1), max_inputs=10, max_outputs=4)
    assert dense.get_xlabel() == "input (first 10 of 100)"
    assert dense.get_ylabel() == "output (first 4 of 8)"
    for name in ("max_outputs", "max_inputs"):
        message = f"{name} must be an integer >= 1, the rows or columns to draw at most; got 0."
        with pytest.raises(InputError, match=full(message)):
            plots.partition(dataset, **{name: 0})


def test_partition_object_with_a_layer():
    class Partition:
        def to_dataset(self, layer: str) -> xr.Dataset:
            return samples.partition("unit").assign_attrs(layer=layer)

    ax = plots.partition(Partition(), layer="0.conv")
    assert ax.get_title(loc="left").startswith("0.conv · unit")
    message = (
        "plot.partition draws one layer of a partition; got Partition without layer=. "
        "Name it: plot.partition(p, layer='...'), or pass p.to_dataset('...')."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.partition(Partition())


# --- optimizers -----------------------------------------------------------------------------------


def medians(ax) -> dict[str, np.ndarray]:
    return {line.get_label().split(" (")[0]: line.get_xydata() for line in ax.get_lines() if len(line.get_xdata()) > 1}


def test_optimizers_draw_median_and_range():
    dataset = samples.optimizers(diverge=False)
    ax = plots.optimizers(dataset)
    names = list(dataset["optimizer"].values)
    assert texts(ax) == names
    for name, curve in medians(ax).items():
        runs = dataset["train_loss"].sel(optimizer=name)
        np.testing.assert_array_equal(curve[:, 0], dataset["step"])
        np.testing.assert_allclose(curve[:, 1], runs.median("seed"))
    bands = [band.get_paths()[0].vertices for band in ax.collections]
    for name, band in zip(names, bands, strict=True):
        runs = dataset["train_loss"].sel(optimizer=name)
        assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((float(runs.min()), float(runs.max())))
    assert ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("step", "training loss [nat]")
    assert not plots.optimizers(dataset, show_range=False).collections
    assert len(plots.optimizers(dataset, show_seeds=True).get_lines()) == 4 + 20


def test_optimizers_count_and_mark_diverged_runs():
    dataset = samples.optimizers()
    ax = plots.optimizers(dataset)
    assert texts(ax)[-2:] == ["kfac (2 of 5 diverged)", "a run diverged here"]
    crosses = [line for line in ax.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    assert [cross.get_xdata()[0] for cross in crosses] == [60, 60]
    lost = dataset["train_loss"].sel(optimizer="kfac", step=60)[:2]
    np.testing.assert_allclose([cross.get_ydata()[0] for cross in crosses], lost)
    # three of five go on: the median is the worst of these, as the other two are worse than any
    alive = dataset["train_loss"].sel(optimizer="kfac")[2:, 60:]
    np.testing.assert_allclose(medians(ax)["kfac"][60:, 1], alive.max("seed"))
    quiet = plots.optimizers(dataset, show_diverged=False)
    assert texts(quiet)[-1] == "kfac"
    assert not [line for line in quiet.get_lines() if line.get_marker() == "x"]


def test_optimizers_median_ends_where_most_runs_diverged():
    dataset = samples.optimizers()
    loss = dataset["train_loss"].copy()
    loss[-1, :3, 100:] = np.inf
    curve = medians(plots.optimizers(dataset.assign(train_loss=loss)))["kfac"]
    assert curve[:, 0].max() == 100
    accuracy = medians(plots.optimizers(dataset, variable="test_accuracy"))["kfac"]
    alive = dataset["test_accuracy"].sel(optimizer="kfac", step=accuracy[-1, 0])[2:]
    assert accuracy[-1, 1] == pytest.approx(float(alive.min()))


def test_optimizers_trust_the_flag_of_the_result():
    dataset = samples.optimizers(diverge=False)
    flags = np.zeros((4, 5), dtype=bool)
    flags[1, 0] = True
    flagged = dataset.assign(diverged=(("seed", "optimizer"), flags.T))
    assert texts(plots.optimizers(flagged))[1] == "adam (1 of 5 diverged)"


def test_optimizers_bridge_steps_that_were_not_measured():
    dataset = samples.optimizers(diverge=False)
    curve = medians(plots.optimizers(dataset, variable="test_loss"))["sgd"]
    assert curve[:, 0].tolist() == [1, *range(10, 201, 10)]


def test_optimizers_over_seconds():
    dataset = samples.optimizers(diverge=False)
    ax = plots.optimizers(dataset, x="seconds", variable="test_accuracy")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("time [s]", "test accuracy")
    assert ax.get_yscale() == "linear"
    assert ax.get_ylim()[1] <= 1.02
    middle = dataset["seconds"].median("seed").sel(optimizer="adam", step=[1, *range(10, 201, 10)])
    np.testing.assert_allclose(medians(ax)["adam"][:, 0], middle)
    shared = dataset.assign(seconds=dataset["seconds"].isel(seed=0, drop=True))
    np.testing.assert_allclose(medians(plots.optimizers(shared, x="seconds"))["sgd"][:, 0], shared["seconds"][0])


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_optimizers_keep_an_explosion_off_the_axis(scale):
    dataset = samples.optimizers()
    loss = dataset["train_loss"].copy()
    loss[-1, :2, 59] = 1e33
    ax = plots.optimizers(dataset.assign(train_loss=loss), scale=scale)
    start = float(loss[:, :, 0].max())
    low, high = ax.get_ylim()
    assert high == pytest.approx(10 * start)
    assert low < float(loss.min())
    assert low > (0 if scale == "log" else -1.5 * start)
    crosses = [line.get_ydata()[0] for line in ax.get_lines() if line.get_marker() == "x" and len(line.get_xdata())]
    assert all(start < cross < high for cross in crosses)


def test_optimizers_of_one_seed_and_of_many_names():
    ax = plots.optimizers(samples.optimizers(seeds=1, diverge=False))
    assert not ax.collections
    names = [f"optimizer {i}" for i in range(11)]
    ax = plots.optimizers(samples.optimizers(names=names, steps=30, diverge=False))
    lines = [line for line in ax.get_lines() if line.get_label() in names]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 11
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().x0 > ax.get_window_extent().x1


def test_optimizers_without_a_finite_value():
    dataset = samples.optimizers()
    message = (
        "plot.optimizers found no finite value of 'train_loss' to draw. Did every run diverge before it was first measured? "
        "Look at the variable 'train_loss', or lower the learning rates."
    )
    with pytest.raises(InputError, match=full(message)):
        plots.optimizers(dataset.assign(train_loss=dataset["train_loss"] * np.nan))
    with pytest.raises(InputError, match=full("Unknown x 'time'. Did you mean 'step'? Known: 'step', 'seconds'.")):
        plots.optimizers(dataset, x="time")
