"""What is watched along a training run, from dense matrices: where the gradient points, and how far the leading space has turned."""

from __future__ import annotations

from torch import Tensor

from fisherlens.reference.directions import eigenvectors


def top_space(F: Tensor, k: int) -> Tensor:
    """Projector on the k leading eigenvectors, ``(P, P)``."""
    leading = eigenvectors(F)[1][:, :k]
    return leading @ leading.T


def top_share(F: Tensor, g: Tensor, k: int) -> float:
    """‖Π g‖² / ‖g‖²: the share of the squared gradient in the leading space; k/P for a random direction."""
    return ((top_space(F, k) @ g).square().sum() / g.square().sum()).item()


def space_overlap(F: Tensor, other: Tensor, k: int) -> float:
    """tr(Π Π')/k of the leading spaces of two matrices, in [0, 1]; k/P for random spaces."""
    return (top_space(F, k) @ top_space(other, k)).trace().item() / k


def space_gap(F: Tensor, k: int) -> float:
    """1 - λ_{k+1}/λ_k: near 0 where the leading space is hardly determined."""
    values = eigenvectors(F)[0]
    return (1 - values[k] / values[k - 1]).item()
