"""Write docs/benchmarks.md and its figures from what the scripts beside this one have measured.

python tests/benchmarks/products.py --json products.json
python tests/benchmarks/scaling.py --json scaling.json
python tests/benchmarks/spectra.py --large --json spectra.json
python tests/benchmarks/blocks.py --markdown blocks.md
python tests/benchmarks/optimizer_steps.py --json steps.json
python tests/benchmarks/convergence.py --json convergence.json
python tests/benchmarks/write_docs.py --products products.json --scaling scaling.json --spectra spectra.json --also blocks.md --steps steps.json --convergence convergence.json

Several files of one kind (a CPU and a GPU, say) become a section each. ``--also`` takes sections that other scripts wrote.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convergence_text
import optimizer_steps_text
import products_text
import scaling_text
import spectra_text
from figures import draw_products, draw_scaling

DOCS = Path(__file__).resolve().parents[2] / "docs"
HEAD = """# Benchmarks

What a product with the exact Fisher costs, beside the libraries that offer one and the recipe that plain `torch.func` gives, how the cost
grows, what eigenvalues, traces, densities, and judgements of blocks cost, what a step of each optimizer costs, and how many it takes. Every number and picture on this page was written by the scripts in `tests/benchmarks`, from one run on the machine that each section
names; nothing is edited by hand. To take them again, on a machine that does nothing else:

```console
$ python tests/benchmarks/products.py --json products.json
$ python tests/benchmarks/scaling.py --json scaling.json
$ python tests/benchmarks/spectra.py --large --json spectra.json
$ python tests/benchmarks/blocks.py --markdown blocks.md
$ python tests/benchmarks/optimizer_steps.py --json steps.json
$ python tests/benchmarks/convergence.py --json convergence.json
$ python tests/benchmarks/write_docs.py --products products.json --scaling scaling.json --spectra spectra.json --also blocks.md --steps steps.json --convergence convergence.json
```

Networks and data are random but of real shapes, with 10 classes; the code is in `tests/benchmarks/networks.py`, that of the contestants in
`tests/benchmarks/contestants.py`. Every option is in `--help`; `--device cuda` runs the same on a GPU, with compiled peers."""
_CAPTIONS = {
    "products": "Time of a product per vector, and peak memory, on log axes; lines are quartiles over the rounds, left is better.",
    "scaling": "Median time of a call against one size at a time, on log axes.",
    "spectra": "Error against time, on log axes: left and low is better.",
    "steps": "Amortised time of a step over that of SGD with momentum, on a log axis: quartiles over the rounds, hollow for other libraries.",
    "convergence": "Medians over seeds at the learning rate of the search, and steps to the target, a dot per seed; crosses did not reach it.",
}


def section(kind: str, text: str, figure: str) -> str:
    """A section with its picture under the heading and the lines on where it was measured."""
    heading, measured, rest = text.split("\n\n", 2)
    picture = f"![{_CAPTIONS[kind]}](_static/{figure})\n\n*{_CAPTIONS[kind]}*"
    return "\n\n".join([heading, measured, picture, rest])


def main() -> None:
    """Draw the figures, then write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--products", nargs="+", required=True, help="JSON files of products.py")
    parser.add_argument("--scaling", nargs="+", required=True, help="JSON files of scaling.py")
    parser.add_argument("--spectra", nargs="*", default=[], help="JSON files of spectra.py")
    parser.add_argument("--also", nargs="*", default=[], help="Markdown files, after these")
    parser.add_argument("--steps", nargs="*", default=[], help="JSON files of optimizer_steps.py")
    parser.add_argument("--convergence", nargs="*", default=[], help="JSON files of convergence.py")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the pages")
    options = parser.parse_args()
    (options.docs / "_static").mkdir(parents=True, exist_ok=True)
    parts = [HEAD]
    kinds: list[tuple[str, list[str], Callable[..., str], Callable[..., None]]] = [
        ("products", options.products, products_text.markdown, draw_products),
        ("scaling", options.scaling, scaling_text.markdown, draw_scaling),
        ("spectra", options.spectra, spectra_text.markdown, spectra_text.draw),
        ("steps", options.steps, optimizer_steps_text.markdown, optimizer_steps_text.draw),
        ("convergence", options.convergence, convergence_text.markdown, convergence_text.draw),
    ]
    for kind, files, text_of, draw in kinds:
        if kind == "steps":
            parts += [Path(file).read_text(encoding="utf-8").strip() for file in options.also]
        for i, file in enumerate(files):
            payload: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
            figure = f"benchmarks_{kind}{f'_{i + 1}' if i else ''}.png"
            draw(payload, options.docs / "_static" / figure)
            parts.append(section(kind, text_of(payload), figure))
    (options.docs / "benchmarks.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
