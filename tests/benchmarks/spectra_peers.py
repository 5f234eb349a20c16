"""What others do for spectra, on any product: ARPACK, power iteration with deflation, Lanczos densities, Hutchinson.

Each takes a product v ``(P,)`` → F v and counts how often it is called. The recipes that are named after PyHessian are its
algorithms written anew (power iteration with deflation; Lanczos that projects every vector once on all before it), since the package itself
multiplies with the Hessian of a loss only, and its density calls a function that torch no longer has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


@dataclass
class Counted:
    """A product with the number of vectors it has seen, and the time after which its user should stop."""

    apply: Product
    size: int
    limit: float = float("inf")
    count: int = 0

    def __post_init__(self):
        self.start = time.perf_counter()

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1 if v.ndim == 1 else v.shape[1]
        return self.apply(v)

    @property
    def spent(self) -> bool:
        """Whether the time is over."""
        return time.perf_counter() - self.start > self.limit


def arpack(product: Counted, k: int, tol: float, seed: int = 0) -> np.ndarray:
    """The k largest eigenvalues by scipy's ``eigsh``."""

    def matvec(v: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(np.ascontiguousarray(v.reshape(-1), dtype=np.float32))).numpy()

    operator = scipy.sparse.linalg.LinearOperator((product.size,) * 2, matvec=matvec, dtype=np.float32)
    start = np.random.default_rng(seed).standard_normal(product.size).astype(np.float32)
    values = scipy.sparse.linalg.eigsh(operator, k=k, which="LA", tol=tol, v0=start, return_eigenvectors=False)
    return np.sort(values)[::-1].astype(float)


def power_iteration(product: Counted, truth: np.ndarray, accuracy: float, seed: int = 0) -> np.ndarray:
    """One eigenvalue after the other, each from the complement of those before.

    It stops as soon as it is within ``accuracy`` of the truth, which it could not know by itself: a rule in its favour.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[float] = []
    basis = torch.zeros(product.size, 0)
    for wanted in truth:
        v = torch.randn(product.size, generator=generator)
        value = 0.0
        while not product.spent:
            v = v - basis @ (basis.T @ v)
            v = v / v.norm()
            image = product(v)
            value = torch.dot(v, image).item()
            v = image
            if abs(value - wanted) <= accuracy:
                break
        if product.spent:
            break
        found.append(value)
        basis = torch.cat([basis, (v / v.norm())[:, None]], dim=1)
    return np.array(found)


def lanczos_once(product: Counted, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of one random sign vector, every new vector projected once on all before it."""
    generator = torch.Generator().manual_seed(seed)
    v = 2.0 * torch.randint(0, 2, (product.size,), generator=generator) - 1
    basis = torch.zeros(steps, product.size)
    diagonal, beside = torch.zeros(steps), torch.zeros(steps - 1)
    w = v / v.norm()
    for j in range(steps):
        if j:
            w = w - basis[:j].T @ (basis[:j] @ w)
            beside[j - 1] = w.norm() if j else 0.0
            w = w / w.norm()
        basis[j] = w
        w = product(w)
        diagonal[j] = torch.dot(w, basis[j])
    matrix = torch.diag(diagonal) + torch.diag(beside, 1) + torch.diag(beside, -1)
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.numpy(), vectors[0].square().numpy()


def lanczos_plain(product: Counted, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """curvlinops' ``fast_lanczos`` (no orthogonalisation) where it is installed, else the same recurrence."""

    class Operator:
        device, dtype, shape = torch.device("cpu"), torch.float32, (product.size,) * 2

        def __matmul__(self, v: Tensor) -> Tensor:
            return product(v)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            from curvlinops.papyan2020traces.spectrum import fast_lanczos
        except ImportError:
            return lanczos_once(product, steps, seed)
        values, vectors = fast_lanczos(Operator(), steps)
    return values.double().numpy(), vectors[0].double().square().numpy()


def hutchinson(product: Counted, probes: int, seed: int = 0) -> tuple[float, int]:
    """Mean of zᵀF z over random signs, and how many fitted into the time."""
    generator = torch.Generator().manual_seed(seed)
    values: list[float] = []
    while len(values) < probes and not (values and product.spent):
        z = 2.0 * torch.randint(0, 2, (product.size,), generator=generator) - 1
        values.append(torch.dot(z, product(z)).item())
    return sum(values) / len(values), len(values)


def settling_trace(product: Counted, tol: float = 1e-3, limit: int = 100, seed: int = 0) -> tuple[float, int]:
    """Hutchinson as PyHessian stops it: once the mean has changed by less than ``tol``, or after ``limit`` probes."""
    generator = torch.Generator().manual_seed(seed)
    seen: list[float] = []
    before = 0.0
    while len(seen) < limit and not product.spent:
        z = 2.0 * torch.randint(0, 2, (product.size,), generator=generator) - 1
        seen.append(torch.dot(z, product(z)).item())
        mean = sum(seen) / len(seen)
        if abs(mean - before) < tol * (before + 1e-6):
            break
        before = mean
    return sum(seen) / len(seen), len(seen)
