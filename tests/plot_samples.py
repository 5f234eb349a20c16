"""Results as the analyses return them, made up but of realistic shape, and what the tests of plots share."""

import re

import matplotlib as mpl
import numpy as np
import pytest
import xarray as xr

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

CNN = ("features.0", "features.3", "features.7", "classifier")
DEEP = tuple(
    f"encoder.blocks.{block}.{part}" for block in range(8) for part in ("attention.query", "mlp.expand", "norm")
)
STAGES = ("start", "middle", "end")


def _var(dims, values, long_name: str, units: str = "1"):
    return (dims, values, {"long_name": long_name, "units": units})


def spectrum(layers=None, stages=None, count=577, above=412, seed=0) -> xr.Dataset:
    """Power-law eigenvalues down to a rank, rounding noise of both signs behind it."""
    rng = np.random.default_rng(seed)
    dims, coords, shape = [], {"rank": np.arange(count)}, []
    for dim, names in (("layer", layers), ("stage", stages)):
        if names is not None:
            dims.append(dim)
            coords[dim] = list(names)
            shape.append(len(names))
    values = np.full((*shape, count), np.nan)
    flags = np.zeros(values.shape, dtype=bool)
    floors = np.empty(shape)
    for place in np.ndindex(*shape):
        size = count if not layers else max(8, count // (1 + 2 * place[0]))
        rank = above if not layers else max(4, int(size * 0.8))
        top = 30.0 * 0.5 ** sum(place)
        real = top * np.arange(1, rank + 1) ** -1.6 * np.exp(-np.arange(rank) / rank * 4)
        noise = np.sort(rng.standard_normal(size - rank))[::-1] * top * 1e-15
        values[(*place, slice(0, size))] = np.concatenate([real, noise])
        floors[place] = size * 2.2e-16 * top
        flags[place] = values[place] > floors[place]
    return xr.Dataset(
        {
            "eigenvalue": _var((*dims, "rank"), values, "eigenvalue of F", "nat"),
            "above_noise": _var((*dims, "rank"), flags, "above the noise floor"),
            "noise_floor": _var(tuple(dims), floors, "noise floor n·ε·λmax", "nat"),
        },
        coords,
    )


def density(layers=None, stages=None, scale="log", points=200, size=1000, seed=7) -> xr.Dataset:
    """Two bumps with an error of a tenth, and some of the eigenvalues zero."""
    rng = np.random.default_rng(seed)
    names = [(dim, list(labels)) for dim, labels in (("layer", layers), ("stage", stages)) if labels is not None]
    shape = tuple(len(labels) for _, labels in names)
    grid = np.geomspace(1e-6, 10, points) if scale == "log" else np.linspace(0, 10, points)
    place = np.log10(grid) if scale == "log" else grid
    low, high = (-4.0, 0.0) if scale == "log" else (1.0, 8.0)
    shift = rng.uniform(-0.5, 0.5, (*shape, 1))
    bumps = 0.6 * np.exp(-((place - low - shift) ** 2)) + 0.01 * np.exp(-((place - high) ** 2) / 0.02)
    values = bumps / grid if scale == "log" else bumps
    zero = 0.35 + 0 * shift[..., 0]
    cumulative = zero[..., None] + (1 - zero[..., None]) * np.cumsum(bumps, -1) / bumps.sum(-1, keepdims=True)
    dims = tuple(dim for dim, _ in names)
    flat = (*dims, "grid")
    return xr.Dataset(
        {
            "density": _var(flat, values, "density of eigenvalues", "1/nat"),
            "density_sem": _var(flat, 0.1 * values, "standard error of the density", "1/nat"),
            "cumulative": _var(flat, cumulative, "share of eigenvalues up to here"),
            "cumulative_sem": _var(flat, 0.01 + 0 * cumulative, "standard error of the share"),
            "zero_fraction": _var(dims, zero, "share of eigenvalues that are zero"),
            "unresolved_fraction": _var(dims, 0.1 + 0 * zero, "share not told from zero"),
            "noise_floor": _var(dims, 1e-5 + 0 * zero, "noise floor", "nat"),
            "size": _var(dims, np.full(shape, size), "number of eigenvalues"),
            "width": _var(dims, np.full(shape, 0.1), "kernel width"),
        },
        {"grid": ("grid", grid, {"long_name": "eigenvalue", "units": "nat"}), **dict(names)},
        {"grid_scale": scale},
    )


def coupling(layers=CNN, per_layer=1, seed=1) -> xr.Dataset:
    """Couplings that fall with the distance between layers, some of them at the chance level."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(layers)), per_layer)
    count = len(owner)
    names = [layers[o] if per_layer == 1 else f"{layers[o]} unit {i % per_layer}" for i, o in enumerate(owner)]
    distance = np.abs(owner[:, None] - owner[None])
    noise = rng.uniform(0.6, 1.4, (count, count))
    values = 0.75 * np.exp(-0.8 * distance) * (noise + noise.T) / 2
    np.fill_diagonal(values, 1.0)
    values = np.clip(values, 0, 1)
    floor = np.sqrt(np.outer(*[rng.uniform(0.1, 0.3, count)] * 2))
    np.fill_diagonal(floor, 1.0 * floor.diagonal())
    p_value = np.clip(0.5 * floor / values, 0.005, 1)
    layer = [layers[o] for o in owner]
    pair = ("block_i", "block_j")
    return xr.Dataset(
        {
            "coupling": _var(pair, values, "coupling"),
            "noise_floor": _var(pair, floor, "noise floor of the coupling"),
            "p_value": _var(pair, p_value, "p-value"),
            "p_adjusted": _var(pair, np.clip(3 * p_value * p_value, 0, 1), "adjusted p-value"),
            "block_norm": _var("block_i", rng.uniform(0, 1, count), "Frobenius norm of the block", "nat"),
        },
        {"block_i": names, "block_j": names, "layer_i": ("block_i", layer), "layer_j": ("block_j", layer)},
    )


def independence(layers=CNN, partitions=("layer", "unit", "cw-ngd", "mbf", "diagonal"), seed=2) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    shape = (len(partitions), len(layers) + 1)
    dims = ("partition", "layer")
    keep = np.linspace(0.97, 0.35, len(partitions))[:, None] * rng.uniform(0.8, 1.0, shape)
    keep[0, :-1] = 1.0
    blocks = np.geomspace(1, 4000, len(partitions)).astype(int)[:, None] * np.ones(shape, dtype=int)
    return xr.Dataset(
        {
            "energy_captured": _var(dims, keep**2, "energy captured by the partition"),
            "energy_noise_floor": _var(dims, 0.5 * keep**3 + 0.02, "energy captured by a random partition"),
            "natural_gradient_cosine": _var(dims, keep, "cosine to the natural gradient"),
            "decrease_ratio": _var(dims, keep**1.5, "decrease of the quadratic model over the best one"),
            "condition_number": _var(dims, 10 ** (6 * (1 - keep)), "condition number of the preconditioned Fisher"),
            "kl_divergence": _var(dims, 300 * (1 - keep), "divergence to the full Fisher", "nat"),
            "num_blocks": _var(dims, blocks, "number of blocks"),
            "largest_block": _var(dims, 5000 // blocks + 1, "parameters in the largest block"),
            "storage_bytes": _var(dims, 8 * 5000 // blocks + 8, "storage of the blocks", "B"),
        },
        {"partition": list(partitions), "layer": [*layers, "all"]},
    )


def approximations(
    names=("BlockDiagonal layer", "KFAC", "EKFAC", "unit", "mbf shared", "low-rank 10", "diagonal"),
    layers=CNN,
    dampings=None,
    seed=6,
) -> xr.Dataset:
    """Errors that grow from the first to the last, and steps that get worse."""
    rng = np.random.default_rng(seed)
    shape = (len(names), len(layers) + 1)
    dims = ("approximation", "layer")
    dropped = np.linspace(0.3, 0.95, len(names))[:, None] * rng.uniform(0.9, 1.0, shape)
    dropped[:, :-1] *= 0.5
    within = rng.uniform(0.0, 0.3, shape) * (np.arange(len(names)) % 2)[:, None]
    keep = np.clip(1 - dropped * rng.uniform(0.6, 1.0, shape), 0, 1)
    coords = {"approximation": list(names), "layer": [*layers, "all"]}
    over = dims
    if dampings is not None:
        keep = keep[None] ** np.linspace(1, 0.3, len(dampings))[:, None, None]
        over, coords["damping"] = ("damping", *dims), list(dampings)
    return xr.Dataset(
        {
            "dropped_coupling": _var(dims, dropped, "squared norm of the dropped couplings over ‖F‖²"),
            "within_block_error": _var(dims, within, "squared error inside the blocks over ‖F‖²"),
            "decrease_ratio": _var(over, keep**1.5, "decrease of the quadratic model, share of the exact step's"),
            "natural_gradient_cosine": _var(over, keep, "cosine of the stand-in's and the exact natural gradient"),
        },
        coords,
    )


def information(layers=CNN, stages=None, seed=3) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    shape = (len(layers), *([len(stages)] if stages else []))
    dims = ("layer", "stage") if stages else ("layer",)
    values = rng.lognormal(0, 1.5, shape)
    values = np.concatenate([values, values.sum(0, keepdims=True)])
    share = values / values[-1:]
    coords = {"layer": [*layers, "all"], **({"stage": list(stages)} if stages else {})}
    return xr.Dataset(
        {
            "information": _var(dims, values, "information, trace of the block", "nat"),
            "share": _var(dims, share, "share of the information"),
            "effective_dimension": _var(dims, 40 * share, "effective dimension"),
            "dead": _var(dims, values == 0, "without information"),
        },
        coords,
    )


def unit_information(layers=CNN, dim="unit", per_layer=64, seed=4) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(len(layers)), per_layer)
    values = rng.lognormal(-owner, 2.0) * (rng.uniform(size=len(owner)) > 0.06)
    names = [f"{layers[o]} {dim} {i % per_layer}" for i, o in enumerate(owner)]
    return xr.Dataset(
        {
            "information": _var(dim, values, "information, trace of the block", "nat"),
            "share": _var(dim, values / values.sum(), "share of the information"),
            "dead": _var(dim, values == 0, "without information"),
        },
        {dim: names, "layer": (dim, [layers[o] for o in owner])},
    )


def partition(scheme="kernel", outputs=8, channels=4, kernel=9, bias=True, seed=5) -> xr.Dataset:
    """Blocks of a convolution's weight, numbered row-major as a Partition numbers them, the bias last."""
    inputs = channels * kernel
    row, column = np.mgrid[:outputs, :inputs]
    if scheme == "kernel":
        block = row * channels + column // kernel
    elif scheme == "unit":
        block = row
    elif scheme == "input":
        block = column
    elif scheme == "diagonal":
        block = row * inputs + column
    elif scheme == "layer":
        block = np.zeros_like(row)
    elif scheme == "sequential":
        block = (row * inputs + column) // 8
    else:
        block = np.random.default_rng(seed).permutation(outputs * inputs).reshape(outputs, inputs) // 8
    variables = {"block": _var(("output", "input"), block, "number of the block")}
    if bias:
        own = {"unit": np.arange(outputs), "layer": np.zeros(outputs, int)}
        last = own.get(scheme, np.full(outputs, block.max() + 1))
        variables["bias_block"] = _var("output", last, "number of the block of the bias")
    coords = {"output": np.arange(outputs), "input": np.arange(inputs)}
    return xr.Dataset(variables, coords, {"layer": "features.3", "scheme": scheme, "columns_per_channel": kernel})


def optimizers(names=("sgd", "adam", "cw-ngd", "kfac"), seeds=5, steps=200, diverge=True, seed=6) -> xr.Dataset:
    """Losses that fall at different rates; two runs of the last optimizer stop being finite; tests every 10 steps."""
    rng = np.random.default_rng(seed)
    shape = (len(names), seeds, steps)
    rate = np.geomspace(0.01, 0.05, len(names))[:, None, None] * rng.uniform(0.8, 1.2, (len(names), seeds, 1))
    step = np.arange(1, steps + 1)
    loss = 2.3 * np.exp(-rate * step) + 0.02 * rng.lognormal(0, 0.6, shape) + 0.002
    test = 2.3 * np.exp(-rate * step) + 0.1
    if diverge:
        loss[-1, :2, 60:] = np.nan
        loss[-1, :2, 50:60] *= np.geomspace(1.2, 40, 10)
        test[-1, :2, 60:] = np.nan
    accuracy = np.where(np.isfinite(test), 1 - 0.9 * np.exp(-2 * rate * step) - 0.02, np.nan)
    rare = (step % 10 == 0) | (step == 1)
    dims = ("optimizer", "seed", "step")
    cost = np.array([1, 1.2, 2.5, 3.0])[: len(names), None, None] if len(names) <= 4 else 1.0
    seconds = np.broadcast_to(0.004 * cost * step, shape) * rng.uniform(0.9, 1.1, (len(names), seeds, 1))
    return xr.Dataset(
        {
            "train_loss": _var(dims, loss, "training loss", "nat"),
            "test_loss": _var(dims, np.where(rare, test, np.nan), "test loss", "nat"),
            "test_accuracy": _var(dims, np.where(rare, accuracy, np.nan), "test accuracy"),
            "seconds": _var(dims, seconds, "time", "s"),
        },
        {"optimizer": list(names), "seed": np.arange(seeds), "step": step},
    )


@pytest.fixture(autouse=True)
def figures():
    """No figure outlives its test, and no setting or figure is touched behind our back."""
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before
    plt.close("all")


def texts(ax: Axes) -> list[str]:
    """The entries of the legend."""
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def ticks(axis) -> list[str]:
    return [text.get_text() for text in axis.get_ticklabels()]


def full(message: str) -> str:
    return "^" + re.escape(message) + "$"
