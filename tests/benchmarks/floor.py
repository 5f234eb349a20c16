"""How far products are from the floor of the machine: FLOPs and bytes over measured peak rates, and where the rest goes.

Run with ``python tests/benchmarks/floor.py``; ``--help`` lists the options. Per network (gradient, a single product, a block of
vectors) four times are set side by side: the *floor*, which is per layer the larger of FLOPs over the best rate of a matrix product
and bytes over the best memory rate; the *bare* matrix products of the same sizes on the same data, written into buffers that are
there already; and what was measured. Then what allocator, layout of V and threads change, and a profile by operator.
``--markdown docs/performance.md`` puts the tables between the markers of that page.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import interleaved, machine, synchronize, table, write_json
from networks import REFERENCES
from torch import Tensor, nn

import fisherlens as fl
from fisherlens.linalg import memory

BEGIN, END = "<!-- floor:begin -->", "<!-- floor:end -->"
SIZES = tuple(2**20 * factor for factor in (2, 8, 32, 128, 512))  # working sets of the memory rates, in bytes
PRODUCTS = ("mm", "bmm", "addmm", "addmm_", "mv", "addmv", "addmv_", "baddbmm_", "baddbmm", "convolution", "dot")


# --- the machine -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Best rates of the machine: FLOP/s of float32 matrix products by shape, byte/s by working set."""

    shapes: dict[str, float]
    memory: dict[int, dict[str, float]]

    @property
    def flops(self) -> float:
        """The best of all shapes."""
        return max(self.shapes.values())

    def bandwidth(self, nbytes: float) -> float:
        """The best rate at the measured working set nearest to one, on a log scale."""
        nearest = min(self.memory, key=lambda size: max(size, nbytes) / min(size, nbytes))
        return max(self.memory[nearest].values())


def best(run: Callable[[], Any], device: torch.device, seconds: float = 0.2) -> float:
    """The fastest of as many calls as fit: what else the machine does can only make a call slower."""
    run()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


def gemm_rates(device: torch.device, shapes: dict[str, tuple[int, int, int]]) -> dict[str, float]:
    """FLOP/s of float32 matrix products of the given (m, k, n), into a buffer that is there already."""
    found = {}
    for label, (m, k, n) in shapes.items():
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        out = torch.empty(m, n, device=device)
        found[label] = 2 * m * k * n / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
    return found


def memory_rates(device: torch.device) -> dict[int, dict[str, float]]:
    """Byte/s by working set: a copy (read, write), a triad x + y / 2 (two reads, write), a matrix times a vector (read)."""
    by_size = {}
    for size in SIZES:
        third, half, wide = size // 12, size // 8, 4096
        x, y, z = (torch.randn(third, device=device) for _ in range(3))
        p, q = torch.randn(half, device=device), torch.empty(half, device=device)
        matrix, v = torch.randn(size // 4 // wide, wide, device=device), torch.randn(wide, device=device)
        product = torch.empty(len(matrix), device=device)
        by_size[size] = {
            "copy": 8 * half / best(lambda p=p, q=q: q.copy_(p), device),
            "triad": 12 * third / best(lambda x=x, y=y, z=z: torch.add(x, y, alpha=0.5, out=z), device),
            "read": 4 * matrix.numel() / best(lambda m=matrix, v=v, o=product: torch.mv(m, v, out=o), device),
        }
    return by_size


# --- the floor -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """Multiplications and compulsory memory traffic, per layer."""

    flops: list[float]
    nbytes: list[float]

    def floor(self, r: Rates) -> tuple[float, str]:
        """Seconds below which no code can go, and what limits most of them."""
        bandwidth = r.bandwidth(sum(self.nbytes))
        compute = [f / r.flops for f in self.flops]
        traffic = [b / bandwidth for b in self.nbytes]
        both = [max(pair) for pair in zip(compute, traffic, strict=True)]
        arithmetic = sum(c for c, b in zip(compute, both, strict=True) if c == b)
        return sum(both), "arithmetic" if arithmetic > sum(both) / 2 else "memory"


def product_work(F: fl.Fisher, k: int) -> Work:
    """Of F @ V: what is kept is read twice (U V, then Uᵀ Z), V once, and the answer is written once."""
    size = F.dtype.itemsize
    return Work(
        [k * layer.product_flops for layer in F.plan],
        [2 * layer.nbytes + 2 * size * k * F.layout.layer(layer.layer).size for layer in F.plan],
    )


def gradient_work(model: nn.Module, x: Tensor, F: fl.Fisher) -> Work:
    """Of a gradient: each layer reads its input twice and writes its gradient, the same for outputs and parameters."""
    seen: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def note(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if any(True for _ in module.parameters(recurse=False)):
            seen[names[module]] = seen.get(names[module], 0) + inputs[0].numel() + output.numel()

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    flops, nbytes = [], []
    for i, layer in enumerate(F.plan):
        flops.append(layer.gradient_flops * (2 / 3 if i == 0 else 1))  # nobody needs the gradient of the inputs
        nbytes.append(4.0 * 3 * (seen.get(layer.layer, 0) + F.layout.layer(layer.layer).size))
    return Work(flops, nbytes)


# --- the bare matrix products ----------------------------------------------------------------------------------------


def bare(F: fl.Fisher, k: int) -> Callable[[], None] | None:
    """The matrix products of F @ V alone, for factors and explicit rows; None where a layer is kept in another way."""
    calls: list[Callable[[], Any]] = []

    def mm(left: Tensor, right: Tensor) -> None:
        out = torch.matmul(left, right)
        calls.append(lambda: torch.matmul(left, right, out=out))

    def like(*shape: int) -> Tensor:
        return torch.randn(*shape, device=F.device, dtype=F.dtype)

    for layer in F.scores.layers:
        if hasattr(layer, "pieces"):
            for rows in layer.pieces:
                if k == 1:
                    mm(rows, like(rows.shape[1]))
                    mm(rows.T, like(len(rows)))
                else:
                    mm(rows, like(rows.shape[1], k))
                    mm(like(k, len(rows)), rows)
        elif hasattr(layer, "a") and layer.g.ndim == 4:
            a, g = layer.a.reshape(-1, layer.a.shape[-1]), layer.g.flatten(2)  # (n t, d_i), (n, r, t d_o)
            d_i, d_o = a.shape[1], layer.g.shape[-1]
            mm(a, like(k * d_o, d_i).T)
            mm(like(len(g), k, g.shape[2]), g.mT)
            mm(like(len(g), k, g.shape[1]), g)
            mm(like(len(a), k * d_o).T, a)
        else:
            return None

    def run() -> None:
        for call in calls:
            call()

    return run


def shapes_of(F: fl.Fisher, name: str, k: int) -> dict[str, tuple[int, int, int]]:
    """(m, k, n) of the matrix products of the largest layer kept as factors and of the largest kept as rows."""
    by_work = sorted(F.scores.layers, key=lambda scores: F.plan[scores.layer.name].product_flops)
    found = {}
    for layer in by_work:  # the last of a kind stays
        if hasattr(layer, "pieces"):
            rows, p = max(layer.pieces, key=Tensor.numel).shape
            found |= {f"{name}: U V, block of {k}": (rows, p, k), f"{name}: Zᵀ U, block of {k}": (k, rows, p)}
        elif hasattr(layer, "a") and layer.g.ndim == 4:
            n, d_i, d_o = layer.a[..., 0].numel(), layer.a.shape[-1], layer.g.shape[-1]
            found |= {f"{name}: A Vᵀ, single": (n, d_i, d_o), f"{name}: A Vᵀ, block of {k}": (n, d_i, k * d_o)}
    return found


# --- what makes a difference -----------------------------------------------------------------------------------------


@contextmanager
def allocator(F: fl.Fisher, how: str) -> Iterator[None]:
    """Buffers as usual, fresh ones from huge pages for every product, or those of the C library."""
    workspace, small, limit = F.scores.workspace, memory.SMALL, F.scores.workspace.limit
    try:
        if how == "fresh":
            workspace.limit, workspace._buffers = 0, []
        elif how == "malloc":
            memory.SMALL = 1 << 62
        yield
    finally:
        memory.SMALL, workspace.limit = small, limit


def variants(F: fl.Fisher, k: int) -> dict[str, Callable[[], Any]]:
    """A product in several ways that give the same numbers."""
    flat = torch.randn(k, F.n_params, device=F.device)
    rows, columns = flat.T.contiguous(), flat.T
    rows, columns = (rows, columns) if k > 1 else (rows[:, 0], columns[:, 0])

    def under(how: str) -> Callable[[], Any]:
        def run() -> Any:
            with allocator(F, how):
                return F @ rows

        return run

    found = {"as it is": under("usual"), "fresh huge pages": under("fresh"), "ordinary malloc": under("malloc")}
    return found if k == 1 else found | {"V = K contiguous vectors": lambda: F @ columns}


def profile(run: Callable[[], Any], top: int) -> tuple[dict[str, float], float]:
    """Share of the operators' own time, and that of all matrix products together."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        for _ in range(5):
            run()
    spent = {e.key: e.self_cpu_time_total for e in recorded.key_averages() if e.key.startswith("aten::")}
    total = max(sum(spent.values()), 1e-9)
    shares = {name.removeprefix("aten::"): value / total for name, value in spent.items()}
    products = sum(share for name, share in shares.items() if name in PRODUCTS or "convolution" in name)
    return dict(sorted(shares.items(), key=lambda item: -item[1])[:top]), products


# --- tables ----------------------------------------------------------------------------------------------------------


def measure(name: str, device: torch.device, options: Any) -> tuple[dict[str, Any], dict[str, Work], dict[str, float]]:
    """Figures of one network, its work, and the rates of its own shapes."""
    model, (x, y) = REFERENCES[name].make()
    model, x, y = model.to(device), x.to(device), y.to(device)
    F = fl.Fisher(model, (x, y), likelihood="categorical", memory=options.memory)
    parameters, block = list(model.parameters()), options.block
    works = {"gradient": gradient_work(model, x, F), "single": product_work(F, 1), "block": product_work(F, block)}
    runs: dict[str, Callable[[], Any]] = {
        "gradient": lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)
    }
    profiles = {}
    for what, k in (("single", 1), ("block", block)):
        ways = variants(F, k)
        profiles[what] = profile(ways["as it is"], options.top)
        runs |= {f"{what}: {way}": run for way, run in ways.items()}
        alone = bare(F, k)
        if alone is not None:
            runs[f"{what}: bare"] = alone
    found = interleaved(runs, unit="gradient", rounds=options.rounds, device=device)
    threads = by_threads(F, block, options.threads, options.rounds)
    result = {"figures": found, "plan": repr(F.plan), "kept": F.plan.nbytes, "profile": profiles, "threads": threads}
    return result, works, gemm_rates(device, shapes_of(F, name, block))


def floors(works: dict[str, Work], figures: dict[str, dict[str, float]], r: Rates) -> dict[str, dict[str, Any]]:
    """Floor, bare products and measured time of one network, in seconds."""
    found = {}
    for what, work in works.items():
        seconds, limit = work.floor(r)
        found[what] = {
            "flops": sum(work.flops),
            "bytes": sum(work.nbytes),
            "floor": seconds,
            "limit": limit,
            "bare": figures.get(f"{what}: bare", {}).get("seconds"),
            "measured": figures[what if what == "gradient" else f"{what}: as it is"]["seconds"],
        }
    return found


def by_threads(F: fl.Fisher, block: int, counts: list[int], rounds: int) -> dict[int, dict[str, float]]:
    """Median seconds of both products for each number of threads; the number is set back afterwards."""
    before = torch.get_num_threads()
    v, many = torch.randn(F.n_params, device=F.device), torch.randn(F.n_params, block, device=F.device)
    found = {}
    try:
        for count in counts:
            torch.set_num_threads(count)
            seen = interleaved(
                {"single": lambda: F @ v, "block": lambda: F @ many}, unit="single", rounds=rounds, device=F.device
            )
            found[count] = {what: entry["seconds"] for what, entry in seen.items()}
    finally:
        torch.set_num_threads(before)
    return found


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def tables(where: str, r: Rates, results: dict[str, Any], options: Any) -> str:
    """All tables as one text, which is Markdown as well."""
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    pages = huge.read_text().split("[")[1].split("]")[0] if huge.exists() else "unknown"
    parts = [f"Machine: {where}; transparent huge pages: {pages}."]
    parts.append(table(["matrix product, float32", "GFLOP/s"], [[k, f"{v / 1e9:.0f}"] for k, v in r.shapes.items()]))
    parts.append(
        table(
            ["working set", "copy, GB/s", "triad, GB/s", "matrix × vector, GB/s"],
            [[f"{size // 2**20} MiB", *(f"{v / 1e9:.1f}" for v in row.values())] for size, row in r.memory.items()],
        )
    )
    rows = []
    for name, result in results.items():
        for what, f in result["floor"].items():
            label = what if what != "block" else f"block of {options.block}"
            against = [f["floor"] / f["measured"]] + ([] if f["bare"] is None else [f["bare"] / f["measured"]])
            rows.append(
                [
                    name,
                    label,
                    f"{f['flops'] / 1e9:.2f}",
                    f"{f['bytes'] / 1e6:.0f}",
                    milliseconds(f["floor"]),
                    f["limit"],
                ]
                + [milliseconds(f["bare"]), milliseconds(f["measured"])]
                + [f"{share:.0%}" for share in against]
                + ["-"] * (2 - len(against))
            )
    head = ["network", "what", "GFLOP", "MB", "floor, ms", "limited by", "bare products, ms", "measured, ms"]
    parts.append(table([*head, "floor / measured", "bare / measured"], rows))
    rows = []
    for name, result in results.items():
        for what in ("single", "block"):
            base = result["figures"][f"{what}: as it is"]["seconds"]
            ways = [key for key in result["figures"] if key.startswith(what) and "bare" not in key]
            cells = {key.partition(": ")[2]: result["figures"][key]["seconds"] / base for key in ways}
            threads = result["threads"]
            cells |= {
                f"{count} thread{'s' * (count > 1)}": threads[count][what] / threads[options.threads[-1]][what]
                for count in threads
            }
            rows.append([name, what, *(f"{cells[key]:.2f}" if key in cells else "-" for key in _columns(options))])
    parts.append("Times relative to the product as it is:")
    parts.append(table(["network", "what", *_columns(options)], rows))
    rows = [
        [name, what, f"{products:.0%}", ", ".join(f"{op} {share:.0%}" for op, share in shares.items())]
        for name, result in results.items()
        for what, (shares, products) in result["profile"].items()
    ]
    parts.append("Share of the operators' own time:")
    parts.append(table(["network", "what", "matrix products", "largest"], rows))
    return "\n\n".join(parts)


def _columns(options: Any) -> list[str]:
    counts = [f"{count} thread{'s' * (count > 1)}" for count in options.threads[:-1]]
    return ["fresh huge pages", "ordinary malloc", "V = K contiguous vectors", *counts]


def write_markdown(path: str, text: str) -> None:
    """Put the text between the markers of a page, or into a new file."""
    page = Path(path)
    old = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    if BEGIN not in old or END not in old:
        raise SystemExit(f"{path} has no markers {BEGIN} and {END} to put the tables between.")
    head, _, rest = old.partition(BEGIN)
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(REFERENCES), choices=list(REFERENCES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--top", type=int, default=5, help="operators of a profile that are shown")
    parser.add_argument("--memory", default="2GiB", help="budget of each Fisher")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads",
        nargs="*",
        type=int,
        default=sorted({1, torch.get_num_threads()}),
        help="thread counts to compare; the last is the base",
    )
    parser.add_argument("--plans", action="store_true", help="also print how each layer is kept")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--markdown", help="put the tables between the markers of this page")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(options.threads[-1])
    before = memory_rates(device)
    shapes = gemm_rates(device, {f"square {side}": (side, side, side) for side in (1024, 2048)})
    results, works = {}, {}
    for name in options.networks:  # one after the other: each holds what its Fisher keeps
        results[name], works[name], own = measure(name, device, options)
        shapes |= own
        if options.plans:
            print(f"{name}: {results[name]['plan']}\n")
    after = memory_rates(device)  # again, as others may have used the memory for a moment
    r = Rates(
        shapes, {size: {what: max(v, after[size][what]) for what, v in row.items()} for size, row in before.items()}
    )
    for name, result in results.items():
        result["floor"] = floors(works[name], result["figures"], r)
    where = machine(device)
    text = tables(where, r, results, options)
    print(text)
    write_json(options.json, {"machine": where, "rates": {"shapes": r.shapes, "memory": r.memory}, "results": results})
    if options.markdown:
        write_markdown(options.markdown, text)


if __name__ == "__main__":
    main()
