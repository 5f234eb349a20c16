"""Execute every notebook of this folder, and check how it is stored.

    python notebooks/run.py [--smoke]

A notebook is stored without outputs and in step with its py:percent pair, and runs from top to bottom without an error; where
one of these fails, the exit code is 1. With ``--smoke`` the notebooks see ``FISHERLENS_SMOKE=1`` and may take less data. Nothing
is written; the executed copies are dropped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
SECONDS_PER_CELL = 120


def stored_wrongly(path: Path, notebook: NotebookNode) -> list[str]:
    """Say what is wrong with the file itself: outputs that were kept, a pair that is missing or differs."""
    faults = []
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(cell.outputs or cell.execution_count is not None for cell in code_cells):
        faults.append(f"holds outputs; write it again from its pair: jupytext --to notebook {path.stem}.py")
    pair = path.with_suffix(".py")
    if not pair.exists():
        faults.append(f"has no pair {pair.name}; make it: jupytext --set-formats ipynb,py:percent {path.name}")
        return faults
    written = [(cell.cell_type, cell.source) for cell in notebook.cells]
    paired = [(cell.cell_type, cell.source) for cell in jupytext.read(pair).cells]
    if written != paired:
        differing = next((i for i, (a, b) in enumerate(zip(written, paired, strict=False)) if a != b), len(written))
        faults.append(
            f"differs from {pair.name} from cell {differing + 1} on; bring them in step: jupytext --sync {path.name}"
        )
    return faults


def execute(notebook: NotebookNode) -> str | None:
    """Run all cells in a fresh kernel; return the failing cell's report, or None."""
    try:
        NotebookClient(
            notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
        ).execute()
    except CellExecutionError as error:
        return str(error)
    return None


def main() -> int:
    """Check and run all notebooks; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="let the notebooks take less data")
    if parser.parse_args().smoke:
        os.environ["FISHERLENS_SMOKE"] = "1"
    paths = sorted(FOLDER.glob("*.ipynb"))
    alone = sorted(path for path in FOLDER.glob("[0-9]*.py") if not path.with_suffix(".ipynb").exists())
    failed = bool(alone)
    for path in alone:
        print(f"FAILED {path.name} has no notebook; make it: jupytext --to notebook {path.name}")
    if not paths:
        print(f"FAILED no notebook in {FOLDER}")
        return 1
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        faults = stored_wrongly(path, notebook)
        started = time.perf_counter()
        error = execute(notebook)
        faults += [error] if error else []
        print(
            f"{'FAILED' if faults else 'ok'} {path.name} in {time.perf_counter() - started:.1f} s", *faults, sep="\n  "
        )
        failed = failed or bool(faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
