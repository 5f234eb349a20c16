"""Stand-ins for the Fisher side by side: the same judgement for blocks, Kronecker factors, low rank and diagonals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fisherlens.approximations import Approximation, BlockDiagonal, Diagonal
from fisherlens.errors import InputError, MemoryBudgetError, UnsupportedModuleError
from fisherlens.fisher import Fisher, require_fisher
from fisherlens.independence.judge import energy, errors_of
from fisherlens.independence.options import check_grid, check_options
from fisherlens.independence.segmentations import FIXED as PARTITION_FIXED
from fisherlens.independence.standin import StandIn, on_layers, squared_norm_of_blocks
from fisherlens.independence.table import Table
from fisherlens.independence.target import Target
from fisherlens.linalg.pencil import DENSE_ORDER
from fisherlens.linalg.precision import own_precision
from fisherlens.partitions import Partition
from fisherlens.spectrum import WHOLE

if TYPE_CHECKING:
    import xarray as xr

FIXED = {
    "dropped_coupling": ("squared norm of the dropped couplings over ‖F‖²", "1"),
    "dropped_coupling_sem": ("standard error of the dropped couplings over probes", "1"),
    "within_block_error": ("squared error inside the blocks over ‖F‖²", "1"),
    "within_block_error_sem": ("standard error of the error inside the blocks over probes", "1"),
    "relative_error": ("error ‖F - F̂‖/‖F‖", "1"),
    "relative_error_sem": ("standard error of the error over probes", "1"),
    **PARTITION_FIXED,
    "storage_bytes": ("bytes that the stand-in holds", "B"),
    "solve_flops": ("operations that prepare a solve", "1"),
}
_WRONG_TYPE = (
    "approximations holds {got} under {name!r}; each entry must be an approximation such as fl.KFAC(F), a function or class that makes one from F (fl.KFAC "
    "itself), or a scheme, Partition or dict of blocks, which becomes fl.BlockDiagonal(F, ...)."
)
_OTHER_LAYOUT = (
    "Approximation {name!r} is of {theirs} parameters in another layout; F has {own}. It was probably built from another network, or another choice of "
    "params: build it from this F."
)
_TWICE = (
    "Two approximations are called {name!r}, so that results could not tell them apart. Name them: "
    "fl.compare_approximations(F, {{'first': ..., 'second': ...}})."
)
_NO_LAYER = (
    "compare_approximations: {name!r} on {layer!r} is left out, as this approximation cannot be cut to a layer ({reason}). Its values for 'all' are there; an "
    "approximation of F.restrict({layer!r}) can be judged on its own."
)
_FOREIGN = (
    "compare_approximations: {name!r} was built from another Fisher (other data, labels or kind), so that its error inside the blocks, against this one, is "
    "unknown and the error split is NaN; all else is judged against this F."
)


@own_precision
def compare_approximations(
    F: Fisher,
    approximations: Sequence[Any] | Mapping[str, Any],
    *,
    damping: float | Sequence[float] = 1e-3,
    method: str = "auto",
    num_probes: int = 10,
    num_matvecs: int = 80,
    seed: int = 0,
    tol: float = 1e-2,
    progress_bar: bool | None = None,
) -> xr.Dataset:
    r"""Judge structured stand-ins F̂ for the Fisher side by side: error, direction, step, divergence, conditioning and cost.

    .. math::
        \frac{\|F - \hat F\|^2}{\|F\|^2} = \text{dropped} + \text{within}, \quad
        \mathrm{KL} = \tfrac12 \big[\operatorname{tr} (\hat F+\lambda)^{-1} (F+\lambda) - P + \log\det(\hat F+\lambda) - \log\det(F+\lambda)\big]

    Parameters
    ----------
    F
        The Fisher operator, with targets (the gradient is needed).
    approximations
        A sequence, or a dict name → entry, of approximations of F (:class:`BlockDiagonal`, ``fl.KFAC(F)``, ...), of classes or functions
        that make one from F, or of schemes, :class:`Partition` objects and dicts of blocks, which become block-diagonal. Names must differ.
    damping, method, num_probes, num_matvecs, seed, tol, progress_bar
        As for :func:`independence`.

    Returns
    -------
    Dataset over ``approximation, layer`` (and ``damping`` in front, if several; the last layer is ``"all"``):

    - ``dropped_coupling``, what lies outside the blocks of the stand-in, and ``within_block_error``, what is wrong inside, both squared
      Frobenius norms over ‖F‖²; ``relative_error`` ‖F - F̂‖/‖F‖, the root of their sum;
    - ``natural_gradient_cosine``, ``metric_cosine``, ``decrease_ratio``, ``kl_divergence``, ``mu_max``, ``mu_min``, ``condition_number``,
      ``predicted_steps`` as for :func:`independence`, with F̂ + λ in the place of F_b + λ (for a stand-in with a damping of its own, what
      it inverts);
    - ``energy_captured``, ``energy_noise_floor`` for stand-ins whose blocks are those of F, else NaN;
    - ``num_blocks``, ``largest_block``, ``storage_bytes``, ``solve_flops``.

    Variables that end in ``_sem`` are standard errors over probes, 0 where the value is exact.

    Raises
    ------
    TypeError: an entry that is none of the above. InputError: none at all, two of one name, one of another network, blocks that overlap or
    do not cover the parameters, options out of range. MemoryBudgetError: ``method="exact"`` where the Gram matrix does not fit.

    Warns
    -----
    NumericalWarning: a stand-in that cannot be cut to a layer, or that does not fit the memory budget, is NaN there; one that was built from
    another Fisher of the same network has no error split. ConvergenceWarning: as for :func:`independence`.

    Notes
    -----
    The trace in the divergence is P for block-diagonal parts of F. Else it takes a solve per score row, or per parameter where these are
    fewer; above 2²⁷ numbers it is estimated by Hutch++ with 3 ``num_probes`` products. Each stand-in is judged against F, also one that
    was built from another Fisher of the same network, such as a KFAC of sampled labels.

    Examples
    --------
    >>> import torch, fisherlens as fl
    >>> F = fl.Fisher(torch.nn.Linear(3, 2), (torch.eye(3), torch.tensor([0, 1, 0])), likelihood="categorical")
    >>> found = fl.compare_approximations(F, ["layer", "unit", "diagonal"], damping=1e-2)
    >>> bool((found.decrease_ratio.sel(layer="all").diff("approximation") <= 1e-6).all())
    True
    """
    require_fisher(F)
    dampings, single = check_grid(damping)
    options = check_options(method, num_probes, num_matvecs, seed, tol)
    named = _named(F, approximations)
    F.gradient()  # fails here, not after the work, where targets are missing
    table = Table(F, "approximation", list(named), dampings, single, FIXED, options, progress_bar)
    table.fill(_Compared(F, named, table))
    return table.dataset(approximations=table.names)


def _named(F: Fisher, approximations: Any) -> dict[str, Any]:
    """Name → approximation, or → MemoryBudgetError of one that was to be built and does not fit."""
    if isinstance(approximations, str | Partition | Approximation):
        approximations = [approximations]
    if not isinstance(approximations, Mapping | Sequence):
        raise TypeError(
            f"approximations must be a sequence or a dict name -> approximation; got {type(approximations).__name__}. One alone goes into a list: [fl.KFAC(F)]."
        )
    if not len(approximations):
        raise InputError("approximations is empty; give at least one, such as [fl.KFAC(F), 'unit'].")
    if isinstance(approximations, Mapping):
        entries = [(str(name), _made(F, str(name), entry)) for name, entry in approximations.items()]
    else:
        made = [(entry, _made(F, place, entry)) for place, entry in enumerate(approximations)]
        entries = [(str(getattr(one, "name", getattr(entry, "scheme", entry))), one) for entry, one in made]
    found: dict[str, Any] = {}
    for name, one in entries:
        if name in found:
            raise InputError(_TWICE.format(name=name))
        if isinstance(one, Approximation) and one.layout != F.layout:
            raise InputError(_OTHER_LAYOUT.format(name=name, theirs=one.n_params, own=F.n_params))
        if isinstance(one, Approximation) and (one.dtype != F.dtype or one.device != F.device):
            raise InputError(
                f"Approximation {name!r} is {one.dtype} on {one.device}, F is {F.dtype} on {F.device}. Build it from this F."
            )
        found[name] = one
    return found


def _made(F: Fisher, name: Any, entry: Any) -> Any:
    if isinstance(entry, Approximation):
        return entry
    if isinstance(entry, str | Partition | Mapping):
        try:
            return _for_many_solves(BlockDiagonal(F, entry))
        except MemoryBudgetError as error:
            return error
    made = entry(F) if callable(entry) else entry
    if not isinstance(made, Approximation):
        got = type(made).__name__ if made is entry else f"a callable that gave {type(made).__name__}"
        raise TypeError(_WRONG_TYPE.format(name=name, got=got))
    return made


class _Compared:
    """Cuts every approximation to a layer and has it judged."""

    def __init__(self, F: Fisher, named: Mapping[str, Any], table: Table):
        self.F, self.named, self.table = F, named, table

    def __call__(self, target: Target, place: int) -> None:
        batch: dict[int, StandIn] = {}
        for row, (name, one) in enumerate(self.named.items()):
            part, reason = self._on(one, target.name)
            if part is None:
                text = (
                    "is left out"
                    if isinstance(one, MemoryBudgetError)
                    else _NO_LAYER.format(name=name, layer=target.name, reason=reason)
                )
                self.table.note(f"compare_approximations: {name!r} {text}. {one}" if text == "is left out" else text)
                self.table.advance(len(self.table.dampings))
                continue
            batch[row] = self._stand_in(target, place, row, name, part)
        self.table.judge(target, place, batch)

    def _on(self, one: Any, layer: str) -> tuple[Any, str]:
        if isinstance(one, MemoryBudgetError) or layer == WHOLE:
            return (None, "") if isinstance(one, MemoryBudgetError) else (one, "")
        try:
            return _for_many_solves(one.on_layer(layer)), ""
        except (NotImplementedError, UnsupportedModuleError, InputError, MemoryBudgetError) as error:
            return None, str(error) or type(error).__name__

    def _stand_in(self, target: Target, place: int, row: int, name: str, part: Approximation) -> StandIn:
        F, put = self.F, self.table.put
        whole = self.named[name]
        own = whole.partition if target.name == WHOLE else whole.partition.restrict(target.name)
        put(row, place, {"num_blocks": own.num_blocks, "largest_block": own.largest_block})
        put(row, place, {"storage_bytes": part.storage_bytes, "solve_flops": part.solve_flops})
        if not _of_the_same(whole, F):
            self.table.note(_FOREIGN.format(name=name))
            return StandIn(name, part, own.sizes, exact_blocks=False)
        within = _Once(part.within_block_error)
        layer = None if target.name == WHOLE else target.name
        inside: Callable[[], float] = _Once(partial(squared_norm_of_blocks, F, whole.partition, layer))
        if isinstance(part, BlockDiagonal) and within() == 0:
            inside = _Once(part.squared_norm)
        found = errors_of(target, inside, within, self.table.note, one_block=len(own.sizes) == 1)
        put(row, place, found)
        exact = within.value == 0
        if exact:
            put(row, place, energy(target, own.sizes, inside()))
        # elsewhere a difference of norms may have rounded to 0, and what is inverted may be damped in a form of its own
        exact = exact and type(part) in (BlockDiagonal, Diagonal)
        by_layers = exact and isinstance(part, BlockDiagonal) and layer is None and on_layers(F, own)
        return StandIn(name, part, own.sizes, exact_blocks=exact, by_layers=by_layers)


def _for_many_solves(one: Approximation) -> Approximation:
    """Blocks that nobody else holds solve by inverses, as Lanczos will ask for many solves."""
    if isinstance(one, BlockDiagonal) and one.n_params > DENSE_ORDER:
        one.prefer_inverses()
    return one


class _Once:
    """A number that is computed when it is first asked for."""

    def __init__(self, function: Callable[[], float]):
        self._function, self.value = function, None

    def __call__(self) -> float:
        if self.value is None:
            self.value = self._function()
        return self.value


def _of_the_same(one: Approximation, F: Fisher) -> bool:
    """Whether an approximation was built from the scores that F holds."""
    theirs = one._fisher.scores.layers
    return len(theirs) == len(F.scores.layers) and all(a is b for a, b in zip(theirs, F.scores.layers, strict=True))
