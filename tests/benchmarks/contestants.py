"""The contestants of products.py: each takes a flat ``(P,)`` or, where it can, a block ``(P, K)`` to the product with it."""

from __future__ import annotations

import copy
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness import synchronize
from names import CURVLINOPS, HESSIAN, LINEARISED, NNGEOMETRY, OURS, PYHESSIAN, RECIPE, STREAMED, TORCH
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.utils.data import DataLoader, Dataset

import fisherlens as fl

_FEW = 16  # examples on which budgets are looked for


@dataclass
class Task:
    """A network on data: the product is with the Fisher of the mean cross-entropy, ``memory`` the budget of ours.

    With ``repeats`` the data are that many copies of the batch, one after another: more to pass over, and the same Fisher.
    Every contestant has a task of its own (``copy``): some leave gradients or, after an error, hooks on the model.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    memory: str | float = "2GiB"
    repeats: int = 1

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.y.device

    @property
    def parameters(self) -> dict[str, Tensor]:
        """All parameters, by name."""
        return dict(self.model.named_parameters())

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in self.model.parameters())

    def gradient(self) -> Sequence[Tensor]:
        """The unit of time: forward and backward of the mean loss."""
        loss = nn.functional.cross_entropy(self.model(self.x), self.y)
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """A flat vector as one tensor per parameter."""
        sizes = [p.numel() for p in self.model.parameters()]
        return {name: part.view_as(p) for (name, p), part in zip(self.parameters.items(), v.split(sizes), strict=True)}

    def copy(self) -> Task:
        """The same with a model of its own."""
        return replace(self, model=copy.deepcopy(self.model))

    def in_double(self) -> Task:
        """The same in float64."""
        x = self.x.double() if self.x.is_floating_point() else self.x
        return replace(self, model=copy.deepcopy(self.model).double(), x=x)

    def part(self, n: int) -> Task:
        """The same network on the first n examples."""
        return replace(self, x=self.x[:n], y=self.y[:n])


@dataclass
class Product:
    """One contestant, ready: ``apply`` is timed. ``matrix`` says with which matrix it multiplies."""

    apply: Callable[[Tensor], Tensor]
    blocks: bool = True
    matrix: str = "Fisher"
    facts: dict[str, Any] = field(default_factory=dict)


class Unavailable(Exception):
    """Why a contestant does not take part: not installed, or it does not know a layer."""


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries, one after another."""
    return torch.cat([t.reshape(-1) for t in tensors])


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Not compiled."""
    return function


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for each shape, without a break in the graph."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def torch_func(task: Task, prepare: Callable[..., Any] = as_it_is) -> Product:
    """Forward mode, softmax Hessian in closed form, reverse mode; ``vmap`` over the columns of a block."""
    parameters = {name: p.detach() for name, p in task.parameters.items()}

    def outputs(values: dict[str, Tensor]) -> Tensor:
        return functional_call(task.model, values, (task.x,))

    def one(v: Tensor) -> Tensor:
        f, change = jvp(outputs, (parameters,), (task.split(v),))
        p = f.softmax(1)
        signal = p * (change - (p * change).sum(1, keepdim=True)) / len(task.y)
        return flat(list(vjp(outputs, parameters)[1](signal)[0].values()))

    single, block = prepare(one), prepare(vmap(one, in_dims=1, out_dims=1))
    return Product(quiet(lambda v: single(v) if v.ndim == 1 else block(v)))


def hessian_product(task: Task, v: Tensor) -> Tensor:
    """Hessian of the mean cross-entropy times a vector, forward over reverse."""
    parameters = {name: p.detach() for name, p in task.parameters.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(task.model, values, (task.x,)), task.y)

    return quiet(lambda: flat(list(jvp(grad(loss), (parameters,), (task.split(v),))[1].values())))()


def truth(task: Task, block: Tensor, matrix: str) -> Tensor:
    """Products in float64 by the ``torch.func`` recipes, which share no code with ours."""
    double, block = task.in_double(), block.double()
    if matrix == "Fisher":
        product = torch_func(double).apply
        return torch.stack([product(v) for v in block.T], dim=1)
    return torch.stack([hessian_product(double, v) for v in block.T], dim=1)


def curvlinops(task: Task, prepare: Callable[..., Any] = as_it_is) -> Product:
    """curvlinops' GGN of the mean cross-entropy, all data in one batch; compiled is its product with a batch."""
    try:
        from curvlinops import GGNLinearOperator
    except ImportError:
        raise Unavailable("not installed") from None
    parameters = list(task.model.parameters())
    operator = GGNLinearOperator(
        task.model, nn.CrossEntropyLoss(), parameters, [(task.x, task.y)], check_deterministic=False
    )
    if prepare is not as_it_is:
        operator._mp = prepare(operator._mp)
    return Product(quiet(lambda v: operator @ v))


class _WholeBatch(Dataset):
    """Hands out all examples at once, without a copy per example."""

    def __init__(self, x: Tensor, y: Tensor):
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitems__(self, _: list[int]) -> tuple[Tensor, Tensor]:
        return self.x.detach(), self.y


def nngeometry(task: Task) -> Product:
    """nngeometry's implicit Fisher with the exact expectation over classes; it has no block product."""
    try:
        from nngeometry.metrics import FIM
        from nngeometry.object import PMatImplicit
        from nngeometry.object.vector import PVector
    except ImportError:
        raise Unavailable("not installed") from None
    n = len(task.y)
    loader = DataLoader(_WholeBatch(task.x, task.y), batch_size=n, collate_fn=lambda batch: batch)
    try:
        matrix = FIM(task.model, loader, PMatImplicit, variant="classif_logits", device=str(task.device))
    except Exception as error:  # a plain Exception is what it raises for a layer that it does not know
        raise Unavailable(_reason(error)) from None
    layers = matrix.generator.layer_collection
    return Product(quiet(lambda v: matrix.mv(PVector(layers, vector_repr=v)).to_torch()), blocks=False)


def pyhessian(task: Task) -> Product:
    """PyHessian's product with the Hessian of one batch: a backward pass through the kept graph of the gradient."""
    model = task.model
    try:
        import pyhessian as package
    except Exception:  # beside a missing package, one that does not load with this torch
        loss = nn.functional.cross_entropy(model(task.x), task.y)
        parameters = list(model.parameters())
        gradients: Sequence[Tensor] = torch.autograd.grad(loss, parameters, create_graph=True)

        def product(_: Any, parameters: Sequence[Tensor], v: Sequence[Tensor]) -> Sequence[Tensor]:
            return torch.autograd.grad(gradients, parameters, v, retain_graph=True)

        name = RECIPE
    else:
        make = quiet(lambda: package.hessian(model, nn.CrossEntropyLoss(), (task.x, task.y), cuda=task.y.is_cuda))
        kept = make()
        gradients, parameters, product, name = kept.gradsH, kept.params, package.hessian_vector_product, PYHESSIAN
    return Product(
        lambda v: flat(product(gradients, parameters, list(task.split(v).values()))), False, "Hessian", {"name": name}
    )


def ours(task: Task, kind: str = "exact") -> Product:
    """``fl.Fisher`` under the task's budget, with the seconds of the capture and what its plan says."""
    synchronize(task.device)
    start = time.perf_counter()
    batch = (task.x, task.y)
    data = batch if task.repeats == 1 else [batch] * task.repeats
    F = fl.Fisher(task.model, data, likelihood="categorical", kind=kind, memory=task.memory, progress=False)
    synchronize(task.device)
    facts = {
        "capture_seconds": time.perf_counter() - start,
        "memory": task.memory,
        "repeats": task.repeats,
        "paths": {path: sum(e.path == path for e in F.plan) for path in sorted({e.path for e in F.plan})},
        "held": F.plan.nbytes,
        "predicted_peak": F.plan.peak_nbytes,
        "plan": repr(F.plan),
    }
    return Product(lambda v: F @ v, True, "Hessian" if kind == "hessian" else "Fisher", facts)


def budgets(task: Task) -> dict[str, int]:
    """Budgets under which the plan streams and, where there is one, keeps the graph (linearised), within a factor of 2 of the largest.

    They are proportional to the number of examples, so a few are enough to find them.
    """
    few = task.part(_FEW)
    found: dict[str, int] = {}
    budget = max(2**10, task.size // 2**7)  # less than a single example needs
    while "linearised" not in found:
        try:
            paths = set(ours(replace(few, memory=budget, repeats=1)).facts["paths"])
        except fl.MemoryBudgetError:
            paths = set()
        if paths - {"streamed", "linearised"}:
            break
        for path in paths:
            found[path] = budget * len(task.y) * task.repeats // len(few.y)
        budget *= 2
    return found


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the warnings of peers and of torch's own transforms: they are not what is measured."""

    def run(*arguments: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(*arguments)

    return run


def _reason(error: BaseException) -> str:
    """What was raised and where, in one line."""
    text = str(error).strip().splitlines()
    if text:
        return f"{type(error).__name__}: {text[0]}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {Path(frame.filename).stem}.{frame.name}"


def attempt(build: Callable[[Task], Product], task: Task, *, first_small: bool = True) -> Product:
    """A contestant that has multiplied once, on two examples unless it is compiled; :class:`Unavailable` with the reason where it cannot."""
    v = torch.ones(task.size, device=task.device)
    try:
        if first_small:  # on a copy: what it leaves on its model must not reach the next
            build(replace(task.part(2).copy(), memory="2GiB", repeats=1)).apply(v)
            return build(task)
        product = build(task)
        product.apply(v)
        return product
    except Unavailable:
        raise
    except Exception as error:  # whatever a peer's code raises on a network that it does not cover
        raise Unavailable(_reason(error)) from None


PEERS: dict[str, Callable[[Task], Product]] = {
    CURVLINOPS: curvlinops,
    NNGEOMETRY: nngeometry,
    PYHESSIAN: pyhessian,
    TORCH: torch_func,
}
COMPILED: dict[str, Callable[[Task], Product]] = {
    f"{CURVLINOPS}, compiled": lambda task: curvlinops(task, compiled),
    f"{TORCH}, compiled": lambda task: torch_func(task, compiled),
}
OURS_TOO: dict[str, Callable[[Task], Product]] = {
    OURS: ours,
    LINEARISED: ours,
    STREAMED: ours,
    HESSIAN: lambda task: ours(task, "hessian"),
}
ALL = {**OURS_TOO, **PEERS, **COMPILED}
