"""Exact Fisher-vector products beside curvlinops' GGN, as ratios to one gradient evaluation.

Run with ``python tests/benchmarks/products.py``; ``--help`` lists the options. The unit is one gradient evaluation
(forward and backward of the mean loss) on the same data in the same round. Figures: capture (once), a single product,
and a product per vector in a block of 16. Without curvlinops its columns stay empty.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from harness import interleaved, machine, table, write_json
from networks import REFERENCES
from torch import nn

import fisherlens as fl

# What design.md asks of us, in gradient evaluations: single product, per vector in a block of 16.
GOALS = {"mlp": (1.05, 0.95), "lenet": (0.6, 0.16), "conv6": (1.0, 0.17)}


def peer(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """curvlinops' GGN of the mean cross-entropy, or None where it is not installed."""
    try:
        from curvlinops import GGNLinearOperator
    except ImportError:
        return None
    parameters = list(model.parameters())
    return GGNLinearOperator(model, nn.CrossEntropyLoss(), parameters, [data], check_deterministic=False)


def measure(name: str, device: torch.device, rounds: int, block: int) -> dict[str, Any]:
    """All figures of one network."""
    model, (x, y) = REFERENCES[name].make()
    model, x, y = model.to(device), x.to(device), y.to(device)
    parameters = list(model.parameters())
    fl.Fisher(model, (x, y), likelihood="categorical")  # warm-up
    start = time.perf_counter()
    F = fl.Fisher(model, (x, y), likelihood="categorical")
    capture = time.perf_counter() - start
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(F.n_params, generator=generator).to(device)
    many = torch.randn(F.n_params, block, generator=generator).to(device)
    contestants: dict[str, Any] = {
        "gradient": lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters),
        "single": lambda: F @ v,
        "block": lambda: F @ many,
    }
    G = peer(model, (x, y))
    error = float("nan")
    if G is not None:
        contestants |= {"curvlinops single": lambda: G @ v, "curvlinops block": lambda: G @ many}
        theirs = G @ v
        error = ((F @ v - theirs).norm() / theirs.norm()).item()
    found = interleaved(contestants, unit="gradient", rounds=rounds, device=device)
    return {
        "figures": found,
        "capture": capture / found["gradient"]["seconds"],
        "error": error,
        "block": block,
        "plan": repr(F.plan),
    }


def main() -> None:
    """Print the table, and the plans with ``--plans``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(REFERENCES), choices=list(REFERENCES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plans", action="store_true", help="also print how each layer is kept")
    parser.add_argument("--json", help="write all figures to this file")
    options = parser.parse_args()
    device = torch.device(options.device)
    print(machine(device))
    results, rows = {}, []
    for name in options.networks:
        found = measure(name, device, options.rounds, options.block)
        results[name] = found
        figures, block = found["figures"], options.block
        goal_single, goal_block = GOALS[name]

        def ratio(key: str, per: int = 1, figures: dict[str, Any] = figures) -> str:
            return f"{figures[key]['ratio'] / per:.3f}" if key in figures else "-"

        rows.append(
            [
                name,
                f"{figures['gradient']['seconds'] * 1e3:.1f} ms",
                f"{found['capture']:.1f}",
                ratio("single"),
                f"<= {goal_single}",
                ratio("curvlinops single"),
                ratio("block", block),
                f"<= {goal_block}" if block == 16 else "-",
                ratio("curvlinops block", block),
                f"{found['error']:.1e}",
            ]
        )
        if options.plans:
            print(f"\n{name}: {found['plan']}")
    head = [
        "network",
        "gradient",
        "capture",
        "single",
        "goal",
        "curvlinops",
        f"per vector of {options.block}",
        "goal",
        "curvlinops",
        "difference",
    ]
    print("\n" + table(head, rows))
    print("\nRatios to one gradient evaluation, medians of interleaved rounds; capture is paid once.")
    write_json(options.json, {"machine": machine(device), "results": results})


if __name__ == "__main__":
    main()
