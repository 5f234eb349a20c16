r"""What another sample of examples, or of labels, would have given: a bootstrap on the side of the score rows.

A replicate draws N of the N examples with replacement. With c_n the times that example n was drawn, its Fisher is

.. math:: F^* = \frac{\sum_n c_n w_n F_n}{\sum_n c_n w_n}, \qquad \lambda(F^*) = \lambda\!\left(D^{1/2} K D^{1/2}\right) \Big/ \sum_n c_n w_n

with D the counts on the rows of the Gram matrix K = U Uᵀ, the R rows of an example alike: no further pass over the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisherlens import errors
from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher
from fisherlens.linalg.dense import eigenvalues, noise_floor
from fisherlens.spectrum.intervals import check_confidence, check_count

# Replicates fewer than this say nothing of the tails (our choice).
_FEWEST = 20
_INDICATIVE = "indicative"
Functional = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Replicates:
    """Eigenvalues of replicates, descending and padded with zeros.

    Attributes
    ----------
    point
        Those of F itself, ``(L,)``; below the noise floor 0.
    examples
        With examples drawn anew, ``(B, L)``.
    labels
        With the label draws of each example drawn anew, the examples as they are, ``(B, L)``; None where the labels were not drawn.
    draws
        Label draws per example, S; 0 where the labels were not drawn.
    n_data
        Examples with weight.
    """

    point: np.ndarray
    examples: np.ndarray
    labels: np.ndarray | None
    draws: int
    n_data: int

    def variances(self, functional: Functional) -> tuple[np.ndarray, np.ndarray]:
        """Variance of a functional that comes from the data, and from the labels that were drawn (NaN where one draw cannot tell).

        Examples drawn anew bring their own labels, so their variance holds both parts. Draws within an example, drawn anew, have
        (S - 1)/S of the variance of fresh ones. With S = 1 the two parts stay together, as data.
        """
        total = functional(self.examples).var(axis=0, ddof=1)
        if not self.draws:
            return total, np.zeros_like(total)
        if self.labels is None:
            return total, np.full_like(total, np.nan)
        labels = functional(self.labels).var(axis=0, ddof=1) * self.draws / (self.draws - 1)
        labels = np.minimum(labels, total)
        return total - labels, labels

    def interval(self, functional: Functional, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Standard error over examples, and both ends of the bias-corrected normal interval on a logarithmic scale.

        Functionals of a spectrum are biased in small samples, and replicates of a sample once more by about as much: the interval is moved
        by that difference. NaN where F or one of the replicates has no such eigenvalue: a larger sample may have.
        """
        from scipy.special import stdtrit

        point, values = functional(self.point[None])[0], functional(self.examples)
        missing = (values <= 0).any(axis=0) | (point <= 0)
        tiny = np.finfo(float).tiny
        logs, log_point = np.log(np.maximum(values, tiny)), np.log(np.maximum(point, tiny))
        bias = np.median(logs, axis=0) - log_point
        half = stdtrit(max(self.n_data - 1, 1), (1 + confidence) / 2) * logs.std(axis=0, ddof=1)
        low, high = (np.exp(np.where(missing, np.nan, log_point - bias + side * half)) for side in (-1, 1))
        return values.std(axis=0, ddof=1), low, high


def replicate(F: Any, replicates: int, seed: int, index: Tensor | None = None) -> Replicates:
    """Bootstrap the spectrum of F, or of its diagonal block at some flat indices.

    Raises
    ------
    InputError: no Fisher with score rows, fewer than two examples with weight. MemoryBudgetError: the Gram matrix does not fit.
    """
    check_count("seed", seed, 0, "of the bootstrap")
    rows = _Rows(F, index)
    generator = np.random.default_rng(seed)
    point = rows.spectrum(np.ones(rows.count))
    floor = noise_floor(torch.from_numpy(point), rows.order, F.dtype)
    n = len(rows.weight)

    def spectra(draw: Callable[[], tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        out = np.zeros((replicates, rows.order))
        for row in out:
            values = rows.spectrum(*draw())
            values[values <= floor] = 0
            row[: len(values)] = values
        return out

    def examples() -> tuple[np.ndarray, np.ndarray]:
        while True:
            counts = generator.multinomial(n, np.full(n, 1 / n))
            if (counts * rows.weight).sum() > 0:
                return counts[rows.example], counts

    def labels() -> tuple[np.ndarray, np.ndarray]:
        counts = generator.multinomial(draws, np.full(draws, 1 / draws), size=n)
        return counts.ravel()[rows.label], np.ones(n)

    draws = F.n_columns if F.kind == "mc" else 0
    drawn = spectra(examples)
    point = np.where(point <= floor, 0, point)
    return Replicates(point, drawn, spectra(labels) if draws > 1 else None, draws, n)


class _Rows:
    """Kept score rows as their Gram matrix or, where there are fewer columns, as themselves; float64.

    Attributes
    ----------
    order, count
        Of the matrix that is decomposed; number of kept rows.
    weight
        Σ w of every example that has any, ``(n,)``.
    example, label
        For each row the place of its example among those, and of its label draw, example times S plus draw, ``(count,)``.
    """

    def __init__(self, F: Any, index: Tensor | None):
        if not isinstance(F, Fisher):
            raise InputError(
                f"bootstrap= draws the examples of a Fisher anew, but {type(F).__name__} knows no examples. Use bootstrap=0, or pass the Fisher itself."
            )
        if F.kind == "hessian":
            raise InputError(errors.NO_SCORE_ROWS)
        weight = F.replay.weight.cpu().numpy()
        r = F.n_columns
        kept = np.arange(F.scores.rows) if F.scores.kept is None else F.scores.kept.cpu().numpy().nonzero()[0]
        used, self.example = np.unique(kept // r, return_inverse=True)
        self.weight, self.label = weight[used], self.example * r + kept % r
        if len(used) < 2:
            raise InputError(
                f"bootstrap= needs at least two examples with weight; this Fisher has {len(used)}. Of one example nothing can be said of others."
            )
        self.count, width = len(kept), F.n_params if index is None else len(index)
        self._columns: Tensor | None = None
        self._gram: Tensor | None = None
        if width < self.count:
            self._require(F, self.count * width)
            whole = torch.arange(F.n_params, device=F.device) if index is None else index.to(F.device)
            columns = F.scores.columns(whole)
            self._columns = (columns if F.scores.kept is None else columns[F.scores.kept]).double()
        elif index is None:
            self._require(F, self.count**2)
            self._gram = F.scores.gram().double()
        else:
            self._require(F, self.count * max(self.count, width))
            columns = F.scores.columns(index.to(F.device))
            columns = (columns if F.scores.kept is None else columns[F.scores.kept]).double()
            self._gram = columns @ columns.T
        self.order = min(width, self.count)

    def _require(self, F: Fisher, entries: int) -> None:
        if 3 * entries * 8 > F.memory and entries > 2000**2:
            raise MemoryBudgetError(
                f"The bootstrap works on {self.count} score rows at once and takes {readable_bytes(3 * entries * 8)}, over the budget of "
                f"{readable_bytes(F.memory)}. Use fewer examples, kind='mc' with one column each, bootstrap=0, or raise memory=."
            )

    def spectrum(self, counts: np.ndarray, examples: np.ndarray | None = None) -> np.ndarray:
        """Eigenvalues, descending, with rows and examples counted so often."""
        total = float(self.weight.sum() if examples is None else (examples * self.weight).sum())
        used = counts.nonzero()[0]
        if self._columns is not None:
            at = torch.from_numpy(used).to(self._columns.device)
            rows = self._columns[at]
            matrix = (rows * torch.from_numpy(counts[used]).to(rows)[:, None]).T @ rows
        else:
            at = torch.from_numpy(used).to(self._gram.device)
            root = torch.from_numpy(counts[used]).to(self._gram).sqrt()
            matrix = self._gram[at][:, at] * root * root[:, None]
        return eigenvalues(matrix, "The matrix of a bootstrap replicate").cpu().numpy() / total


def check_replicates(bootstrap: Any) -> int:
    """Refuse what is no number of replicates: 0 for none, else at least 20."""
    check_count("bootstrap", bootstrap, 0, "the replicates of a bootstrap over examples, 0 for none")
    if 0 < bootstrap < _FEWEST:
        raise InputError(
            f"bootstrap={bootstrap} replicates say nothing of the tails of a distribution; use at least {_FEWEST}, better 200, or 0 for none."
        )
    return bootstrap


def bootstrap_spectrum(
    F: Any,
    eigenvalue: np.ndarray,
    replicates: int,
    seed: int = 0,
    confidence: float = 0.95,
    blocks: Sequence[Tensor | None] | None = None,
) -> dict[str, Any]:
    """Variables that a spectrum gains from a bootstrap over examples, as :func:`make_dataset` takes them, without their dims in front.

    Parameters
    ----------
    F
        The Fisher.
    eigenvalue
        The spectrum, ``(rank,)``, or ``(blocks, rank)`` with ``blocks``; only its shape and its NaN are looked at.
    replicates, seed, confidence
        Of the bootstrap; every block sees the same draws.
    blocks
        Flat indices of each block, None for the whole; None for one whole spectrum.

    Returns
    -------
    Name → (dims behind that of the blocks, values, attributes): ``eigenvalue_low``, ``eigenvalue_high``, ``eigenvalue_sem`` (rank),
    ``trace_low``, ``trace_high``, ``trace_sem``, and ``eigenvalue_label_share`` (rank) and ``trace_label_share``, the part of the
    variance that comes from labels drawn for kind mc.
    """
    check_replicates(replicates)
    check_confidence(confidence)
    parts = [None] if blocks is None else list(blocks)
    length = eigenvalue.shape[-1]
    columns: dict[str, list[Any]] = {}
    for row, index in zip(np.atleast_2d(eigenvalue), parts, strict=True):
        found = replicate(F, replicates, seed, index)
        exists = np.isfinite(row)

        def ranks(values: np.ndarray) -> np.ndarray:
            out = np.zeros((len(values), length))
            out[:, : min(length, values.shape[1])] = values[:, :length]
            return out

        for name, functional in (("eigenvalue", ranks), ("trace", _total)):
            sem, low, high = found.interval(functional, confidence)
            data, labels = found.variances(functional)
            total = data + np.nan_to_num(labels)
            share = np.where(total > 0, labels / np.where(total > 0, total, 1), np.nan)
            for suffix, values in (("low", low), ("high", high), ("sem", sem), ("label_share", share)):
                values = np.where(exists, values, np.nan) if name == "eigenvalue" else values
                columns.setdefault(f"{name}_{suffix}", []).append(values)
    shown = f"{100 * confidence:g} % bootstrap interval over examples, {_INDICATIVE}"
    words = {
        "low": (f"lower end of the {shown}", "nat"),
        "high": (f"upper end of the {shown}", "nat"),
        "sem": ("standard error over examples (bootstrap)", "nat"),
        "label_share": ("share of the variance over examples that comes from drawn labels", "1"),
    }
    out = {}
    for name, values in columns.items():
        what, _, suffix = name.partition("_")
        long_name, units = words[suffix]
        stacked = np.array(values[0] if blocks is None else values)
        out[name] = (
            ("rank",) if what == "eigenvalue" else (),
            stacked,
            {"long_name": f"{what}: {long_name}", "units": units},
        )
    return out


def _total(values: np.ndarray) -> np.ndarray:
    return values.sum(axis=-1, keepdims=False)


def bootstrap_functions(
    F: Any,
    functionals: dict[str, Functional],
    replicates: int,
    seed: int,
    confidence: float,
    index: Tensor | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """For functionals of the eigenvalues, ``(B, L)`` → ``(B, ...)``: ``low``, ``high``, and the variances ``data`` and ``labels``."""
    found = replicate(F, replicates, seed, index)
    out = {}
    for name, functional in functionals.items():
        _, low, high = found.interval(functional, confidence)
        data, labels = found.variances(functional)
        out[name] = {"low": low, "high": high, "data": data, "labels": labels}
    return out
