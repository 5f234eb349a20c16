"""The benchmark scripts run, on something tiny: what they write is there, and every product is right. No times are asserted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "benchmarks"
PEERS = {"curvlinops GGN": "curvlinops", "nngeometry implicit": "nngeometry"}


def run(script: str, *options: str | Path) -> str:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(  # noqa: S603
        [sys.executable, SCRIPTS / script, *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Both scripts once, and the page made of what they wrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    products, scaling = folder / "products.json", folder / "scaling.json"
    run("products.py", "--smoke", "--json", products, "--markdown", folder / "products.md")
    run("scaling.py", "--smoke", "--json", scaling)
    run("write_docs.py", "--products", products, "--scaling", scaling, "--docs", folder)
    return folder


def test_products_of_every_contestant_are_right(files):
    found = json.loads((files / "products.json").read_text())["networks"]["tiny"]
    contestants = found["contestants"]
    assert found["n"] == 16
    assert found["gradient_seconds"] > 0
    assert {"fisherlens", "fisherlens, streamed", "fisherlens, Hessian", "torch.func recipe", "PyHessian"} <= set(
        contestants
    )
    measured = {name: one for name, one in contestants.items() if "note" not in one}
    assert {"fisherlens", "fisherlens, streamed", "fisherlens, Hessian", "torch.func recipe", "PyHessian"} <= set(
        measured
    )
    if importlib.util.find_spec("curvlinops"):
        assert "curvlinops GGN" in measured
    for name, one in measured.items():
        assert one["error"] < 1e-4, name
        assert one["columns"]["1"]["ratio"] > 0
        assert one["columns"]["1"]["rounds"] >= 3
    assert contestants["fisherlens"]["columns"]["4"]["per_vector"] > 0
    assert "4" not in measured["PyHessian"]["columns"], "it has no product with blocks"
    for name, module in PEERS.items():
        if not importlib.util.find_spec(module):
            assert contestants[name] == {"note": "not installed"}


def test_the_streamed_contestant_streams_and_ours_does_not(files):
    contestants = json.loads((files / "products.json").read_text())["networks"]["tiny"]["contestants"]
    assert set(contestants["fisherlens, streamed"]["paths"]) == {"streamed"}
    assert contestants["fisherlens, streamed"]["held"] == 0
    assert not {"streamed", "linearised"} & set(contestants["fisherlens"]["paths"])


def test_peak_memory_is_that_of_a_fresh_process(files):
    peaks = json.loads((files / "products.json").read_text())["networks"]["tiny"]["contestants"]["fisherlens"]["peaks"]
    assert set(peaks["1"]) == {"built", "peak", "predicted"}, peaks
    assert peaks["1"]["peak"] >= peaks["1"]["built"] >= 0


def test_scaling_fits_a_slope_to_every_quantity(files):
    found = json.loads((files / "scaling.json").read_text())["networks"]["mlp"]
    assert {variable: set(one) for variable, one in found.items()} == {
        "N": {"single", "capture", "streamed"},
        "P": {"single", "capture"},
        "C": {"single", "capture"},
        "K": {"block"},
    }
    for quantities in found.values():
        for one in quantities.values():
            assert len(one["sizes"]) == len(one["seconds"]) >= 4
            assert all(seconds > 0 for seconds in one["seconds"])
            assert one["slope_error"] >= 0
            assert one["points"] >= 3
    assert {path for paths in found["N"]["streamed"]["paths"] for path in paths.split()[1::2]} == {"streamed"}


def test_the_page_has_the_tables_and_its_pictures(files):
    page = (files / "benchmarks.md").read_text()
    section = (files / "products.md").read_text().strip()
    for paragraph in section.split("\n\n"):
        assert paragraph in page
    assert "slope ± s.e." in page
    for name in ("products", "scaling"):
        assert f"(_static/benchmarks_{name}.png)" in page
        assert (files / "_static" / f"benchmarks_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_fit_finds_the_exponent_of_the_upper_half(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    spec = importlib.util.spec_from_file_location("benchmark_fit", SCRIPTS / "fit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sizes = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    slope, error, points = module.fit(sizes, [max(8.0, s) ** 1.5 for s in sizes])
    assert points == 4
    assert slope == pytest.approx(1.5)
    assert error == pytest.approx(0.0, abs=1e-12)
    noisy = [s * (1.1 if i % 2 else 1.0) for i, s in enumerate(sizes)]
    assert module.fit(sizes, noisy)[1] > 0.01
