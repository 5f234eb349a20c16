"""The benchmark of blocks runs, on something tiny, and what it measures is right. No times are asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"


def test_smoke_run_writes_everything(tmp_path):
    figures, section = tmp_path / "figures.json", tmp_path / "section.md"
    command = [sys.executable, str(BENCHMARKS / "blocks.py"), "--smoke", "--json", figures, "--markdown", section]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(  # noqa: S603
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(figures.read_text())["networks"]["tiny"]
    assert found["couplings"]["error"] < 1e-5
    assert found["couplings"]["layers"] == 3
    assert found["table"]["condition_error"] < 1e-2
    assert found["table"]["left_out"] == 0
    assert list(found["table"]["parts"]) == ["layer", "unit", "cw-ngd", "mbf", "diagonal"]
    assert all(part["gradients"] > 0 for part in found["table"]["parts"].values())
    for what in ("capture", "couplings", "table"):
        assert found[what]["gradients"] > 0
        assert found[what]["low"] <= found[what]["gradients"] <= found[what]["high"]
    text = section.read_text()
    assert text.startswith("## Blocks and their independence")
    assert "complete table of independence, Grams included" in text
    assert "'mbf' alone, Grams given" in text
