"""The spectra benchmark runs, and the peers' recipes in it find what they should."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import spectra_peers

    return spectra_peers


@pytest.fixture
def matrix():
    """Eigenvalues 2^0 … 2^-29 in a random basis."""
    basis = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(0)))[0]
    values = 0.5 ** torch.arange(30.0)
    return basis @ torch.diag(values) @ basis.T, values.double().numpy()


def test_recipes_find_the_eigenvalues(peers, matrix):
    A, values = matrix
    product = peers.Counted(lambda v: A @ v, 30)
    assert np.allclose(peers.arpack(product, 5, 1e-6), values[:5], atol=1e-5)
    assert product.count > 5
    again = peers.Counted(lambda v: A @ v, 30)
    assert np.allclose(peers.power_iteration(again, values[:4], 1e-4), values[:4], atol=1.1e-4)
    assert again.count >= 4
    stopped = peers.Counted(lambda v: A @ v, 30, limit=0.0)
    assert len(peers.power_iteration(stopped, values[:4], 1e-4)) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # curvlinops on a new torch
@pytest.mark.parametrize("name", ["lanczos_once", "lanczos_plain"])
def test_lanczos_rules_have_the_first_moments(peers, matrix, name):
    A, values = matrix
    nodes, weights = getattr(peers, name)(peers.Counted(lambda v: A @ v, 30), 8, 3)
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    many = [getattr(peers, name)(peers.Counted(lambda v: A @ v, 30), 8, seed) for seed in range(200)]
    means = np.array([(w * x).sum() for x, w in many])
    assert abs(means.mean() - values.mean()) < 5 * means.std() / 200**0.5
    assert nodes.max() == pytest.approx(1, abs=1e-2)


def test_traces(peers, matrix):
    A, values = matrix
    product = peers.Counted(lambda v: A @ v, 30)
    value, done = peers.hutchinson(product, 400)
    assert done == product.count == 400
    assert value == pytest.approx(values.sum(), rel=0.2)
    assert peers.hutchinson(peers.Counted(lambda v: A @ v, 30, limit=0.0), 400)[1] == 1
    assert peers.settling_trace(peers.Counted(lambda v: A @ v, 30))[1] <= 100


def test_distance_of_densities(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from spectra import Truth

    truth = Truth(np.array([3.0, 1.0]), 4, 4.0, 1)
    assert truth.distance(np.array([3.0, 1.0, 0.0]), np.array([0.25, 0.25, 0.5])) == pytest.approx(0)
    assert truth.distance(np.array([0.0]), np.array([1.0])) == pytest.approx(1)  # everything at zero
    assert truth.distance(np.array([3.0, 0.0]), np.array([0.25, 0.75])) == pytest.approx(0.25)


def test_smoke_run_writes_everything(tmp_path):
    files = {name: tmp_path / name for name in ("figures.json", "section.md", "picture.png")}
    command = [sys.executable, str(BENCHMARKS / "spectra.py"), "--smoke", "--large"]
    command += ["--json", files["figures.json"], "--markdown", files["section.md"], "--figure", files["picture.png"]]
    paths = os.pathsep.join(filter(None, [str(BENCHMARKS.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(files["figures.json"].read_text())["networks"]["tiny"]
    rows = {(row["what"], row["contestant"]): row for row in found["rows"]}
    assert {what for what, _ in rows} == {"complete spectrum", "top 10", "trace to 1 %", "density"}
    assert all(row["gradients"] > 0 for row in rows.values())
    for (what, name), row in rows.items():
        if name.startswith("fisherlens") and "probes" not in name and "nothing exact" not in name:
            assert row["error"] < (1e-2 if "estimate" in name else 1e-4), (what, name)
    eigsh = next(row for (what, name), row in rows.items() if what == "top 10" and "eigsh" in name)
    assert eigsh["error"] < 1e-4
    assert len(found["large"]["rows"]) == 2
    text = files["section.md"].read_text()
    assert text.startswith("## Spectra")
    assert "| complete spectrum" in text
    assert files["picture.png"].stat().st_size > 1000
