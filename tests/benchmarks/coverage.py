"""How often do 95 % intervals hold the truth? The figures of the page "Choosing an estimator", measured.

``python tests/benchmarks/coverage.py [--seeds 1000] [--data-sets 300]`` prints Markdown tables; about four minutes on one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor, nn

import fisherlens as fl
from fisherlens.linalg.diagonals import diagonal
from fisherlens.linalg.probes import Probes
from fisherlens.linalg.traces import trace
from fisherlens.spectrum.bootstrap import replicate
from fisherlens.spectrum.moments import integrate
from fisherlens.spectrum.rules import Quadrature

ORDER = 200
CPU = torch.device("cpu")


def matrices() -> dict[str, Tensor]:
    """Spectra from one eigenvalue to flat, and the Gram matrix of a convolutional network on 30 digits."""
    generator = torch.Generator().manual_seed(1)
    j = torch.arange(1.0, ORDER + 1, dtype=torch.float64)
    spectra = {
        "rank one": torch.cat([torch.ones(1), torch.zeros(ORDER - 1)]).double(),
        "rank four": torch.cat([torch.tensor([4.0, 3, 2, 1]), torch.zeros(ORDER - 4)]).double(),
        "j^-1.5": j**-1.5,
        "0.8^j": 0.8**j,
        "flat, 1 to 2": 1 + j / ORDER,
    }
    found = {}
    for name, values in spectra.items():
        q = torch.linalg.qr(torch.randn(ORDER, ORDER, generator=generator, dtype=torch.float64))[0]
        found[name] = (q * values) @ q.T
    digits = fl.problem("digits-cnn")
    x, y = digits.train
    found["digits-cnn"] = fl.Fisher(
        digits.model(0).double(), (x[:30].double(), y[:30]), likelihood="categorical"
    ).gram()
    return found


def probes(n: int, seed: int) -> Probes:
    return Probes(n, torch.float64, CPU, seed)


def held(found: object, truth: Tensor) -> float:
    """Share of intervals of one estimate that hold the truth, rounding forgiven."""
    slack = 1e-12 * truth.abs().max()
    return ((found.value - truth).abs() <= stdtrit(found.dof, 0.975) * found.sem + slack).double().mean().item()


def estimator_row(
    estimate: Callable, method: str, k: int, cases: dict[str, Tensor], truth: Callable[[Tensor], Tensor], seeds: int
) -> list[str]:
    cells = []
    for A in cases.values():
        found = [estimate(A.__matmul__, probes(len(A), seed), k, method) for seed in range(seeds)]
        exact = truth(A)
        error = torch.stack([(one.value - exact).norm() / exact.norm() for one in found]).square().mean().sqrt().item()
        cells.append(
            f"{100 * np.mean([held(one, exact) for one in found]):.1f} ({error:.0e})" if error > 1e-9 else "exact"
        )
    return cells


def function_rows(cases: dict[str, Tensor], seeds: int) -> Iterator[tuple[str, list[str]]]:
    """Effective dimension and log-determinant from probes on the sphere, in the eigenbasis: the quadrature itself is exact here."""
    for label, function in {
        "effective dimension, λ = 0.1 λ_max": lambda x, top: x / (x + 0.1 * top),
        "effective dimension, λ = 0.001 λ_max": lambda x, top: x / (x + 0.001 * top),
        "log det, λ = 0.1 λ_max": lambda x, top: np.log1p(x / (0.1 * top)),
        "log det, λ = 0.001 λ_max": lambda x, top: np.log1p(x / (0.001 * top)),
    }.items():
        for deflated in (0, 10):
            cells = []
            for A in cases.values():
                values = torch.linalg.eigvalsh(A).clamp(min=0).flip(0).numpy().copy()
                values[values < 1e-12 * values[0]] = 0
                rest, top = values[deflated:], values[0]
                exact = function(values, top).sum()
                hits = []
                for seed in range(seeds if rest.any() else 0):
                    x = probes(len(rest), seed).sphere(10).T.numpy()
                    rules = Quadrature(
                        np.broadcast_to(rest, x.shape), x**2, values[:deflated], 0, len(values), 0.0, len(values), 0.0
                    )
                    found = integrate(rules, [lambda v, f=function, top=top: f(v, top)])
                    hits.append(abs(found.value[0] - exact) <= stdtrit(found.dof[0], 0.975) * found.sem[0])
                cells.append(f"{100 * np.mean(hits):.1f}" if hits else "exact")
            yield f"{label}, {'no deflation' if not deflated else f'{deflated} deflated'}", cells


def bootstrap_rows(data_sets: int) -> Iterator[tuple[str, list[str]]]:
    """Intervals over examples for what infinitely many examples would give, on a small network with Gaussian inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    scale = torch.tensor([2, 1.5, 1, 0.7, 0.4], dtype=torch.float64)

    def fisher(n: int, seed: int) -> fl.Fisher:
        x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
        return fl.Fisher(model, (x, None), likelihood="categorical")

    population = torch.linalg.eigvalsh(fisher(40_000, 10**6).dense()).flip(0).clamp(min=0).numpy()
    lam = 0.01 * population[0]
    functionals = {f"eigenvalue {k}": (lambda e, k=k: e[..., k - 1]) for k in (1, 2, 5, 10, 20)} | {
        "trace": lambda e: e.sum(-1),
        "effective dimension, λ = 0.01 λ_max": lambda e: (e / (e + lam)).sum(-1),
        "log det, λ = 0.01 λ_max": lambda e: np.log1p(e / lam).sum(-1),
        "participation ratio": lambda e: e.sum(-1) ** 2 / (e**2).sum(-1),
    }
    hits: dict[str, dict[int, list[bool]]] = {name: {} for name in functionals}
    for n in (20, 50, 200):
        for seed in range(data_sets):
            found = replicate(fisher(n, seed), 200, seed)
            for name, functional in functionals.items():
                _, low, high = found.interval(functional, 0.95)
                hits[name].setdefault(n, []).append(bool(low <= functional(population) <= high))
    for name, found in hits.items():
        yield name, [f"{100 * np.mean(values):.0f}" for values in found.values()]


def table(title: str, columns: list[str], rows: Iterator[tuple[str, list[str]]] | list[tuple[str, list[str]]]) -> None:
    start = time.perf_counter()
    print(f"\n{title}\n\n| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for label, cells in rows:
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
    print(f"\n({time.perf_counter() - start:.0f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--data-sets", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases, seeds = matrices(), options.seeds
    names = list(cases)
    traces = [("hutchinson", 10), ("hutchinson", 30), ("hutch++", 6), ("hutch++", 12), ("hutch++", 30), ("hutch++", 60)]
    traces += [(method, k) for method in ("xtrace", "xnystrace") for k in (12, 30, 60)]
    table(
        f"Trace: percent of {seeds} seeds whose 95 % interval holds the truth (root-mean-square relative error)",
        names,
        ((f"{m}, {k} products", estimator_row(trace, m, k, cases, torch.trace, seeds)) for m, k in traces),
    )
    diagonals = [("hutchinson", 10), ("hutchinson", 30), ("hutch++", 12), ("hutch++", 30), ("xdiag", 12), ("xdiag", 30)]
    table(
        f"Diagonal: percent of entries over {max(seeds // 5, 1)} seeds",
        names,
        (
            (f"{m}, {k} products", estimator_row(diagonal, m, k, cases, torch.diagonal, max(seeds // 5, 1)))
            for m, k in diagonals
        ),
    )
    table(f"Functions of the spectrum, 10 probes: percent of {seeds} seeds", names, function_rows(cases, seeds))
    table(
        f"Bootstrap over examples, 200 replicates: percent of {options.data_sets} data sets whose 95 % interval holds the value of infinitely many examples",
        ["N = 20", "N = 50", "N = 200"],
        bootstrap_rows(options.data_sets),
    )


if __name__ == "__main__":
    main()
