"""Random symmetric matrices of every shape of spectrum, for the tests of eigensolvers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHAPES = ("geometric", "uniform", "repeated", "clustered", "power law", "close")


@dataclass(frozen=True)
class Sample:
    """A matrix, how many eigenvalues to ask for and in which blocks, and the truth in float64, descending."""

    matrix: Tensor
    k: int
    block: int
    truth: Tensor
    psd: bool

    @property
    def n(self) -> int:
        return len(self.matrix)

    @property
    def scale(self) -> float:
        return self.truth.abs().max().item()


def spectrum_of(shape: str, rank: int, condition: float, generator: torch.Generator) -> Tensor:
    """Non-zero eigenvalues, at most 1.1."""
    uniform = torch.rand(rank, generator=generator, dtype=torch.float64)
    low = -torch.log10(torch.tensor(condition)).item()
    if shape == "geometric":
        return torch.logspace(0, low, rank, dtype=torch.float64)
    if shape == "repeated":
        levels = torch.logspace(0, low, int(torch.randint(1, 6, (), generator=generator)), dtype=torch.float64)
        return levels[torch.randint(0, len(levels), (rank,), generator=generator)]
    if shape == "clustered":
        values = 1 + 1e-7 * uniform
        values[rank // 2 :] *= 0.3
        return values
    if shape == "power law":
        return torch.arange(1, rank + 1, dtype=torch.float64) ** -1.5
    if shape == "close":
        return 1 + 0.1 * 10 ** (-12 * uniform)
    return uniform


def sample(i: int, *, indefinite: bool = False, largest_order: int = 120) -> Sample:
    """The i-th: order 1 to ``largest_order``, rank 0 to full, condition 1 to 1e14, float32 or float64, any scale from 1e-3 to 1e3."""
    generator = torch.Generator().manual_seed(1000 + i)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    n = draw(1, largest_order)
    rank, shape = draw(0, n), SHAPES[i % len(SHAPES)]
    condition = 10 ** (14 * torch.rand((), generator=generator).item())
    values = torch.zeros(n, dtype=torch.float64)
    values[:rank] = spectrum_of(shape, rank, condition, generator)
    values *= 10 ** (6 * torch.rand((), generator=generator).item() - 3)
    basis = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    if indefinite:
        values = values - 0.6 * values.max()
    matrix = (basis * values) @ basis.T
    matrix = ((matrix + matrix.T) / 2).to(torch.float32 if (i // len(SHAPES)) % 2 else torch.float64)
    truth = torch.linalg.eigvalsh(matrix.double()).flip(0)
    return Sample(matrix, draw(1, 12), draw(1, 6), truth, not indefinite)


def low_rank(n: int, rank: int = 4, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """A positive semi-definite matrix of small rank."""
    rows = torch.randn(n, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (rows @ rows.T).to(dtype)
