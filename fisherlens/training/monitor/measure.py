"""One measurement: every quantity from one capture of the scores and at most one decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens.coupling import coupling
from fisherlens.fisher import Fisher
from fisherlens.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fisherlens.linalg.dense import eigenpairs, noise_floor
from fisherlens.scores.source import Source, call
from fisherlens.spectrum import as_symmetric, effective_dimension, top_eigenvalues
from fisherlens.spectrum.smaller import lift_rows, smaller_matrix
from fisherlens.training.loss import summed_loss
from fisherlens.training.monitor.examples import Batches

# Order of the smaller of dense and Gram matrix up to which it is decomposed, which takes seconds; beyond it iterations
# and probes take over (our choice).
LARGEST_ORDER = 3000
SPECTRAL = ("eigenvalues", "effective_dimension", "alignment", "drift")
_WITH_LOSS = (Categorical, Bernoulli, Gaussian)


@dataclass(frozen=True)
class Wish:
    """What to measure and how; see :class:`fisherlens.Monitor`."""

    quantities: tuple[str, ...]
    k: int
    damping: float
    seed: int

    def wants(self, *names: str) -> bool:
        """Whether any of some quantities is to be measured."""
        return any(name in self.quantities for name in names)


@dataclass(frozen=True)
class Leading:
    """The end of the spectrum that carries the information.

    Attributes
    ----------
    values, residual, floor
        The k largest eigenvalues, descending, the error or residual norm of each, and the noise floor.
    space
        Orthonormal eigenvectors of those above the floor, ``(P, s)`` with s <= k.
    next_value
        The eigenvalue behind the last one of ``space``.
    dimension
        Effective dimension with its standard error and the ends of its interval.
    """

    values: Tensor
    residual: Tensor
    floor: float
    space: Tensor
    next_value: float
    dimension: tuple[float, float, float, float]
    words: str


def measure(
    F: Fisher, model: nn.Module, batches: Batches, wish: Wish, earlier: tuple[Tensor | None, Tensor | None]
) -> tuple[dict[str, Any], Tensor | None]:
    """Values of one step by name, and the leading space in main memory; ``earlier`` are the first and the previous one."""
    row: dict[str, Any] = {}
    if wish.wants("loss"):
        row["loss"] = mean_loss(model, batches, F.likelihood, F.device)
        row["gradient_norm"] = torch.linalg.vector_norm(F.gradient().double()).item()
    if wish.wants("trace"):
        diagonal = F.diagonal().double()
        layers = [diagonal[layer.start : layer.stop].sum().item() for layer in F.layout.layers]
        row["trace"] = [*layers, sum(layers)]
    if wish.wants("coupling"):
        found = coupling(F, "layer", num_null=0, progress_bar=False)
        row["coupling"], row["coupling_floor"] = found["coupling"].values, found["noise_floor"].values
    if not wish.wants(*SPECTRAL):
        return row, None
    top = leading(F, wish)
    row["method"] = top.words
    if wish.wants("eigenvalues"):
        row |= {"eigenvalue": top.values, "residual_norm": top.residual, "noise_floor": top.floor}
    if wish.wants("effective_dimension"):
        names = ("", "_sem", "_low", "_high")
        row |= {f"effective_dimension{name}": x for name, x in zip(names, top.dimension, strict=True)}
    if not wish.wants("alignment", "drift"):
        return row, None
    size = top.space.shape[1]
    last = top.values[size - 1].item() if size else 0.0
    row |= {"space_size": size, "gap": 1 - max(top.next_value, 0.0) / last if last > 0 else float("nan")}
    row["chance"] = size / F.n_params
    if wish.wants("alignment"):
        row["alignment"] = alignment(top.space, F.gradient())
        row["alignment_chance_in_rows"] = size / max(F.rank_bound, 1)
    if not wish.wants("drift"):
        return row, None
    space = top.space.cpu()
    first, previous = earlier
    row["overlap_first"] = overlap(space, space if first is None else first)
    row["overlap_previous"] = float("nan") if previous is None else overlap(space, previous)
    return row, space


def alignment(space: Tensor, gradient: Tensor) -> float:
    """‖Vᵀg‖²/‖g‖², the share of the squared gradient in the space; NaN for a gradient of zero."""
    whole = gradient.double().square().sum()
    inside = (space.T @ gradient).double().square().sum()
    return (inside / whole).item() if whole > 0 else float("nan")


def overlap(space: Tensor, other: Tensor) -> float:
    """‖VᵀW‖²/m of the leading m vectors, m the smaller number of the two; in [0, 1], NaN where there are none."""
    m = min(space.shape[1], other.shape[1])
    if not m:
        return float("nan")
    return ((space[:, :m].T @ other[:, :m]).double().square().sum() / m).item()


def leading(F: Fisher, wish: Wish) -> Leading:
    """By decomposing the smaller of dense and Gram matrix where that is within reach, else by iteration and probes."""
    order = min(F.n_params, F.n_rows)
    passes = F.plan.streamed or F.plan.linearised
    if order <= LARGEST_ORDER and not passes:
        return _exact(F, wish)
    return _iterated(F, wish)


def _exact(F: Fisher, wish: Wish) -> Leading:
    view = as_symmetric(F)
    found = smaller_matrix(view)
    values, basis = eigenpairs(found.matrix, f"The {found.words} of F")
    floor = noise_floor(values, len(values), F.dtype)
    above = int((values > floor).sum())
    size = min(wish.k, above)
    space = basis[:, :size].to(F.dtype)
    if not found.dense and wish.wants("alignment", "drift"):
        lifted = lift_rows(view, space) / values[:size].sqrt().to(F.dtype)
        space = torch.linalg.qr(lifted)[0]  # against rounding; the signs of vectors mean nothing
    positive = values.clamp(min=0)
    dimension = (positive / (positive + wish.damping)).sum().item()
    shown = torch.zeros(wish.k, dtype=torch.float64, device="cpu")  # beyond the order of the Gram matrix they are zero
    shown[: min(wish.k, len(values))] = values[: wish.k].cpu()
    return Leading(
        shown,
        torch.full_like(shown, floor),
        floor,
        space,
        values[size].item() if size < len(values) else 0.0,
        (dimension, 0.0, dimension, dimension),
        f"exact: eigenvalues of the {found.words} in float64",
    )


def _iterated(F: Fisher, wish: Wish) -> Leading:
    """As for any operator; one eigenvalue more tells how well the space is determined."""
    spaces = wish.wants("alignment", "drift")
    wanted = min(wish.k + 1, F.n_params)
    found = top_eigenvalues(F, wanted, vectors=spaces, seed=wish.seed, progress=False)
    values = torch.zeros(wish.k + 1, dtype=torch.float64, device="cpu")
    residual = torch.zeros(wish.k + 1, dtype=torch.float64, device="cpu")
    values[:wanted] = torch.from_numpy(found["eigenvalue"].values.astype(float))
    residual[:wanted] = torch.from_numpy(found["residual_norm"].values.astype(float))
    size = int(found["above_noise"].values[: wish.k].sum())
    space = torch.zeros(F.n_params, 0, dtype=F.dtype, device=F.device)
    if spaces:
        space = torch.from_numpy(found["eigenvector"].values[:size].T).to(F.device, F.dtype)
    words, dimension = [found.attrs["method"]], (float("nan"),) * 4
    if wish.wants("effective_dimension"):
        known = effective_dimension(F, wish.damping, seed=wish.seed)
        parts = [float(known[name]) if name in known.coords else None for name in ("sem", "low", "high")]
        value = float(known)
        dimension = (value, parts[0] or 0.0, *(value if x is None else x for x in parts[1:]))
        words.append(known.attrs["method"])
    top = values[: wish.k], residual[: wish.k]
    return Leading(*top, float(found["noise_floor"]), space, values[size].item(), dimension, "; ".join(words))


def mean_loss(model: nn.Module, batches: Batches, likelihood: Likelihood, device: torch.device) -> float:
    """Mean negative log-likelihood in nat; NaN of a likelihood that tells no loss, only its derivative."""
    if not isinstance(likelihood, _WITH_LOSS):
        return float("nan")
    total = weight = 0.0
    with torch.no_grad():
        for batch in Source(batches, device).batches():
            outputs = call(model, batch.inputs)
            part, count = summed_loss(likelihood, outputs, batch.targets)
            total, weight = total + float(part), weight + float(count)
    return total / weight if weight > 0 else float("nan")
