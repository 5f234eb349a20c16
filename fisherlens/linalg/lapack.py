"""A few routines of LAPACK for many small matrices on the CPU: in place, without copies, and without Python's lock, so that threads share them.

scipy keeps the addresses of its routines for compiled callers (``scipy.linalg.cython_lapack``); its own wrappers hold the lock. Each call
runs on the thread that makes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fisherlens.linalg.threads import alone

_LETTER = {torch.float32: "s", torch.float64: "d"}
_INT, _CHAR, _DATA = ctypes.POINTER(ctypes.c_int), ctypes.c_char_p, ctypes.c_void_p


def knows(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these routines take contiguous tensors of a kind: on the CPU, of single or double precision."""
    return device.type == "cpu" and dtype in _LETTER


@cache
def _routine(name: str, dtype: torch.dtype, *arguments: type) -> Callable[..., None]:
    from scipy.linalg import cython_lapack  # here, because it would double the time of ``import fisherlens``

    capsule = cython_lapack.__pyx_capi__[_LETTER[dtype] + name]
    what, where = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    what.restype, what.argtypes = ctypes.c_char_p, [ctypes.py_object]
    where.restype, where.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *arguments)(where(capsule, what(capsule)))


def _addresses(x: Tensor) -> range:
    """Where the matrices of a contiguous batch lie."""
    step = x[0].numel() * x.itemsize if len(x) else 1
    return range(x.data_ptr(), x.data_ptr() + len(x) * step, step)


def _finite(diagonal: Tensor) -> bool:
    """Whether no factor holds NaN, which is no reason to stop for every LAPACK: one in row i shows on the diagonal there."""
    return bool(torch.isfinite(diagonal).all())


def factor(matrices: Tensor) -> bool:
    """Cholesky factors of ``(B, n, n)``, column by column in the place of the lower triangles; whether all are positive definite."""
    potrf = _routine("potrf", matrices.dtype, _CHAR, _INT, _DATA, _INT, _INT)
    n, info, good = ctypes.c_int(matrices.shape[-1]), ctypes.c_int(), True
    with alone:
        for at in _addresses(matrices):
            potrf(b"L", n, at, n, info)
            good = good and info.value == 0
    return good and _finite(matrices.diagonal(dim1=-2, dim2=-1))


class Packed:
    """Symmetric matrices of order n with nothing kept of their upper triangles, in the order that LAPACK calls rectangular full packed.

    Its routines are matrix products, as those for full matrices are (Gustavson et al. 2010, ACM TOMS 37, 18).

    Attributes
    ----------
    places
        Entries of the lower triangle, as i n + j, in their order, ``(n (n + 1) / 2,)``.
    diagonal
        Where in that order the diagonal lies, ``(n,)``.
    """

    def __init__(self, n: int):
        self.n = n
        # each column holds one of the left half of the triangle, and above it a row of the right half
        half, odd = (n + 1) // 2, n % 2
        column, row = torch.arange(half, device="cpu")[:, None], torch.arange(n + 1 - odd, device="cpu")[None, :]
        i = row - 1 + odd
        left, right = i * n + column, (half + column - odd) * n + half + row
        self.places = torch.where(i >= column, left, right).flatten()
        where = self.places.new_empty(n * n)
        where[self.places] = torch.arange(len(self.places), device="cpu")
        self.diagonal = where[:: n + 1]

    def factor(self, matrices: Tensor) -> bool:
        """Cholesky factors in the place of ``(B, n (n + 1) / 2)``, packed alike; whether all are positive definite."""
        pftrf = _routine("pftrf", matrices.dtype, _CHAR, _CHAR, _INT, _DATA, _INT)
        n, info, good = ctypes.c_int(self.n), ctypes.c_int(), True
        with alone:
            for at in _addresses(matrices):
                pftrf(b"N", b"L", n, at, info)
                good = good and info.value == 0
        return good and _finite(matrices[:, self.diagonal])

    def solve(self, factors: Tensor, v: Tensor) -> None:
        """Write the inverses times vectors ``(B, K, n)`` in the place of these."""
        pftrs = _routine("pftrs", v.dtype, _CHAR, _CHAR, _INT, _INT, _DATA, _DATA, _INT, _INT)
        n, columns, info = ctypes.c_int(self.n), ctypes.c_int(v.shape[1]), ctypes.c_int()
        with alone:
            for at, room in zip(_addresses(factors), _addresses(v), strict=True):
                pftrs(b"N", b"L", n, columns, at, room, n, info)
