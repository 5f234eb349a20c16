"""The same facts where matrices and Gram matrices do not fit: products with shared random probes, and Lanczos for the leading spaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherlens._progress import progress
from fisherlens.errors import InputError, MemoryBudgetError, readable_bytes
from fisherlens.fisher import Fisher
from fisherlens.spectrum.kinds_capture import Member, rows_of
from fisherlens.spectrum.kinds_parts import Part
from fisherlens.spectrum.top import top_eigenvalues


class Probes:
    """Random sign vectors z, of which E‖A z‖² = ‖A‖² and E⟨A z, B z⟩ = ⟨A, B⟩; the same for every matrix that is compared.

    Parameters
    ----------
    num_probes
        Vectors.
    k, dampings
        Leading pairs, and dampings of the natural gradients, that are taken beside them.
    seed
        Of a generator of its own.
    """

    def __init__(self, num_probes: int, k: int, dampings: Sequence[float], seed: int):
        self.num_probes, self.k, self.dampings, self.seed = num_probes, k, tuple(dampings), seed
        self.num_matvecs = 0

    def vectors(self, F: Fisher) -> Tensor:
        """``(P, probes)``; drawn on the CPU, so that the device does not change them."""
        generator = torch.Generator().manual_seed(self.seed)
        bits = torch.randint(0, 2, (F.n_params, self.num_probes), generator=generator, dtype=torch.int8, device="cpu")
        return (2 * bits - 1).to(F.device, F.dtype)

    def require_room(self, F: Fisher, members: int) -> None:
        """Refuse what would not fit before the first product."""
        needed = members * F.n_params * (self.num_probes + self.k + 1 + len(self.dampings)) * F.dtype.itemsize
        if needed > F.memory:
            raise MemoryBudgetError(
                f"The comparison keeps {self.num_probes} products and {self.k} eigenvectors of {members} matrices of order {F.n_params}, "
                f"{readable_bytes(needed)}, over the budget of {readable_bytes(F.memory)}. Use fewer num_probes, seeds or kinds, a smaller k, or raise memory=."
            )

    def images(self, F: Fisher) -> Tensor:
        """F z of every probe."""
        self.num_matvecs += self.num_probes
        return F @ self.vectors(F)

    def leading(self, part: Part, F: Fisher, gradient: Tensor | None) -> None:
        """Add leading pairs and natural gradients of one matrix to a part."""
        wanted = min(self.k + 1, F.n_params)  # one more, for the gap below the leading space
        found = top_eigenvalues(F, wanted, vectors=True, seed=self.seed)
        self.num_matvecs += int(found.attrs.get("num_matvecs", 0))
        values = torch.from_numpy(found["eigenvalue"].values).double()
        above = torch.from_numpy(found["above_noise"].values) & (values > 0)
        keep = above.nonzero()[:, 0][: self.k]
        vectors = torch.from_numpy(found["eigenvector"].values[keep.numpy()])
        part.values.append(values)
        part.floors.append(float(found["noise_floor"]) if "noise_floor" in found else float("nan"))
        part.spaces.append(vectors.T.to(F.device, F.dtype))
        if gradient is not None:
            part.steps.append(torch.stack([F.solve(gradient, lam) for lam in self.dampings], dim=1))


def probed_parts(
    make: Callable[[Member], Fisher], members: Sequence[Member], by: str | None, probes: Probes, bar: bool | None
) -> tuple[list[Part], Fisher, list[str | None]]:
    """Every part from products alone, one matrix captured at a time; also the first of them, for its facts, and the parts' names."""
    parts: list[Part] = []
    images: list[list[Tensor]] = []
    facts: tuple[Fisher, list[str | None]] | None = None
    for at, member in enumerate(progress(members, desc="comparing kinds", enabled=bar)):
        F = make(member)
        probes.require_room(F, len(members))
        facts = (F, [None] if by is None else [*F.layout.layer_names, None]) if facts is None else facts
        for place, (_, view) in enumerate(views(F, facts[1])):
            if not at:
                parts.append(Part.empty(view.n_params, len(members), probes.num_probes))
                images.append([])
            image = probes.images(view)
            images[place].append(image)
            parts[place].trace[at] = _traces(view, image, probes)
            probes.leading(parts[place], view, gradient_of(view))
    for part, found in zip(parts, images, strict=True):
        for i, a in enumerate(found):
            for j, b in enumerate(found[: i + 1]):
                part.inner[i, j] = part.inner[j, i] = (a * b).double().sum(0).cpu()
                part.square[i, j] = part.square[j, i] = (a - b).double().square().sum(0).cpu()
    return parts, *facts


def add_hessian(part: Part, F: Fisher, ranges: Sequence[range], hessian: Fisher, probes: Probes) -> Part:
    """Put a Hessian that is too large to form beside members whose rows are at hand."""
    count = len(ranges)
    z = probes.vectors(F)
    image = F.scores.matmat(z)
    own = probes.images(hessian)
    wide = Part.empty(part.size, count + 1, probes.num_probes)
    wide.inner[:count, :count], wide.square[:count, :count] = part.inner, part.square
    wide.trace[:count], wide.trace[count] = part.trace, _traces(hessian, own, probes)
    wide.inner[count, count] = own.double().square().sum(0).cpu()
    for i, columns in enumerate(ranges):
        index = rows_of(F, columns)
        only = torch.zeros_like(image)
        only[index] = image[index] / F.total_weight
        other = F.scores.rmatmat(only)
        wide.inner[i, count] = wide.inner[count, i] = (other * own).double().sum(0).cpu()
        wide.square[i, count] = wide.square[count, i] = (other - own).double().square().sum(0).cpu()
    wide.values, wide.floors, wide.spaces, wide.steps = part.values, part.floors, part.spaces, part.steps
    probes.leading(wide, hessian, gradient_of(hessian))
    return wide


def _traces(F: Fisher, image: Tensor, probes: Probes) -> Tensor:
    """The trace: exact from score rows, of a Hessian one value zᵀHz per probe."""
    if F.kind != "hessian":
        return torch.full((probes.num_probes,), F.trace(), dtype=torch.float64, device="cpu")
    return (probes.vectors(F) * image).double().sum(0).cpu()


def views(F: Fisher, names: Sequence[str | None]) -> Iterator[tuple[str | None, Any]]:
    """The whole for None, and a layer for its name."""
    for name in names:
        yield name, (F if name is None else F.restrict(name))


def gradient_of(F: Fisher) -> Tensor | None:
    """The mean gradient; None where the data have no labels."""
    try:
        return F.gradient()
    except InputError:
        return None
