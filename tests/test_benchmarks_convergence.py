"""The convergence benchmark runs, gives every optimizer the same budget, and judges the papers as it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture
def modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import convergence
    import convergence_tasks
    import convergence_text

    return convergence, convergence_tasks, convergence_text


def test_budgets_are_equal_and_every_system_takes_part(modules):
    _, tasks, _ = modules
    systems = {"CWNGD", "MBF", "TENGraD", "FNGD", "ProjectedKFAC"}
    assert systems <= {one.name for task in tasks.TASKS.values() for one in task.entrants.values()}
    for name, task in tasks.TASKS.items():
        assert set(task.sizes) == set(task.targets)
        assert set(task.sizes) == ({"smoke"} if name == "smoke" else {"quick", "cpu", "full"})
        for size in task.sizes.values():
            budgets = {len(set(one.rates(size.rates))) for one in task.entrants.values()}
            assert budgets == {size.rates}
        for one in task.entrants.values():  # the published or chosen rate is among those that are tried
            assert one.lr in one.rates(5)
            assert one.lr in one.rates(3)
        for claim in task.claims:
            assert {claim.better, claim.worse} <= set(task.entrants)
    epochs = tasks.TASKS["epochs"].sizes["full"]
    assert epochs.num_steps == 10 * -(-60_000 // epochs.batch)


def test_claims_are_judged_by_pairs_of_seeds(modules):
    convergence, tasks, _ = modules
    runs, ends = ("optimizer", "seed"), ("optimizer", "seed", "step")
    loss = np.array([[[9, 1.0], [9, 2.0]], [[9, 3.0], [9, 2.5]], [[9, 0.5], [9, 9.0]], [[9, np.nan], [9, np.nan]]])
    found = xr.Dataset(
        {
            "train_loss": (ends, loss),
            "test_accuracy": (ends, 1 - loss / 10),
            "steps_to_own_accuracy": (runs, loss[..., 1] * 10),
            "seconds_to_own_accuracy": (runs, loss[..., 1]),
        },
        {"optimizer": ["a", "b", "c", "lost"], "seed": [0, 1]},
    )

    def verdict(measure, better, worse):
        return convergence.judged(tasks.Claim(measure, better, worse, "", ""), found)

    for measure in ("own", "seconds_own", "train_loss", "test_error"):
        assert verdict(measure, "a", "b")["verdict"] == "agrees"
        assert verdict(measure, "b", "a")["verdict"] == "disagrees"
        assert verdict(measure, "a", "c")["verdict"] == "not decided"
        assert verdict(measure, "a", "lost")["verdict"] == "agrees"
        assert verdict(measure, "a", "lost")["ours"][1] is None
        assert verdict(measure, "a", "a")["verdict"] == "not decided"  # neither is below


def test_numbers_in_tables(modules):
    _, _, text = modules
    assert text.range_of([10.0, 12.0, 11.0]) == "11 (10 to 12)"
    assert text.range_of([10.0, 10.0, 10.0]) == "10"
    assert text.range_of([10.0, None, 11.0]) == "11 (10 to never)"
    assert text.range_of([10.0, None, None]) == "never (10 to never)"
    assert text.range_of([None, None, None]) == "never"
    assert text.middle([1.0, None, None]) is None


def run(tmp_path, *arguments):
    paths = os.pathsep.join(filter(None, [str(BENCHMARKS.parents[1]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment.pop("FISHERLENS_DATA", None)
    command = [sys.executable, str(BENCHMARKS / "convergence.py"), *map(str, arguments)]
    return subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, timeout=600, env=environment, cwd=tmp_path
    )


def test_smoke_run_writes_everything_and_goes_on(tmp_path):
    files = {name: tmp_path / name for name in ("figures.json", "section.md", "picture.png")}
    arguments = ["--smoke", "--workers", "0", "--seeds", "2", "--resume", "runs"]
    arguments += ["--json", files["figures.json"], "--markdown", files["section.md"], "--figure", files["picture.png"]]
    done = run(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads(files["figures.json"].read_text())["tasks"]["smoke"]
    assert set(found["optimizers"]) == {"SGD", "Adam", "CW-NGD"}
    for one in found["optimizers"].values():
        assert len(one["search"]["rates"]) == 2
        assert len(one["steps_to_own_accuracy"]) == 2
        assert one["targets"]["train_loss"]["steps"] == [None, None]
        assert one["seconds_per_step"] > 0
    assert [claim["verdict"] in ("agrees", "disagrees", "not decided") for claim in found["claims"]] == [True, True]
    text = files["section.md"].read_text()
    assert text.startswith("## Optimizers to fixed targets")
    assert "(_static/picture.png)" in text
    assert "| CW-NGD" in text
    assert "never" in text
    assert files["picture.png"].stat().st_size > 1000
    assert len(list((tmp_path / "runs" / "digits-mlp-smoke").glob("*.run"))) == 12
    again = run(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    second = json.loads(files["figures.json"].read_text())["tasks"]["smoke"]
    second["wall_seconds"] = found["wall_seconds"]
    assert second == found  # read from the folder, seconds and all


def test_missing_data_are_named(tmp_path):
    done = run(tmp_path, "--quick", "--tasks", "fashion")
    assert done.returncode == 1
    assert "fashion is left out: " in done.stderr
    assert "No task could be done." in done.stderr
