"""The figures of products.py as Markdown: a summary, then a table for each network."""

from __future__ import annotations

from typing import Any

from harness import table
from names import HESSIAN, LINEARISED, OURS, STREAMED

TITLES = {
    "mlp": "MLP 784-1000-500-10",
    "lenet": "LeNet, 28×28",
    "conv6": "conv-6, 32×32",
    "resnet18": "ResNet-18, 32×32",
    "transformer": "Transformer encoder, 2 blocks, 32 tokens",
}
_VARIANTS = (OURS, LINEARISED, STREAMED, HESSIAN)


def number(value: float | None) -> str:
    """Three figures, or "-"."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def megabytes(value: float | None) -> str:
    """MiB, or "-"."""
    return "-" if value is None else f"{value / 2**20:,.0f}"


def per_vector(contestant: dict[str, Any], k: int) -> float | None:
    """Gradient evaluations per vector in a block of K, or None."""
    found = contestant.get("columns", {}).get(str(k))
    return found["per_vector"] if found else None


def peak(contestant: dict[str, Any], k: int) -> int | None:
    """Peak bytes with K vectors, or None."""
    return contestant.get("peaks", {}).get(str(k), {}).get("peak")


def best_peer(found: dict[str, Any], k: int) -> tuple[float, str] | None:
    """The fastest other way to the Fisher, per vector; with blocks, also by single products."""
    ways = [
        (value, name)
        for name, contestant in found["contestants"].items()
        if name not in _VARIANTS and contestant.get("matrix") == "Fisher"
        for j in {1, k}
        if (value := per_vector(contestant, j)) is not None
    ]
    return min(ways, default=None)


def _against(found: dict[str, Any], k: int) -> str:
    best = best_peer(found, k)
    return f"{number(best[0])} ({best[1]})" if best else "-"


def short(name: str, found: dict[str, Any]) -> str:
    """One network in a line, while the others are still running."""
    ours = found["contestants"][OURS]
    streamed = found["contestants"].get(STREAMED, {})
    return (
        f"{name}: gradient {found['gradient_seconds'] * 1e3:.1f} ms; single {number(per_vector(ours, 1))}, per vector of 16 "
        f"{number(per_vector(ours, 16))}, streamed {number(per_vector(streamed, 1))}"
    )


def _goal(value: float | None) -> str:
    return f"≤ {value:g}" if value is not None else "-"


def summary(payload: dict[str, Any]) -> str:
    """Ours, the goal and the fastest peer, one line per network."""
    rows = []
    for name, found in payload["networks"].items():
        ours, streamed = found["contestants"][OURS], found["contestants"].get(STREAMED, {})
        goals = found["goals"] or {}
        rows.append(
            [
                TITLES.get(name, name),
                f"{found['gradient_seconds'] * 1e3:.0f} ms",
                *(number(per_vector(ours, 1)), _goal(goals.get("single")), _against(found, 1)),
                *(number(per_vector(ours, 16)), _goal(goals.get("block")), _against(found, 16)),
                *(number(per_vector(streamed, 1)), _goal(goals.get("streamed"))),
            ]
        )
    head = ["network", "gradient", "single", "goal", "fastest peer"]
    head += ["per vector of 16", "goal", "fastest peer", "streamed", "goal"]
    return table(head, rows)


def details(name: str, found: dict[str, Any], blocks: list[int]) -> str:
    """All contestants of one network."""
    head = ["contestant", "matrix", "single", *[f"× {k}" for k in blocks], "error", "peak, single", "peak, × 16"]
    rows, notes = [], []
    for label, contestant in found["contestants"].items():
        shown = contestant.get("name", label)
        cells = [number(per_vector(contestant, k)) for k in (1, *blocks)]
        error = contestant.get("error")
        memory = [megabytes(peak(contestant, k)) for k in (1, 16)]
        rows.append([shown, contestant.get("matrix", "-"), *cells, "-" if error is None else f"{error:.0e}", *memory])
        if "note" in contestant:
            notes.append(f"{shown}: {contestant['note']}.")
        skipped = contestant.get("skipped", {})
        for why in dict.fromkeys(skipped.values()):
            which = ", ".join(f"× {k}" for k in sorted((k for k in skipped if skipped[k] == why), key=int))
            notes.append(f"{shown}, {which}: more {why} than allowed.")
        for k, one in contestant.get("peaks", {}).items():
            if "note" in one:
                notes.append(f"{shown}, peak with {k}: {one['note']}.")
    lines = [
        f"### {TITLES.get(name, name)}",
        f"N = {found['n']}, P = {found['params']:,}; one gradient evaluation took {found['gradient_seconds'] * 1e3:.1f} ms. "
        f"Streamed: {found['streamed']} batches.",
        table(head, rows),
        *_captures(found),
    ]
    if notes:
        lines.append("Left out: " + " ".join(dict.fromkeys(notes)))
    return "\n\n".join(lines)


def _captures(found: dict[str, Any]) -> list[str]:
    """What ours hold, and the predicted beside the measured peak."""
    rows = []
    for label in _VARIANTS:
        contestant = found["contestants"].get(label, {})
        if "capture" not in contestant:
            continue
        peak = contestant["peaks"].get("1", {}).get("peak")
        predicted = contestant["predicted_peak"]
        memory = contestant["memory"]
        rows.append(
            [
                label,
                memory if isinstance(memory, str) else f"{memory / 2**20:.1f} MiB",
                ", ".join(f"{count} {path}" for path, count in contestant["paths"].items()),
                number(contestant["capture"]),
                *(megabytes(contestant["held"]), megabytes(predicted), megabytes(peak)),
                number(peak / predicted) if peak is not None and predicted else "-",
            ]
        )
    head = ["ours", "memory=", "layers", "capture", "held", "predicted peak", "measured peak", "measured / predicted"]
    return [table(head, rows)] if rows else []


def markdown(payload: dict[str, Any]) -> str:
    """The section of docs/benchmarks.md."""
    settings = payload["settings"]
    blocks = [k for k in settings["blocks"] if k > 1]
    short = settings.get("short", 0.0)
    repeated = f"; calls under {1000 * short:g} ms are repeated for so long, and their mean counts" if short else ""
    parts = [
        f"## Products with the exact Fisher, on {'a GPU' if settings['device'].startswith('cuda') else 'a CPU'}",
        f"Measured on: {payload['machine']}. At most {settings['rounds']} rounds and about {settings['budget']:g} s of timing per network, "
        f"at least 3 rounds of everything, but one of what goes far beyond that{repeated}." + payload.get("note", ""),
        "All times are in gradient evaluations on the same data; those of blocks are per vector. The capture of our scores is paid once and not "
        "in them. Peers keep nothing (PyHessian: the graph of the gradient), so a single product of theirs is also what they need for data that "
        "fit no budget, and stands beside our streamed one. That one is measured on 2 to 8 batches of N examples, under a budget that keeps none of their "
        "scores, and in gradient evaluations on as many batches. Goals are those set for the package before it was written.",
        summary(payload),
        "Error: largest relative difference from the plain `torch.func` recipe in float64; the measured products are in float32. Units that sit "
        "closer to a kink (of a ReLU or a maximum) than float32 resolves fall on another side of it in float64, for all contestants alike. "
        "Peaks are in MiB beyond network, data and one gradient, in a fresh process on one thread; ours include the capture. × 16 is a block of 16 vectors.",
        *[details(name, found, blocks) for name, found in payload["networks"].items()],
    ]
    return "\n\n".join(parts)
