"""Run the claims one after the other and put what they found into one labelled Dataset."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fisherlens import errors
from fisherlens._progress import progress as progress_bar
from fisherlens.errors import FisherLensError, InputError, NumericalWarning, user_level
from fisherlens.fisher import check_damping
from fisherlens.linalg.precision import own_precision
from fisherlens.scores import KINDS
from fisherlens.training.base import Problem, check_count, check_seeds, trainable
from fisherlens.training.devices import find_device
from fisherlens.training.problems import problem as problem_by_name
from fisherlens.training.record import describe
from fisherlens.training.verify.claim import Claim, Curve, Row
from fisherlens.training.verify.subject import BUDGETS, Subject

if TYPE_CHECKING:
    import xarray as xr

ClaimFunction = Callable[[Sequence[Subject]], Claim | Iterable[Row]]

_CLAIMS = ("metric", "stability", "one_step", "convergence", "independence", "information", "sharing")
_CANNOT = (
    FisherLensError,
    MemoryError,
    torch.OutOfMemoryError,
)  # what keeps one claim from being checked, and not the others
_TEXTS = ("statement", "relation", "unit", "note")
_NUMBERS: dict[str, tuple[str, str]] = {
    "predicted": ("what the analysis predicts, mean over seeds", "as in unit"),
    "measured": ("what training did, mean over seeds", "as in unit"),
    "predicted_sem": ("standard error of predicted over seeds", "as in unit"),
    "measured_sem": ("standard error of measured over seeds", "as in unit"),
    "tolerance": ("relative tolerance, or smallest rank correlation", "1"),
    "holds": ("whether the claim holds", "1"),
    "decided": ("whether the seeds agree enough to tell", "1"),
    "agreement": ("relative difference of measured from predicted, or rank correlation", "1"),
    "agreement_low": ("lower 95 % bound of the agreement over seeds", "1"),
    "agreement_high": ("upper 95 % bound of the agreement over seeds", "1"),
}
_WORDS = {
    "statement": "the claim",
    "relation": "how measured is compared with predicted",
    "unit": "unit of predicted and measured",
    "note": "what a reader must know besides",
}


class _Lazy(Mapping[str, ClaimFunction]):
    """Name → function of a claim; its module, of the same name, is imported when it is asked for."""

    def __getitem__(self, name: str) -> ClaimFunction:
        if name not in _CLAIMS:
            raise KeyError(name)
        return getattr(importlib.import_module(f"fisherlens.training.verify.{name}"), name)

    def __iter__(self) -> Any:
        return iter(_CLAIMS)

    def __len__(self) -> int:
        return len(_CLAIMS)


CLAIMS: Mapping[str, ClaimFunction] = _Lazy()


@own_precision
@trainable()
def verify(
    problem: Problem | str,
    claims: str | Sequence[str] | None = None,
    *,
    operator: Any = None,
    seeds: int | Sequence[int] = 3,
    preset: str = "quick",
    kind: str = "exact",
    num_examples: int | None = None,
    damping: float | None = None,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> xr.Dataset:
    """Check what the analysis predicts against what training does, one row per claim.

    ==============  ================================================================================================
    claim           what is compared
    ==============  ================================================================================================
    metric          ½ δᵀFδ with KL(p_θ ‖ p_θ+δ) along eigenvectors, and where the quadratic region ends
    stability       2/μ_max with the learning rate above which steps diverge: gradient, natural gradient, blocks
    one_step        the decrease of the quadratic model with that of the loss, for each preconditioner
    convergence     condition numbers of segmentations with the order in which their optimizers reach a target
    independence    harmless segmentations with how far their optimizers stray from exact natural gradient
    information     what a unit or filter holds with what its removal does to the outputs
    sharing         the drift of the curvature with what stale statistics cost
    ==============  ================================================================================================

    Parameters
    ----------
    problem
        A :class:`Problem`, or the name of one.
    claims
        Names of claims, or one; None for all. The name of a row, ``"metric/top"``, leaves the other rows of its claim out.
    operator
        Takes the place of the Fisher in every prediction, so that a claim can be made false: an operator with ``@`` (a Fisher, an
        approximation, an ``Operator``), or a function that returns one, of ``(model, data, likelihood)`` or of the Fisher alone. What is
        measured stays as it is.
    seeds
        How many seeds, 0, 1, …, or the seeds themselves. A seed fixes initial parameters, examples and batch order. Uncertainty
        is that over seeds: one seed decides without any.
    preset
        ``"quick"``: 128 examples, parameters after 100 steps of Adam, short runs; ``"full"``: 256 examples, 400 steps, longer runs and
        more learning rates.
    kind
        Of the Fisher that predicts, as in :class:`Fisher`.
    num_examples
        Examples that F, losses and divergences are taken on; None for the preset's, for all where there are at most twice as many, and for
        fewer where outputs are so many that complete spectra would take long.
    damping
        λ in nat where a claim needs one; None for a hundredth of the largest eigenvalue of F (our choice).
    device
        Where to compute, ``"auto"`` for CUDA where there is one; None leaves networks where the problem puts them.
    progress
        True draws a progress bar, None only in a terminal.

    Returns
    -------
    Dataset over ``claim``, whose labels are claim/case (``"metric/top"``): ``predicted``, ``measured`` with ``_sem`` over seeds,
    in the unit that ``unit`` names; ``tolerance`` and ``relation`` (``"equal"``, ``"at least"``, ``"at most"``, ``"order"``), the rule
    that decides ``holds``; ``decided``, False where the seeds differ too much to tell; ``statement`` and ``note``;
    ``agreement`` with its bounds ``agreement_low`` and ``agreement_high``, on which the decision rests; ``predicted_by_seed``, ``measured_by_seed`` (claim, seed); ``interrupted``. Series behind the claims start with the claim's
    name. A claim that the problem does not admit (no filters to remove, say) is left out with a NumericalWarning, and listed with its reason
    in the attribute ``skipped``. Ctrl-C ends the run and keeps the claims that are finished.

    Raises
    ------
    InputError: an unknown problem, claim, preset or kind, repeated seeds, an operator of another order. TypeError: an operator that is
    none. The error of a claim where no claim could be checked.

    Notes
    -----
    Analyses are made on a copy of the network in eval mode and float64, at parameters that training has led to. Claims that compare
    training runs start them from the initial parameters. A claim that fails is a result: the analysis then does not describe this
    problem, or the parameters at which it was made.

    Examples
    --------
    >>> result = verify("linear-gaussian", "metric", seeds=2, num_examples=50)
    >>> bool(result.holds.sel(claim="metric/top"))
    True
    """
    problem = problem_by_name(problem) if isinstance(problem, str) else problem
    if not isinstance(problem, Problem):
        raise TypeError(f"problem must be a fl.Problem or the name of one; got {type(problem).__name__}.")
    names = _chosen(claims)
    chosen_seeds = _seeds(seeds)
    for what, value, known in (("preset", preset, BUDGETS), ("kind", kind, KINDS)):
        if value not in known:
            raise InputError(errors.UNKNOWN_NAME.format(what=what, name=value, hint=errors.nearest(value, known)))
    num_examples = None if num_examples is None else check_count(num_examples, "num_examples")
    if damping is not None:
        damping = check_damping(damping)
    where = find_device(device)

    found: dict[str, Claim] = {}
    skipped: dict[str, Exception] = {}
    interrupted = False
    with progress_bar(len(names), desc="Verify", enabled=progress) as bar:
        subjects = [
            Subject(
                problem,
                seed,
                kind=kind,
                num_examples=num_examples,
                operator=operator,
                preset=preset,
                damping=damping,
                device=where,
                tick=lambda words: bar.set_postfix_str(words),
            )
            for seed in chosen_seeds
        ]
        if operator is not None:
            _ = subjects[0].fisher  # a wrong one shows here, not as a claim that could not be checked
        for name, rows in names.items():
            bar.set_description(name)
            try:
                answer = Claim.of(CLAIMS[name](subjects))
            except KeyboardInterrupt:
                if not found:
                    raise
                interrupted = True
                break
            except _CANNOT as error:
                skipped[name] = error
            else:
                found[name] = _only(answer, rows)
            bar.update(1)
    if not found:
        raise next(iter(skipped.values()))
    for name, error in skipped.items():
        warnings.warn(f"The claim {name!r} was not checked: {error}", NumericalWarning, stacklevel=user_level())
    return _dataset(found, subjects, skipped, interrupted)


def _chosen(claims: str | Sequence[str] | None) -> dict[str, set[str]]:
    """The claims to check, in their order, each with the rows that were asked for by name; none of them means all."""
    if claims is not None and not isinstance(claims, str | Sequence | set | frozenset):
        raise TypeError(f"claims must be None, the name of a claim or a list of them; got {type(claims).__name__}.")
    given = list(_CLAIMS) if claims is None else [claims] if isinstance(claims, str) else list(claims)
    if not given:
        raise InputError(f"claims must name at least one claim; got none. Known: {', '.join(_CLAIMS)}; None takes all.")
    wanted: dict[str, set[str]] = {}
    for name in given:
        claim, _, case = str(name).partition("/")
        if claim not in _CLAIMS:
            hint = errors.nearest(str(name), _CLAIMS)
            raise InputError(errors.UNKNOWN_NAME.format(what="claim", name=name, hint=hint))
        wanted.setdefault(claim, set()).add(str(name) if case else "")
    return {claim: set() if "" in wanted[claim] else wanted[claim] for claim in _CLAIMS if claim in wanted}


def _only(claim: Claim, rows: set[str]) -> Claim:
    """The rows of a claim that were asked for."""
    known = [row.name for row in claim.rows]
    for name in rows:
        if name not in known:
            raise InputError(errors.UNKNOWN_NAME.format(what="claim", name=name, hint=errors.nearest(name, known)))
    return Claim(tuple(row for row in claim.rows if not rows or row.name in rows), claim.curves)


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    found = check_seeds(seeds)
    if not found or len(set(found)) < len(found):
        raise InputError(f"A verification needs at least one seed, each once; got {seeds!r}.")
    return found


def _dataset(
    found: Mapping[str, Claim],
    subjects: Sequence[Subject],
    skipped: Mapping[str, Exception],
    interrupted: bool,
) -> xr.Dataset:
    from fisherlens.results import make_dataset

    rows = [row for claim in found.values() for row in claim.rows]
    seeds = [subject.seed for subject in subjects]
    variables: dict[str, Any] = {}
    for name, (long_name, units) in _NUMBERS.items():
        values = np.array([getattr(row, name) for row in rows])
        variables[name] = ("claim", values, {"long_name": long_name, "units": units})
    for name in _TEXTS:
        variables[name] = ("claim", [getattr(row, name) for row in rows], {"long_name": _WORDS[name], "units": "1"})
    for place, name in enumerate(("predicted", "measured")):
        values = np.full((len(rows), len(seeds)), np.nan)
        for number, row in enumerate(rows):
            values[number, : len(row.per_seed)] = [pair[place] for pair in row.per_seed]
        words = {"long_name": f"{name}, each seed", "units": "as in unit"}
        variables[f"{name}_by_seed"] = (("claim", "seed"), values, words)
    ended = {"long_name": "whether Ctrl-C ended the run before the last claim", "units": "1"}
    variables["interrupted"] = ((), np.bool_(interrupted), ended)
    coords: dict[str, Any] = {
        "claim": ("claim", [row.name for row in rows], {"long_name": "claim"}),
        "seed": ("seed", seeds, {"long_name": "seed of initial parameters, examples and batch order"}),
    }
    for name, claim in found.items():
        for label, curve in claim.curves.items():
            _add_curve(f"claim {name!r}", label, curve, variables, coords)
    first = subjects[0]
    settings = {
        "claims": list(found),
        "preset": first.preset,
        "budget": vars(first.budget),
        "damping": first.given_damping,
        "num_examples": first.num_examples,
        "operator": None if first.operator is None else type(first.operator).__name__,
    }
    reasons = json.dumps({name: str(error) for name, error in skipped.items()}) if skipped else None
    return make_dataset(
        variables,
        coords,
        method="claims of the analysis against training",
        settings=settings,
        problem=first.problem.name,
        kind=first.kind,
        likelihood=first.likelihood.name,
        n_data=first.num_examples,
        seed=seeds[0] if len(seeds) == 1 else np.array(seeds),
        skipped=reasons,
        **describe(first.model),
    )


def _add_curve(owner: str, label: str, curve: Curve, variables: dict[str, Any], coords: dict[str, Any]) -> None:
    """Put a series beside the rows, unless its name or the labels of its dims are taken."""
    if label in variables:
        raise InputError(
            f"The {owner} calls a series {label!r}, which is taken. Start its name with that of the claim."
        )
    variables[label] = (curve.dims, curve.values, curve.attrs)
    for dim, entry in curve.coords.items():
        if dim in coords and not np.array_equal(np.asarray(_labels(coords[dim])), np.asarray(_labels(entry))):
            raise InputError(
                f"The {owner} gives the dim {dim!r} of {label!r} other labels than it has already. Start its name with that of the claim."
            )
        coords.setdefault(dim, entry)


def _labels(entry: Any) -> Any:
    return entry[1] if isinstance(entry, tuple) and len(entry) in (2, 3) and isinstance(entry[0], str) else entry
