"""On which side, and in which form, many products with one operator are cheapest."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherlens.fisher import Fisher
from fisherlens.linalg.dense import self_gram
from fisherlens.spectrum.operators import Product, Symmetric, as_symmetric

# Floating-point operations in the time that one byte takes from memory: near 8 on two CPU cores and near 12 on an H200 in float32 (our
# measurement and its data sheet). Only the order of magnitude decides anything.
_PER_BYTE = 8.0
# A matrix up to this order is always within reach, whatever the budget says (as fl.spectrum does).
_ALWAYS = 2000
_DEFAULT_MEMORY = 2 * 2**30


@dataclass(frozen=True)
class Side:
    """A symmetric matrix with the non-zero spectrum of an operator, in the form in which products with it are cheapest.

    Attributes
    ----------
    words
        What a product is, for ``method`` in results.
    order
        Length of its vectors.
    n
        Order of the operator itself. Its n - order further eigenvalues are zero.
    product
        ``(order, K)`` → ``(order, K)``.
    matrix
        The matrix, where it was formed; its products cost no data.
    spent
        Products with the operator that forming it took.
    rank_bound
        No more eigenvalues than this are non-zero.
    psd
        Whether no eigenvalue is negative.
    dtype, device
        Of its vectors; ``dtype`` also accumulated the entries of ``matrix``.
    memory
        Bytes that work on it may take.
    to_side
        Eigenvectors of the operator ``(n, K)`` → those of this matrix, up to their length.
    """

    words: str
    order: int
    n: int
    product: Product
    matrix: Tensor | None
    spent: int
    rank_bound: int
    psd: bool
    dtype: torch.dtype
    device: torch.device
    memory: float
    to_side: Callable[[Tensor], Tensor]


def side_for(operator: Any, num_products: int, *, width: int = 10, prefer_matrix: bool = False) -> Side:
    """Choose the form in which ``num_products`` products with an operator are cheapest within its memory budget.

    A Fisher F = UᵀU/W has five: products with F (vectors of length P), with U Uᵀ/W (one entry per score row, same non-zero spectrum), or
    with one of these two matrices, formed once: F itself, or the Gram matrix by layers and chunks of columns. Costs are those of the plan,
    with memory traffic counted; a matrix is taken only where three of its size fit the budget. Other operators are used as they are, but
    for a Hessian of so few parameters that its matrix costs fewer products.

    Parameters
    ----------
    operator
        What :func:`fisherlens.spectrum.as_symmetric` takes.
    num_products
        How many vectors will be multiplied in all.
    width
        How many of them at once.
    prefer_matrix
        Take a matrix where one fits, whatever it costs; but not of scores that are streamed.
    """
    view = as_symmetric(operator)
    if not isinstance(operator, Fisher):
        return _plain(view, _DEFAULT_MEMORY)
    if operator.kind == "hessian":
        few = operator.n_params <= num_products and _fits(operator.n_params, 8, operator.memory)
        return _hessian(operator) if few else _plain(view, operator.memory)
    forms = _forms(operator, view, num_products, width)
    matrices = {name: form for name, form in forms.items() if name in ("gram", "dense")}
    if prefer_matrix and matrices and not _passes_over_data(operator):
        forms = matrices
    return _make(operator, view, min(forms, key=lambda name: forms[name]))


def side_of_block(F: Fisher, index: Tensor, num_products: int, *, width: int = 10, prefer_matrix: bool = False) -> Side:
    """The same for the diagonal block of some flat indices: its columns of U where they fit, else F between projections."""
    size = len(index)
    if F.kind == "hessian" or _passes_over_data(F) or size * F.scores.rows * F.dtype.itemsize > F.memory / 4:
        return masked_side(F, index, F.memory)
    scores, weight = F.scores, F.total_weight
    rows, item = F.n_rows, F.dtype.itemsize
    order = min(size, rows)
    once, each = _seconds(rows * size * order, 0), _seconds(4.0 * rows * size * width, 2 * rows * size * item)
    from_matrix = once + num_products / width * _seconds(2.0 * order**2 * width, order**2 * item)
    columns = scores.columns(index)
    columns = columns if scores.kept is None else columns[scores.kept]
    wide = size > rows
    matrix = None
    if _fits(order, item, F.memory) and (prefer_matrix or from_matrix <= num_products / width * each):
        matrix = self_gram(columns if wide else columns.T) / weight
    if matrix is not None:
        product, words = by_rows(matrix), "the block's Gram matrix" if wide else "the block itself"
    elif wide:
        product, words = lambda z: columns @ (columns.T @ z) / weight, "the score rows of the block"
    else:
        product, words = lambda v: columns.T @ (columns @ v) / weight, "the score columns of the block"
    return Side(
        words,
        order,
        size,
        product,
        matrix,
        0,
        min(size, F.rank_bound),
        True,
        F.dtype,
        F.device,
        F.memory,
        (lambda v: columns @ v) if wide else (lambda v: v),
    )


def masked_side(operator: Any, index: Tensor, memory: float = _DEFAULT_MEMORY) -> Side:
    """A diagonal block as the whole operator between projections onto its entries."""
    view = as_symmetric(operator)
    index = index.to(view.device)

    def product(v: Tensor) -> Tensor:
        whole = torch.zeros(view.n, v.shape[1], dtype=v.dtype, device=v.device)
        whole[index] = v
        return view.product(whole)[index]

    words = "products with the operator, restricted to the block"
    size, bound = len(index), min(len(index), view.rank_bound)
    return Side(words, size, size, product, None, 0, bound, view.psd, view.dtype, view.device, memory, lambda v: v)


def _plain(view: Symmetric, memory: float) -> Side:
    return Side(
        "products with the operator",
        view.n,
        view.n,
        view.product,
        None,
        0,
        view.rank_bound,
        view.psd,
        view.dtype,
        view.device,
        memory,
        lambda v: v,
    )


def _hessian(H: Fisher) -> Side:
    matrix = H.matrix(what="The matrix")
    words = "the matrix of the Hessian, formed once"
    n = H.n_params
    return Side(words, n, n, by_rows(matrix), matrix, n, n, False, matrix.dtype, H.device, H.memory, lambda v: v)


def by_rows(matrix: Tensor) -> Product:
    """Products with a symmetric matrix, for vectors that lie in rows of memory: with few of them BLAS is faster from the left."""
    return lambda z: (z.T @ matrix).T


def _passes_over_data(F: Fisher) -> bool:
    return F.plan.streamed or F.plan.linearised


def _fits(order: int, item: int, memory: float) -> bool:
    return order <= _ALWAYS or 3 * order**2 * item <= memory


def _seconds(flops: float, nbytes: float) -> float:
    """Time in units of a floating-point operation, the larger of arithmetic and memory traffic."""
    return max(flops, _PER_BYTE * nbytes)


def _forms(F: Fisher, view: Symmetric, num_products: int, width: int) -> dict[str, float]:
    """What every possible form would cost."""
    p, rows, item, blocks = F.n_params, F.scores.rows, F.dtype.itemsize, math.ceil(num_products / width)
    if _passes_over_data(F):
        pass_cost = sum(entry.gradient_flops for entry in F.plan) * (2 + F.n_columns) / 3
        forms = {"params": blocks * pass_cost}
        dense = pass_cost + rows * p**2
        passes = sum(math.ceil(4 * rows * layer.size * item / F.memory) for layer in F.layout.layers)
        gram = passes * pass_cost + rows**2 * p
    else:
        one = _seconds(sum(entry.product_flops for entry in F.plan) * width, 2 * F.plan.nbytes)
        forms = {"params" if view.rows is None else "rows": blocks * one}
        dense, gram = float(rows) * p**2, _gram_flops(F)
    if _fits(p, item, F.memory):
        forms["dense"] = dense + blocks * _seconds(2.0 * p**2 * width, p**2 * item)
    if _fits(rows, item, F.memory):
        forms["gram"] = gram + blocks * _seconds(2.0 * rows**2 * width, rows**2 * item)
    return forms


def _gram_flops(F: Fisher) -> float:
    """Operations of U Uᵀ; half of each product is mirrored."""
    total, n, r = 0.0, F.n_data, F.n_columns
    rows = float(F.scores.rows)
    for layer, entry in zip(F.layout.layers, F.plan, strict=True):
        t = entry.positions
        by_columns = rows**2 * layer.size + (0 if entry.path == "explicit" else 2 * rows * layer.size * t)
        if entry.storage == "factors":
            d_o = (layer.weight or layer.parameters[0]).shape[0]
            d_i = layer.size / d_o
            by_factors = n**2 * d_i + rows**2 * d_o if t == 1 else 2.0 * n**2 * t**2 * (d_i + r**2 * (d_o + 1))
            by_columns = min(by_columns, by_factors)
        elif entry.storage == "none":
            by_columns = 0.0
        total += by_columns
    return total


def _make(F: Fisher, view: Symmetric, name: str) -> Side:
    scores, weight, rows = F.scores, F.total_weight, F.n_rows
    facts = (F.rank_bound, True, F.dtype, F.device, F.memory)

    def kept(z: Tensor) -> Tensor:
        return z if scores.kept is None else z[scores.kept]

    if name == "params":
        return _plain(view, F.memory)
    if name == "dense":
        matrix = F.dense(max_params=F.n_params)
        words = "the matrix of F, formed once"
        return Side(words, F.n_params, F.n_params, by_rows(matrix), matrix, 0, *facts, lambda v: v)
    if name == "gram":
        matrix = scores.gram().div_(weight)
        words = "the Gram matrix, formed once"
        return Side(words, rows, F.n_params, by_rows(matrix), matrix, 0, *facts, lambda v: kept(scores.matmat(v)))

    def product(z: Tensor) -> Tensor:
        if scores.kept is not None:
            whole = torch.zeros(scores.rows, z.shape[1], dtype=z.dtype, device=z.device)
            whole[scores.kept] = z
            z = whole
        return kept(view.row_product(z))

    words = "products with the score rows"
    return Side(words, rows, F.n_params, product, None, 0, *facts, lambda v: kept(scores.matmat(v)))
