"""Directions of parameter space from a dense F: what they tell, where they live, what is not identifiable; and planes of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherlens.reference.blocks import Blocks
from fisherlens.reference.matrix import damped, trace


def eigenvectors(F: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and unit eigenvectors in columns, ``(P,)`` and ``(P, P)``."""
    values, vectors = torch.linalg.eigh((F + F.T) / 2)
    return values.flip(0), vectors.flip(1)


def block_share(v: Tensor, blocks: Blocks) -> Tensor:
    """Σ_{i in b} v_i² of unit vectors ``(P, K)``, ``(K, B)``: rows sum to 1."""
    return torch.stack([v[b].square().sum(0) for b in blocks], dim=1)


def participation(v: Tensor) -> Tensor:
    """1 / Σ v_i⁴ of unit vectors ``(P, K)``: 1 for one parameter, P for all alike."""
    return 1 / v.pow(4).sum(0)


def projector(F: Tensor, floor: float) -> Tensor:
    """Projector on the eigenvectors with eigenvalues above a floor, ``(P, P)``: its diagonal is the leverage of each parameter."""
    values, vectors = eigenvectors(F)
    kept = vectors[:, values > floor]
    return kept @ kept.T


def determined(F: Tensor, blocks: Blocks, damping: float) -> Tensor:
    """Σ_{i in b} [F (F + λ)⁻¹]_ii, ``(B,)``: their sum is the effective dimension."""
    kept = (F @ torch.linalg.inv(damped(F, damping))).diagonal()
    return torch.stack([kept[b].sum() for b in blocks])


def share_of_trace(F: Tensor) -> Tensor:
    """λ_i / tr F, ``(P,)``."""
    return eigenvectors(F)[0] / trace(F)


def plane_metric(F: Tensor, plane: Tensor) -> Tensor:
    """Eᵀ F E for two directions in columns, ``(P, 2)`` → ``(2, 2)``."""
    return plane.T @ F @ plane


def ellipse_semi_axes(F: Tensor, plane: Tensor, radius: float) -> Tensor:
    """√(2 r / μ) for the two curvatures μ of F on the plane, descending in μ: Q from E = Q R is an orthonormal basis of it."""
    basis = torch.linalg.qr(plane)[0]
    return (2 * radius / eigenvectors(plane_metric(F, basis))[0]).sqrt()
