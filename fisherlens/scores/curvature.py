"""Second derivatives of the loss: the gradient's graph, differentiated once more, piece by piece of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fisherlens._progress import progress as progress_bar
from fisherlens.errors import InputError, NonFiniteError, UnsupportedModuleError
from fisherlens.layout import Layout
from fisherlens.likelihoods import BoundLikelihood, Likelihood
from fisherlens.linalg.precision import OwnPrecision
from fisherlens.scores.capture import as_module, first_examples
from fisherlens.scores.checks import LOW_PRECISION, check_model
from fisherlens.scores.held import held_bytes
from fisherlens.scores.loss import check_differentiable, loss_gradient
from fisherlens.scores.loss_graph import LossGraph, check_differences, check_nodes, check_symmetric
from fisherlens.scores.plan import Plan, Sizes, make_plan
from fisherlens.scores.recorder import Recorder, flattened_map, preserved_randomness, probe, unexplained
from fisherlens.scores.source import Batch, Source, tensors_of

# Bytes of the graph of one piece: larger passes gain nothing on a CPU and lose the caches (our choice).
_TRANSIENT = 192 * 2**20
# Vectors are differentiated together while they and their share of the graph stay in the caches; beyond, one after another
# is as fast (measured on a CPU), and on a GPU the batch only has to fill the device.
_TOGETHER = {"cpu": 4 * 2**20, "cuda": 512 * 2**20}


class LossCurvature(OwnPrecision):
    """Products with Σ w ∇²l over a data set, parameters and data frozen as they are now.

    The gradient is differentiated a second time in reverse (Pearlmutter 1994 gives the product; forward mode over reverse was
    not faster on the reference networks). Graphs are kept where they fit the budget, which saves a third of each product.

    Parameters
    ----------
    model, data, likelihood, params, progress, check_deterministic
        As for :class:`fisherlens.Fisher`.
    budget
        Bytes that may be kept; an eighth of it bounds the graph of one piece.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[dict[str, Tensor], Any], Tensor],
        data: Any,
        likelihood: Likelihood,
        *,
        params: Any = None,
        budget: int,
        progress: bool | None = None,
        check_deterministic: bool = True,
    ):
        model, params = as_module(model, params)
        layout = Layout.from_model(model, params)
        check_model(model, layout)
        first = dict(model.named_parameters())[layout.names[0]]
        self.likelihood, self.budget, self.device = likelihood, budget, first.device
        self.dtype = torch.float32 if first.dtype in LOW_PRECISION else first.dtype
        self._coarse = first.dtype in LOW_PRECISION
        self._plain, self._batches, self._graphs = False, False, []
        with torch.inference_mode(False), preserved_randomness(self.device):
            self.source = Source(data, self.device, check=check_deterministic)
            self.n_data = self.source.n_data
            sample = first_examples(self.source)
            self.recorder = Recorder(model, layout, check=check_deterministic)
            outputs = probe(self.recorder, sample)
            likelihood.check_data(outputs.shape[1:], self.n_data)
            sample_at = slice(0, sample.size)  # which examples they are does not matter for what is learnt from them
            bound = self._bind(outputs, sample, sample_at)
            check_differentiable(likelihood, bound, outputs, sample.targets, sample.where, sample_at)
            self.recorder.release(unexplained(self.recorder, sample))
            uses = self.recorder.forward(sample)[1]
            maps = {n: flattened_map(u[0]) for n, u in uses.items() if u and layout.layer(n).kind == "dense"}
            self.recorder.layout = self.layout = layout.with_input_maps(
                {n: found for n, found in maps.items() if found}
            )
            self.recorder.freeze()
            self._settle(sample, sample_at)
            nbytes = self._measure(sample, sample_at)
            self.plan = self._make_plan(uses, nbytes)
            self._first_pass(progress)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **vars(self),
            "_graphs": [],
        }  # a graph survives neither a file nor a deep copy: what comes back depends on nothing

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.kept:
            with torch.inference_mode(False), preserved_randomness(self.device):
                self._graphs = [self._graph(batch.own(), at, self.layout.names) for batch, at in self._pieces()]

    # --- passes over the data ----------------------------------------------------------------------------------------

    def _bind(self, outputs: Tensor, batch: Batch, at: slice) -> BoundLikelihood:
        if batch.targets is None:
            raise InputError(
                f"The Hessian of the loss needs observed labels, but the targets of {batch.where} are None. Give data as (inputs, targets), or use "
                "kind='exact', which takes the expectation over labels."
            )
        return self.likelihood.bind(outputs, batch.targets, batch.where, at)

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Gradients on; without cuDNN where its kernel (recurrent layers) has no second derivative."""
        with torch.inference_mode(False), torch.enable_grad():
            if self._plain:
                with torch.backends.cudnn.flags(enabled=False):
                    yield
            else:
                yield

    def _graph(
        self, batch: Batch, at: slice, names: Sequence[str], shift: Mapping[str, Tensor] | None = None
    ) -> LossGraph:
        """The gradient of the loss of a batch by some parameters, moved by ``shift`` where given."""
        leaves = {name: leaf for name, leaf in self.recorder.leaves().items() if name in names}
        if shift is not None:
            leaves = {name: (leaf.detach() + shift[name]).requires_grad_() for name, leaf in leaves.items()}
        with self._kernels():
            outputs = self.recorder.outputs_with_graph(batch, leaves)
            bound = self._bind(outputs, batch, at)
            grads: Sequence[Tensor | None] = [None] * len(leaves)
            if outputs.requires_grad:
                signal = loss_gradient(self.likelihood, bound, outputs, batch.targets, batch.where, at)
                grads = torch.autograd.grad(
                    outputs, list(leaves.values()), signal, create_graph=True, allow_unused=True
                )
        dense = {
            name: g.to_dense() if g is not None and g.is_sparse else g for name, g in zip(leaves, grads, strict=True)
        }
        return LossGraph(leaves, dense, bound.weight)

    def _pieces(self) -> Iterator[tuple[Batch, slice]]:
        """The data in pieces of bounded size, and the place of each in the data set."""
        done = 0
        for whole in self.source.batches():
            for begin in range(0, whole.size, self.step):
                batch = whole.part(begin, begin + self.step)
                yield batch, slice(done, done + batch.size)
                done += batch.size

    def _each_graph(self, names: Sequence[str]) -> Iterator[LossGraph]:
        if self._graphs:
            yield from self._graphs
            return
        with preserved_randomness(self.device):
            for batch, at in self._pieces():
                yield self._graph(batch, at, names)

    def _first_pass(self, progress: bool | None) -> None:
        """Total weight and gradient, and the graphs if they are kept."""
        gradient = torch.zeros(self.layout.n_params, dtype=torch.float64, device=self.device)
        weight = torch.zeros((), dtype=torch.float64, device=self.device)
        graphs = []
        with progress_bar(self.n_data, desc="Gradient of the loss", enabled=progress) as bar:
            for batch, at in self._pieces():
                graph = self._graph(batch.own() if self.kept else batch, at, self.layout.names)
                gradient += graph.flat_gradient()
                weight += graph.weight.sum()
                if self.kept:
                    graphs.append(graph)
                bar.update(batch.size)
        self.total_weight = weight.item()
        if not self.total_weight > 0:
            raise InputError(
                "Every term has weight 0 (all labels are ignored, or their class weights are 0), so the Hessian of the mean loss is not defined. "
                "Check ignore_index and weight."
            )
        self._require_finite(gradient, "gradient")
        self.gradient = (gradient / self.total_weight).to(self.dtype)
        leaves = self.recorder.leaves().values()
        self.parameters = torch.cat([leaf.detach().reshape(-1) for leaf in leaves]).to(self.dtype)
        self._graphs = graphs
        if not self.kept:
            self.source.remember()

    # --- products ----------------------------------------------------------------------------------------------------

    def product(self, v: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """Σ w ∇²l V for ``(p, K)`` over the parameters ``names`` (None for all), ``(p, K)``; in float64 if it is a sum over pieces."""
        with torch.inference_mode(False):
            return self._product(v, self.layout.names if names is None else tuple(names))

    def _product(self, v: Tensor, names: Sequence[str]) -> Tensor:
        infos = [self.layout[name] for name in names]
        rows = v.T.to(self.dtype).contiguous()
        split = zip(infos, rows.split([info.numel for info in infos], dim=1), strict=True)
        # memory of its own each: a parameter that is viewed as complex numbers must not begin in the middle of one
        tangents = {info.name: piece.clone().reshape(len(rows), *info.shape) for info, piece in split}
        sum_dtype = torch.float64 if self.num_pieces > 1 else self.dtype
        out = torch.zeros(rows.shape, dtype=sum_dtype, device=self.device)
        for graph in self._each_graph(names):
            step = self._vectors_together(len(graph.weight), rows.shape[1])
            for begin in range(0, len(rows), step):
                part = {name: t[begin : begin + step] for name, t in tangents.items()}
                keep = bool(self._graphs) or begin + step < len(rows)
                self._differentiate(graph, part, out[begin : begin + step], keep)
        # one sum is a cheap first look; only where it overflows does every entry get looked at
        if not torch.isfinite(out.sum()):
            self._require_finite(out, "product")
        return out.T

    def _vectors_together(self, examples: int, size: int) -> int:
        if not self._batches:
            return 1
        held = self.bytes_per_example * examples + size * self.dtype.itemsize
        limit = min(_TOGETHER.get(self.device.type, _TOGETHER["cuda"]), self.budget // 4)
        return max(1, limit // max(held, 1))

    def _differentiate(self, graph: LossGraph, tangents: Mapping[str, Tensor], out: Tensor, keep: bool) -> None:
        with self._kernels():
            if len(out) > 1 and self._batches:
                graph.add_product(tangents, out, keep=keep)
                return
            for k, row in enumerate(out):
                graph.add_product({name: t[k] for name, t in tangents.items()}, row, keep=keep or k + 1 < len(out))

    def _require_finite(self, x: Tensor, what: str) -> None:
        if not torch.isfinite(x).all():
            raise NonFiniteError(
                f"The {what} of the loss holds NaN or infinity although parameters, inputs and outputs are finite: a derivative overflowed. Look for "
                "square roots, norms or logarithms at 0 in the model's forward, or use a float64 model."
            )

    # --- what the model allows ---------------------------------------------------------------------------------------

    def _settle(self, sample: Batch, at: slice) -> None:
        """Find on a few examples how to differentiate twice, several vectors together or not; and check the answer."""
        generator = torch.Generator().manual_seed(0)
        tangents = {
            name: torch.randn(2, *leaf.shape, generator=generator, dtype=torch.float64, device="cpu").to(
                self.device, leaf.dtype
            )
            for name, leaf in self.recorder.leaves().items()
        }
        flat = torch.cat([t.reshape(2, -1) for t in tangents.values()], dim=1).double()
        found, together = torch.zeros_like(flat), torch.zeros_like(flat)
        failure: RuntimeError | None = None
        for plain in (False, True) if self.device.type == "cuda" else (False,):
            self._plain = plain
            try:
                graph = self._graph(sample, at, self.layout.names)
                found.zero_()
                self._differentiate(graph, tangents, found, True)
                break
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                failure = error
        else:
            raise UnsupportedModuleError(
                f"The gradient of this model cannot be differentiated again: {failure}. An operation of its forward has no second derivative in "
                "torch. Replace it by one that has, or use kind='exact', which needs first derivatives only."
            ) from failure
        check_nodes(graph)
        tolerance = 5e-2 if self._coarse else 1e-3 if self.dtype == torch.float32 else 1e-8
        check_symmetric(flat[0], flat[1], found, tolerance)
        if any(name.startswith("custom:") for name in graph.functions()) and not self._coarse:
            self._check_custom(sample, at, tangents, found[0])
        self._batches = True
        try:
            self._differentiate(graph, tangents, together, True)
            self._batches = bool((together - found).abs().max() <= tolerance * found.abs().max())
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self._batches = False

    def _check_custom(self, sample: Batch, at: slice, tangents: Mapping[str, Tensor], product: Tensor) -> None:
        """Compare with differences of the gradient where a user's own backward takes part."""
        length = sum(t[0].double().square().sum() for t in tangents.values()).sqrt().item()
        size = sum(leaf.detach().double().square().sum() for leaf in self.recorder.leaves().values()).sqrt().item()
        step = torch.finfo(self.dtype).eps ** (1 / 3) * max(size, 1.0) / length
        ahead, behind = (
            self._graph(sample, at, self.layout.names, {name: s * step * t[0] for name, t in tangents.items()})
            for s in (1, -1)
        )
        tolerance = 5e-2 if self.dtype == torch.float32 else 1e-3
        check_differences(product, ahead.flat_gradient(), behind.flat_gradient(), step, tolerance)

    def _measure(self, sample: Batch, at: slice) -> int:
        """Bytes that the graph of the gradient holds per example; the answer is those of all graphs, 0 where they do not fit."""
        one, size = self._graph_bytes(sample.part(0, 1), slice(at.start, at.start + 1)), sample.size
        self.bytes_per_example = one if size == 1 else max(1, (self._graph_bytes(sample, at) - one) // (size - 1))
        fixed = max(0, one - self.bytes_per_example) + self.layout.n_params * self.dtype.itemsize
        inputs = sum(x.nbytes for x in tensors_of(sample.inputs)) // size
        self.step = max(1, min(self.budget // 8, _TRANSIENT) // self.bytes_per_example)
        self.num_pieces = sum(-(-batch_size // self.step) for batch_size in self.source.sizes)
        needed = self.n_data * (self.bytes_per_example + inputs) + self.num_pieces * fixed
        self.kept = needed <= self.budget
        return needed if self.kept else 0

    def _make_plan(self, uses: Any, nbytes: int) -> Plan:
        """One path for all layers; the graph has no layers, so its bytes are shared out by the layers' work.

        A product differentiates a gradient (1 forward, 2 backward) once more (2 each): 9/3 of a gradient, 6/3 where its graph is kept.
        """
        work = make_plan(self.layout.layers, uses, Sizes(self.n_data, 1, self.dtype, 0), 2**62)
        total = max(sum(entry.gradient_flops for entry in work), 1.0)
        path, reason = "streamed", "the graph of the gradient does not fit"
        if self.kept:
            path, reason = "linearised", "the graph of the gradient is kept"
        entries = [
            replace(
                entry,
                path=path,
                reason=reason,
                storage="none",
                nbytes=int(nbytes * entry.gradient_flops / total),
                product_flops=entry.gradient_flops * (2 if self.kept else 3),
            )
            for entry in work
        ]
        plan = Plan(entries, self.n_data, 0, self.budget)
        # vectors of a product's two passes, in the network's dtype and summed in float64, or while it runs nearly as much as the graph once
        # more (measured on five networks)
        size, p = self.dtype.itemsize, self.layout.n_params
        plan.transient_nbytes = int(max((14 * size + 32) * p, 5 * size * p + 0.9 * plan.nbytes))
        return plan

    def _graph_bytes(self, batch: Batch, at: slice) -> int:
        known = (*self.recorder.leaves().values(), *tensors_of(batch.inputs))
        return held_bytes(lambda: self._graph(batch, at, self.layout.names), known, keep=True)
