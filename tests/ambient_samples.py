"""Every public function that computes, called on tiny networks in single precision: what must not change with torch's ambient state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fisherlens as fl

KINDS = ("exact", "mc", "empirical", "hessian")
#: budgets with which the same network is kept as factors, as a graph, and not at all; see :meth:`Sample.fisher`
BUDGETS = {"kept": "2GiB", "streamed": 1000}


class Attention(nn.Module):
    """Fused attention and a table of positions that the forward makes itself, on the device and in the dtype of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None] / 10
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


BUILD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)),
        (1, 3, 3),
    ),
    "attention": (Attention, (3, 4)),
}


@dataclass(frozen=True)
class Sample:
    """A network, its data, and the operators on them."""

    name: str
    dtype: torch.dtype = torch.float32

    @cached_property
    def model(self) -> nn.Module:
        build, _ = BUILD[self.name]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(3)
            return build().to(self.dtype).eval()

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(8, *BUILD[self.name][1], generator=generator, dtype=torch.float64).to(self.dtype)
        return x, torch.arange(8) % 3

    @cached_property
    def images(self) -> Sample:
        """Of a convolution, for what is of convolutions alone."""
        return Sample("conv", self.dtype)

    def made(self) -> Sample:
        """Itself, with networks and data made now, outside of whatever state is looked at next."""
        for one in (self, self.images):
            next(one.model.parameters()).add(one.data[0].sum())
        return self

    @cached_property
    def F(self) -> fl.Fisher:
        return self.fisher()

    def fisher(self, kind: str = "exact", budget: str = "kept") -> fl.Fisher:
        """The operator, made now."""
        return fl.Fisher(self.model, self.data, likelihood="categorical", kind=kind, memory=BUDGETS[budget])

    def vectors(self, k: int = 3) -> Tensor:
        """Vectors ``(P, k)``, made of no global state."""
        generator = torch.Generator(device="cpu").manual_seed(5)
        count = sum(p.numel() for p in self.model.parameters())
        return torch.randn(count, k, generator=generator, dtype=torch.float64, device="cpu").to(self.dtype)


def products(F: fl.Fisher, V: Tensor) -> list[Any]:
    """Single, block and dict products, and what every kind of operator knows of itself."""
    v = V[:, 0].contiguous()
    found = [F @ v, F @ V, F @ F.layout.unflatten(v), F.gradient(), F.diagonal(), F.trace(), F.frobenius_norm()]
    name = F.layout.layer_names[-1]
    part = F.restrict(name)
    own = V[F.layout.layer(name).start : F.layout.layer(name).stop]
    found += [F.dense(), F.block(name), part @ own, F.damped(0.1) @ v, F.damped(0.1).solve(v), F.damped(0.1).dense()]
    found += [F.solve(V, 0.1), F.solve(v, 0.1, return_info=True)[0], F.damped(0.1).diagonal()]
    found.append(F.to_scipy() @ v.numpy())
    if F.kind != "hessian":
        found += [F.gram(), F.natural_gradient(0.1)]
    return found


def standin(A: Any, V: Tensor) -> list[Any]:
    """All that an approximation answers."""
    found = [A @ V, A @ V[:, 0], A.solve(V, 0.1), A.dense(), A.diagonal(), A.trace(), A.log_determinant(0.1)]
    return [*found, A.squared_norm(), A.within_block_error()]


def _ellipse(s: Sample) -> Any:
    return fl.ellipse(s.F, s.vectors(2), radius=0.5, model=s.model, data=s.data, grid=3, num_angles=8)


def _trained(s: Sample) -> Any:
    with torch.inference_mode(False):
        net = copy.deepcopy(s.model)
    options = {"num_steps": 3, "batch_size": 4, "likelihood": "categorical", "progress": False}
    record = fl.train(net, s.data, lambda m: fl.optim.CWNGD(m, lr=0.1, likelihood="categorical"), **options)
    return [record, *(p.detach() for p in net.parameters())]


def _compared(s: Sample) -> Any:
    problem = fl.Problem("tiny", "Tiny.", lambda: copy.deepcopy(s.model), s.data, s.data)
    sgd = {"sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1)}
    return fl.compare_optimizers(problem, sgd, num_steps=3, seeds=1, batch_size=4, progress=False)


def _monitored(s: Sample) -> Any:
    return fl.Monitor(s.model, s.data, likelihood="categorical", every=1, k=2).result


def _problem(s: Sample) -> Any:
    problem = fl.problem("linear-gaussian", num_train=20, num_test=5)
    return [*problem.train, *problem.test]


_MATRIX = torch.arange(16, dtype=torch.float32, device="cpu").view(4, 4) / 7

#: name in ``fl.__all__`` → what it says of a sample
CALLS: dict[str, Callable[[Sample], Any]] = {
    "Fisher": lambda s: products(s.fisher(), s.vectors()),
    "Operator": lambda s: fl.Operator(lambda v: (_MATRIX + _MATRIX.T) @ v, 4, torch.float32) @ _MATRIX[0],
    "spectrum": lambda s: [fl.spectrum(s.F, vectors=True), fl.spectrum(s.F, by="layer")],
    "top_eigenvalues": lambda s: fl.top_eigenvalues(s.F, 3, vectors=True),
    "spectral_density": lambda s: [
        fl.spectral_density(s.F, num_probes=3, num_matvecs=5),
        fl.spectral_density(s.F, num_probes=3, num_matvecs=5, deflate=2),
        fl.spectral_density(s.F, num_probes=3, num_matvecs=5, method="kpm", grid="linear"),
    ],
    "spectral_summary": lambda s: fl.spectral_summary(s.F),
    "effective_dimension": lambda s: [
        fl.effective_dimension(s.F, 0.1),
        fl.effective_dimension(
            fl.Operator(lambda v: s.F @ v, s.F.n_params, s.dtype, block=True, psd=True),
            0.1,
            num_probes=3,
            num_matvecs=4,
        ),
    ],
    "log_determinant": lambda s: fl.log_determinant(s.F, 0.1),
    "estimate_trace": lambda s: fl.estimate_trace(s.F, num_matvecs=9),
    "estimate_diagonal": lambda s: fl.estimate_diagonal(s.F, num_matvecs=9),
    "compare_kinds": lambda s: fl.compare_kinds(
        s.model, s.data, likelihood="categorical", kinds=("exact", "mc", "hessian"), k=2, progress=False
    ),
    "coupling": lambda s: [fl.coupling(s.F, num_null=5), fl.coupling(s.F, num_null=0, num_sketches=3)],
    "dependence": lambda s: fl.dependence(s.F, num_null=5),
    "spatial_coupling": lambda s: fl.spatial_coupling(s.images.F, "0"),
    "independence": lambda s: fl.independence(s.F, ("layer", "unit", "diagonal"), progress_bar=False),
    "compare_approximations": lambda s: fl.compare_approximations(
        s.F, {"layer": fl.BlockDiagonal(s.F, "layer"), "low": fl.LowRank(s.F, 2)}, progress_bar=False
    ),
    "BlockDiagonal": lambda s: [
        *standin(fl.BlockDiagonal(s.F, "layer"), s.vectors()),
        *standin(fl.BlockDiagonal(s.F, "unit"), s.vectors()),
    ],
    "KFAC": lambda s: standin(fl.KFAC(s.F, others="block"), s.vectors()),
    "EKFAC": lambda s: standin(fl.EKFAC(s.F, others="block"), s.vectors()),
    "ProjectedKFAC": lambda s: standin(fl.ProjectedKFAC(s.F, others="block"), s.vectors()),
    "Diagonal": lambda s: standin(fl.Diagonal(s.F), s.vectors()),
    "QuasiDiagonal": lambda s: standin(fl.QuasiDiagonal(s.F), s.vectors()),
    "LowRank": lambda s: [
        *standin(fl.LowRank(s.F, 3), s.vectors()),
        fl.LowRank(s.F, 2, method="lanczos").values,
    ],
    "information": lambda s: [fl.information(s.F), fl.information(s.F, by="parameter")],
    "information_table": lambda s: fl.information_table(fl.information(s.F)).select_dtypes("number").to_numpy(),
    "directions": lambda s: fl.directions(s.F, 2, vectors=True),
    "ellipse": _ellipse,
    "partition": lambda s: fl.partition(s.F, "unit").block_of,
    "problem": _problem,
    "train": _trained,
    "compare_optimizers": _compared,
    "Monitor": _monitored,
}
#: public names that compute nothing, or (the last line) do so at length; what those call is in the list above
QUIET = {
    *("Categorical", "Bernoulli", "Gaussian", "HeteroscedasticGaussian"),  # F and the optimizers call them, guarded
    *("ElementwiseLikelihood", "Likelihood", "BoundLikelihood"),
    *("Partition", "problems", "Problem", "Tuning", "LogUniform", "adapters", "save", "load", "plot", "__version__"),
    *("errors", *(name for name in fl.__all__ if name.endswith(("Error", "Warning")))),
    "optim",  # tests of their own: a step must leave the closure in the user's autocast
    *("verify", "report"),
}
#: names that compute without the decorator: a context inside, or nothing but whole numbers
OTHERWISE_GUARDED = {"Monitor", "partition"}
_TIMES = ("seconds", "share_of_time")


def numbers(found: Any) -> list[np.ndarray]:
    """All numbers of an answer, in order; times left out."""
    if isinstance(found, Tensor):
        return [found.detach().cpu().numpy()]
    if hasattr(found, "data_vars"):
        names = [name for name in found.data_vars if not any(word in str(name) for word in _TIMES)]
        return [part for name in names for part in numbers(found[name].values)]
    if isinstance(found, Mapping):
        return [part for key in found for part in numbers(found[key])]
    if isinstance(found, list | tuple):
        return [part for entry in found for part in numbers(entry)]
    array = np.asarray(found)
    return [array] if array.dtype.kind in "fiub" else []
