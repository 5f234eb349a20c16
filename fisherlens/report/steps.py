"""One step along every segmentation's direction: what the quadratic model promises, and what the loss then does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fisherlens.approximations import BlockDiagonal
from fisherlens.errors import InputError
from fisherlens.fisher import Fisher, check_damping
from fisherlens.partitions import Partition
from fisherlens.results import make_dataset
from fisherlens.scores.source import Source, call
from fisherlens.training.loss import summed_loss

if TYPE_CHECKING:
    import xarray as xr

FULL, GRADIENT = "full Fisher", "gradient"
# Multiples of the promised best step length that are tried: a factor of 2^(1/2) apart over four decades.
LENGTHS = 2.0 ** np.arange(-9.0, 4.01, 0.5)
_AT_ONCE = 1024


def mean_loss_at(model: nn.Module, data: Any, F: Fisher) -> float:
    """Mean negative log-likelihood of the data in nat, summed in float64; NaN or infinity where it is."""
    total = weight = 0.0
    with torch.no_grad():
        for batch in Source(data, F.device).batches():
            for start in range(0, batch.size, _AT_ONCE):
                part = batch.part(start, start + _AT_ONCE)
                outputs = call(model, part.inputs).double()
                try:
                    loss, terms = summed_loss(F.likelihood, outputs, part.targets)
                except TypeError as error:  # a likelihood of one's own, of which only the scores are known
                    raise InputError(str(error)) from None
                total, weight = total + float(loss), weight + float(terms)
    return total / weight if weight else float("nan")


def one_step(
    F: Fisher,
    model: nn.Module,
    data: Any,
    partitions: Sequence[Partition],
    *,
    dampings: Mapping[float, float],
    tick: Callable[[float], object] = lambda share: None,
) -> xr.Dataset:
    r"""Compare the decrease of the loss that the quadratic model promises for one step with the decrease that is measured.

    For a direction d, the model with the damped Fisher, its best step length and what it promises are

    .. math:: m(\alpha) = -\alpha\, g^\top d + \tfrac{\alpha^2}{2} d^\top (F + \lambda I) d, \quad
        \alpha^* = \frac{g^\top d}{d^\top (F + \lambda I) d}, \quad -m(\alpha^*) = \frac{(g^\top d)^2}{2\, d^\top (F + \lambda I) d}.

    The directions are (F + λ)⁻¹g, (F_b + λ)⁻¹g for every segmentation, and g itself. Measured is the largest decrease of the mean loss
    on the same data over step lengths from 2⁻⁹ to 2⁴ times α*, a factor of √2 apart.

    Parameters
    ----------
    F
        The Fisher at the network's parameters, all of them.
    model
        The network, in evaluation mode; copied, so that its parameters stay as they are.
    data
        The data of F, with targets.
    partitions
        Segmentations of all parameters of F.
    dampings
        λ in nat by the factor that names it in the result, such as ``{1: 1e-3, 10: 1e-2}``.
    tick
        Called with the share of the work done since the last call.

    Returns
    -------
    Dataset over ``damping_factor, direction``: ``predicted_decrease``, ``measured_decrease``, ``decrease_at_predicted_length`` (nat),
    ``predicted_ratio`` and ``measured_ratio`` (over those of the full Fisher), ``best_length`` (in multiples of α*); ``loss`` (nat)
    before the step and ``damping`` in nat over ``damping_factor``. A segmentation over the memory budget raises MemoryBudgetError.
    """
    names = [FULL, *(partition.scheme for partition in partitions), GRADIENT]
    trial = copy.deepcopy(model)
    parameters = dict(trial.named_parameters())
    if any(parameters[name].shape != F.layout[name].shape for name in F.layout):
        raise InputError("one_step takes the network that F was made from; the shapes of its parameters differ.")
    start = F.parameters
    before = mean_loss_at(trial, data, F)
    shape = (len(dampings), len(names))
    found = {
        name: np.full(shape, np.nan)
        for name in ("predicted_decrease", "measured_decrease", "decrease_at_predicted_length", "best_length")
    }
    gradient = F.gradient()
    blocks = [BlockDiagonal(F, partition) for partition in partitions]
    for i, lam in enumerate(check_damping(value) for value in dampings.values()):
        directions = [F.natural_gradient(lam), *(block.solve(gradient, lam) for block in blocks), gradient]
        for j, direction in enumerate(directions):
            length, promised = _best_step(F, gradient, direction, lam)
            drops = [before - _loss_after(trial, parameters, F, start, direction, length * k, data) for k in LENGTHS]
            drops = np.where(np.isfinite(drops), drops, -np.inf)
            best = int(np.argmax(drops))
            found["predicted_decrease"][i, j] = promised
            found["measured_decrease"][i, j] = max(drops[best], 0.0)
            found["best_length"][i, j] = LENGTHS[best] if drops[best] > 0 else 0.0
            found["decrease_at_predicted_length"][i, j] = drops[int(np.argmin(abs(LENGTHS - 1)))]
            tick(1 / (shape[0] * shape[1]))
    words = {
        "predicted_decrease": ("decrease of the loss that the quadratic model promises", "nat"),
        "measured_decrease": ("largest decrease of the loss along the direction", "nat"),
        "decrease_at_predicted_length": ("decrease of the loss at the promised step length", "nat"),
        "best_length": ("best step length over the promised one", "1"),
    }
    dims = ("damping_factor", "direction")
    variables: dict[str, Any] = {
        name: (dims, found[name], {"long_name": long_name, "units": units})
        for name, (long_name, units) in words.items()
    }
    for kind, name in (("predicted", "predicted_decrease"), ("measured", "measured_decrease")):
        values = found[name]
        ratio = np.divide(values, values[:, :1], out=np.full(shape, np.nan), where=values[:, :1] > 0)
        text = f"{kind} decrease, share of the full Fisher's"
        variables[f"{kind}_ratio"] = (dims, ratio, {"long_name": text, "units": "1"})
    variables["damping"] = ("damping_factor", list(dampings.values()), {"long_name": "damping λ", "units": "nat"})
    variables["loss"] = ((), before, {"long_name": "mean loss before the step", "units": "nat"})
    factors = ("damping_factor", list(dampings), {"long_name": "damping, as a multiple of the report's", "units": "1"})
    method = "quadratic model against a search over step lengths on the same data"
    return make_dataset(variables, {"damping_factor": factors, "direction": names}, operator=F, method=method)


def _best_step(F: Fisher, gradient: Tensor, direction: Tensor, damping: float) -> tuple[float, float]:
    """Best step length of the quadratic model, and the decrease it promises."""
    d = direction.double()
    slope = (gradient.double() @ d).item()
    bend = (F.scores.matmat(direction[:, None]).double().square().sum() / F.total_weight + damping * (d @ d)).item()
    return (slope / bend, slope**2 / bend / 2) if bend > 0 else (0.0, 0.0)


def _loss_after(
    trial: nn.Module,
    parameters: Mapping[str, Tensor],
    F: Fisher,
    start: Tensor,
    direction: Tensor,
    length: float,
    data: Any,
) -> float:
    moved = start - length * direction
    with torch.no_grad():
        for info in F.layout.parameters:
            parameters[info.name].copy_(moved[info.start : info.stop].view(info.shape))
    try:
        return mean_loss_at(trial, data, F)
    except (OverflowError, FloatingPointError):
        return float("inf")
