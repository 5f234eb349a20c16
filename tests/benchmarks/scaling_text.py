"""The figures of scaling.py as Markdown."""

from __future__ import annotations

from typing import Any

from harness import table
from products_text import number

EXPECTED = {"N": "1", "P": "1", "C": "≤ 1", "K": "< 1"}
MEANING = {"N": "examples", "P": "parameters, by the width", "C": "classes", "K": "vectors in a block"}


def markdown(payload: dict[str, Any]) -> str:
    """The section of docs/benchmarks.md."""
    rows = []
    for family, variables in payload["networks"].items():
        for variable, quantities in variables.items():
            for quantity, one in quantities.items():
                rows.append(
                    [
                        *(family, f"{variable}: {MEANING[variable]}", quantity),
                        f"{one['sizes'][0]:,} to {one['sizes'][-1]:,}",
                        f"{number(one['seconds'][0] * 1e3)} to {number(one['seconds'][-1] * 1e3)} ms",
                        f"{one['slope']:.2f} ± {one['slope_error']:.2f}",
                        EXPECTED[variable],
                    ]
                )
    head = ["network", "varied", "quantity", "from, to", "time", "slope ± s.e.", "expected"]
    parts = [
        "## Growth of the cost",
        f"Measured on: {payload['machine']}. Medians of at least 3 rounds over all sizes.",
        "One size is varied at a time on a dense network (256-w-w-C; w = 256, N = 512, C = 10 where they are not varied) and a convolutional "
        "one (three 3×3 convolutions of width w, w and 2w on 16×16 images; w = 16, N = 128, C = 10). *Single* is one product after the "
        "capture, *streamed* one under a budget that keeps no scores, the same for all N, *block* a product with K vectors at once. The slope is "
        "that of log time against log size on the upper half of the range (least squares, with its standard error): 1 is linear growth.",
        table(head, rows),
    ]
    return "\n\n".join(parts)
