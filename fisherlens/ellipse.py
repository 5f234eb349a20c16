"""A plane of parameter space: the Fisher ellipse, and how far beyond it the divergence that it stands for really reaches."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fisherlens._progress import progress as progress_bar
from fisherlens.errors import InputError, NonFiniteError
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.fisher.checks import finite
from fisherlens.layout import Layout
from fisherlens.linalg.precision import own_precision
from fisherlens.results import make_dataset
from fisherlens.scores.capture import as_module
from fisherlens.scores.checks import check_model
from fisherlens.scores.recorder import Recorder, preserved_randomness
from fisherlens.scores.source import Batch, Source
from fisherlens.spectrum.intervals import check_count

if TYPE_CHECKING:
    import xarray as xr

# Cosine beyond which two directions span no plane (our choice).
_PARALLEL = 1 - 1e-8
# Examples that go through the network at once.
_TOGETHER = 1024
_LABEL = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<place>\d+(?:,\d+)*)\])?")
_KINDS = (
    "two flat vectors (P,), a tensor (P, 2), a dict name → (tensor, tensor), two parameter labels such as '0.weight[1,2]', two flat indices, or the Dataset "
    "of fl.directions(..., vectors=True) with two ranks selected"
)


@own_precision
def ellipse(
    F: Fisher,
    directions: Any,
    *,
    radius: float | Sequence[float],
    model: Any = None,
    data: Any = None,
    grid: int = 21,
    extent: float | tuple[float, float] | None = None,
    num_angles: int = 181,
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Draw the Fisher ellipse in a plane of parameter space, beside the divergence that it approximates.

    .. math:: \tfrac{1}{2} \delta^\top F \delta = r, \qquad \delta = x\, e_1 + y\, e_2, \qquad
              \mathrm{KL}(p_\theta \| p_{\theta+\delta}) = \tfrac{1}{2} \delta^\top F \delta + O(\delta^3)

    Parameters
    ----------
    F
        The Fisher operator. Its quadratic form is the divergence's for the exact kind; the mc kind estimates it, the empirical one is another matrix.
    directions
        The plane: two flat vectors ``(P,)`` or dicts name → tensor; a tensor ``(P, 2)`` or a dict name → ``(*shape, 2)``, or pairs of tensors; two labels such
        as ``"0.weight[1,2]"``, or two flat indices; or what :func:`directions` returns with ``vectors=True`` and two ranks selected, ``found.sel(rank=[0,
        9])``. They are made unit vectors e_1, e_2 and not orthogonalised: x and y count what each of them adds.
    radius
        r > 0, a divergence in nat per example, one or several.
    model, data
        The network and the data on which F was built, to evaluate the true divergence; both or neither. The network is left as it is.
    grid
        Points on each axis where the divergence is evaluated; odd numbers hold the origin.
    extent
        Half-widths of the grid along x and y, a number for both; None for 1.6 times those of the largest ellipse (along what it does not bound, as far as
        along the rest; 1 where it bounds nothing).
    num_angles
        Points on each ellipse.
    progress
        Show a bar; None for "if standard error is a terminal".

    Returns
    -------
    Dataset with ``boundary_x``, ``boundary_y`` ``(contour, angle)``, the ellipse of each ``radius (contour)`` in units of the parameters; ``metric (axis_i,
    axis_j)`` e_iᵀ F e_j in nat, with ``overlap`` e_1·e_2; ``eigenvalue (rank)``, the curvatures of the plane along its principal directions ``principal
    (rank, axis_i)`` of unit length (coefficients of e_1 and e_2); ``semi_axis (contour, rank)`` √(2 r / eigenvalue) and ``half_width (contour, axis_i)``,
    how far the ellipse reaches along x and y; ``kl_quadratic (y, x)`` ½ δᵀFδ and, with model and data, ``kl (y, x)``, the mean KL(p_θ ‖ p_θ+δ) over the
    terms of the data, both in nat; infinite where the network overflows. ``bounded`` is False where a direction of the plane has no information: the
    "ellipse" is then two parallel lines, ``semi_axis`` and ``half_width`` are infinite, and so are the boundary's points.

    Raises
    ------
    InputError: directions of another size, zero, or dependent; an unknown label; a radius that is not finite and positive; model or data without the other,
    or not those of F; a likelihood without a divergence. NonFiniteError: a direction with NaN or infinity. TypeError: directions of another type.

    Notes
    -----
    Cost: two half-products; with model and data as many forward passes over the data as the grid has points. θ are the parameters when F was built, also
    where the model was trained since; what F does not cover (frozen parameters, buffers) is the model's own. A Gaussian likelihood and a model that is
    linear in its parameters agree with the ellipse everywhere.

    Examples
    --------
    >>> import fisherlens as fl
    >>> model, x = torch.nn.Linear(3, 2), torch.eye(3)
    >>> F = fl.Fisher(model, (x, None), likelihood="gaussian")
    >>> found = fl.ellipse(F, ["weight[0,0]", "weight[0,1]"], radius=0.5, model=model, data=(x, None), grid=5)
    >>> bool(abs(found.kl - found.kl_quadratic).max() < 1e-5)
    True
    """
    require_fisher(F)
    radii = _radii(radius)
    check_count("grid", grid, 2, "the points on each axis")
    check_count("num_angles", num_angles, 8, "the points on an ellipse")
    if (model is None) != (data is None):
        raise InputError(
            "The true divergence needs both model= and data=, those of F; got one of them. Give both, or neither for the quadratic model alone."
        )
    plane, names = _plane(F, directions)
    z = finite(F.scores.matmat(plane), "The product with the directions", F.dtype).double() / F.total_weight**0.5
    overlap = (plane[:, 0].double() @ plane[:, 1].double()).item()
    values, principal, bounded = _principal(z, overlap, _floor(F))
    metric = (z.T @ z).cpu().numpy()
    semi = np.sqrt(2 * radii[:, None] / np.where(bounded, values, 1)) * np.where(bounded, 1.0, np.inf)
    angle = np.linspace(0, 2 * np.pi, num_angles)
    boundary = _boundary(semi, principal, angle)
    half_width = (
        np.sqrt(((semi[..., None] * np.abs(principal)) ** 2).sum(1)) if bounded.all() else _reach(semi, principal)
    )
    x, y = _grid(half_width, semi, grid, extent)
    delta = np.stack(np.meshgrid(x, y), axis=-1)  # (y, x, 2)
    variables: dict[str, Any] = {
        "boundary_x": (("contour", "angle"), boundary[..., 0], {"long_name": f"step along {names[0]}", "units": "1"}),
        "boundary_y": (("contour", "angle"), boundary[..., 1], {"long_name": f"step along {names[1]}", "units": "1"}),
        "metric": (("axis_i", "axis_j"), metric, {"long_name": "Fisher information in the plane", "units": "nat"}),
        "overlap": ((), overlap, {"long_name": "cosine between the two directions", "units": "1"}),
        "eigenvalue": ("rank", values, {"long_name": "curvature along a principal direction", "units": "nat"}),
        "principal": (("rank", "axis_i"), principal, {"long_name": "principal direction of the plane", "units": "1"}),
        "semi_axis": (("contour", "rank"), semi, {"long_name": "semi-axis of the ellipse", "units": "1"}),
        "half_width": (("contour", "axis_i"), half_width, {"long_name": "reach of the ellipse", "units": "1"}),
        "bounded": (
            (),
            bool(bounded.all()),
            {"long_name": "no direction of the plane without information", "units": "1"},
        ),
        "kl_quadratic": (
            ("y", "x"),
            np.einsum("yxi,ij,yxj->yx", delta, metric, delta) / 2,
            {"long_name": "quadratic model of the divergence", "units": "nat"},
        ),
    }
    if model is not None:
        network = _Network(F, model, data)
        kl = network.divergences(plane, delta.reshape(-1, 2), progress).reshape(grid, grid)
        variables["kl"] = (("y", "x"), kl, {"long_name": "divergence of the predictions", "units": "nat"})
    steps = [{"long_name": f"step along {name}", "units": "1"} for name in names]
    coords = {
        "contour": np.arange(len(radii)),
        "radius": ("contour", radii, {"long_name": "divergence", "units": "nat"}),
        "angle": ("angle", angle, {"long_name": "angle", "units": "rad"}),
        "axis_i": names,
        "axis_j": names,
        "rank": [0, 1],
        "x": ("x", x, steps[0]),
        "y": ("y", y, steps[1]),
    }
    method = "exact: two half-products" + ("" if model is None else f"; divergence by {grid**2} passes of the network")
    return make_dataset(variables, coords, operator=F, method=method, settings={"grid": grid, "num_angles": num_angles})


def _radii(radius: Any) -> np.ndarray:
    try:
        values = np.atleast_1d(np.asarray(radius, dtype=float))
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if (
        values.ndim != 1
        or not len(values)
        or not (np.isfinite(values) & (values > 0)).all()
        or isinstance(radius, bool)
    ):
        raise InputError(
            f"radius must be a finite number > 0 or several, a divergence in nat per example; got {radius!r}. 0.01 is a change of predictions that is hardly seen, "
            "1 a large one."
        )
    return values


# --- the plane -------------------------------------------------------------------------------------------------------


def _plane(F: Fisher, directions: Any) -> tuple[Tensor, list[str]]:
    """Two unit vectors ``(P, 2)`` and how to call them."""
    names = ["direction 1", "direction 2"]
    if hasattr(directions, "data_vars"):
        pair, names = _of_dataset(directions)
    elif isinstance(directions, Tensor | np.ndarray):
        block = _tensor(directions)
        if block.ndim != 2 or block.shape[1] != 2:
            raise InputError(
                f"directions as one tensor must have shape ({F.n_params}, 2), one vector per column; got {tuple(block.shape)}."
            )
        pair = list(block.T)
    elif isinstance(directions, Mapping):
        pair = [{name: _half(value, k) for name, value in directions.items()} for k in (0, 1)]
    elif isinstance(directions, Sequence) and not isinstance(directions, str | bytes) and len(directions) == 2:
        pair = list(directions)
        names = [str(d) if isinstance(d, str) else _name_of(F, d, name) for d, name in zip(pair, names, strict=True)]
    else:
        raise TypeError(f"directions must be {_KINDS}; got {_described(directions)}.")
    plane = torch.stack([_vector(F, d, name) for d, name in zip(pair, names, strict=True)], dim=1)
    cosine = abs((plane[:, 0].double() @ plane[:, 1].double()).item())
    if cosine > _PARALLEL:
        raise InputError(
            f"The two directions must span a plane; {names[0]!r} and {names[1]!r} are parallel (cosine {cosine:.10f}). Choose another second direction."
        )
    return plane, names if names[0] != names[1] else [f"{names[0]} (1)", f"{names[1]} (2)"]


def _tensor(value: Any) -> Tensor:
    """The same numbers, a tensor where it is: not on the default device."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def _described(value: Any) -> str:
    return f"{type(value).__name__} of length {len(value)}" if hasattr(value, "__len__") else type(value).__name__


def _of_dataset(dataset: xr.Dataset) -> tuple[list[Any], list[str]]:
    if "eigenvector" not in dataset or set(dataset["eigenvector"].dims) != {"rank", "param"}:
        raise InputError(
            "directions as a Dataset must hold eigenvector (rank, param): fl.directions(F, k, vectors=True) returns it."
        )
    vectors = dataset["eigenvector"].transpose("rank", "param")
    if len(vectors) != 2:
        raise InputError(
            f"A plane needs two directions; the Dataset holds {len(vectors)}. Select two ranks: found.sel(rank=[0, 9]), of {dataset['rank'].values.tolist()}."
        )
    sides = [f"{side} " for side in dataset["side"].values.tolist()] if "side" in dataset.coords else ["", ""]
    names = [f"{side}direction {rank + 1}" for side, rank in zip(sides, dataset["rank"].values.tolist(), strict=True)]
    return [torch.from_numpy(v.copy()) for v in vectors.values], names


def _half(value: Any, k: int) -> Any:
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[k]
    if isinstance(value, Tensor) and value.ndim and value.shape[-1] == 2:
        return value[..., k]
    raise InputError(
        f"directions as a dict must map each name to a pair of tensors, or to one tensor with a last axis of 2; got {_described(value)}."
    )


def _name_of(F: Fisher, direction: Any, name: str) -> str:
    """The label of a flat index; anything else keeps its name."""
    if not isinstance(direction, int | np.integer) or isinstance(direction, bool):
        return name
    if not 0 <= direction < F.n_params:
        raise InputError(
            f"A flat index must lie in 0..{F.n_params - 1}; got {direction}. print(F.layout) shows where each tensor lies."
        )
    info = next(p for p in F.layout.parameters if p.start <= direction < p.stop)
    place = np.unravel_index(int(direction) - info.start, info.shape) if info.shape else ()
    return f"{info.name}[{','.join(map(str, place))}]" if place else info.name


def _vector(F: Fisher, direction: Any, name: str) -> Tensor:
    """One direction as a flat unit vector in the dtype of F."""
    if isinstance(direction, str):
        v = _entry(F, direction)
    elif isinstance(direction, int | np.integer) and not isinstance(direction, bool):
        v = torch.zeros(F.n_params, dtype=torch.float64, device="cpu")
        v[int(direction)] = 1
    elif isinstance(direction, Mapping):
        v = F.layout.flatten({key: _tensor(value) for key, value in direction.items()})
    elif isinstance(direction, Tensor | np.ndarray):
        v = _tensor(direction)
    else:
        raise TypeError(f"directions must be {_KINDS}; got {type(direction).__name__} as {name!r}.")
    if v.shape != (F.n_params,):
        raise InputError(
            f"A direction must be flat, of shape ({F.n_params},), one number per parameter of F; {name!r} has shape {tuple(v.shape)}."
        )
    if v.is_complex():
        raise TypeError(f"A direction must hold real numbers; {name!r} is {v.dtype}.")
    v = v.detach().to(F.device, torch.float64)
    if not torch.isfinite(v).all():
        raise NonFiniteError(
            f"The direction {name!r} holds NaN or infinity. Of fl.directions, vectors below the noise floor do; else look at where it was computed."
        )
    largest = v.abs().max()
    if largest == 0:
        raise InputError(f"The direction {name!r} is zero, so it is none. Choose a vector that moves a parameter.")
    v = v / largest  # its square may be too large or too small for the dtype
    return (v / torch.linalg.vector_norm(v)).to(F.dtype)


def _entry(F: Fisher, label: str) -> Tensor:
    """The unit vector of one parameter by its label."""
    found = _LABEL.fullmatch(label.replace(" ", ""))
    info = F.layout[found["name"] if found else label]
    place = tuple(int(i) for i in found["place"].split(",")) if found and found["place"] else ()
    if len(place) != len(info.shape) or any(i >= size for i, size in zip(place, info.shape, strict=True)):
        raise InputError(
            f"{label!r} is no entry of parameter {info.name!r} of shape {info.shape}. Write {info.name + '[' + ','.join('0' for _ in info.shape) + ']' if info.shape else info.name!r}, "
            "say, with indices that count from 0."
        )
    v = torch.zeros(F.n_params, dtype=torch.float64, device="cpu")
    v[info.start + (int(np.ravel_multi_index(place, info.shape)) if place else 0)] = 1
    return v


# --- the ellipse -----------------------------------------------------------------------------------------------------


def _floor(F: Fisher) -> float:
    """Curvature below which rounding of U e, of relative size ε of its terms, leaves nothing to be seen."""
    eps = torch.finfo(F.dtype).eps
    return 64 * eps**2 * F.n_params**0.5 * max(F.trace(), 0.0)


def _principal(z: Tensor, overlap: float, floor: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Curvatures of the plane, descending, the coefficients of their unit directions in rows, and which are above zero.

    With e_1, e_2 made orthonormal by S^-½, S = [[1, c], [c, 1]], they are squared singular values of Z S^-½: a small one keeps its digits.
    """
    plus, minus = 1 / math.sqrt(2 * (1 + overlap)), 1 / math.sqrt(2 * (1 - overlap))
    root = z.new_tensor([[plus, plus], [minus, -minus]])  # rows: coefficients of an orthonormal basis
    image = z @ root.T
    _, singular, rotation = torch.linalg.svd(
        image if len(image) > 1 else torch.cat([image, torch.zeros_like(image)]), full_matrices=False
    )
    principal = (rotation @ root).cpu().numpy()
    values = singular.square().cpu().numpy()
    principal *= np.where(principal[np.arange(2), np.abs(principal).argmax(1)] < 0, -1, 1)[:, None]
    bounded = values > floor
    return np.where(bounded, values, 0.0), principal, bounded


def _boundary(semi: np.ndarray, principal: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Points of each ellipse, ``(contour, angle, 2)``; infinite where a semi-axis is."""
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    circle[np.abs(circle) < 1e-15] = 0.0
    with np.errstate(invalid="ignore"):
        scaled = circle[None] * semi[:, None]  # (contour, angle, rank)
        points = scaled[..., 0, None] * principal[0] + scaled[..., 1, None] * principal[1]
    if np.isfinite(semi).all():
        return points
    return np.where(np.isfinite(scaled).all(-1, keepdims=True), points, np.inf)


def _reach(semi: np.ndarray, principal: np.ndarray) -> np.ndarray:
    """Half-widths along the axes where a semi-axis is infinite: infinite on every axis that it has a part in."""
    parts = np.where(
        np.abs(principal)[None] > 1e-12, semi[..., None] * np.maximum(np.abs(principal), 1e-300)[None], 0.0
    )
    return np.sqrt((parts**2).sum(1))


def _grid(half_width: np.ndarray, semi: np.ndarray, grid: int, extent: Any) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates along x and y."""
    if extent is None:
        reach = half_width.max(0)
        finite = reach[np.isfinite(reach)]
        other = semi.max(0)[np.isfinite(semi.max(0))]
        # along what the ellipse does not bound, as far as along the rest of the plane; 1 where it bounds nothing
        sides = 1.6 * np.where(np.isfinite(reach), reach, max([*finite, *other], default=1 / 1.6))
    else:
        try:
            sides = np.broadcast_to(np.asarray(extent, dtype=float), 2)
        except (TypeError, ValueError):
            sides = np.full(2, np.nan)
        if not (np.isfinite(sides) & (sides > 0)).all():
            raise InputError(
                f"extent must be a finite number > 0, or two, the half-widths of the grid along x and y; got {extent!r}."
            )
    unit = np.linspace(-1, 1, grid)
    unit[np.abs(unit) < 1e-12] = 0.0
    return sides[0] * unit, sides[1] * unit


# --- the network -----------------------------------------------------------------------------------------------------


class _Network:
    """The user's network on the data of F, with the parameters of F moved; the network itself stays as it is."""

    def __init__(self, F: Fisher, model: Any, data: Any):
        model, _ = as_module(model, None if hasattr(model, "named_parameters") else F.layout.unflatten(F.parameters))
        layout = Layout.from_model(model, list(F.layout))
        own = {p.name: p.shape for p in layout.parameters}
        if own != {p.name: p.shape for p in F.layout.parameters}:
            raise InputError(
                f"The model is not that of F: F covers {len(F.layout)} parameters with {F.n_params} entries, of which this model has others or of other shapes. Pass the network on "
                "which F was built."
            )
        check_model(model, layout)
        self.F, self.recorder = F, Recorder(model, layout, check=False)
        self.dtypes = {name: leaf.dtype for name, leaf in self.recorder.leaves().items()}
        with preserved_randomness(F.device):
            self.source = Source(data, F.device)
        if self.source.n_data != F.n_data:
            raise InputError(
                f"The data are not those of F: it was built on {F.n_data} examples, these are {self.source.n_data}."
            )

    def _outputs(self, batch: Batch, theta: Tensor) -> Tensor:
        values = {name: value.to(self.dtypes[name]) for name, value in self.F.layout.unflatten(theta).items()}
        with torch.no_grad():
            return self.recorder.outputs(batch, values).detach()

    def _require_same(self, outputs: Tensor, first: bool) -> None:
        """Refuse data on which F was not built, as far as F has kept what the network gave there."""
        if not first or not self.F._bound:
            return
        kept = self.F._bound[0].outputs
        num = min(len(kept), len(outputs))
        same = kept.shape[1:] == outputs.shape[1:]
        if not same or (kept[:num] - outputs[:num]).abs().max() > 1e-3 * max(kept.abs().max().item(), 1e-30):
            raise InputError(
                "The model does not give on these data what it gave when F was built, with the same parameters. Pass the network (in the same mode) and the data of F, in their order."
            )

    def divergences(self, plane: Tensor, points: np.ndarray, progress: bool | None) -> np.ndarray:
        """Mean KL over terms at θ + plane @ point, for points ``(m, 2)``; infinite where an output is not finite."""
        total, weight, done = np.zeros(len(points)), 0.0, 0
        theta = self.F.parameters
        with (
            preserved_randomness(self.F.device),
            progress_bar(len(points) * self.source.n_data, desc="divergence", enabled=progress) as bar,
        ):
            for whole in self.source.batches():
                for start in range(0, whole.size, _TOGETHER):
                    batch = whole.part(start, start + _TOGETHER)
                    at = slice(done, done + batch.size)
                    here = self._outputs(batch, theta)
                    self._require_same(here, start == done == 0)
                    bound = self.F.likelihood.bind(here, batch.targets, batch.where, at)
                    weight, done = weight + bound.weight.sum().item(), at.stop
                    for k, point in enumerate(points):
                        step = plane.double() @ torch.as_tensor(point, device=plane.device)
                        moved = self._outputs(batch, (theta.double() + step).to(theta.dtype))
                        if torch.isfinite(moved).all():
                            total[k] += bound.divergence(moved).sum().item()
                        else:
                            total[k] = np.inf
                        bar.update(batch.size)
        if not math.isclose(weight, self.F.total_weight, rel_tol=1e-6):
            raise InputError(
                f"The data are not those of F: the weights of their terms add up to {weight:g}, those of F to {self.F.total_weight:g}. Pass the inputs and targets on which F was built."
            )
        return total / weight
