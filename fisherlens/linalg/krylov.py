"""An orthonormal basis with the projection of a symmetric operator on it, grown block by block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fisherlens.errors import InputError, NonFiniteError
from fisherlens.linalg.probes import wide

Product = Callable[[Tensor], Tensor]

# A direction shorter than this many ε of the operator's norm is rounding: its Krylov space is exhausted.
BREAKDOWN = 10
# A skew part larger than this share of the operator belongs to no symmetric one; rounding stays far below.
_SKEW = 1e-3

_NOT_SYMMETRIC = (
    "The operator must be symmetric; uᵀ(A v) and vᵀ(A u) differ by {skew:.1e} for vectors of unit length, where products have length {scale:.1e}. "
    "Either the callable is no symmetric map (its symmetric part is (A v + Aᵀ v)/2), or it changes between calls (fresh random labels, "
    "dropout). Make it symmetric and fixed."
)
_NOT_FINITE = (
    "{what} holds NaN or infinity, so eigenvalues would be meaningless. Something overflowed inside it: look for very large parameters or "
    "inputs, or use float64."
)
_NOT_DEFINITE = (
    "B must be symmetric positive definite in A x = λ B x, but xᵀB x = {value:.1e} was found. An approximation of a Fisher is only "
    "semi-definite: pass B=(approximation, damping) with a damping > 0."
)
_NOT_INVERSE = (
    "The solve of B must be its inverse; B (B⁻¹ x) differs from x by {gap:.1e} relative. Probably the damping of one of them is missing in the "
    "other: pass B=(approximation, damping), or one object whose @ and solve belong together."
)


def require_finite_block(block: Tensor, what: str) -> None:
    """Raise where a product holds NaN or infinity; one sum is the cheap first look."""
    if not torch.isfinite(block.sum()) and not torch.isfinite(block).all():
        raise NonFiniteError(_NOT_FINITE.format(what=what))


@dataclass(frozen=True)
class Metric:
    """B of the generalised problem A x = λ B x: its product and its inverse, both ``(n, K)`` → ``(n, K)``."""

    product: Product
    solve: Product

    def rows(self, x: Tensor) -> Tensor:
        """B X for vectors in rows."""
        return self._checked(self.product(x.T), "A product with B").T

    def solve_rows(self, x: Tensor) -> Tensor:
        """B⁻¹ X for vectors in rows."""
        return self._checked(self.solve(x.T), "A solve with B").T

    @staticmethod
    def _checked(block: Tensor, what: str) -> Tensor:
        require_finite_block(block, what)
        return block

    def check(self, x: Tensor) -> None:
        """Raise where ``solve`` does not invert ``product`` on some vectors in rows."""
        gap = (self.rows(self.solve_rows(x)) - x).norm() / x.norm()
        if not gap <= 1e-2:
            raise InputError(_NOT_INVERSE.format(gap=gap.item()))


class Krylov:
    """Basis V, projection T = VᵀAV and pending block Q with B⁻¹A V = V T + Q S; B = 1 without a metric.

    Vectors lie in rows. The basis has the operator's dtype; T ``(j, j)`` and S ``(q, j)`` are float64 on the CPU. All of T is projected
    rather than taken from a recurrence, and every block is orthogonalised twice against all of V, so that no ghost copies appear.

    Parameters
    ----------
    n, dtype, device
        Order, and dtype and device of vectors.
    capacity
        Most vectors that the basis may hold.
    metric
        B, or None.
    seed
        Of an own CPU generator for the start and the refills.

    Attributes
    ----------
    scale
        Norm of the operator, as far as products showed it.
    skew
        Largest difference between uᵀ(A v) and vᵀ(A u) seen: the operator's own rounding.
    lost
        ``(r, j)`` coupling to directions that :meth:`refresh` gave up: B⁻¹A V = V T + Q S + (other orthonormal directions) lost.
    """

    def __init__(
        self, n: int, dtype: torch.dtype, device: torch.device, *, capacity: int, metric: Metric | None, seed: int
    ):
        self.n, self.dtype, self.device, self.metric = n, dtype, device, metric
        self.generator = torch.Generator().manual_seed(int(seed))
        self.eps = torch.finfo(dtype).eps
        self._v = torch.empty(capacity, n, dtype=dtype, device=device)
        self._z = self._v if metric is None else torch.empty_like(self._v)  # B V
        self.capacity, self.size = capacity, 0
        self.T = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self.scale = self.skew = 0.0
        self.lost = torch.zeros(0, 0, dtype=torch.float64, device="cpu")
        self.pending = torch.empty(0, n, dtype=dtype, device=device)
        self._pending_z = self.pending
        self.S = torch.zeros(0, 0, dtype=torch.float64, device="cpu")

    # --- orthogonalisation -------------------------------------------------------------------------------------------

    def random(self, count: int) -> Tensor:
        """Gaussian vectors of length about 1, in rows, drawn on the CPU so that devices agree."""
        drawn = torch.randn(count, self.n, generator=self.generator, dtype=self.dtype, device="cpu")
        return drawn.to(self.device) / self.n**0.5

    def _times_metric(self, w: Tensor) -> Tensor:
        return w if self.metric is None else self.metric.rows(w)

    def extend(self, w: Tensor, floor: float, coefficients: Tensor | None = None) -> Tensor:
        """Make w ``(b, n)`` the pending block: Q orthonormal to V and within itself, w = L Q + (part in V); returns L ``(b, q)``.

        A direction not longer than ``floor`` is replaced by a random one while the space has room. ``coefficients`` are those of w along V,
        if known.
        """
        v, z = self._v[: self.size], self._z[: self.size]
        q, bq = w, w
        for attempt in range(5):
            if self.size:
                along = coefficients.to(q) if coefficients is not None and not attempt else q @ z.T
                q = q - along @ v
            w = w if attempt else q
            q, bq, shortest = self._gram_schmidt(q, floor)
            floor = BREAKDOWN * self.eps
            if attempt and shortest > 0.5:  # nothing was cancelled: twice is enough
                break
        self.pending, self._pending_z = q, bq
        return (w @ bq.T).cpu().double()

    def _gram_schmidt(self, w: Tensor, floor: float) -> tuple[Tensor, Tensor, float]:
        """Orthonormal rows Q in place of w, with refills; B Q; and the shortest length among those of w that were kept."""
        room = self.n - self.size
        bw = self._times_metric(w)
        q = torch.empty(min(len(w), room), self.n, dtype=self.dtype, device=self.device)
        bq = q if self.metric is None else torch.empty_like(q)
        count, shortest = 0, 1.0
        for i in range(len(w)):
            if count == room:
                break  # nothing is orthogonal to all of these
            x, bx = self._against(w[i], bw[i], q[:count], bq[:count])
            length = self._length(x, bx)
            if length > floor:
                shortest = min(shortest, length)
            else:
                x, bx, length = self._fresh(q[:count], bq[:count])
            q[count] = x / length
            if self.metric is not None:
                bq[count] = bx / length
            count += 1
        return q[:count], bq[:count], shortest

    def _fresh(self, q: Tensor, bq: Tensor) -> tuple[Tensor, Tensor, float]:
        """A random vector orthogonal to V and q, B times it, and its length."""
        x, v, z = self.random(1), self._v[: self.size], self._z[: self.size]
        for _ in range(2):
            x = x - (x @ z.T) @ v
            x = x - (x @ bq.T) @ q
        bx = self._times_metric(x)
        return x[0], bx[0], self._length(x[0], bx[0])

    @staticmethod
    def _against(x: Tensor, bx: Tensor, q: Tensor, bq: Tensor) -> tuple[Tensor, Tensor]:
        """One vector without its part along q (twice), and the same for B x."""
        for _ in range(2 if len(q) else 0):
            along = bq @ x
            x, bx = x - along @ q, bx - along @ bq
        return x, bx

    def _length(self, x: Tensor, bx: Tensor) -> float:
        if self.metric is None:
            return torch.linalg.vector_norm(x).item()
        square = torch.dot(x, bx).item()
        if square < -BREAKDOWN * self.eps * (x.norm() * bx.norm()).item() or (square <= 0 and bool(x.any())):
            raise InputError(_NOT_DEFINITE.format(value=square))
        return max(square, 0.0) ** 0.5

    # --- growth ------------------------------------------------------------------------------------------------------

    def start(self, block: int) -> None:
        """Make a random block the pending one."""
        if self.metric is not None:
            self.metric.check(self.random(min(block, 2)))
        self.extend(self.random(min(block, self.n)), 0.0)
        self.S = torch.zeros(len(self.pending), 0, dtype=torch.float64, device="cpu")

    def absorb(self, images: Tensor) -> None:
        """Take the pending block into the basis, given A Q ``(n, q)``, and orthonormalise what comes next."""
        require_finite_block(images, "A product with the operator")
        w, old, added = images.T, self.size, len(self.pending)
        self._v[old : old + added] = self.pending
        if self.metric is not None:
            self._z[old : old + added] = self._pending_z
        self.size = old + added
        projected = (self._v[: self.size] @ w.T).cpu().double()
        if self.metric is not None:
            w = self.metric.solve_rows(w)
        self._judge_symmetry(projected, images.T, w)
        T = torch.zeros(self.size, self.size, dtype=torch.float64, device="cpu")
        T[:old, :old] = self.T
        T[:, old:] = projected
        T[old:, :old] = projected[:old].T
        T[old:, old:] = (projected[old:] + projected[old:].T) / 2
        self.T = T
        lower = self.extend(w, BREAKDOWN * self.eps * self.scale, projected.T)
        self.lost = torch.nn.functional.pad(self.lost, (0, added))
        self.S = torch.zeros(len(self.pending), self.size, dtype=torch.float64, device="cpu")
        self.S[:, old:] = lower.T

    def _judge_symmetry(self, projected: Tensor, images: Tensor, w: Tensor) -> None:
        """Compare the two projections of every pair of vectors, of which symmetry makes one."""
        old, added = self.size - len(self.pending), len(self.pending)
        squares = (wide(images) * wide(w)).sum(1)  # of the lengths of B⁻¹A q
        self.scale = max(self.scale, squares.clamp(min=0).max().sqrt().item())
        within = (projected[old:] - projected[old:].T).abs().max().item()
        forgotten = torch.linalg.vector_norm(self.lost, dim=0)[:, None]
        across = ((projected[:old] - self.S.T).abs() - forgotten).max().item() if old else 0.0
        self.skew = max(self.skew, within, across)
        # two random vectors show a share 1/√n of a skew part
        limit = _SKEW if old else _SKEW / self.n**0.5 + BREAKDOWN * self.eps
        if max(within, across) > limit * self.scale and added:
            raise InputError(_NOT_SYMMETRIC.format(skew=max(within, across), scale=self.scale))

    # --- answers -----------------------------------------------------------------------------------------------------

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Ritz values, ascending, and their coordinates in the basis, in columns."""
        theta, y = torch.linalg.eigh(self.T)
        if len(theta):
            self.scale = max(self.scale, theta.abs().max().item())
        return theta, y

    def estimate(self, y: Tensor) -> Tensor:
        """Residual norms of the vectors with coordinates ``y (j, m)``, as the recurrence predicts them."""
        return torch.linalg.vector_norm(self.S @ y, dim=0)

    def residual_norms(self, theta: Tensor, x: Tensor, images: Tensor) -> Tensor:
        """‖A x - θ B x‖ in the norm of B⁻¹, for vectors and products in rows, float64 on the CPU."""
        residual = images - theta.to(x)[:, None] * self._times_metric(x)
        dual = residual if self.metric is None else self.metric.solve_rows(residual)
        return (wide(residual) * wide(dual)).sum(1).clamp(min=0).sqrt().cpu().double()

    def vectors(self, y: Tensor) -> Tensor:
        """Vectors with coordinates ``y (j, m)``, in rows ``(m, n)``."""
        return y.T.to(self.device, self.dtype) @ self._v[: self.size]

    # --- restarts ----------------------------------------------------------------------------------------------------

    def restart(self, theta: Tensor, y: Tensor) -> None:
        """Keep only the Ritz vectors with coordinates y, and the pending block, with its coupling to them."""
        kept = self.vectors(y)
        if self.metric is not None:
            self._z[: len(kept)] = y.T.to(self.device, self.dtype) @ self._z[: self.size]
        self._v[: len(kept)] = kept
        self.size, self.T, self.S, self.lost = len(kept), torch.diag(theta), self.S @ y, self.lost @ y

    def refresh(self, count: int) -> None:
        """Replace the pending block by random directions; what it was coupled by is remembered in ``lost``."""
        self.lost = torch.cat([self.lost, self.S])
        if len(self.lost) > 2 * self.size:
            self.lost = torch.linalg.qr(self.lost).R
        self.extend(self.random(count), 0.0)
        self.S = torch.zeros(len(self.pending), self.size, dtype=torch.float64, device="cpu")

    def correct(self, theta: Tensor, x: Tensor, images: Tensor) -> None:
        """Start again from B-orthonormal vectors x in rows with recomputed images A x: their true residuals are the pending block."""
        z = self._times_metric(x)
        self._v[: len(x)], self.size = x, len(x)
        if self.metric is not None:
            self._z[: len(x)] = z
        self.T, self.lost = torch.diag(theta), torch.zeros(0, len(x), dtype=torch.float64, device="cpu")
        residual = images - theta.to(z)[:, None] * z
        if self.metric is not None:
            residual = self.metric.solve_rows(residual)
        lower = self.extend(residual, BREAKDOWN * self.eps * self.scale)
        self.S = lower.T.contiguous()
