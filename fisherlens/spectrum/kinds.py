"""Exact, sampled and empirical Fisher and the Hessian side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from fisherlens import errors
from fisherlens._progress import progress as progress_bar
from fisherlens.errors import InputError
from fisherlens.fisher import Fisher, check_damping
from fisherlens.likelihoods import Likelihood, as_likelihood
from fisherlens.linalg.precision import own_precision
from fisherlens.results import make_dataset
from fisherlens.spectrum.complete import WHOLE
from fisherlens.spectrum.kinds_capture import Member, SideBySide
from fisherlens.spectrum.kinds_parts import Part, bytes_needed, exact_part, example_noise, fits, hessian_fits
from fisherlens.spectrum.kinds_probes import Probes, add_hessian, gradient_of, probed_parts, views
from fisherlens.spectrum.kinds_table import tabulate

if TYPE_CHECKING:
    import xarray as xr

KNOWN = ("exact", "mc", "empirical", "hessian")
METHODS = ("auto", "exact", "probes")


@own_precision
def compare_kinds(
    model: nn.Module | Callable[[dict[str, Tensor], Any], Tensor],
    data: Any,
    *,
    likelihood: str | Likelihood,
    kinds: Sequence[str] = ("exact", "mc", "empirical"),
    k: int = 10,
    mc_samples: int = 1,
    seed: int | Sequence[int] = 0,
    params: Sequence[str] | str | Mapping[str, Tensor] | None = None,
    damping: float | Sequence[float] = 1e-3,
    by: str | None = None,
    method: str = "auto",
    num_probes: int = 30,
    memory: str | float = "2GiB",
    progress: bool | None = None,
) -> xr.Dataset:
    r"""Compare kinds of Fisher, and the Hessian, on one model and one data set.

    .. math::
        d_{ij} = \frac{\|F_i - F_j\|_F}{\|F_i\|_F}, \qquad
        \cos_{ij} = \frac{\langle F_i, F_j\rangle}{\|F_i\|_F \|F_j\|_F}, \qquad
        o_{ij} = \frac{1}{k} \|V_i^\top V_j\|_F^2

    with the leading k eigenvectors V of each. All follows from the score rows of all kinds, captured together: with K_ij = U_i U_jᵀ,
    ‖F_i - F_j‖² = (‖K_ii‖² - 2‖K_ij‖² + ‖K_jj‖²)/W². No P × P matrix is formed unless it is the smaller one.

    Parameters
    ----------
    model, data, likelihood, params, memory, progress
        As of :class:`fisherlens.Fisher`. ``"empirical"`` needs targets, and so do natural gradients, which are left out without them.
    kinds
        Two or more of ``"exact"``, ``"mc"``, ``"empirical"``, ``"hessian"``.
    k
        Leading eigenvectors whose spaces are compared. Default 10 (our choice); see ``gap`` in the result.
    mc_samples
        Label draws per example of the mc kind.
    seed
        Of the labels; a sequence draws them anew for each seed, so that the spread over seeds can be seen. The first also seeds probes.
    damping
        λ of the natural gradients (F + λI)⁻¹ g, in nat; a sequence adds the dim ``damping``.
    by
        None for the whole, or ``"layer"`` for each layer's diagonal block too, with the whole as ``"all"``.
    method
        ``"exact"``: from Gram matrices or dense ones. ``"probes"``: from products with random vectors, and Lanczos for the leading spaces.
        ``"auto"``: exact where the matrix of all rows fits the budget. A Hessian of more than 5000 parameters is compared by probes in any case.
    num_probes
        Random vectors, at least 3; every estimate carries its standard error over them. Default 30 (our choice).

    Returns
    -------
    Dataset over ``kind_i, kind_j`` (and ``layer`` in front): ``distance``, relative to kind_i; ``cosine``; ``scale``, the factor of kind_j
    that brings it closest to kind_i, and ``scaled_distance``, what then remains, √(1 - cos²); ``trace_ratio`` = tr F_j/tr F_i; ``overlap``,
    ``overlap_size`` (the number of vectors compared: fewer than k where a spectrum ends in noise before), ``overlap_chance`` =
    overlap_size/P, what two random spaces would have; ``principal_angle (angle)`` in rad, smallest first; ``natural_gradient_cosine``.
    Over ``kind``: ``eigenvalue (rank)`` in nat with ``above_noise`` and ``noise_floor``; ``trace``, ``frobenius_norm``;
    ``gap`` = 1 - λ_{k+1}/λ_k, near 0 where the leading space is hardly determined.

    How large a distance is mere noise: ``sampling_noise (kind)`` is the distance from the exact Fisher, relative to it, to be expected of
    labels that the model itself draws, as many as that kind has (needs ``"exact"`` and ``"mc"``, exact method; its error is
    ``sampling_noise_sem``). An empirical Fisher at that distance is as good as one with labels from the model. With several seeds each
    variable with mc is the mean over them, with ``<name>_spread``, their standard deviation, and ``seed_<name>`` compares pairs of seeds.
    With probes each estimated variable has its ``<name>_sem`` (jackknife over probes).

    Raises
    ------
    InputError: unknown or repeated kinds, or options out of range. MemoryBudgetError: what must be kept exceeds the budget.

    Notes
    -----
    Cost, exact: one capture with the columns of all kinds, one Gram matrix, and an eigendecomposition per kind. With probes:
    ``num_probes`` products and ``top_eigenvalues`` per kind. In float32, distances below about 1e-3 are rounding.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> model, x, y = torch.nn.Linear(3, 2), torch.eye(3), torch.tensor([0, 1, 0])
    >>> found = fl.compare_kinds(model, (x, y), likelihood="categorical", k=2)
    >>> bool(found["distance"].sel(kind_i="exact", kind_j="empirical") > 0)
    True
    """
    seeds = _check(kinds, k, mc_samples, seed, by, method, num_probes)
    dampings = [check_damping(value) for value in (damping if np.ndim(damping) else [damping])]
    base = as_likelihood(likelihood)
    ordered = [kind for kind in kinds if kind != "hessian"] + [kind for kind in kinds if kind == "hessian"]
    members = [Member(kind, s) for kind in ordered for s in (seeds if kind == "mc" else seeds[:1])]
    options = {"params": params, "memory": memory, "progress": progress}
    probes = Probes(num_probes, k, dampings, seeds[0])

    def make(member: Member) -> Fisher:
        samples = mc_samples if member.kind == "mc" else 1
        return Fisher(model, data, likelihood=base, kind=member.kind, mc_samples=samples, seed=member.seed, **options)

    exact = (
        None
        if method == "probes"
        else _exact_parts(model, data, base, members, mc_samples, make, probes, by, options, method)
    )
    if exact is not None:
        parts, F, names = exact
    else:
        parts, F, names = probed_parts(make, members, by, probes, progress)
    variables, coords = tabulate(parts, members, kinds, k, dampings, mc_samples, stacked=by is not None)
    if by is not None:
        coords["layer"] = [WHOLE if name is None else name for name in names]
    if np.ndim(damping):
        coords["damping"] = dampings
    else:
        variables = {
            name: (tuple(d for d in dims if d != "damping"), values[0] if "damping" in dims else values, words)
            for name, (dims, values, words) in variables.items()
        }
    estimated = any(part.inner.shape[-1] > 1 for part in parts)
    return make_dataset(
        variables,
        coords,
        operator=F,
        method=("exact" if exact is not None else "probes")
        + (", Hessian by probes" if exact is not None and estimated else ""),
        num_matvecs=probes.num_matvecs,
        settings={"kinds": list(kinds), "k": k, "by": by, "method": method, "num_probes": num_probes},
        kind=", ".join(kinds),
        likelihood=base.name,
        seed=seeds if len(seeds) > 1 else seeds[0],
        mc_samples=mc_samples if "mc" in kinds else None,
        damping=None if np.ndim(damping) else dampings[0],
    )


def _exact_parts(
    model: Any,
    data: Any,
    base: Likelihood,
    members: Sequence[Member],
    mc_samples: int,
    make: Callable[[Member], Fisher],
    probes: Probes,
    by: str | None,
    options: Mapping[str, Any],
    method: str,
) -> tuple[list[Part], Fisher, list[str | None]] | None:
    """All parts from one capture of the rows of all kinds; None where their matrix does not fit and may be left to probes."""
    with_rows = [member for member in members if member.kind != "hessian"]
    shared = SideBySide(base, with_rows, mc_samples)
    F = Fisher(model, data, likelihood=shared, kind="exact", **options)
    if not fits(F, len(members)):
        if method == "auto":
            return None
        order = min(F.n_params, F.n_rows)
        raise errors.MemoryBudgetError(
            f"method='exact' needs a matrix of order {order}, {errors.readable_bytes(bytes_needed(F, len(members)))} with workspace, over the budget of "
            f"{errors.readable_bytes(F.memory)}. Use method='probes', fewer examples or seeds, or raise memory=."
        )
    hessian = make(members[-1]) if members[-1].kind == "hessian" else None
    names: list[str | None] = [None] if by is None else [*F.layout.layer_names, None]
    parts = []
    for name, view in progress_bar(list(views(F, names)), desc="comparing kinds", enabled=options["progress"]):
        H = None if hessian is None else hessian if name is None else hessian.restrict(name)
        formed = H if H is not None and hessian_fits(H, len(members)) else None
        part = exact_part(view, shared.ranges, formed, probes.k, probes.dampings, gradient_of(view))
        if H is not None and formed is None:
            part = add_hessian(part, view, shared.ranges, H, probes)
        part.noise = _noise(view, shared, mc_samples)
        parts.append(part)
    return parts, F, names


def _noise(F: Fisher, shared: SideBySide, mc_samples: int) -> list[tuple[float, float]]:
    """Of each member: the squared distance from the exact Fisher that sampled labels alone would give, and its error."""
    ranges = dict(zip(shared.members, shared.ranges, strict=True))
    draws = [columns for member, columns in ranges.items() if member.kind == "mc"]
    exact = next((columns for member, columns in ranges.items() if member.kind == "exact"), None)
    if exact is None or not draws:
        return []
    single, error = example_noise(F, exact, draws)
    unknown = (float("nan"), float("nan"))
    found = []
    for member, columns in ranges.items():
        if member.kind == "exact":
            found.append((0.0, 0.0))
        elif member.kind == "mc":
            found.append((single / mc_samples, error / mc_samples))
        else:  # one row per term: a single term is what one draw is
            found.append((single, error) if len(columns) == 1 else unknown)
    return [*found, unknown]


def _check(kinds: Any, k: Any, mc_samples: Any, seed: Any, by: Any, method: Any, num_probes: Any) -> list[int]:
    """Refuse options out of range; the seeds as a list."""
    if isinstance(kinds, str) or not isinstance(kinds, Sequence):
        raise TypeError(f"kinds must be a list of names such as ['exact', 'empirical']; got {kinds!r}.")
    for kind in kinds:
        if kind not in KNOWN:
            raise InputError(errors.UNKNOWN_NAME.format(what="kind", name=kind, hint=errors.nearest(str(kind), KNOWN)))
    if len(kinds) < 2 or len(set(kinds)) < len(kinds):
        raise InputError(
            f"kinds must name two or more different kinds to compare; got {list(kinds)}. To compare draws of the mc kind give several seeds."
        )
    if set(kinds) == {"hessian"}:
        raise InputError("kinds must hold a kind with score rows beside the Hessian.")
    for what, value, least in (("k", k, 1), ("mc_samples", mc_samples, 1), ("num_probes", num_probes, 3)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{what} must be an integer >= {least}; got {value!r}.")
    if by not in (None, "layer"):
        hint = errors.nearest(str(by), ["layer"]) + " None is the whole."
        raise InputError(errors.UNKNOWN_NAME.format(what="option by=", name=by, hint=hint))
    if method not in METHODS:
        raise InputError(
            errors.UNKNOWN_NAME.format(what="method", name=method, hint=errors.nearest(str(method), METHODS))
        )
    seeds = [seed] if not isinstance(seed, (Sequence, np.ndarray)) or isinstance(seed, str) else list(seed)
    if not seeds or len(set(seeds)) < len(seeds) or not all(type(s) is int and s >= 0 for s in seeds):
        raise InputError(f"seed must be an integer >= 0, or several different ones; got {seed!r}.")
    return seeds


__all__ = ["compare_kinds"]
