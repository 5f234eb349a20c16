"""Coupling inside convolution kernels, and between the output positions that share a kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens.coupling.norms import block_norms
from fisherlens.coupling.tiles import inner_products
from fisherlens.errors import InputError, MemoryBudgetError, UnsupportedModuleError, readable_bytes
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.layout import LayerInfo
from fisherlens.linalg.memory import zeros
from fisherlens.linalg.precision import own_precision
from fisherlens.partitions import Partition
from fisherlens.results import make_dataset
from fisherlens.scores.conv import ConvScores
from fisherlens.scores.replay import LayerFactors, factor_pieces

if TYPE_CHECKING:
    import xarray as xr

_OFFSETS = ("offset_i", "offset_j")


@own_precision
def spatial_coupling(
    F: Fisher, layer: str, *, max_positions: int = 64, seed: int = 0, grid: Sequence[int] | None = None
) -> xr.Dataset:
    r"""Measure what the places in a convolution have to do with each other: those in its kernel, and those on its output map.

    With U the layer's score rows and u_nrt = g_nrt ⊗ a_nt what output position t adds to them, Σ_t u_nrt = u_nr:

    .. math:: \mathrm{tr}\, F_l = \frac{1}{W} \sum_{t, p} \sum_{n, r} \langle u_{nrt}, u_{nrp} \rangle, \qquad
       \rho_{tp} = \frac{\|U_t^\top U_p\|}{\sqrt{\|U_t^\top U_t\| \|U_p^\top U_p\|}}

    Approximations that "expand" positions (KFAC's for convolutions, say) drop every term t ≠ p: they take positions for uncorrelated examples.

    Parameters
    ----------
    F
        The Fisher operator.
    layer
        Name of a convolution, or of a dense layer that is used at several positions (then without the kernel's variables).
    max_positions
        ``position_coupling`` is over at most this many output positions, a random choice if there are more, as its cost grows with their square. Default 64 (our
        choice). ``trace_share`` is always over all of them.
    seed
        Seeds an own generator for that choice.
    grid
        Output positions along each axis, ``(height, width)`` of a map; None where the capture knows them, which it does not where F keeps a convolution's
        patches (few positions) and was built without a convolution of many.

    Returns
    -------
    Dataset over ``offset_i, offset_j`` (places in the kernel, "row,column"): ``kernel_coupling``, the coupling of the blocks of all weights at one place,
    with its ``kernel_noise_floor``; ``kernel_correlation``, the entries of the correlation matrix of one kernel's parameters, F_ij/√(F_ii F_jj), averaged over the
    kernels with information; over ``distance`` between output positions, Euclidean and rounded to whole positions: ``trace_share``, the share of tr F_l from pairs at
    this distance, which add up to 1 and may be negative; ``num_pairs``; ``position_coupling``, the mean of ρ_tp over pairs with information, NaN where the choice has none,
    with its ``position_noise_floor`` and ``num_sampled_pairs``; and ``position_share``, that of t = p: 1 where positions are uncorrelated or only one
    is used, and 1/T where all T are alike.

    Raises
    ------
    UnsupportedModuleError
        A layer that is neither a convolution nor dense, or whose parameters are used outside of it.
    InputError
        An unknown layer; one that is called several times, whose positions are on no one map; an unknown or wrong ``grid``.
    MemoryBudgetError
        The positions' matrix, or one row of their Gram matrices, is over the budget of F.

    Notes
    -----
    Cost: one pass over the data where F keeps the layer as rows; N T² (d_i + R d_o) multiplications for the trace; (N R)² m²/4 + (N R)² m d_o/2 for m positions;
    that of :func:`coupling` for as many blocks as the kernel has places. With groups, positions meet within their group.

    Examples
    --------
    >>> import fisherlens as fl
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> F = fl.Fisher(model, (x, torch.zeros(5, dtype=torch.long)), likelihood="categorical")
    >>> ds = fl.spatial_coupling(F, "0", grid=(2, 2))
    >>> ds["kernel_coupling"].shape, ds["distance"].values.tolist(), round(float(ds["trace_share"].sum()), 6)
    ((9, 9), [0, 1], 1.0)
    """
    require_fisher(F)
    info = F.layout.layer(layer)
    if not isinstance(max_positions, int) or isinstance(max_positions, bool) or max_positions < 2:
        raise InputError(
            f"max_positions must be an integer >= 2, the output positions to compare with each other; got {max_positions!r}."
        )
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed must be an integer >= 0; got {seed!r}.")
    if info.kind not in ("conv", "dense"):
        raise UnsupportedModuleError(
            f"spatial_coupling takes a convolution, or a dense layer that is used at several positions; layer {layer!r} is a {info.type_name}, which has no output "
            "positions that share a weight. print(F.layout) shows the layers."
        )
    variables, coords = _of_kernel(F, info) if info.kind == "conv" and info.weight else ({}, {})
    found, distances, shape = _of_positions(F, info, max_positions, seed, grid)
    variables |= found
    coords["distance"] = ("distance", distances, {"long_name": "distance of two output positions", "units": "1"})
    settings = {"max_positions": max_positions, "seed": seed, "grid": list(shape)}
    return make_dataset(
        variables,
        coords,
        operator=F,
        method="exact, by place in the kernel and on the output map",
        settings=settings,
        layer=layer,
    )


def _of_kernel(F: Fisher, info: LayerInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    """Coupling of the places in the kernel, and the mean correlation of the entries of one kernel."""
    part = F.restrict(info.name)
    weight = part.layout.layer(info.name).weight
    window = weight.shape[2:]
    count = math.prod(window)
    entries = torch.arange(weight.start, weight.stop, device="cpu").view(-1, count)  # kernels by places
    labels = [",".join(map(str, place)) for place in itertools.product(*map(range, window))]
    sizes = np.full(count, len(entries))
    blocks = Partition("kernel place", part.layout, sizes, entries.T.reshape(-1).contiguous(), {}, lambda: labels)
    found = block_norms(part.scores, blocks, part.memory)
    norm = found.squares.diagonal().clamp(min=0).sqrt()
    scale = norm[:, None] * norm
    there = scale > 0
    scale = scale.where(there, 1)
    coupling = (found.squares / scale).clamp(0, 1).sqrt().where(there, 0)
    floor = (found.traces[:, None] * found.traces / (max(F.n_rows, 1) * scale)).sqrt().where(there, 0)
    words = {
        "kernel_coupling": (coupling, "coupling of two places in the kernel"),
        "kernel_noise_floor": (floor, "coupling of uncorrelated places in a sample of this size"),
        "kernel_correlation": (_mean_correlation(part, entries), "mean correlation of two entries of one kernel"),
    }
    variables = {name: (_OFFSETS, values, {"long_name": text, "units": "1"}) for name, (values, text) in words.items()}
    return variables, dict.fromkeys(_OFFSETS, labels)


def _mean_correlation(part: Fisher, entries: Tensor) -> Tensor:
    """Mean over kernels of F_ij/√(F_ii F_jj), over those where both entries have information; NaN where none has."""
    layer = part.scores.layers[0]
    count = entries.shape[1]
    total = torch.zeros(count, count, dtype=torch.float64, device=part.device)
    known = torch.zeros_like(total)
    step = max(1, 2**24 // count**2)
    for some in entries.to(part.device).split(step):
        moments = layer.moments(some).double()
        own = moments.diagonal(dim1=1, dim2=2).sqrt()
        scale = own[:, :, None] * own[:, None]
        there = scale > 0
        total += (moments / scale.where(there, 1)).where(there, 0).sum(0)
        known += there.sum(0)
    return torch.where(known > 0, total / known.clamp(min=1), torch.nan).clamp(-1, 1)


def _of_positions(
    F: Fisher, info: LayerInfo, max_positions: int, seed: int, grid: Sequence[int] | None
) -> tuple[dict[str, Any], np.ndarray, tuple[int, ...]]:
    inner, some, factors = _gathered(F, info, max_positions, seed)
    shape = _grid(F, info, len(inner), grid)
    distance = _distances(shape)
    count = int(distance.max(initial=0)) + 1
    flat = torch.from_numpy(distance).reshape(-1)

    def by_distance(values: Tensor, at: Tensor) -> np.ndarray:
        return (
            torch.zeros(count, dtype=torch.float64, device="cpu")
            .index_add_(0, at.reshape(-1), values.double().reshape(-1).cpu())
            .numpy()
        )

    total = inner.sum().item()
    share = by_distance(inner, flat) / total if total > 0 else np.full(count, np.nan)
    squares, traces = _position_norms(factors, F.memory)
    norm = squares.diagonal().clamp(min=0).sqrt()
    scale = norm[:, None] * norm
    pairs = torch.triu(scale > 0).cpu()  # a position with itself, and each pair once
    scale = scale.where(scale > 0, 1)
    between = torch.from_numpy(distance)[some][:, some]
    coupling = (squares / scale).clamp(0, 1).sqrt().cpu()
    floor = (traces[:, None] * traces / (max(F.n_rows, 1) * scale)).sqrt().cpu()
    sampled = by_distance(pairs[pairs], between[pairs])
    means = [
        np.divide(by_distance(values[pairs], between[pairs]), sampled, out=np.full(count, np.nan), where=sampled > 0)
        for values in (coupling, floor)
    ]
    every = torch.triu(torch.ones(len(inner), len(inner), dtype=torch.bool, device="cpu"))
    words = {
        "trace_share": ("distance", share, "share of the trace from positions at this distance"),
        "num_pairs": (
            "distance",
            by_distance(every[every], torch.from_numpy(distance)[every]).astype(int),
            "pairs of positions",
        ),
        "position_coupling": ("distance", means[0], "mean coupling of two output positions"),
        "position_noise_floor": ("distance", means[1], "coupling of uncorrelated positions in a sample of this size"),
        "num_sampled_pairs": (
            "distance",
            sampled.astype(int),
            "pairs of positions with information that were compared",
        ),
        "position_share": ((), share[0], "share of the trace from each position with itself"),
    }
    variables = {
        name: (dims, values, {"long_name": text, "units": "1"}) for name, (dims, values, text) in words.items()
    }
    return variables, np.arange(count), shape


def _gathered(F: Fisher, info: LayerInfo, most: int, seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Σ_nr ⟨u_nrt, u_nrp⟩ of all positions, ``(T, T)`` float64; the chosen positions; inputs and output scores at these, of all examples."""
    inner, inputs, outputs = None, [], []
    some = torch.zeros(0, dtype=torch.long, device="cpu")
    for _, found in factor_pieces(F, [info.name]):
        factors = found[info.name]
        if inner is None:
            positions = factors.positions
            _require_positions(F, info, positions)
            inner = torch.zeros(positions, positions, dtype=torch.float64, device=F.device)
            chosen = np.random.default_rng(seed).permutation(positions)[:most]
            some = torch.from_numpy(np.sort(chosen))
        inner += _inner(factors)
        at = some.to(F.device)
        inputs.append(factors.homogeneous[:, :, at])
        outputs.append(factors.outputs[:, :, :, at])
    return inner, some, (torch.cat(inputs), torch.cat(outputs))


def _require_positions(F: Fisher, info: LayerInfo, positions: int) -> None:
    if not positions:
        raise InputError(
            f"Layer {info.name!r} is never called on these data, so it has no output positions. Leave it out, or look at why the model does not use it."
        )
    if 3 * 8 * positions**2 > F.memory:
        raise MemoryBudgetError(
            f"A matrix over the {positions} output positions of layer {info.name!r} needs {readable_bytes(3 * 8 * positions**2)} with workspace, over the budget of "
            f"{readable_bytes(F.memory)}. Use smaller inputs, or raise memory= of the Fisher."
        )


def _inner(factors: LayerFactors) -> Tensor:
    """Σ over examples, columns and groups of (a_t·a_p)(g_t·g_p), ``(T, T)`` float64, a few examples at a time."""
    a, g = factors.homogeneous, factors.outputs  # (n, groups, t, d), (n, r, groups, t, d_o)
    positions = factors.positions
    out = torch.zeros(positions, positions, dtype=torch.float64, device=a.device)
    for one, scores in zip(a, g, strict=True):
        flat = scores.permute(1, 2, 0, 3).flatten(2)  # (groups, t, r d_o)
        out += ((one @ one.mT) * (flat @ flat.mT)).sum(0)
    return out


def _position_norms(factors: tuple[Tensor, Tensor], memory: int) -> tuple[Tensor, Tensor]:
    """‖U_tᵀU_p‖² of the chosen positions, ``(m, m)``, and tr U_tᵀU_t, ``(m,)``, float64: Gram matrices in tiles of examples, lower triangle only."""
    a, g = factors
    n, r, groups, count, _ = g.shape
    rows, item = n * r, a.dtype.itemsize
    squares = torch.zeros(count, count, dtype=torch.float64, device=a.device)
    traces = torch.zeros(count, dtype=torch.float64, device=a.device)
    step = int(min(n, max(memory // 4, 2**26) // (2 * count * r * rows * item)))
    if not step:
        raise MemoryBudgetError(
            f"The Gram matrices of {count} output positions over {rows} score rows need {readable_bytes(8 * count * r * rows * item)} for one example, over the "
            f"budget of {readable_bytes(memory)}. Use a smaller max_positions, fewer examples, or raise memory= of the Fisher."
        )
    a, flat = a.permute(1, 2, 0, 3), g.permute(2, 3, 0, 1, 4).flatten(2, 3)  # (groups, m, n, d), (groups, m, n r, d_o)
    for start in range(0, n, step):
        stop = min(start + step, n)
        tile = zeros((count, (stop - start) * r, stop * r), a.dtype, a.device)
        for group in range(groups):
            inputs = (a[group, :, start:stop] @ a[group, :, :stop].mT).repeat_interleave(r, 1).repeat_interleave(r, 2)
            tile += inputs * (flat[group, :, start * r : stop * r] @ flat[group, :, : stop * r].mT)
        traces += tile[:, :, start * r :].diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64)
        tile[:, :, : start * r] *= math.sqrt(2)  # these entries stand for their mirror images too
        squares += inner_products(tile.reshape(count, -1))
    return squares, traces


def _grid(F: Fisher, info: LayerInfo, positions: int, given: Sequence[int] | None) -> tuple[int, ...]:
    """Output positions along each axis."""
    if given is not None:
        shape = tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
        axes = len(info.weight.shape) - 2 if info.kind == "conv" and info.weight else len(shape)
        whole = all(isinstance(x, int) and not isinstance(x, bool) and x >= 1 for x in shape)
        if not whole or len(shape) != axes or math.prod(shape) != positions:
            raise InputError(
                f"grid must be the output positions along each axis of layer {info.name!r}, {axes} positive integers with the product {positions}; got {given!r}. "
                "Leave it out where the capture knows it."
            )
        return shape
    found = _known_grid(F, info)
    if found is None and positions == 1:
        return (1,)
    if found is None:
        raise InputError(
            f"The shape of the map of {positions} output positions of layer {info.name!r} is not known from the capture, which kept its patches only. Pass grid=(height, "
            "width) of its output."
        )
    if math.prod(found) != positions:
        raise InputError(
            f"Layer {info.name!r} is called several times: its {positions} output positions lie on several maps, between which there is no distance. Pass "
            "grid= if they should be laid out in one."
        )
    return found


def _known_grid(F: Fisher, info: LayerInfo) -> tuple[int, ...] | None:
    scores = F.scores[info.name]
    if isinstance(scores, ConvScores):
        return scores.positions
    found = _uses(F, info)
    if info.kind == "dense":  # uses of the layer, one after another, are a line of positions
        line = (F.plan[info.name].positions,)
        return found if found is not None and math.prod(found) == line[0] else line
    return found


def _uses(F: Fisher, info: LayerInfo) -> tuple[int, ...] | None:
    """Output shape of the layer's first call, without examples and channels, where the capture's description is at hand."""
    collector = F.replay._collector
    found = [] if collector is None else collector.uses.get(info.name, [])
    if not found:
        return None
    shape = tuple(found[0].output_shape)
    return shape[2:] if info.kind == "conv" else shape[1:-1] or (1,)


def _distances(shape: tuple[int, ...]) -> np.ndarray:
    """Euclidean distance between the positions of a grid, row-major, rounded to whole positions, ``(T, T)``."""
    places = np.stack(np.unravel_index(np.arange(math.prod(shape)), shape), axis=1)
    out = np.zeros((len(places), len(places)))
    for axis in places.T:
        out += np.square(axis[:, None] - axis[None, :])
    return np.rint(np.sqrt(out)).astype(np.int64)
