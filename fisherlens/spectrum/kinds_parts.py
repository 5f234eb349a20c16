"""What a comparison of kinds takes from each matrix: norms, inner products, eigenvalues, leading spaces, natural gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherlens.fisher import Fisher
from fisherlens.fisher.hessian import DENSE_LIMIT
from fisherlens.linalg.dense import eigenpairs, noise_floor
from fisherlens.spectrum.kinds_capture import rows_of

# Explicit rows that are held at once while a dense matrix is summed (our choice).
_AT_ONCE = 128 * 2**20


@dataclass
class Part:
    """All members on one part of the parameters, the whole or a layer.

    ``inner`` holds ⟨F_i, F_j⟩ and ``square`` ‖F_i - F_j‖², ``trace`` the traces; the last axis has one entry per probe, or one
    entry where everything is exact.
    """

    size: int
    inner: Tensor
    square: Tensor
    trace: Tensor
    values: list[Tensor] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    spaces: list[Tensor] = field(default_factory=list)  # leading eigenvectors above the noise, (size, <= k)
    steps: list[Tensor] = field(default_factory=list)  # damped natural gradients, (size, dampings)
    noise: list[tuple[float, float]] = field(
        default_factory=list
    )  # squared distance that sampling alone gives, its error

    @classmethod
    def empty(cls, size: int, members: int, replicates: int = 1) -> Part:
        shape = (members, members, replicates)
        nothing = torch.zeros(shape, dtype=torch.float64, device="cpu")
        return cls(size, nothing, nothing.clone(), torch.zeros(shape[1:], dtype=torch.float64, device="cpu"))


def bytes_needed(F: Fisher, members: int) -> int:
    """Bytes of the smaller side with workspace: one Gram matrix of all rows, or a dense matrix of each member."""
    count = 3 if F.n_rows < F.n_params else members + 3
    return count * min(F.n_params, F.n_rows) ** 2 * 8


def fits(F: Fisher, members: int) -> bool:
    """Whether the comparison may be exact within the memory budget; orders of up to 2000 always may."""
    return min(F.n_params, F.n_rows) <= 2000 or bytes_needed(F, members) <= F.memory


def hessian_fits(F: Fisher, members: int) -> bool:
    """Whether the matrix of a Hessian may be formed, beside those of the others: one product per parameter."""
    return F.n_params <= DENSE_LIMIT and (members + 3) * F.n_params**2 * 8 <= max(F.memory, 2**28)


def exact_part(
    F: Fisher,
    ranges: Sequence[range],
    hessian: Fisher | None,
    k: int,
    dampings: Sequence[float],
    gradient: Tensor | None,
) -> Part:
    """The members with rows, and at the end a Hessian whose matrix can be formed; nothing is estimated."""
    rows = [rows_of(F, columns) for columns in ranges]
    matrices: list[Tensor] = []
    if F.n_params <= F.n_rows or hessian is not None:
        matrices = [_second_moment(F, index) for index in rows]
        matrices += [] if hessian is None else [hessian.matrix(what="The comparison")]
        part = _from_matrices(matrices)
    else:
        part = _from_gram(F, rows)
    for at, index in enumerate(rows):
        if F.n_params <= len(index):
            _decompose_dense(part, matrices[at], False, k, dampings, gradient, F.dtype)
        else:
            _decompose_gram(part, F, index, k, dampings, gradient)
    if hessian is not None:
        _decompose_dense(part, matrices[-1], True, k, dampings, gradient, F.dtype)
    return part


def _from_gram(F: Fisher, rows: Sequence[Tensor]) -> Part:
    """⟨F_i, F_j⟩ = ‖U_i U_jᵀ‖²/W²."""
    gram = F.scores.full_gram().double() / F.total_weight
    part = Part.empty(F.n_params, len(rows))
    for i, a in enumerate(rows):
        part.trace[i] = gram.diagonal()[a].sum()
        for j, b in enumerate(rows[: i + 1]):
            part.inner[i, j] = part.inner[j, i] = gram[a][:, b].square().sum()
    own = part.inner.diagonal(dim1=0, dim2=1).T
    part.square = (own[:, None] + own[None] - 2 * part.inner).clamp(min=0)
    return part


def _from_matrices(matrices: Sequence[Tensor]) -> Part:
    """From the matrices themselves, so that small distances do not cancel."""
    part = Part.empty(len(matrices[0]), len(matrices))
    for i, a in enumerate(matrices):
        part.trace[i] = a.trace()
        for j, b in enumerate(matrices[: i + 1]):
            part.inner[i, j] = part.inner[j, i] = torch.dot(a.reshape(-1), b.reshape(-1))
            part.square[i, j] = part.square[j, i] = (a - b).square_().sum()
    return part


def _second_moment(F: Fisher, index: Tensor) -> Tensor:
    """Uᵀ U / W of some rows, ``(P, P)`` float64."""
    out = torch.zeros(F.n_params, F.n_params, dtype=torch.float64, device=F.device)
    for piece in _rows_in_pieces(F, index):
        out.addmm_(piece.T, piece)
    return out / F.total_weight


def _rows_in_pieces(F: Fisher, index: Tensor) -> Iterator[Tensor]:
    for chunk in index.split(max(1, _AT_ONCE // (8 * F.n_params))):
        yield F.scores.rows_at(chunk).double()


def _decompose_gram(
    part: Part, F: Fisher, index: Tensor, k: int, dampings: Sequence[float], gradient: Tensor | None
) -> None:
    """Eigenvalues, leading space and natural gradients of one member from the Gram matrix of its rows."""
    if F.n_params <= F.n_rows:  # the Gram matrix of all members is larger than F; that of this one is not
        gram = torch.cat([piece @ F.scores.rows_at(index).double().T for piece in _rows_in_pieces(F, index)])
    else:
        gram = F.scores.full_gram()[index][:, index].double()
    values, basis = eigenpairs(gram / F.total_weight, "The Gram matrix of F")
    floor = noise_floor(values, len(index), F.dtype)
    wanted = basis[:, : min(k, int((values > floor).sum()))]
    columns = [wanted]
    if gradient is not None:  # Woodbury, (1/λ)[g - Uᵀ(U Uᵀ + WλI)⁻¹ U g]
        image = basis.T @ F.scores.matmat(gradient[:, None])[index].double() / F.total_weight
        columns += [basis @ (image / (values.clamp(min=0) + lam)[:, None]) for lam in dampings]
    spread = torch.zeros(F.scores.rows, sum(c.shape[1] for c in columns), dtype=F.dtype, device=F.device)
    spread[index] = torch.cat(columns, dim=1).to(F.dtype)
    lifted = F.scores.rmatmat(spread) if spread.shape[1] else spread.new_zeros(F.n_params, 0)
    space, images = lifted[:, : wanted.shape[1]], lifted[:, wanted.shape[1] :]
    length = torch.linalg.vector_norm(space, dim=0).clamp(min=torch.finfo(F.dtype).tiny)
    part.values.append(values)
    part.floors.append(floor)
    part.spaces.append(torch.linalg.qr(space / length)[0])
    if gradient is not None:
        scale = torch.tensor(list(dampings), dtype=F.dtype, device=F.device)
        part.steps.append((gradient[:, None] - images) / scale)


def _decompose_dense(
    part: Part,
    matrix: Tensor,
    indefinite: bool,
    k: int,
    dampings: Sequence[float],
    gradient: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """The same from the matrix itself; only a Hessian keeps its negative eigenvalues."""
    values, vectors = eigenpairs(matrix, "The Hessian" if indefinite else "The matrix of F")
    floor = noise_floor(values, len(values), dtype)
    part.values.append(values)
    part.floors.append(floor)
    part.spaces.append(vectors[:, : min(k, int((values > floor).sum()))].to(dtype))
    if gradient is not None:
        along, shifted = vectors.T @ gradient.double(), values if indefinite else values.clamp(min=0)
        part.steps.append(torch.stack([vectors @ (along / (shifted + lam)) for lam in dampings], dim=1))


def example_noise(F: Fisher, exact: range, draws: Sequence[range]) -> tuple[float, float]:
    r"""Expected ‖F̂ - F‖² of one label draw per example, and its standard error.

    Labels of different examples are independent, so it is Σ_n (E‖u_n‖⁴ - ‖F_n‖²)/W² with u_n the score of example n at a sampled label and F_n
    its own Fisher. The expectation is the mean over the draws at hand; its error is taken from the spread over examples, which is larger than
    that over labels alone.
    """
    fourth = torch.zeros(F.scores.n, dtype=torch.float64, device=F.device)
    own = torch.zeros_like(fourth)
    inner = _example_grams(F)
    squares = inner.diagonal(dim1=1, dim2=2)
    count = sum(len(columns) for columns in draws)
    for columns in draws:
        fourth += (squares[:, columns.start : columns.stop] * len(columns)).square().sum(1) / count
    own += inner[:, exact.start : exact.stop, exact.start : exact.stop].square().sum((1, 2))
    each = fourth - own
    n = len(each)
    error = each.std().item() * n**0.5 if n > 1 else float("nan")
    return max(each.sum().item(), 0.0), error


def _example_grams(F: Fisher) -> Tensor:
    """U_n U_nᵀ/W of every example, ``(n, R, R)`` float64."""
    n, r = F.scores.n, F.scores.r
    if F.n_params > F.n_rows:
        gram = F.scores.full_gram().view(n, r, n, r)
        return gram.diagonal(dim1=0, dim2=2).permute(2, 0, 1).double() / F.total_weight
    out = []
    step = max(1, _AT_ONCE // (8 * F.n_params * r))
    for start in range(0, n, step):
        index = torch.arange(start * r, min(start + step, n) * r, device=F.device)
        rows = F.scores.rows_at(index).double().view(-1, r, F.n_params)
        out.append(rows @ rows.mT)
    return torch.cat(out) / F.total_weight
