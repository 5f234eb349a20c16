"""Many small matrices: LAPACK in place and packed, and pieces of work side by side."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from fisherlens.approximations.blocks import MomentBlocks
from fisherlens.linalg import lapack
from fisherlens.linalg.dense import cholesky_in_place

LAMBDA = 0.1


def spd(count: int, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    x = torch.randn(count, n, n + 4, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return (x @ x.mT / n + LAMBDA * torch.eye(n)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 32, 33])
def test_packed_factors_solves_and_determinants(n, dtype):
    order, full = lapack.Packed(n), spd(4, n, dtype)
    assert sorted(order.places.tolist()) == sorted(i * n + j for i in range(n) for j in range(i + 1))
    assert order.places[order.diagonal].tolist() == [i * (n + 1) for i in range(n)]
    packed = full.flatten(1)[:, order.places].contiguous()
    assert order.factor(packed)
    rel = 1e-10 if dtype == torch.float64 else 1e-4
    logs = 2 * packed[:, order.diagonal].double().log().sum(1)
    assert torch.allclose(logs, torch.logdet(full.double()), rtol=rel, atol=rel)
    v = torch.ones(4, 3, n, dtype=dtype)
    order.solve(packed, v)
    assert torch.allclose(v.mT, torch.linalg.solve(full, torch.ones(4, n, 3, dtype=dtype)), rtol=rel, atol=rel)


@pytest.mark.parametrize("n", [1, 6, 40])
def test_factors_in_place(n):
    full = spd(3, n)
    factor, definite = cholesky_in_place(full.clone())
    assert definite
    assert torch.allclose(factor.tril(), torch.linalg.cholesky(full), rtol=1e-12)
    order = lapack.Packed(n)
    full[1] *= -1
    assert not cholesky_in_place(full.clone())[1]
    assert not order.factor(full.flatten(1)[:, order.places].contiguous())
    full[1, 0, 0] = float("nan")
    assert not cholesky_in_place(full.clone())[1]


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_large_blocks_are_solved_by_factors_where_that_is_accurate(scale):
    """Uneven blocks in float32 go back to inverses, which are taken in float64."""
    n = 256
    matrices = (scale * (spd(2, n) - LAMBDA * torch.eye(n))).float()
    blocks = MomentBlocks(torch.arange(2 * n).view(2, n), matrices)
    blocks.prefer_inverses()
    assert (blocks.own_factor(LAMBDA)[0] is None) == (scale > 1)
    v, out = torch.ones(2 * n, 2), torch.empty(2 * n, 2)
    blocks.solve(v, LAMBDA, out)
    damped = matrices.double() + LAMBDA * torch.eye(n)
    wanted = torch.linalg.solve(damped, torch.ones(2, n, 2, dtype=torch.float64)).flatten(0, 1)
    assert ((out.double() - wanted).norm() / wanted.norm()).item() < 1e-3
    logs = (torch.logdet(damped) - n * torch.tensor(LAMBDA).double().log()).sum().item()
    assert blocks.log_determinant(LAMBDA) == pytest.approx(logs, rel=1e-5)


_BESIDE = """
import threading, torch
from fisherlens.linalg.threads import side_by_side
cpu = torch.device("cpu")
torch.set_num_threads(3)
barrier = threading.Barrier(3, timeout=20)
def work(k):
    barrier.wait()  # passes only if three are at work
    assert torch.get_num_threads() == 1 and not torch.is_grad_enabled()
    return k * k, threading.get_ident()
with torch.no_grad():
    found = side_by_side(work, range(6), cpu)
assert [square for square, _ in found] == [0, 1, 4, 9, 16, 25]
assert len({ident for _, ident in found}) == 3
assert torch.get_num_threads() == 3 and torch.is_grad_enabled()
try:
    side_by_side(lambda k: 1 // k, range(4), cpu)
except ZeroDivisionError:
    print("raised")
assert torch.get_num_threads() == 3
new = []
from threadpoolctl import threadpool_info
blas = lambda: [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
before = blas()
assert side_by_side(lambda k: max(blas()), range(3), cpu) == [1, 1, 1] and blas() == before
thread = threading.Thread(target=lambda: new.append(torch.get_num_threads())); thread.start(); thread.join()
assert new == [3], new
torch.set_num_threads(1)
assert side_by_side(lambda k: threading.get_ident(), range(3), cpu) == [threading.get_ident()] * 3
"""


def test_pieces_side_by_side_leave_threads_as_they_were():
    found = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _BESIDE],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "3"},
        timeout=100,
    )
    assert (found.returncode, found.stdout.strip()) == (0, "raised"), found.stderr
