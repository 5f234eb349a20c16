r"""One claim: what the analysis predicts, what training did, and the rule that decides whether the two agree.

Every seed gives one pair (predicted p_i, measured m_i) and one number s_i, their agreement:

=============  ==================================================  ============================
relation       s_i                                                 holds where
=============  ==================================================  ============================
``equal``      (m_i − p_i)/max(\|p_i\|, \|m_i\|)                       −tolerance ≤ s ≤ tolerance
``at least``   the same                                            s ≥ −tolerance
``at most``    the same                                            s ≤ tolerance
``order``      rank correlation of two lists                       s ≥ tolerance
=============  ==================================================  ============================

The mean of s over n seeds has the one-sided 95 % bounds s̄ ± t₀.₉₅(n − 1) sd/√n (for ``equal``: two one-sided tests, whose interval has
90 %). A claim *holds* where the whole interval lies inside, is *refuted* where it lies outside altogether, and is *undecided* where
it holds a boundary: then ``holds`` and ``decided`` are both False, and ``note`` says so. One seed has no interval and is decided as it
stands, with a note. The level, and that seeds stand for the uncertainty, are our choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fisherlens.errors import InputError

CONFIDENCE = 0.95  # of each one-sided bound
RELATIONS = ("equal", "at least", "at most", "order")

Pairs = Sequence[tuple[float, float]]


class Curve(NamedTuple):
    """A series behind a claim, as ``make_dataset`` takes a variable: it lands in the Dataset under its name.

    ``dims`` name the axes of ``values``; ``attrs`` hold ``long_name`` and ``units``; ``coords`` map each dim to its labels, or to
    ``(dim, labels, attrs)``. Dims of one name must have equal labels in all claims, so start them with the name of the claim. The dim
    ``seed`` is that of the result and needs no labels.
    """

    dims: tuple[str, ...]
    values: Any
    attrs: Mapping[str, str]
    coords: Mapping[str, Any] = {}


def curves(
    claim: str,
    found: Sequence[Any],
    texts: Mapping[str, str],
    coords: Mapping[str, Any],
    value: Callable[[Any, str], Any] = getattr,
) -> dict[str, Curve]:
    """Shares, cosines and the like of every seed as curves ``<claim>_<name>`` over seed and the dims of ``coords``, in their order.

    Parameters
    ----------
    claim
        Put before each name.
    found
        What each seed found.
    texts
        Name → what it is, in words.
    coords
        Dim → its labels, as in :class:`Curve`.
    value
        Takes what a seed found and a name, and gives the array over these dims.
    """
    dims = ("seed", *coords)
    return {
        f"{claim}_{name}": Curve(
            dims, np.array([value(one, name) for one in found]), {"long_name": text, "units": "1"}, coords
        )
        for name, text in texts.items()
    }


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes
    ----------
    name
        ``claim/case``, such as ``"metric/top"``.
    statement
        The claim in one sentence.
    predicted, measured
        Means over seeds, in ``unit``.
    tolerance
        Relative, or the smallest rank correlation: see the table of the module.
    holds
        Whether the claim is confirmed.
    relation
        One of :data:`RELATIONS`.
    predicted_sem, measured_sem
        Standard errors over seeds; NaN for one seed.
    unit
        ``"nat"``, ``"s"``, ``"1"``, …
    note
        What a reader must know besides.
    per_seed
        (predicted, measured) of each seed, in the order of the seeds.
    decided
        False where the uncertainty over seeds is too large to tell; ``holds`` is then False too.
    agreement, agreement_low, agreement_high
        Mean of s over seeds, and its bounds, on which the decision rests.
    """

    name: str
    statement: str
    predicted: float
    measured: float
    tolerance: float
    holds: bool
    relation: str
    predicted_sem: float = math.nan
    measured_sem: float = math.nan
    unit: str = "1"
    note: str = ""
    per_seed: tuple[tuple[float, float], ...] = ()
    decided: bool = True
    agreement: float = math.nan
    agreement_low: float = math.nan
    agreement_high: float = math.nan

    def __post_init__(self) -> None:
        """Refuse a row that no table could show."""
        claim, _, case = self.name.partition("/")
        if not claim or not case:
            raise InputError(f"A row of fl.verify is named claim/case, such as 'metric/top'; got {self.name!r}.")
        if self.relation not in RELATIONS:
            raise InputError(f"The relation of a row is one of {', '.join(RELATIONS)}; got {self.relation!r}.")


@dataclass(frozen=True)
class Claim:
    """What a claim function returns: its rows, and the series that a plot of it draws, by name of the variable."""

    rows: tuple[Row, ...]
    curves: Mapping[str, Curve] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: Claim | Iterable[Row]) -> Claim:
        """Rows alone are a claim without series."""
        return answer if isinstance(answer, Claim) else cls(tuple(answer))


# --- the four relations ----------------------------------------------------------------------------------------------


def equal(name: str, statement: str, pairs: Pairs, tolerance: float, *, unit: str = "1", note: str = "") -> Row:
    r"""Predicted and measured agree within a relative tolerance.

    Parameters
    ----------
    name, statement, unit, note
        As in :class:`Row`.
    pairs
        (predicted, measured) of each seed; infinity means "never reached" and agrees with nothing but itself.
    tolerance
        Largest |m − p|/max(|p|, |m|) that counts as agreement, below 1.

    Examples
    --------
    >>> equal("stability/sgd", "The rate.", [(2.0, 2.01), (3.0, 3.02), (2.5, 2.49)], 0.02).holds
    True
    """
    return _row(name, statement, pairs, _relative(pairs), tolerance, "equal", (-tolerance, tolerance), unit, note)


def at_least(name: str, statement: str, pairs: Pairs, tolerance: float, *, unit: str = "1", note: str = "") -> Row:
    """Measured is no smaller than predicted, but for a relative tolerance; parameters as of :func:`equal`.

    Examples
    --------
    >>> at_least("metric/reach-top", "It reaches.", [(1.0, 5.0)], 0.0).holds
    True
    """
    return _row(name, statement, pairs, _relative(pairs), tolerance, "at least", (-tolerance, math.inf), unit, note)


def at_most(name: str, statement: str, pairs: Pairs, tolerance: float, *, unit: str = "1", note: str = "") -> Row:
    """Measured is no larger than predicted, but for a relative tolerance; parameters as of :func:`equal`.

    Examples
    --------
    >>> at_most("sharing/drift", "It drifts.", [(1.0, 5.0)], 0.0).holds
    False
    """
    return _row(name, statement, pairs, _relative(pairs), tolerance, "at most", (-math.inf, tolerance), unit, note)


def order(
    name: str,
    statement: str,
    lists: Sequence[tuple[Sequence[float], Sequence[float]]],
    tolerance: float,
    *,
    note: str = "",
) -> Row:
    """Predicted and measured put the same things in the same order, as far as a rank correlation of ``tolerance``.

    Parameters
    ----------
    name, statement, note
        As in :class:`Row`.
    lists
        For each seed two lists of equal length, predicted and measured, one entry per thing. Infinite entries rank last; a NaN drops
        the thing from that seed.
    tolerance
        Smallest rank correlation (Spearman's, ties share their mean rank) that counts as agreement, in [-1, 1].

    Returns
    -------
    A row with predicted 1, the correlation of equal orders, and measured the mean correlation over seeds.

    Examples
    --------
    >>> order("one_step/order", "They rank alike.", [([1, 2, 3, 4], [10, 20, 40, 30])], 0.7).measured
    0.8
    """
    found = [rank_correlation(predicted, measured) for predicted, measured in lists]
    pairs = [(1.0, value) for value in found]
    return _row(name, statement, pairs, found, tolerance, "order", (tolerance, math.inf), "1", note)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties by mean ranks; NaN below three comparable entries, or where one list is constant.

    Entries that agree to six digits are ties: their order would be one of rounding.
    """
    from scipy.stats import rankdata

    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if first.shape != second.shape or first.ndim != 1:
        raise InputError(f"Two lists of equal length are ranked; got shapes {first.shape} and {second.shape}.")
    known = ~(np.isnan(first) | np.isnan(second))
    if known.sum() < 3:
        return math.nan
    x, y = (rankdata([float(f"{value:.5e}") for value in values[known]]) for values in (first, second))
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return round(float(x @ y) / size, 12) if size else math.nan


# --- deciding --------------------------------------------------------------------------------------------------------


def _relative(pairs: Pairs) -> list[float]:
    """(m − p)/max(|p|, |m|) of each pair: 0 where they are equal, ±1 where one is infinite, NaN where one is NaN."""
    found = []
    for p, m in pairs:
        if math.isnan(p) or math.isnan(m):
            found.append(math.nan)
        elif p == m:
            found.append(0.0)
        elif math.isinf(p) or math.isinf(m):
            found.append(math.copysign(1.0, m - p))
        else:
            found.append((m - p) / max(abs(p), abs(m)))
    return found


def mean_and_sem(values: Iterable[float]) -> tuple[float, float]:
    """Mean of the numbers that are not NaN, and its standard error; NaN where there are too few."""
    known = np.array([value for value in values if not math.isnan(value)], dtype=float)
    if not len(known):
        return math.nan, math.nan
    if not np.isfinite(known).all():
        return math.inf, math.nan
    return float(known.mean()), float(known.std(ddof=1) / len(known) ** 0.5) if len(known) > 1 else math.nan


def bounds(values: Sequence[float]) -> tuple[float, float]:
    """One-sided 95 % bounds of the mean, both; of one value, the value itself."""
    from scipy.special import stdtrit

    known = [value for value in values if not math.isnan(value)]
    mean, sem = mean_and_sem(known)
    half = float(stdtrit(len(known) - 1, CONFIDENCE)) * sem if len(known) > 1 else 0.0
    return mean - half, mean + half


def _row(
    name: str,
    statement: str,
    pairs: Pairs,
    agreement: Sequence[float],
    tolerance: float,
    relation: str,
    inside: tuple[float, float],
    unit: str,
    note: str,
) -> Row:
    per_seed = tuple((float(p), float(m)) for p, m in pairs)
    low, high = bounds(agreement)
    if relation == "order":
        low, high = max(low, -1.0), min(high, 1.0)  # no correlation lies beyond; NaN stays
    known = sum(not math.isnan(value) for value in agreement)
    holds = inside[0] <= low and high <= inside[1]
    decided = holds or high < inside[0] or low > inside[1]
    notes = [note] if note else []
    if not known:
        holds = decided = False
        notes.append("undecided: no seed gave both numbers")
    elif not decided:
        notes.append(f"undecided: agreement {low:.2g} to {high:.2g} over {known} seeds holds a boundary")
    elif known == 1:
        notes.append("one seed: no uncertainty")
    if 0 < known < len(agreement):
        notes.append(f"{len(agreement) - known} of {len(agreement)} seeds without a number")
    predicted, predicted_sem = mean_and_sem(p for p, _ in per_seed)
    measured, measured_sem = mean_and_sem(m for _, m in per_seed)
    return Row(
        name,
        statement,
        predicted,
        measured,
        float(tolerance),
        holds,
        relation,
        predicted_sem,
        measured_sem,
        unit,
        "; ".join(notes),
        per_seed,
        decided,
        mean_and_sem(agreement)[0],
        low,
        high,
    )
